"""Batch normalization whose statistics stand still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """Within it every BatchNorm layer uses its running statistics and leaves them as they are.

    ::

        with frozen_batchnorm(model):
            optimizer.backward({"a": lambda: loss_a(model(x)), "b": lambda: loss_b(model(x))})

    Statistics of a micro-batch are noise that every forward pass draws anew, and where each task
    has a forward pass of its own (losses given as functions, stochastic mode) it is a part of what
    the tasks' gradients differ by. Such passes also move the running statistics several times in a
    micro-batch. The published implementation of GCond therefore puts the whole model into
    evaluation mode for its passes, which turns dropout off too; here the statistics alone are
    frozen. Dropout and all other layers keep their mode, and the layers' weights and biases train.

    The running statistics should be worth using: those of a new model are 0 and 1, so train
    without this at first, or start from a trained model. Layers made with
    `track_running_stats=False` have none and go on as before. `model.train()` within thaws them.

    Args:
        model: every BatchNorm layer in it is meant, SyncBatchNorm and subclasses included. On
            leaving, also by an exception, each gets the mode back that it had on entering.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False  # not eval(): a subclass may hold a dropout layer
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode

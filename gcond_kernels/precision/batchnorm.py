"""Batch normalization with frozen statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """Make every BatchNorm layer use its running statistics, and leave them as they are.

    ::

        with frozen_batchnorm(model):
            optimizer.backward({"a": lambda: loss_a(model(x)), "b": lambda: loss_b(model(x))})

    Statistics of a micro-batch are noise that differs between forward passes, and where each task
    has a forward pass of its own (losses given as functions, stochastic mode) the tasks' gradients
    differ by it; such passes also update the running statistics several times in a micro-batch. The
    published implementation of GCond therefore puts the model into evaluation mode, which turns
    dropout off too; here all else keeps its mode, and the layers' weights and biases train.

    The running statistics of a new model are 0 and 1: train without this at first, or start from a
    trained model. Layers made with `track_running_stats=False` have none and are not affected.
    `model.train()` within it unfreezes them.

    Args:
        model: every BatchNorm layer in it is frozen, SyncBatchNorm and subclasses included. On
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

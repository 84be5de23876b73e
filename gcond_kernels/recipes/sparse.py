"""Sparse training: a mask of the largest weights of each neuron, which alone are trained."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from gcond_kernels.diagnostics.records import check_count
from gcond_kernels.storage.dtensor import is_dtensor

CHUNK = 1 << 24  # weights that are sorted at a time, with 12 bytes or more for each
MODULES = "Linear, Conv1d to 3d, ConvTranspose1d to 3d, MultiheadAttention"


class _Weight(NamedTuple):
    """Name a weight that has neurons."""

    name: str
    parameter: nn.Parameter | None  # None where the module computes it (a parametrization)
    groups: int | None  # of a transposed convolution


def neuron_mask(
    model: nn.Module, k: int | None = None, *, share: float | None = None
) -> dict[nn.Parameter, Tensor]:
    """Return masks that train, of every neuron, the input weights of largest magnitude.

    ::

        mask = neuron_mask(model.backbone, share=0.3)
        optimizer = GCondFused(torch.optim.AdamW(model.parameters()), tasks, mask=mask)

    Sparse training (Zhang et al. 2024, "Proactive Gradient Conflict Mitigation in Multi-Task
    Learning: A Sparse Training Perspective", arXiv 2411.18615): before training a mask M is chosen
    once, and every step is θ ← θ − η (M ∘ ∇). There, the choice per neuron did better than a random
    one or the largest of the whole network, with about 30 % of the weights of a pretrained backbone
    and about 60 % of one trained from scratch. Heads stay dense where only the backbone is given.

    A neuron is an output unit: a row of a Linear's weight, of a Conv's and of the input projections
    of a MultiheadAttention, and for a ConvTranspose the weights of one output channel in its group.
    A weight that several modules use has one entry, by the first of them. Everything else has none
    and trains densely: biases, norms, embeddings, Bilinear and recurrent layers, what is frozen,
    and weights that a module computes from others (`torch.nn.utils.parametrizations`, pruning),
    where the parameters are no input weights. Unfreeze, and remove parametrizations, before.

    The `.grad` of masked weights is 0, but AdamW's weight decay, or SGD's, still shrinks them in
    every step, which the rule above does not. To keep them as they are, give the masked parameters
    a group with `weight_decay=0`: `{"params": list(mask), "weight_decay": 0.0}`.

    Args:
        model: the part of the network that trains sparsely. Its weights are read, not changed.
        k: number of weights per neuron, all where it has fewer; 1 or more.
        share: or their share, in (0, 1]: round(share · fan-in), but at least 1.

    Returns:
        For each weight a bool tensor of its shape, on its device, True where it is trained: exactly
        k, or the share, of each neuron. Of equal magnitudes the first are selected. For a DTensor a
        DTensor with the same mesh and placements; all ranks call this.

    Raises:
        TypeError: model is no module.
        ValueError: both or neither of k and share are given, or one is out of its range; there is
            no weight to choose from; a weight holds a NaN, is on the meta device, or has no values
            yet (a lazy module before its first forward pass).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    if (k is None) == (share is None):
        raise ValueError(f"give exactly one of k and share, not k={k!r} and share={share!r}")
    if k is not None:
        check_count("k", k, 1)
    elif not isinstance(share, Real) or isinstance(share, bool) or not 0.0 < share <= 1.0:
        raise ValueError(f"share must be a number in (0, 1], not {share!r}")
    weights = list(_weights(model))
    mask: dict[nn.Parameter, Tensor] = {}
    for weight in weights:
        parameter = weight.parameter
        if parameter is not None and parameter.requires_grad and parameter not in mask:
            mask[parameter] = _mask_of(weight, parameter, k, share)
    if not mask:
        why = f"there is no such module ({MODULES}) in it"
        if weights:
            why = f"all {len(weights)} of them are frozen or parametrized"
        raise ValueError(f"{type(model).__name__} has no weights of neurons to choose from: {why}")
    return mask


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """Return the weights of all modules that have neurons, in the order of the modules."""
    for path, module in model.named_modules():
        names = ["weight"]
        groups = module.groups if isinstance(module, _ConvTransposeNd) else None
        if isinstance(module, nn.MultiheadAttention):  # its output projection is a Linear
            # Keys and values may have a width of their own.
            one = module._qkv_same_embed_dim
            names = ["in_proj_weight"] if one else [f"{p}_proj_weight" for p in "qkv"]
        elif not isinstance(module, (nn.Linear, _ConvNd)):
            continue
        own = dict(module.named_parameters(recurse=False))
        for name in names:
            yield _Weight(f"{path}.{name}" if path else name, own.get(name), groups)


def _to_neurons(weight: Tensor, groups: int | None) -> Tensor:
    """Return [neurons, fan-in]; in transposed convolutions a group's inputs are contiguous."""
    if groups is not None:
        grouped = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
        weight = grouped.transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _from_neurons(neurons: Tensor, shape: torch.Size, groups: int | None) -> Tensor:
    """Return what `_to_neurons` made [neurons, fan-in] of, in the shape of the weight."""
    if groups is None:
        return neurons.view(shape)
    inputs, outputs, *kernel = shape
    grouped = neurons.view(groups, outputs, inputs // groups, *kernel)
    return grouped.transpose(1, 2).reshape(shape)


def _mask_of(
    weight: _Weight, parameter: nn.Parameter, k: int | None, share: float | None
) -> Tensor:
    """Return a bool tensor like the parameter, True where it is trained."""
    if is_lazy(parameter):
        raise ValueError(
            f"{weight.name} has no values yet, as of a lazy module: run a forward pass first"
        )
    if parameter.is_meta:
        raise ValueError(f"{weight.name} is on the meta device, which holds no values")
    if parameter.numel() == 0:
        return torch.zeros_like(parameter, dtype=torch.bool)
    sharded: Any = parameter if is_dtensor(parameter) else None
    full = parameter.detach() if sharded is None else sharded.detach().full_tensor()
    magnitudes = _to_neurons(full.abs(), weight.groups)
    if magnitudes.isnan().any():
        raise ValueError(f"{weight.name} is NaN somewhere: there are no largest of its magnitudes")
    fan_in = magnitudes.shape[1]
    count = k if k is not None else max(1, round((share or 1.0) * fan_in))
    selected = torch.zeros_like(magnitudes, dtype=torch.bool)
    neurons = max(1, CHUNK // fan_in)
    chunks = torch.split(magnitudes, neurons), torch.split(selected, neurons)
    for chunk, into in zip(*chunks, strict=True):
        # Not topk, which takes any of those that are equal: all ranks select the same.
        largest = chunk.sort(dim=1, descending=True, stable=True).indices[:, :count]
        into.scatter_(1, largest, True)
    mask = _from_neurons(selected, full.shape, weight.groups)
    if sharded is None:
        return mask
    from torch.distributed.tensor import distribute_tensor

    # Nothing is sent: every rank has computed the same.
    return distribute_tensor(mask, sharded.device_mesh, sharded.placements, src_data_rank=None)

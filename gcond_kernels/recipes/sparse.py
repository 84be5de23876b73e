"""Which weights are trained where only a part of each neuron's is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from gcond_kernels.storage.dtensor import is_dtensor

# How a weight becomes rows [neurons, fan-in], and how such rows get the weight's shape again.
Layout: TypeAlias = "tuple[Callable[[Tensor], Tensor], Callable[[Tensor, torch.Size], Tensor]]"

BLOCK = 1 << 24  # so many weights are sorted at a time: that takes 12 bytes or more for each
KINDS = "Linear, Conv1d to 3d, ConvTranspose1d to 3d, MultiheadAttention"


class _Weight(NamedTuple):
    """A weight that has neurons, and how it lies.

    Attributes:
        name: in the model.
        parameter: any shape; None where the module computes it (a parametrization).
        layout: of its neurons.
    """

    name: str
    parameter: nn.Parameter | None
    layout: Layout


def neuron_mask(
    model: nn.Module, k: int | None = None, *, share: float | None = None
) -> dict[nn.Parameter, Tensor]:
    """Chooses, for every neuron, the input weights of largest magnitude: those are trained.

    ::

        mask = neuron_mask(model.backbone, share=0.3)
        optimizer = GCondFused(torch.optim.AdamW(model.parameters()), tasks, mask=mask)

    Sparse training (Zhang et al. 2024, "Proactive Gradient Conflict Mitigation in Multi-Task
    Learning: A Sparse Training Perspective", arXiv 2411.18615): before training a mask M is chosen
    once, and every step is θ ← θ − η (M ∘ ∇). Tasks that move fewer weights conflict less. There,
    the choice per neuron did better than a random one or the largest of the whole network, with
    about 30 % of the weights of a pretrained backbone and about 60 % of one trained from scratch.
    Heads stay dense where only the backbone is given, as above.

    A neuron is an output unit: a row of a Linear's weight, of a Conv's and of the input projections
    of a MultiheadAttention, and for a ConvTranspose what leads to one output channel in its group.
    A weight that several modules use has one entry, by the first of them. Everything else has none
    and trains densely: biases, norms, embeddings, Bilinear and recurrent layers, what is frozen,
    and weights that a module computes from others (`torch.nn.utils.parametrizations`, pruning),
    where the parameters are no input weights. Thaw, and remove parametrizations, before.

    What moves a weight without a gradient still moves those that are masked: their `.grad` is 0,
    but AdamW's weight decay, or SGD's, takes its share of them in every step, which the rule above
    does not have. To keep them as they are, give the masked parameters a group with
    `weight_decay=0`: `{"params": list(mask), "weight_decay": 0.0}`.

    Args:
        model: the part of the network that trains sparsely. Its weights are read, not changed.
        k: so many weights per neuron, all where it has fewer; 1 or more.
        share: or this share of them, in (0, 1]: round(share · fan-in), but at least 1.

    Returns:
        For each weight a bool tensor of its shape, on its device, True where it is trained: exactly
        as many in each neuron as asked for. Of weights of one magnitude the first are taken. For a
        DTensor it is a DTensor with the same mesh and placements; all ranks call this alike.

    Raises:
        TypeError: model is no module.
        ValueError: both or neither of k and share are given, or one out of its range; no weight to
            choose from; a weight that is NaN somewhere, on the meta device, or not yet there (a
            lazy module before its first forward pass).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    _check_number(k, share)
    weights = list(_weights(model))
    mask: dict[nn.Parameter, Tensor] = {}
    for weight in weights:
        parameter = weight.parameter
        if parameter is not None and parameter.requires_grad and parameter not in mask:
            mask[parameter] = _mask_of(weight, parameter, k, share)
    if not mask:
        why = (
            f"all {len(weights)} of them are frozen or parametrized"
            if weights
            else f"there is no such module ({KINDS}) in it"
        )
        raise ValueError(f"{type(model).__name__} has no weights of neurons to choose from: {why}")
    return mask


def _check_number(k: object, share: object) -> None:
    """One of the two, in its range."""
    if (k is None) == (share is None):
        raise ValueError(f"give exactly one of k and share, not k={k!r} and share={share!r}")
    if k is not None and (not isinstance(k, Integral) or isinstance(k, bool) or int(k) < 1):
        raise ValueError(f"k must be a whole number, 1 or more, not {k!r}")
    number = isinstance(share, Real) and not isinstance(share, bool)
    if share is not None and (not number or not 0.0 < share <= 1.0):  # type: ignore[operator]
        raise ValueError(f"share must be a number in (0, 1], not {share!r}")


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """The weights of all modules that have neurons, in the order of the modules."""
    for path, module in model.named_modules():
        layout = _layout_of(module)
        if layout is None:
            continue
        own = dict(module.named_parameters(recurse=False))
        for name in _names_in(module):
            yield _Weight(f"{path}.{name}" if path else name, own.get(name), layout)


def _names_in(module: nn.Module) -> tuple[str, ...]:
    """What the module calls its weights."""
    if not isinstance(module, nn.MultiheadAttention):
        return ("weight",)
    # Its output projection is a Linear. Keys and values may have a width of their own.
    if module._qkv_same_embed_dim:
        return ("in_proj_weight",)
    return ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _layout_of(module: nn.Module) -> Layout | None:
    """How the weights of this module become rows, a neuron each, and back; None: it has none."""
    if isinstance(module, _ConvTransposeNd):
        return _by_output_of_transposed(module.groups)
    if isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention)):
        return lambda weight: weight.flatten(1), lambda rows, shape: rows.view(shape)
    return None


def _by_output_of_transposed(groups: int) -> Layout:
    """[in, out / groups, *kernel], where a group's inputs lie together in the first dimension."""

    def rows(weight: Tensor) -> Tensor:
        inputs, outputs, *kernel = weight.shape
        grouped = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
        return grouped.flatten(2).flatten(0, 1)  # [out, in / groups · kernel]

    def back(rows: Tensor, shape: torch.Size) -> Tensor:
        inputs, outputs, *kernel = shape
        grouped = rows.view(groups, outputs, inputs // groups, *kernel)
        return grouped.transpose(1, 2).reshape(shape)

    return rows, back


def _mask_of(
    weight: _Weight, parameter: nn.Parameter, k: int | None, share: float | None
) -> Tensor:
    """A bool tensor like the parameter."""
    if is_lazy(parameter):
        raise ValueError(
            f"{weight.name} has no values yet, as it belongs to a lazy module: run a forward pass "
            "first"
        )
    if parameter.is_meta:
        raise ValueError(f"{weight.name} is on the meta device, which holds no values")
    if parameter.numel() == 0:
        return torch.zeros_like(parameter, dtype=torch.bool)
    whole: Any = parameter.detach()
    if is_dtensor(parameter):
        whole = whole.full_tensor()
    rows, back = weight.layout
    magnitudes = rows(whole.abs())
    if magnitudes.isnan().any():
        raise ValueError(f"{weight.name} is NaN somewhere: there are no largest of its magnitudes")
    fan_in = magnitudes.shape[1]
    count = k if k is not None else max(1, round((share or 1.0) * fan_in))
    chosen = torch.zeros_like(magnitudes, dtype=torch.bool)
    height = max(1, BLOCK // fan_in)
    parts = torch.split(magnitudes, height), torch.split(chosen, height)
    for part, into in zip(*parts, strict=True):
        # Not topk, which takes any of those that are equal. Ranks choose alike by this.
        largest = part.sort(dim=1, descending=True, stable=True).indices[:, :count]
        into.scatter_(1, largest, True)
    return _placed(back(chosen, whole.shape), parameter)


def _placed(mask: Tensor, parameter: nn.Parameter) -> Tensor:
    """A mask that every rank has whole, spread as the parameter is."""
    if not is_dtensor(parameter):
        return mask
    from torch.distributed.tensor import distribute_tensor

    spread: Any = parameter
    # Nothing needs to travel: every rank has computed the same.
    return distribute_tensor(mask, spread.device_mesh, spread.placements, src_data_rank=None)

"""Flat storage of the task gradients, with the history, momentum and counts that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gcond_kernels.ops.checks import momentum_dtype
from gcond_kernels.ops.types import WORD_BITS, Layout
from gcond_kernels.storage.dtensor import placed_like
from gcond_kernels.storage.layout import (
    Segment,
    align,
    check_parameter,
    moved,
    picked,
    segments_of,
    shapes_of,
)
from gcond_kernels.storage.trainable_mask import read_mask, write_mask


class GradientStorage:
    """The accumulated task gradients, and what is kept beside them: history, momentum, counts.

    Nothing is allocated before the first gradient. The first micro-batch of a window overwrites the
    accumulators. Where history and momentum have more than one of `shards`, this process keeps one
    of each, [K, N' / shards] and [N' / shards], which `ShardStrategy` alone lays out.

    Attributes:
        accumulators: [K, N'] of `dtype`, the sums of this window's gradients.
        history: [K, N'] of the type given to `configure`, last window's sums; None where not kept.
        momentum: [N'] float32, or float64 as the accumulators are; None where not kept.
        momentum_steps: [T] int64, how often each tensor's momentum was updated.
        segments: T segments, in the order in which their parameters were first seen.
        parameters: T parameters, those of the segments.
        names: T names.
        places: parameter → index of its segment.
        counts: micro-batches of each task in this window.
        window_tasks: T sets of tasks, a bit for each, that were given a gradient for a tensor in
            this window, if only of zeros. Where there is none the parameter's `.grad` stays None.
        parameter_tasks: [T, K] bool, tasks that ever had a gradient other than zero for a tensor.
        was_shared: [T] int8, whether a tensor was shared in the last window; -1 before its first.
        mask: [N' / 32] int32, a bit for each trainable element; None where all are.
        sharded_layout: the segments and the N' with which history and momentum were sharded.
    """

    def __init__(
        self,
        tasks: int,
        dtype: torch.dtype,
        *,
        shards: int = 1,
        has_dtensors: bool = False,
        masks: dict[Tensor, Tensor] | None = None,
    ) -> None:
        self.dtype = dtype
        self.shards = shards
        self.has_dtensors = has_dtensors
        self.segments: list[Segment] = []
        self.parameters: list[Tensor] = []
        self.names: list[str] = []
        self.layout = Layout((), ())
        self.places: dict[Tensor, int] = {}
        self.window_tasks: list[int] = []
        self.parameter_tasks = torch.zeros((0, tasks), dtype=torch.bool, device="cpu")
        self.was_shared = torch.zeros(0, dtype=torch.int8, device="cpu")
        self.mask = None if masks is None else torch.empty(0, dtype=torch.int32, device="cpu")
        self._masks = dict(masks or {})  # of parameters without a segment yet
        self.counts = [0] * tasks
        self.accumulators = torch.empty((tasks, 0), dtype=dtype, device="cpu")
        self.history: Tensor | None = None
        self.momentum: Tensor | None = None
        self.momentum_steps: Tensor | None = None
        self.sharded_layout: tuple[list[Segment], int] = ([], 0)
        # What the layout was made of: parameters by their ids, those without a segment, strides.
        self._listed: list[int] = []
        self._frozen: list[Tensor] = []
        self._shapes: list[tuple[torch.Size, tuple[int, ...]]] = []
        # Views of the first accumulator, one per segment, and the accumulators that they are of.
        self._views: tuple[Tensor, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Without the ids of the parameters: those of a copy are others.
        return {**self.__dict__, "_views": None, "_listed": []}

    def configure(self, history_dtype: torch.dtype | None, momentum: bool) -> None:
        """Start or stop keeping history and momentum; what is kept already stays as it is."""
        tasks, length = self.accumulators.shape
        length = length if self.shards == 1 else 0
        zeros = self.accumulators.new_zeros
        if history_dtype is None:
            self.history = None
        elif self.history is None or self.history.dtype != history_dtype:
            self.history = zeros((tasks, length), dtype=history_dtype)
        if not momentum:
            self.momentum = self.momentum_steps = None
        elif self.momentum is None:
            self.momentum = zeros(length, dtype=momentum_dtype(self.dtype))
            self.momentum_steps = zeros(len(self.segments), dtype=torch.int64)

    def add_task(self) -> None:
        """Add a task, the last one, that has had no gradient yet; between two windows."""
        tasks, length = self.accumulators.shape
        self.accumulators = self.accumulators.new_zeros((tasks + 1, length))
        if self.history is not None:
            self.history = pad(self.history, (0, 0, 0, 1))
        self.parameter_tasks = pad(self.parameter_tasks, (0, 1))
        self.counts.append(0)

    def update_layout(
        self, groups: Sequence[dict[str, Any]], names: Callable[[], list[str]], sent: bool
    ) -> list[int]:
        """Lay out the parameters of an optimizer: new, removed, thawed or converted ones.

        `names` is called where something has changed, which raises an error if a part of this
        window was `sent` to other ranks.

        Returns:
            Of each segment its index before, -1 where it is new; nothing if all is as it was.
        """
        listed = [parameter for group in groups for parameter in group["params"]]
        ids = list(map(id, listed))
        thawed = any(map(attrgetter("requires_grad"), self._frozen))
        converted = not any(self.counts) and self._shapes != shapes_of(self.parameters)
        if ids == self._listed and not thawed and not converted:
            return []
        named = dict(zip(listed, names(), strict=True))
        old = [s.parameter for s in self.segments if s.parameter in named]
        new = [p for p in named if p.requires_grad and p not in self.places]
        changed = bool(converted or new or len(old) < len(self.segments))
        if changed and sent:
            raise RuntimeError(
                "parameters were added, thawed, replaced or removed, and the other ranks have a "
                "part of this window already: do so between step() and backward()"
            )
        places = self._lay_out([(p, named[p]) for p in (*old, *new)]) if changed else []
        self._listed = ids
        self._frozen = [p for p in listed if p not in self.places]
        self._shapes = shapes_of(self.parameters)
        return places

    def append(self, parameters: Sequence[tuple[Tensor, str]]) -> None:
        """Append segments for new parameters; a ValueError says which cannot be accumulated."""
        self._lay_out([*[(s.parameter, s.name) for s in self.segments], *parameters])

    def _lay_out(self, parameters: Sequence[tuple[Tensor, str]]) -> list[int]:
        """Lay out these parameters; what is kept of them moves along. Return their old places."""
        device = parameters[0][0].device if parameters else self.accumulators.device
        for parameter, name in parameters:
            check_parameter(parameter, name, device, self.has_dtensors)
        before = self.segments
        segments, end = segments_of(parameters)
        # The shards of an accumulator have the same length on every rank.
        length = align(-(-end // self.shards)) * self.shards
        places = [self.places.get(segment.parameter, -1) for segment in segments]
        # Of other elements than before nothing is known any more.
        places = [
            t if t >= 0 and before[t].shape == segment.shape else -1
            for t, segment in zip(places, segments, strict=True)
        ]
        pairs = [(before[t], s) for t, s in zip(places, segments, strict=True) if t >= 0]
        # Nothing reads the accumulators between two windows.
        moving = pairs if any(self.counts) else []
        self.accumulators = moved(self.accumulators, length, moving, device)
        if self.shards == 1 and self.history is not None:
            self.history = moved(self.history, length, pairs, device)
        if self.shards == 1 and self.momentum is not None:
            self.momentum = moved(self.momentum, length, pairs, device)
        if self.mask is not None:
            words = torch.full((length // WORD_BITS,), -1, dtype=torch.int32, device=device)
            for t, segment in zip(places, segments, strict=True):
                new = self._masks.pop(segment.parameter, None)
                bits = new if t < 0 else read_mask(self.mask, before[t])
                if bits is not None:
                    write_mask(words, segment, bits)
            self.mask = words
        self.window_tasks = [self.window_tasks[t] if t >= 0 else 0 for t in places]
        self.parameter_tasks = picked(self.parameter_tasks, places, 0, device)
        self.was_shared = picked(self.was_shared, places, -1, device)
        if self.momentum_steps is not None:
            self.momentum_steps = picked(self.momentum_steps, places, 0, device)
        self.segments, self._views = segments, None
        self.parameters = [segment.parameter for segment in segments]
        self.names = [segment.name for segment in segments]
        self.layout = Layout.of([s.offset for s in segments], [s.size for s in segments])
        self.places = {segment.parameter: t for t, segment in enumerate(segments)}
        return places

    def mask_of(self, segment: Segment) -> Tensor | None:
        """Return the trainable elements of a parameter, bool in its shape; None without a mask."""
        return None if self.mask is None else read_mask(self.mask, segment)

    @property
    def nbytes(self) -> int:
        """Bytes of one task's accumulator."""
        return self.accumulators.nbytes // len(self.counts)

    def clear_gradients(self) -> None:
        """Set every `.grad` to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def name_with_gradient(self) -> str | None:
        """Return the name of the first parameter with a `.grad`; None where there is none."""
        for parameter, name in zip(self.parameters, self.names, strict=True):
            if parameter.grad is not None:
                return name
        return None

    def gradient_dtypes(self) -> list[torch.dtype]:
        """Return the type of each parameter's `.grad`."""
        if not hasattr(Tensor, "grad_dtype"):
            return [p.dtype for p in self.parameters]
        return [p.grad_dtype or p.dtype for p in self.parameters]

    def new_gradients(self) -> list[Tensor | None]:
        """Return memory for each `.grad`; None where no task was given a gradient.

        It is the segment of the first accumulator where that is of the gradient's type: it was read
        when the gradient is written, and is overwritten before it is read again.
        """
        first = self.accumulators[0]
        if self._views is None or self._views[0] is not self.accumulators:
            self._views = self.accumulators, [segment.view(first) for segment in self.segments]
        views = map(
            Tensor.detach, self._views[1]
        )  # what becomes of the last window's is the user's
        columns = zip(self.segments, views, self.gradient_dtypes(), self.window_tasks, strict=True)
        return [
            None if not tasks else view if dtype == self.dtype else s.empty(dtype, first.device)
            for s, view, dtype, tasks in columns
        ]

    def gradients_from(
        self, result: Tensor, outputs: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return each `.grad` from the resolved gradient [N'] of all tensors; None as in outputs.

        It is a view of the result where that is of the gradient's type, else a copy.
        """
        gradients: list[Tensor | None] = []
        columns = zip(self.segments, self.gradient_dtypes(), outputs, strict=True)
        for segment, dtype, output in columns:
            view = segment.view(result)
            if output is not None and dtype != result.dtype:
                view = segment.empty(dtype, result.device).copy_(view)
            gradients.append(None if output is None else view)
        return gradients

    def assign_gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Assign local gradients to `.grad`, and return what was assigned."""
        assigned = list(gradients)
        if self.has_dtensors:
            pairs = zip(self.segments, gradients, strict=True)
            assigned = [None if g is None else placed_like(s.parameter, g) for s, g in pairs]
        for parameter, gradient in zip(self.parameters, assigned, strict=True):
            parameter.grad = gradient
        return assigned

    def start_window(self) -> None:
        """Drop what this window accumulated."""
        self.counts = [0] * len(self.counts)
        self.window_tasks = [0] * len(self.segments)

    def drop_task(self, task: int) -> None:
        """Drop what this window accumulated of one task."""
        self.counts[task] = 0
        self.window_tasks = [tasks & ~(1 << task) for tasks in self.window_tasks]

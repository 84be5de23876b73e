"""The task accumulators: flat storage, its layout, and the harvest of gradients into it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gcond_kernels import ops
from gcond_kernels.contracts import GRADIENT_DTYPES
from gcond_kernels.dtensor import (
    is_dtensor,
    is_unfinished,
    local_gradient,
    local_part,
    placed_like,
)
from gcond_kernels.mask import packed
from gcond_kernels.python.blocks import WORD_BITS, trained

# Segments start at multiples of this many elements: 128 bytes of float32, 64 of bfloat16.
ALIGNMENT = 32
assert ALIGNMENT % WORD_BITS == 0  # so no word of a mask says of two parameters

# Gradients that a backward pass may pile up before they are added to a row and freed: beyond some
# tens of megabytes a launch moves memory at full speed, and more would only be kept for longer.
BUCKET_BYTES = 32 << 20
# Larger buckets rather than more of them: each is a set of addresses to remember.
MOST_BUCKETS = 128


class Segment(NamedTuple):
    """Where one parameter lives in a row of flat storage, in its own memory order.

    Attributes:
        parameter: the parameter itself.
        name: how messages and reports call it.
        offset: first element in a row.
        shape: of what this process holds of it: of a DTensor the local part, which may be empty.
        stride: its strides, without gaps; they say what "its own memory order" is.
    """

    parameter: Tensor
    name: str
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, row: Tensor) -> Tensor:
        """The segment of a row [N'], in the parameter's shape."""
        # An offset given to as_strided counts from the start of the storage, not of the row.
        start = row.storage_offset() + self.offset
        return row.as_strided(self.shape, self.stride, start)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The type of the parameter's `.grad`."""
        return getattr(self.parameter, "grad_dtype", None) or self.parameter.dtype

    def new_gradient(self, view: Tensor) -> Tensor:
        """Memory for `.grad`, in the segment's memory order: its view of a row, if of that type."""
        dtype = self.gradient_dtype
        if dtype == view.dtype:
            return view
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=view.device)


class Accumulator:
    """One flat row per task, and what goes with it: history, momentum, counts.

    Nothing is allocated before the first gradient, and nothing is ever zeroed: the first
    micro-batch of a window overwrites.

    Attributes:
        rows: [K, N'] of `dtype`, the sums of this window's gradients.
        history: [K, N'] of `history_dtype`, last step's rows; None where not kept.
        momentum: [N'] float32; None where not kept.
        momentum_steps: [T] int64, how often each tensor's momentum was updated.
        segments: T segments, in the order in which their parameters were first seen.
        counts: micro-batches of each task in this window.
        touched: of each tensor, which tasks had a gradient for it in this window: a bit per task.
        owners: of each tensor, which tasks had one in any window that was resolved.
        compared: of each tensor, whether it was compared in the last window; None before its first.
        mask: [N' / 32] int32, a bit for each element of a row that is trained; None for all.
        bucketed: whether gradients are taken while the backward pass runs, or after it.
        end: where the last segment ends. A row may be longer, so that it can be cut evenly.
        cuts: into how many parts history and momentum are cut, of which this process keeps one:
            then they are [K, N' / cuts] and [N' / cuts], and `grow` leaves them alone.
        part: which part that is.
        spread: whether the parameters may be DTensors.
        alone: whether nobody else puts gradients in place after a backward pass; where that is not
            known, they are taken whole if there are other ranks.
    """

    def __init__(
        self,
        tasks: int,
        dtype: torch.dtype,
        history_dtype: torch.dtype | None,
        momentum: bool,
        bucketed: bool = False,
        *,
        cuts: int = 1,
        part: int = 0,
        spread: bool = False,
        alone: bool = False,
        masked: dict[Tensor, Tensor] | None = None,
    ) -> None:
        self.dtype = dtype
        self.bucketed = bucketed and not spread
        self.end = 0
        self.cuts = cuts
        self.part = part
        self.spread = spread
        self.alone = alone
        self.history_dtype = history_dtype
        self.segments: list[Segment] = []
        self.offsets: tuple[int, ...] = ()
        self.sizes: tuple[int, ...] = ()
        self.touched: list[int] = []
        self.owners: list[int] = []
        self.compared: list[bool | None] = []
        # Of parameters without a segment yet, which elements are trained: as bool, in their shape.
        self._masked = masked or {}
        self.mask = None if masked is None else torch.empty(0, dtype=torch.int32)
        self.counts = [0] * tasks
        self.rows = torch.empty(tasks, 0, dtype=dtype)
        self.history = None if history_dtype is None else self.rows.to(history_dtype)
        self.momentum = torch.empty(0, dtype=torch.float32) if momentum else None
        self.momentum_steps = torch.empty(0, dtype=torch.int64) if momentum else None
        self._place: dict[Tensor, int] = {}
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._harvest: Harvest | None = None
        # Views of the first row, one per segment, and the rows that they are of.
        self._views: tuple[Tensor, list[Tensor]] | None = None

    def knows(self, parameter: Tensor) -> bool:
        """Whether the parameter has a segment."""
        return parameter in self._place

    def grow(self, parameters: Sequence[tuple[Tensor, str]]) -> None:
        """Appends segments for new parameters; what is there keeps its place and content.

        Raises:
            ValueError: a parameter cannot be accumulated; nothing has changed.
        """
        device = self.segments[0].parameter.device if self.segments else parameters[0][0].device
        for parameter, name in parameters:
            check_parameter(parameter, name, device, self.spread)
        segments, end = lay_out(parameters, self.end)

        length = aligned(-(-end // self.cuts)) * self.cuts
        self.rows = widened(self.rows, length, device)
        if self.history is not None and self.cuts == 1:
            self.history = widened(self.history, length, device)
        if self.momentum is not None and self.momentum_steps is not None:
            if self.cuts == 1:
                self.momentum = widened(self.momentum, length, device)
            count = len(self.segments) + len(segments)
            self.momentum_steps = widened(self.momentum_steps, count, device)
        for place, segment in enumerate(segments, start=len(self.segments)):
            self._place[segment.parameter] = place
        self.end = end
        self.segments += segments
        self.offsets += tuple(segment.offset for segment in segments)
        self.sizes += tuple(segment.shape.numel() for segment in segments)
        self.touched += [0] * len(segments)
        self.owners += [0] * len(segments)
        self.compared += [None] * len(segments)
        self._grow_mask(segments, device)

    def _grow_mask(self, segments: Sequence[Segment], device: torch.device) -> None:
        """Words for new segments; without a mask of its own a parameter is trained whole."""
        if self.mask is None:
            return
        words = torch.full((self.rows.shape[1] // WORD_BITS,), -1, dtype=torch.int32, device=device)
        words[: len(self.mask)] = self.mask
        for segment in segments:
            bits = self._masked.pop(segment.parameter, None)
            if bits is not None:
                set_mask(words, segment, bits)
        self.mask = words

    def mask_of(self, segment: Segment) -> Tensor | None:
        """Which elements of a parameter are trained, in its shape: bool; None without a mask."""
        if self.mask is None:
            return None
        bits = trained(self.mask, segment.offset, segment.offset + segment.shape.numel())
        return segment._replace(offset=0).view(bits)

    @contextmanager
    def harvesting(self, task: int, scale: float | Tensor, backend: str) -> Iterator[None]:
        """Adds `scale` times every `.grad` that a backward pass within leaves, and frees it.

        Where the pass fails, or a gradient cannot be accumulated, the row of the task is as it was
        if none of this pass was added yet; else the task is without a micro-batch again.

        Raises:
            ValueError: a gradient cannot be accumulated.
        """
        # Gradients that all fit in one bucket are added when the pass is over either way: then a
        # pass needs no calls within.
        several = self.rows.shape[1] * self.rows.element_size() > BUCKET_BYTES
        if self.bucketed and several and (self.alone or not is_distributed()):
            self._hook_parameters()
        else:
            self.remove_hooks()
        harvest = self._harvest = Harvest(self, task, scale, backend)
        try:
            yield
            self._check_reduced()
            harvest.finish()
        except BaseException:
            # A part of this micro-batch is in the row: with the ones before it, no mean of theirs.
            if harvest.taken:
                self.forget_task(task)
            raise
        finally:
            self._harvest = None
        self.counts[task] += 1

    def _check_reduced(self) -> None:
        """FSDP may be told to keep gradients for itself: added up over tasks they are of no use."""
        if not self.spread:  # every backward pass comes here
            return
        sharded = [s.parameter for s in self.segments if is_dtensor(s.parameter)]
        wanted = [parameter for parameter in sharded if parameter.requires_grad]
        if wanted and all(parameter.grad is None for parameter in wanted):
            raise RuntimeError(
                "the backward pass left no gradient on any sharded parameter: leave "
                "set_requires_gradient_sync and set_requires_all_reduce at True, for gradients of "
                "different tasks must not add up inside FSDP (or the loss does not depend on them)"
            )

    def _hook_parameters(self) -> None:
        """Lets every parameter say when its gradient is there; copies come without hooks."""
        if len(self._hooks) == len(self.segments):
            return
        # Not the accumulator itself: parameters often outlive their optimizer.
        tell = tell_harvest_of(weakref.ref(self))
        for segment in self.segments:
            p = segment.parameter
            if p.requires_grad and p not in self._hooks:  # of the others torch takes no hook
                self._hooks[p] = p.register_post_accumulate_grad_hook(tell)  # type: ignore[no-untyped-call]

    def remove_hooks(self) -> None:
        """Takes the hooks off the parameters."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def __del__(self) -> None:
        self.remove_hooks()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": {}, "_harvest": None, "_views": None}

    def drop_gradients(self) -> None:
        """Forgets every `.grad`."""
        for segment in self.segments:
            segment.parameter.grad = None

    def new_gradients(self) -> list[Tensor | None]:
        """Memory for `.grad`; None where no task had a gradient, or where it was frozen.

        It is the segment of the first row where that is of the gradient's type. The row has been
        read when the gradient is written, and is overwritten before it is read again.
        """
        if self._views is None or self._views[0] is not self.rows:
            self._views = self.rows, [segment.view(self.rows[0]) for segment in self.segments]
        return [
            s.new_gradient(view) if wanted else None
            for s, view, wanted in zip(self.segments, self._views[1], self.wanted(), strict=True)
        ]

    def wanted(self) -> list[bool]:
        """Of each tensor, whether it gets a `.grad`: not without a gradient, nor where frozen."""
        return [
            bool(touched) and segment.parameter.requires_grad
            for segment, touched in zip(self.segments, self.touched, strict=True)
        ]

    def give(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Puts local gradients in place as `.grad`; returns what is there now."""
        given = []
        for segment, gradient in zip(self.segments, gradients, strict=True):
            p = segment.parameter
            if gradient is not None and self.spread:
                gradient = placed_like(p, gradient)
            p.grad = gradient
            if gradient is not None:
                given.append(gradient)
        return given

    def owners_now(self) -> list[int]:
        """Of each tensor, which tasks had a gradient for it in this window or before: bits."""
        return [owners | new for owners, new in zip(self.owners, self.touched, strict=True)]

    def note_compared(self, compared: Sequence[bool]) -> bool:
        """Remembers which tensors are compared; returns whether it is others than last time."""
        self.owners = self.owners_now()
        known = [was for was in self.compared if was is not None]
        changed = [now for now, was in zip(compared, self.compared, strict=True) if was is not None]
        # What no task had a gradient for was compared in no way: its history is zero.
        self.compared = [
            now if owners else None for now, owners in zip(compared, self.owners, strict=True)
        ]
        return known != changed

    def start_window(self) -> None:
        """Forgets what this window accumulated."""
        self.counts = [0] * len(self.counts)
        self.touched = [0] * len(self.segments)

    def forget_task(self, task: int) -> None:
        """Forgets what this window accumulated of one task."""
        self.counts[task] = 0
        self.touched = [tasks & ~(1 << task) for tasks in self.touched]

    def take_back(self, before: Sequence[int], sent: int = 0) -> list[int]:
        """Undoes additions since the counts were `before`, where that needs no copy of the rows.

        A row that was empty is empty again: the next micro-batch overwrites it. The first `sent`
        rows are not ours any more.

        Returns:
            The tasks whose addition had to stay.
        """
        added = [k for k, count in enumerate(before) if self.counts[k] > count]
        for task in added:
            if before[task] == 0 and task >= sent:
                self.forget_task(task)
        return [task for task in added if self.counts[task] > 0]

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Flat storage and its layout; parameters are named by their place in `parameters`.

        The rows are left out between windows, where nothing reads them.
        """
        index = {parameter: i for i, parameter in enumerate(parameters)}
        return {
            "parameters": [index[segment.parameter] for segment in self.segments],
            "shapes": [list(segment.shape) for segment in self.segments],
            "strides": [list(segment.stride) for segment in self.segments],
            "offsets": list(self.offsets),
            "cuts": self.cuts,
            "counts": list(self.counts),
            "touched": list(self.touched),
            "owners": list(self.owners),
            "compared": list(self.compared),
            "masks": None if self.mask is None else [self.mask_of(s) for s in self.segments],
            "rows": self.rows if any(self.counts) else None,
            "history": self.history,
            "momentum": self.momentum,
            "momentum_steps": self.momentum_steps,
        }

    def check_state(self, state: dict[str, Any], parameters: Sequence[tuple[Tensor, str]]) -> None:
        """Raises a ValueError that names the difference if the state is not of these parameters."""
        kept = (("history", self.history), ("momentum", self.momentum), ("masks", self.mask))
        for name, own in kept:
            if (state[name] is None) != (own is None):
                there, here = ("no ", "") if own is not None else ("", "no ")
                raise ValueError(f"the state has {there}{name}, this optimizer has {here}{name}")
        if state.get("cuts", 1) > 1:
            layout = [state["parameters"], state["offsets"], state["strides"]]
            # Parameters that the state does not know yet come after those that it knows.
            own_layout = [part[: len(state["offsets"])] for part in self._layout_of(parameters)]
            if layout != own_layout:
                raise ValueError(
                    "the state is one rank's, of parameters in another order than here: between "
                    "such, save and load a TrainingState with torch.distributed.checkpoint"
                )
        for i, shape in zip(state["parameters"], state["shapes"], strict=True):
            parameter, name = parameters[i]
            own_shape = list(local_part(parameter).shape)
            if own_shape != shape:
                raise ValueError(f"{name} has shape {own_shape}, in the state it has {shape}")

    def _layout_of(self, parameters: Sequence[tuple[Tensor, str]]) -> list[Any]:
        """The layout as it is in a state, with segments for all of these that will have one."""
        new = [(p, name) for p, name in parameters if p.requires_grad and not self.knows(p)]
        segments = self.segments + lay_out(new, self.end)[0]
        index = {parameter: i for i, (parameter, _) in enumerate(parameters)}
        return [
            [index[segment.parameter] for segment in segments],
            [segment.offset for segment in segments],
            [list(segment.stride) for segment in segments],
        ]

    def load_state_dict(
        self, state: dict[str, Any], parameters: Sequence[tuple[Tensor, str]]
    ) -> list[int]:
        """Takes over a state that `check_state` has passed, whatever the order of its segments.

        Returns:
            Where each tensor of the state is here.
        """
        listed = [parameters[i] for i in state["parameters"]]
        new = [(parameter, name) for parameter, name in listed if not self.knows(parameter)]
        if new:
            self.grow(new)
        place = {segment.parameter: t for t, segment in enumerate(self.segments)}
        here = [place[parameter] for parameter, _ in listed]
        self.counts = list(state["counts"])
        self.touched = [0] * len(self.segments)
        self.owners = [0] * len(self.segments)
        self.compared = [None] * len(self.segments)
        kept = zip(state["touched"], state["owners"], state["compared"], strict=True)
        for t, of_tensor in zip(here, kept, strict=True):
            self.touched[t], self.owners[t], self.compared[t] = of_tensor
        if self.mask is not None:
            self.mask = self.mask.clone()
            for t, bits in zip(here, state["masks"], strict=True):
                set_mask(self.mask, self.segments[t], bits)
        # New memory, not cleared memory: the state may hold the very tensors that are here.
        self.rows = self._laid_out(self.rows, state["rows"], here, state)
        if self.history is not None:
            self.history = self._kept(self.history, state["history"], here, state)
        if self.momentum is not None and self.momentum_steps is not None:
            self.momentum = self._kept(self.momentum, state["momentum"], here, state)
            self.momentum_steps = torch.zeros_like(self.momentum_steps)
            self.momentum_steps[here] = state["momentum_steps"].to(self.momentum_steps.device)
        return here

    def _laid_out(
        self, own: Tensor, saved: Tensor | None, here: Sequence[int], state: dict[str, Any]
    ) -> Tensor:
        """New memory of the type of `own`, [..., N'], with what a state has, where it is here."""
        length, device = self.rows.shape[1], self.rows.device
        laid_out = torch.zeros((*own.shape[:-1], length), dtype=own.dtype, device=device)
        if saved is None:
            return laid_out
        for row, saved_row in zip(rows_of(laid_out), rows_of(saved), strict=True):
            for s, t in enumerate(here):
                segment = self.segments[t]
                there = segment._replace(
                    offset=state["offsets"][s], stride=tuple(state["strides"][s])
                )
                segment.view(row).copy_(there.view(saved_row))
        return laid_out

    def _kept(
        self, own: Tensor, saved: Tensor, here: Sequence[int], state: dict[str, Any]
    ) -> Tensor:
        """The same of history or momentum, of which this process may keep a part alone."""
        if state.get("cuts", 1) > 1:  # the very part that is kept here
            return saved.to(own.device, own.dtype, copy=True)
        laid_out = self._laid_out(own, saved, here, state)
        return laid_out if self.cuts == 1 else self.own_part(laid_out)

    def own_part(self, rows: Tensor) -> Tensor:
        """A copy of what this process keeps of rows [..., N'] that are cut: [..., N' / cuts]."""
        length = rows.shape[-1] // self.cuts
        part = rows[..., self.part * length : (self.part + 1) * length]
        return part.clone(memory_format=torch.contiguous_format)


class Harvest:
    """One backward pass of one task: its gradients go into the task's row, a bucket at a time.

    A bucket is launched when the next gradient comes, not when it is full: by then the hooks that
    others have on its last parameter have run.

    Attributes:
        taken: places of the segments that have been added.
    """

    def __init__(self, target: Accumulator, task: int, scale: float | Tensor, backend: str) -> None:
        self.target = target
        self.task = task
        self.scale = scale
        self.backend = backend
        self.overwrite = target.counts[task] == 0
        self.taken: set[int] = set()
        self.bucket: dict[int, None] = {}
        self.bytes = 0
        self.stream: torch.cuda.Stream | None = None
        row_bytes = target.rows.shape[1] * target.rows.element_size()
        self.limit = max(BUCKET_BYTES, row_bytes // MOST_BUCKETS)

    def gradient_is_there(self, place: int, gradient: Tensor) -> None:
        """The pass has finished a gradient."""
        # A gradient is ready, and its memory is used again, in the order of its own stream.
        stream = torch.cuda.current_stream(gradient.device) if gradient.is_cuda else None
        if self.bytes >= self.limit or stream != self.stream:
            with torch.cuda.stream(self.stream):
                self._add(list(self.bucket))
            self.bucket.clear()
            self.bytes = 0
            self.stream = stream
        if place not in self.bucket:
            self.bucket[place] = None
            self.bytes += gradient.numel() * gradient.element_size()

    def finish(self) -> None:
        """The pass is over: what is left is added, and segments without a gradient cleared."""
        segments = self.target.segments
        again = [t for t in sorted(self.taken) if segments[t].parameter.grad is not None]
        for t in again:
            if t not in self.bucket:
                raise RuntimeError(
                    f"the gradient of {segments[t].name} was put back after it was taken: the "
                    "model is wrapped in a DistributedDataParallel that GCondFused does not know; "
                    "give the wrapped model as module="
                )
        self._add(again)
        self._add([t for t in range(len(segments)) if t not in self.taken])

    def _add(self, places: Sequence[int]) -> None:
        # A parameter's gradient may come in parts, each with a hook call of its own: where a module
        # is used in several reentrant checkpoints. Only the first part may overwrite.
        first = [t for t in places if t not in self.taken]
        again = [t for t in places if t in self.taken]
        if first:
            self._launch(first, self.overwrite)
        if again:
            self._launch(again, False)

    def _launch(self, places: Sequence[int], overwrite: bool) -> None:
        target = self.target
        segments = [target.segments[t] for t in places]
        sizes = [target.sizes[t] for t in places]
        read = local_gradient if target.spread else attrgetter("grad")
        gradients = [read(segment.parameter) for segment in segments]
        gradients = gradients_in_order(segments, sizes, gradients, target.rows.device)
        if not overwrite and all(gradient is None for gradient in gradients):
            return
        # Before it is so: an interrupt from here on must not count as one before it.
        self.taken.update(places)
        # Autograd and `gradients_in_order` have checked all that `ops.accumulate` would check.
        ops.backend_module(self.backend, target.rows.device, "accumulate").accumulate(
            target.rows[self.task],
            gradients,
            [target.offsets[t] for t in places],
            sizes,
            self.scale,
            overwrite,
        )
        for t, segment, gradient in zip(places, segments, gradients, strict=True):
            if gradient is not None:
                target.touched[t] |= 1 << self.task
                segment.parameter.grad = None


def lay_out(parameters: Sequence[tuple[Tensor, str]], end: int) -> tuple[list[Segment], int]:
    """A segment for each, from `end` on, and where the last of them ends."""
    segments = []
    for parameter, name in parameters:
        part = local_part(parameter)
        # `empty_like` closes the gaps of a parameter that is a view with some.
        stride = torch.empty_like(part).stride()
        segments.append(Segment(parameter, name, end, part.shape, stride))
        end += aligned(largest_part(parameter))
    return segments, end


def largest_part(parameter: Tensor) -> int:
    """How many elements of a parameter any process holds at most.

    With room for so many a tensor that several hold lies in the same place with all of them,
    however unevenly others are cut.
    """
    if not is_dtensor(parameter):
        return parameter.numel()
    spread: Any = parameter
    shape = list(parameter.shape)
    for placement, ranks in zip(spread.placements, spread.device_mesh.shape, strict=True):
        if hasattr(placement, "dim"):
            shape[placement.dim] = -(-shape[placement.dim] // ranks)
    return math.prod(shape)


def aligned(elements: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def is_distributed() -> bool:
    """Whether this process is one of several: what wraps the model may replace its gradients.

    DistributedDataParallel does, when the pass is over, unless it is told not to (`no_sync`).
    """
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def tell_harvest_of(accumulator: weakref.ref[Accumulator]) -> Callable[[Tensor], None]:
    """A hook for parameters, which says that a gradient is there to the harvest that runs, if any.

    Backward passes of others find none, and keep their gradients.
    """

    def tell(parameter: Tensor) -> None:
        owner = accumulator()
        harvest = None if owner is None else owner._harvest
        if harvest is not None and parameter.grad is not None:
            harvest.gradient_is_there(harvest.target._place[parameter], parameter.grad)

    return tell


def check_parameter(parameter: Tensor, name: str, device: torch.device, spread: bool) -> None:
    """Raises a ValueError that says why the parameter cannot be accumulated, if it cannot."""
    if torch.nn.parameter.is_lazy(parameter):
        raise ValueError(f"{name} is not initialized yet: run the model once before training")
    if not parameter.is_floating_point():
        raise ValueError(f"{name} is {parameter.dtype}: only real floating types have accumulators")
    if parameter.layout != torch.strided:
        raise ValueError(f"{name} has layout {parameter.layout}: only dense parameters are handled")
    if is_dtensor(parameter) and not spread:
        raise ValueError(
            f"{name} is a DTensor, which no parameter was when GCondFused was made: shard the "
            "model first"
        )
    if is_unfinished(parameter):
        raise ValueError(f"{name} is a DTensor still to be summed over its mesh (Partial)")
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} belongs to a FullyShardedDataParallel, which hides what is sharded: use "
            "torch.distributed.fsdp.fully_shard"
        )
    if parameter.device != device:
        raise ValueError(
            f"{name} is on {parameter.device}, but the first parameter is on {device}: "
            "all parameters of one optimizer must be on one device"
        )


def gradients_in_order(
    segments: Sequence[Segment],
    sizes: Sequence[int],
    gradients: list[Tensor | None],
    device: torch.device,
) -> list[Tensor | None]:
    """Every gradient in its segment's memory order; a copy only where it has another.

    Raises:
        ValueError: a gradient cannot be accumulated.
    """
    # Hundreds of them for every micro-batch: all at once where nothing is special.
    present = [gradient for gradient in gradients if gradient is not None]
    strides = [s.stride for s, g in zip(segments, gradients, strict=True) if g is not None]
    counts = [size for size, g in zip(sizes, gradients, strict=True) if g is not None]
    if (
        set(map(attrgetter("layout"), present)) <= {torch.strided}
        and list(map(Tensor.stride, present)) == strides
        and list(map(Tensor.numel, present)) == counts
        and not any(map(Tensor.is_neg, present))
        and set(map(attrgetter("dtype"), present)) <= set(GRADIENT_DTYPES)
        and set(map(attrgetter("device"), present)) <= {device}
    ):
        return gradients
    return [
        None if gradient is None else in_order(segment, gradient, size, device)
        for segment, gradient, size in zip(segments, gradients, sizes, strict=True)
    ]


def in_order(segment: Segment, gradient: Tensor, size: int, device: torch.device) -> Tensor:
    """The gradient in the segment's memory order."""
    if gradient.layout != torch.strided:
        raise ValueError(
            f"{segment.name} got a gradient with layout {gradient.layout}: make it dense, "
            "e.g. torch.nn.Embedding(..., sparse=False)"
        )
    if gradient.dtype not in GRADIENT_DTYPES:
        raise ValueError(
            f"{segment.name} got a gradient of {gradient.dtype}; accumulated are "
            f"{', '.join(map(str, GRADIENT_DTYPES))}"
        )
    if gradient.device != device:
        raise ValueError(
            f"{segment.name} got a gradient on {gradient.device}, but its accumulator is on "
            f"{device}: move the model before the first backward, not after"
        )
    if gradient.numel() != size:
        raise ValueError(
            f"{segment.name} got a gradient of shape {list(gradient.shape)}, but had {size} "
            "elements when it was first seen: make a new optimizer after changing a parameter"
        )
    if gradient.stride() == segment.stride:
        return gradient.resolve_neg()
    ordered = torch.empty_strided(
        gradient.shape, segment.stride, dtype=gradient.dtype, device=gradient.device
    )
    return ordered.copy_(gradient.detach())


def set_mask(words: Tensor, segment: Segment, bits: Tensor) -> None:
    """Writes which elements of a parameter are trained (bool, in its shape) into a mask."""
    ordered = torch.empty_strided(
        segment.shape, segment.stride, dtype=torch.bool, device=words.device
    ).copy_(bits)
    in_order = ordered.as_strided((ordered.numel(),), (1,))
    first = segment.offset // WORD_BITS
    new = packed(in_order)
    words[first : first + len(new)] = new


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor [R, n] as it is, one [n] as the only row."""
    return tensor if tensor.dim() == 2 else tensor[None]


def widened(tensor: Tensor, length: int, device: torch.device) -> Tensor:
    """A tensor with zeros appended in its last dimension, on the device."""
    wider = torch.zeros((*tensor.shape[:-1], length), dtype=tensor.dtype, device=device)
    wider[..., : tensor.shape[-1]] = tensor
    return wider

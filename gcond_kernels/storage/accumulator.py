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
from gcond_kernels.ops.checks import GRADIENT_DTYPES
from gcond_kernels.ops.types import Layout
from gcond_kernels.python.blocks import WORD_BITS, trained
from gcond_kernels.storage.dtensor import (
    is_dtensor,
    is_unfinished,
    local_gradient,
    local_part,
    placed_like,
)
from gcond_kernels.storage.trainable_mask import packed

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


class GradientStorage:
    """Flat storage of the task gradients, and what goes with it: history, momentum, counts.

    Nothing is allocated before the first gradient, and the first micro-batch of a window
    overwrites what there is.

    Attributes:
        accumulators: [K, N'] of `dtype`, the sums of this window's gradients.
        history: [K, N'] of the type given to `configure`, last window's sums; None where not kept.
        momentum: [N'] float32; None where not kept.
        momentum_steps: [T] int64, how often each tensor's momentum was updated.
        segments: T segments, in the order in which their parameters were first seen.
        counts: micro-batches of each task in this window.
        window_tasks: of each tensor, which tasks were given a gradient for it in this window, if only
            of zeros: a bit per task. Without any the parameter's `.grad` stays None.
        parameter_tasks: [T, K] bool, which tasks ever had a gradient other than zero for the tensor.
        was_shared: [T] int8, whether the tensor was compared in the last window; -1 before its first.
        mask: [N' / 32] int32, a bit for each element of a row that is trained; None for all.
        end: where the last segment ends. A row may be longer, so that it can be cut evenly.
        shards: into how many parts history and momentum are cut, of which this process keeps one:
            then they are [K, N' / shards] and [N' / shards], and are laid out anew by `Sharded` alone.
        sharded_layout: of history and momentum that are cut, the segments and the length of a row when that
            was done.
        has_dtensors: whether the parameters may be DTensors.
        wrapper_known: whether nobody else puts gradients in place after a backward pass; where that is not
            known, they are taken after the pass if there are other ranks.
    """

    def __init__(
        self,
        tasks: int,
        dtype: torch.dtype,
        *,
        shards: int = 1,
        has_dtensors: bool = False,
        masked: dict[Tensor, Tensor] | None = None,
    ) -> None:
        self.dtype = dtype
        self.end = 0
        self.shards = shards
        self.has_dtensors = has_dtensors
        self.wrapper_known = False
        self.segments: list[Segment] = []
        self.layout = Layout((), ())
        self.window_tasks: list[int] = []
        self.parameter_tasks = torch.zeros((0, tasks), dtype=torch.bool, device="cpu")
        self.was_shared = torch.zeros(0, dtype=torch.int8, device="cpu")
        # Of parameters without a segment yet, which elements are trained: as bool, in their shape.
        self._masked = dict(masked or {})
        self.mask = None if masked is None else torch.empty(0, dtype=torch.int32, device="cpu")
        self.counts = [0] * tasks
        self.accumulators = torch.empty((tasks, 0), dtype=dtype, device="cpu")
        self.history: Tensor | None = None
        self.momentum: Tensor | None = None
        self.momentum_steps: Tensor | None = None
        self.sharded_layout: tuple[list[Segment], int] = ([], 0)
        self._place: dict[Tensor, int] = {}
        # What the layout was made of: parameters by their ids, those without a segment, strides.
        self._listed: list[int] = []
        self._unknown: list[Tensor] = []
        self._shapes: list[tuple[torch.Size, tuple[int, ...]]] = []
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._harvest: Harvest | None = None
        # Views of the first row, one per segment, and the rows that they are of.
        self._views: tuple[Tensor, list[Tensor]] | None = None

    def configure(self, history_dtype: torch.dtype | None, momentum: bool) -> None:
        """Start or stop to keep history and momentum; what is kept already stays as it is."""
        tasks, length = self.accumulators.shape
        length = length if self.shards == 1 else 0
        device = self.accumulators.device
        if history_dtype is None:
            self.history = None
        elif self.history is None or self.history.dtype != history_dtype:
            self.history = torch.zeros((tasks, length), dtype=history_dtype, device=device)
        if not momentum:
            self.momentum = self.momentum_steps = None
        elif self.momentum is None:
            self.momentum = torch.zeros(length, dtype=torch.float32, device=device)
            steps = torch.zeros(len(self.segments), dtype=torch.int64, device=device)
            self.momentum_steps = steps

    def add_task(self) -> None:
        """Add a task, the last one, that has had no gradient yet; between two windows."""
        self.accumulators = self.accumulators.new_zeros(
            (len(self.accumulators) + 1, self.accumulators.shape[1])
        )
        if self.history is not None:
            self.history = torch.cat([self.history, torch.zeros_like(self.history[:1])])
        self.parameter_tasks = torch.cat(
            [self.parameter_tasks, torch.zeros_like(self.parameter_tasks[:, :1])], 1
        )
        self.counts.append(0)

    def __contains__(self, parameter: Tensor) -> bool:
        """Return whether the parameter has a segment."""
        return parameter in self._place

    def update_layout(
        self, groups: Sequence[dict[str, Any]], names: Callable[[], list[str]], sent: bool
    ) -> list[int]:
        """Lay out the parameters that there are now: new, gone, thawed or converted ones.

        Args:
            groups: the parameter groups.
            names: of all parameters, in their order; called where something has changed.
            sent: whether other ranks have a part of this window.

        Returns:
            Of each segment its place before, -1 where it is new; nothing if all is as it was.

        Raises:
            ValueError: a parameter cannot be accumulated; nothing has changed.
            RuntimeError: others are to be laid out, and a part of this window was sent.
        """
        listed = [parameter for group in groups for parameter in group["params"]]
        ids = list(map(id, listed))
        thawed = any(p.requires_grad for p in self._unknown)
        converted = not any(self.counts) and self._shapes != shapes_of(self.segments)
        if ids == self._listed and not thawed and not converted:
            return []
        named = dict(zip(listed, names(), strict=True))
        old = [s.parameter for s in self.segments if s.parameter in named]
        new = [p for p in named if p.requires_grad and p not in self._place]
        parameters = [(p, named[p]) for p in (*old, *new)]
        places: list[int] = []
        if sent and (new or converted or len(old) < len(self.segments)):
            raise RuntimeError(
                "parameters were added, thawed, replaced or removed, and the other ranks have a "
                "part of this window already: do so between step() and backward()"
            )
        if converted or len(old) < len(self.segments):
            places = self._arrange(parameters)
        elif new:
            places = [*range(len(old)), *[-1] * len(new)]
            self.append(parameters[len(old) :])
        self._listed = ids
        self._unknown = [p for p in listed if p not in self._place]
        self._shapes = shapes_of(self.segments)
        return places

    def append(self, parameters: Sequence[tuple[Tensor, str]]) -> None:
        """Append segments for new parameters; what is there keeps its place and content.

        Raises:
            ValueError: a parameter cannot be accumulated; nothing has changed.
        """
        device = self.segments[0].parameter.device if self.segments else parameters[0][0].device
        for parameter, name in parameters:
            check_parameter(parameter, name, device, self.has_dtensors)
        segments, end = lay_out(parameters, self.end)
        length = self._length_of(end)
        self.accumulators = widened(self.accumulators, length, device)
        if self.shards == 1:
            if self.history is not None:
                self.history = widened(self.history, length, device)
            if self.momentum is not None:
                self.momentum = widened(self.momentum, length, device)
        self._set_segments([*self.segments, *segments], end)
        self.window_tasks += [0] * len(segments)
        self._pick([*range(len(self.was_shared)), *[-1] * len(segments)], device)
        self._grow_mask(segments, device)

    def _length_of(self, end: int) -> int:
        """Return the length of a row whose last segment ends there."""
        return aligned(-(-end // self.shards)) * self.shards

    def _set_segments(self, segments: list[Segment], end: int) -> None:
        self.segments = segments
        self.end = end
        self.layout = Layout.of(
            [segment.offset for segment in segments],
            [segment.shape.numel() for segment in segments],
        )
        self._place = {segment.parameter: t for t, segment in enumerate(segments)}
        self._views = None

    def _pick(self, places: Sequence[int], device: torch.device) -> None:
        """Take over what is kept of each tensor from its place before; -1 is a new one."""
        self.parameter_tasks = picked(self.parameter_tasks, places, 0, device)
        self.was_shared = picked(self.was_shared, places, -1, device)
        if self.momentum_steps is not None:
            self.momentum_steps = picked(self.momentum_steps, places, 0, device)

    def _arrange(self, parameters: Sequence[tuple[Tensor, str]]) -> list[int]:
        """Lay out these parameters anew; what is kept of them moves along. Return their places."""
        device = parameters[0][0].device if parameters else self.accumulators.device
        for parameter, name in parameters:
            check_parameter(parameter, name, device, self.has_dtensors)
        self.remove_hooks()
        before, masks = self.segments, [self.mask_of(segment) for segment in self.segments]
        segments, end = lay_out(parameters, 0)
        places = [self._place.get(segment.parameter, -1) for segment in segments]
        # Of other elements than before nothing is known any more.
        places = [
            t if t >= 0 and before[t].shape == segment.shape else -1
            for t, segment in zip(places, segments, strict=True)
        ]
        length = self._length_of(end)
        pairs = [(before[t], s) for t, s in zip(places, segments, strict=True) if t >= 0]
        # Nothing reads the rows between two windows.
        moving = pairs if any(self.counts) else []
        self.accumulators = moved(self.accumulators, length, moving, device)
        if self.shards == 1:
            if self.history is not None:
                self.history = moved(self.history, length, pairs, device)
            if self.momentum is not None:
                self.momentum = moved(self.momentum, length, pairs, device)
        self.window_tasks = [self.window_tasks[t] if t >= 0 else 0 for t in places]
        self._pick(places, device)
        self._set_segments(segments, end)
        if self.mask is not None:
            for t, segment in zip(places, segments, strict=True):
                bits = masks[t] if t >= 0 else None
                if bits is not None:
                    self._masked.setdefault(segment.parameter, bits)
            self.mask = torch.empty(0, dtype=torch.int32, device=device)
            self._grow_mask(segments, device)
        return places

    def _grow_mask(self, segments: Sequence[Segment], device: torch.device) -> None:
        """Words for new segments; without a mask of its own a parameter is trained whole."""
        if self.mask is None:
            return
        words = torch.full(
            (self.accumulators.shape[1] // WORD_BITS,), -1, dtype=torch.int32, device=device
        )
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
    def collect(self, task: int, scale: float | Tensor, backend: str) -> Iterator[None]:
        """Adds `scale` times every `.grad` that a backward pass within leaves, and frees it.

        Where the pass fails a part of it may have been added: the window is lost.

        Raises:
            ValueError: a gradient cannot be accumulated.
        """
        # Gradients that all fit in one bucket are added when the pass is over: then a pass needs
        # no calls within.
        several = self.accumulators.shape[1] * self.accumulators.element_size() > BUCKET_BYTES
        if several and not self.has_dtensors and (self.wrapper_known or not is_distributed()):
            self._hook_parameters()
        else:
            self.remove_hooks()
        harvest = self._harvest = Harvest(self, task, scale, backend)
        try:
            yield
            self._check_reduced()
            harvest.finish()
        finally:
            self._harvest = None
        self.counts[task] += 1

    def _check_reduced(self) -> None:
        """FSDP may be told to keep gradients for itself: added up over tasks they are of no use."""
        if not self.has_dtensors:  # every backward pass comes here
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
        # Without the ids of the parameters: those of a copy are others.
        return {**self.__dict__, "_hooks": {}, "_harvest": None, "_views": None, "_listed": []}

    def clear_gradients(self) -> None:
        """Forgets every `.grad`."""
        for segment in self.segments:
            segment.parameter.grad = None

    def name_with_gradient(self) -> str | None:
        """Return the name of the first parameter with a `.grad`; None where there is none."""
        return next((s.name for s in self.segments if s.parameter.grad is not None), None)

    def new_gradients(self) -> list[Tensor | None]:
        """Memory for `.grad`; None where no task was given a gradient.

        It is the segment of the first row where that is of the gradient's type. The row has been
        read when the gradient is written, and is overwritten before it is read again. Every window
        has tensors of its own: what becomes of those that were handed out does not matter.
        """
        if self._views is None or self._views[0] is not self.accumulators:
            self._views = (
                self.accumulators,
                [segment.view(self.accumulators[0]) for segment in self.segments],
            )
        views = map(Tensor.detach, self._views[1])
        return [
            s.new_gradient(view) if touched else None
            for s, view, touched in zip(self.segments, views, self.window_tasks, strict=True)
        ]

    def assign_gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Puts local gradients in place as `.grad`; returns what is there now."""
        given = []
        for segment, gradient in zip(self.segments, gradients, strict=True):
            p = segment.parameter
            if gradient is not None and self.has_dtensors:
                gradient = placed_like(p, gradient)
            p.grad = gradient
            if gradient is not None:
                given.append(gradient)
        return given

    def update_parameter_tasks(
        self, seen: Tensor, finite: Tensor, shared: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Remember which tasks had a gradient for which tensor; none of this waits for the device.

        Args:
            seen: [T, K] bool, where a task's gradient is not zero in this window.
            finite: [] bool; where it is False nothing is remembered.
            shared: tells from all owners [T, K] which tensors are compared, [T] bool.

        Returns:
            Which tensors are compared, [T], and whether those are others than last time, [].
        """
        # In place: a CUDA graph repeats it.
        self.parameter_tasks |= seen & finite
        compared = shared(self.parameter_tasks)
        was = self.was_shared
        changed = finite & ((was >= 0) & (was != compared.to(torch.int8))).any()
        # What no task had a gradient for was compared in no way: its history is zero.
        known = self.parameter_tasks.any(1)
        was.copy_(torch.where(known & finite, compared.to(torch.int8), was))
        return compared, changed

    def start_window(self) -> None:
        """Forgets what this window accumulated."""
        self.counts = [0] * len(self.counts)
        self.window_tasks = [0] * len(self.segments)

    def drop_task(self, task: int) -> None:
        """Forgets what this window accumulated of one task."""
        self.counts[task] = 0
        self.window_tasks = [tasks & ~(1 << task) for tasks in self.window_tasks]


class Harvest:
    """One backward pass of one task: its gradients go into the task's row, a bucket at a time.

    A bucket is launched when the next gradient comes, not when it is full: by then the hooks that
    others have on its last parameter have run.

    Attributes:
        taken: places of the segments that have been added.
    """

    def __init__(
        self, target: GradientStorage, task: int, scale: float | Tensor, backend: str
    ) -> None:
        self.target = target
        self.task = task
        self.scale = scale
        self.backend = backend
        self.overwrite = target.counts[task] == 0
        self.taken: set[int] = set()
        self.bucket: dict[int, None] = {}
        self.bytes = 0
        self.stream: torch.cuda.Stream | None = None
        row_bytes = target.accumulators.shape[1] * target.accumulators.element_size()
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
        sizes = [target.layout.sizes[t] for t in places]
        read = local_gradient if target.has_dtensors else attrgetter("grad")
        gradients = [read(segment.parameter) for segment in segments]
        gradients = gradients_in_order(segments, sizes, gradients, target.accumulators.device)
        if not overwrite and all(gradient is None for gradient in gradients):
            return
        self.taken.update(places)
        # Autograd and `gradients_in_order` have checked all that `ops.accumulate` would check.
        ops.backend_module(self.backend, target.accumulators.device, "accumulate").accumulate(
            target.accumulators[self.task],
            gradients,
            [target.layout.offsets[t] for t in places],
            sizes,
            self.scale,
            overwrite,
        )
        for t, segment, gradient in zip(places, segments, gradients, strict=True):
            if gradient is not None:
                target.window_tasks[t] |= 1 << self.task
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


def tell_harvest_of(storage: weakref.ref[GradientStorage]) -> Callable[[Tensor], None]:
    """A hook for parameters, which says that a gradient is there to the harvest that runs, if any.

    Backward passes of others find none, and keep their gradients.
    """

    def tell(parameter: Tensor) -> None:
        owner = storage()
        harvest = None if owner is None else owner._harvest
        if harvest is not None and parameter.grad is not None:
            harvest.gradient_is_there(harvest.target._place[parameter], parameter.grad)

    return tell


def check_parameter(parameter: Tensor, name: str, device: torch.device, spread: bool) -> None:
    """Raises a ValueError that says why the parameter cannot be accumulated, if it cannot."""
    if torch.nn.parameter.is_lazy(parameter):
        raise ValueError(f"{name} is not initialized yet: run the model once before training")
    if not parameter.is_floating_point():
        way_out = ": let the model take torch.view_as_complex of a real parameter"
        raise ValueError(
            f"{name} is {parameter.dtype}: only real floating types have accumulators"
            + (way_out if parameter.is_complex() else "")
        )
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
    if parameter.is_meta:
        raise ValueError(
            f"{name} is on meta, where nothing has values: make both optimizers after to_empty, of "
            "the parameters that the model has then"
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


def shapes_of(segments: Sequence[Segment]) -> list[tuple[torch.Size, tuple[int, ...]]]:
    """Return shape and strides of each parameter as they are now, and not when it was laid out."""
    parameters = [segment.parameter for segment in segments]
    shapes = [parameter.shape for parameter in parameters]
    return list(zip(shapes, map(Tensor.stride, parameters), strict=True))


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor [R, n] as it is, one [n] as the only row."""
    return tensor if tensor.dim() == 2 else tensor[None]


def picked(tensor: Tensor, places: Sequence[int], fill: int, device: torch.device) -> Tensor:
    """Return entries [T', ...] of a tensor [T, ...] by their places; `fill` where that is -1."""
    result = torch.full((len(places), *tensor.shape[1:]), fill, dtype=tensor.dtype, device=device)
    here = [t for t, place in enumerate(places) if place >= 0]
    if here:
        result[here] = tensor[[places[t] for t in here]].to(device)
    return result


def moved(
    tensor: Tensor, length: int, pairs: Sequence[tuple[Segment, Segment]], device: torch.device
) -> Tensor:
    """Return rows [..., length] with each first segment of `tensor` in the place of the second."""
    result = torch.zeros((*tensor.shape[:-1], length), dtype=tensor.dtype, device=device)
    for old, new in zip(rows_of(tensor), rows_of(result), strict=True):
        for there, here in pairs:
            here.view(new).copy_(there.view(old))
    return result


def widened(tensor: Tensor, length: int, device: torch.device) -> Tensor:
    """A tensor with zeros appended in its last dimension, on the device."""
    wider = torch.zeros((*tensor.shape[:-1], length), dtype=tensor.dtype, device=device)
    wider[..., : tensor.shape[-1]] = tensor
    return wider

"""Collecting gradients: what backward passes leave in `.grad` is added to the accumulators."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gcond_kernels import ops
from gcond_kernels.ops.checks import GRADIENT_DTYPES
from gcond_kernels.ops.types import Layout
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.dtensor import is_dtensor, local_gradient
from gcond_kernels.storage.layout import Segment

# Bytes of gradients that are added and freed together: beyond some tens of megabytes a launch
# moves memory at full speed, and more would only be kept for longer.
BUCKET_BYTES = 32 << 20
# On a CPU fewer: memory that is freed soon is used again, and fresh pages cost as much as adding.
BUCKET_BYTES_ON_CPU = 8 << 20
# Larger buckets rather than more of them: each is a set of addresses to remember.
MOST_BUCKETS = 128


class Collector:
    """Adds the gradients of backward passes to the accumulators, and frees them.

    Gradients that fit in one bucket together are added after the backward pass, which then has no
    hooks. Others are added during the pass, a bucket at a time.
    """

    def __init__(self, storage: GradientStorage) -> None:
        self.storage = storage
        # DistributedDataParallel replaces gradients after the pass unless it is told not to: where
        # there are several ranks and the model's wrapper is not known, they are added after it.
        self.wrapper_known = False
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._hooked: list[Segment] = []
        self._pass: BackwardPass | None = None

    @contextmanager
    def collect(self, task: int, scale: float | Tensor, backend: ops.Backend) -> Iterator[None]:
        """Add `scale` times every `.grad` that a backward pass within leaves, and free it.

        Where the pass fails a part of it may have been added: the window is lost.
        """
        storage = self.storage
        several = storage.nbytes > BUCKET_BYTES
        if several and not storage.has_dtensors and (self.wrapper_known or not is_distributed()):
            self._add_hooks()
        else:
            self.remove_hooks()
        self._pass = BackwardPass(storage, task, scale, backend)
        try:
            yield
            if storage.has_dtensors:
                check_reduced(storage.segments)
            self._pass.finish()
        finally:
            self._pass = None
        storage.counts[task] += 1

    def _add_hooks(self) -> None:
        segments = self.storage.segments
        if self._hooked is not segments:
            self.remove_hooks()
            self._hooked = segments
        if len(self._hooks) == len(segments):
            return
        collector = weakref.ref(self)  # parameters often outlive their optimizer

        def hook(parameter: Tensor) -> None:
            owner = collector()
            # Backward passes of others keep their gradients.
            if owner is not None and owner._pass is not None and parameter.grad is not None:
                owner._pass.gradient_ready(parameter, parameter.grad)

        for segment in segments:
            p = segment.parameter
            if p.requires_grad and p not in self._hooks:  # of the others torch takes no hook
                self._hooks[p] = p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def remove_hooks(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def __del__(self) -> None:
        self.remove_hooks()

    def __getstate__(self) -> dict[str, Any]:
        # Parameters are copied without their hooks.
        return {**self.__dict__, "_hooks": {}, "_hooked": [], "_pass": None}


class BackwardPass:
    """Adds the gradients of one backward pass to the accumulator of its task.

    A bucket is added when the next gradient is ready, not when it is full: by then the hooks that
    others have on its last parameter have run.
    """

    def __init__(
        self, storage: GradientStorage, task: int, scale: float | Tensor, backend: ops.Backend
    ) -> None:
        self.storage = storage
        self.task = task
        self.scale = scale
        self.backend = backend
        self.overwrite = storage.counts[task] == 0
        self.added: set[int] = set()  # places, as in the bucket
        self.bucket: dict[int, None] = {}
        self.bytes = 0
        self.stream: torch.cuda.Stream | None = None
        on_cpu = storage.accumulators.device.type == "cpu"
        bucket = min(BUCKET_BYTES, BUCKET_BYTES_ON_CPU) if on_cpu else BUCKET_BYTES
        self.limit = max(bucket, storage.nbytes // MOST_BUCKETS)

    def gradient_ready(self, parameter: Tensor, gradient: Tensor) -> None:
        """Put a parameter whose gradient is ready into the bucket, and add the one before it."""
        # A gradient is ready, and its memory is used again, in the order of its own stream.
        stream = torch.cuda.current_stream(gradient.device) if gradient.is_cuda else None
        if self.bytes >= self.limit or stream != self.stream:
            with torch.cuda.stream(self.stream):
                self._add(list(self.bucket))
            self.bucket.clear()
            self.bytes = 0
            self.stream = stream
        place = self.storage.places[parameter]
        if place not in self.bucket:
            self.bucket[place] = None
            self.bytes += gradient.nbytes

    def finish(self) -> None:
        """Add the gradients that are left, and clear the segments of tensors without one."""
        segments = self.storage.segments
        if not self.added and not self.bucket:  # there are no hooks
            self._launch(range(len(segments)), self.overwrite)
            return
        again = [t for t in sorted(self.added) if segments[t].parameter.grad is not None]
        for t in again:
            if t not in self.bucket:
                raise RuntimeError(
                    f"the gradient of {segments[t].name} was put back after it was collected: the "
                    "model is wrapped in a DistributedDataParallel that GCondFused does not know; "
                    "assign the wrapped model, optimizer.module = model"
                )
        self._add(again)
        self._add([t for t in range(len(segments)) if t not in self.added])

    def _add(self, places: list[int]) -> None:
        # A gradient may come in parts, each with a hook call of its own: where a module is used in
        # several reentrant checkpoints. Only the first part may overwrite.
        again = [t for t in places if t in self.added]
        if first := [t for t in places if t not in self.added]:
            self._launch(first, self.overwrite)
        if again:
            self._launch(again, False)

    def _launch(self, places: Sequence[int], overwrite: bool) -> None:
        storage = self.storage
        segments, layout, device = storage.segments, storage.layout, storage.accumulators.device
        if places != range(len(segments)):
            segments = [segments[t] for t in places]
            layout = Layout.of([s.offset for s in segments], [s.size for s in segments])
        read = local_gradient if storage.has_dtensors else attrgetter("grad")
        gradients = [read(segment.parameter) for segment in segments]
        gradients = in_memory_order(segments, gradients, device)
        present = [t for t, gradient in zip(places, gradients, strict=True) if gradient is not None]
        if not overwrite and not present:
            return
        self.added.update(places)
        # Autograd and `in_memory_order` have checked all that `ops.accumulate` would check.
        self.backend.accumulate(
            storage.accumulators[self.task], gradients, layout, self.scale, overwrite
        )
        tasks, parameters, bit = storage.window_tasks, storage.parameters, 1 << self.task
        for t in present:
            tasks[t] |= bit
            parameters[t].grad = None


def is_distributed() -> bool:
    """Return whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_reduced(segments: Sequence[Segment]) -> None:
    """Raise a RuntimeError where FSDP was told not to reduce gradients, and keeps them."""
    parameters = [segment.parameter for segment in segments]
    expected = [p for p in parameters if is_dtensor(p) and p.requires_grad]
    if expected and all(p.grad is None for p in expected):
        raise RuntimeError(
            "the backward pass left no gradient on any sharded parameter: leave "
            "set_requires_gradient_sync and set_requires_all_reduce at True, for gradients of "
            "different tasks must not add up inside FSDP (or the loss does not depend on them)"
        )


def in_memory_order(
    segments: Sequence[Segment], gradients: list[Tensor | None], device: torch.device
) -> list[Tensor | None]:
    """Return every gradient in its segment's memory order; a copy only where it has another."""
    ordered = gradients.copy()
    for t, (segment, gradient) in enumerate(zip(segments, gradients, strict=True)):
        # Hundreds of them for every micro-batch: no call of Python where nothing is special.
        if gradient is not None and not (
            gradient.layout == torch.strided
            and gradient.stride() == segment.stride
            and gradient.numel() == segment.size
            and gradient.dtype in GRADIENT_DTYPES
            and gradient.device == device
            and not gradient.is_neg()
        ):
            ordered[t] = one_in_memory_order(segment, gradient, device)
    return ordered


def one_in_memory_order(segment: Segment, gradient: Tensor, device: torch.device) -> Tensor:
    """Return a gradient in its segment's memory order, or raise a ValueError that says why not."""
    problem = None
    if gradient.layout != torch.strided:
        problem = (
            f"with layout {gradient.layout}: make it dense, e.g. torch.nn.Embedding(..., "
            "sparse=False)"
        )
    elif gradient.dtype not in GRADIENT_DTYPES:
        problem = f"of {gradient.dtype}; accumulated are {', '.join(map(str, GRADIENT_DTYPES))}"
    elif gradient.device != device:
        problem = (
            f"on {gradient.device}, but its accumulator is on {device}: move the model before the "
            "first backward, not after"
        )
    elif gradient.numel() != segment.size:
        problem = (
            f"of shape {list(gradient.shape)}, but had {segment.size} elements when it was first "
            "seen: make a new optimizer after changing a parameter"
        )
    if problem:
        raise ValueError(f"{segment.name} got a gradient {problem}")
    if gradient.stride() == segment.stride:
        return gradient.resolve_neg()
    ordered = gradient.new_empty_strided(gradient.shape, segment.stride)
    return ordered.copy_(gradient.detach())

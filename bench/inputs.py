"""The tensors that operations read and write, and checks of what they wrote against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from bench.clock import Run
from gcond_kernels import GCond, ops
from gcond_kernels.methods import Method
from gcond_kernels.methods.method import Comparison, Destination, fresh_state
from gcond_kernels.ops.mask import trainable
from gcond_kernels.storage.layout import align

BETA = 0.9
# Random numbers are drawn for so many elements of an accumulator and repeated.
DRAWN = 2**18
# Elements that are widened to float64 at once.
CHECKED_AT_ONCE = 2**24
# Kernels sum some thousand products in float32: errors are about 2^-24 · √1000 of the norms.
TOLERANCE = 1e-5


class Layout(ops.Layout):
    """Segments as the optimizer lays them out, each aligned."""

    __slots__ = ()

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(self.sizes)

    @property
    def length(self) -> int:
        """Elements of an accumulator, padding included."""
        return self.offsets[-1] + align(self.sizes[-1])


def layout_of(sizes: Sequence[int]) -> Layout:
    """Return the layout of tensors of so many elements."""
    return Layout(tuple(accumulate(map(align, sizes[:-1]), initial=0)), tuple(sizes))


class Storage:
    """Everything that a resolution of K tasks reads and writes, filled at random.

    Accumulators are [K, N'] float32, their history bfloat16.
    """

    def __init__(
        self, tasks: int, layout: Layout, device: torch.device, has_momentum: bool = True
    ) -> None:
        self.layout = layout
        block = conflicting(tasks, min(DRAWN, layout.length), device)
        self.accumulators = repeated(block, layout)
        self.history = torch.empty_like(self.accumulators, dtype=torch.bfloat16)
        self.momentum: ops.Momentum | None = None
        if has_momentum:
            steps = torch.zeros(len(layout.sizes), dtype=torch.int64, device=device)
            buffer = torch.zeros(layout.length, device=device)
            self.momentum = ops.Momentum(buffer, steps, BETA)
        self.outputs = [torch.full((size,), math.nan, device=device) for size in layout.sizes]
        self.scale = torch.ones(tasks, dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.method = GCond()
        self.state = self.new_state()
        self.reset()

    @staticmethod
    def bytes_of(tasks: int, layout: Layout) -> int:
        """Return the memory that it takes."""
        return layout.length * (4 * tasks + 2 * tasks + 4 + 4)

    def new_state(self) -> ops.ArbitrationState:
        """Return a state as before any step."""
        tasks, device = len(self.accumulators), self.accumulators.device
        return ops.ArbitrationState(**self.method.new_state(tasks, device))

    def gradients(self, mask: Tensor | None = None) -> ops.TaskGradients:
        """Return what the operations read."""
        return ops.TaskGradients(self.accumulators, self.layout, self.scale, self.history, mask)

    def gramian(self, backend: str, mask: Tensor | None = None) -> ops.Gramians:
        """Return all inner products, as of now."""
        scale = self.state.history_scale
        return ops.gramian(self.gradients(mask), history_scale=scale, backend=backend)

    def arbitrate(self, products: ops.Gramians, backend: str) -> ops.Arbitration:
        """Return the weights that follow from the products."""
        kept = {"state": self.state, "settings": self.method}
        return ops.arbitrate(products.total, products.cross, self.scale, **kept, backend=backend)

    def combine(
        self, decision: ops.Arbitration, backend: str, mask: Tensor | None = None
    ) -> ops.Arbitration:
        """Write outputs, momentum and history by the decision, and return it."""
        weights, finite = decision.weights, decision.finite
        written = {"weights": weights, "finite": finite, "momentum": self.momentum}
        ops.combine(self.gradients(mask), self.outputs, **written, backend=backend)
        return decision

    def graddrop(self, backend: str) -> None:
        """Write outputs and momentum by signs picked at random."""
        dropout = ops.SignDropout(0, self.counter)
        written = {"finite": self.finite, "dropout": dropout, "momentum": self.momentum}
        ops.graddrop(self.gradients(), self.outputs, **written, backend=backend)

    def resolve(self, backend: str) -> None:
        """Make a full resolution as the optimizer does."""
        kept = {"state": self.state, "settings": self.method, "momentum": self.momentum}
        ops.resolve(self.gradients(), self.outputs, **kept, backend=backend)

    def aggregation(self, method: Method, backend: str) -> Run:
        """Return another method's step as the optimizer makes it, without history and momentum."""
        device = self.accumulators.device
        gradients = self.gradients()._replace(history=None)
        chosen = ops.backend_for(backend, device)
        target = Destination(self.outputs, backend=chosen)
        state = fresh_state(method, len(self.accumulators), (), device)
        # The result may overwrite the first gradient: the weights are always those of the first.
        gramian = chosen.gramian(gradients, None, None).total
        comparison = Comparison(gramian, None, self.scale, backend=chosen)

        def run() -> None:
            chosen.gramian(gradients, None, None)
            decision = method.decide(comparison, state)
            method.apply(gradients, target, decision.weights, decision, state)

        return run

    def resolve_apart(self, backend: str) -> None:
        """Make a full resolution by the three operations, one after the other."""
        self.combine(self.arbitrate(self.gramian(backend), backend), backend)

    def can_resolve_at_once(self) -> bool:
        """Return whether nothing but the size of the accumulators is against one launch."""
        short = self.gradients()._replace(accumulators=self.accumulators[:, :1])
        return bool(ops.backend_for("cuda", self.accumulators.device).resolves_at_once(short))

    def resolve_at_once(self, backend: str = "cuda") -> None:
        """Make a full resolution in one call of the backend, without the checks of `ops`."""
        ops.backend_for(backend, self.accumulators.device).resolve(
            self.gradients(), self.outputs, self.state, self.method, self.momentum, None
        )

    def products_in_float64(self) -> ops.Gramians:
        """Return S, X and both per tensor, by no backend."""
        tasks, tensors = len(self.accumulators), len(self.layout.sizes)
        own, cross = self.accumulators.new_zeros((2, tensors, tasks, tasks), dtype=torch.float64)
        for tensor, chunk in self.chunks():
            gradients = self.accumulators[:, chunk].double()
            own[tensor] += gradients @ gradients.T
            cross[tensor] += gradients @ self.history[:, chunk].double().T
        return ops.Gramians(own.sum(0), cross.sum(0), own, cross)

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Yield all segments in chunks that may be widened: which tensor, and where."""
        longest = max(1, CHECKED_AT_ONCE // len(self.accumulators))
        for tensor, (first, size) in enumerate(zip(*self.layout, strict=True)):
            for start in range(first, first + size, longest):
                yield tensor, slice(start, min(start + longest, first + size))

    def written(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all chunks, and what was written to the outputs there."""
        for tensor, chunk in self.chunks():
            first = self.layout.offsets[tensor]
            yield chunk, self.outputs[tensor].view(-1)[chunk.start - first : chunk.stop - first]

    def write_in_place(self) -> None:
        """Let the outputs lie in the first accumulator, as those of the optimizer do.

        The accumulators are copied before: others go on with gradients that are not overwritten.
        """
        self.accumulators = self.accumulators.clone()
        first = self.accumulators[0]
        pairs = zip(*self.layout, strict=True)
        self.outputs = [first[offset : offset + size] for offset, size in pairs]

    def packed(self) -> Tensor:
        """Return the gradients [K, N] without padding, as a copy."""
        return torch.cat([self.accumulators[:, chunk] for _, chunk in self.chunks()], dim=1)

    def reset(self) -> None:
        """Restore everything as before any step, but with a history; outputs are NaN."""
        # Each gradient resembles its history less than the one before: else rounding decides.
        tasks = len(self.accumulators)
        for task, history in enumerate(self.history):
            history.copy_(self.accumulators[task])
            history.add_(self.accumulators[(task + 1) % tasks], alpha=0.5 * task / tasks)
        if self.momentum is not None:
            self.momentum.buffer.zero_()
            self.momentum.steps.zero_()
        for output in self.outputs:
            output.fill_(math.nan)
        for value, fresh in zip(self.state, self.new_state(), strict=True):
            value.copy_(fresh)
        self.state.history_scale.fill_(1.0)

    def check_products(self, products: ops.Gramians, who: str) -> None:
        """Compare inner products with those in float64."""
        exact = self.products_in_float64()
        norms = exact.total.diagonal().sqrt()
        bound = TOLERANCE * torch.outer(norms, norms)
        for name in ("total", "cross"):
            error = (getattr(products, name) - getattr(exact, name)).abs()
            if not bool((error <= bound).all()):
                raise AssertionError(f"{who}: the {name} Gramian is off by {float(error.max()):g}")

    def check_step(self, run: Run, weights: Tensor, who: str, tolerance: float = TOLERANCE) -> None:
        """Run a first step and check all that it writes."""
        self.reset()
        run()
        self.check_written(weights, who, tolerance)
        self.check_kept(who)

    def check_written(self, weights: Tensor, who: str, tolerance: float = TOLERANCE) -> None:
        """Compare the outputs of a first step with Σ_k weights[k] ĝ_k in float64."""
        worst = largest = 0.0
        for chunk, written in self.written():
            exact = weights.double() @ self.accumulators[:, chunk].double()
            error = (written.double() - exact).abs().max()
            worst = max(worst, math.inf if bool(error.isnan()) else float(error))
            largest = max(largest, float(exact.abs().max()))
        if not worst <= tolerance * largest:
            raise AssertionError(
                f"{who}: the result is off by {worst:g}, where its largest element is {largest:g}"
            )

    def check_kept(self, who: str) -> None:
        """Check the history and the momentum that a first step leaves."""
        for chunk, written in self.written():
            moved = None if self.momentum is None else self.momentum.buffer[chunk]
            if moved is not None and not torch.allclose(moved, (1 - BETA) * written, 1e-5, 0.0):
                raise AssertionError(f"{who}: the momentum is not {1 - BETA:.1f} of the result")
            if not torch.equal(self.history[:, chunk], self.accumulators[:, chunk].bfloat16()):
                raise AssertionError(f"{who}: the history is not the gradients")

    def check_dropped(self, who: str) -> None:
        """Check that every element of GradDrop's result is a sum of those of one sign."""
        for chunk, written in self.written():
            g = self.accumulators[:, chunk]
            sums = torch.stack([g.clamp(max=0.0).sum(0), g.clamp(min=0.0).sum(0)])
            error = (written - sums).abs().amin(0)
            if not bool((error <= TOLERANCE * sums.abs().amax(0)).all()):
                raise AssertionError(f"{who}: an element is no sum of elements of one sign")

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Set gradients that are not trained, and their history, to 0 for a while."""
        off = ~trainable(mask, 0, self.layout.length)
        before = self.accumulators, self.history
        self.accumulators, self.history = (each.masked_fill(off, 0.0) for each in before)
        try:
            yield
        finally:
            self.accumulators, self.history = before


def conflicting(tasks: int, length: int, device: torch.device) -> Tensor:
    """Return random gradients [K, length] that conflict: their mean points backwards."""
    gradients = torch.randn(tasks, length, device=device)
    return gradients.sub_(gradients.mean(0), alpha=1.1)


def repeated(block: Tensor, layout: Layout) -> Tensor:
    """Return accumulators [K, N'] that repeat a block [K, n], but for zero padding."""
    repeats = -(-layout.length // block.shape[1])
    found = block.repeat(1, repeats)[:, : layout.length].contiguous()
    ends = [*layout.offsets[1:], layout.length]
    for first, size, end in zip(*layout, ends, strict=True):
        found[:, first + size : end] = 0.0
    return found


def segments_of(flat: Tensor, layout: ops.Layout) -> list[Tensor]:
    """Return a view of each tensor's segment."""
    return [flat[first : first + size] for first, size in zip(*layout, strict=True)]


class Gradients:
    """A task's accumulator and gradients to add to it."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        block = torch.randn(1, min(DRAWN, layout.length), device=device)
        self.accumulator = repeated(block, layout)[0]
        self.gradients = [view.to(dtype, copy=True) for view in self.segments()]
        self.accumulator.mul_(2.0)  # else nothing would have to be written the first time

    @staticmethod
    def bytes_of(layout: Layout, dtype: torch.dtype) -> int:
        """Return the memory that it takes."""
        return layout.length * (4 + dtype.itemsize)

    def segments(self) -> list[Tensor]:
        """Return the accumulator of each tensor."""
        return segments_of(self.accumulator, self.layout)

    def accumulate(self, backend: str, overwrite: bool) -> None:
        """Add the gradients, or write them."""
        what = self.accumulator, self.gradients, self.layout
        ops.accumulate(*what, overwrite=overwrite, backend=backend)

    def unchecked(self, backend: str) -> Run:
        """Return a call of the backend itself, which adds the gradients without any check."""
        accumulate = ops.backend_for(backend, self.accumulator.device).accumulate
        return partial(accumulate, self.accumulator, self.gradients, self.layout, 1.0, False)

    def check(self, before: Tensor, overwrite: bool, who: str) -> None:
        """Compare the accumulator with what float32 makes of the same sum."""
        earlier = segments_of(before, self.layout)
        for view, gradient, old in zip(self.segments(), self.gradients, earlier, strict=True):
            if not torch.equal(view, gradient.float() if overwrite else old + gradient.float()):
                raise AssertionError(f"{who}: the accumulator of {len(gradient)} elements is off")

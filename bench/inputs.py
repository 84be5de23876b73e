"""What an operation reads and writes, and checks of what it wrote against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import GCond, ops
from gcond_kernels.methods import Method
from gcond_kernels.methods.method import Comparison
from gcond_kernels.ops.mask import trainable
from gcond_kernels.storage.layout import ALIGNMENT

BETA = 0.9
# Random numbers are drawn for so many elements of a row and repeated: drawing takes longer on a
# CPU than all that is measured.
DRAWN = 2**18
# Elements that are widened to float64 at once.
CHECKED_AT_ONCE = 2**24
# The kernels sum products in float32 over some thousand elements and go on in float64: errors of
# some 2^-24 · √1000 of the product of the norms, far below this.
TOLERANCE = 1e-5


class Layout(NamedTuple):
    """Where each tensor lies in a row: as the optimizer lays them out, each segment aligned."""

    sizes: list[int]
    offsets: list[int]
    length: int

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(self.sizes)


def layout_of(sizes: Sequence[int]) -> Layout:
    """The layout of tensors of so many elements."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return Layout(list(sizes), offsets, end)


class Storage:
    """Everything that a resolution of K tasks reads and writes, filled at random.

    Attributes:
        rows: [K, N'] float32, whose gradients conflict.
        history: [K, N'] bfloat16.
        momentum: [N'] float32.
        steps: [T] int64.
        outputs: T tensors, float32.
        scale: [K] float64, ones.
        finite, draws: what `combine` and `graddrop` look at, scalars.

    Args:
        tasks: K.
        layout: of the tensors.
        device: where they lie.
    """

    def __init__(self, tasks: int, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.rows = repeated(conflicting(tasks, min(DRAWN, layout.length), device), layout)
        self.history = torch.empty_like(self.rows, dtype=torch.bfloat16)
        self.momentum = torch.zeros(layout.length, device=device)
        self.steps = torch.zeros(len(layout.sizes), dtype=torch.int64, device=device)
        self.outputs = [torch.full((size,), math.nan, device=device) for size in layout.sizes]
        self.scale = torch.ones(tasks, dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.draws = torch.zeros((), dtype=torch.int64, device=device)
        self.method = GCond()
        self.state = self.method.new_state(tasks, device)
        self.forget()

    @staticmethod
    def bytes_of(tasks: int, layout: Layout) -> int:
        """Memory that it takes: rows, history, momentum, outputs."""
        return layout.length * (4 * tasks + 2 * tasks + 4 + 4)

    def gradients(self, mask: Tensor | None = None) -> ops.TaskGradients:
        """What the operations read."""
        where = ops.Layout.of(self.layout.offsets, self.layout.sizes)
        return ops.TaskGradients(self.rows, where, self.scale, self.history, mask)

    def gramian(self, backend: str, mask: Tensor | None = None) -> ops.Gramians:
        """All inner products, as of now."""
        return ops.gramian(
            self.gradients(mask), history_scale=self.state["history_scale"], backend=backend
        )

    def arbitrate(self, products: ops.Gramians, backend: str) -> ops.Arbitration:
        """The weights that follow from the products."""
        return self.method.decide(
            Comparison(products.total, products.cross, self.scale, backend=backend), self.state
        )

    def combine(
        self,
        products: ops.Gramians,
        decision: ops.Arbitration,
        backend: str,
        mask: Tensor | None = None,
    ) -> ops.Arbitration:
        """Writes outputs, momentum and history by the decision, and gives it back."""
        ops.combine(
            self.gradients(mask),
            self.outputs,
            weights=decision.weights,
            finite=decision.finite,
            momentum=ops.Momentum(self.momentum, self.steps, BETA),
            backend=backend,
        )
        return decision

    def graddrop(self, backend: str) -> None:
        """Writes outputs and momentum by signs picked at random."""
        ops.graddrop(
            self.gradients(),
            self.outputs,
            finite=self.finite,
            dropout=ops.SignDropout(0, self.draws),
            momentum=ops.Momentum(self.momentum, self.steps, BETA),
            backend=backend,
        )

    def resolve(self, backend: str) -> None:
        """A whole resolution as the optimizer asks for it."""
        ops.resolve(
            self.gradients(),
            self.outputs,
            state=ops.ArbitrationState(**self.state),
            settings=self.method,
            momentum=ops.Momentum(self.momentum, self.steps, BETA),
            backend=backend,
        )

    def aggregate(self, method: Method, backend: str) -> None:
        """Another method's weighted sum, with neither history nor momentum."""
        gradients = self.gradients()._replace(history=None)
        products = ops.gramian(gradients, backend=backend)
        ops.combine(
            gradients,
            self.outputs,
            weights=method(products.total),
            finite=self.finite,
            backend=backend,
        )

    def resolve_apart(self, backend: str) -> None:
        """A whole resolution by the three operations, one after the other."""
        products = self.gramian(backend)
        self.combine(products, self.arbitrate(products, backend), backend)

    def resolve_at_once(self) -> None:
        """A whole resolution in one launch, whether `ops.resolve` would take that or not."""
        ops.backend_for("cuda", self.rows.device).resolve(
            self.gradients(),
            self.outputs,
            ops.ArbitrationState(**self.state),
            self.method,
            ops.Momentum(self.momentum, self.steps, BETA),
            None,
        )

    def products_in_float64(self) -> ops.Gramians:
        """S, X and both per tensor, by no backend."""
        tasks, tensors = len(self.rows), len(self.layout.sizes)
        each = self.rows.new_zeros((2, tensors, tasks, tasks), dtype=torch.float64)
        for tensor, piece in self.pieces():
            rows = self.rows[:, piece].double()
            each[0, tensor] += rows @ rows.T
            each[1, tensor] += rows @ self.history[:, piece].double().T
        total, cross = each.sum(1)
        return ops.Gramians(total, cross, each[0], each[1])

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """All segments in pieces that may be widened: which tensor, and where in a row."""
        longest = max(1, CHECKED_AT_ONCE // len(self.rows))
        for tensor, (first, size) in enumerate(
            zip(self.layout.offsets, self.layout.sizes, strict=True)
        ):
            for start in range(first, first + size, longest):
                yield tensor, slice(start, min(start + longest, first + size))

    def packed(self) -> Tensor:
        """The gradients [K, N] without padding, as a copy."""
        return torch.cat([self.rows[:, piece] for _, piece in self.pieces()], dim=1)

    def forget(self) -> None:
        """As before any step, so that the next result is Σ_k w_k ĝ_k itself; outputs are NaN.

        Only that there is a history, which each task's gradient resembles less than the one's
        before it: were they all as stable and as strong, rounding would decide who wins.
        """
        tasks = len(self.rows)
        for task, row in enumerate(self.history):
            row.copy_(self.rows[task])
            row.add_(self.rows[(task + 1) % tasks], alpha=0.5 * task / tasks)
        self.momentum.zero_()
        self.steps.zero_()
        for output in self.outputs:
            output.fill_(math.nan)
        fresh = self.method.new_state(len(self.rows), self.rows.device)
        for name, value in fresh.items():
            self.state[name].copy_(value)
        self.state["history_scale"] += 1.0

    def check_products(self, products: ops.Gramians, who: str) -> None:
        """Compares inner products with those in float64."""
        exact = self.products_in_float64()
        lengths = exact.total.diagonal().sqrt()
        bound = TOLERANCE * torch.outer(lengths, lengths)
        for name in ("total", "cross"):
            error = (getattr(products, name) - getattr(exact, name)).abs()
            if not bool((error <= bound).all()):
                raise AssertionError(f"{who}: the {name} Gramian is off by {float(error.max()):g}")

    def check_written(self, weights: Tensor, who: str, tolerance: float = TOLERANCE) -> None:
        """Compares outputs with Σ_k weights[k] ĝ_k in float64; as after `forget` and a step."""
        worst = size_of_result = 0.0
        for tensor, piece in self.pieces():
            exact = weights.double() @ self.rows[:, piece].double()
            first = self.layout.offsets[tensor]
            written = self.outputs[tensor].view(-1)[piece.start - first : piece.stop - first]
            error = (written.double() - exact).abs().max()
            worst = max(worst, math.inf if bool(error.isnan()) else float(error))
            size_of_result = max(size_of_result, float(exact.abs().max()))
        if not worst <= tolerance * size_of_result:
            raise AssertionError(
                f"{who}: the result is off by {worst:g}, where its largest element is "
                f"{size_of_result:g}"
            )

    def check_kept(self, who: str) -> None:
        """Checks the history and the momentum that a step after `forget` leaves."""
        for tensor, piece in self.pieces():
            first = self.layout.offsets[tensor]
            written = self.outputs[tensor].view(-1)[piece.start - first : piece.stop - first]
            moved = self.momentum[piece]
            if not bool(((moved - (1 - BETA) * written).abs() <= 1e-5 * moved.abs()).all()):
                raise AssertionError(f"{who}: the momentum is not {1 - BETA:.1f} of the result")
            if not torch.equal(self.history[:, piece], self.rows[:, piece].bfloat16()):
                raise AssertionError(f"{who}: the history is not the gradients")

    def check_dropped(self, who: str) -> None:
        """Checks that every element of GradDrop's result is a sum of those of one sign."""
        for tensor, piece in self.pieces():
            rows, first = self.rows[:, piece], self.layout.offsets[tensor]
            written = self.outputs[tensor].view(-1)[piece.start - first : piece.stop - first]
            sums = torch.stack([rows.clamp(max=0.0).sum(0), rows.clamp(min=0.0).sum(0)])
            error = (written - sums).abs().amin(0)
            if not bool((error <= TOLERANCE * sums.abs().amax(0)).all()):
                raise AssertionError(f"{who}: an element is no sum of elements of one sign")

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Within it the gradients that are not trained, and their history, are 0."""
        off = ~trainable(mask, 0, self.layout.length)
        before = self.rows.clone(), self.history.clone()
        self.rows.masked_fill_(off, 0.0)
        self.history.masked_fill_(off, 0.0)
        try:
            yield
        finally:
            self.rows.copy_(before[0])
            self.history.copy_(before[1])


def conflicting(tasks: int, length: int, device: torch.device) -> Tensor:
    """Random gradients [K, length] that conflict: what they have in common points backwards."""
    rows = torch.randn(tasks, length, device=device)
    return rows.sub_(rows.mean(0), alpha=1.1)


def repeated(block: Tensor, layout: Layout) -> Tensor:
    """Rows of a layout [K, N'] that repeat a block [K, n]; the padding is zero."""
    rows = block.new_empty(len(block), layout.length)
    for start in range(0, layout.length, block.shape[1]):
        piece = rows[:, start : start + block.shape[1]]
        piece.copy_(block[:, : piece.shape[1]])
    ends = [*layout.offsets[1:], layout.length]
    for first, size, end in zip(layout.offsets, layout.sizes, ends, strict=True):
        rows[:, first + size : end] = 0.0
    return rows


class Gradients:
    """A task's accumulator and gradients to add to it.

    Args:
        layout: of the tensors.
        dtype: of the gradients.
        device: where they lie.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        block = torch.randn(1, min(DRAWN, layout.length), device=device)
        self.row = repeated(block, layout)[0]
        self.gradients = [view.to(dtype, copy=True) for view in self.segments()]

    @staticmethod
    def bytes_of(layout: Layout, dtype: torch.dtype) -> int:
        """Memory that it takes."""
        return layout.length * (4 + dtype.itemsize)

    def segments(self) -> list[Tensor]:
        """The accumulator of each tensor."""
        places = zip(self.layout.offsets, self.layout.sizes, strict=True)
        return [self.row[first : first + size] for first, size in places]

    def accumulate(self, backend: str, overwrite: bool) -> None:
        """Adds the gradients, or writes them."""
        ops.accumulate(
            self.row,
            self.gradients,
            ops.Layout.of(self.layout.offsets, self.layout.sizes),
            overwrite=overwrite,
            backend=backend,
        )

    def check(self, before: Tensor, overwrite: bool, who: str) -> None:
        """Compares the accumulator with what float32 makes of the same sum."""
        for view, gradient, first in zip(
            self.segments(), self.gradients, self.layout.offsets, strict=True
        ):
            expected = gradient.float()
            if not overwrite:
                expected = expected + before[first : first + len(gradient)]
            if not torch.equal(view, expected):
                raise AssertionError(f"{who}: the accumulator of {len(gradient)} elements is off")

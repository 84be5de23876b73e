"""Every Triton operation on small tensors, for compute-sanitizer to look at; prints "fine".

    compute-sanitizer --tool memcheck --error-exitcode 1 python bench/sanitize.py

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 in the environment every tensor has memory of its own, so
that memcheck sees an access beyond it. All results are compared with those of the plain torch
backend, computed on the CPU: on the GPU little runs but the kernels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcond_kernels import GCond, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Tensors = list[Tensor | None]

# Around the ends of a vector, of a tile, and of the piece of a tensor that one program takes.
SIZES = (0, 1, 7, 8, 33, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 4097, 1, 0)
ALIGNMENT = 32
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Relative and absolute, of numbers around 1: roundings, and the order of the sums.
CLOSENESS = {
    torch.float64: (1e-4, 1e-4),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (4e-3, 1e-3),
    torch.bfloat16: (2e-2, 2e-2),
}


class Layout(NamedTuple):
    """Where each tensor's segment lies in a row, and how long a row is; all in elements."""

    name: str
    offsets: list[int]
    sizes: list[int]
    length: int

    def rows(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[count, length] random numbers, zero between the segments."""
        values = torch.zeros(count, self.length)
        for offset, size in zip(self.offsets, self.sizes, strict=True):
            values[:, offset : offset + size] = torch.randn(count, size)
        return values.to(dtype)


def layouts() -> Iterator[Layout]:
    """Segments at vector boundaries, as the optimizer lays them, and without any gap between.

    Without gaps hardly any segment is aligned, and the last row ends where its memory ends.
    """
    for name, alignment in (("aligned", ALIGNMENT), ("packed", 1)):
        offsets, end = [], 0
        for size in SIZES:
            offsets.append(end)
            end += -(-size // alignment) * alignment
        yield Layout(name, offsets, list(SIZES), end)


def main() -> None:
    torch.manual_seed(0)
    # Memory that an operation allocates is NaN until it is written.
    torch.use_deterministic_algorithms(True)
    for layout in layouts():
        check_accumulate(layout)
        check_gramian(layout)
        check_combine(layout)
    check_arbitrate()
    check_lists()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("fine")


def check_accumulate(layout: Layout) -> None:
    """Gradients of all types, missing and misaligned ones; set, then added to."""

    def run(
        backend: str, accumulator: Tensor, first: Tensors, second: Tensors, scale: float | Tensor
    ) -> list[Tensor]:
        for gradients, overwrite in ((first, True), (second, False)):
            ops.accumulate(
                accumulator,
                gradients,
                layout.offsets,
                layout.sizes,
                scale=scale,
                overwrite=overwrite,
                backend=backend,
            )
        return [accumulator]

    for dtype, scale in ((torch.float32, 0.5), (torch.bfloat16, torch.tensor(0.5))):
        accumulator = layout.rows(1, dtype)[0]
        gradients = [tensors_of(layout.sizes, turn) for turn in range(2)]
        compare(f"accumulate in {dtype}, {layout.name}", run, accumulator, *gradients, scale)


def check_gramian(layout: Layout) -> None:
    """All kinds of rows, up to as many as the kernel takes."""
    sizes = torch.tensor(layout.sizes)

    def run(
        backend: str,
        rows: Tensor,
        scale: Tensor,
        history: Tensor | None,
        history_scale: Tensor,
        momentum: Tensor | None,
    ) -> list[Tensor]:
        total, cross, per_tensor = ops.gramian(
            rows,
            layout.offsets,
            layout.sizes,
            scale=scale,
            history=history,
            history_scale=history_scale,
            momentum=momentum,
            backend=backend,
        )
        # As means: the sums of thousands of products are far from 1. No tensor hides another.
        means = [per_tensor.cpu() / (sizes + 1)[:, None, None]]
        means += [sums.cpu() / sizes.sum() for sums in (total, cross) if sums is not None]
        return means

    for tasks, dtype, history_dtype, with_momentum in (
        (2, torch.float32, None, False),
        (3, torch.bfloat16, torch.float16, True),
        (8, torch.float32, torch.bfloat16, True),
    ):
        scale = torch.rand(tasks, dtype=torch.float64) + 0.1
        history = None if history_dtype is None else layout.rows(tasks, history_dtype)
        momentum = layout.rows(1)[0] if with_momentum else None
        name = f"gramian, K = {tasks}, {layout.name}"
        compare(name, run, layout.rows(tasks, dtype), scale, history, scale.clone(), momentum)


def check_combine(layout: Layout) -> None:
    """Momentum, clipping, sign update, steps that are not finite; many rows and few."""
    T = len(layout.sizes)
    for tasks, dtype, beta, options in (
        (2, torch.float32, 0.9, {"max_norm": 50.0}),
        (3, torch.bfloat16, 0.9, {"parameter_norms": 100 * torch.rand(T).double()}),
        (8, torch.float32, 0.9, {}),
        (9, torch.float32, 0.0, {"max_norm": 50.0}),
        (2, torch.float32, 0.9, {"finite": torch.tensor(False)}),
    ):
        inputs: dict[str, Any] = {
            "weights": torch.randn(tasks, dtype=torch.float64),
            "scale": torch.rand(tasks, dtype=torch.float64) + 0.1,
            "finite": torch.tensor(True),
            "history": layout.rows(tasks, torch.bfloat16),
            "momentum": layout.rows(1)[0] if beta else None,
            "momentum_steps": torch.arange(T) if beta else None,
            **options,
        }
        if tasks > 2:  # a task that takes no part
            inputs["weights"][1] = inputs["scale"][1] = 0.0
        if tasks > 3:  # one that does, but the sum does not need it
            inputs["weights"][0] = 0.0
        rows = layout.rows(tasks, dtype)
        inputs["per_tensor"] = ops.gramian(
            rows,
            layout.offsets,
            layout.sizes,
            scale=inputs["scale"],
            momentum=inputs["momentum"],
            backend="python",
        ).per_tensor
        name = f"combine, K = {tasks}, {', '.join(options) or 'plain'}, {layout.name}"
        compare(name, combining(layout, beta), rows, tensors_of(layout.sizes, tasks), inputs)


def combining(layout: Layout, beta: float) -> Callable[..., list[Tensor]]:
    """A call of combine that gives back all that it may change."""

    def run(backend: str, rows: Tensor, outputs: Tensors, inputs: dict[str, Any]) -> list[Tensor]:
        ops.combine(
            rows,
            outputs,
            layout.offsets,
            layout.sizes,
            beta=beta,
            trust_ratio_coef=1.0,
            backend=backend,
            **inputs,
        )
        changed = [*outputs, inputs["history"], inputs["momentum"], inputs["momentum_steps"]]
        return [tensor for tensor in changed if tensor is not None]

    return run


def check_arbitrate() -> None:
    """Some steps in a row, one of them not finite: decisions and the state they leave."""
    for tasks, method in (
        (2, GCond()),
        (3, GCond.published(tolerance=1e-6)),  # else rounding decides on a last conflict
        (8, GCond(arbitration="zones", norm_cap=2.0, dominance_window=0)),
    ):

        def run(
            backend: str,
            steps: list[list[Tensor]],
            scale: Tensor,
            state: dict[str, Tensor],
            method: GCond = method,
        ) -> list[Tensor]:
            decisions = []
            for gramian, cross in steps:
                decisions += method.resolve(gramian, cross, scale, state, backend)
            return [*decisions, *state.values()]

        vectors = [torch.randn(tasks, 5, dtype=torch.float64) for _ in range(5)]
        vectors = [v - 1.1 * v.mean(0) for v in vectors]  # there are conflicts to resolve
        steps = [(v @ v.T, v @ w.T) for v, w in itertools.pairwise(vectors)]
        steps[1][0][0, 0] = float("nan")
        scale = torch.ones(tasks, dtype=torch.float64)
        if tasks > 2:
            scale[1] = 0.0
        state = method.new_state(tasks, torch.device("cpu"))
        compare(f"arbitrate, K = {tasks}", run, steps, scale, state)


def check_lists() -> None:
    """Norms and cosines of tensors that lie anywhere."""

    def run(backend: str, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        norms = [
            ops.multi_tensor_norm(a, per_tensor=per_tensor, backend=backend)
            for per_tensor in (False, True)
        ]
        return [*norms, ops.multi_tensor_cosine_similarity(a, b, backend=backend)]

    a, b = (
        [tensor for tensor in tensors_of(SIZES, turn, missing=False) if tensor is not None]
        for turn in (0, 3)
    )
    compare("norms of lists", run, a, b)
    aligned = [torch.randn(size) for size in SIZES]
    compare("norms of aligned lists", run, aligned, [tensor + 1.0 for tensor in aligned])
    compare("norms of empty tensors", run, [torch.zeros(0)], [torch.zeros(0)])


def tensors_of(sizes: Sequence[int], turn: int, missing: bool = True) -> Tensors:
    """Tensors of these sizes, of all types in turn, every third one off its vector boundary.

    With `missing` every fifth of them is None; `turn` moves who gets what.
    """
    tensors: Tensors = []
    for place, size in enumerate(sizes, start=turn):
        buffer = torch.randn(size + 1).to(TYPES[place % len(TYPES)])
        tensor = buffer[1:] if place % 3 == 0 else buffer[:-1].clone()
        tensors.append(None if missing and place % 5 == 4 else tensor)
    return tensors


def compare(what: str, run: Callable[..., Sequence[Tensor]], *inputs: Any) -> None:
    """Runs on copies of the inputs with either backend; raises where the results differ."""
    expected = run("python", *copied(inputs, "cpu"))
    results = run("triton", *copied(inputs, DEVICE))
    for number, (result, reference) in enumerate(zip(results, expected, strict=True)):
        relative, absolute = CLOSENESS.get(reference.dtype, (0.0, 0.0))
        torch.testing.assert_close(
            result.cpu(),
            reference,
            rtol=relative,
            atol=absolute,
            equal_nan=True,
            msg=lambda message, n=number: f"{what}, result {n}: {message}",
        )
    print(what, flush=True)


def copied(value: Any, device: str) -> Any:
    """Tensors, and what holds them, copied to a device; a misaligned tensor stays so."""
    if isinstance(value, Tensor):
        first = value.storage_offset()
        buffer = torch.empty(first + value.numel(), dtype=value.dtype, device=device)
        return buffer[first:].view(value.shape).copy_(value)
    if isinstance(value, dict):
        return {key: copied(entry, device) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(entry, device) for entry in value]
    return value


if __name__ == "__main__":
    main()

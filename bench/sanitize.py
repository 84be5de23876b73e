"""Every operation on small tensors, for compute-sanitizer to look at; prints "fine".

    compute-sanitizer --tool memcheck --error-exitcode 1 python bench/sanitize.py --backend cuda

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 in the environment every tensor has memory of its own, so
that memcheck sees an access beyond it. All results are compared with those of the plain torch
backend, computed on the CPU: on the GPU little runs but the kernels. Without a GPU the kernels
run on the CPU, with TRITON_INTERPRET=1 and GCOND_CUDA_HOST=1 in the environment.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcond_kernels import GCond, ops
from gcond_kernels.methods.method import Comparison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BACKENDS = ("triton", "cuda")

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


# What a resolution may do beside the weighted sum.
FORMS: tuple[dict[str, Any], ...] = (
    {"name": "plain"},
    {"name": "momentum", "beta": 0.9},
    {"name": "clipping", "max_norm": 50.0},
    {"name": "momentum and clipping", "beta": 0.9, "max_norm": 50.0},
    {"name": "signs", "signs": True},
    {"name": "momentum and signs", "beta": 0.9, "signs": True},
    {"name": "no history", "beta": 0.9, "max_norm": 50.0, "history": None},
    {"name": "bfloat16 rows", "beta": 0.9, "accumulators": torch.bfloat16},
    {"name": "float16 history", "history": torch.float16},
    {"name": "masked", "beta": 0.9, "max_norm": 50.0, "masked": True},
    {"name": "masked signs", "signs": True, "masked": True},
    {"name": "not finite", "beta": 0.9, "max_norm": 50.0, "infinite": True},
    {"name": "not finite, signs", "beta": 0.9, "signs": True, "infinite": True},
)


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

    def mask(self) -> Tensor:
        """A bit for every element of a row, at random."""
        words = -(-self.length // 32)
        return torch.randint(-(2**31), 2**31, (words,)).to(torch.int32)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="only this one; default: all there are")
    chosen = parser.parse_args().backend
    # Small tensors all over: a second thread gains nothing, and waits long where cores are shared.
    torch.set_num_threads(1)
    tried = []
    for backend in [chosen] if chosen else BACKENDS:
        reason = ops.unavailable(backend, torch.device(DEVICE))
        if reason is None:
            check_all(Check(backend))
            tried.append(backend)
        else:
            print(f"{backend} skipped: {reason}")
    if not tried:
        print("nothing was checked", file=sys.stderr)
        return 1
    print(f"fine: {', '.join(tried)}")
    return 0


class Check:
    """Runs operations by one backend and compares what comes out with the reference."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, what: str, run: Callable[..., Sequence[Tensor]], *inputs: Any) -> None:
        """Runs on copies of the inputs with either backend; raises where the results differ."""
        expected = run("python", *copied(inputs, "cpu"))
        results = run(self.backend, *copied(inputs, DEVICE))
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
        print(f"{self.backend}: {what}", flush=True)


def check_all(check: Check) -> None:
    """Every operation by one backend."""
    torch.manual_seed(0)
    # Memory that an operation allocates is NaN until it is written.
    torch.use_deterministic_algorithms(True)
    for layout in layouts():
        check_accumulate(check, layout)
        check_gramian(check, layout)
        check_combine(check, layout)
        check_graddrop(check, layout)
        if check.backend == "cuda":  # the other calls the three that have been checked
            check_resolve(check, layout)
    check_arbitrate(check)
    check_lists(check)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def check_accumulate(check: Check, layout: Layout) -> None:
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
        check(f"accumulate in {dtype}, {layout.name}", run, accumulator, *gradients, scale)


def check_gramian(check: Check, layout: Layout) -> None:
    """All kinds of rows, up to as many as the kernel takes."""

    def run(
        backend: str,
        rows: Tensor,
        scale: Tensor,
        history: Tensor | None,
        history_scale: Tensor,
        momentum: Tensor | None,
        mask: Tensor | None,
    ) -> list[Tensor]:
        products = ops.gramian(
            rows,
            layout.offsets,
            layout.sizes,
            scale=scale,
            history=history,
            history_scale=history_scale,
            momentum=momentum,
            mask=mask,
            backend=backend,
        )
        return as_means(layout, *products)

    for tasks, dtype, history_dtype, with_momentum in (
        (2, torch.float32, None, False),
        (3, torch.bfloat16, torch.float16, True),
        (8, torch.float32, torch.bfloat16, True),
    ):
        scale = torch.rand(tasks, dtype=torch.float64) + 0.1
        history = None if history_dtype is None else layout.rows(tasks, history_dtype)
        momentum = layout.rows(1)[0] if with_momentum else None
        rows = layout.rows(tasks, dtype)
        for what, mask in (("", None), (", masked", layout.mask())):
            name = f"gramian{what}, K = {tasks}, {layout.name}"
            check(name, run, rows, scale, history, scale.clone(), momentum, mask)


def as_means(
    layout: Layout,
    total: Tensor,
    cross: Tensor | None,
    per_tensor: Tensor,
    crosses: Tensor | None,
) -> list[Tensor]:
    """Sums of thousands of products, far from 1, as means. No tensor hides another."""
    sizes = torch.tensor(layout.sizes)
    each, whole = (sizes + 1)[:, None, None], sizes.sum()
    pairs = ((per_tensor, each), (crosses, each), (total, whole), (cross, whole))
    return [sums.cpu() / count for sums, count in pairs if sums is not None]


def check_combine(check: Check, layout: Layout) -> None:
    """Momentum, clipping, sign update, steps that are not finite; many rows and few.

    Weights of all tensors and of each; all elements and some.
    """
    T = len(layout.sizes)
    for tasks, dtype, beta, options in (
        (2, torch.float32, 0.9, {"max_norm": 50.0}),
        (3, torch.bfloat16, 0.9, {"parameter_norms": 100 * torch.rand(T).double()}),
        (8, torch.float32, 0.9, {}),
        (9, torch.float32, 0.0, {"max_norm": 50.0}),
        (2, torch.float32, 0.9, {"finite": torch.tensor(False)}),
        (3, torch.float32, 0.9, {"weights": torch.randn(T, 3).double(), "max_norm": 50.0}),
        (2, torch.bfloat16, 0.9, {"mask": layout.mask()}),
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
            inputs["weights"][..., 1] = inputs["scale"][1] = 0.0
        if tasks > 3:  # one that does, but the sum does not need it
            inputs["weights"][..., 0] = 0.0
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
        check(name, combining(layout, beta), rows, tensors_of(layout.sizes, tasks), inputs)


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


def check_graddrop(check: Check, layout: Layout) -> None:
    """Rows in registers and rows that are read twice; momentum, masks, and what is not finite."""
    for tasks, dtype, beta, masked, finite in (
        (2, torch.float32, 0.0, False, True),
        (3, torch.bfloat16, 0.9, True, True),
        (8, torch.float32, 0.9, True, True),
        (9, torch.float32, 0.9, False, True),
        (2, torch.float32, 0.9, True, False),
    ):
        inputs: dict[str, Any] = {
            "scale": torch.rand(tasks, dtype=torch.float64) + 0.1,
            "finite": torch.tensor(finite),
            "draws": torch.tensor(tasks),
            "momentum": layout.rows(1)[0] if beta else None,
            "momentum_steps": torch.arange(len(layout.sizes)) if beta else None,
            "mask": layout.mask() if masked else None,
        }
        if tasks > 2:  # a task that takes no part
            inputs["scale"][1] = 0.0
        what = "masked" if masked else "plain"
        name = f"graddrop, K = {tasks}, {what if finite else 'not finite'}, {layout.name}"
        outputs = tensors_of(layout.sizes, tasks)
        check(name, picking(layout, beta), layout.rows(tasks, dtype), outputs, inputs)


def picking(layout: Layout, beta: float) -> Callable[..., list[Tensor]]:
    """A call of graddrop that gives back all that it may change."""

    def run(backend: str, rows: Tensor, outputs: Tensors, inputs: dict[str, Any]) -> list[Tensor]:
        ops.graddrop(
            rows,
            outputs,
            layout.offsets,
            layout.sizes,
            seed=3,
            leak=0.25,
            beta=beta,
            backend=backend,
            **inputs,
        )
        changed = [*outputs, inputs["momentum"], inputs["momentum_steps"]]
        return [tensor for tensor in changed if tensor is not None]

    return run


def check_resolve(check: Check, layout: Layout) -> None:
    """Whole resolutions of any number of tasks: all forms where segments are aligned, then some."""
    for tasks in range(1, 9):
        for form in FORMS if layout.name == "aligned" else FORMS[tasks % 3 :: 3]:
            method = GCond(history="resolved" if tasks % 2 else "raw", tolerance=1e-5)
            dtype = form.get("accumulators", torch.float32)
            steps = [conflicting(layout.rows(tasks, dtype)) for _ in range(2)]
            if form.get("infinite"):  # in the second step, which must leave the state of the first
                steps[1][tasks // 2, layout.offsets[3]] = float("inf")
            inputs = resolution_inputs(layout, tasks, form)
            inputs["state"] = method.new_state(tasks, torch.device("cpu"))
            name = f"resolve, K = {tasks}, {form['name']}, {layout.name}"
            run = resolving(layout, method)
            check(name, run, steps, tensors_of(layout.sizes, tasks), inputs)


def conflicting(rows: Tensor) -> Tensor:
    """Rows that point away from each other, some more than others."""
    return (rows - 1.1 * rows.float().mean(0)).to(rows.dtype)


def resolution_inputs(layout: Layout, tasks: int, form: dict[str, Any]) -> dict[str, Any]:
    """What a resolution of this form is given beside rows, outputs and state."""
    T, moving = len(layout.sizes), "beta" in form
    history = form.get("history", torch.bfloat16)
    return {
        "scale": torch.rand(tasks, dtype=torch.float64) + 0.5,
        "history": None if history is None else layout.rows(tasks, history),
        "momentum": layout.rows(1)[0] if moving else None,
        "momentum_steps": torch.arange(T) if moving else None,
        "beta": form.get("beta", 0.0),
        "max_norm": form.get("max_norm"),
        "parameter_norms": 100 * torch.rand(T).double() if "signs" in form else None,
        "mask": layout.mask() if "masked" in form else None,
    }


def resolving(layout: Layout, method: GCond) -> Callable[..., list[Tensor]]:
    """Some resolutions in a row; gives back all that they decide and all that they change."""

    def run(
        backend: str, steps: list[Tensor], outputs: Tensors, inputs: dict[str, Any]
    ) -> list[Tensor]:
        results: list[Tensor | None] = []
        state = inputs["state"]
        for rows in steps:
            products, decision = ops.resolve(
                rows,
                outputs,
                layout.offsets,
                layout.sizes,
                settings=method.settings(len(rows)),
                trust_ratio_coef=1.0,
                backend=backend,
                **inputs,
            )
            changed = [inputs[name] for name in ("history", "momentum", "momentum_steps")]
            kept = [tensor for name, tensor in state.items() if name != "history_gramian"]
            results += [copied(each, "cpu") for each in (*decision, *outputs, *changed, *kept)]
            last = ops.Gramians(state["history_gramian"], None, products.per_tensor, None)
            results += [*as_means(layout, *products), *as_means(layout, *last)]
        return [tensor for tensor in results if tensor is not None]

    return run


def check_arbitrate(check: Check) -> None:
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
                decisions += method.decide(
                    Comparison(gramian, cross, scale, backend=backend), state
                )
            return [*decisions, *state.values()]

        scale = torch.ones(tasks, dtype=torch.float64)
        if tasks > 2:
            scale[1] = 0.0
        for what, batch in (("", ()), (", three at once", (3,))):
            vectors = [torch.randn(*batch, tasks, 5, dtype=torch.float64) for _ in range(5)]
            vectors = [v - 1.1 * v.mean(-2, keepdim=True) for v in vectors]  # there are conflicts
            steps = [(v @ v.mT, v @ w.mT) for v, w in itertools.pairwise(vectors)]
            steps[1][0][..., 0, 0] = float("nan")
            state = {
                name: value if name == "history_scale" else value.expand(*batch, *value.shape)
                for name, value in method.new_state(tasks, torch.device("cpu")).items()
            }
            check(f"arbitrate, K = {tasks}{what}", run, steps, scale, copied(state, "cpu"))


def check_lists(check: Check) -> None:
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
    check("norms of lists", run, a, b)
    aligned = [torch.randn(size) for size in SIZES]
    check("norms of aligned lists", run, aligned, [tensor + 1.0 for tensor in aligned])
    check("norms of empty tensors", run, [torch.zeros(0)], [torch.zeros(0)])


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
    sys.exit(main())

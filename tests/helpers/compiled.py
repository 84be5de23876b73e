"""Compile every Triton kernel for GPUs that need not be there; print a `Finding` of each as JSON.

It must run as a process of its own: where Triton interprets, it does not compile.
"""

import functools
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = {"fp32": 1, "bf16": 2, "fp16": 4, "fp64": 8}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


@dataclass(frozen=True)
class Case:
    """One variant of one kernel.

    Attributes:
        module: of the kernel, in `gcond_kernels.triton_kernels`.
        kernel: its name.
        arguments: name → Triton type. Pointers are divisible by 16, as torch allocates.
        constants: the constexpr arguments, and the pointers that are None.
        warps: per program.
        loads: bytes that a thread of the main body must load at least 16 at a time; None: any.
        stores: the same for stores.
        fused: whether multiplications and additions are fused.
    """

    module: str
    kernel: str
    arguments: dict[str, str]
    constants: dict[str, int | bool | None]
    warps: int
    loads: int | None = None
    stores: int | None = None
    fused: bool = True

    @property
    def name(self) -> str:
        stored = ("accumulator_ptr", "accumulators_ptr", "history_ptr")
        types = [self.arguments[name][1:] for name in stored if name in self.arguments]
        options = [
            f"{key}={value if value is None else int(value)}"
            for key, value in self.constants.items()
        ]
        return f"{self.kernel}[{','.join(types + options)}]"


@dataclass(frozen=True)
class Finding:
    """What the machine code of one case for one target shows.

    Attributes:
        loads: bytes that a thread loads in accesses of 16 bytes or more, each one counted once.
        stores: the same for stores.
        stack: bytes a thread that do not fit in registers.
        narrow_products: products cut to 32 bits, which an address must not be made of.
    """

    case: str
    target: str
    expected_loads: int | None
    expected_stores: int | None
    loads: int
    stores: int
    stack: int
    registers: int
    narrow_products: int


def given(**arguments: str | None) -> tuple[dict[str, str], dict[str, None]]:
    """Return arguments by name, and the pointers that are None, which are constants."""
    present = {name: dtype for name, dtype in arguments.items() if dtype is not None}
    return present, {name: None for name, dtype in arguments.items() if dtype is None}


def accumulate_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels._accumulate import CHUNK, WARPS

    each = CHUNK // (32 * WARPS)
    for row, overwrite, by_tensor in itertools.product(("fp32", "bf16"), (0, 1), (0, 1)):
        for grads in (["fp32"], ["bf16"], ["fp16"], ["fp64"], ["fp32", "bf16"], list(TYPES)):
            if by_tensor and grads != ["bf16"]:
                continue
            kept = 0 if overwrite else BYTES[row]
            arguments, absent = given(
                accumulator_ptr=f"*{row}",
                table_ptr="*i64",
                chunks_ptr="*i32",
                scale="fp32",
                scale_ptr="*fp32" if by_tensor else None,
            )
            yield Case(
                "accumulate",
                "accumulate_kernel",
                arguments,
                {
                    **absent,
                    "OVERWRITE": bool(overwrite),
                    "TYPES": sum(TYPES[g] for g in grads),
                    "BLOCK_SIZE": CHUNK,
                },
                WARPS,
                loads=each * (kept + sum(BYTES[g] for g in grads)),
                stores=each * BYTES[row],
            )


def gramian_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels._gramian import WARPS, vector_elements

    # K, accumulators, history, momentum, mask
    variants = [(K, "fp32", "bf16", 0, 0) for K in range(1, 9)]
    variants += [(K, "fp32", "bf16", 1, mask) for K in range(1, 9) for mask in (0, 1)]
    variants += [(K, "fp32", None, momentum, 0) for K in (2, 8) for momentum in (0, 1)]
    variants += [(4, "bf16", "bf16", 0, 0), (2, "fp32", "fp32", 0, 0), (3, "bf16", "fp16", 1, 1)]
    variants += [(K, "bf16", "bf16", 1, 0) for K in (5, 8)] + [(8, "fp32", "fp32", 0, 0)]
    variants += [(2, "fp32", None, 0, 1), (4, "bf16", "bf16", 0, 1), (8, "bf16", "fp32", 1, 1)]
    for K, row, history, momentum, mask in variants:
        R, crosses = K + momentum, 0 if history is None else K * K
        products = R * (R + 1) // 2 + crosses
        vector = vector_elements(products)
        # Two-byte dtypes are read 16 bytes at a time only where a thread holds eight elements.
        wide = [b for b in [BYTES[row]] * K + [4] * momentum if b * vector >= 16]
        wide += [BYTES[history]] * K if history and BYTES[history] * vector >= 16 else []
        arguments, absent = given(
            accumulators_ptr=f"*{row}",
            history_ptr=history and f"*{history}",
            momentum_ptr="*fp32" if momentum else None,
            mask_ptr="*i32" if mask else None,
            table_ptr="*i64",
            chunks_ptr="*i32",
            partials_ptr="*fp32",
            stride="i64",
            chunk_count="i32",
        )
        sizes = {"BLOCK_SIZE": 32768, "LANES": 32 * WARPS, "VECTOR": vector}
        yield Case(
            "gramian",
            "products_kernel",
            arguments,
            {**absent, "K": K, **sizes},
            WARPS,
            loads=vector * sum(wide),
        )
    yield from list_product_cases()
    yield from sum_cases()


def list_product_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels._gramian import WARPS

    for lists, types in ((1, 1), (1, 2), (1, 15), (2, 1), (2, 3)):
        bytes_each = sum(BYTES[name] for name, bit in TYPES.items() if types & bit)
        arguments, _ = given(
            table_ptr="*i64",
            chunks_ptr="*i32",
            partials_ptr="*fp32",
            tensors="i32",
            chunk_count="i32",
        )
        sizes = {"BLOCK_SIZE": 4096, "LANES": 32 * WARPS, "VECTOR": 8}
        yield Case(
            "gramian",
            "list_products_kernel",
            arguments,
            {"LISTS": lists, "TYPES": types, **sizes},
            WARPS,
            loads=8 * lists * bytes_each,
        )


def sum_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels._gramian import SUM_BLOCK, SUM_WARPS

    for K, R, scaled, crossed in (
        (2, 2, True, True),
        (8, 9, True, True),
        (3, 4, True, False),
        (2, 2, False, False),
    ):
        arguments, absent = given(
            partials_ptr="*fp32",
            first_ptr="*i32",
            scale_ptr="*fp64" if scaled else None,
            history_scale_ptr="*fp64" if crossed else None,
            total_ptr="*fp64",
            cross_ptr="*fp64" if crossed else None,
            per_tensor_ptr="*fp64",
            cross_per_tensor_ptr="*fp64" if crossed else None,
            tensors="i32",
            chunk_count="i32",
        )
        constants = {**absent, "K": K, "R": R, "BLOCK_SIZE": SUM_BLOCK}
        yield Case("gramian", "sum_kernel", arguments, constants, SUM_WARPS, fused=False)


def arbitrate_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels._arbitrate import warps_for

    for K, window, smooth, rest in (
        (1, 3, True, True),
        (2, 3, True, True),
        (2, 0, False, False),
        (3, 3, True, False),
        (8, 3, False, True),
        (11, 3, True, True),
        (32, 5, True, True),
        (64, 3, True, True),
    ):
        arguments, absent = given(
            gramian_ptr="*fp64",
            cross_ptr="*fp64" if rest else None,
            scale_ptr="*fp64",
            norm_ema_ptr="*fp64",
            winners_ptr="*i64",
            history_gramian_ptr="*fp64",
            history_coefficients_ptr="*fp64",
            history_scale_ptr="*fp64",
            settings_ptr="*fp64",
            weights_ptr="*fp64",
            coefficients_ptr="*fp64",
            events_ptr="*fp64",
            finite_ptr="*i1",
            max_iterations="i32",
        )
        power = 1 << (K - 1).bit_length()
        blocks = {
            "K": K,
            "BLOCK_K": power,
            "WINDOW": window,
            "BLOCK_WINDOW": 8 if window > 4 else 4,
        }
        constants = {**absent, **blocks, "CAP": rest, "SMOOTH": smooth, "RESOLVED": rest}
        yield Case(
            "arbitrate", "arbitrate_kernel", arguments, constants, warps_for(power), fused=False
        )


def combine_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels._combine import CHUNK, MOST_UNROLLED, WARPS

    each = CHUNK // (32 * WARPS)
    variants = [
        # K, accumulators, history, momentum, mask, outputs, clipped
        *[(K, "fp32", "bf16", 1, 0, ["fp32"], 1) for K in range(1, 9)],
        *[(K, "fp32", "bf16", 1, 1, ["fp32"], 1) for K in (1, 2, 5, 8)],
        (2, "fp32", "bf16", 0, 0, ["fp32"], 0),
        (2, "fp32", None, 0, 0, ["bf16"], 0),
        (2, "fp32", None, 0, 1, ["fp32"], 0),
        (2, "fp32", "bf16", 1, 0, ["bf16", "fp32"], 0),
        (3, "bf16", "bf16", 1, 0, ["bf16"], 0),
        (3, "bf16", "bf16", 1, 1, ["bf16"], 0),
        (2, "fp32", "fp32", 0, 0, list(TYPES), 0),
        (2, "fp32", "fp16", 0, 0, ["fp16"], 0),
        (8, "fp32", "bf16", 0, 0, list(TYPES), 1),
        (8, "bf16", "bf16", 0, 1, list(TYPES), 1),
        (11, "fp32", "bf16", 1, 0, ["fp32"], 0),
        (11, "fp32", "bf16", 1, 1, ["fp32"], 0),
    ]
    for K, row, history, momentum, mask, outputs, clipped in variants:
        read = K * BYTES[row] + 4 * momentum
        written = sum(BYTES[o] for o in outputs) + 4 * momentum
        written += K * BYTES[history] if history else 0
        arguments, absent = given(
            accumulators_ptr=f"*{row}",
            history_ptr=history and f"*{history}",
            momentum_ptr="*fp32" if momentum else None,
            mask_ptr="*i32" if mask else None,
            table_ptr="*i64",
            chunks_ptr="*i32",
            weights_ptr="*fp64",
            scale_ptr="*fp64",
            finite_ptr="*i1",
            factors_ptr="*fp64" if momentum or clipped else None,
            clipping_ptr="*fp64" if clipped else None,
            settings_ptr="*fp64",
            weight_stride="i32",
            stride="i64",
        )
        # In a loop that is not unrolled each instruction stands once for all tasks.
        unrolled = MOST_UNROLLED.value >= K
        yield Case(
            "combine",
            "combine_kernel",
            arguments,
            {**absent, "K": K, "TYPES": sum(TYPES[o] for o in outputs), "BLOCK_SIZE": CHUNK},
            WARPS,
            loads=each * read if unrolled else None,
            stores=each * written if unrolled else None,
        )
    yield from factor_cases()


def factor_cases() -> Iterator[Case]:
    for K, momentum, clipped in ((2, True, False), (2, True, True), (8, False, True)):
        arguments, absent = given(
            table_ptr="*i64",
            per_tensor_ptr="*fp64" if clipped else None,
            weights_ptr="*fp64",
            finite_ptr="*i1",
            steps_ptr="*i64" if momentum else None,
            settings_ptr="*fp64",
            factors_ptr="*fp64",
            squares_ptr="*fp64" if clipped else None,
            weight_stride="i32",
        )
        constants = {**absent, "K": K, "BLOCK_R": 4 if K == 2 else 8}
        yield Case("combine", "factor_kernel", arguments, constants, 1, fused=False)
    arguments, _ = given(
        squares_ptr="*fp64", settings_ptr="*fp64", clipping_ptr="*fp64", tensors="i32"
    )
    yield Case("combine", "clipping_kernel", arguments, {"BLOCK_SIZE": 1024}, 4, fused=False)


def graddrop_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels._graddrop import CHUNK, MOST_UNROLLED, WARPS

    each = CHUNK // (32 * WARPS)
    variants = [
        # K, accumulators, momentum, mask, outputs
        *[(K, "fp32", 1, 0, ["fp32"]) for K in range(1, 9)],
        *[(K, "fp32", 1, 1, ["fp32"]) for K in (1, 2, 5, 8)],
        (2, "fp32", 0, 0, ["fp32"]),
        (2, "fp32", 0, 1, ["bf16"]),
        (3, "bf16", 1, 0, ["bf16"]),
        (2, "fp32", 0, 0, list(TYPES)),
        (8, "fp32", 0, 0, list(TYPES)),
        (8, "bf16", 1, 1, list(TYPES)),
        (11, "fp32", 1, 0, ["fp32"]),
        (11, "bf16", 1, 1, ["bf16"]),
    ]
    for K, row, momentum, mask, outputs in variants:
        arguments, absent = given(
            accumulators_ptr=f"*{row}",
            momentum_ptr="*fp32" if momentum else None,
            mask_ptr="*i32" if mask else None,
            table_ptr="*i64",
            chunks_ptr="*i32",
            scale_ptr="*fp64",
            finite_ptr="*i1",
            counter_ptr="*i64",
            factors_ptr="*fp64" if momentum else None,
            settings_ptr="*fp64",
            leak="fp32",
            seed="i64",
            first="i64",
            stride="i64",
        )
        unrolled = MOST_UNROLLED.value >= K
        yield Case(
            "graddrop",
            "graddrop_kernel",
            arguments,
            {**absent, "K": K, "TYPES": sum(TYPES[o] for o in outputs), "BLOCK_SIZE": CHUNK},
            WARPS,
            loads=each * (K * BYTES[row] + 4 * momentum) if unrolled else None,
            stores=each * (sum(BYTES[o] for o in outputs) + 4 * momentum),
            fused=False,
        )


@functools.cache
def all_cases() -> list[Case]:
    return [
        *accumulate_cases(),
        *gramian_cases(),
        *arbitrate_cases(),
        *combine_cases(),
        *graddrop_cases(),
    ]


def wide_bytes(ptx: str, instruction: str) -> int:
    """Return the bytes that a thread moves in accesses of 16 bytes or more, each counted once."""
    pattern = rf"\b{instruction}\.global[.\w:]*\.v(\d)\.[bfu](\d+)"
    sizes = [int(count) * int(bits) // 8 for count, bits in re.findall(pattern, ptx)]
    return sum(size for size in sizes if size >= 16)


def resources(binary: bytes) -> dict[str, int]:
    """Return registers a thread, and the bytes of stack that hold what does not fit in them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}


def compile_case(case: Case, target: str) -> Finding:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"gcond_kernels.triton_kernels._{case.module}"), case.kernel)
    names = list(inspect.signature(kernel.fn).parameters)
    assert set(names) == {*case.arguments, *case.constants}, case.name
    divisible = [n for n, t in case.arguments.items() if t.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={n: case.arguments.get(n, "constexpr") for n in names},
        constexprs=case.constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    chip = target.removeprefix("sm_")
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(chip), 32) if chip != target else GPUTarget("hip", target, 64),
        options={"num_warps": case.warps, "enable_fp_fusion": case.fused},
    )
    ptx = compiled.asm.get("ptx", "")
    used = resources(compiled.asm["cubin"]) if ptx else {"STACK": 0, "REG": 0}
    return Finding(
        case=case.name,
        target=target,
        expected_loads=case.loads,
        expected_stores=case.stores,
        loads=wide_bytes(ptx, "ld"),
        stores=wide_bytes(ptx, "st"),
        stack=used["STACK"],
        registers=used["REG"],
        narrow_products=len(re.findall(r"\bm(?:ul|ad)\.lo\.[su]32", ptx)),
    )


def compile_one(job: tuple[int, str]) -> Finding:
    number, target = job
    return compile_case(all_cases()[number], target)


def main(targets: list[str]) -> None:
    jobs = [(n, t) for n in range(len(all_cases())) for t in targets or TARGETS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for finding in pool.map(compile_one, jobs):
            print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

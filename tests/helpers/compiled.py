"""Compiles every kernel for GPUs that need not be there; run as a script it prints what it found.

It must be a process of its own: where Triton interprets, it does not compile. Each line is the
JSON of one `Finding`.
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
    """One variant of one kernel, as a launch would have it.

    Attributes:
        room: module of the kernel, in `gcond_kernels.triton_kernels`.
        kernel: its name.
        arguments: name → Triton type. Pointers are taken to be divisible by 16, as the launcher
            finds them to be.
        constants: the constexpr arguments.
        warps: per program.
        loads: bytes that a thread of the main body loads at least 16 at a time; None: not said.
        stores: the same for stores.
        fused: whether multiplications and additions are fused.
    """

    room: str
    kernel: str
    arguments: dict[str, str]
    constants: dict[str, int | bool]
    warps: int
    loads: int | None = None
    stores: int | None = None
    fused: bool = True

    @property
    def name(self) -> str:
        types = [self.arguments[a][1:] for a in ("accumulator", "accumulators", "history") if
                 a in self.arguments]  # fmt: skip
        options = [f"{key}={int(value)}" for key, value in self.constants.items()]
        return f"{self.kernel}[{','.join(types + options)}]"


@dataclass(frozen=True)
class Finding:
    """What the machine code of one case on one target says.

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


def accumulate_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels.accumulate import CHUNK, WARPS

    each = CHUNK // (32 * WARPS)
    for row, overwrite, by_tensor in itertools.product(("fp32", "bf16"), (0, 1), (0, 1)):
        for grads in (["fp32"], ["bf16"], ["fp16"], ["fp64"], ["fp32", "bf16"], list(TYPES)):
            if by_tensor and grads != ["bf16"]:
                continue
            kept = 0 if overwrite else BYTES[row]
            yield Case(
                "accumulate",
                "accumulate_kernel",
                {
                    "accumulator": f"*{row}",
                    "table": "*i64",
                    "chunks": "*i32",
                    "scale": "fp32",
                    "scale_tensor": "*fp32",
                },
                {
                    "SCALE_TENSOR": bool(by_tensor),
                    "OVERWRITE": bool(overwrite),
                    "TYPES": sum(TYPES[g] for g in grads),
                    "CHUNK": CHUNK,
                },
                WARPS,
                loads=each * (kept + sum(BYTES[g] for g in grads)),
                stores=each * BYTES[row],
            )


def gramian_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels.gramian import SUM_BLOCK, SUM_WARPS, WARPS, vector_elements

    # K, accumulators, history, momentum, mask
    variants = [(K, "fp32", "bf16", 0, 0) for K in range(1, 9)]
    variants += [(K, "fp32", "bf16", 1, mask) for K in range(1, 9) for mask in (0, 1)]
    variants += [(K, "fp32", None, momentum, 0) for K in (2, 8) for momentum in (0, 1)]
    variants += [(4, "bf16", "bf16", 0, 0), (2, "fp32", "fp32", 0, 0), (3, "bf16", "fp16", 1, 1)]
    variants += [(K, "bf16", "bf16", 1, 0) for K in (5, 8)] + [(8, "fp32", "fp32", 0, 0)]
    variants += [(2, "fp32", None, 0, 1), (4, "bf16", "bf16", 0, 1), (8, "bf16", "fp32", 1, 1)]
    for K, row, history, momentum, mask in variants:
        rows, crosses = K + momentum, 0 if history is None else K * K
        products = rows * (rows + 1) // 2 + crosses
        vector = vector_elements(products)
        # Rows of two bytes are read 16 bytes at a time only where a thread holds eight elements.
        wide = [b for b in [BYTES[row]] * K + [4] * momentum if b * vector >= 16]
        wide += [BYTES[history]] * K if history and BYTES[history] * vector >= 16 else []
        yield Case(
            "gramian",
            "products_kernel",
            {
                "accumulators": f"*{row}",
                "history": f"*{history or row}",
                "momentum": "*fp32",
                "mask": "*i32",
                "table": "*i64",
                "chunks": "*i32",
                "partials": "*fp32",
                "stride": "i64",
                "chunk_count": "i32",
            },
            {
                "K": K,
                "HISTORY": int(history is not None),
                "MOMENTUM": momentum,
                "MASK": bool(mask),
                "LENGTH": 32768,
                "LANES": 32 * WARPS,
                "VECTOR": vector,
            },
            WARPS,
            loads=vector * sum(wide),
        )
    for lists, types in ((1, 1), (1, 2), (1, 15), (2, 1), (2, 3)):
        bytes_each = sum(BYTES[name] for name, bit in TYPES.items() if types & bit)
        yield Case(
            "gramian",
            "list_products_kernel",
            {
                "table": "*i64",
                "chunks": "*i32",
                "partials": "*fp32",
                "tensors": "i32",
                "chunk_count": "i32",
            },
            {
                "LISTS": lists,
                "TYPES": types,
                "LENGTH": 4096,
                "LANES": 32 * WARPS,
                "VECTOR": 8,
            },
            WARPS,
            loads=8 * lists * bytes_each,
        )
    for K, rows, scaled in ((2, 2, True), (8, 9, True), (2, 2, False)):
        yield Case(
            "gramian",
            "sum_kernel",
            dict.fromkeys(("scale", "history_scale", "per_tensor", "gramian"), "*fp64")
            | {"cross": "*fp64", "cross_per_tensor": "*fp64"}
            | {"partials": "*fp32", "first": "*i32", "tensors": "i32", "chunk_count": "i32"},
            {"K": K, "ROWS": rows, "SCALED": scaled, "BLOCK": SUM_BLOCK},
            SUM_WARPS,
            fused=False,
        )


def arbitrate_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels.arbitrate import warps_for

    states = ("gramian", "cross", "scale", "norm_ema", "history_gramian", "history_rows")
    arguments = dict.fromkeys(
        (*states, "history_scale", "settings", "weights", "rows", "events"), "*fp64"
    ) | {"winners": "*i64", "finite": "*i1", "max_iterations": "i32"}
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
        power = 1 << (K - 1).bit_length()
        constants = {"K": K, "KP": power, "WINDOW": window, "WP": 8 if window > 4 else 4}
        constants |= {"CROSS": rest, "CAP": rest, "SMOOTH": smooth, "RESOLVED": rest}
        yield Case(
            "arbitrate", "arbitrate_kernel", arguments, constants, warps_for(power), fused=False
        )


def combine_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels.combine import CHUNK, MOST_UNROLLED, WARPS

    each = CHUNK // (32 * WARPS)
    double = ("weights", "scale", "factors", "clipping", "settings")
    variants = [
        # K, accumulators, history, momentum, mask, outputs, clipped, signs
        *[(K, "fp32", "bf16", 1, 0, ["fp32"], 1, 0) for K in range(1, 9)],
        *[(K, "fp32", "bf16", 1, 1, ["fp32"], 1, 0) for K in (1, 2, 5, 8)],
        (2, "fp32", "bf16", 0, 0, ["fp32"], 0, 0),
        (2, "fp32", None, 0, 0, ["bf16"], 0, 0),
        (2, "fp32", None, 0, 1, ["fp32"], 0, 0),
        (2, "fp32", "bf16", 1, 0, ["bf16", "fp32"], 0, 1),
        (3, "bf16", "bf16", 1, 0, ["bf16"], 0, 0),
        (3, "bf16", "bf16", 1, 1, ["bf16"], 0, 1),
        (2, "fp32", "fp32", 0, 0, list(TYPES), 0, 0),
        (2, "fp32", "fp16", 0, 0, ["fp16"], 0, 0),
        (8, "fp32", "bf16", 0, 0, list(TYPES), 1, 0),
        (8, "bf16", "bf16", 0, 1, list(TYPES), 1, 0),
        (11, "fp32", "bf16", 1, 0, ["fp32"], 0, 0),
        (11, "fp32", "bf16", 1, 1, ["fp32"], 0, 0),
    ]
    for K, row, history, momentum, mask, outputs, clipped, signs in variants:
        read = K * BYTES[row] + 4 * momentum
        written = sum(BYTES[o] for o in outputs) + 4 * momentum
        written += K * BYTES[history] if history else 0
        yield Case(
            "combine",
            "combine_kernel",
            dict.fromkeys(double, "*fp64")
            | {
                "accumulators": f"*{row}",
                "history": f"*{history or row}",
                "momentum": "*fp32",
                "mask": "*i32",
                "table": "*i64",
                "chunks": "*i32",
                "finite": "*i1",
                "weight_stride": "i32",
                "stride": "i64",
            },
            {
                "K": K,
                "MOST_UNROLLED": MOST_UNROLLED,
                "HISTORY": history is not None,
                "MOMENTUM": bool(momentum),
                "MASK": bool(mask),
                "FACTORS": bool(momentum or signs or clipped),
                "CLIP": bool(clipped),
                "SIGNS": bool(signs),
                "TYPES": sum(TYPES[o] for o in outputs),
                "CHUNK": CHUNK,
            },
            WARPS,
            # In a loop that is not unrolled each instruction stands once for all rows.
            loads=each * read if K <= MOST_UNROLLED else None,
            stores=each * written if K <= MOST_UNROLLED else None,
        )
    for K, momentum, norms, signs in (
        (2, 1, False, False),
        (2, 1, True, True),
        (8, 0, True, False),
    ):
        names = ("per_tensor", "weights", "parameter_norms", "settings", "factors", "squares")
        yield Case(
            "combine",
            "factor_kernel",
            dict.fromkeys(names, "*fp64")
            | {"table": "*i64", "finite": "*i1", "momentum_steps": "*i64", "weight_stride": "i32"},
            {"K": K, "RP": 4 if K == 2 else 8, "MOMENTUM": momentum, "NORMS": norms,
             "SIGNS": signs},
            1,
            fused=False,
        )  # fmt: skip
    yield Case(
        "combine",
        "clipping_kernel",
        {"squares": "*fp64", "settings": "*fp64", "clipping": "*fp64", "tensors": "i32"},
        {"BLOCK": 1024},
        4,
        fused=False,
    )


def graddrop_cases() -> Iterator[Case]:
    from gcond_kernels.triton_kernels.graddrop import CHUNK, MOST_UNROLLED, WARPS

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
        yield Case(
            "graddrop",
            "graddrop_kernel",
            dict.fromkeys(("scale", "factors", "settings"), "*fp64")
            | dict.fromkeys(("table", "draws"), "*i64")
            | dict.fromkeys(("mask", "chunks"), "*i32")
            | dict.fromkeys(("seed", "first_place", "stride"), "i64")
            | {
                "accumulators": f"*{row}",
                "momentum": "*fp32",
                "finite": "*i1",
                "leak": "fp32",
            },
            {
                "K": K,
                "MOST_UNROLLED": MOST_UNROLLED,
                "MOMENTUM": bool(momentum),
                "MASK": bool(mask),
                "TYPES": sum(TYPES[o] for o in outputs),
                "CHUNK": CHUNK,
            },
            WARPS,
            # In loops that are not unrolled each instruction stands once for all rows.
            loads=each * (K * BYTES[row] + 4 * momentum) if K <= MOST_UNROLLED else None,
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
    """Bytes that a thread moves in accesses of 16 bytes or more, every instruction once."""
    pattern = rf"\b{instruction}\.global[.\w:]*\.v(\d)\.[bfu](\d+)"
    sizes = [int(count) * int(bits) // 8 for count, bits in re.findall(pattern, ptx)]
    return sum(size for size in sizes if size >= 16)


def resources(binary: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack: what does not fit in registers goes there."""
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

    kernel = getattr(import_module(f"gcond_kernels.triton_kernels.{case.room}"), case.kernel)
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

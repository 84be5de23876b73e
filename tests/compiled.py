"""Kernels compiled for a GPU that need not be there, and what the machine code says."""

import inspect
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Compiled:
    ptx: str
    binary: bytes

    def count(self, instruction: str) -> int:
        """How many PTX instructions match a pattern."""
        return len(re.findall(instruction, self.ptx))

    def resources(self) -> dict[str, int]:
        """Registers a thread, and bytes of stack: what does not fit in registers goes there."""
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary)
            file.flush()
            text = subprocess.run(
                [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def compile_kernel(kernel, target, arguments, *, num_warps, **constants) -> Compiled:
    """Compiles a kernel as a launch with these arguments would.

    Args:
        kernel: the kernel, interpreted or not.
        target: a key of TARGETS.
        arguments: name → Triton type; pointers and int64 are taken to be divisible by 16, as
            the launcher finds them to be; "i64?" is an int64 that need not be.
        num_warps: warps per program.
        constants: the constexpr arguments.
    """
    function = kernel.fn if not isinstance(kernel, triton.JITFunction) else kernel
    if not isinstance(function, triton.JITFunction):
        function = triton.JITFunction(function)
    names = list(inspect.signature(function.fn).parameters)
    missing = set(names) - set(arguments) - set(constants)
    assert not missing, f"no type for {missing}"
    signature = {n: "constexpr" if n in constants else arguments[n].rstrip("?") for n in names}
    divisible = [n for n, t in arguments.items() if t.startswith("*") or t == "i64"]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    binary = compiled.asm["cubin" if "cubin" in compiled.asm else "hsaco"]
    return Compiled(compiled.asm.get("ptx", ""), binary)

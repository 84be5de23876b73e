"""What the compiler makes of the Triton kernels, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.compiled import TARGETS, Finding

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
# What runs over all parameters. The others work on a few numbers.
LARGE = (
    "accumulate_kernel",
    "products_kernel",
    "list_products_kernel",
    "combine_kernel",
    "graddrop_kernel",
)


def output_of(script: str) -> list[str]:
    """What a script of tests/helpers prints, in a process where Triton does not interpret."""
    run = subprocess.run(
        [sys.executable, "-m", f"tests.helpers.{script}"],
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """Every variant on every target."""
    return [Finding(**json.loads(line)) for line in output_of("compiled")]


def large(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.target in NVIDIA and f.case.startswith(LARGE)]


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target(findings):
    by_target = {t: {f.case for f in findings if f.target == t} for t in TARGETS}
    assert all(cases == by_target["sm_90"] for cases in by_target.values())
    kernels = {case.split("[")[0] for case in by_target["sm_90"]}
    assert kernels >= {*LARGE, "sum_kernel", "arbitrate_kernel", "factor_kernel", "clipping_kernel"}
    assert all(f"K={K}," in str(by_target) for K in range(1, 9))


@pytest.mark.slow
def test_the_main_bodies_load_and_store_16_bytes_at_a_time(findings):
    wrong = [
        f
        for f in large(findings)
        if f.expected_loads not in (None, f.loads) or f.expected_stores not in (None, f.stores)
    ]
    assert not wrong
    assert sum(f.expected_loads is not None for f in large(findings)) > 150


@pytest.mark.slow
def test_up_to_eight_tasks_everything_stays_in_registers(findings):
    assert [f for f in large(findings) if f.stack] == []


@pytest.mark.slow
def test_no_address_is_made_of_a_product_of_32_bits(findings):
    assert [f for f in large(findings) if f.narrow_products] == []


def test_the_launches_as_the_host_makes_them_are_accepted():
    assert output_of("launches") == ["fine"]

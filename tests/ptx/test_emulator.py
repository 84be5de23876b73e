"""The emulator of PTX itself: right values, and every kind of fault is found."""

import numpy as np
import pytest
import torch

from tests.ptx import library
from tests.ptx.decode import UnknownInstructionError, decode
from tests.ptx.machine import Fault, Launch, Schedule, run
from tests.ptx.parse import parse

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(
        library.why_unavailable() is not None, reason=str(library.why_unavailable())
    ),
]

MODULE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 in, .param .u64 out)
.reqntid {threads}
{{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %d<19>;
  .shared .align 16 .b8 tile[1024];
  ld.param.u64 %d0, [in];
  ld.param.u64 %d1, [out];
  mov.u32 %r0, %tid.x;
  {body}
  ret;
}}
"""
# Addresses of a thread's own element of four bytes: %d2 of the input, %d3 of the output.
OWN = "mad.wide.u32 %d2, %r0, 4, %d0; mad.wide.u32 %d3, %r0, 4, %d1;"


def launched(body, given, result, threads=32, grid=1, cooperative=False, seed=0):
    """Run a body; return what was found. `given` and `result` are tensors."""
    module = parse(MODULE.format(threads=threads, body=body))
    memory = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (given, result)]
    parameters = np.array([given.data_ptr(), result.data_ptr()], np.uint64).tobytes()
    launch = Launch((grid, 1, 1), (threads, 1, 1), parameters, cooperative=cooperative)
    return run(decode(module), launch, memory, Schedule(seed=seed))


def faults(*arguments, **options):
    return {finding.fault for finding in launched(*arguments, **options).findings}


def words(*values):
    """Return words of 64 bits."""
    return torch.from_numpy(np.array([v % (1 << 64) for v in values], np.uint64).view(np.int64))


def bits(kind, value):
    return int(np.array(value, kind).view(f"u{np.dtype(kind).itemsize}"))


def f32(value):
    return bits(np.float32, value)


def f64(value):
    return bits(np.float64, value)


CALCULATIONS = [
    # instruction from %d4, %d5, %d6 to %d7; inputs; the result's bits
    ("add.s32 %r7, %r4, %r5;", (2**31 - 1, 1), 2**31),
    ("sub.s64 %d7, %d4, %d5;", (3, 5), -2),
    ("mul.hi.s32 %r7, %r4, %r5;", (-(2**31), 4), 2**32 - 2),
    ("mul.hi.u32 %r7, %r4, %r5;", (2**31, 4), 2),
    ("mul.wide.s32 %d7, %r4, %r5;", (-3, 2**30), -3 * 2**30),
    ("mad.wide.u32 %d7, %r4, %r5, %d6;", (2**32 - 1, 2, 5), 2**33 + 3),
    ("mad.lo.s64 %d7, %d4, %d5, %d6;", (7, -3, 1), -20),
    ("div.s32 %r7, %r4, %r5;", (-7, 2), 2**32 - 3),
    ("rem.s32 %r7, %r4, %r5;", (-7, 2), 2**32 - 1),
    ("div.u32 %r7, %r4, %r5;", (7, 0), 2**32 - 1),
    ("shr.s32 %r7, %r4, %r5;", (-8, 1), 2**32 - 4),
    ("shr.u32 %r7, %r4, %r5;", (2**31, 40), 0),
    ("shl.b32 %r7, %r4, %r5;", (3, 31), 2**31),
    ("shf.r.wrap.b32 %r7, %r4, %r5, %r6;", (1, 3, 33), 2**31),
    ("bfe.s32 %r7, %r4, %r5, %r6;", (0b1100, 2, 2), 2**32 - 1),
    ("bfe.u32 %r7, %r4, %r5, %r6;", (0b1100, 2, 2), 3),
    ("prmt.b32 %r7, %r4, %r5, %r6;", (0x33221100, 0x77665544, 0x7054), 0x77005544),
    ("clz.b32 %r7, %r4;", (1,), 31),
    ("popc.b64 %r7, %d4;", (2**63 + 3,), 3),
    ("not.b32 %r7, %r4;", (0,), 2**32 - 1),
    ("min.s32 %r7, %r4, %r5;", (-1, 1), 2**32 - 1),
    ("max.u32 %r7, %r4, %r5;", (-1, 1), 2**32 - 1),
    ("cvt.s64.s32 %d7, %r4;", (-5,), -5),
    ("cvt.u64.u32 %d7, %r4;", (-5,), 2**32 - 5),
    ("cvt.rzi.s32.f32 %r7, %r4;", (f32(-2.9),), 2**32 - 2),
    ("cvt.rni.s32.f64 %r7, %d4;", (f64(2.5),), 2),
    ("cvt.rzi.u32.f32 %r7, %r4;", (f32(1e20),), 2**32 - 1),
    ("cvt.rzi.s32.f32 %r7, %r4;", (f32(np.nan),), 0),
    ("cvt.rn.f32.s64 %r7, %d4;", (2**60 + 2**36 + 1,), f32(float.fromhex("0x1.000002p60"))),
    ("cvt.rn.f32.f64 %r7, %d4;", (f64(1 + 2**-24),), f32(1.0)),
    ("cvt.f64.f32 %d7, %r4;", (f32(0.1),), f64(float(np.float32(0.1)))),
    # To the nearest, ties to even: 1 + 2^-8 lies between two bfloat16.
    ("{ .reg .b16 %x; cvt.rn.bf16.f32 %x, %r4; cvt.u32.u16 %r7, %x; }", (f32(1 + 2**-8),), 0x3F80),
    (
        "{ .reg .b16 %x; cvt.rn.bf16.f32 %x, %r4; cvt.u32.u16 %r7, %x; }",
        (f32(1 + 3 * 2**-8),),
        0x3F82,
    ),
    ("cvt.rn.f16x2.f32 %r7, %r4, %r5;", (f32(2.0), f32(1.0)), 0x40003C00),
    ("add.f32 %r7, %r4, %r5;", (f32(1.0), f32(2**-24)), f32(1.0)),
    (
        "fma.rn.f32 %r7, %r4, %r5, %r6;",
        (f32(1 + 2**-12), f32(1 + 2**-12), f32(-1.0)),
        f32(2**-11 + 2**-24),
    ),
    (
        "fma.rn.f64 %d7, %d4, %d5, %d6;",
        (f64(1 + 2**-30), f64(1 + 2**-30), f64(-1.0)),
        f64(2**-29 + 2**-60),
    ),
    ("add.rn.f32.bf16 %r7, %h4, %r5;", (0x3F80, f32(2.5)), f32(3.5)),
    ("max.f32 %r7, %r4, %r5;", (f32(np.nan), f32(1.0)), f32(1.0)),
    ("min.f64 %d7, %d4, %d5;", (f64(0.0), f64(-0.0)), f64(-0.0)),
    ("abs.ftz.f32 %r7, %r4;", (f32(-1e-40),), 0),
    ("neg.f32 %r7, %r4;", (f32(1.5),), f32(-1.5)),
    ("sqrt.rn.f64 %d7, %d4;", (f64(2.0),), f64(2**0.5)),
    ("div.rn.f32 %r7, %r4, %r5;", (f32(1.0), f32(3.0)), f32(np.float32(1) / np.float32(3))),
    ("setp.lt.f32 %p1, %r4, %r5; selp.b32 %r7, %r4, %r5, %p1;", (f32(np.nan), 7), 7),
    ("setp.ltu.f32 %p1, %r4, %r5; selp.b32 %r7, 1, 0, %p1;", (f32(np.nan), 7), 1),
    (
        "setp.gt.s32 %p1, %r4, 0; setp.lt.and.s32 %p2, %r5, 0, !%p1; selp.b32 %r7, 1, 0, %p2;",
        (-1, -1),
        1,
    ),
    ("add.cc.u32 %r8, %r4, %r5; addc.u32 %r7, 0, 0;", (2**32 - 1, 1), 1),
    ("sub.cc.u32 %r8, %r4, %r5; subc.u32 %r7, 5, 0;", (0, 1), 4),
    ("mad.lo.cc.u32 %r8, %r4, %r5, %r6; madc.hi.u32 %r7, %r4, %r5, 0;", (2**31, 3, 2**31), 2),
    ("mov.b64 {%r8, %r7}, %d4;", (5 * 2**32 + 3,), 5),
    ("mov.b64 %d7, {%r4, %r5};", (3, 5), 5 * 2**32 + 3),
]


@pytest.mark.parametrize(("instruction", "given", "expected"), CALCULATIONS)
def test_calculations(instruction, given, expected):
    loads = "".join(
        f"ld.global.u64 %d{4 + n}, [%d0+{8 * n}]; cvt.u32.u64 %r{4 + n}, %d{4 + n};"
        f"cvt.u16.u64 %h{4 + n}, %d{4 + n};"
        for n in range(len(given))
    )
    wide = "%d7" in instruction
    store = f"st.global.u{64 if wide else 32} [%d1], {'%d7' if wide else '%r7'};"
    result = words(0)
    outcome = launched(loads + instruction + store, words(*given), result, threads=1)
    assert outcome.findings == []
    assert int(result) % (1 << 64) == expected % (1 << (64 if wide else 32))


def test_pairs_of_float32_are_calculated_apart():
    body = (
        "ld.global.u64 %d4, [%d0]; ld.global.u64 %d5, [%d0+8];"
        "fma.rn.f32x2 %d6, %d4, %d5, %d4; st.global.u64 [%d1], %d6;"
    )
    result = torch.zeros(2)
    launched(body, torch.tensor([1.0, 2.0, 3.0, 4.0]), result, threads=1)
    assert result.tolist() == [4.0, 10.0]


def test_lanes_that_part_come_together_again():
    """Odd threads loop three times, even ones not at all; then all exchange with a neighbour."""
    body = (
        OWN + "and.b32 %r1, %r0, 1; mov.u32 %r2, %r0; setp.eq.u32 %p1, %r1, 0; mov.u32 %r3, 0;"
        "@%p1 bra $join;"
        "$loop: add.s32 %r2, %r2, 100; add.s32 %r3, %r3, 1; setp.lt.s32 %p2, %r3, 3;"
        "@%p2 bra $loop;"
        "$join: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; st.global.u32 [%d3], %r4;"
    )
    result = torch.zeros(32, dtype=torch.int32)
    assert launched(body, result.clone(), result).findings == []
    assert result.tolist() == [(t ^ 1) + 300 * ((t ^ 1) & 1) for t in range(32)]


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("up", 3, 0, lambda t: t - 3 if t >= 3 else t),
        ("down", 3, 31, lambda t: t + 3 if t <= 28 else t),
        ("bfly", 5, 31, lambda t: t ^ 5),
        ("idx", 7, 31, lambda _: 7),
        ("idx", 1, (24 << 8) | 31, lambda t: t // 8 * 8 + 1),  # of the lane's own eight
    ],
)
def test_shuffles(mode, by, clamp, source):
    body = OWN + f"shfl.sync.{mode}.b32 %r1, %r0, {by}, {clamp}, -1; st.global.u32 [%d3], %r1;"
    result = torch.zeros(32, dtype=torch.int32)
    assert launched(body, result.clone(), result).findings == []
    assert result.tolist() == [source(t) for t in range(32)]


# Each thread writes to shared memory and reads what another has written.
EXCHANGE = (
    OWN + "mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0; {barrier}"
    "xor.b32 %r3, %r0, {other}; mad.lo.u32 %r4, %r3, 4, %r1; ld.shared.u32 %r5, [%r4];"
    "st.global.u32 [%d3], %r5;"
)


@pytest.mark.parametrize(
    ("barrier", "other", "expected"),
    [
        ("bar.sync 0;", 32, set()),
        ("bar.sync 0;", 1, set()),
        ("bar.warp.sync -1;", 1, set()),
        ("bar.warp.sync -1;", 32, {Fault.RACE_IN_BLOCK}),
        ("", 32, {Fault.RACE_IN_BLOCK}),
        ("", 1, {Fault.RACE_IN_WARP}),
        ("", 0, set()),
    ],
)
def test_races_on_shared_memory(barrier, other, expected):
    result = torch.zeros(64, dtype=torch.int32)
    body = EXCHANGE.format(barrier=barrier, other=other)
    # Without order the one that reads may come first: then there was nothing to read.
    found = faults(body, result.clone(), result, threads=64) - {Fault.UNWRITTEN_SHARED}
    assert found == expected
    if not expected:
        assert result.tolist() == [t ^ other for t in range(64)]


def test_a_write_after_a_read_is_a_race():
    body = (
        "mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0; bar.sync 0;"
        "ld.shared.u32 %r3, [tile]; {barrier} add.s32 %r4, %r0, 70; st.shared.u32 [%r2], %r4;"
    )
    nothing = torch.zeros(1)
    assert faults(body.format(barrier="bar.sync 0;"), nothing, nothing, threads=64) == set()
    assert faults(body.format(barrier=""), nothing, nothing, threads=64) == {
        Fault.RACE_IN_BLOCK,
        Fault.RACE_IN_WARP,
    }


def test_bytes_of_one_word_are_different_places():
    body = "cvt.u64.u32 %d4, %r0; add.s64 %d5, %d1, %d4; st.global.u8 [%d5], %r0;"
    result = torch.zeros(32, dtype=torch.uint8)
    assert faults(body, torch.zeros(1), result) == set()
    assert result.tolist() == list(range(32))


# The first block publishes a number; the others wait for it.
PUBLISH = """
  mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @!%p1 bra $wait;
  st.global.u32 [%d1+4], 42; bar.sync 0; atom.add.{order}.gpu.global.u32 %r2, [%d1], 1; ret;
  $wait: ld.acquire.gpu.global.u32 %r3, [%d1]; setp.eq.u32 %p2, %r3, 0; @%p2 bra $wait;
  bar.sync 0; ld.global.u32 %r4, [%d1+4]; mad.wide.u32 %d3, %r1, 4, %d1; st.global.u32 [%d3+4], %r4;
"""


@pytest.mark.parametrize(
    ("order", "expected"), [("release", set()), ("relaxed", {Fault.RACE_OF_BLOCKS})]
)
def test_blocks_of_a_cooperative_grid(order, expected):
    result = torch.zeros(4, dtype=torch.int32)
    body = PUBLISH.format(order=order)
    assert faults(body, torch.zeros(1), result, threads=1, grid=3, cooperative=True) == expected
    assert result.tolist() == [1, 42, 42, 42]


def test_blocks_of_another_grid_have_no_order():
    body = "mov.u32 %r1, %ctaid.x; st.global.u32 [%d1], %r1;"
    result = torch.full((1,), -1, dtype=torch.int32)
    assert faults(body, torch.zeros(1), result, threads=1, grid=2) == {Fault.RACE_OF_BLOCKS}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (OWN + "ld.global.u32 %r1, [%d2+4];", Fault.OUT_OF_BOUNDS),
        ("ld.global.u32 %r1, [%d0+2];", Fault.MISALIGNED),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0+8];", Fault.MISALIGNED),
        ("ld.shared.u32 %r1, [tile+8];", Fault.UNWRITTEN_SHARED),
        ("st.shared.u32 [tile+1024], 0;", Fault.OUT_OF_BOUNDS),
        (
            "setp.lt.u32 %p1, %r0, 7; @%p1 bra $end; bar.sync 0; $end: bar.sync 0;",
            Fault.DIVERGENT_BARRIER,
        ),
        (
            "setp.lt.u32 %p1, %r0, 7; @%p1 bra $end;"
            "shfl.sync.idx.b32 %r1, %r0, 3, 31, 0xffffff80; $end: ret;",
            Fault.ABSENT_LANE,
        ),
        (
            "setp.lt.u32 %p1, %r0, 7; @%p1 ret; bar.warp.sync -1;",
            Fault.ABSENT_LANE,
        ),
        (
            "setp.lt.u32 %p1, %r0, 7; @%p1 bra $end; bar.warp.sync -1; $end: barrier.sync 0;",
            Fault.DEADLOCK,
        ),
        (
            "st.global.u32 [%d1], 1; ld.global.nc.u32 %r1, [%d1];",
            Fault.CONSTANT_WRITTEN,
        ),
        ("trap;", Fault.TRAPPED),
    ],
)
def test_faults_are_found(body, expected):
    numbers = torch.zeros(32, dtype=torch.int32)
    assert expected in faults(body, numbers, numbers.clone())


def test_a_barrier_that_exited_threads_will_not_reach():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;"
    nothing = torch.zeros(1)
    assert faults(body, nothing, nothing, threads=64) == {Fault.BARRIER_AFTER_EXIT}


@pytest.mark.parametrize(
    ("stride", "width", "sectors", "fewest"),
    [(4, 1, 4, 4), (8, 1, 8, 4), (32, 1, 32, 4), (16, 4, 16, 16), (32, 4, 32, 16), (0, 1, 1, 1)],
)
def test_sectors_are_counted(stride, width, sectors, fewest):
    registers = "{%r1, %r2, %r3, %r4}" if width == 4 else "%r1"
    vector = ".v4" if width == 4 else ""
    body = f"mad.wide.u32 %d2, %r0, {stride}, %d0; ld.global{vector}.u32 {registers}, [%d2];"
    memory = torch.zeros(512, dtype=torch.float32)
    memory = memory[(-memory.data_ptr() // 4) % 8 :][:264]  # begins at a sector
    outcome = launched(body, memory, torch.zeros(1))
    assert outcome.counts.sum(0).tolist() == [1, sectors, fewest]


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("frobnicate.b32 %r1, %r2;", "frobnicate.b32"),
        ("add.sat.s32 %r1, %r2, %r3;", "add.sat.s32: .sat"),
        ("fma.rn.f16 %h1, %h2, %h3, %h4;", "fma.rn.f16"),
        ("mov.u32 %r1, nobody;", "operand nobody"),
    ],
)
def test_what_is_unknown_is_named(instruction, words):
    module = parse(MODULE.format(threads=32, body=instruction))
    with pytest.raises(UnknownInstructionError, match=words):
        decode(module)


def test_any_order_of_the_warps_gives_the_same_result():
    body = EXCHANGE.format(barrier="bar.sync 0;", other=96)
    results = []
    for seed in range(4):
        results.append(torch.zeros(128, dtype=torch.int32))
        assert launched(body, results[0], results[-1], threads=128, seed=seed).findings == []
    assert all(torch.equal(result, results[0]) for result in results)

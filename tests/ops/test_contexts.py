"""Nothing that the caller has entered or set changes a bit: autocast, inference mode, defaults."""

import functools
import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch

from gcond_kernels import (
    DWA,
    FAMO,
    IMTLG,
    MGDA,
    RLW,
    STCH,
    AlignedMTL,
    CAGrad,
    ExcessMTL,
    FairGrad,
    GCond,
    GradNorm,
    GradVac,
    NashMTL,
    NonConflicting,
    PCGrad,
    Sum,
    UncertaintyWeighting,
    UPGrad,
    ops,
)
from gcond_kernels.diagnostics.recorder import Recorder
from gcond_kernels.methods import GradDrop
from gcond_kernels.methods.function import Function
from gcond_kernels.methods.method import Comparison, Known, Method, fresh_state
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.contexts import fixed_precision, full_float32, operation
from gcond_kernels.precision.loss_scale import LossScale
from tests.helpers import by_name
from tests.helpers.flat import DTYPES, filled, layout_of, random_mask, unwritten
from tests.helpers.recorded import resolution_of

CPU = torch.device("cpu")


# ---- The contexts.


@contextmanager
def autocast(device, dtype):
    """As `torch.autocast`, which without a GPU does not turn on what is meant for one."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


UNITS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@contextmanager
def matmul_precision(precision):
    """By the older interface of torch."""
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        for unit in UNITS:
            unit.fp32_precision = "none"


@contextmanager
def fp32_precision(unit, precision):
    """By the newer one."""
    unit.fp32_precision = precision
    before = [other.fp32_precision for other in UNITS]
    try:
        yield
        assert [other.fp32_precision for other in UNITS] == before
    finally:
        unit.fp32_precision = "none"
        # What is set for all backends goes for each of them, before and after.
        assert not {other.fp32_precision for other in UNITS} & {"tf32", "bf16"}


@contextmanager
def default(set_default, value, before):
    set_default(value)
    try:
        yield
    finally:
        set_default(before)


CONTEXTS = {
    **{
        f"autocast {device} {str(dtype)[6:]}": lambda device=device, dtype=dtype: autocast(
            device, dtype
        )
        for device in ("cpu", "cuda")
        for dtype in (torch.float16, torch.bfloat16)
    },
    "torch.autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "precision high": lambda: matmul_precision("high"),
    "precision medium": lambda: matmul_precision("medium"),
    "cuda tf32": lambda: fp32_precision(torch.backends.cuda.matmul, "tf32"),
    "mkldnn bf16": lambda: fp32_precision(torch.backends.mkldnn.matmul, "bf16"),
    "all bf16": lambda: fp32_precision(torch.backends, "bf16"),
    "all tf32": lambda: fp32_precision(torch.backends, "tf32"),
    **{
        str(dtype)[6:]: lambda dtype=dtype: default(torch.set_default_dtype, dtype, torch.float32)
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    },
    "default meta": lambda: default(torch.set_default_device, "meta", None),
    "with meta": lambda: torch.device("meta"),
}
in_every_context = pytest.mark.parametrize("context", CONTEXTS)


def bits_of(found):
    """The bytes of every tensor, however they are nested; NaN is equal to itself."""
    if isinstance(found, torch.Tensor):
        assert found.device == CPU
        flat = found.detach().clone(memory_format=torch.contiguous_format).flatten()
        return found.dtype, list(found.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(found, dict):
        return {name: bits_of(value) for name, value in found.items()}
    if isinstance(found, (tuple, list)):
        return [bits_of(value) for value in found]
    return repr(found)


def inference_tensors():
    gc.collect()
    return [
        value
        for value in gc.get_objects()
        if issubclass(type(value), torch.Tensor) and value.is_inference()
    ]


def check(context, prepare, expected=None, prepared_inside=False):
    """What runs inside gives the same bits, to be kept and changed outside."""
    if expected is None:
        expected = bits_of(prepare()())
    run, earlier, made = None if prepared_inside else prepare(), [], []
    looked_for = context == "inference_mode"  # which takes a while
    with CONTEXTS[context]():
        if prepared_inside:
            run = prepare()
        if looked_for:
            earlier = inference_tensors()
        found = run()
        if looked_for:
            made = inference_tensors()
    assert bits_of(found) == expected
    assert {id(tensor) for tensor in made} <= {id(tensor) for tensor in earlier}


# ---- The operations: each is made ready, and then gives all that it returns and writes.

# More than a partial sum, less than one, none, and one element alone.
LAYOUT = layout_of([5000, 33, 0, 1])
SCALE = torch.tensor([0.5, 3.0, 0.7], dtype=torch.float64)
K, T = len(SCALE), len(LAYOUT.sizes)
METHOD = GCond(norm_cap=100.0)


def small(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradients(dtypes=DTYPES, seed=5):
    parts = LAYOUT.split(filled(LAYOUT, 1, seed)[0])
    each = zip(parts, dtypes, strict=True)
    return [part.to(dtype).view(1, -1).requires_grad_() for part, dtype in each]


def accumulate(backend):
    total, half = filled(LAYOUT, 1, 1)[0], filled(LAYOUT, 1, 1, torch.bfloat16)[0]
    mixed, plain, scale = gradients(), gradients(DTYPES[:1] * T), torch.tensor(0.3)

    def run():
        for row, factor in ((total, 1.0), (total, 0.3), (total, scale), (half, 1.0)):
            by_name.accumulate(row, mixed, LAYOUT, scale=factor, backend=backend)
        by_name.accumulate(half, [None, *mixed[1:]], LAYOUT, overwrite=True, backend=backend)
        by_name.accumulate(total, plain, LAYOUT, backend=backend)
        return total, half

    return run


def gramian(backend):
    accumulators, history = filled(LAYOUT, K, 0), filled(LAYOUT, K, 3, torch.bfloat16)
    mask, momentum = random_mask(LAYOUT.length, 2)[1], filled(LAYOUT, 1, 4)[0]
    more = {"history": history, "history_scale": SCALE, "momentum": momentum, "mask": mask}

    def run():
        return [
            by_name.gramian(accumulators, LAYOUT, scale=SCALE, backend=backend, **options)
            for options in ({}, more)
        ]

    return run


def gramian_of_many_tasks(backend):
    """More than a kernel has registers for: by matrix products in every backend."""
    many, scale = filled(layout_of([300]), 9, 1), torch.ones(9, dtype=torch.float64)
    return lambda: by_name.gramian(many, ([0], [300]), scale=scale, backend=backend)


def gramian_read_in_place(backend):
    """Of a tensor so large that the reference reads it where it lies."""
    layout = layout_of([(1 << 18) + 4097, 5])
    accumulators = filled(layout, K, 0)
    if backend == "triton":  # interpreted it takes long
        return lambda: None
    return lambda: by_name.gramian(accumulators, layout, scale=SCALE, backend=backend)


def arbitrate(backend):
    S, X = small(K, K), small(K, K, seed=1)
    S, both = S @ S.mT, torch.stack([S @ S.mT, X @ X.mT])
    state, states = fresh_state(METHOD, K, (), CPU), fresh_state(METHOD, K, (2,), CPU)
    options = {"settings": METHOD, "backend": backend}

    def run():
        steps = [by_name.arbitrate(S, X, SCALE, **state, **options) for _ in range(3)]
        return steps, state, by_name.arbitrate(both, None, SCALE, **states, **options), states

    return run


def outputs_of(dtypes=DTYPES):
    return [unwritten(size, dtype=dtype) for size, dtype in zip(LAYOUT.sizes, dtypes, strict=True)]


def momentum_and_mask():
    return {
        "momentum": filled(LAYOUT, 1, 2)[0],
        "momentum_steps": torch.arange(T, dtype=torch.int64),
        "beta": 0.9,
        "mask": random_mask(LAYOUT.length, 2)[1],
    }


def combine(backend):
    accumulators, finite = filled(LAYOUT, K, 0), torch.tensor(True)
    calls = []
    for options, weights in (
        ({**momentum_and_mask(), "max_norm": 0.1}, small(K)),
        ({"history": filled(LAYOUT, K, 3, torch.float16)}, small(T, K)),
    ):
        momentum = options.get("momentum")
        options["per_tensor"] = by_name.gramian(
            accumulators, LAYOUT, scale=SCALE, momentum=momentum, backend="python"
        ).per_tensor
        calls.append((outputs_of(), {**options, "weights": weights, "scale": SCALE}))
    plain = outputs_of(DTYPES[:1] * T)
    calls.append((plain, {key: calls[0][1][key] for key in ("weights", "scale")}))

    def run():
        for outputs, options in calls:
            by_name.combine(
                accumulators, outputs, LAYOUT, finite=finite, backend=backend, **options
            )
        return calls

    return run


def graddrop(backend):
    accumulators, outputs, options = filled(LAYOUT, K, 0), outputs_of(), momentum_and_mask()
    options |= {"finite": torch.tensor(True), "counter": torch.tensor(4), "scale": SCALE}

    def run():
        by_name.graddrop(
            accumulators, outputs, LAYOUT, seed=3, leak=0.3, backend=backend, **options
        )
        return outputs, options

    return run


def resolve(backend):
    accumulators, outputs = filled(LAYOUT, K, 0), outputs_of()
    state = fresh_state(METHOD, K, (), CPU)
    options = {"history": filled(LAYOUT, K, 3, torch.bfloat16), **momentum_and_mask()}
    given = {"scale": SCALE, "settings": METHOD, "max_norm": 0.5, "backend": backend, **options}

    def run():
        found = [
            by_name.resolve(accumulators, outputs, LAYOUT, state=state, **given)
            for _ in range(1 if backend == "triton" else 2)
        ]
        return found, outputs, state, options

    return run


def multi_tensor_norm(backend):
    tensors = gradients()
    return lambda: (
        ops.multi_tensor_norm(tensors, backend=backend),
        ops.multi_tensor_norm(tensors, per_tensor=True, backend=backend),
        ops.multi_tensor_norm([], backend=backend),
    )


def multi_tensor_cosine_similarity(backend):
    a, b = gradients(DTYPES[:1] * T), gradients(seed=8)
    return lambda: ops.multi_tensor_cosine_similarity(a, b, backend=backend)


OPERATIONS = (
    accumulate,
    gramian,
    gramian_of_many_tasks,
    gramian_read_in_place,
    arbitrate,
    combine,
    graddrop,
    resolve,
    multi_tensor_norm,
    multi_tensor_cosine_similarity,
)
every_operation = pytest.mark.parametrize("prepare", OPERATIONS, ids=lambda case: case.__name__)


@functools.cache  # interpreted it takes seconds
def expected_of(prepare, backend):
    return bits_of(prepare(backend)())


@in_every_context
@every_operation
def test_an_operation_computes_the_same_bits(backend, prepare, context):
    check(context, lambda: prepare(backend), expected_of(prepare, backend))


@every_operation
def test_an_operation_on_what_was_made_in_inference_mode(backend, prepare):
    expected = expected_of(prepare, backend)
    check("inference_mode", lambda: prepare(backend), expected, prepared_inside=True)


@pytest.mark.parametrize("context", ["autocast cpu bfloat16", "inference_mode", "with meta"])
def test_an_operator_of_the_library_computes_the_same_bits(backend, context):
    def prepare():
        layout, nothing = (LAYOUT.offsets, LAYOUT.sizes), [None] * 4
        arguments = (filled(LAYOUT, K, 0), *layout, SCALE, *nothing, backend)
        return lambda: torch.ops.gcond_kernels.gramian(*arguments)

    check(context, prepare)


# ---- The methods.


class Kept(Method):
    """A method with a state that is learned by autograd, as a user may write it."""

    def new_state(self, tasks, device):
        return {"learned": torch.ones(tasks, dtype=torch.float64, device=device)}

    def weights(self, gramian, state, known):  # noqa: ARG002 - the parameters of a method
        learned = state["learned"].clone().requires_grad_()
        torch.einsum("...i,...ij,...j->", learned, gramian, learned).backward()
        state["learned"] -= 0.01 * learned.grad
        return learned


def by_matrix_products(S):
    """In the precision that the caller allows, were it not for what is under test."""
    wide = S.float().repeat(64, 64)  # so large that torch makes use of a precision it is allowed
    return (wide @ wide)[: len(S), : len(S)].sum(0) + torch.ones(len(S), dtype=S.dtype)


METHODS = [
    Sum(),
    PCGrad(seed=2),
    GradVac(beta=0.3),
    GradNorm(lr=0.1),
    *(DWA(steps_per_epoch=1), FAMO(), STCH(warmup_steps=1), UncertaintyWeighting(), RLW()),
    CAGrad(),
    MGDA(),
    UPGrad(),
    AlignedMTL(),
    IMTLG(),
    NashMTL(),
    FairGrad(),
    ExcessMTL(),
    NonConflicting(GCond()),
    GCond(),
    Kept(),
    Function(by_matrix_products),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


@in_every_context
@every_method
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_method_computes_the_same_bits(method, context, batch):
    def prepare():
        J = small(*batch, 4, 6)
        S, scale = J @ J.mT, torch.ones(4, dtype=torch.float64)
        losses = torch.arange(1.0, 5.0, dtype=torch.float64)
        state = fresh_state(method, 4, batch, CPU)

        def run():
            steps = [
                method.decide(
                    Comparison(S, None, scale, backend="python", known=Known(losses=losses / step)),
                    state,
                )
                for step in (1, 2, 3)
            ]
            given = losses if method.needs_losses else None
            return steps, state, method(S, given), method(S.float(), given)

        return run

    check(context, prepare)


@in_every_context
@every_method
def test_a_state_that_is_made_in_a_context_is_as_any(method, context):
    batches = ((), (2,))
    expected = bits_of([fresh_state(method, 3, batch, CPU) for batch in batches])
    with CONTEXTS[context]():
        found = [fresh_state(method, 3, batch, CPU) for batch in batches]
    assert bits_of(found) == expected
    for state in found:
        for value in state.values():
            value += 1


def test_the_state_of_graddrop_is_no_inference_tensor():
    with torch.inference_mode():
        state = fresh_state(GradDrop(), 2, (), CPU)
    state["counter"] += 1


def test_a_default_device_of_the_users_own_tensors_stays():
    seen = []

    def function(S):
        seen.append(torch.ones(()).device.type)
        return torch.ones(len(S))

    S = torch.eye(2, dtype=torch.float64)
    with torch.device("meta"):
        Function(function)(S)
        Function(function).decide(Comparison(S.to("meta"), None, S[0].to("meta")), {})
    assert seen == ["cpu", "meta"]


# ---- What is recorded, and other things that are kept.


@in_every_context
def test_a_recorder_holds_the_same_numbers(context):
    names = ("a.weight", "b", "a.bias")

    def prepare():
        J = small(3, 2, 5)
        per_tensor, kept = J @ J.mT, Recorder(["x", "y"], (-0.8, -0.5, 0.0), 2)
        S, scale, number = per_tensor.sum(0), torch.ones(2, dtype=torch.float64), torch.tensor(1)
        decision = METHOD.decide(
            Comparison(S, None, scale, backend="python"), fresh_state(METHOD, 2, (), CPU)
        )
        dropped = torch.tensor([False, False])

        def run():
            before = kept.rows(), kept.layers(), len(kept)
            for _ in range(3):
                kept.record(resolution_of(number, names, S, per_tensor, decision, dropped))
            return before, kept.rows(), kept.layers(-0.1), kept.advise(), list(vars(kept).values())

        return run

    check(context, prepare)


def test_a_recorder_goes_on_outside_of_inference_mode():
    kept, S = Recorder(["x", "y"], (-0.8, -0.5, 0.0), 2), torch.eye(2, dtype=torch.float64)
    decision = Sum().decide(Comparison(S, None, S[0]), {})
    for context in (torch.inference_mode, nullcontext):
        with context():
            kept.record(resolution_of(1, ["a"], S, S[None], decision, torch.tensor([False] * 2)))
    assert len(kept) == 2


@pytest.mark.parametrize("context", ["inference_mode", "with meta", "float16"])
def test_a_loss_scale_can_be_used_after_a_context(context):
    def scales(context):
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        with context():
            scale = LossScale(scaler)
            inverse = scale.inverse(CPU)
            scale.report(overflow)
            scaler.update()
        scale.report(overflow)
        scaler.update()
        return inverse, scaler.get_scale()

    overflow = torch.tensor(True)
    assert bits_of(scales(CONTEXTS[context])) == bits_of(scales(nullcontext))


def test_tables_are_no_inference_tensors():
    with torch.inference_mode():
        table = tables.settings_tensor((1.0, 2.5, 123.75), CPU)
        chunks = tables.chunk_table((5, 77_777), 4096, CPU)
    assert not any(tensor.is_inference() for tensor in (table, chunks.table, chunks.first))


# ---- The tools.


def state_of_torch():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


FIXED = (False, False, False, False)


@in_every_context
def test_the_context_is_left_and_entered_again(context):
    with CONTEXTS[context]():
        before = state_of_torch()
        with fixed_precision():
            assert state_of_torch() == FIXED
            with fixed_precision():
                assert state_of_torch() == FIXED
                assert fixed_precision(state_of_torch)() == FIXED
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
                assert state_of_torch() == (True, False, True, False)
            assert state_of_torch() == FIXED
        assert state_of_torch() == before
        with pytest.raises(ZeroDivisionError), fixed_precision():
            raise ZeroDivisionError
        assert state_of_torch() == before


REDUCED = [name for name in CONTEXTS if name.split()[0] in ("precision", "cuda", "mkldnn", "all")]


@pytest.mark.parametrize("context", REDUCED)
def test_reduced_precision_that_the_user_allows_is_not_used(context):
    with CONTEXTS[context](), full_float32():
        assert not {unit.fp32_precision for unit in UNITS} & {"tf32", "bf16"}
        torch.get_float32_matmul_precision()  # raises where the two interfaces disagree


def test_the_decorator_keeps_name_arguments_and_result():
    @fixed_precision
    def function(a, *, b=2):
        """Says."""
        return a, b, state_of_torch()

    assert (function.__name__, function.__doc__) == ("function", "Says.")
    with torch.inference_mode():
        assert function(1, b=3) == (1, 3, FIXED)
        assert state_of_torch()[-1]


def test_an_operation_may_change_what_was_made_in_inference_mode():
    @operation
    def add_one(tensor):
        tensor += 1
        return [tensor * 2][0], (tensor * 3, None)

    with torch.inference_mode():
        tensor = torch.ones(2)
        doubled, (tripled, nothing) = add_one(tensor)
    assert tensor.tolist() == [2.0, 2.0]
    assert nothing is None
    assert not doubled.is_inference()
    assert not tripled.is_inference()
    assert (doubled.tolist(), tripled.tolist()) == ([4.0, 4.0], [6.0, 6.0])


@pytest.mark.parametrize("context", ["autocast cpu bfloat16", "autocast cuda float16", "no_grad"])
def test_a_compiled_function_computes_the_same_bits(context):
    wide = [torch.randn(5000, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]

    def function(tensors):
        return ops.multi_tensor_cosine_similarity(tensors[:1], tensors[1:]) + 0.0

    def prepare():
        torch.compiler.reset()
        compiled = torch.compile(function, backend="eager")
        return lambda: compiled(wide)

    check(context, prepare)
    assert bits_of(prepare()()) == bits_of(function(wide))


def test_a_compiled_function_may_hold_it():
    @fixed_precision
    def double(x):
        return 2 * x

    def function(x):
        with fixed_precision():
            return double(x) + 1

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]

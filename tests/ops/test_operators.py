"""The operations as torch library operators: schemas, tracing, and the direct path."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from gcond_kernels import GCond, ops
from tests.helpers import by_name
from tests.helpers.flat import filled, layout_of

LAYOUT = layout_of([5, 40, 0])
ONES = torch.ones(2, dtype=torch.float64)
MASK = torch.full((-(-filled(LAYOUT, 1, 0).shape[1] // 32),), 0x55555555, dtype=torch.int32)
operators = torch.ops.gcond_kernels


def gradients():
    return [torch.randn(5), torch.randn(0, dtype=torch.bfloat16)], [True, False, True]


def gradients_arguments(history: bool = True, mask: bool = True):
    past = filled(LAYOUT, 2, 1, torch.bfloat16) if history else None
    layout = (LAYOUT.offsets, LAYOUT.sizes)
    return filled(LAYOUT, 2, 0), *layout, ONES, past, MASK if mask else None


def written_arguments():
    return [torch.empty(5), torch.empty(0)], [True, False, True]


def momentum_arguments():
    return filled(LAYOUT, 1, 2)[0], torch.zeros(3, dtype=torch.int64), 0.9


def gramian_arguments(more: bool = True):
    past_scale, momentum = (ONES.clone(), momentum_arguments()[0]) if more else (None, None)
    return *gradients_arguments(more, more), past_scale, momentum


def arbitrate_arguments():
    state = GCond().new_state(2, torch.device("cpu"))
    g = torch.tensor([[1.0, 0.0], [-0.9, 0.5]], dtype=torch.float64)
    conflicts = ([-0.8, -0.5, 0.0], 2.0, "smooth", 1, 1e-6)
    winners = (3, [0.8, 0.2], 0.95, None, None, "raw", 1e-8)
    products = (g @ g.T, torch.eye(2).double(), ONES.clone())
    return *products, *state.values(), *conflicts, *winners


def combine_arguments():
    finite, per_tensor = torch.tensor(True), torch.zeros(3, 3, 3).double()
    written = (*gradients_arguments(), *written_arguments())
    return *written, ONES.clone(), finite, *momentum_arguments(), 1.0, per_tensor


def graddrop_arguments():
    written = (*gradients_arguments(history=False), *written_arguments(), torch.tensor(True))
    return *written, 7, torch.tensor(3), 0.1, 64, *momentum_arguments()


def check(operator, arguments):
    opcheck(operator.default, arguments)


def test_opcheck_passes(backend):
    for scale, overwrite in ((None, True), (torch.tensor(0.5), False)):
        arguments = (filled(LAYOUT, 1, 0)[0], *gradients(), LAYOUT.offsets, LAYOUT.sizes, 2.0)
        check(operators.accumulate, (*arguments, scale, overwrite, backend))
    for history in (True, False):
        check(operators.gramian, (*gramian_arguments(history), backend))
    # One conflict for one iteration: no NaN among the events, which would compare as different.
    check(operators.arbitrate, (*arbitrate_arguments(), backend))
    check(operators.combine, (*combine_arguments(), backend))
    check(operators.graddrop, (*graddrop_arguments(), backend))


def test_compiled_code_holds_the_operators_and_gives_the_same(backend):
    def resolve(accumulators, gradient, output):
        by_name.accumulate(accumulators[0], [gradient, None, None], LAYOUT, backend=backend)
        products = by_name.gramian(accumulators, LAYOUT, scale=ONES, backend=backend)
        by_name.combine(
            accumulators,
            [output, None, None],
            LAYOUT,
            weights=ONES,
            scale=ONES,
            finite=products.total[0, 0] > 0,
            per_tensor=products.per_tensor,
            backend=backend,
        )
        return products.total * 2

    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    accumulators, gradient = filled(LAYOUT, 2, 0), torch.randn(5)
    eager, traced = torch.empty(5), torch.empty(5)
    expected = resolve(accumulators.clone(), gradient, eager)
    compiled = torch.compile(resolve, backend=keep, fullgraph=True)
    got = compiled(accumulators.clone(), gradient, traced)
    assert torch.equal(got, expected)
    assert torch.equal(traced, eager)
    called = {str(node.target) for node in graphs[0].graph.nodes}
    assert {f"gcond_kernels.{name}" for name in ("accumulate", "gramian", "combine")} <= {
        name.removesuffix(".default") for name in called
    }


def test_eager_calls_do_not_go_through_the_dispatcher(backend):
    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    with Recorder():
        by_name.gramian(filled(LAYOUT, 2, 0), LAYOUT, scale=ONES, backend=backend)
        operators.gramian(*gramian_arguments(), backend)
    assert sum(name.startswith("gcond_kernels.gramian") for name in seen) == 1


def test_a_subclass_of_tensor_reaches_the_operation(backend):
    class Marked(torch.Tensor):
        pass

    accumulators = filled(LAYOUT, 2, 0)
    plain = by_name.gramian(accumulators, LAYOUT, scale=ONES, backend=backend)
    marked = by_name.gramian(accumulators.as_subclass(Marked), LAYOUT, scale=ONES, backend=backend)
    assert torch.equal(plain.total, marked.total.as_subclass(torch.Tensor))


@pytest.mark.parametrize("context", [nullcontext, FakeTensorMode])
def test_a_traced_call_refuses_what_an_eager_call_does(context):
    with context():
        accumulators = torch.empty(2, LAYOUT.length)
        gradients = by_name.gradients_from(accumulators, LAYOUT, {"scale": torch.ones(2).double()})
        with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
            ops.gramian(gradients, momentun=None)
        with pytest.raises(TypeError, match=r"missing .* required .*argument"):
            ops.combine(gradients, [])
        with pytest.raises(TypeError, match=r"missing .* required .*argument"):
            ops.combine()


def test_tensors_on_several_devices_are_refused(backend):
    scale = torch.ones(2, device="meta", dtype=torch.float64)
    with pytest.raises(ValueError, match="scale is on meta, not on cpu"):
        by_name.gramian(filled(LAYOUT, 2, 0), LAYOUT, scale=scale, backend=backend)

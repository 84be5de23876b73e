"""A user's own function from a Gramian to weights."""

import functools
import math

import pytest
import torch

from gcond_kernels.methods.function import Function
from tests.helpers.gramians import random_gramian, resolve


def halves(S):
    return torch.full((len(S),), 0.5, dtype=torch.float32)


def test_a_function_is_given_the_gramian():
    S = random_gramian(3)
    assert Function(halves)(S).tolist() == [0.5] * 3
    seen = []
    Function(lambda S: seen.append(S.clone()) or S.diagonal())(S)
    assert torch.equal(seen[0], S)


def test_a_function_is_given_a_batch_one_by_one():
    S = torch.stack([random_gramian(3, seed) for seed in range(6)])
    own = Function(lambda S: S.sum(-1) / S.diagonal())
    assert torch.allclose(own(S), S.sum(-1) / S.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(own(S.view(2, 3, 3, 3)), own(S).view(2, 3, 3))


def test_weights_of_a_function_that_are_not_finite_skip_the_step():
    S = random_gramian(2)
    for value in (math.nan, math.inf):
        decision = resolve(Function(lambda S, v=value: S.new_tensor([1.0, v])), S, {})
        assert not bool(decision.finite)
        assert decision.weights.tolist() == [0.0, 0.0]
    S[0, 1] = math.nan
    given = []
    decision = resolve(Function(lambda S: given.append(S.clone()) or S.diagonal()), S, {})
    assert not bool(decision.finite)
    assert all(each.isfinite().all() for each in given)  # a function gets finite values alone


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(3), r"\[3\]"),
        (torch.ones(2, 1), r"\[2, 1\]"),
        (torch.ones(()), r"\[\]"),
        ([1.0, 1.0], r"\[1.0, 1.0\]"),
        (None, "None"),
    ],
)
def test_a_function_must_return_one_weight_for_each_task(returned, message):
    with pytest.raises(ValueError, match=f"one weight for each of the 2 tasks.*not {message}"):
        Function(lambda _: returned)(random_gramian(2))


def test_a_function_is_named_without_an_address():
    assert repr(Function(halves)) == f"{__name__}.halves"
    assert "0x" not in repr(Function(functools.partial(halves)))

    class Callable:
        def __call__(self, S):
            return S.diagonal()

    assert "Callable" in repr(Function(Callable()))
    assert "0x" not in repr(Function(Callable()))


def test_a_graph_that_a_function_leaves_is_dropped():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    w = Function(lambda S: scale * S.diagonal())(random_gramian(2))
    assert not w.requires_grad

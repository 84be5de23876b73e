"""Batch normalization with frozen statistics, and everything else as before."""

import copy

import pytest
import torch
from torch import nn

from gcond_kernels import GCondFused
from gcond_kernels.precision.batchnorm import frozen_batchnorm

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1


class NormThenDrop(nn.BatchNorm1d):
    """A subclass that holds another layer, as those of model libraries do."""

    def __init__(self, features):
        super().__init__(features)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x))


LAYERS = {
    "BatchNorm1d": nn.BatchNorm1d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "subclass": NormThenDrop,
    "lazy": lambda _: nn.LazyBatchNorm1d(),
}


def model_of(make=nn.BatchNorm1d, dropout=0.5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), make(6), nn.Dropout(dropout), nn.Linear(6, 2))


def modes(model):
    return [module.training for module in model.modules()]


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("name", LAYERS)
def test_running_statistics_are_used_and_not_updated(name):
    model = model_of(LAYERS[name], dropout=0.0)
    if name == "subclass":
        model[1].drop.p = 0.0
    if name == "SyncBatchNorm":
        model[1].train(False)  # its training needs a GPU; frozen it runs anywhere
    else:
        model(X)  # makes statistics
    before, were = buffers(model), modes(model)
    with frozen_batchnorm(model):
        output = model(X)
    assert modes(model) == were
    after = buffers(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before["1.num_batches_tracked"] == (name != "SyncBatchNorm")
    layer = model[1]
    mean, variance = layer.running_mean, layer.running_var
    normal = (model[0](X) - mean) / (variance + layer.eps).sqrt()
    assert torch.allclose(output, model[3](normal), atol=1e-5)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, NormThenDrop])
def test_dropout_stays_active_and_nothing_else_changes_its_mode(make):
    model = model_of(make)
    model[3].eval()
    layer = model[1]
    were = {name: module.training for name, module in model.named_modules()}
    with frozen_batchnorm(model):
        now = {name: module.training for name, module in model.named_modules()}
        torch.manual_seed(1)
        first, second = model[:3](X), model[:3](X)
    assert {name for name in were if were[name] != now[name]} == {"1"}
    assert not torch.equal(first, second)
    dropped = (first == 0).float().mean().item()
    # Half is dropped, or three quarters where there are two such layers; of 96 values.
    assert dropped == pytest.approx(0.75 if hasattr(layer, "drop") else 0.5, abs=0.15)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_nested_contexts_end_with_the_outermost(make):
    model = model_of(make)
    with frozen_batchnorm(model):
        with frozen_batchnorm(model):
            assert not model[1].training
        assert not model[1].training
        model(X)
    assert model[1].training
    assert model[1].num_batches_tracked == 0
    if make is nn.BatchNorm1d:  # the other's training needs a GPU
        model(X)
        assert model[1].num_batches_tracked == 1


def test_an_exception_passes_and_restores_modes():
    model = model_of()
    with pytest.raises(ArithmeticError, match="in the middle"), frozen_batchnorm(model):
        raise ArithmeticError("in the middle")
    assert all(modes(model))


def test_layers_in_eval_mode_stay_in_it():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[0].eval()
    with frozen_batchnorm(model):
        assert modes(model) == [True, False, False]
    assert modes(model) == [True, False, True]
    model.eval()
    with frozen_batchnorm(model):
        model(X)
    assert not any(modes(model))


def test_a_shared_layer_and_a_model_of_one_layer():
    layer = nn.BatchNorm1d(4)
    for model in (layer, nn.Sequential(layer, layer)):
        with frozen_batchnorm(model):
            assert not layer.training
            model(X)
        assert layer.training
    assert layer.num_batches_tracked == 0


def test_without_batchnorm_nothing_happens():
    model = nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, track_running_stats=True))
    with frozen_batchnorm(model):
        assert all(modes(model))


def test_weights_and_biases_get_the_gradients_of_fixed_statistics():
    model = model_of(dropout=0.0)
    model(X)
    twin = copy.deepcopy(model).eval()
    with frozen_batchnorm(model):
        model(X).pow(2).mean().backward()
    twin(X).pow(2).mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert model[1].weight.grad.abs().sum() > 0
    assert model[1].bias.grad.abs().sum() > 0


@pytest.mark.parametrize("functions", [False, True])
def test_gcond_trains_with_frozen_statistics(functions):
    """The layer's weights train, its statistics stay, and the optimizer changes no mode."""
    model = model_of()
    model(X)
    model[3].eval()
    before, weight = buffers(model), model[1].weight.detach().clone()
    optimizer = GCondFused(torch.optim.SGD(model.parameters(), lr=0.1), {"a": 1.0, "b": 1.0})
    outside = modes(model)
    with frozen_batchnorm(model):
        within = modes(model)
        losses = {
            "a": lambda: model(X)[:, 0].pow(2).mean(),
            "b": lambda: (model(X)[:, 1] - 1).pow(2).mean(),
        }
        optimizer.backward(losses if functions else {t: loss() for t, loss in losses.items()})
        assert modes(model) == within
        optimizer.step()
        assert modes(model) == within
    assert modes(model) == outside
    assert not torch.equal(weight, model[1].weight)
    after = buffers(model)
    assert all(torch.equal(before[key], after[key]) for key in before)

"""The weights of largest magnitude into every neuron, and no others."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from gcond_kernels import GCondFused
from gcond_kernels.recipes import sparse
from gcond_kernels.recipes.sparse import neuron_mask
from tests.helpers.ranks import Ranks

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def neurons_of(module, shape):
    """Which weights lead to each output unit, by the gradients of the module's output.

    Args:
        module: takes an input of this shape, and gives a unit per place in the last dimension
            (Linear) or in the second (convolutions).
        shape: of the input.
    """
    output = module(torch.ones(shape))
    units = output.movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1).sum(1)
    gradients = (torch.autograd.grad(unit, module.weight, retain_graph=True)[0] for unit in units)
    return [gradient != 0 for gradient in gradients]


def assert_largest(mask, weight, neuron, count):
    """Check that `count` of a neuron's weights are selected, and none of the others is larger."""
    size = neuron.sum().item()
    assert (mask & neuron).sum().item() == min(count, size)
    chosen, others = weight[mask & neuron].abs(), weight[~mask & neuron].abs()
    if len(others):
        assert chosen.min() >= others.max()


@st.composite
def modules(draw):
    """A module with neurons and the shape of an input."""
    kind = draw(st.sampled_from(["linear", "conv", "transposed"]))
    if kind == "linear":
        inputs, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        return nn.Linear(inputs, outputs, bias=draw(st.booleans())), (2, inputs)
    dimensions, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dimensions))
    make = (CONVS if kind == "conv" else TRANSPOSED)[dimensions]
    return make(inputs, outputs, kernel, groups=groups), (1, inputs, *kernel)


@given(modules(), st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 40), st.booleans())
def test_every_neuron_trains_its_k_largest_weights(case, seed, k, chunk, ties):
    module, shape = case
    torch.manual_seed(seed)
    with torch.no_grad():
        module.weight.normal_()
        if ties:
            module.weight.copy_(module.weight.round())
    weight, neurons = module.weight.detach().clone(), neurons_of(module, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "CHUNK", chunk)
        mask = neuron_mask(module, k)
    assert list(mask) == [module.weight]
    chosen = mask[module.weight]
    assert chosen.dtype == torch.bool
    assert chosen.shape == weight.shape
    assert sum(neuron.sum().item() for neuron in neurons) == weight.numel()
    for neuron in neurons:
        assert_largest(chosen, weight, neuron, k)
    assert torch.equal(module.weight, weight)


@given(modules(), st.floats(0.0, 1.0, exclude_min=True))
def test_a_share_of_every_neuron(case, share):
    module, shape = case
    chosen = neuron_mask(module, share=share)[module.weight]
    for neuron in neurons_of(module, shape):
        size = neuron.sum().item()
        assert (chosen & neuron).sum().item() == max(1, round(share * size))
    if share == 1.0:
        assert chosen.all()


@pytest.mark.parametrize("share", [0.3, 0.6, 1e-9, 0.05, 1, 1.0])
def test_shares_of_ten(share):
    layer = nn.Linear(10, 3)
    chosen = neuron_mask(layer, share=share)[layer.weight]
    expected = {0.3: 3, 0.6: 6, 1: 10}.get(share, 1)
    assert chosen.sum(1).tolist() == [expected] * 3


def test_of_equal_magnitudes_the_first_are_taken():
    layer = nn.Linear(200, 2)
    with torch.no_grad():
        layer.weight.fill_(-1.0)
        layer.weight[0, 150] = 2.0
        layer.weight[1, ::2] = 1.0
    chosen = neuron_mask(layer, 3)[layer.weight]
    assert chosen[0].nonzero().flatten().tolist() == [0, 1, 150]
    assert chosen[1].nonzero().flatten().tolist() == [0, 1, 2]


def test_infinite_and_narrow_weights():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        layer = nn.Linear(3, 1).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, float("-inf"), -2.0]]))
        assert neuron_mask(layer, 2)[layer.weight].tolist() == [[False, True, True]]


def test_weights_in_other_memory_formats():
    for make, permuted in ((nn.Conv2d, (0, 2, 3, 1)), (nn.ConvTranspose2d, (1, 2, 3, 0))):
        plain = make(4, 6, 3)
        twin = copy.deepcopy(plain)
        order = torch.Size(plain.weight.shape[d] for d in permuted)
        memory = torch.empty(order).permute([permuted.index(d) for d in range(4)])
        twin.weight = nn.Parameter(memory.copy_(plain.weight.detach()))
        assert not twin.weight.is_contiguous()
        ours, theirs = neuron_mask(twin, 5), neuron_mask(plain, 5)
        assert torch.equal(ours[twin.weight], theirs[plain.weight])


# Which parameters have an entry.


def names_in(mask, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for parameter in mask]


def test_weights_of_neurons_have_an_entry_and_nothing_else():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "norm": nn.LayerNorm(4),
            "batch": nn.BatchNorm1d(4),
            "bilinear": nn.Bilinear(2, 2, 2),
            "recurrent": nn.LSTM(4, 4),
            "linear": nn.Linear(4, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "conv": nn.Sequential(nn.Conv2d(4, 4, 3)),
        }
    )
    mask = neuron_mask(model, 2)
    assert names_in(mask, model) == ["linear.weight", "conv.0.weight"]
    assert all(not chosen.requires_grad for chosen in mask.values())
    parametrize.remove_parametrizations(model["normed"], "weight")
    assert "normed.weight" in names_in(neuron_mask(model, 2), model)
    assert names_in(neuron_mask(model["conv"], 2), model) == ["conv.0.weight"]
    assert names_in(neuron_mask(model["linear"], 2), model) == ["linear.weight"]


def test_a_weight_of_two_modules_has_one_entry():
    model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(4, 5)])
    model[0].weight = model[1].weight = model[2].weight
    mask = neuron_mask(model, 1)
    assert list(mask) == [model[2].weight]
    assert mask[model[2].weight].sum(1).tolist() == [1] * 5


@pytest.mark.parametrize("wide", [False, True])
def test_attention(wide):
    attention = nn.MultiheadAttention(4, 2, kdim=6 if wide else None)
    mask = neuron_mask(attention, share=0.5)
    projections = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    expected = [*(projections if wide else ["in_proj_weight"]), "out_proj.weight"]
    assert names_in(mask, attention) == expected
    for parameter, chosen in mask.items():
        assert chosen.shape == parameter.shape
        assert (chosen.sum(1) == parameter.shape[1] // 2).all()
        for row in range(len(parameter)):
            neuron = torch.zeros_like(chosen)
            neuron[row] = True
            assert_largest(chosen, parameter.detach(), neuron, parameter.shape[1] // 2)


def test_gcond_trains_what_is_chosen_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(8, 2))
    mask = neuron_mask(model, share=0.3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    optimizer = GCondFused(base, {"a": 1.0, "b": 1.0}, mask=mask)
    for _ in range(3):
        y = model(torch.randn(8, 2, 4))
        optimizer.backward({"a": y[:, 0].pow(2).mean(), "b": (y.sum(1) - 1.0).pow(2).mean()})
        optimizer.step()
    for was, parameter in zip(before, model.parameters(), strict=True):
        everything = torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter.detach() != was, mask.get(parameter, everything))


# Sharded over ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def sharded_model(strategy):
    """The masks of a sharded model, full again, and those of one that is not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module, distribute_tensor
    from torch.distributed.tensor.placement_types import Replicate, Shard

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ConvTranspose2d(4, 6, 3, groups=2))
    with torch.no_grad():  # many of one magnitude
        for parameter in model.parameters():
            parameter.copy_((3.0 * parameter).round())
    twin = copy.deepcopy(model)
    if strategy == "fsdp":
        fully_shard(model, mesh=mesh)
    else:
        placement = Shard(1) if strategy == "columns" else Replicate()

        def place(_, module, mesh):
            for key, parameter in list(module.named_parameters(recurse=False)):
                where = placement if parameter.ndim > 1 else Replicate()
                sharded = distribute_tensor(parameter.detach(), mesh, [where])
                module.register_parameter(key, nn.Parameter(sharded))

        distribute_module(model, mesh, place)
    ours, theirs = neuron_mask(model, 3), neuron_mask(twin, 3)
    for parameter, mask in ours.items():
        assert mask.placements == parameter.placements
        assert mask.device_mesh == parameter.device_mesh
        assert mask.shape == parameter.shape
        assert mask.dtype == torch.bool
        assert mask.to_local().shape == parameter.to_local().shape
        assert not isinstance(mask, nn.Parameter)
    full = [mask.full_tensor() for mask in ours.values()]
    return full, list(theirs.values())


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp", "columns", "replicated"])
def test_dtensors(ranks, strategy):
    for full, expected in ranks(sharded_model, strategy):
        assert len(full) == len(expected) == 2
        assert all(torch.equal(a, b) for a, b in zip(full, expected, strict=True))


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of k and share, not k=None and share=None"),
        ({"k": 2, "share": 0.5}, "exactly one of k and share, not k=2 and share=0.5"),
        *(({"k": k}, f"k must be a whole number, 1 or more, not {k}") for k in (0, -1, 2.0, True)),
        *(
            ({"share": share}, rf"share must be a number in \(0, 1\], not {share}")
            for share in (0.0, -0.5, 1.01, float("nan"), True)
        ),
        ({"share": "half"}, "share must be a number .* not 'half'"),
    ],
)
def test_k_and_share_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        neuron_mask(nn.Linear(2, 2), **options)


def test_models_without_weights_to_choose_from():
    for model in (nn.Embedding(3, 3), nn.Sequential()):
        with pytest.raises(ValueError, match=r"no weights of neurons .* no such module \(Linear"):
            neuron_mask(model, 1)
    model = nn.Sequential(
        nn.Linear(2, 2).requires_grad_(False), parametrizations.weight_norm(nn.Linear(2, 2))
    )
    with pytest.raises(ValueError, match="all 2 of them are frozen or parametrized"):
        neuron_mask(model, 1)
    with pytest.raises(TypeError, match="model must be"):
        neuron_mask(model.parameters(), 1)


def test_weights_without_magnitudes():
    model = nn.ModuleDict({"good": nn.Linear(2, 2), "bad": nn.Linear(2, 2)})
    with torch.no_grad():
        model["bad"].weight[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"bad\.weight is NaN somewhere"):
        neuron_mask(model, 1)
    with pytest.raises(ValueError, match=r"0\.weight has no values yet.*lazy"):
        neuron_mask(nn.Sequential(nn.LazyLinear(3)), 1)
    with pytest.raises(ValueError, match=r"^weight is on the meta device"):
        neuron_mask(nn.Linear(2, 2, device="meta"), 1)
    empty = nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Linear(2, 1)])
    empty[1].weight = nn.Parameter(torch.empty(0, 2))
    assert [m.shape for m in neuron_mask(empty, 1).values()] == [(2, 2, 1, 1), (0, 2)]

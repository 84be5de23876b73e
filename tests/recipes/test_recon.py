"""Models in which tasks have layers of their own, and the table and picture by which to choose."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gcond_kernels import GCondFused
from gcond_kernels.diagnostics.records import shortened
from gcond_kernels.distributed.checkpoint import TrainingState
from gcond_kernels.recipes.recon import SplitModel, conflict_table, split_conflicting_layers
from tests.helpers.recorded import LAYERS, RecordedLayers

TASKS = ("a", "b.c", "", "$d/e")
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """Layers in a row, a parameter and buffers of its own, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        )
        self.twice = nn.Linear(5, 5)
        self.again = self.twice
        self.head = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("shift", torch.ones(5))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x, offset=0.0):
        self.calls += 1
        x = self.body(x) * self.scale + self.shift
        return self.head(torch.tanh(self.again(self.twice(x)))) + offset


def model_of(kind=Model):
    torch.manual_seed(0)
    return kind()


def shift(module, by):
    """Makes the module's parameters others than those of its copies."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by


def reached(split, task):
    """Names of the parameters that the loss of a task has gradients for."""
    split.zero_grad()
    split(X, task=task).pow(2).sum().backward()
    names = {name for name, p in split.named_parameters() if p.grad is not None}
    split.zero_grad()
    return names


# What is copied and what is shared.


@pytest.mark.parametrize("layers", [["body.2.0"], ["body.2", "head"], ["body.1"], ["twice"]])
def test_every_task_runs_as_the_model_did_and_the_model_is_unchanged(layers):
    model = model_of()
    names, twin = list(model.state_dict()), copy.deepcopy(model)
    split = split_conflicting_layers(model, layers, TASKS)
    expected = model.eval()(X, offset=0.5)
    for task in TASKS:
        assert torch.equal(split.eval()(X, offset=0.5, task=task), expected)
    assert list(model.state_dict()) == names
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in split.parameters())


def test_a_task_reaches_what_is_shared_and_its_own_layers():
    split = split_conflicting_layers(model_of(), ["body.2.0", "head"], ("a", "b"))
    own = ("body.2.0.weight", "body.2.0.bias", "head.weight", "head.bias")
    all_names = {name for name, _ in model_of().named_parameters()}
    shared = {f"models.0.{name}" for name in all_names.difference(own)}
    assert reached(split, "a") == shared | {f"models.0.{name}" for name in own}
    assert reached(split, "b") == shared | {f"models.1.{name}" for name in own}
    assert len(dict(split.named_parameters())) == len(all_names) + len(own)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_uses_its_own_layers_alone(task):
    split = split_conflicting_layers(model_of(), ["body.2.0"], TASKS).eval()
    before = {t: split(X, task=t) for t in TASKS}
    shift(split.for_task(task).body[2][0], 1.0)
    for other in TASKS:
        assert torch.equal(before[other], split(X, task=other)) == (other != task)
    shift(split.for_task(task).head, 1.0)  # shared
    assert not any(torch.equal(before[t], split(X, task=t)) for t in TASKS)


@given(st.data())
@settings(max_examples=25)
def test_any_layers_of_any_tree(data):
    """Against models that are split by hand: a deep copy per task whose other parts are tied."""

    def tree(depth):
        if depth == 0 or data.draw(st.booleans()):
            return nn.Linear(2, 2)
        return nn.Sequential(*(tree(depth - 1) for _ in range(data.draw(st.integers(1, 3)))))

    torch.manual_seed(0)
    model = nn.Sequential(tree(2), tree(2), nn.Linear(2, 2))
    names = [name for name, _ in model.named_modules() if name]
    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    layers = [n for n in wanted if not n.startswith(tuple(f"{other}." for other in wanted))]
    split = split_conflicting_layers(model, layers, ["a", "b"])
    parts = tuple(f"{layer}." for layer in layers)
    own = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    first, second = (dict(split.for_task(task).named_parameters()) for task in "ab")
    assert first.keys() == second.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in first.items():
        assert (parameter is second[name]) == (name not in own)
        assert torch.equal(parameter, second[name])
    twins, x = {"a": copy.deepcopy(model), "b": copy.deepcopy(model)}, torch.ones(1, 2)
    for by, (task, twin) in enumerate(twins.items(), 1):
        for layer in layers:
            shift(split.for_task(task).get_submodule(layer), 0.1 * by)
            shift(twin.get_submodule(layer), 0.1 * by)
    assert all(torch.equal(split(x, task=task), twin(x)) for task, twin in twins.items())


def test_a_module_of_two_names_stays_one_for_both_uses():
    for layers in (["twice"], ["again"], ["again", "twice"]):
        split = split_conflicting_layers(model_of(), layers, ("a", "b"))
        one, two = split.for_task("a"), split.for_task("b")
        assert one.twice is one.again
        assert two.twice is two.again
        assert one.twice is not two.twice
        assert split.layers == (layers[0],)


def test_attributes_of_a_split_layer_can_be_used():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.listed = [self.blocks[0]]
            self.method = self.blocks[1].forward
            self.tied = [self.attention.in_proj_weight]

        def forward(self, x):
            x = self.attention(x, x, x)[0]
            x = nn.functional.linear(x, self.blocks[0].weight) + self.listed[0](x)
            return self.method(x) * self.tied[0].sum()

    x = torch.randn(1, 3, 4)
    layers = ["attention.out_proj", "blocks.0", "blocks.1"]
    split = split_conflicting_layers(model_of(Uses), layers, ("a", "b"))
    before = split(x, task="a")
    assert torch.equal(before, model_of(Uses)(x))
    for layer in layers:
        was = split(x, task="b")
        shift(split.for_task("b").get_submodule(layer), 1.0)
        assert not torch.equal(was, split(x, task="b"))
    assert torch.equal(before, split(x, task="a"))
    assert split.for_task("b").tied[0] is split.for_task("a").attention.in_proj_weight


def test_recurrent_and_parametrized_layers_and_a_graph():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = parametrizations.weight_norm(nn.Linear(3, 4))
            self.lstm = nn.LSTM(4, 4, batch_first=True)
            self.last = nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.lstm(self.first(x))[0])

    model = model_of(Recurrent)
    graph = torch.fx.symbolic_trace(model_of())
    for given_model, layers in (
        (model, ["first", "lstm"]),
        (model, ["first.parametrizations.weight"]),
        (graph, ["body.2.0", "head"]),
    ):
        split = split_conflicting_layers(given_model, layers, ("a", "b")).eval()
        expected = given_model.eval()(X)
        for layer in layers:
            shift(split.for_task("b").get_submodule(layer), 1.0)
        assert torch.equal(split(X, task="a"), expected)
        assert not torch.equal(split(X, task="b"), expected)


def test_ties_among_split_layers_stay_for_each_task():
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    model["two"].weight = model["one"].weight
    split = split_conflicting_layers(model, ["one", "two"], ("a", "b"))
    a, b = ({part.weight for part in split.for_task(task).values()} for task in "ab")
    assert len(a) == len(b) == 1
    assert a != b


def test_a_module_without_parameters_that_others_use_too_stays_shared():
    table = nn.BatchNorm1d(3, affine=False)
    blocks = nn.ModuleList(nn.ModuleList([nn.Linear(3, 3), table]) for _ in range(2))
    split = split_conflicting_layers(nn.ModuleDict({"blocks": blocks}), ["blocks.0"], ("a", "b"))
    a, b = (split.for_task(task)["blocks"] for task in "ab")
    assert a[0][1] is b[0][1] is a[1][1]
    assert a[0][0] is not b[0][0]


# Choosing the task.


def test_a_task_must_be_named_and_known():
    split = split_conflicting_layers(model_of(), ["head"], TASKS)
    with pytest.raises(TypeError, match=r"task=.*one of \['a', 'b\.c', '', '\$d/e'\]"):
        split(X)
    for call in (lambda: split(X, task="b"), lambda: split.for_task("b")):
        with pytest.raises(KeyError, match=r"unknown task 'b': the tasks are \['a', 'b\.c'"):
            call()


def test_a_model_that_takes_a_task_gets_it():
    class TakesTask(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))

        def forward(self, x, task="a"):
            return self.heads["ab".index(task)](self.body(x))

    model = model_of(TakesTask)
    split = split_conflicting_layers(model, ["body"], ("a", "b"))
    for task in "ab":
        assert torch.equal(split(X, task=task), model(X, task=task))
    # Once more, by the names that it has now.
    further = split_conflicting_layers(split, ["models.0.heads.0"], ("a", "b"))
    assert torch.equal(further(X, task="b"), model(X, task="b"))


def test_calls_within_calls_exceptions_and_threads():
    class CallsBack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, between=None):
            x = self.layer(x)
            if between is not None:
                between()
            return self.layer(x)

    split = split_conflicting_layers(model_of(CallsBack), ["layer"], ("a", "b"))
    shift(split.for_task("b").layer, 1.0)
    a, b = split(X, task="a"), split(X, task="b")
    assert not torch.equal(a, b)
    inner = []
    again = split(X, task="a", between=lambda: inner.append(split(X, task="b")))
    assert torch.equal(again, a)
    assert torch.equal(inner[0], b)
    with pytest.raises(ZeroDivisionError):
        split(X, task="b", between=lambda: 1 // 0)
    assert torch.equal(split(X, task="a"), a)
    with pytest.raises(TypeError, match="task="):
        split(X)

    barrier = threading.Barrier(2, timeout=30)
    with ThreadPoolExecutor(2) as pool:
        outputs = pool.map(lambda task: split(X, task=task, between=barrier.wait), "ab")
    assert all(torch.equal(output, one) for output, one in zip(outputs, (a, b), strict=True))


class Checkpointed(Model):
    """Recomputes its layers in the backward pass, in the way that is asked for."""

    reentrant: bool | None = None

    def forward(self, x, offset=0.0):
        if self.reentrant is None:
            return super().forward(x, offset)
        run = super().forward
        x = x.clone().requires_grad_()
        return checkpoint(lambda x: run(x, offset), x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "wrapper", "wrapped layer"])
def test_a_recomputation_is_that_of_the_same_task(how):
    model = model_of(Checkpointed)
    layers = ["body.2", "head"]
    model.body[1] = nn.Identity()  # statistics would move twice
    plain = copy.deepcopy(model)
    if how == "wrapper":
        model.body = checkpoint_wrapper(model.body)
        layers = ["body._checkpoint_wrapped_module.2", "head"]
    elif how == "wrapped layer":
        model.body[2] = checkpoint_wrapper(model.body[2])
    else:
        model.reentrant = how == "reentrant"
    splits = [
        split_conflicting_layers(given_model, its, ("a", "b"))
        for given_model, its in ((plain, ["body.2", "head"]), (model, layers))
    ]
    gradients = []
    for split in splits:
        shift(split.for_task("b").head, 0.5)
        shift(split.for_task("b").body[2], 0.3)
        # Both forward passes are done before the first backward pass.
        losses = [split(X, task=task).pow(2).sum() for task in "ab"]
        each = []
        for loss in losses:
            split.zero_grad()
            loss.backward()
            each.append([None if p.grad is None else p.grad.clone() for p in split.parameters()])
        gradients.append(each)
    for ours, theirs in zip(*gradients, strict=True):
        assert [g is None for g in ours] == [g is None for g in theirs]
        assert all(torch.equal(g, h) for g, h in zip(ours, theirs, strict=True) if g is not None)


# What works with any model.


def assert_same_structure(split, other):
    """Check that two models share the same among their tasks, and nothing with each other."""
    assert isinstance(other, SplitModel)
    assert (other.tasks, other.layers) == (split.tasks, split.layers)
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in split.named_parameters()]
    assert [n for n, _ in other.named_buffers()] == [n for n, _ in split.named_buffers()]
    assert [n for n, _ in other.named_modules()] == [n for n, _ in split.named_modules()]
    assert {id(p) for p in split.parameters()}.isdisjoint(id(p) for p in other.parameters())
    models = list(other.models)
    assert all(m.scale is models[0].scale and m.shift is models[0].shift for m in models)
    assert len({id(m.calls) for m in models}) == 1
    for task in split.tasks:
        assert torch.equal(split.eval()(X, task=task), other.eval()(X, task=task))


def altered():
    """A split model whose tasks differ."""
    split = split_conflicting_layers(model_of(), ["body.2.0", "head"], TASKS)
    for place, model in enumerate(split.models):
        shift(model.head, 0.1 * place)
        shift(model.body[2][0], 0.2 * place)
    return split


def test_copies_files_and_state_dicts(tmp_path):
    split = altered()
    assert_same_structure(split, copy.deepcopy(split))
    torch.save(split, tmp_path / "split.pt")
    loaded = torch.load(tmp_path / "split.pt", weights_only=False)
    assert_same_structure(split, loaded)
    loaded.double()
    assert len({id(m.shift) for m in loaded.models}) == 1
    torch.save(split.state_dict(), tmp_path / "state.pt")
    other = split_conflicting_layers(Model(), ["body.2.0", "head"], TASKS)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same_structure(split, other)
    # A task's own goes into the model that was split.
    alone = Model()
    alone.load_state_dict(split.for_task("b.c").state_dict())
    assert torch.equal(alone.eval()(X), split.eval()(X, task="b.c"))


def test_types_modes_and_statistics_are_those_of_all_tasks():
    split = split_conflicting_layers(model_of(), ["body.2.0"], ("a", "b"))
    split.double()
    assert {p.dtype for p in split.parameters()} == {torch.float64}
    a, b = split.for_task("a"), split.for_task("b")
    assert a.scale is b.scale
    assert a.shift is b.shift
    assert a.calls is b.calls
    assert a.shift.dtype == torch.float64
    split.eval()
    assert not any(module.training for module in split.modules())
    split.train()
    assert all(module.training for module in split.modules())
    for task in "ab":
        split(X.double(), task=task)
    assert a.body[1].num_batches_tracked == 2
    assert a.calls == b.calls == 2
    assert "models.0.calls" not in split.state_dict()
    assert "models.1.calls" not in split.state_dict()
    a.register_buffer("cache", torch.ones(2), persistent=False)
    assert b.cache is a.cache
    assert not any("cache" in name for name in split.state_dict())


def test_statistics_of_a_split_norm_are_each_tasks_own():
    split = split_conflicting_layers(model_of(), ["body.1"], ("a", "b"))
    split(X, task="b")
    assert split.for_task("a").body[1].num_batches_tracked == 0
    assert split.for_task("b").body[1].num_batches_tracked == 1


def test_compiled_it_is_one_graph_for_each_task():
    split = altered().eval()
    compiled = torch.compile(split, backend="eager", fullgraph=True)
    for _ in range(2):
        for task in TASKS:
            assert torch.equal(compiled(X, task=task), split(X, task=task))
    with pytest.raises(KeyError, match="unknown task"):
        torch.compile(split, backend="eager")(X, task="f")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_trains_by_gcond_and_is_saved(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    tasks = {"a": 1.0, "b": 1.0}

    def made(layers=("body.2.0", "head")):
        split = split_conflicting_layers(model_of(), layers, tasks)
        base = torch.optim.AdamW(split.named_parameters(), lr=0.01, weight_decay=0.0)
        return split, GCondFused(base, tasks)

    def step(split, optimizer, tasks="ab"):
        optimizer.backward({t: lambda t=t: split(X, task=t).pow(2).mean() for t in tasks})
        return optimizer.step()

    split, optimizer = made()
    before = {name: p.detach().clone() for name, p in split.named_parameters()}
    step(split, optimizer)
    assert all(not torch.equal(before[name], p) for name, p in split.named_parameters())
    # Both tasks begin alike, and their layers saw the same loss.
    assert torch.equal(split.for_task("a").head.weight, split.for_task("b").head.weight)

    dcp.save({"t": TrainingState(split, optimizer)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    other, its = made()
    shift(other, 1.0)
    dcp.load({"t": TrainingState(other, its)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for _ in range(2):
        step(split, optimizer)
        step(other, its)
    assert all(
        torch.equal(p, q) for p, q in zip(split.parameters(), other.parameters(), strict=True)
    )


def test_layers_that_a_recorder_names_can_be_split():
    """From training to the table and to the model that training starts over with."""
    tasks = {"a": 1.0, "b": 1.0}
    model = model_of()
    base = torch.optim.SGD(model.named_parameters(), lr=0.01)
    optimizer = GCondFused(base, tasks)
    for step in range(3):
        x = X + step
        optimizer.backward({"a": model(x).pow(2).mean(), "b": (model(x) - 3.0).pow(2).mean()})
        optimizer.step()
    rows = optimizer.recorder.layers(threshold=-0.02)
    layers = [row["layer"] for row in rows if row["layer"] != "scale"]
    assert set(layers) == {"body.0", "body.1", "body.2.0", "twice", "head"}
    lines = conflict_table(optimizer.recorder, threshold=-0.02).splitlines()
    assert [line.split()[-1] for line in lines[2:]] == [row["layer"] for row in rows]
    split = split_conflicting_layers(model_of(), layers, tasks)
    assert reached(split, "a") & reached(split, "b") == {"models.0.scale"}


# Errors.


@pytest.mark.parametrize(
    ("layers", "tasks", "error", "message"),
    [
        (["body.2.1"], TASKS, ValueError, r"'body\.2\.1' has no parameters"),
        ([""], TASKS, ValueError, "'' is the whole model"),
        (["body.2.0.weight"], TASKS, ValueError, r"no .* in Model: did you mean 'body\.2\.0'"),
        (["haed"], TASKS, ValueError, "did you mean 'head'"),
        (["scale"], TASKS, ValueError, "'scale' is a parameter of the model itself, in no layer"),
        (["body.2", "body.2.0"], TASKS, ValueError, r"'body\.2\.0' is in 'body\.2'"),
        (["body.2.0", "body.2"], TASKS, ValueError, r"'body\.2\.0' is in 'body\.2'"),
        (["head", "body.2.0", "body"], TASKS, ValueError, r"'body\.2\.0' is in 'body'"),
        ("head", TASKS, TypeError, "layers must be a list of names, not 'head'"),
        (["head"], "ab", TypeError, "tasks must be a list of names, not 'ab'"),
        (["head"], 2, TypeError, "tasks must be a list of names, not 2"),
        ([0], TASKS, TypeError, "layers: a name must be a string, not 0"),
        (["head"], [None], TypeError, "tasks: a name must be a string, not None"),
        ([], TASKS, ValueError, "layers must have at least one"),
        (["head"], [], ValueError, "tasks must have at least one"),
        (["head"], ["a", "b", "a"], ValueError, "tasks: 'a' is there twice"),
    ],
)
def test_what_cannot_be_split(layers, tasks, error, message):
    with pytest.raises(error, match=message):
        split_conflicting_layers(model_of(), layers, tasks)


def test_models_that_cannot_be_split():
    with pytest.raises(ValueError, match="there is no 'x' in Tanh, which has none"):
        split_conflicting_layers(nn.Tanh(), ["x"], TASKS)
    with pytest.raises(TypeError, match="model must be"):
        split_conflicting_layers(model_of().parameters(), ["head"], TASKS)


def test_a_parameter_that_is_tied_to_one_outside():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'2\.weight' is tied to '0\.weight'"):
        split_conflicting_layers(model, ["2"], TASKS)
    with pytest.raises(ValueError, match=r"'0\.weight' is tied to '2\.weight'"):
        split_conflicting_layers(model, ["1", "0"], TASKS)
    split_conflicting_layers(model, ["1"], TASKS)
    split_conflicting_layers(model, ["0", "2"], TASKS)


def test_a_module_that_is_reached_in_a_layer_and_outside_of_it():
    inner = nn.Linear(3, 3)
    model = nn.ModuleDict({"one": nn.Sequential(inner), "two": nn.Sequential(inner)})
    with pytest.raises(ValueError, match=r"'one\.0\.weight' is tied to 'two\.0\.weight'"):
        split_conflicting_layers(model, ["one"], TASKS)
    split = split_conflicting_layers(model, ["one.0"], TASKS)
    assert split.models[1]["one"][0] is split.models[1]["two"][0]


def test_a_shared_module_that_refers_to_a_split_layer():
    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.hidden = [parent]

        def forward(self, x):
            return self.hidden[0].layer(self.layer(x))

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.child = nn.Sequential(Child(self))

        def forward(self, x):
            return self.child(x)

    with pytest.raises(
        ValueError, match=r"'child' is to be shared and refers to '(the model|layer)'"
    ):
        split_conflicting_layers(model_of(Parent), ["layer"], TASKS)
    # Named too it is copied, with what it refers to.
    split = split_conflicting_layers(model_of(Parent), ["layer", "child"], ("a", "b"))
    assert torch.equal(split(X, task="b"), model_of(Parent)(X))
    before = split(X, task="a")
    shift(split.for_task("b").layer, 1.0)
    assert torch.equal(split(X, task="a"), before)
    assert not torch.equal(split(X, task="b"), before)


# The table.


def test_the_table_as_it_is():
    recorder = RecordedLayers(LAYERS)
    assert conflict_table(recorder, threshold=-0.02).splitlines() == [
        "Conflicts by layer: pairs of tasks with a cosine below -0.02",
        "rank  conflicts  compared   share  layer",
        "   1         30        40  75.0 %  body.2.0",
        f"   2         29        30  96.7 %  {'x' * 15}…{'y' * 29}",
        "   3          3        40   7.5 %  head",
        "   4          0        20   0.0 %  (the model itself)",
    ]
    assert recorder.threshold == -0.02
    assert conflict_table(recorder, most=3).splitlines()[-2:] == [
        "   3          3        40   7.5 %  head",
        "and 1 more layer",
    ]
    assert recorder.threshold == 0.0
    assert "more" not in conflict_table(recorder, most=4)
    assert (
        conflict_table(RecordedLayers([])).splitlines()[1] == "no layer had a gradient of two tasks"
    )


@pytest.mark.parametrize("most", [0, -1, 1.0, True, "3"])
def test_a_table_has_at_least_one_layer(most):
    with pytest.raises(ValueError, match="most must be a whole number, 1 or more"):
        conflict_table(RecordedLayers(LAYERS), most=most)


NAMES = st.text("abc._", max_size=200)
COUNTS = st.integers(1, 10**12).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(st.lists(st.tuples(NAMES, COUNTS), min_size=1, max_size=12), st.integers(1, 15))
def test_the_table_has_a_line_per_layer_in_80_columns(rows, most):
    recorder = RecordedLayers([(name, *counts) for name, counts in rows])
    lines = conflict_table(recorder, most=most).splitlines()
    assert all(len(line) <= 80 for line in lines)
    left_out = max(0, len(rows) - most)
    assert len(lines) == 2 + len(rows) - left_out + (left_out > 0)
    shown = [int(line.split()[1]) for line in lines[2 : 2 + min(most, len(rows))]]
    assert shown == sorted((below for _, (below, _) in rows), reverse=True)[:most]


@given(NAMES, st.integers(1, 60))
def test_a_shortened_name_keeps_both_ends(name, length):
    short = shortened(name, length)
    whole = name or "(the model itself)"
    assert len(short) == min(len(whole), length)
    if len(whole) > length:
        start, end = short.split("…")
        assert whole.startswith(start)
        assert whole.endswith(end)
    else:
        assert short == whole

"""Many ranks: equal on all of them, equal to one process that sees all the data."""

import inspect
import math
import multiprocessing
import re
import signal
from datetime import timedelta
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from gcond_kernels import LionLars
from gcond_kernels.distributed import consistency
from gcond_kernels.distributed.mesh import counted_range
from gcond_kernels.methods import CAGrad, GradNorm, PCGrad
from gcond_kernels.storage.dtensor import shard_coordinate
from tests.conftest import slow
from tests.helpers import training_ranks as t
from tests.helpers.ranks import Ranks, start
from tests.test_optimizer import same

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this torch has no torch.distributed"
    ),
    pytest.mark.skipif(
        "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork here"
    ),
]

# Sums over ranks are added in another order than those over micro-batches in one process; twenty
# steps of AdamW carry the float32 rounding of that on, in parameters of about 1.
ROUNDING = 2e-5

MODES = ("exact", "stochastic")
OF_TWO = ("shard", "replicate", "fsdp", "tp", "sp")
OF_FOUR = {
    "shard": ("clipped", "signs"),
    "fsdp": ("momentum", "signs"),
    "hsdp": ("clipped", "signs"),
    "tp": ("clipped", "signs"),
    "fsdp_tp": ("clipped", "signs"),
}
ALL = ("momentum", "clipped", "signs")
QUICK = [(2, way, ALL[number % 3]) for number, way in enumerate(OF_TWO)]
OTHERS = [
    *((2, way, options) for way in OF_TWO for options in ALL),
    *((4, way, options) for way in OF_FOUR for options in OF_FOUR[way]),
]
RUNS = [*QUICK, *(slow(*run) for run in OTHERS if run not in QUICK)]


@pytest.fixture(scope="module")
def ranks2(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def ranks4(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def ranks(request):
    return lambda size: request.getfixturevalue(f"ranks{size}")


def equal(ours, others):
    return ours.keys() == others.keys() and all(torch.equal(ours[k], others[k]) for k in ours)


def assert_close(ours, others, atol=ROUNDING):
    assert ours.keys() == others.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], others[name], rtol=0, atol=atol, msg=name)


def assert_all_ranks_alike(said):
    for parameters, decisions in said:
        assert equal(parameters, said[0][0])
        assert decisions == said[0][1]


OPTIONS = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "clipped": {"max_norm": 0.5},
    "signs": {
        "update": LionLars(1e-3, 3.0),
        "base": torch.optim.SGD,
        "lr": 1.0,
    },
    "resolved": {"method": t.GCond(history="resolved", dominance_window=1)},
    "stochastic": {"mode": "stochastic"},
    "bfloat16 rows": {"accumulator_dtype": torch.bfloat16},
}


@pytest.mark.parametrize(("size", "way", "options"), RUNS)
def test_ranks_decide_alike_and_as_one_process_that_sees_all(ranks, size, way, options):
    options = OPTIONS[options]
    said = ranks(size)(t.train, way, options)
    assert_all_ranks_alike(said)
    parameters, decisions = said[0]
    alone, decisions_alone = t.train_alone(t.data_rank(way, 0, size)[1], options)
    assert_close(parameters, alone)
    assert [d[2] for d in decisions] == [d[2] for d in decisions_alone]  # the winners
    assert sum(len(conflicts) for _, conflicts, *_ in decisions) >= t.STEPS  # there is something
    for ours, theirs in zip(decisions, decisions_alone, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3, abs=1e-3)  # the weights
        assert ours[4] == pytest.approx(theirs[4], rel=1e-3)  # the norm


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("shard", "plain"),
        ("replicate", "resolved"),
        ("fsdp", "stochastic"),
        slow("shard", "resolved"),
        slow("shard", "stochastic"),
        slow("replicate", "plain"),
        slow("replicate", "stochastic"),
        slow("fsdp", "plain"),
        slow("fsdp", "resolved"),
    ],
)
def test_other_options(ranks2, way, options):
    options = OPTIONS[options]
    said = ranks2(t.train, way, options)
    assert_all_ranks_alike(said)
    assert_close(said[0][0], t.train_alone(2, options)[0])


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_bfloat16_accumulators(ranks2, way):
    """Rounded to 8 bits at every addition, in another order: alike on all ranks, and near."""
    said = ranks2(t.train, way, OPTIONS["bfloat16 rows"], None, 5)
    assert_all_ranks_alike(said)
    assert_close(said[0][0], t.train_alone(2, OPTIONS["bfloat16 rows"], None, 5)[0], atol=0.05)


# Other methods, with a head for each task, a mask, momentum and clipping.

# Adam without weight decay: it moves nothing that has no gradient.
HEADED = {"net": t.Headed, "share": 0.4, "max_norm": 0.5, "base": torch.optim.Adam}
METHODS = {
    "GCond": {},
    "PCGrad": {"method": PCGrad(seed=3)},
    "CAGrad": {"method": CAGrad()},
    "GradNorm": {"method": GradNorm(lr=0.05)},
    "of the user": {"method": t.by_length},
    "by tensor": {"granularity": "tensor"},
}
METHODS = {name: HEADED | options for name, options in METHODS.items()}
QUICK_METHODS = [(2, "shard", "GradNorm"), (2, "replicate", "PCGrad"), (2, "fsdp", "by tensor")]
OTHER_METHODS = [
    *((2, way, method) for way in ("shard", "fsdp") for method in METHODS),
    *((2, "replicate", method) for method in ("PCGrad", "GradNorm", "by tensor")),
    (4, "shard", "by tensor"),
    (4, "fsdp_tp", "PCGrad"),
]
RUNS_OF_METHODS = [
    *QUICK_METHODS,
    *(slow(*run) for run in OTHER_METHODS if run not in QUICK_METHODS),
]


def assert_masked_stay(parameters):
    model = t.new_model(net=t.Headed)
    mask = t.mask_of(model, HEADED["share"])
    for name, before in model.named_parameters():
        moved = parameters[name] != before
        trained = mask.get(before, torch.ones_like(moved))
        assert not moved[~trained].any(), name
        assert name == "unused" or moved[trained].all(), name


def assert_decided_alike(decisions, others):
    for ours, theirs in zip(decisions, others, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3, abs=1e-3)  # the weights
        assert ours[4] == pytest.approx(theirs[4], rel=1e-3)  # the norm
        assert ours[5].keys() == theirs[5].keys()  # the tensors that are shared
        for name, weights in ours[5].items():
            assert weights == pytest.approx(theirs[5][name], rel=1e-2, abs=1e-2), name


@pytest.mark.parametrize(("size", "way", "method"), RUNS_OF_METHODS)
def test_any_method_decides_alike_and_as_one_process_that_sees_all(ranks, size, way, method):
    options = METHODS[method]
    said = ranks(size)(t.train, way, options, None, 10)
    assert_all_ranks_alike(said)
    parameters, decisions = said[0]
    alone, decisions_alone = t.train_alone(t.data_rank(way, 0, size)[1], options, None, 10)
    assert_close(parameters, alone)
    assert_decided_alike(decisions, decisions_alone)
    assert_masked_stay(parameters)
    for weights, *_ in decisions[1:]:  # there is something
        assert max(abs(weight - 1.0) for weight in weights.values()) > 0.01
    shared = set() if method != "by tensor" else set(parameters) - {"unused"}
    assert set(decisions[-1][5]) == {name for name in shared if not name.startswith("heads")}


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_losses_are_means_over_the_micro_batches_of_all_ranks(ranks2, way):
    options = METHODS["GradNorm"]
    said = ranks2(t.train, way, options, [1, 3], 10)
    assert_all_ranks_alike(said)
    parameters, decisions = t.train_alone(2, options, [1, 3], 10)
    assert_close(said[0][0], parameters)
    assert_decided_alike(said[0][1], decisions)
    for ours, theirs in zip(said[0][1], decisions, strict=True):
        for key, value in theirs[6].items():  # state of the method
            assert ours[6][key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(("size", "way"), [(2, "shard"), (2, "replicate"), (4, "shard")])
def test_ranks_pick_the_signs_of_one_process(ranks, size, way):
    said = ranks(size)(t.dropped_signs, way)
    gradients, parameters = t.dropped_signs(None, size)
    for ours, parameters_here in said:
        assert equal(parameters_here, said[0][1])
        assert_close(parameters_here, parameters, 1e-5)
        for step, of_step in enumerate(ours):
            assert equal(of_step, said[0][0][step])
            assert_close(of_step, gradients[step], 1e-6)


def test_shards_pick_signs_of_their_own_and_copies_the_same(ranks2):
    ours, theirs = ranks2(t.signs_of_parts, "fsdp")
    assert not torch.equal(ours["first.weight"][:32], theirs["first.weight"][:32])
    assert abs((ours["first.weight"][:32] * theirs["first.weight"][:32]).mean()) < 0.3
    ours, theirs = ranks2(t.signs_of_parts, "tp")
    assert ours["first.weight"].shape == (33, 6)
    assert theirs["first.weight"].shape == (32, 6)
    assert torch.equal(ours["norm.weight"], theirs["norm.weight"])
    assert torch.equal(ours["norm.bias"], theirs["norm.bias"])


def test_the_kernels_in_cuda_cpp(ranks2):
    try:
        from gcond_kernels import _cuda  # noqa: F401
    except ImportError:
        pytest.skip("the CUDA C++ extension is not built")
    for way in ("shard", "fsdp"):
        said = ranks2(t.train, way, {"backend": "cuda", "max_norm": 0.5}, None, 8)
        assert_all_ranks_alike(said)
        assert_close(said[0][0], t.train_alone(2, {"max_norm": 0.5}, None, 8)[0])


# Not all ranks have the same.


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_unlike_numbers_of_micro_batches(ranks2, way):
    """Ranks in turn have a full window, a short one, and none at all, also in the first step."""
    per_rank = [(2, 3), (0, 3), (3, 0), (1, 3), (3, 3), (0, 1)]
    said = ranks2(t.short_windows, way, per_rank)
    assert equal(said[0][0], said[1][0])
    parameters, micro_batches = t.short_windows_alone(per_rank)
    assert_close(said[0][0], parameters)
    assert said[0][1] == said[1][1] == micro_batches == {"a": 1, "b": 1, "c": 1}


def test_a_rank_without_any_micro_batch_in_the_first_window(ranks2):
    said = ranks2(t.short_windows, "shard", [(0, 3), (3, 3)])
    assert equal(said[0][0], said[1][0])


@pytest.mark.parametrize("way", ["shard", "replicate", "fsdp"])
@pytest.mark.parametrize("on_nonfinite", ["skip", "drop_task", "raise"])
def test_a_nan_on_one_rank_is_met_by_all_in_the_same_way(ranks2, way, on_nonfinite):
    said = ranks2(t.with_nan, way, on_nonfinite, 1)
    assert equal(said[0][0], said[1][0])
    assert all(parameter.isfinite().all() for parameter in said[0][0].values())
    for _, seen in said:
        if on_nonfinite == "raise":
            assert "Nothing was changed" in seen.pop(1)
        assert seen[0] == seen[2] == ([], False)
        assert seen[1] == (["b"], on_nonfinite != "drop_task")


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_an_overflow_on_one_rank_lowers_the_scale_on_all(ranks2, way):
    said = ranks2(t.scaled, way)
    assert equal(said[0][0], said[1][0])
    assert said[0][1] == said[1][1] == [(256.0, False), (128.0, True), (128.0, False)]


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_a_parameter_that_one_rank_uses_has_a_gradient_on_all(ranks2, way):
    said = ranks2(t.unlike_paths, way)
    assert said[0][0] == said[1][0]
    assert equal(said[0][1], said[1][1])
    main, side, never = [True, True], [True, True], [False, False]
    first, second, third = said[0][0]
    assert second == [*main, *side, *never]
    assert first == third == [*main, False, False, *never]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_a_task_that_fails_when_others_are_on_their_way(ranks2, way, steps):
    with_mistake = ranks2(t.failing_last_task, way, True, steps)
    assert equal(with_mistake[0][0], with_mistake[1][0])
    all_of_them = {"a": 2 * steps, "b": 2 * steps, "c": 2 * steps}
    # A shard goes where a row was that must have arrived, for which a host does not wait.
    sent = ["a"] if way == "shard" else ["a", "b"]
    kept = {task: (2 if task in sent else 1) * steps for task in t.TASKS}
    assert with_mistake[0][1] == with_mistake[1][1] == kept
    assert with_mistake[0][2] == []
    error, warning, again = with_mistake[1][2]
    assert error == "no such luck"
    assert f"the gradients of {sent} were sent to the other ranks: those stay" in warning
    assert "on its way to the other ranks: call step() before backward()" in again
    without = ranks2(t.failing_last_task, way, False, steps)
    assert without[0][1] == all_of_them
    assert not equal(without[0][0], with_mistake[0][0])


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_parameters_that_are_thawed(ranks2, way):
    said = ranks2(t.thawed, way)
    assert equal(said[0][0], said[1][0])
    assert_close(said[0][0], t.thawed_alone(2)[0])


# What it costs.


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_on_the_wire(ranks, size):
    """(K + 1) N elements, not 2 K N; beside them one all-reduce of the inner products."""
    K = len(t.TASKS)
    sent, row, kept = ranks(size)(t.traffic_of, "shard", {})[0]
    share = (size - 1) / size
    assert sent[t.REDUCE_SCATTER] == [4 * row * share] * K
    assert sent[t.ALL_GATHER][-1] == 4 * row * share
    assert kept == [[K, row // size], [row // size]]
    small = sent[t.ALL_GATHER][:-1] + sent["all_reduce"]
    assert len(small) == 3
    assert sum(small) < 4 * row

    sent, row, kept = ranks(size)(t.traffic_of, "replicate", {})[0]
    assert sent["all_reduce"][-K:] == [2 * 4 * row * share] * K
    assert t.REDUCE_SCATTER not in sent
    assert len(sent["all_reduce"]) == K + 1
    assert kept == [[K, row], [row]]


def test_inner_products_with_the_history_travel_by_tensor_only_where_needed(ranks2):
    """S, X and S of each tensor, in float64; X of each tensor too where not all are shared."""
    K = len(t.TASKS)
    for net in (t.Net, t.Headed):
        T = len(list(t.new_model(net=net).parameters())) - 1  # without the one that is not used
        for granularity in ("model", "tensor"):
            options = {"net": net, "granularity": granularity}
            sent = sum(ranks2(t.traffic_of, "shard", options)[0][0]["all_reduce"])
            each = 1 if (net, granularity) == (t.Net, "model") else 2
            assert sent == 8 * K**2 * (2 + each * T)  # of two ranks each sends as much as it has


def test_the_result_travels_in_the_type_of_the_gradients(ranks2):
    sent, row, _ = ranks2(t.traffic_of, "shard", {"dtype": torch.bfloat16})[0]
    assert sent[t.ALL_GATHER][-1] == 2 * row / 2


def test_rows_are_sent_while_the_next_task_runs(ranks2):
    """Not in the first window, before which the ranks have not compared their parameters."""
    of_exact, of_stochastic = [0] * 15, [0] * 3
    exact, stochastic = (ranks2(t.when_rows_are_sent, "replicate", m)[0] for m in MODES)
    assert exact == [*of_exact, 0, 1, 2]
    assert stochastic == [*of_stochastic, 0, 1, 2]
    # A shard goes where a row was that must have arrived, for which a host does not wait.
    exact, stochastic = (ranks2(t.when_rows_are_sent, "shard", m)[0] for m in MODES)
    assert exact == [*of_exact, 0, 1, 1]
    assert stochastic == [*of_stochastic, 0, 1, 1]


# What wraps the model.


def test_buffers_are_those_of_rank_0_and_the_wrapper_is_told_nothing_for_good(ranks2):
    (ours, told), (theirs, _) = ranks2(t.batchnorm)
    assert equal(ours, theirs)
    assert told == [True, False, False, True]


def test_data_parallel_with_parameters_of_others_is_left_alone(ranks2):
    ours, theirs = ranks2(t.untold, False)
    assert equal(ours[0], theirs[0])
    assert ours[1] is True
    alone = t.train_alone(2, {}, None, 5)[0]
    del alone["unused"]
    del ours[0]["another"]
    assert_close(ours[0], alone)


def test_where_it_fails_by_that_the_error_says_so(ranks2):
    for said in ranks2(t.untold, True):
        assert "give GCondFused(..., module=model)" in said
        assert "It was left alone: module.another is in no parameter group" in said


@pytest.mark.parametrize("net", [t.Net, t.Headed])
@pytest.mark.parametrize("kind", ["tensors", "functions", "assigned"])
def test_data_parallel_that_was_forgotten_is_found(ranks2, kind, net):
    """Its first forward pass is made by then, and has parameters that no loss reaches."""
    ours, theirs = ranks2(t.forgotten, kind, net)
    assert equal(ours[0], theirs[0])
    assert_close(ours[0], t.train_alone(2, {"net": net}, None, 5)[0])
    assert ours[1] == [True, False, True]  # whether it reduces: before, in training, afterwards
    assert theirs[2] == 0.0  # the buffer of rank 0


def test_it_is_found_also_on_a_rank_without_a_backward_pass(ranks2):
    ours, theirs = ranks2(t.forgotten, "tensors", t.Net, True)
    assert equal(ours[0], theirs[0])
    assert theirs[1] == [True, False, True]
    counts = [(3, 0), *[(3, 3)] * 4]
    assert_close(ours[0], t.short_windows_alone(counts)[0])


ASSIGNED_WRONGLY = {
    "static graph": "ValueError: module: DistributedDataParallel's static_graph=True",
    "not all parameters": "ValueError: module: module.another.weight is in no parameter group",
    "no module": "TypeError: module must be a torch.nn.Module, not 'model'",
    "other ranks": r"ValueError: module: .* has ranks \[[01]\], and this GCondFused \[0, 1\]",
    "other ranks found": r"RuntimeError: .* has ranks \[[01]\], and this GCondFused \[0, 1\]",
    "cannot be called off": r"RuntimeError: .* give GCondFused\(..., module=model\) before",
}


@pytest.mark.parametrize("kind", ASSIGNED_WRONGLY)
def test_a_model_that_does_not_go_with_the_optimizer(ranks2, kind):
    for said, counts in ranks2(t.assigned_wrongly, kind):
        assert re.match(ASSIGNED_WRONGLY[kind], said), said
        assert counts == [0, 0, 0]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", ["gradient_sync", "all_reduce", "in a function"])
def test_a_block_that_is_to_keep_its_gradients(ranks2, kind, told):
    """It is named before anything has changed, and training goes on from there."""
    call = "all_reduce" if kind == "all_reduce" else "gradient_sync"
    for parameters, said in ranks2(t.without_sync, kind, told):
        for error, state in (said[:2], said[2:]):
            assert f"set_requires_{call}(False) was called on second, a Linear, that" in error
            assert "holds second.weight" in error
            assert state == (True, [0, 0, 0] if kind == "in a function" else [1, 1, 1])
        assert_close(parameters, t.train_alone(2, {}, None, 2)[0])


def test_where_there_is_nothing_to_all_reduce_it_may_be_left_out(ranks2):
    for parameters in ranks2(t.sync_of_one_dimension):
        assert_close(parameters, t.train_alone(2, {}, None, 2)[0])


# Process groups.


@pytest.mark.parametrize("way", ["fsdp", "shard"])
def test_nothing_travels_in_the_users_group(ranks2, tmp_path, way):
    """There dcp.async_save's thread sends, beside training; its checkpoints resume."""
    said = ranks2(t.saved_beside_training, way, str(tmp_path))
    assert_all_ranks_alike([one[:2] for one in said])
    assert [in_default for _, _, in_default in said] == [[], []]
    assert_close(said[0][0], t.train_alone(2, {}, None, 8)[0])
    for step in (1, 3, 5, 7):
        assert (tmp_path / str(step) / ".metadata").exists()


def test_where_a_group_cannot_be_made_the_error_says_what_to_do(ranks2):
    for said in ranks2(t.ungroupable):
        assert re.search(r"ranks \[0, 1\] .* cannot be made: no route.*GLOO_SOCKET_IFNAME", said)


def test_ranks_in_another_order_than_in_the_job(ranks2):
    if "sort_ranks" not in inspect.signature(torch.distributed.new_group).parameters:
        pytest.skip("this torch sorts the ranks of a group")
    said = ranks2(t.in_another_order)
    assert_all_ranks_alike([one[:2] for one in said])
    assert_close(said[0][0], t.train_alone(2, {}, None, 4)[0])
    model, optimizer = t.prepared(None, 2 * t.MICRO_BATCHES)
    for step in range(4):
        numbers = [t.number_of(step, rank, i) for i in range(t.MICRO_BATCHES) for rank in range(2)]
        t.window(optimizer, model, numbers)
    history = t.history_of(t.TrainingState(model, optimizer).state_dict()["optimizer"])
    for _, _, whole, same_rank in said:
        assert same_rank
        assert_close(whole, history, 1e-2)


MISTAKES = {
    "other weights": "RuntimeError: first.weight of rank 1 is not that of rank 0",
    "weights in another order": "RuntimeError: first.weight of rank 1 is not that of rank 0",
    "a layer left alone": r"RuntimeError: rank 1 and rank 0 hold the same part of last.weight",
    "two trainings in one": "RuntimeError: rank 1 and rank 0 hold the same part of .*process_group",
    "gradients kept": r"RuntimeError: set_requires_gradient_sync\(False\) was called on",
    "not waited for": r"RuntimeError: set_is_last_backward\(False\) was called on the model",
    "not the wrapped model": "RuntimeError: the gradient of .* was put back .*as module=",
    "state of one rank": r"RuntimeError: rank 1 has resolutions so far=1, rank 0 .*=2",
    "thawed on one rank": "RuntimeError: rank 1 has .*parameters that require a gradient, rank 0",
    "other rate": r"RuntimeError: rank 1 has options of base=.*'lr': 0.5",
    "other setting": "RuntimeError: rank 1 has max_norm=2.0, rank 0 max_norm=None",
    "other shape": r"RuntimeError: rank 1 has last.weight shape \[4, 5\] .*, rank 0 last.weight",
    "one parameter more": "RuntimeError: rank 1 has .*, rank 0 ",
    "other on_nonfinite": "RuntimeError: ranks differ in on_nonfinite",
    "sync of DTensors": "ValueError: strategy='shard' is for parameters that every rank holds in full",
    "not all parameters": "ValueError: module: module.unused is in no parameter group",
    "static graph": "ValueError: module: DistributedDataParallel's static_graph=True",
    "nothing anywhere": "RuntimeError: nothing was accumulated on any of the 2 ranks",
    "saved in a window": "RuntimeError: with several ranks a state is saved between windows",
    "copied": "RuntimeError: an optimizer that is one of several ranks cannot be copied",
    "late parameter": "RuntimeError: parameters were added, .*, and the other ranks have a part of",
    "other seed": r"RuntimeError: rank 1 has method=PCGrad\(seed=1\), rank 0 .*\(seed=0\)",
    "other function": r"RuntimeError: rank 1 has method=[\w.]+\.half, rank 0 .*\.by_length",
    "other granularity": "RuntimeError: rank 1 has granularity='tensor', rank 0 .*='model'",
    "mask on one rank": "RuntimeError: rank 1 has mask=True, rank 0 mask=False",
    "other mask": "RuntimeError: mask of first.weight of rank 1 is not that of rank 0",
    "other mask of a part that both hold": "RuntimeError: mask of norm.weight of rank 1 is not",
    "mask made before sharding": "ValueError: mask of first.weight is not sharded as the parameter",
    "mask cut otherwise": "ValueError: mask of first.weight is not sharded as the parameter is",
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_on_every_rank(ranks2, kind):
    said = ranks2(t.mistake, kind)
    for here in said:
        assert re.match(MISTAKES[kind], here), here
    assert "rank 1 has" not in said[0] or said[0] == said[1]


# Checkpoints.


@pytest.mark.parametrize("way", ["shard", "replicate", "fsdp"])
def test_every_ranks_own_state_goes_on_to_the_same_bits(ranks2, tmp_path, way):
    assert ranks2(t.state_of_rank, way, str(tmp_path), "each") == [True, True]


@pytest.mark.parametrize(("way", "method"), [("shard", "by tensor"), ("fsdp", "by tensor")])
def test_so_does_that_of_any_method(ranks2, tmp_path, way, method):
    options = METHODS[method]
    assert ranks2(t.state_of_rank, way, str(tmp_path), "each", options) == [True, True]


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_a_state_of_fewer_parameters_than_there_are_now(ranks2, way):
    for straight, reloaded in ranks2(t.loaded_early_and_late, way):
        assert equal(straight, reloaded)


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_the_state_of_rank_0_for_all(ranks2, tmp_path, way):
    assert ranks2(t.state_of_rank, way, str(tmp_path), "first") == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("shard", 2), ("shard", 4)),
        (("shard", 4), (None, 1)),
        ((None, 1), ("shard", 4)),
        (("replicate", 2), ("shard", 4)),
        (("fsdp", 4), ("fsdp", 2)),
        (("fsdp", 2), ("fsdp_tp", 4)),
        (("fsdp_tp", 4), ("tp", 2)),
        (("shard", 4), ("fsdp", 2)),
        (("hsdp", 4), ("shard", 2)),
    ],
)
def test_a_checkpoint_resumes_on_another_number_of_ranks(ranks, tmp_path, before, after):
    def run(way, size, *args):
        train = [t.trained_on(way, *args)] if way is None else ranks(size)(t.trained_on, way, *args)
        assert_all_ranks_alike(train)
        return train[0]

    folder = str(tmp_path)
    whole, decisions = run(*before, folder, 8)
    resumed, later = run(*after, folder)
    assert len(later) == t.STEPS - 8
    assert_close(resumed, whole)
    assert [d[2] for d in later] == [d[2] for d in decisions[8:]]
    for ours, theirs in zip(later, decisions[8:], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-3)


@pytest.mark.parametrize(
    ("before", "after", "method"),
    [
        ("shard", None, "GradNorm"),
        ("fsdp", "replicate", "PCGrad"),
        (None, "fsdp", "by tensor"),
        slow("shard", None, "PCGrad"),
        slow("shard", None, "by tensor"),
        slow("shard", "fsdp", "by tensor"),
        slow("fsdp", None, "GradNorm"),
        slow("fsdp", None, "by tensor"),
        slow("fsdp", "replicate", "by tensor"),
        slow(None, "shard", "GradNorm"),
        slow(None, "shard", "by tensor"),
        slow(None, "fsdp", "PCGrad"),
    ],
)
def test_a_checkpoint_of_any_method_resumes(ranks2, tmp_path, before, after, method):
    """In two ranks or one process; the mask is that of the state, not the one that was given."""

    def run(way, *args):
        train = [t.trained_on(way, *args)] if way is None else ranks2(t.trained_on, way, *args)
        assert_all_ranks_alike(train)
        return train[0]

    options = {**METHODS[method]}
    base = options.pop("base")
    whole, decisions = run(before, str(tmp_path), 4, 10, options, base)
    resumed, later = run(after, str(tmp_path), None, 10, options | {"share": 0.7}, base)
    assert len(later) == 6
    assert_close(resumed, whole)
    assert_decided_alike(later, decisions[4:])
    assert_masked_stay(resumed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "flat"),
    [
        ("shard", "fsdp", False),
        ("fsdp", None, True),
        (None, "shard", False),
        (None, "fsdp", True),
    ],
)
def test_what_torch_saves_by_itself_resumes(ranks2, tmp_path, before, after, flat):
    """Without a TrainingState; sharded otherwise, in other numbers."""

    def run(way, *args):
        options = {"granularity": "tensor", "net": t.Used, "share": 0.4}
        args = (way, str(tmp_path), *args, 10, options, torch.optim.Adam, flat)
        train = [t.trained_on(*args)] if way is None else ranks2(t.trained_on, *args)
        assert_all_ranks_alike(train)
        return train[0]

    whole, decisions = run(before, 4)
    resumed, later = run(after, None)
    assert len(later) == 6
    assert_close(resumed, whole)
    assert_decided_alike(later, decisions[4:])


@pytest.mark.parametrize("way", ["shard", slow("replicate"), "fsdp"])
def test_torchs_states_carry_everything_and_change_nothing(ranks2, way):
    """Plain, flat, full, and full on rank 0 alone; before the first window and after two."""
    for said in ranks2(t.states_of_torch, way):
        assert len(said) == 8
        assert set(said.values()) == {(True, True)}, said


def test_a_rank_that_saves_alone_is_told(ranks2):
    for caller in (0, 1):
        said = ranks2(t.saved_by_one_rank, "shard", caller)
        words = rf"rank {1 - caller} did not call state_dict\(\) within 1 s after rank {caller}: "
        assert re.match(
            words + 'call it on all ranks, or use strategy="replicate"', said[caller][0]
        )
        assert said[1 - caller] == [None, 16]  # together with the other it may again
        assert said[caller][1] == 16
    assert ranks2(t.saved_by_one_rank, "replicate", 1) == [[None, 16], [16, 16]]


@pytest.mark.parametrize(("how", "seconds"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 5)])
def test_a_rank_killed_or_stuck_in_a_window(ranks4, tmp_path, how, seconds):
    """The others end with an error within the timeout, and the last checkpoint resumes."""
    saved = tmp_path / "saved"
    arguments = (str(tmp_path / "store"), str(saved), how, timedelta(seconds=seconds))
    processes = start(2, t.doomed, lambda rank: arguments)
    other, hit = processes
    other.join(100)  # by far longer than it takes, and shorter than torch's own timeout
    ended = other.exitcode
    for process in processes:
        process.kill()
        process.join()
    assert ended == 1
    assert hit.exitcode == -signal.SIGKILL

    checkpoints = sorted(folder.parent for folder in saved.glob("*/.metadata"))
    assert [folder.name for folder in checkpoints] == ["02", "04"]
    resumed = ranks4(t.trained_on, "shard", str(checkpoints[-1]))
    assert_all_ranks_alike(resumed)
    assert len(resumed[0][1]) == t.STEPS - 4
    alone, _ = t.trained_on(None, str(tmp_path / "alone"), save_after=4)
    assert_close(resumed[0][0], alone)


# How it lies in memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_result_take_no_memory_beside_the_rows(ranks2, dtype):
    one, *more = ranks2(t.where_things_lie, dtype)[0]
    assert more == [(True, {True})] * 3
    # A single float32 row is shard and result at once; what is narrower has no room beside it.
    assert one == (True, {dtype == torch.float32})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, slow(4)])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 9])
def test_shards_of_any_number_of_tasks_add_up(ranks, size, K, dtype):
    assert ranks(size)(t.tasks_in_all_numbers, K, dtype) == [None] * size


@pytest.mark.parametrize("options", [{}, {"update": LionLars(clip=3.0)}])
@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_all_sorts_of_parameters(ranks2, way, options):
    ours, others = ranks2(t.mixed, way, options)
    assert equal(ours, others)
    # bfloat16 parameters keep 8 bits: a rounding that falls to the other side shows.
    assert_close(ours, t.mixed(None, options), atol=2e-2)


@pytest.mark.parametrize(("size", "way"), [(1, None), (2, "shard"), (2, "replicate"), (4, "shard")])
def test_a_checkpoint_of_all_sorts_of_parameters(ranks, tmp_path, size, way):
    """Scalars, channels-last weights and two types come back to the bit."""

    def run(*args):
        return [t.mixed(way, *args)] if way is None else ranks(size)(t.mixed, way, *args)

    assert equal(run({}, str(tmp_path))[0], run({})[0])


def test_an_optimizer_that_is_older_than_the_process_group(ranks2):
    for said in ranks2(t.knows_no_ranks):
        assert "make it after init_process_group" in said


@pytest.mark.parametrize("way", ["shard", slow("fsdp")])
def test_what_was_frozen_since_it_was_saved_is_left_out(ranks2, tmp_path, way):
    """Both with `save` and with `async_save`, which copies what it is given."""
    for of_rank in ranks2(t.frozen_since, way, str(tmp_path)):
        for straight, resumed in of_rank:
            assert_close(resumed, straight)


def test_two_parameters_whose_names_differ_by_that_of_a_wrapper(tmp_path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Linear(1, 3)
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.module(x[:, :1]) * self.weight

    def new():
        torch.manual_seed(0)
        model = Module()
        return model, t.new_optimizer(model, steps=1)

    ours, theirs = resumed(tmp_path, new(), new())
    assert equal(ours, theirs)


def test_narrow_rows_do_not_narrow_the_gradients_of_others(ranks2):
    alone = t.narrow_rows_of_mixed_parameters(None)
    for gradients in ranks2(t.narrow_rows_of_mixed_parameters, "shard"):
        for ours, theirs in zip(gradients, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


# What goes wrong on the way.


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_rows_that_were_exchanged_take_no_more(ranks2, way, load):
    ours, theirs = ranks2(t.retried, way, load)
    assert equal(ours[0], theirs[0])
    for _, (raised, full, loading, dropping), micro_batches in (ours, theirs):
        assert "Nothing was changed" in raised
        assert "on its way to the other ranks: call step() before backward()" in full
        assert "on its way to the other ranks: load a state between" in loading
        assert "on its way to the other ranks: call step() instead" in dropping
        assert micro_batches == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize("mode", ["exact", "stochastic"])
@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_a_micro_batch_that_failed_is_made_again_where_nothing_was_sent(ranks2, way, mode):
    said = ranks2(t.failing_first_function, way, mode)
    assert_all_ranks_alike(said)
    if mode == "stochastic":
        alone = t.failing_first_function_alone()
    else:
        alone, _ = t.train_alone(2, {}, [1, 1], 3)
    assert_close(said[0][0], alone)


def test_collectives_of_the_user_where_windows_are_unlike(ranks2):
    ours, theirs = ranks2(t.between_rows_and_step)
    assert equal(ours[0], theirs[0])
    assert ours[1] == theirs[1] == [1.0, 1.0, 1.0]


def test_after_a_step_of_nothing_training_goes_on(ranks2):
    ours, theirs = ranks2(t.nothing_then_something)
    assert equal(ours, theirs)
    assert_close(ours, t.train_alone(2, {}, None, 2)[0])


def test_scaler_step_on_a_rank_without_data(ranks2):
    ours, theirs = ranks2(t.scaler_step_without_data)
    assert equal(ours, theirs)


def test_the_wrappers_process_group_is_taken(ranks4):
    said = ranks4(t.two_trainings)
    for pair in (0, 1):
        ours, theirs = said[2 * pair : 2 * pair + 2]
        assert equal(ours, theirs)
        assert_close(ours, t.two_trainings_alone(pair))
    assert not equal(said[0], said[2])


def test_buffers_with_gaps_and_buffers_that_are_not_broadcast(ranks2):
    (sent, kept), (of_rank_0, own) = ranks2(t.buffers_that_are_views)
    assert sent == [[0.0] * 4] * 3
    assert of_rank_0 == [[1.0, 0.0, 0.0, 1.0]] * 3
    assert kept == [[0.0] * 4] * 3
    assert own == [[1.0] * 4] * 3


@pytest.mark.parametrize("size", [2, 4])
def test_shards_that_are_written_before_they_are_waited_for(ranks, size):
    assert ranks(size)(t.writes_at_once) == [None] * size


# What needs no processes.


class Mesh:
    """A device mesh as far as it is asked."""

    def __init__(self, name, coordinate, shape):
        self.name, self.coordinate, self.shape = name, coordinate, shape

    def get_coordinate(self):
        return self.coordinate


def test_meshes_of_the_same_placements_are_told_apart():
    from torch.distributed.tensor import Replicate, Shard

    def parameter(mesh, *placements):
        return SimpleNamespace(parameter=SimpleNamespace(device_mesh=mesh, placements=placements))

    data, tensor = Mesh("data", [1], (2,)), Mesh("tensor", [0], (2,))
    both = Mesh("both", [1, 0], (2, 4))
    parameters = [
        parameter(data, Shard(0)),
        parameter(tensor, Shard(0)),
        parameter(both, Replicate(), Shard(1)),
        SimpleNamespace(parameter=torch.ones(2)),
        parameter(data, Shard(0)),
    ]
    coordinates = [shard_coordinate(one.parameter) for one in parameters]
    first, *others = [((1,), (2,)), ((0,), (2,)), ((0,), (4,)), ((), ())]
    assert coordinates == [first, *others, first]
    assert consistency.shard_number(parameters) == 0
    assert consistency.shard_number([parameters[0], parameters[4]]) == 1
    same_coordinate = Mesh("another", [1], (2,))
    assert consistency.shard_number([parameters[0], parameter(same_coordinate, Shard(0))]) == 0
    both = Mesh("both", [1, 2], (2, 4))
    assert consistency.shard_number([parameter(both, Shard(1), Shard(0))]) == 6


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1000])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_slices_of_replicas_are_every_element_once(size, replicas):
    group = [[], list(range(replicas))]
    slices = [counted_range(size, replica, group) for replica in range(replicas)]
    assert slices[0][0] == 0
    assert slices[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(slices))


def test_who_holds_what_and_who_holds_it_otherwise():
    replicas = [consistency.ranks_by_coordinate(where) for where in ("xyxy", "zzzz")]
    assert replicas == [[[0, 2], [1, 3]], [[0, 1, 2, 3]]]
    mismatch = partial(consistency.first_mismatch, replicas=replicas)
    same_numbers = [[[1.0], [2.0]], [[5.0], [2.0]], [[1.0], [2.0]], [[5.0], [2.0]]]
    nan = [[[math.nan], [2.0]]] * 4
    assert mismatch(same_numbers, rel_tol=1e-6) is None
    assert mismatch(nan, rel_tol=1e-6) is None
    unlike = [*same_numbers[:3], [[5.1], [2.0]]]
    assert mismatch(unlike, rel_tol=1e-3) == (0, 3, 1)
    assert mismatch(unlike, rel_tol=1e-3, abs_tol=0.2) is None
    unlike = [*same_numbers[:3], [[5.0], [math.nan]]]
    assert mismatch(unlike, rel_tol=1e-3) == (1, 3, 0)


def alone(base=torch.optim.AdamW, options=None, names=True, **changes):
    """A model and its optimizer in one process, some steps on."""
    model = t.new_model()
    for name, value in changes.items():
        setattr(model, name, value)
    parameters = list(model.named_parameters() if names else model.parameters())
    optimizer = t.GCondFused(base(parameters, lr=1e-2, **(options or {})), t.TASKS, momentum=0.5)
    return model, optimizer


def bits(model, optimizer):
    state = optimizer.state_dict()
    return t.copy.deepcopy((model.state_dict(), state["state"], state["param_groups"]))


@pytest.mark.parametrize("steps", [0, 2])
def test_saving_changes_nothing(tmp_path, steps):
    """Not parameters, nor states or options of the base optimizer, also before the first step."""
    model, optimizer = alone(options={"weight_decay": 0.1, "betas": (0.0, 0.9)})
    for number in range(steps):
        t.window(optimizer, model, [number])
    before = bits(model, optimizer)
    t.TrainingState(model, optimizer).state_dict()
    assert same(before, bits(model, optimizer))
    assert model.unused not in optimizer.state


def test_options_that_a_step_adds_or_changes_are_taken_back():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                group["lr_tensor"].mul_(2)
            return super().step(closure)

    model = t.new_model()
    base = Counting(model.parameters(), lr=0.1)
    lr = base.param_groups[0]["lr_tensor"] = torch.tensor(1.0)
    t.TrainingState(model, t.GCondFused(base, t.TASKS)).state_dict()
    assert "step" not in base.param_groups[0]
    assert base.param_groups[0]["lr_tensor"] is lr
    assert lr == 1.0


def resumed(tmp_path, before, after, steps=2):
    """Both trained on from what `before` has saved: their parameters by name."""
    import torch.distributed.checkpoint as dcp

    model, optimizer = before
    for number in range(steps):
        t.window(optimizer, model, [number])
    dcp.save({"t": t.TrainingState(*before)}, checkpoint_id=str(tmp_path))
    dcp.load({"t": t.TrainingState(*after)}, checkpoint_id=str(tmp_path))
    for model, optimizer in (before, after):
        for number in range(steps, steps + 3):
            t.window(optimizer, model, [number])
    return t.parameters_of(before[0]), t.parameters_of(after[0])


def test_parameters_in_another_order(tmp_path):
    model, other = t.new_model(), t.new_model()
    adamw = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    reversed_adamw = torch.optim.AdamW(reversed(list(other.named_parameters())), lr=1e-2)
    before = model, t.GCondFused(adamw, t.TASKS, momentum=0.5)
    after = other, t.GCondFused(reversed_adamw, t.TASKS, momentum=0.5)
    ours, theirs = resumed(tmp_path, before, after)
    assert_close(ours, theirs, 1e-6)
    names = [name for name, _ in reversed(list(other.named_parameters()))]
    assert after[1].param_groups[0]["param_names"] == names


def test_a_parameter_without_state_has_none_after_loading(tmp_path):
    before, after = alone(), alone()
    resumed(tmp_path, before, after)
    assert after[0].unused not in after[1].state
    assert after[0].first.weight in after[1].state


def test_groups_with_and_without_momentum(tmp_path):
    def new():
        model = t.new_model()
        groups = [
            {"params": list(model.first.parameters()), "momentum": 0.9},
            {"params": [*model.norm.parameters(), *model.second.parameters()]},
        ]
        return model, t.GCondFused(torch.optim.SGD(groups, lr=0.1), t.TASKS)

    ours, theirs = resumed(tmp_path, new(), new())
    assert equal(ours, theirs)


def test_what_is_no_state_of_this_training(tmp_path):
    import torch.distributed.checkpoint as dcp

    model, optimizer = alone()
    with pytest.raises(TypeError, match="must be a GCondFused"):
        t.TrainingState(model, optimizer.base)
    with pytest.raises(ValueError, match="is no parameter of the model"):
        t.TrainingState(torch.nn.Linear(2, 2), optimizer)
    optimizer.accumulation_steps = 2
    optimizer.backward(t.losses_of(model, 0))
    with pytest.raises(RuntimeError, match="between windows"):
        t.TrainingState(model, optimizer).state_dict()
    optimizer.step()
    dcp.save({"t": t.TrainingState(model, optimizer)}, checkpoint_id=str(tmp_path))
    other = t.new_model()
    sgd = torch.optim.AdamW(other.named_parameters())
    tasks = {"a": 1.0, "b": 1.0, "d": 1.0}
    renamed = t.GCondFused(sgd, tasks, momentum=0.5)
    with pytest.raises(ValueError, match="the state has tasks"):
        dcp.load({"t": t.TrainingState(other, renamed)}, checkpoint_id=str(tmp_path))


PLAIN = {"method": t.GCond(tie_breaking_weights=(0.0, 1.0))}


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        ({"method": PCGrad()}, {"method": CAGrad()}, "method_name 'PCGrad', this .* 'CAGrad'"),
        ({"method": CAGrad()}, {"method": GradNorm()}, "method_name 'CAGrad', this .* 'GradNorm'"),
        ({"method": t.by_length}, {"method": PCGrad()}, "method_name 'Function', this .* 'PCGrad'"),
        ({}, {"method": PCGrad()}, "method_name 'GCond', this optimizer 'PCGrad'"),
        ({"granularity": "tensor"}, {}, "granularity 'tensor', this optimizer 'model'"),
        ({"method": t.GCond(dominance_window=2)}, {}, r"winners \[2\], this one \[3\]"),
        ({"share": 0.4}, {}, "the state has mask, this optimizer has no mask"),
        ({}, PLAIN, "the state has history, this optimizer has no history"),
        ({}, {"momentum": 0.0}, "the state has momentum, this optimizer has no momentum"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(tmp_path, saved, here, words):
    import torch.distributed.checkpoint as dcp

    for steps in (0, 1):
        model, optimizer = t.prepared(None, 1, net=t.Headed, **saved)
        for number in range(steps):
            t.window(optimizer, model, [number])
        folder = str(tmp_path / str(steps))
        dcp.save({"t": t.TrainingState(model, optimizer)}, checkpoint_id=folder)
        other = t.prepared(None, 1, net=t.Headed, **here)
        with pytest.raises(ValueError, match=words):
            dcp.load({"t": t.TrainingState(*other)}, checkpoint_id=folder)


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        ({}, {"share": 0.4}, r"Missing key .*\.gcond\.mask\."),
        ({}, {"granularity": "tensor"}, r"Missing key .*gcond\.method\.norm_ema"),
        (PLAIN, {}, r"Missing key .*gcond\.history\."),
    ],
)
def test_where_a_checkpoint_lacks_what_is_kept_torch_names_it(tmp_path, saved, here, words):
    import torch.distributed.checkpoint as dcp

    model, optimizer = t.prepared(None, 1, **saved)
    t.window(optimizer, model, [0])
    dcp.save({"t": t.TrainingState(model, optimizer)}, checkpoint_id=str(tmp_path))
    other = t.prepared(None, 1, **here)
    with pytest.raises(dcp.api.CheckpointException, match=words):
        dcp.load({"t": t.TrainingState(*other)}, checkpoint_id=str(tmp_path))


def by_name(optimizer):
    """What is kept of each parameter: state of the method, mask, who had a gradient of it."""
    storage, shared = optimizer._storage, optimizer.method.shared_state
    state = {k: v for k, v in optimizer._now.method_state.items() if k not in shared}
    return {
        segment.name: (
            {key: value[i] for key, value in state.items()},
            storage.mask_of(segment),
            storage.parameter_tasks[i],
            storage.was_shared[i],
            storage.momentum_steps[i],
        )
        for i, segment in enumerate(storage.segments)
    }


def test_what_is_kept_by_tensor_goes_with_its_tensor(tmp_path):
    """Also of a layer that was thawed since the last step, of which there is nothing yet."""
    import torch.distributed.checkpoint as dcp

    options = {"net": t.Headed, "granularity": "tensor", "base": torch.optim.Adam}
    model, optimizer = t.prepared(None, 1, share=0.4, **options)
    for p in model.second.parameters():
        p.requires_grad_(False)
    for number in range(2):
        t.window(optimizer, model, [number])
    for p in model.second.parameters():
        p.requires_grad_(True)
    other = t.new_model(net=t.Headed)
    turned = torch.optim.Adam(reversed(list(other.named_parameters())), lr=1e-2)
    mask = t.mask_of(other, 0.7)
    there = t.GCondFused(turned, t.TASKS, granularity="tensor", momentum=0.5, mask=mask)
    dcp.save({"t": t.TrainingState(model, optimizer)}, checkpoint_id=str(tmp_path))
    dcp.load({"t": t.TrainingState(other, there)}, checkpoint_id=str(tmp_path))
    kept, kept_there = by_name(optimizer), by_name(there)
    assert list(kept_there) == [name for name, _ in reversed(list(other.named_parameters()))]
    assert same(kept, {name: kept_there[name] for name in kept})
    owners, compared = kept["heads.b.weight"][2:4]
    assert (owners.tolist(), compared.item()) == ([False, True, False], 0)
    owners, compared = kept["second.weight"][2:4]
    assert (owners.tolist(), compared.item()) == ([False] * 3, -1)
    for pair in ((model, optimizer), (other, there)):
        for number in range(2, 5):
            t.window(pair[1], pair[0], [number])
    assert_close(t.parameters_of(model), t.parameters_of(other), 1e-6)

"""Many ranks: equal on all of them, equal to one process that sees all the data."""

import multiprocessing
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import training_ranks as t
from ranks import Ranks, start

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

OF_TWO = ("shard", "replicate", "fsdp", "tp")
OF_FOUR = {
    "shard": ("momentum", "clipped", "signs"),
    "fsdp": ("momentum", "signs"),
    "hsdp": ("clipped", "signs"),
    "tp": ("clipped", "signs"),
    "fsdp_tp": ("clipped", "signs"),
}
RUNS = [
    *((2, way, options) for way in OF_TWO for options in ("momentum", "clipped", "signs")),
    *((4, way, options) for way in OF_FOUR for options in OF_FOUR[way]),
]


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


@pytest.fixture(scope="module")
def ranks(ranks2, ranks4):
    return {2: ranks2, 4: ranks4}


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
    "plain": {"momentum": 0.0, "harvest": "whole"},
    "momentum": {},
    "clipped": {"max_norm": 0.5},
    "signs": {
        "update": "lion_lars",
        "trust_ratio_coef": 1e-3,
        "trust_ratio_clip": 3.0,
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
    said = ranks[size](t.train, way, options)
    assert_all_ranks_alike(said)
    parameters, decisions = said[0]
    alone, decisions_alone = t.train_alone(t.data_rank(way, 0, size)[1], options)
    assert_close(parameters, alone)
    assert [d[2] for d in decisions] == [d[2] for d in decisions_alone]  # the winners
    assert sum(len(conflicts) for _, conflicts, *_ in decisions) >= t.STEPS  # there is something
    for ours, theirs in zip(decisions, decisions_alone, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-3, abs=1e-3)  # the weights
        assert ours[4] == pytest.approx(theirs[4], rel=1e-3)  # the norm


@pytest.mark.parametrize("options", ["plain", "resolved", "stochastic"])
@pytest.mark.parametrize("way", ["shard", "replicate", "fsdp"])
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


@pytest.mark.parametrize("options", ["plain", "clipped", "signs"])
def test_local_decisions_are_each_ranks_own_and_the_results_averaged(ranks2, options):
    options = OPTIONS[options]
    said = ranks2(t.train, "local", options)
    assert equal(said[0][0], said[1][0])
    assert said[0][1] != said[1][1]
    assert_close(said[0][0], t.train_local(2, options))


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
    per_rank = [(0, 3), (3, 3)]
    for way in ("shard", "local"):
        said = ranks2(t.short_windows, way, per_rank)
        assert equal(said[0][0], said[1][0])


@pytest.mark.parametrize("way", ["shard", "replicate", "local", "fsdp"])
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


@pytest.mark.parametrize("way", ["shard", "replicate", "local"])
def test_a_parameter_that_one_rank_uses_has_a_gradient_on_all(ranks2, way):
    said = ranks2(t.unlike_paths, way)
    assert said[0][0] == said[1][0]
    assert equal(said[0][1], said[1][1])
    main, side, never = [True, True], [True, True], [False, False]
    first, second, third = said[0][0]
    assert second == [*main, *side, *never]
    assert first == third == [*main, False, False, *never]


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_a_task_that_fails_when_others_are_on_their_way(ranks2, way):
    with_mistake = ranks2(t.failing_last_task, way, True)
    assert equal(with_mistake[0][0], with_mistake[1][0])
    assert with_mistake[0][1] == with_mistake[1][1] == {"a": 4, "b": 4, "c": 3}
    assert with_mistake[0][2] == []
    assert with_mistake[1][2][0] == "no such luck"
    assert "is full: call step()" in with_mistake[1][2][1]
    without = ranks2(t.failing_last_task, way, False)
    assert without[0][1] == {"a": 4, "b": 4, "c": 4}
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
    sent, row, kept = ranks[size](t.traffic_of, "shard", {})[0]
    share = (size - 1) / size
    assert sent[t.REDUCE_SCATTER] == [4 * row * share] * K
    assert sent[t.ALL_GATHER][-1] == 4 * row * share
    assert kept == [[K, row // size], [row // size]]
    small = sent[t.ALL_GATHER][:-1] + sent["all_reduce"]
    assert len(small) == 3
    assert sum(small) < 4 * row

    sent, row, kept = ranks[size](t.traffic_of, "replicate", {})[0]
    assert sent["all_reduce"][-K:] == [2 * 4 * row * share] * K
    assert t.REDUCE_SCATTER not in sent
    assert len(sent["all_reduce"]) == K + 1
    assert kept == [[K, row], [row]]

    sent, row, _ = ranks[size](t.traffic_of, "local", {})[0]
    assert sent["all_reduce"][-1] == 2 * 4 * row * share
    assert len(sent["all_reduce"]) == 2


def test_the_result_travels_in_the_type_of_the_gradients(ranks2):
    sent, row, _ = ranks2(t.traffic_of, "shard", {"dtype": torch.bfloat16})[0]
    assert sent[t.ALL_GATHER][-1] == 2 * row / 2


def test_rows_are_sent_while_the_next_task_runs(ranks2):
    """Not in the first window, before which the ranks have not compared their parameters."""
    assert ranks2(t.when_rows_are_sent, "replicate", "exact")[0] == [0, 0, 0, 0, 0, 3]
    assert ranks2(t.when_rows_are_sent, "replicate", "stochastic")[0] == [0, 0, 0, 1, 2, 3]
    # A shard goes where a row was that must have arrived: else it is sent later.
    *before, last = ranks2(t.when_rows_are_sent, "shard", "exact")[0]
    assert before == [0, 0, 0, 0, 0]
    assert last >= 1


# What wraps the model.


def test_buffers_are_those_of_rank_0_and_the_wrapper_is_told_nothing_for_good(ranks2):
    (ours, told), (theirs, _) = ranks2(t.batchnorm)
    assert equal(ours, theirs)
    assert told == [True, False, False, True]


@pytest.mark.parametrize("harvest", ["bucketed", "whole"])
def test_data_parallel_that_the_optimizer_was_not_told_of(ranks2, harvest):
    said = ranks2(t.untold, harvest, False)
    assert equal(said[0], said[1])
    alone = t.train_alone(2, {}, None, 5)[0]
    del alone["unused"]
    assert_close(said[0], alone)


def test_where_it_fails_by_that_the_error_says_so(ranks2):
    for said in ranks2(t.untold, "whole", True):
        assert "give GCondFused(..., module=model)" in said


MISTAKES = {
    "other weights": "RuntimeError: first.weight of rank 1 is not that of rank 0",
    "weights in another order": "RuntimeError: first.weight of rank 1 is not that of rank 0",
    "a layer left alone": r"RuntimeError: rank 1 and rank 0 hold the same part of last.weight",
    "two trainings in one": "RuntimeError: rank 1 and rank 0 hold the same part of .*process_group",
    "gradients kept": "RuntimeError: the backward pass left no gradient on any sharded parameter",
    "not the wrapped model": "RuntimeError: the gradient of .* was put back .*as module=",
    "state of one rank": r"RuntimeError: rank 1 has resolutions so far=1, rank 0 .*=2",
    "thawed on one rank": "RuntimeError: rank 1 has .*parameters that require a gradient, rank 0",
    "other rate": r"RuntimeError: rank 1 has options of base=.*'lr': 0.5",
    "other setting": "RuntimeError: rank 1 has max_norm=2.0, rank 0 max_norm=None",
    "other shape": r"RuntimeError: rank 1 has last.weight shape \[4, 5\] .*, rank 0 last.weight",
    "one parameter more": "RuntimeError: rank 1 has .*, rank 0 ",
    "other on_nonfinite": "RuntimeError: the ranks differ in on_nonfinite",
    "sync of DTensors": "ValueError: sync='shard' is for parameters that every rank holds whole",
    "not all parameters": "ValueError: module: module.unused is in no parameter group",
    "static graph": "ValueError: module: DistributedDataParallel.static_graph=True",
    "nothing anywhere": "RuntimeError: nothing was accumulated on any of the 2 ranks",
    "saved in a window": "RuntimeError: with several ranks a state is saved between windows",
    "copied": "RuntimeError: an optimizer that is one of several ranks cannot be copied",
    "late parameter": "RuntimeError: late is new, and the other ranks have a part of this window",
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_on_every_rank(ranks2, kind):
    for said in ranks2(t.mistake, kind):
        assert re.match(MISTAKES[kind], said), said


# Checkpoints.


@pytest.mark.parametrize("way", ["shard", "replicate", "local", "fsdp"])
def test_every_ranks_own_state_goes_on_to_the_same_bits(ranks2, tmp_path, way):
    assert ranks2(t.state_of_rank, way, str(tmp_path), "each") == [True, True]


@pytest.mark.parametrize("way", ["shard", "replicate", "local"])
def test_a_state_of_fewer_parameters_than_there_are_now(ranks2, way):
    for straight, reloaded in ranks2(t.loaded_early_and_late, way):
        assert equal(straight, reloaded)


@pytest.mark.parametrize("way", ["shard", "replicate"])
def test_the_state_of_rank_0_for_all(ranks2, tmp_path, way):
    said = ranks2(t.state_of_rank, way, str(tmp_path), "first")
    if way == "replicate":
        assert said == [True, True]
    else:
        assert said[0] == said[1]
        assert said[0][0] is None
        assert "the state is that of rank 0 of 2 (shard) alone, and this is rank 1" in said[0][1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("shard", 2), ("shard", 4)),
        (("shard", 4), ("shard", 2)),
        (("shard", 4), (None, 1)),
        ((None, 1), ("shard", 4)),
        (("replicate", 2), ("shard", 4)),
        (("fsdp", 4), ("fsdp", 2)),
        (("hsdp", 4), ("fsdp", 2)),
        (("fsdp", 2), ("fsdp_tp", 4)),
        (("fsdp_tp", 4), ("tp", 2)),
        (("shard", 4), ("fsdp", 2)),
        (("hsdp", 4), ("shard", 2)),
    ],
)
def test_a_checkpoint_resumes_on_another_number_of_ranks(ranks, tmp_path, before, after):
    def run(way, size, *args):
        train = [t.trained_on(way, *args)] if way is None else ranks[size](t.trained_on, way, *args)
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


@pytest.mark.parametrize(("how", "seconds"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 5)])
def test_a_rank_killed_or_stuck_in_a_window(ranks4, tmp_path, how, seconds):
    """The others end with an error within the timeout, and the last checkpoint resumes."""
    saved = tmp_path / "saved"
    arguments = (str(tmp_path / "store"), str(saved), how, timedelta(seconds=seconds))
    processes = start(2, t.doomed, lambda rank: arguments)
    other, hit = processes
    started = time.monotonic()
    other.join(100)
    ended, took = other.exitcode, time.monotonic() - started
    for process in processes:
        process.kill()
        process.join()
    assert ended == 1
    assert took < 40 + (seconds if how == signal.SIGSTOP else 0)  # most of it is the start
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
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 9])
def test_shards_of_any_number_of_tasks_add_up(ranks, size, K, dtype):
    assert ranks[size](t.tasks_in_all_numbers, K, dtype) == [None] * size


@pytest.mark.parametrize("options", [{}, {"update": "lion_lars", "trust_ratio_clip": 3.0}])
@pytest.mark.parametrize("way", ["shard", "replicate", "local"])
def test_all_sorts_of_parameters(ranks2, way, options):
    ours, others = ranks2(t.mixed, way, options)
    assert equal(ours, others)
    if way != "local":
        # bfloat16 parameters keep 8 bits: a rounding that falls to the other side shows.
        assert_close(ours, t.mixed(None, options), atol=2e-2)


@pytest.mark.parametrize(("size", "way"), [(1, None), (2, "shard"), (2, "replicate"), (4, "shard")])
def test_a_checkpoint_of_all_sorts_of_parameters(ranks, tmp_path, size, way):
    """Scalars, channels-last weights and two types come back to the bit."""

    def run(*args):
        return [t.mixed(way, *args)] if way is None else ranks[size](t.mixed, way, *args)

    assert equal(run({}, str(tmp_path))[0], run({})[0])


def test_an_optimizer_that_is_older_than_the_process_group(ranks2):
    for said in ranks2(t.knows_no_ranks):
        assert "make it after init_process_group" in said


@pytest.mark.parametrize("way", ["shard", "fsdp"])
def test_what_was_frozen_since_it_was_saved_is_left_out(ranks2, tmp_path, way):
    """Both with `save` and with `async_save`, which copies what it is given."""
    for of_rank in ranks2(t.frozen_since, way, str(tmp_path)):
        for straight, resumed in of_rank:
            assert_close(resumed, straight)


def test_two_parameters_of_one_name_are_no_checkpoint():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Linear(2, 2)
            self.weight = torch.nn.Parameter(torch.ones(2))

    model = Module()
    with pytest.raises(ValueError, match="more than one parameter called weight"):
        t.TrainingState(model, t.new_optimizer(model, base=torch.optim.SGD))


def test_narrow_rows_do_not_narrow_the_gradients_of_others(ranks2):
    alone = t.narrow_rows_of_mixed_parameters(None)
    for gradients in ranks2(t.narrow_rows_of_mixed_parameters, "shard"):
        for ours, theirs in zip(gradients, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)

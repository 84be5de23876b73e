"""The experiments: they run and write what they should, and their statistics are right."""

import importlib
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import experiments
from bench.experiments import (
    a_stability,
    b_thresholds,
    c_precision,
    common,
    d_modes,
    e_smoothing,
    f_dominance,
    g_optimizers,
    runs,
)
from examples.demo import training
from gcond_kernels import GCond, GCondFused
from gcond_kernels.methods import Sum
from tests.conftest import slow

SCRIPTS = (
    a_stability,
    b_thresholds,
    c_precision,
    d_modes,
    e_smoothing,
    f_dominance,
    g_optimizers,
)


@pytest.fixture
def small(monkeypatch):
    """One process, this one, and short windows."""
    monkeypatch.setattr(runs, "processes", lambda: 1)
    monkeypatch.setattr(a_stability, "LARGE_WINDOWS", 2)
    monkeypatch.setattr(c_precision, "WINDOWS", (4, 8))
    monkeypatch.setitem(c_precision.VARIANTS, "digits", c_precision.variants({4: 1.0, 8: 0.5}))
    for script in (b_thresholds, e_smoothing, f_dominance):
        few = script.VARIANTS["digits"][:4]
        monkeypatch.setitem(script.VARIANTS, "digits", few)


def run(script, output):
    options = ["--seeds", "1", "--steps", "2", "--scene", "digits", "--output", str(output)]
    assert script.main(options) == 0
    files = [output / f"{script.NAME}{suffix}" for suffix in (".json", ".md", ".png")]
    assert sorted(files) == sorted(output.iterdir())
    return json.loads(files[0].read_text(encoding="utf-8")), files[1].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "script", [SCRIPTS[2], *map(slow, SCRIPTS[:2] + SCRIPTS[3:])], ids=lambda script: script.NAME
)
def test_every_experiment_writes_figures_tables_and_a_picture(script, small, tmp_path):
    results, text = run(script, tmp_path)
    assert len(results["runs"]) == results["planned_runs"] > 0
    assert results["machine"]["torch"] == torch.__version__
    assert {record["seed"] for record in results["runs"]} == {0}
    assert text.startswith("# ")
    assert f"]({script.NAME}.png)" in text
    for heading in ("## digits", "| :-- |"):
        assert heading in text
    for record in results["runs"]:
        if "scores" in record:
            assert f"{100.0 * record['scores']['left']:.2f}" in text


def test_an_experiment_by_the_command_line():
    command = [sys.executable, "-m", "bench", "experiments", "d", "--seeds", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 2
    assert "error: --seeds and --steps must be 1 or more" in ended.stderr


def test_jobs_go_to_other_processes_whole(tmp_path):
    """Those with options that pickle has to know, such as a dtype."""
    options = common.parse("An experiment.", ["--seeds", "2", "--output", str(tmp_path)])
    for script in SCRIPTS[1:]:
        jobs = common.trainings(options, script.VARIANTS)
        assert pickle.loads(pickle.dumps(jobs)) == jobs
        per_seed = len(script.VARIANTS["photos"]) + len(script.VARIANTS["digits"])
        assert len(jobs) == 2 * per_seed


def test_all_of_them_one_after_another(monkeypatch):
    started = []

    class Script:
        def __init__(self, name):
            self.name = name.rpartition(".")[2]

        def main(self, given):
            started.append((self.name, given))
            return 130 if len(started) == 7 else 0

    monkeypatch.setattr(importlib, "import_module", Script)
    assert experiments.main(["--seeds", "1"]) == 130
    assert started == [(script.NAME, ["--seeds", "1"]) for script in SCRIPTS]


def test_only_whole_seeds_are_compared():
    def entries(*places):
        return [{"scene": scene, "seed": seed} for scene, seed in places]

    jobs = [
        common.Training(seed, scene, 1, None)
        for seed in (0, 1)
        for scene in ("photos", "digits") * 2
    ]
    records = entries(("digits", 1), ("digits", 0), ("photos", 0), ("digits", 1), ("digits", 0))
    whole = common.whole_seeds(records, jobs)
    assert whole == entries(("digits", 0), ("digits", 0), ("digits", 1), ("digits", 1))


# Statistics.


def windows_around(mean, noise, count=5, size=20):
    """[R, N] around a mean along the first axis, with noise of one length along axes of its own."""
    found = torch.zeros(count, size)
    found[:, 0] = mean
    found[torch.arange(count), torch.arange(count) + 1] = noise
    return found


def test_variance_and_direction_of_known_windows():
    windows = windows_around(mean=2.0, noise=3.0)
    found = a_stability.spread((windows @ windows.T).double())
    assert found.signal == pytest.approx(4.0)
    assert found.variance == pytest.approx(9.0)
    assert found.cosine == pytest.approx(4.0 / 13.0)


def test_the_variance_of_a_mean_is_one_over_its_size():
    generator = torch.Generator().manual_seed(0)
    mean = torch.ones(2, 3000) / math.sqrt(3000)

    def gradients():
        return mean + torch.randn(2, 3000, generator=generator) / math.sqrt(3000)

    windows = a_stability.gather(gradients)
    assert {size: len(found) for size, found in windows.items()} == {1: 48, 8: 30, 24: 10}
    sizes = a_stability.measure(windows, ["one", "other"])["sizes"]
    for size in (1, 8, 24):
        told = sizes[str(size)]
        assert told["variance"]["one"] * size == pytest.approx(1.0, rel=0.1)
        assert told["relative_variance"]["other"] * size == pytest.approx(1.0, rel=0.1)
        assert told["cosine_of_windows"]["one"] == pytest.approx(size / (size + 1), abs=0.05)


def test_windows_of_all_sizes_are_of_the_same_micro_batches():
    numbers = iter(range(10_000))
    windows = a_stability.gather(lambda: torch.full((2, 1), float(next(numbers))))
    assert windows[1][:3, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert windows[8][1, 0, 0] == sum(range(8, 16)) / 8
    assert windows[24][1, 0, 0] == sum(range(24, 48)) / 24


def test_the_cosine_of_tasks_with_and_without_common_noise():
    """Orthogonal means; the noise is the same for both: it looks like agreement."""
    one = windows_around(mean=1.0, noise=2.0)
    other = windows_around(mean=0.0, noise=2.0)
    other[:, -1] = 1.0
    products = a_stability.inner_products(torch.stack([one, other], 1))
    same, apart = a_stability.task_cosines(products)
    assert same == pytest.approx([4.0 / 5.0] * 5)
    assert apart == pytest.approx([0.0] * 20)
    assert a_stability.expected_cosine(products) == pytest.approx(0.0)


def test_the_expected_cosine_knows_no_noise():
    one, other = windows_around(mean=1.0, noise=2.0), windows_around(mean=-3.0, noise=2.0)
    products = a_stability.inner_products(torch.stack([one, other], 1))
    assert a_stability.expected_cosine(products) == pytest.approx(-1.0)
    same, _ = a_stability.task_cosines(products)
    assert same == pytest.approx([(4.0 - 3.0) / math.sqrt(5.0 * 13.0)] * 5)


def test_a_mean_that_is_lost_in_noise_has_no_cosine():
    one = torch.tensor([[1.0], [-1.0]])  # a negative estimate of the squared length
    products = a_stability.inner_products(torch.stack([one, one], 1))
    assert a_stability.spread(products[:, 0, :, 0]).signal < 0.0
    assert a_stability.expected_cosine(products) is None


def test_cosines_are_told_with_their_share_below_zero():
    told = a_stability.told_cosines([-0.1, 0.0, 0.1, 0.4])
    assert told["mean"] == pytest.approx(0.1)
    assert told["conflicts"] == 0.25


def test_means_over_seeds():
    found = a_stability.over_seeds([1.0, None, 3.0])
    assert (found.mean, found.low, found.high, found.error) == (2.0, 1.0, 3.0, 1.0)
    assert a_stability.over_seeds([None]) is None
    assert a_stability.cell([-1.0, -3.0]) == "−2.00 ± 1.00"


@pytest.mark.parametrize(("stochastic", "micro_batches"), [(False, 4), (True, 4), (True, 5)])
def test_accumulated_task_gradients_are_those_of_the_optimizer(stochastic, micro_batches):
    scene = common.with_micro_batches(runs.scene_of("digits"), micro_batches)
    run = training.new_run(scene, d_modes.Variant, 1, 0, common.CPU)
    found = common.window_gradients(
        run.model, scene, torch.Generator().manual_seed(1), stochastic
    ).sum(0)
    optimizer = GCondFused(
        torch.optim.SGD(run.model.parameters(), lr=1.0),
        scene.tasks,
        accumulation_steps=micro_batches,
        mode="stochastic" if stochastic else "exact",
        method=Sum(),
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(micro_batches):
        batch = scene.micro_batch(generator)
        optimizer.backward(training.task_losses(run, batch, optimizer.active_tasks))
    written = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    assert torch.allclose(found, written, rtol=1e-4, atol=1e-7)


def recorded(gradients):
    """A recording of task gradients [T, K, N]."""
    wide = torch.as_tensor(gradients, dtype=torch.float64)
    before = torch.cat([torch.zeros_like(wide[:1]), wide[:-1]])
    return common.Recorded(wide @ wide.mT, wide @ before.mT, [])


def test_a_replay_resolves_every_step():
    agree, oppose = [[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [-2.0, 0.0]]
    found = common.replay(recorded([agree, oppose]), GCond())
    assert found.cosines == pytest.approx([math.sqrt(0.5), -1.0])
    assert len(found.winners) == 1
    assert found.weights[0].tolist() == [1.0, 1.0]
    winner = found.winners[0]
    left = [1.0, 2.0][winner]  # the other's gradient is projected away; the sum has length 1
    assert found.changes == pytest.approx([0.0, abs(left - [-1.0, 1.0][winner])])


def test_a_dominance_window_of_one_makes_winners_alternate():
    oppose = [[1.0, 0.0], [-3.0, 1.0]]
    steps = recorded([oppose] * 6)
    free = common.replay(steps, GCond(dominance_window=0, thresholds=(0.0, 0.0, 0.0)))
    bound = common.replay(steps, GCond(dominance_window=1, thresholds=(0.0, 0.0, 0.0)))
    assert common.longest_streak(free.winners) == 6
    assert common.longest_streak(bound.winners) == 1


def test_recorded_products_are_of_successive_steps():
    scene = common.with_micro_batches(runs.scene_of("digits"), 1)
    found = common.record_gradients(scene, 2, 0)
    steps = [g.double() for _, g in common.plain_training(scene, 2, 0)]
    assert torch.allclose(found.gramians[1], steps[1] @ steps[1].T)
    assert torch.allclose(found.crosses[1], steps[1] @ steps[0].T)
    assert not found.crosses[0].any()
    assert len(found.by_tensor) == 2 * 6  # the heads' tensors have no gradient of the other task


def test_streaks_and_winners():
    assert common.longest_streak([]) == 0
    assert common.longest_streak("abbbaab") == 3
    told = common.winners_told(["left", None, "left", "right"], runs.scene_of("digits"))
    assert told == {"conflicts": 3, "won": {"left": 2, "right": 1}, "longest_streak": 2}


def test_zones_by_thresholds():
    shares = b_thresholds.shares([0.5, -0.1, -0.6, -0.9], (-0.8, -0.5, 0.0))
    assert shares == {"none": 0.25, "mild": 0.25, "moderate": 0.25, "critical": 0.25}


def test_the_change_of_weights_is_a_length():
    gramians = recorded([[[3.0, 0.0], [0.0, 4.0]]]).gramians
    assert b_thresholds.change(gramians, torch.tensor([[0.0, 1.0]])) == pytest.approx(0.8)


def test_a_bfloat16_accumulator_stands_still(monkeypatch):
    """At 256 the next number is 258: 1 is half of the way and is rounded to even, down."""
    monkeypatch.setattr(c_precision, "WINDOWS", (300,))
    ones = (torch.ones(2, 8) for _ in range(300))
    found = c_precision.accumulate(ones, ["one", "other"])["300"]
    assert found["float32"]["relative_error"] == {"one": 0.0, "other": 0.0}
    assert found["bfloat16"]["relative_error"]["one"] == pytest.approx(44.0 / 300.0)


def test_the_smallest_loss_chooses_the_rate_and_one_that_diverged_does_not():
    def tried(rate, left):
        losses = {"left": left, "right": 1.0}
        return {"scene": "digits", "method": "m", "learning_rate": rate, "losses": losses}

    found = g_optimizers.chosen([tried(1.0, math.nan), tried(0.1, 0.5), tried(0.01, 0.7)])
    assert found == {("digits", "m"): 0.1}


def test_differences_are_to_the_variant_s_own_baseline():
    variants = [common.Variant("a", "A"), common.Variant("b", "B", baseline="a")]
    records = [
        {"scene": "photos", "method": key, "seed": seed, "scores": {"L1": value, "SSIM": 0.5}}
        for key, values in (("a", (0.1, 0.2)), ("b", (0.3, 0.5)))
        for seed, value in enumerate(values)
    ]
    table = common.score_table(records, "photos", variants, {})
    assert "| A | 0.1500 ± 0.0707 |  | 0.5000 ± 0.0000 |  |" in table
    assert (
        "| B | 0.4000 ± 0.1414 | +0.2500 ± 0.0500 | 0.5000 ± 0.0000 | +0.0000 ± 0.0000 |" in table
    )
    said = common.beyond_sentence(records, "photos", variants)
    assert "are 1 of 2 differences: B (+0.2500 in L1)" in said

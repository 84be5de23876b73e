"""The experiments: they run and write what they should, and their statistics are right."""

import importlib
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import experiments, record
from bench.experiments import (
    a_stability,
    b_thresholds,
    c_precision,
    common,
    e_smoothing,
    f_dominance,
    g_optimizers,
    h_methods,
    i_physics,
    tables,
    training,
)
from examples.demo import training as demo_training
from examples.demo.methods import PLAIN
from examples.demo.scenes import reweighted
from gcond_kernels import GCond, GCondFused
from gcond_kernels.methods import Sum
from tests.conftest import slow

ROOT = Path(__file__).parents[2]
EXPERIMENTS = [
    importlib.import_module(f"bench.experiments.{name}").EXPERIMENT for name in experiments.NAMES
]
# The package conflictfree may be missing here.
EXPERIMENTS[-1] = EXPERIMENTS[-1]._replace(check=lambda _: None)
NAMED = {"ids": lambda experiment: getattr(experiment, "name", None)}


@pytest.fixture
def small(monkeypatch):
    """One process, this one, and short windows."""
    monkeypatch.setattr(common, "processes", lambda: 1)
    monkeypatch.setattr(a_stability, "LARGE_WINDOWS", 2)
    monkeypatch.setattr(c_precision, "WINDOWS", (4, 8))
    monkeypatch.setitem(c_precision.VARIANTS, "digits", c_precision.variants({4: 1.0, 8: 0.5}))
    for module in (b_thresholds, e_smoothing, f_dominance):
        monkeypatch.setitem(module.VARIANTS, "digits", module.VARIANTS["digits"][:4])
    monkeypatch.setattr(h_methods, "VARIANTS", h_methods.VARIANTS[:4])
    few = i_physics.variants_of("kovasznay")[:4]
    monkeypatch.setattr(i_physics, "variants_of", lambda _: few)


@pytest.mark.parametrize(
    "experiment", [EXPERIMENTS[2], *map(slow, EXPERIMENTS[:2] + EXPERIMENTS[3:])], **NAMED
)
@pytest.mark.usefixtures("small")
def test_every_experiment_writes_a_record_tables_and_a_picture(experiment, tmp_path):
    scene = "digits" if "digits" in experiment.steps else "kovasznay"
    options = ["--seeds", "1", "--steps", "2", "--scene", scene, "--output", str(tmp_path)]
    assert common.run(experiment, options) == 0
    files = [tmp_path / f"{experiment.name}{suffix}" for suffix in (".json", ".md", ".png")]
    assert sorted(files) == sorted(tmp_path.iterdir())
    written, text = record.read(files[0]), files[1].read_text(encoding="utf-8")
    assert [len(written["figures"])] == written["settings"]["planned"][scene] != [0]
    (about,) = written["runs"].values()
    assert about["machine"]["torch"] == torch.__version__
    assert {found["seed"] for found in written["figures"]} == {0}
    assert text.startswith("# ")
    for part in (f"]({experiment.name}.png)", f"## {scene}", "| :-- |"):
        assert part in text
    for found in written["figures"]:
        if scene == "digits" and "scores" in found:
            assert f"{100.0 * found['scores']['left']:.2f}" in text


@pytest.mark.parametrize("experiment", EXPERIMENTS, **NAMED)
def test_the_tables_are_those_of_the_record(experiment):
    result = record.read(common.RESULTS / f"{experiment.name}.json")
    result["figures"] = common.shown(experiment, result)
    recorded = (common.RESULTS / f"{experiment.name}.md").read_text(encoding="utf-8")
    assert common.document(experiment, result) == recorded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["d", "--seeds", "0"], "error: --seeds and --steps must be 1 or more"),
        (["h", "--methods", "Adam"], "there is no method 'Adam'"),
        (["g", "--scene", "photos"], "argument --scene: invalid choice: 'photos'"),
        (["z"], "'z' is none of: a_stability, b_thresholds"),
    ],
)
def test_bad_options_are_named(options, message):
    command = [sys.executable, "-m", "bench", "experiments", *options]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert message in ended.stderr


@pytest.mark.slow
def test_methods_are_chosen_by_their_names(tmp_path):
    options = ["--steps", "2", "--seeds", "1", "--scene", "digits", "--methods", "mgda"]
    command = [sys.executable, "-m", "bench", "experiments", "h", *options, "--output", tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    figures = record.read(tmp_path / "h_methods.json")["figures"]
    assert {found["method"] for found in figures} == {"plain", "mgda"}
    text = (tmp_path / "h_methods.md").read_text(encoding="utf-8")
    for part in ("| plain sum |", "| MGDA |", "single seed"):
        assert part in text


def test_jobs_can_be_sent_to_other_processes(tmp_path):
    """Those with options that pickle has to know, such as a dtype."""
    for experiment in EXPERIMENTS:
        if experiment.name == "g_optimizers":  # which trains before it has jobs
            continue
        options = common.parse(experiment, ["--seeds", "2", "--output", str(tmp_path)])
        jobs = common.plan(experiment, options)
        assert pickle.loads(pickle.dumps(jobs)) == jobs
        assert {job.seed for job in jobs} == {0, 1}


def test_all_run_one_after_another_until_one_fails(monkeypatch):
    started = []

    def run(experiment, given):
        started.append((experiment.name, given))
        return 130 if len(started) == 7 else 0

    monkeypatch.setattr(common, "run", run)
    assert experiments.main(["--seeds", "1"]) == 130
    assert started == [(name, ["--seeds", "1"]) for name in experiments.NAMES[:7]]


def test_only_complete_seeds_are_compared():
    def entries(*places):
        return [{"scene": scene, "seed": seed} for scene, seed in places]

    planned = {"photos": [2, 2], "digits": [2, 2]}
    records = entries(("digits", 1), ("digits", 0), ("photos", 0), ("digits", 1), ("digits", 0))
    result = {"figures": records, "settings": {"planned": planned}}
    complete = entries(("digits", 0), ("digits", 0), ("digits", 1), ("digits", 1))
    assert common.shown(EXPERIMENTS[0], result) == complete
    unpaired = common.shown(EXPERIMENTS[0]._replace(paired=False), result)
    assert len(unpaired) == len(records)


def counted(job):
    """Stand in for a measurement; its value is the number of its call."""
    counted.calls += 1
    return {"method": repr(job.subject), "value": counted.calls}


def jobs_of_subjects(options, scene, seed):
    return [
        common.Job(seed, scene, options.steps_of[scene], counted, subject)
        for subject in options.subjects
    ]


@pytest.fixture
def counting(monkeypatch, tmp_path):
    """A function that runs an experiment and returns the values by scene, seed and subject."""
    monkeypatch.setattr(common, "processes", lambda: 1)
    monkeypatch.setattr(common, "show", lambda *_: False)
    counted.calls = 0

    def run(*given):
        experiment = EXPERIMENTS[0]._replace(
            jobs=jobs_of_subjects,
            add_arguments=lambda parser: parser.add_argument("--subjects", nargs="+"),
        )
        assert common.run(experiment, [*given, "--output", str(tmp_path)]) == 0
        result = record.read(tmp_path / f"{experiment.name}.json")
        assert {found["run"] for found in result["figures"]} == set(result["runs"])
        return {(r["scene"], r["seed"], r["method"]): r["value"] for r in result["figures"]}

    return run


def test_a_resumed_experiment_keeps_what_would_be_the_same_and_does_the_rest(counting):
    digits = ["--scene", "digits", "--steps", "5", "--subjects"]
    counting(*digits, "one", "changed", "--seeds", "1")
    found = counting(*digits, "one", "other", "--seeds", "2", "--resume")
    places = {place[1:]: value for place, value in found.items()}
    assert places == {(0, "'one'"): 1, (0, "'other'"): 3, (1, "'one'"): 4, (1, "'other'"): 5}
    more_steps = counting("--steps", "6", *digits[:2], "--subjects", "one", "--resume")
    assert min(more_steps.values()) == 6


def test_other_scenes_of_a_record_stay(counting):
    counting("--scene", "photos", "--subjects", "one", "--seeds", "1")
    counting("--scene", "digits", "--subjects", "one", "--seeds", "1")
    found = counting("--scene", "digits", "--subjects", "one", "--seeds", "1")
    assert found == {("photos", 0, "'one'"): 1, ("digits", 0, "'one'"): 3}


def test_the_document_names_the_run_of_each_scene():
    machine = {"device": "some"}
    runs = {
        date: {"command": f"{scene} alone", "machine": machine}
        for date, scene in (("1st", "photos"), ("2nd", "digits"))
    }
    figures = [{"scene": "photos", "run": "1st"}, {"scene": "digits", "run": "2nd"}]
    lines = [
        "photos: `photos alone`, 1st; device some.",
        "digits: `digits alone`, 2nd; device some.",
    ]
    assert common.made_by({"runs": runs, "figures": figures}) == lines
    assert common.made_by({"runs": runs, "figures": figures[:1]}) == [lines[0][8:]]


# Statistics.


def windows_around(mean, noise, count=5, size=20):
    """[R, N] around a mean along the first axis, with noise of one length along axes of its own."""
    found = torch.zeros(count, size)
    found[:, 0] = mean
    found[torch.arange(count), torch.arange(count) + 1] = noise
    return found


def test_variance_and_direction_of_known_windows():
    windows = windows_around(mean=2.0, noise=3.0)
    found = a_stability.estimates((windows @ windows.T).double())
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


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (windows_around(1.0, 2.0), windows_around(-3.0, 2.0), -1.0),
        (*[torch.tensor([[1.0], [-1.0]])] * 2, None),  # the estimate of the squared norm is < 0
    ],
    ids=["opposite means", "no mean"],
)
def test_the_expected_cosine_is_that_of_the_means_without_noise(one, other, expected):
    products = a_stability.inner_products(torch.stack([one, other], 1))
    found = a_stability.expected_cosine(products)
    assert found == (None if expected is None else pytest.approx(expected))


def test_distributions_and_means_over_seeds():
    found = a_stability.distribution([-0.1, 0.0, 0.1, 0.4])
    assert found["mean"] == pytest.approx(0.1)
    assert found["conflicts"] == 0.25
    assert a_stability.cell([-1.0, None, -3.0]) == "−2.00 ± 1.00"
    assert a_stability.cell([4.0]) == "4.00"
    assert a_stability.cell([None]) == ""


@pytest.mark.parametrize(("stochastic", "micro_batches"), [(False, 4), (True, 4), (True, 5)])
def test_accumulated_task_gradients_are_those_of_the_optimizer(stochastic, micro_batches):
    scene = training.with_micro_batches(common.scene_of("digits"), micro_batches)
    run = demo_training.new_run(scene, PLAIN, 1, 0, training.CPU)
    found = training.window_gradients(
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
        optimizer.backward(demo_training.task_losses(run, batch, optimizer.active_tasks))
    written = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    assert torch.allclose(found, written, rtol=1e-4, atol=1e-7)


def recorded(gradients):
    """A recording of task gradients [T, K, N]."""
    wide = torch.as_tensor(gradients, dtype=torch.float64)
    before = torch.cat([torch.zeros_like(wide[:1]), wide[:-1]])
    return training.Recorded(wide @ wide.mT, wide @ before.mT, [])


def test_a_replay_resolves_every_step():
    agree, oppose = [[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [-2.0, 0.0]]
    found = training.replay(recorded([agree, oppose]), GCond())
    assert found.cosines == pytest.approx([math.sqrt(0.5), -1.0])
    assert len(found.winners) == 1
    assert found.weights[0].tolist() == [1.0, 1.0]
    winner = found.winners[0]
    left = [1.0, 2.0][winner]  # the other's gradient is projected away; the sum has length 1
    assert found.changes == pytest.approx([0.0, abs(left - [-1.0, 1.0][winner])])


def test_a_dominance_window_of_one_makes_winners_alternate():
    oppose = [[1.0, 0.0], [-3.0, 1.0]]
    steps = recorded([oppose] * 6)
    free = training.replay(steps, GCond(dominance_window=0, thresholds=(0.0, 0.0, 0.0)))
    bound = training.replay(steps, GCond(dominance_window=1, thresholds=(0.0, 0.0, 0.0)))
    assert len(set(free.winners)) == 1
    assert bound.winners in ([0, 1] * 3, [1, 0] * 3)


def test_recorded_products_are_of_successive_steps():
    scene = training.with_micro_batches(common.scene_of("digits"), 1)
    found = training.record_gradients(scene, 2, 0)
    steps = [g.double() for _, g in training.plain_training(scene, 2, 0)]
    assert torch.allclose(found.gramians[1], steps[1] @ steps[1].T)
    assert torch.allclose(found.crosses[1], steps[1] @ steps[0].T)
    assert not found.crosses[0].any()
    assert len(found.by_tensor) == 2 * 6  # the heads' tensors have no gradient of the other task


@pytest.mark.parametrize(
    ("winners", "left", "right", "streak"),
    [([], 0, 0, 0), (["left", None, "left", "right"], 2, 1, 2)],
)
def test_winners_and_streaks_of_the_steps_with_a_conflict(winners, left, right, streak):
    found = training.conflicts_of(winners, common.scene_of("digits"))
    won = {"left": left, "right": right}
    assert found == {"conflicts": left + right, "won": won, "longest_streak": streak}


def test_zones_by_thresholds():
    shares = b_thresholds.shares([0.5, -0.1, -0.6, -0.9], (-0.8, -0.5, 0.0))
    assert shares == {"none": 0.25, "mild": 0.25, "moderate": 0.25, "critical": 0.25}


def test_the_change_of_weights_is_a_length():
    gramians = recorded([[[3.0, 0.0], [0.0, 4.0]]]).gramians
    assert b_thresholds.change(gramians, torch.tensor([[0.0, 1.0]])) == pytest.approx(0.8)


def test_a_bfloat16_accumulator_stands_still(monkeypatch):
    """At 256 the next number is 258: 1 is half of the way and is rounded to even, down."""
    monkeypatch.setattr(c_precision, "WINDOWS", (300,))
    found = c_precision.accumulate(lambda: torch.ones(2, 8), ["one", "other"])["300"]
    assert found["float32"]["relative_error"] == {"one": 0.0, "other": 0.0}
    assert found["bfloat16"]["relative_error"]["one"] == pytest.approx(44.0 / 300.0)


def test_the_smallest_loss_chooses_the_rate_and_one_that_diverged_does_not():
    def tried(rate, left):
        losses = {"left": left, "right": 1.0}
        return {"scene": "digits", "method": "m", "learning_rate": rate, "losses": losses}

    found = g_optimizers.chosen([tried(1.0, math.nan), tried(0.1, 0.5), tried(0.01, 0.7)])
    assert found == {"m": 0.1}


def test_differences_are_to_the_variant_s_own_baseline():
    variants = [training.Variant("a", "A"), training.Variant("b", "B", baseline="a")]
    records = [
        {"scene": "photos", "method": key, "seed": seed, "scores": {"L1": value, "SSIM": 0.5}}
        for key, values in (("a", (0.1, 0.2)), ("b", (0.3, 0.5)))
        for seed, value in enumerate(values)
    ]
    table = tables.score_table(records, "photos", variants, {})
    assert "| A | 0.1500 ± 0.0707 |  | 0.5000 ± 0.0000 |  |" in table
    assert (
        "| B | 0.4000 ± 0.1414 | +0.2500 ± 0.0500 | 0.5000 ± 0.0000 | +0.0000 ± 0.0000 |" in table
    )
    said = tables.beyond_sentence(records, "photos", variants)
    assert "are 1 of 2 differences: B (+0.2500 in L1)" in said


# Physics.


def test_errors_are_compared_with_those_of_the_plain_sum():
    """Of 12 and 5 the smallest p is 2 / C(17, 5) = 2 / 6188: all of one are below the others."""
    plain = [1.0 + 0.01 * seed for seed in range(12)]
    low = i_physics.rank_test([0.1, 0.2, 0.3, 0.4, 0.5], plain)
    assert low == pytest.approx(2.0 / 6188.0)
    assert i_physics.rank_test([0.1, 0.2, 1.055, 9.0, math.inf], plain) > 0.5


def test_several_p_values_are_corrected_together():
    """Holm's own example of steps: 3 · 0.01, 2 · 0.02, and no smaller than the one before."""
    assert i_physics.holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert i_physics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert i_physics.holm([]) == []


def physics_records(errors):
    """Records of Kovasznay: method → its errors by seed."""
    return [
        {
            "scene": "kovasznay",
            "seed": seed,
            "steps": 10,
            "method": method,
            "last_quarter": error,
            "error": error,
            "seconds": 1.0,
            **dict.fromkeys(("zones", "rising", "any_rising", "norm_ratio", "at_bound")),
        }
        for method, values in errors.items()
        for seed, error in enumerate(values)
    ]


def test_the_table_says_what_is_beyond_chance():
    records = physics_records(
        {
            "plain": [1.0 + 0.01 * seed for seed in range(12)],
            "gcond": [0.1, 0.2, 0.3, 0.4, 0.5],
            "mgda": [1.0, 1.045, 1.1, 1.2, 0.9],
            "pcgrad": [2.0, 3.0, 4.0, 5.0, None],
        }
    )
    found = {result.name: result for result in i_physics.results(records, "kovasznay")}
    assert [*found] == ["GCond", "MGDA", "plain sum", "PCGrad"]
    verdicts = {name: result.verdict for name, result in found.items()}
    assert verdicts == {"GCond": "better", "plain sum": "", "MGDA": "", "PCGrad": "worse"}
    assert found["GCond"].ratio == pytest.approx(0.3 / 1.055)
    text = "\n".join(i_physics.section(records, "kovasznay"))
    assert "| GCond | 5 | 0.30 | 0.10 to 0.50 | 0.28 | 0.001 | **better** |" in text
    assert "| PCGrad | 5 | 4.0 | 2.0 to inf |" in text


def test_a_training_with_other_loss_weights_is_one_of_the_weighted_sum():
    """A factor of all weights changes nothing with AdamW but rounding, that of one does."""
    scores = {}
    for name, weights in (
        ("same", {}),
        ("all", {"residual": 8.0, "boundary": 8.0}),
        ("one", {"boundary": 8.0}),
    ):
        variant = training.Variant(name, name, weights=weights)
        found = training.measure(common.Job(0, "kovasznay", 5, None, variant))
        scores[name] = found["scores"]["error"]
    assert scores["all"] == pytest.approx(scores["same"], rel=1e-4)
    assert scores["one"] != pytest.approx(scores["same"], rel=1e-3)


def test_what_a_step_did_to_the_tasks_is_what_the_losses_do():
    """A small step along the result raises the loss of each task that is said to rise."""
    scene = reweighted(common.scene_of("burgers"), {"initial": 10.0})
    run = demo_training.new_run(scene, PLAIN, 40, 0, training.CPU)
    for _ in demo_training.train(run, 0):
        pass
    run.model.zero_grad()
    base = torch.optim.SGD(run.model.parameters(), lr=1e-5)
    optimizer = GCondFused(base, scene.tasks, method=Sum())
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(6):
        batch = scene.micro_batch(generator)
        before = demo_training.task_losses(run, batch, scene.tasks)
        optimizer.backward(before)
        optimizer.step()
        after = demo_training.task_losses(run, batch, scene.tasks)
        step = i_physics.seen_in(optimizer.report(), Sum())
        assert step.rising == [bool(after[task] > before[task]) for task in scene.tasks]
        seen += step.rising
    assert any(seen)
    assert not all(seen)


def test_conflictfree_s_own_loop_steps_along_the_direction_of_the_paper():
    """Of equal cosine with all gradients, as long as their projections onto it together."""
    pytest.importorskip("conflictfree")
    scene = common.scene_of("burgers")
    run = demo_training.new_run(scene, PLAIN, 1, 0, training.CPU)
    batch = scene.micro_batch(torch.Generator().manual_seed(0))
    gradients = training.task_gradients(run.model, scene, batch).double()
    units = gradients / gradients.norm(dim=1, keepdim=True)
    direction = torch.linalg.pinv(units) @ torch.ones(3, dtype=torch.float64)
    direction /= direction.norm()
    before = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    step = i_physics.conflictfree_window(
        run, torch.optim.SGD(run.model.parameters(), lr=1.0), [batch]
    )
    moved = before - torch.cat([p.detach().flatten() for p in run.model.parameters()])
    expected = ((gradients @ direction).sum() * direction).float()
    assert torch.allclose(moved, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert [*step.losses] == [*scene.tasks]

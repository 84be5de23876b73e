"""The bench of a CPU measures every row beside what it is held to; the README shows its record."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench import __main__, costs, cpu, others, record, workloads
from bench.clock import Clock
from bench.cpu import OURS, Timing, layout_named
from bench.operations import Case, Target
from gcond_kernels import methods, ops

ROOT = Path(__file__).parents[2]
SMALL = "even 10 k"
BESIDE = {
    ("resolution", ""): {None, "reference", "ops.resolve", "TorchJD PCGrad"},
    **{
        ("accumulate", f"{dtype}, {turn}"): {"copy"}
        for dtype in ("float32", "bfloat16")
        for turn in ("first", "later")
    },
    **{("aggregation", name): {f"TorchJD {name}"} for name in others.METHODS},
    ("step", "exact"): {"K backward passes"},
    ("step", "stochastic"): {"plain accumulation"},
    ("weighting", "UPGrad"): {"TorchJD UPGrad"},
    ("weighting", "GCond"): {None},
}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "EVEN", {SMALL: 10_000, "even 1 M": 600_000})
        for name in ("RESOLUTION", "AGGREGATION"):
            patch.setattr(cpu, name, {SMALL: (2, 3)})
        patch.setattr(cpu, "ACCUMULATE", {SMALL: (1,)})
        patch.setattr(cpu, "LINEAR", (SMALL,))
        patch.setattr(cpu, "MLPS", (2,))
        patch.setattr(cpu, "TRAINED", ())
        patch.setattr(cpu, "WEIGHTED_TASKS", 6)
        patch.setattr(cpu, "SECONDS", 0.0)
        patch.setattr(cpu, "ROUNDS", 3)
        patch.setattr(cpu, "cache_bytes", lambda _: 1)
        yield


def figures_of(*sections, **options):
    return list(cpu.figures(argparse.Namespace(only=sections, quick=False, **options)))


@pytest.fixture(scope="module")
def figures():
    return figures_of(*cpu.SECTIONS)


@pytest.mark.slow
def test_every_cost_stands_beside_what_it_is_held_to(figures):
    assert not [f for f in figures if "error" in f or "skipped" in f]
    found = {}
    for figure in figures:
        found.setdefault((figure["operation"], figure["what"]), set()).add(figure.get("beside"))
    assert found == BESIDE
    json.dumps(figures)


@pytest.mark.slow
def test_every_aim_is_judged(figures):
    aimed = {(f["operation"], f["what"], f.get("beside")) for f in figures if "target" in f}
    without = {
        (operation, what, other) for (operation, what), all_ in BESIDE.items() for other in all_
    } - aimed
    assert without == {
        ("resolution", "", "reference"),
        ("resolution", "", "ops.resolve"),
    }
    for figure in figures:
        if "target" in figure:
            ((quantity, bound),) = figure["target"].items()
            assert figure["met"] == (figure[quantity]["median"] <= bound)


def test_a_ratio_is_ours_over_the_other_in_the_same_round(monkeypatch):
    times = {OURS: [1.0, 4.0, 9.0], "copy": [2.0, 4.0, 3.0]}
    monkeypatch.setattr(Clock, "times", lambda *_: times)
    timing = Timing(Clock(cpu.CPU, 0.0), 1, False)
    case = Case("resolution", SMALL, layout_named(SMALL), 2)
    (figure,) = timing.compare(case, {}, {"copy": Target("relative", 0.9)})
    assert figure["relative"]["median"] == 1.0
    assert (figure["seconds"]["median"], figure["beside_seconds"]["median"]) == (4.0, 3.0)
    assert figure["met"] is False
    own, other = timing.compare(case, {}, {OURS: Target("seconds", 4.0)})
    assert own["met"]
    assert "relative" not in own
    assert "target" not in other


@pytest.mark.slow
def test_a_large_case_stands_beside_a_copy_of_the_budget(monkeypatch):
    copied = []
    copies = cpu.copies
    monkeypatch.setattr(cpu, "copies", lambda *given: copied.append(given[0]) or copies(*given))
    monkeypatch.setattr(cpu, "RESOLUTION", {"even 1 M": (2,)})
    monkeypatch.setattr(cpu, "ACCUMULATE", {"even 1 M": (1,)})
    figures = figures_of("resolution", "accumulate")
    parameters = layout_named("even 1 M").parameters
    assert [moved / parameters for moved in copied] == [28, 8, 12, 6, 10]
    (beside_copy,) = (
        f for f in figures if f["operation"] == "resolution" and "copy" in f["beside"]
    )
    assert beside_copy["target"] == {"relative": 1.0}


def test_a_lap_goes_beyond_the_caches_but_for_small_cases():
    timing = Timing(Clock(cpu.CPU, 0.0), 1000, False)
    for name, laps in ((SMALL, 1), ("even 1 M", 40)):
        assert timing.laps(Case("", name, layout_named(name), 2), 100) == laps


@pytest.mark.parametrize("name", [SMALL, "even 1 M"])
def test_even_layouts_have_their_size_in_300_tensors(name):
    sizes = layout_named(name).sizes
    assert len(sizes) == 300
    assert sum(sizes) == pytest.approx(cpu.EVEN[name], rel=0.01)


def test_quick_leaves_out_what_is_large():
    timing = Timing(Clock(cpu.CPU, 0.0), 1, True)
    assert timing.takes(2_600_000, 4)
    assert not timing.takes(2_600_000, 8)
    assert not timing.takes(25_000_000, 2)
    assert not list(cpu.weighting_figures(timing))


def wrong(combine):
    """The same, but that the weights are 1 % larger."""
    return lambda given, outputs, weights, *others: combine(given, outputs, 1.01 * weights, *others)


@pytest.mark.slow
def test_what_is_wrong_is_not_timed(monkeypatch):
    backend = ops.backend_for(OURS, cpu.CPU)
    monkeypatch.setattr(backend, "combine", wrong(backend.combine))
    monkeypatch.setattr(backend, "resolve", lambda *_: None)
    monkeypatch.setattr(backend, "accumulate", lambda *_: None)
    figures = figures_of("resolution", "accumulate", "aggregation")
    assert figures
    for figure in figures:
        # Of three tasks PCGrad draws an order, and what is checked is that it is a combination.
        exempt = (figure["what"], figure["tasks"]) == ("PCGrad", 3)
        assert exempt or "AssertionError" in figure["error"], figure


@pytest.mark.parametrize("method", ["UPGrad", "GCond"])
def test_weights_that_are_wrong_are_not_timed(monkeypatch, method):
    if method == "UPGrad":
        monkeypatch.setattr(methods.UPGrad, "__call__", lambda _, S: torch.ones(len(S)).double())
    else:
        right = cpu.Storage.arbitrate

        def changed(self, products, backend):
            found = right(self, products, backend)
            return found._replace(weights=found.weights * (1.01 if backend == OURS else 1.0))

        monkeypatch.setattr(cpu.Storage, "arbitrate", changed)
    failed = [f["what"] for f in figures_of("weighting") if "error" in f]
    assert failed == [method]


@pytest.mark.slow
def test_a_step_that_is_wrong_is_not_timed(monkeypatch):
    def resolves(*given, mode, method=None):
        return right(*given, mode=mode, method=method and methods.PCGrad())

    right = cpu.training.gcond
    monkeypatch.setattr(cpu.training, "gcond", resolves)
    figures = figures_of("training")
    assert figures
    assert all("differs from plain accumulation" in figure["error"] for figure in figures)


def test_backward_passes_leave_the_gradients_of_plain_accumulation():
    for trained in cpu.trainings(micro_batches=2):
        batches = trained.batches
        found = [
            cpu.training.gradient_of(trained, made_by, batches)
            for made_by in (cpu.training.plain, cpu.training.backward_passes)
        ]
        for plain, passes in zip(*found, strict=True):
            torch.testing.assert_close(passes, plain)


def test_linear_losses_have_their_coefficients_as_gradients():
    layout = layout_named(SMALL)
    trained = workloads.LinearTraining("linear", cpu.CPU, 1, 0, 1, 0.0, layout.sizes)
    ((_, coefficients),) = trained.batches
    gradients = cpu.training.gradient_of(trained, cpu.training.plain, trained.batches)
    torch.testing.assert_close(torch.cat(gradients), coefficients.mean(0))


@pytest.mark.slow
def test_torchjd_may_be_missing(monkeypatch):
    monkeypatch.setattr(others, "torchjd_missing", lambda: "not installed")
    figures = figures_of("resolution", "weighting")
    assert {f["skipped"] for f in figures if "skipped" in f} == {"not installed"}
    assert {f.get("beside") for f in figures if "seconds" in f} == {
        None,
        "reference",
        "ops.resolve",
    }


def test_what_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr("bench.operations.free_bytes", lambda _: 0)
    assert all("of memory" in f["skipped"] for f in figures_of("resolution"))


@pytest.mark.slow
def test_the_command_prints_aims_and_loads_and_records_them(tmp_path, capsys):
    threads = torch.get_num_threads()
    output = tmp_path / "cpu.json"
    try:
        code = __main__.main(
            ["cpu", "--only", "resolution", "--threads", "1", "--output", str(output)]
        )
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    printed = capsys.readouterr().out
    written = record.read(output)
    assert written["machine"]["threads"] == 1
    assert {"load_average", "load_average_after"} <= set(written["machine"])
    assert "load average" in printed.splitlines()[-4]
    assert "<= 60 us" in printed
    met = [figure["met"] for figure in written["figures"] if "met" in figure]
    assert f"aims: {sum(met)} of {len(met)} met" in printed
    assert __main__.main(["costs", str(output)]) == 0
    assert capsys.readouterr().out.startswith(costs.HEADING)


def test_threads_must_be_positive(capsys):
    assert __main__.main(["cpu", "--threads", "0"]) == 2
    assert "--threads 0: must be 1 or more" in capsys.readouterr().err


def shown(beside, median, **more):
    head = {"operation": "resolution", "what": "", "model": SMALL, "tasks": 2}
    values = {"parameters": 10_050, "tensors": 300, "seconds": {"median": 41.66e-6}}
    other = {"beside": beside, "relative": {"median": median}} if beside else {}
    return {**head, **values, **other, **more}


def test_a_line_of_costs_holds_all_that_stands_beside():
    missed = {"target": {"relative": 0.4}, "met": False}
    figures = [shown("reference", 0.1), shown("TorchJD PCGrad", 0.5, **missed)]
    figures.append(shown(None, None, target={"seconds": 4e-5}, met=False))
    machine = {"cpu": "AMD", "threads": 2, "torch": "2.13", "load_average": 0.1}
    made = costs.costs_of({"machine": machine | {"load_average_after": 1.2}, "figures": figures})
    assert made.startswith("| on a CPU (AMD, 2 threads, torch 2.13, load 0.1 to 1.2) | K ")
    assert made.splitlines()[2:] == [
        "| resolution, 0.01 M in 300 tensors | 2 | 41.7 us (aim 40 us) "
        "| reference 0.10; TorchJD PCGrad 0.50 (aim 0.4) |"
    ]


def test_costs_of_no_record_are_an_error(tmp_path, capsys):
    assert __main__.main(["costs", str(tmp_path / "none.json")]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
    interrupted = tmp_path / "interrupted.json"
    interrupted.write_text('{"figures": []}')
    assert __main__.main(["costs", str(interrupted)]) == 2
    assert "a record of a run to its end" in capsys.readouterr().err


def test_the_readme_shows_the_costs_of_the_record():
    path = ROOT / "bench" / "results" / "cpu.json"
    expected = costs.costs_of(record.read(path)) if path.exists() else ""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.find(costs.HEADING)
    assert (text[start:].split("\n\n")[0] if start >= 0 else "") == expected
    assert not expected or len(expected.splitlines()) == 2 + len(costs.SHOWN)

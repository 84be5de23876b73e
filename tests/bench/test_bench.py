"""The bench measures what it says, checks it first, and writes what others read."""

import argparse
import io
import json
import re
from contextlib import nullcontext, redirect_stdout
from itertools import groupby
from pathlib import Path

import pytest
import torch

from bench import __main__, operations, others, plot, record, sections, table, training
from bench.clock import Clock, Competitor, copies, laps_of
from bench.inputs import Gradients, Storage, layout_of
from bench.operations import Bench, Case, Target, even_sizes, gramians_of
from gcond_kernels import ops

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
LAYOUT = layout_of([1000, 3, 1, 40])


@pytest.fixture(scope="module", autouse=True)
def small_and_quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "cache_bytes", lambda _: 1)
        patch.setattr(operations, "shapes_of", lambda _: [(300, 100), (100,)] * 3)
        patch.setattr(operations, "PAIRS", 20)  # of tensors where no model is named
        yield


def test_competitors_take_turns_and_each_lap_goes_over_all_memory():
    calls = []
    competitors = {
        "a": Competitor([lambda: calls.append("a0"), lambda: calls.append("a1")]),
        "b": Competitor([lambda: calls.append("b")], prepare=[lambda: calls.append("prepared")]),
    }
    times = Clock(CPU, seconds=1e-9).times(competitors)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 5, "b": 5}
    assert calls[:2] == ["a0", "a1"]
    assert calls.count("a0") == calls.count("a1")
    assert all(calls[i - 1] == "prepared" for i, call in enumerate(calls) if call == "b")
    # The warming up, then 5 rounds in one order and the other: ab ab ba ab ba ab.
    turns = [name for name, _ in groupby(call[0] for call in calls if call != "prepared")]
    assert turns == ["a", "b"] * 4


def test_what_prepares_a_call_is_not_timed(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("bench.clock.time.perf_counter", lambda: next(now))
    way = Competitor([lambda: None] * 3, prepare=[lambda: next(now)] * 3)
    assert Clock(CPU, 1.0).prepared_seconds(way, repetitions=2) == 3.0


def test_on_a_gpu_a_lap_is_a_graph_unless_it_synchronizes(monkeypatch):
    calls, replays = [], []

    class Graph:
        def replay(self):
            replays.append(1)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        record = synchronize = lambda _: None
        elapsed_time = lambda *_: 8000.0  # noqa: E731  # milliseconds

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    captured = Competitor([lambda: calls.append("captured")] * 2)
    waiting = Competitor([lambda: calls.append("waiting")], synchronizes=True)
    times = Clock(torch.device("cuda"), 1.0).times({"captured": captured, "waiting": waiting})
    assert times == {"captured": [4.0] * 5, "waiting": [8.0] * 5}
    assert calls.count("captured") == 4  # before the capture, and in it
    assert len(replays) == calls.count("waiting") == 2 * (5 + 2)  # with one that is not timed


@pytest.mark.parametrize("moved", [2, 1000, 4_000_000])
def test_a_copy_moves_half_of_the_bytes_each_way(moved, monkeypatch):
    monkeypatch.setattr("bench.clock.MOST_BYTES_OF_COPY", 1_000_000)
    written = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other: written.append(len(other)) or copy(self, other)
    )
    way = copies(moved, 3, CPU)
    assert len(way.calls) == 3
    way.calls[2]()
    assert sum(written) == moved // 2
    assert max(written) <= 1_000_000


def test_laps_are_larger_than_the_cache():
    assert laps_of(10, 100) == 40
    assert laps_of(1000, 100) == 1
    assert record.cache_bytes(CPU) >= 2**20


def test_quartiles():
    assert record.quartiles([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_the_storage_conflicts_and_its_padding_is_zero():
    storage = Storage(3, LAYOUT, CPU)
    S = storage.products_in_float64().total
    assert (S - S.diagonal().diag() < 0).sum() == 6
    inside = torch.zeros(LAYOUT.length, dtype=torch.bool)
    for first, size in zip(LAYOUT.offsets, LAYOUT.sizes, strict=True):
        inside[first : first + size] = True
    assert (storage.accumulators[:, ~inside] == 0).all()
    assert (storage.accumulators[:, inside] != 0).all()


def test_products_in_chunks_are_those_of_full_accumulators(monkeypatch):
    monkeypatch.setattr("bench.inputs.CHECKED_AT_ONCE", 64)
    storage = Storage(2, LAYOUT, CPU)
    rows, history = storage.accumulators.double(), storage.history.double()
    torch.testing.assert_close(storage.products_in_float64().total, rows @ rows.T)
    torch.testing.assert_close(storage.products_in_float64().cross, rows @ history.T)


def test_wrong_products_are_found():
    storage = Storage(2, LAYOUT, CPU)
    products = storage.gramian("python")
    storage.check_products(products, "fine")
    for name in ("total", "cross"):
        wrong = getattr(products, name).clone()
        wrong[0, 1] += 1e-4 * products.total.diagonal().max()
        with pytest.raises(AssertionError, match=f"who: the {name} Gramian"):
            storage.check_products(products._replace(**{name: wrong}), "who")


@pytest.mark.parametrize("place", [(0, 0), (0, 999), (2, 0), (3, 39)])
@pytest.mark.parametrize(("value", "off"), [(float("nan"), "inf"), (100.0, r"\d+")])
def test_a_wrong_element_of_the_result_is_found(place, value, off):
    storage = Storage(2, LAYOUT, CPU)
    weights = storage.arbitrate(storage.products_in_float64(), "python").weights
    storage.reset()
    storage.resolve("python")
    storage.check_written(weights, "fine")
    storage.outputs[place[0]][place[1]] = value
    with pytest.raises(AssertionError, match=f"who: the result is off by {off}"):
        storage.check_written(weights, "who")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [True, False])
def test_accumulations_of_all_are_checked(dtype, overwrite):
    gradients = Gradients(LAYOUT, dtype, CPU)
    runs = others.accumulations(gradients, overwrite)
    runs["python"] = lambda: gradients.accumulate("python", overwrite)
    assert len(runs) == 3
    for by, run in runs.items():
        before = gradients.accumulator.clone()
        run()
        gradients.check(before, overwrite, by)
    gradients.accumulator[LAYOUT.offsets[1]] += 1.0
    with pytest.raises(AssertionError, match="who: the accumulator of 3 elements"):
        gradients.check(before, overwrite, "who")


@pytest.mark.parametrize("tasks", [2, 5])
def test_plain_torch_does_the_same(tasks):
    storage = Storage(tasks, LAYOUT, CPU)
    for by, run in others.products(storage).items():
        storage.check_products(gramians_of(run()), by)
    storage.reset()
    weights = storage.arbitrate(storage.products_in_float64(), "python").weights
    for made in (others.combinations(storage, weights.tolist()), others.resolutions(storage)):
        assert set(made) == {others.FOREACH, others.LOOP}
        for by, run in made.items():
            storage.reset()
            run()
            storage.check_written(weights, by)
            assert torch.equal(storage.history, storage.accumulators.bfloat16()), by


def test_plain_torch_goes_on_as_ours_does():
    mine, theirs = Storage(2, LAYOUT, CPU), Storage(2, LAYOUT, CPU)
    theirs.accumulators.copy_(mine.accumulators)
    for storage in (mine, theirs):
        storage.reset()
    foreach = others.resolutions(theirs)[others.FOREACH]
    for step in range(3):
        mine.accumulators[1].add_(torch.randn(LAYOUT.length), alpha=0.3)  # the less stable one
        mine.accumulators.mul_(1.5 + step)
        theirs.accumulators.copy_(mine.accumulators)
        mine.resolve("python")
        foreach()
        for a, b in zip(mine.outputs, theirs.outputs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tasks", [2, 4, 8, 16])
def test_torchjd_is_checked_against_our_methods(tasks):
    assert others.torchjd_missing() is None
    storage = Storage(tasks, LAYOUT, CPU)
    runs = others.aggregations(storage.accumulators)
    assert list(runs) == ["TorchJD PCGrad", "TorchJD UPGrad", "TorchJD CAGrad"]
    for by, run in runs.items():
        others.check_aggregation(by, run, storage)
        with pytest.raises(AssertionError, match=f"{by}: the result is"):
            others.check_aggregation(by, lambda: torch.randn(LAYOUT.length), storage)


@pytest.mark.slow
def test_a_rival_that_is_wrong_leaves_the_others(monkeypatch):
    def wrong(by, *_):
        if by == "TorchJD UPGrad":
            raise AssertionError("wrong")

    monkeypatch.setattr(others, "check_aggregation", wrong)
    figures = list(tiny_bench(millions=[0.31]).figures())
    failed = [(f["operation"], f["by"]) for f in figures if "error" in f]
    assert failed == [("resolution", "TorchJD UPGrad")]
    timed = {f["by"] for f in figures if f["operation"] == "aggregation"}
    assert {"python, UPGrad", "TorchJD CAGrad"} <= timed
    assert "TorchJD UPGrad" not in timed


def test_what_is_kept_is_checked_too():
    storage = Storage(2, LAYOUT, CPU)
    storage.reset()
    storage.resolve("python")
    storage.check_kept("fine")
    storage.momentum.buffer[LAYOUT.offsets[1]] *= 1.01
    with pytest.raises(AssertionError, match="who: the momentum"):
        storage.check_kept("who")
    storage.resolve("python")
    storage.reset()
    storage.resolve("python")
    storage.history[1, 5] += 1.0
    with pytest.raises(AssertionError, match="who: the history"):
        storage.check_kept("who")


def test_variants_are_checked():
    storage = Storage(2, LAYOUT, CPU)
    mask = torch.randint(-(2**31), 2**31, (LAYOUT.length // 32,), dtype=torch.int32)
    decision = storage.arbitrate(storage.products_in_float64(), "python")
    each = decision._replace(weights=decision.weights.repeat(4, 1))
    rows = storage.accumulators.clone()
    operations.check_variants(storage, mask, each, "python")
    assert torch.equal(storage.accumulators, rows)
    storage.outputs[0][7] *= 1.1
    with pytest.raises(AssertionError, match="who: an element is no sum"):
        storage.check_dropped("who")
    storage.reset()
    products = storage.gramian("python")
    with pytest.raises(AssertionError, match="Gramian"), storage.masked(mask):
        storage.check_products(products, "unmasked")
    storage.combine(decision, "python")
    with pytest.raises(AssertionError, match="the result is off"), storage.masked(mask):
        storage.check_written(decision.weights, "unmasked")


@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, -0.5]])
def test_only_a_combination_of_the_gradients_counts_as_one(weights):
    storage = Storage(2, LAYOUT, CPU)
    result = torch.tensor(weights) @ storage.accumulators
    outputs = [result[chunk].bfloat16().float() for _, chunk in storage.chunks()]
    others.check_combination(outputs, storage, "who")
    outputs[0][:500] = 0.0  # of [1, 1] the sum nearly cancels out: fewer may pass for rounding
    with pytest.raises(AssertionError, match="who: the result is no combination"):
        others.check_combination(outputs, storage, "who")


@pytest.mark.slow
def test_without_torchjd_a_figure_has_the_reason(monkeypatch):
    monkeypatch.setattr(others, "torchjd_missing", lambda: "not installed")
    figures = list(tiny_bench(models=["mobilenetv3_small"]).figures())
    left_out = [(f["by"], f["skipped"]) for f in figures if "skipped" in f]
    assert left_out == [("TorchJD", "not installed")]


def tiny_bench(**options) -> Bench:
    given = {"models": [], "millions": [], "tasks": [2], "seconds": 1e-6, "published_code": None}
    return Bench(argparse.Namespace(device=CPU, **given | options))


@pytest.fixture(scope="module")
def figures() -> list[dict]:
    return list(tiny_bench(millions=[0.31]).figures())


def test_every_operation_is_measured_beside_a_copy(figures):
    assert not [f for f in figures if "error" in f or "skipped" in f]
    ours = {(f["operation"], f["what"]) for f in figures if f["by"] == "python"}
    turns = [f"{d}, {t}" for d in ("float32", "bfloat16") for t in ("first", "later")]
    expected = {("accumulate", turn) for turn in turns}
    expected |= {(name, "") for name in ("arbitrate", "gramian", "combine", "resolution")}
    assert ours == expected
    by = {f["by"]: f["section"] for f in figures if f["operation"] == "aggregation"}
    for name in others.METHODS:
        for backend in operations.backends_of(CPU):
            assert by.pop(f"{backend}, {name}") == "operations"
        assert by.pop(f"TorchJD {name}") == "others"
    assert not by
    for figure in figures:
        assert figure["seconds"]["low"] <= figure["seconds"]["median"] <= figure["seconds"]["high"]
        if figure["operation"] != "arbitrate":
            assert figure["fraction"]["median"] > 0
            assert figure["parameters"] == sum(even_sizes(310_000))
    json.dumps(figures)


def test_the_bytes_are_those_of_the_budget(figures):
    per_parameter = {
        (f["operation"], f["what"]): f["bytes"] / f["parameters"]
        for f in figures
        if f["by"] == "python" and f["bytes"]
    }
    assert per_parameter == {
        ("accumulate", "float32, first"): 8,
        ("accumulate", "float32, later"): 12,
        ("accumulate", "bfloat16, first"): 6,
        ("accumulate", "bfloat16, later"): 10,
        ("gramian", ""): 12,
        ("combine", ""): 24,
        ("resolution", ""): 36,
    }


def test_others_stand_beside_and_are_counted(figures):
    by = {f["by"]: f for f in figures if f["operation"] == "resolution"}
    theirs = {f"TorchJD {name}" for name in ("PCGrad", "UPGrad", "CAGrad")}
    ours = set(operations.backends_of(CPU))
    assert set(by) == {"torch foreach", "torch loop"} | ours | theirs
    assert {f["section"] for name, f in by.items() if name not in ours} == {"others"}
    for figure in (each for name, each in by.items() if name != "cpu"):  # its calls are not torch's
        assert figure["bytes_moved"] > figure["parameters"]
        assert figure["launches"] > 0


@pytest.mark.slow
def test_an_operation_that_is_wrong_is_not_timed(monkeypatch):
    right = ops.combine

    def wrong(*arguments, weights, **options):
        return right(*arguments, weights=1.01 * weights, **options)

    monkeypatch.setattr(ops, "combine", wrong)
    figures = list(tiny_bench(millions=[0.31]).figures())
    (error,) = [f for f in figures if "error" in f]
    first = operations.backends_of(CPU)[0]
    assert f"combine by {first}: the result is off" in error["error"]
    assert not [f for f in figures if f["operation"] == "combine"]


@pytest.mark.slow
def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr("bench.operations.free_bytes", lambda _: 2_100_000_000)
    figures = list(tiny_bench(millions=[2000]).figures())
    reasons = {f["skipped"] for f in figures if "skipped" in f}
    assert len(reasons) == 3  # of two types of gradients, and of the resolution
    assert all("of memory" in reason for reason in reasons)


def test_targets():
    assert Target("fraction", 0.9).judged(0.91) == {"target": {"fraction": 0.9}, "met": True}
    assert Target("seconds", 1e-5).judged(2e-5) == {"target": {"seconds": 1e-5}, "met": False}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.50 (2.50-2.50) s"),
        (0.0125, "12.50 (12.50-12.50) ms"),
        (9e-6, "9.0 (9.0-9.0) us"),
        (9e-8, "0.1 (0.1-0.1) us"),
    ],
)
def test_times_are_shown_in_a_unit_that_suits_them(seconds, text):
    assert table.time_of(dict.fromkeys(("median", "low", "high"), seconds)) == text


def run_main(tmp_path, capsys, *options):
    output = tmp_path / "figures.json"
    given = "operations --models --millions 1 --tasks 2 --seconds 1e-6 --device cpu --output"
    code = __main__.main([*given.split(), str(output), *options])
    return code, output, capsys.readouterr()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    command = "operations --models mobilenetv3_small --millions 1 --tasks 3 2 --seconds 0.001"
    command += f" --device cpu --output {folder / 'figures.json'}"
    with redirect_stdout(io.StringIO()) as printed:
        assert __main__.main(command.split()) == 0, printed.getvalue()
    lines = printed.getvalue().splitlines()
    assert lines.count("mobilenetv3_small: 0.0903 M parameters in 6 tensors") == 1
    assert any(line.split()[:3] == ["resolution", "3", "python"] for line in lines)
    return folder / "figures.json"


@pytest.mark.slow
def test_the_command_writes_figures_with_machine_and_commit(recorded):
    written = record.read(recorded)
    assert {"device", "torch", "python", "commit", "gcond_kernels"} <= set(written["machine"])
    assert written["command"].startswith("python -m bench operations --models")
    assert {f["model"] for f in written["figures"]} == {"even", "mobilenetv3_small"}


@pytest.mark.slow
def test_the_pictures_of_a_record(recorded):
    for name in ("roofline", "cost_by_size", "cost_by_tasks"):
        path = recorded.parent / f"{name}.png"
        assert path.stat().st_size > 10_000
        path.unlink()
    assert plot.main([str(recorded)]) == 0
    assert (recorded.parent / "roofline.png").is_file()


def test_without_a_record_there_are_no_pictures(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[1]")
    assert __main__.main(["plot", str(tmp_path / "other.json")]) == 2
    assert 'other.json: has no list "figures"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device cuda:99", "--device cuda:99 cannot be used"),
        ("--device nowhere", "--device nowhere cannot be used"),
        ("--device meta", "--device meta cannot be used: only cpu and cuda"),
        ("--tasks 1", "--tasks 1: a conflict takes two tasks"),
        ("--seconds 0", "--seconds must be above 0"),
        ("--seconds nan", "--seconds must be above 0"),
        ("--millions 0.1", "--millions must be 1 or more"),
        ("--published-code nothing.py", "--published-code: nothing.py"),
        ("--output no/such/folder/x.json", "--output no/such/folder/x.json cannot be written"),
        ("--output .", "--output . cannot be written"),
    ],
)
def test_bad_options_are_named_before_anything_is_measured(options, message, tmp_path, capsys):
    code, output, printed = run_main(tmp_path, capsys, *options.split())
    assert code == 2
    assert message in printed.err
    assert not output.exists()


def test_an_interruption_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    def interrupted(_):
        yield Case("arbitrate", "even", LAYOUT, 2).figure("python", skipped="for the test")
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "figures", interrupted)
    code, output, printed = run_main(tmp_path, capsys)
    assert code == 130
    assert len(record.read(output)["figures"]) == 1
    assert "holds what was measured until then" in printed.out


@pytest.mark.slow
def test_an_error_is_a_figure_and_an_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Storage, "arbitrate", lambda *_: 1 / 0)
    code, output, _ = run_main(tmp_path, capsys)
    assert code == 1
    assert "ZeroDivisionError" in output.read_text()


def test_an_unknown_command_prints_the_list(capsys):
    assert __main__.main(["operation"]) == 2
    printed = capsys.readouterr().err
    assert "'operation' is none of:" in printed
    for what in {**__main__.BENCHMARKS, **__main__.COMMANDS}:
        assert f"  {what} " in printed


def test_options_that_the_gpu_check_passes_exist():
    text = (ROOT / "bench/gpu_check.sh").read_text()
    passed = re.findall(r"-m bench --(?:[^\n]*\\\n)*[^\n]*", text)
    options = set(re.findall(r" (--[a-z-]+)", " ".join(passed).replace('"', " ")))
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    for section in (sections, operations, training):
        section.add_arguments(parser)
    assert passed
    assert options <= {option for action in parser._actions for option in action.option_strings}


def test_every_result_has_a_command_that_makes_it():
    """The table in bench/README.md lists all files, and its commands are known."""
    text = (ROOT / "bench/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, flags=re.MULTILINE)
    results = ROOT / "bench/results"
    files = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    assert {name for name, _ in rows} == files
    known = {**__main__.BENCHMARKS, **__main__.COMMANDS}
    for name, command in rows:
        for what in re.findall(r"python -m bench (\w+)", command):
            assert what in known, name
        assert re.search(r"python -m (bench|examples\.(demo|toy))|README\.md", command), name

"""The comparison of two records of figures: what counts as the same figure, ratios, exit codes."""

import json
from pathlib import Path

import pytest

from bench import compare

MACHINE = {"device": "A", "cpu": "B", "threads": 2, "torch": "2.13.0"}


def times(median, low, high):
    return {"median": median, "low": low, "high": high}


COMBINE = {"section": "operations", "operation": "combine", "what": "", "by": "triton"}
COMBINE |= {"model": "convnext_tiny", "parameters": 28_000_000, "tensors": 180, "tasks": 2}
COMBINE |= {"seconds": times(0.002, 0.0019, 0.0021), "copy_seconds": times(0.001, 0.001, 0.001)}
COMBINE |= {"fraction": times(0.5, 0.48, 0.52), "target": {"fraction": 0.9}, "met": False}
COMBINE |= {"bytes": 672_000_000}
COUNTED = {"section": "counts", "operation": "gramian", "by": "cuda", "tasks": 2, "launches": 2}
COUNTED |= {"bytes_moved": None}
TRAINED = {"section": "training", "model": "convnext base", "by": "plain", "batch": 16, "tasks": 2}
TRAINED |= {"samples_per_second": 100.0, "peak_bytes": 5_000, "backend": "triton"}


@pytest.fixture
def compared(tmp_path, capsys):
    """Exit code, output and errors of a comparison of these figures and machines."""

    def run(old, new, old_machine=MACHINE, new_machine=MACHINE):
        for name, figures, machine in (("old", old, old_machine), ("new", new, new_machine)):
            text = json.dumps({"machine": machine, "figures": figures})
            (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
        code = compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
        return code, *capsys.readouterr()

    return run


def row(output, quantity):
    """The line of this quantity, from its name on."""
    (line,) = [line for line in output.splitlines() if f"  {quantity}  " in line]
    return line[line.index(quantity) + len(quantity) :].split()


def test_times_and_fractions_are_divided_new_by_old(compared):
    faster = {"seconds": times(0.001, 0.0009, 0.0011), "fraction": times(0.8, 0.75, 0.85)}
    code, output, _ = compared([COMBINE], [COMBINE | faster])
    assert code == 0
    assert row(output, "seconds") == ["2", "ms", "1", "ms", "0.500"]
    assert row(output, "fraction") == ["0.5", "0.8", "1.600"]
    assert "operations combine triton convnext_tiny 28 M in 180 K=2" in output
    assert "machine" not in output
    assert "only in" not in output


@pytest.mark.parametrize(
    ("new", "within"),
    [
        (times(0.0022, 0.0021, 0.0023), True),  # it begins where the old ends
        (times(0.0022, 0.00211, 0.0023), False),
        (times(0.0018, 0.0017, 0.0019), True),
        (times(0.0018, 0.0017, 0.00189), False),
        (times(0.002, 0.001, 0.009), True),
    ],
)
def test_changes_within_overlapping_quartiles_are_marked(compared, new, within):
    _, output, _ = compared([COMBINE], [COMBINE | {"seconds": new}])
    assert (row(output, "seconds")[-2:] == ["within", "spread"]) == within


def test_counts_are_listed_where_they_changed(compared):
    code, output, _ = compared([COUNTED], [COUNTED | {"launches": 3}])
    assert code == 0
    assert row(output, "launches") == ["2", "3", "1.500"]
    code, output, _ = compared([COUNTED], [COUNTED])
    assert code == 0
    assert output == "1 counts are as they were\n"
    _, output, _ = compared([COUNTED | {"launches": 0}], [COUNTED])
    assert row(output, "launches") == ["0", "2", "inf"]


def test_rates_and_memory_are_compared(compared):
    slower = {"samples_per_second": 50.0, "peak_bytes": 10_000}
    # Who computed is no part of the name: "auto" may choose another.
    _, output, _ = compared([TRAINED], [TRAINED | slower | {"backend": "cuda"}])
    assert row(output, "samples per second") == ["100", "50", "0.500"]
    assert row(output, "peak bytes") == ["5,000", "10,000", "2.000"]
    assert "training plain convnext base K=2 batch=16" in output


@pytest.mark.parametrize("key", ["device", "cpu", "threads"])
def test_of_another_machine_times_do_not_compare(compared, key):
    code, output, _ = compared([COMBINE], [COMBINE], new_machine=MACHINE | {key: 99})
    assert code == 0
    first, second = output.splitlines()[:2]
    assert first == f"{key}: {MACHINE[key]} -> 99"
    assert second.startswith("different machines: only counts and fractions compare")
    assert row(output, "seconds")[-2:] == ["other", "machine"]
    assert row(output, "fraction")[-2:] == ["within", "spread"]
    # Another version makes no other machine.
    _, output, _ = compared([COMBINE], [COMBINE], new_machine=MACHINE | {"torch": "2.14.0"})
    assert output.startswith("torch: 2.13.0 -> 2.14.0\n")
    assert "machines" not in output


def test_figures_of_one_file_alone_are_named_at_the_end(compared):
    code, output, _ = compared([COMBINE, TRAINED], [COMBINE, COMBINE | {"tasks": 4}])
    assert code == 0
    old, new = output.split("only in ")[1:]
    assert old.split(":\n")[1].split("\n")[0] == "  training plain convnext base K=2 batch=16"
    assert "28 M in 180 K=4" in new
    assert new.split(":")[0].endswith("new.json")


@pytest.mark.parametrize("field", ["section", "operation", "by", "model", "parameters", "tensors"])
def test_figures_that_differ_in_what_they_are_have_nothing_in_common(compared, field):
    other = 7 if isinstance(COMBINE[field], int) else "other"
    code, output, _ = compared([COMBINE], [COMBINE | {field: other}])
    assert code == 1
    assert "no figure in common" in output
    assert output.count("only in ") == 2


def test_fields_it_does_not_know_tell_figures_apart(compared):
    assert compared([TRAINED], [TRAINED | {"resolution": 224}])[0] == 1
    assert compared([TRAINED], [TRAINED | {"loss": 0.5, "steady": True, "note": None}])[0] == 0
    assert compared([TRAINED], [TRAINED | {"what": ""}])[0] == 0
    assert compared([COUNTED | {"rounds": 5}], [COUNTED | {"rounds": 31}])[0] == 0


def test_reasons_stand_for_values(compared):
    head = {key: COMBINE[key] for key in compare.FIRST}
    _, output, _ = compared([COMBINE], [head | {"skipped": "too large"}])
    assert "K=2: skipped in the new: too large" in output
    code, output, _ = compared([head | {"error": "OutOfMemoryError"}], [COMBINE])
    assert code == 0
    assert "K=2: error in the old: OutOfMemoryError" in output


def test_of_two_figures_of_one_name_the_last_counts_and_that_is_said(compared):
    code, output, _ = compared([COUNTED | {"launches": 9}, COUNTED], [COUNTED])
    assert code == 0
    assert "old.json has two figures of one name, the last counts: counts gramian cuda" in output
    assert "1 counts are as they were" in output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"), "is not JSON"),
        ("[]", 'has no list "figures"'),
        ('{"figures": {}}', 'has no list "figures"'),
        ('{"figures": [1]}', 'has no list "figures"'),
        ('{"figures": [], "machine": "A"}', '"machine" must be an object'),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, text, said, place):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps({"machine": {}, "figures": [COUNTED]}), encoding="utf-8")
    if text is not None:
        bad.write_bytes(text if isinstance(text, bytes) else text.encode())
    given = [str(good), str(bad)] if place else [str(bad), str(good)]
    assert compare.main(given) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"{bad}: ")
    assert said in errors


def test_the_recorded_counts_compare_with_themselves(capsys):
    record = str(Path(__file__).parents[2] / "bench" / "results" / "counts.json")
    assert compare.main([record, record]) == 0
    assert capsys.readouterr().out.endswith("counts are as they were\n")

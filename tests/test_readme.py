"""The code of README and docs/methods.md runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


METHODS = README.parent / "docs" / "methods.md"


def examples_of(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


EXAMPLES, OF_METHODS = examples_of(README), examples_of(METHODS)


def run(example):
    """What an example leaves behind."""
    names = {}
    exec(example, names)
    return names


def test_the_first_example_trains(capsys):
    report = run(EXAMPLES[0])["optimizer"].report()
    assert report.step == 10
    assert report.micro_batches == {"l1": 4, "mse": 4}
    assert "cosines" in capsys.readouterr().out


def test_the_example_of_gradients_resolves_them():
    names = run(EXAMPLES[1])
    assert names["weights"].shape == (2,)
    assert all(p.grad is not None for p in names["parameters"])


def test_the_example_of_conflicts_finds_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(EXAMPLES[2])
    assert (tmp_path / "conflicts.png").stat().st_size > 10_000
    assert len(names["rows"]) == 300
    assert capsys.readouterr().out.startswith(names["optimizer"].advise().split("\n")[0])


@pytest.mark.parametrize(("example", "count"), [(EXAMPLES[3], 3), (OF_METHODS[0], 4)])
def test_the_examples_of_other_methods_print_their_weights(example, count, capsys):
    run(example)
    assert capsys.readouterr().out.count("mse") == count


def test_the_example_of_layers_draws_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(OF_METHODS[1])
    said = capsys.readouterr().out
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    assert "below -0.02" in said
    shares = {line.split(":")[0]: int(line.split()[-6]) for line in said.splitlines()[-3:]}
    assert shares["Recon"] < shares["all shared"]


def test_the_example_of_mixed_precision_trains():
    names = run(EXAMPLES[4])
    assert names["optimizer"].report().step == 10
    assert names["optimizer"].report().skipped_steps < 10


@pytest.mark.slow
def test_the_example_of_many_gpus_runs_in_two_processes(tmp_path):
    (tmp_path / "train.py").write_text(EXAMPLES[5])
    # --standalone takes a port of its own.
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    result = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "checkpoint" / ".metadata").exists()


def test_the_other_examples_run():
    assert (len(EXAMPLES), len(OF_METHODS)) == (7, 2)
    run(EXAMPLES[6])


def test_what_it_shows_of_trainers_is_in_the_examples():
    text = README.read_text().split("## With your trainer")[1].split("\n## ")[0]
    shown = re.findall(r"\]\((examples/\w+\.py)\).*?```\n(.*?)```", text, flags=re.DOTALL)
    assert len(shown) == 4
    for example, block in shown:
        lines = [line.strip() for line in (README.parent / example).read_text().splitlines()]
        for line in block.splitlines():
            assert line.strip() in lines, f"{example}: {line}"


@pytest.mark.parametrize("path", [README, METHODS], ids=["README", "methods"])
def test_every_file_that_is_named_exists(path):
    text = path.read_text().replace("](../", "](")
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    named += re.findall(r"`((?:tests|bench)/[\w./]+)[` ]", text)
    named += re.findall(r"\]\((examples/[\w./]+)\)", text)
    assert named
    for name in named:
        assert (README.parent / name).exists(), name


def rows_of(text, first):
    """The rows of the table whose heading begins with this, name → cells."""
    table = text[text.index(f"| {first}") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return rows[0][1:], {name: cells for name, *cells in rows[2:]}


@pytest.mark.parametrize(("heading", "N"), [("## 1 B", 1.0), ("## 70 B", 70.0)])
@pytest.mark.parametrize(("quantity", "place"), [("sent", 0), ("memory", 1)])
def test_the_numbers_on_traffic_are_those_of_the_formulas(heading, N, quantity, place):
    text = (README.parent / "docs" / "traffic.md").read_text()
    _, formulas = rows_of(text, "strategy | bytes sent")
    columns, numbers = rows_of(text[text.index(heading) :], f"{quantity}, GB")
    assert set(formulas) == {name for name in numbers if "*" not in name}
    for name, formula in formulas.items():
        code = formula[place].replace("·", "*").replace("4K", "4*K").replace("2K", "2*K")
        for column, cell in zip(columns, numbers[name], strict=True):
            K, P = (int(part.split("=")[1]) for part in column.split(","))
            value = eval(code, {"N": N, "K": K, "P": P, "A": 8, "s": (P - 1) / P})
            shown = float(cell.replace(",", "").removesuffix("✗"))
            assert shown == pytest.approx(value, rel=5e-3), (name, column)

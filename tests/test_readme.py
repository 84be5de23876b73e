"""The README's code runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs_and_trains(capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) == 2
    for number, code in enumerate(examples):
        names = {}
        exec(code, names)
        if number == 0:
            report = names["optimizer"].report()
    assert report.step == 10
    assert report.micro_batches == {"l1": 4, "mse": 4}
    assert "cosines" in capsys.readouterr().out


def test_every_file_that_is_named_exists():
    text = README.read_text()
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text) + re.findall(
        r"`((?:tests|bench)/[\w./]+)[` ]", text
    )
    assert named
    for name in named:
        assert (README.parent / name).exists(), name

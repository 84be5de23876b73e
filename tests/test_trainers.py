"""The examples for trainers: they run, learn, count steps, and go on from a checkpoint."""

import copy
import importlib.util
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_optimizer import same

from gcond_kernels import GCondFused

EXAMPLES = Path(__file__).parent.parent / "examples"
WINDOWS = 30  # 8 epochs of 15 micro-batches, 4 to a window; an epoch ends inside a window


def load(name):
    """The example as a module; its `__main__` part does not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lightning():
    pl = pytest.importorskip("pytorch_lightning", reason="the example needs PyTorch Lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():  # what it says of itself and of this machine
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        yield pl


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate", reason="the example needs Hugging Face Accelerate")


@pytest.mark.parametrize("name", ["lightning_example", "accelerate_example"])
def test_an_example_is_short(name):
    lines = [line.strip() for line in (EXAMPLES / f"{name}.py").read_text().splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", '"""'))]
    assert len(code) <= 34


# What the trainers still hold when Python ends, gloo's threads may let go of too late, which aborts
# the process (torch's own, with or without GCond): so these end without ceremony.
LIGHTNING_DDP = """
import logging, os, sys
sys.path.insert(0, sys.argv[1])
import lightning_example as example
if __name__ == "__main__":
    sys.stdout = open(f"said_{os.environ.get('LOCAL_RANK', '0')}.txt", "w")
    example.main(devices=2, strategy="ddp", accelerator="cpu", logger=False,
                 enable_checkpointing=False, enable_progress_bar=False,
                 enable_model_summary=False)
    sys.stdout.close()
    os._exit(0)
"""


@pytest.mark.slow
def test_two_ranks_of_lightning_decide_alike(lightning, tmp_path):
    (tmp_path / "two.py").write_text(LIGHTNING_DDP)
    said = subprocess.run(
        [sys.executable, "two.py", str(EXAMPLES)], cwd=tmp_path, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    steps = [(tmp_path / f"said_{rank}.txt").read_text() for rank in (0, 1)]
    assert "16 steps;" in steps[0]
    assert steps[0] == steps[1]


ACCELERATE_DDP = """
import os, sys
sys.path.insert(0, sys.argv[1])
import accelerate_example as example
from accelerate import Accelerator
def main():
    accelerator = Accelerator()
    parts = example.prepare(accelerator)
    for _ in range(8):
        example.train(*parts)
    print(f"norm {parts[0].report().gradient_norm} of {accelerator.num_processes}\\n", end="")
main()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_two_ranks_of_accelerate_decide_alike(accelerate, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",  # a port of its own
        "--nproc-per-node", "2", "two.py", str(EXAMPLES),
    ]  # fmt: skip
    (tmp_path / "two.py").write_text(ACCELERATE_DDP)
    said = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr[-3000:]
    assert "of 2" in said.stdout
    decisions = re.findall(r"norm [0-9.]+", said.stdout)
    assert len(decisions) == 2
    assert decisions[0] == decisions[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs"),
    [("lightning_example", "pytorch_lightning"), ("accelerate_example", "accelerate")],
)
def test_an_example_runs_as_a_script_and_leaves_nothing_behind(name, needs, tmp_path):
    pytest.importorskip(needs, reason=f"the example needs {needs}")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "l1" in result.stdout
    assert list(tmp_path.iterdir()) == []


# PyTorch Lightning.


class Seen:
    """What a run did, taken down after each micro-batch by a Lightning callback."""

    def __init__(self, pl):
        self.losses, self.steps, self.rates = [], [], []
        self.callback = pl.callbacks.LambdaCallback(on_train_batch_end=self.note)

    def note(self, trainer, module, *_):
        self.trainer, self.optimizer = trainer, trainer.optimizers[0]
        self.losses.append({k: v.item() for k, v in trainer.callback_metrics.items()})
        self.steps.append(trainer.global_step)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.states = copy.deepcopy((module.state_dict(), self.optimizer.state_dict()))


def fit(pl, folder, *, callbacks=(), **options):
    """Runs the example, always on the same data, and tells what was seen."""
    example, seen = load("lightning_example"), Seen(pl)
    torch.manual_seed(0)
    example.main(
        accelerator="cpu",
        callbacks=[seen.callback, *callbacks],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    return seen


def test_lightning_trains_counts_steps_and_schedules(lightning, tmp_path):
    seen = fit(lightning, tmp_path, enable_checkpointing=False)
    assert len(seen.losses) == 120
    for task in ("l1", "mse"):
        first, last = (
            sum(losses[task] for losses in part) for part in (seen.losses[:15], seen.losses[-15:])
        )
        assert last < 0.7 * first
    assert seen.steps == [(number + 1) // 4 for number in range(120)]
    assert seen.trainer.global_step == WINDOWS == seen.optimizer.report().step
    assert seen.rates[-1] == pytest.approx(0.02 * 0.99**WINDOWS)


@pytest.mark.slow
def test_lightning_goes_on_from_a_checkpoint_inside_a_window_to_the_same_bits(lightning, tmp_path):
    keep = lightning.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{epoch}-{step}", every_n_epochs=1, save_top_k=-1
    )
    whole = fit(lightning, tmp_path, callbacks=[keep])
    saved = tmp_path / "epoch=2-step=11.ckpt"  # 45 micro-batches: 11 windows and one more
    window = torch.load(saved)["optimizer_states"][0]["gcond"]["window"]
    assert window["position"] == 1

    resumed = fit(lightning, tmp_path, ckpt_path=saved)
    assert resumed.steps == whole.steps[45:]
    assert resumed.losses == whole.losses[45:]
    assert same(resumed.states, whole.states)
    assert resumed.trainer.global_step == WINDOWS


def test_lightnings_wrapper_changes_the_optimizer_itself(lightning):
    """It borrows the methods, and would keep for itself what they set on `self`."""
    from pytorch_lightning.core.optimizer import LightningOptimizer

    model = torch.nn.Linear(4, 2)
    optimizer = GCondFused(torch.optim.SGD(model.parameters(), lr=0.1), {"a": 1.0, "b": 1.0})
    wrapper = LightningOptimizer(optimizer)
    wrapper.on_nonfinite = "drop_task"
    assert optimizer.on_nonfinite == "drop_task"
    for step in (1, 2):
        y = model(torch.ones(3, 4))
        assert wrapper.backward({"a": y.mean(), "b": y.square().mean()})
        assert optimizer.active_tasks == wrapper.active_tasks == ()
        wrapper.resolve()
        optimizer.step()  # and does not resolve again
        assert optimizer.report().step == wrapper.report().step == step
        assert len(wrapper.recorder) == step


def test_lightning_in_float16_by_its_scaler(lightning, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    precision = lightning.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
    seen = fit(lightning, tmp_path, enable_checkpointing=False, plugins=[precision])
    assert seen.optimizer.grad_scaler is scaler
    skipped = seen.optimizer.report().skipped_steps
    assert 0 < skipped < 20  # from a scale that is too large it finds its own
    assert scaler.get_scale() == 2.0 ** (30 - skipped)
    assert seen.trainer.global_step == WINDOWS
    assert seen.losses[-1]["mse"] < seen.losses[0]["mse"]


# Hugging Face Accelerate.


def test_accelerate_trains_and_schedules(accelerate):
    example = load("accelerate_example")
    torch.manual_seed(0)
    parts = example.prepare(accelerate.Accelerator(cpu=True))
    losses = [example.train(*parts) for _ in range(8)]
    for task in ("l1", "mse"):
        assert losses[-1][task] < 0.7 * losses[0][task]
    gcond, _, optimizer, scheduler, _ = parts
    assert gcond.report().step == WINDOWS
    assert optimizer.param_groups is gcond.param_groups
    assert scheduler.get_last_lr() == [pytest.approx(0.02 * 0.99**WINDOWS)]


def test_accelerate_goes_on_from_a_saved_state_inside_a_window_to_the_same_bits(
    accelerate, tmp_path
):
    example = load("accelerate_example")

    def fresh(seed):
        accelerator = accelerate.Accelerator(cpu=True)
        torch.manual_seed(0)
        parts = example.prepare(accelerator)
        torch.manual_seed(seed)
        for p in parts[1].parameters():
            torch.nn.init.normal_(p)
        return accelerator, parts

    accelerator, parts = fresh(1)
    for _ in range(3):
        example.train(*parts)
    assert parts[0].state_dict()["gcond"]["window"]["position"] == 1
    accelerator.save_state(tmp_path)
    expected = [example.train(*parts) for _ in range(3)]

    accelerator, other = fresh(2)
    accelerator.load_state(tmp_path)
    assert [example.train(*other) for _ in range(3)] == expected
    assert same(parts[0].state_dict(), other[0].state_dict())
    assert same(parts[1].state_dict(), other[1].state_dict())
    assert parts[3].get_last_lr() == other[3].get_last_lr()


def test_accelerate_steps_by_its_scaler(accelerate):
    """As with mixed_precision="fp16", which Accelerate refuses on a CPU."""
    example, scaler = load("accelerate_example"), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = scaler
    gcond, model, optimizer, *rest = example.prepare(accelerator)
    assert gcond.grad_scaler is optimizer.scaler is scaler
    torch.manual_seed(0)
    plain = example.prepare(accelerate.Accelerator(cpu=True))
    expected = [example.train(*plain) for _ in range(2)]
    assert [example.train(gcond, model, optimizer, *rest) for _ in range(2)] == expected
    # 30 micro-batches: seven steps, and two micro-batches that wait.
    overflow = model(torch.ones(1, 8)).sum() * torch.inf
    gcond.backward(dict.fromkeys(gcond.tasks, overflow))
    optimizer.step()
    assert scaler.get_scale() == 2.0**9
    assert gcond.report().skipped

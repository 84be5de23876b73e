"""The trainers' examples come to what a plain loop comes to, and go on from their checkpoints."""

import os
import runpy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from gcond_kernels import GCondFused
from tests.helpers import trainer_runs as runs
from tests.helpers.models import same

NEEDS = {
    "accelerate": "accelerate",
    "fabric": "lightning_fabric",
    "lightning": "pytorch_lightning",
    "transformers": "transformers",
}
STEPS = 6  # two epochs of windows of 8, 8 and 4 micro-batches


def needs(*trainers):
    for trainer in trainers:
        pytest.importorskip(NEEDS[trainer], reason=f"the example needs {NEEDS[trainer]}")


def close(values, expected):
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def accelerator():
    needs("accelerate")
    from accelerate import Accelerator

    return Accelerator(gradient_accumulation_steps=runs.WINDOW, cpu=True)


ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)


def linear(step):
    """The learning rate by Trainer's default scheduler."""
    return 0.1 * (1 - step / STEPS)


def test_clipping_makes_a_difference_to_what_is_compared_here():
    for options in ({}, {"optimizer": ADAMW, "rate": linear}):
        pairs = zip(runs.plain(**options), runs.plain(max_norm=None, **options), strict=True)
        assert max((a - b).abs().max() for a, b in pairs) > 1e-3  # of 1e-5


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short(name):
    lines = (runs.EXAMPLES / f"{name}_example.py").read_text().splitlines()
    lines = [line.strip() for line in lines]
    code = [line for line in lines if line and not line.startswith(("#", '"""', "`"))]
    assert len(code) <= 30


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_as_a_script(name, tmp_path, monkeypatch):
    needs(name)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(runs.EXAMPLES / f"{name}_example.py"), run_name="__main__")
    left = {path.name for path in tmp_path.glob("**/checkpoint-*/*")}
    assert ("optimizer.pt" in left) == (name == "transformers")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes came to, by trainer."""
    needs(*NEEDS)
    folder = tmp_path_factory.mktemp("two_ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        runs.__file__,
        str(folder),
    ]
    said = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert said.returncode == 0, said.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # Accelerate's scheduler makes a step for each rank.
        ("accelerate", {"rate": lambda step: 0.1 * 0.81**step}),
        ("fabric", {}),
        ("lightning", {"shuffled": True}),
        ("transformers", {"optimizer": ADAMW, "rate": lambda step: 0.1 * (1 - step / 4)}),
    ],
)
def test_two_ranks_come_to_what_one_plain_loop_comes_to(two_ranks, name, options):
    first, second = (rank[name] for rank in two_ranks)
    assert same(first, second)
    close(first[0], runs.plain(2, **options))


def test_two_ranks_of_trainer_go_on_from_a_checkpoint_to_the_same_bits(two_ranks):
    for rank in two_ranks:
        assert same(rank["resumed"], rank["transformers"])


# Hugging Face Trainer.


def test_trainer_comes_to_what_a_plain_loop_comes_to(tmp_path):
    needs("transformers")
    trainer = runs.transformers(tmp_path)
    assert trainer.state.global_step == STEPS == trainer.gcond.report().step
    close(runs.values(trainer.model), runs.plain(optimizer=ADAMW, rate=linear))


@pytest.mark.parametrize("saved_after", [2, 3])  # inside an epoch, and at its end
def test_trainer_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, saved_after):
    needs("transformers")
    from gcond_kernels import GCond

    options = {"method": GCond(), "train_sampling_strategy": "random"}
    whole = runs.transformers(
        tmp_path, save_strategy="steps", save_steps=saved_after, save_only_model=False, **options
    )
    checkpoint = tmp_path / f"checkpoint-{saved_after}"
    resumed = runs.transformers(tmp_path, resume=str(checkpoint), **options)
    assert resumed.gcond.report().step == STEPS
    assert same(runs.values(resumed.model), runs.values(whole.model))
    assert same(resumed.gcond.state_dict(), whole.gcond.state_dict())


def test_trainer_without_tasks_fails_at_its_first_step(tmp_path):
    needs("transformers")
    from transformers import Trainer, TrainingArguments

    class Model(nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).mean()}

    model = Model(4, 2)
    gcond = GCondFused(torch.optim.SGD(model.parameters(), lr=0.1), {"a": 1.0})
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(model, args, train_dataset=[{"x": torch.ones(4)}], optimizers=(gcond, None))
    with pytest.raises(RuntimeError, match=r"call backward\(losses\)"):
        trainer.train()


# PyTorch Lightning.


def test_lightning_in_bfloat16_comes_to_what_a_plain_loop_comes_to():
    needs("lightning")
    trainer = runs.lightning()
    assert trainer.global_step == STEPS
    close(runs.values(trainer.lightning_module), runs.plain(bfloat16="all"))


def test_lightning_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    needs("lightning")
    from gcond_kernels import GCond

    whole = runs.lightning(GCond(), enable_checkpointing=True, default_root_dir=tmp_path)
    (saved,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert saved.name == "epoch=1-step=6.ckpt"
    longer = runs.lightning(GCond(), max_epochs=3)
    resumed = runs.lightning(GCond(), max_epochs=3, ckpt_path=str(saved))
    assert whole.global_step == STEPS
    assert longer.global_step == resumed.global_step == 9
    assert same(runs.values(longer.lightning_module), runs.values(resumed.lightning_module))
    assert same(longer.optimizers[0].state_dict(), resumed.optimizers[0].state_dict())


def test_lightning_in_float16_by_its_scaler_clips_too():
    needs("lightning")
    import pytorch_lightning as pl

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    precision = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)
    trainer = runs.lightning(max_epochs=10, precision=None, plugins=[precision])
    (optimizer,) = trainer.optimizers
    assert optimizer.grad_scaler is scaler
    skipped = optimizer.report().skipped_steps
    assert 0 < skipped < 20  # from a scale that is too large it finds its own
    assert scaler.get_scale() == 2.0 ** (30 - skipped)
    assert trainer.global_step == 30


def test_lightnings_wrapper_changes_the_optimizer_itself():
    """It borrows the methods, and would keep for itself what they set on `self`."""
    needs("lightning")
    from pytorch_lightning.core.optimizer import LightningOptimizer

    model = nn.Linear(4, 2)
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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightnings_automatic_optimization_is_refused(precision):
    needs("lightning")
    import pytorch_lightning as pl

    class Automatic(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(4, 2)

        def configure_optimizers(self):
            return GCondFused(torch.optim.SGD(self.parameters(), lr=0.1), {"a": 1.0})

        def training_step(self, batch, batch_idx):  # noqa: ARG002  Lightning calls it so
            return self.model(batch).mean()

    trainer = pl.Trainer(
        max_epochs=1, enable_checkpointing=False, precision=precision, **runs.QUIET
    )
    with pytest.raises(TypeError, match="automatic_optimization = False"):
        trainer.fit(Automatic(), torch.utils.data.DataLoader(torch.ones(4, 4)))


# Lightning Fabric.


def test_fabric_comes_to_what_a_plain_loop_comes_to():
    needs("fabric")
    model, optimizer = runs.fabric()
    close(runs.values(model), runs.plain())
    assert optimizer.report().step == STEPS


def test_fabric_in_bfloat16_comes_to_what_a_plain_loop_comes_to():
    needs("fabric")
    close(runs.values(runs.fabric(precision="bf16-mixed")[0]), runs.plain(bfloat16="forward"))


def test_fabric_in_float16_by_its_scaler_clips_too():
    needs("fabric")
    from lightning_fabric.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    _, optimizer = runs.fabric(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    report = optimizer.report()
    assert report.step == STEPS
    assert report.skipped_steps > 0
    assert scaler.get_scale() == 2.0 ** (30 - report.skipped_steps)


def test_fabric_that_requires_its_own_backward_gets_an_error_with_a_remedy():
    needs("fabric")
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    model = fabric.setup(nn.Linear(4, 2))
    gcond = GCondFused(torch.optim.SGD(model.parameters(), lr=0.1), {"a": 1.0})
    with pytest.warns(match="its window is dropped"), pytest.raises(RuntimeError, match="autocast"):
        gcond.backward({"a": model(torch.ones(4)).sum()})


def test_fabric_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    needs("fabric")
    from lightning_fabric import Fabric

    example, one = runs.load("fabric"), Fabric(accelerator="cpu")

    def fresh():
        model, optimizer, loader = example.prepare(one)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        return state, lambda: example.train(one, model, optimizer, scheduler, loader)

    torch.manual_seed(0)
    state, train = fresh()
    train()
    one.save(tmp_path / "state", state)
    torch.manual_seed(0)
    other, go_on = fresh()
    one.load(tmp_path / "state", other)
    train()
    go_on()
    for part in state:
        assert same(state[part].state_dict(), other[part].state_dict())


# Hugging Face Accelerate.


def test_accelerate_comes_to_what_a_plain_loop_comes_to(accelerator):
    model, gcond, optimizer, scheduler, _ = runs.accelerate(accelerator)
    close(runs.values(model), runs.plain())
    assert gcond.report().step == STEPS
    assert gcond.report().micro_batches == {"l1": 4, "mse": 4}  # of the short window
    assert optimizer.param_groups is gcond.param_groups
    assert scheduler.get_last_lr() == [pytest.approx(0.1 * 0.9**STEPS)]


def test_accelerate_goes_on_from_a_saved_state_to_the_same_bits(accelerator, tmp_path):
    from accelerate import Accelerator

    from gcond_kernels import GCond

    parts = runs.accelerate(accelerator, 1, GCond())
    accelerator.save_state(tmp_path)
    example = runs.load("accelerate")
    example.train(accelerator, *parts)
    other = Accelerator(gradient_accumulation_steps=runs.WINDOW, cpu=True)
    fresh = runs.accelerate(other, 0, GCond())
    other.load_state(tmp_path)
    example.train(other, *fresh)
    assert same(parts[0].state_dict(), fresh[0].state_dict())
    assert same(parts[1].state_dict(), fresh[1].state_dict())
    assert parts[3].get_last_lr() == fresh[3].get_last_lr()


def test_accelerate_steps_and_clips_by_its_scaler(accelerator, monkeypatch):
    """As with mixed_precision="fp16", which Accelerate refuses on a CPU."""
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    example = runs.load("accelerate", method=runs.Sum())
    model, gcond, optimizer, *rest = example.prepare(accelerator)
    assert gcond.grad_scaler is optimizer.scaler is scaler
    # So clip_grad_norm_ calls scaler.unscale_.
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    monkeypatch.setattr(accelerator, "native_amp", True)
    for _ in range(runs.EPOCHS):
        example.train(accelerator, model, gcond, optimizer, *rest)
    close(runs.values(model), runs.plain())
    for _ in range(runs.WINDOW):
        overflow = model(torch.ones(1, 8)).sum() * torch.inf
        gcond.backward(dict.fromkeys(gcond.tasks, overflow))
    optimizer.step()
    assert scaler.get_scale() == 2.0**9
    assert gcond.report().skipped


def test_a_short_window_that_accelerate_does_not_step_with_is_an_error_that_names_it(accelerator):
    model, gcond, optimizer, _, loader = runs.accelerate(accelerator, 0)

    def epoch():
        for x, y in loader:
            with accelerator.accumulate(model):
                error = model(x) - y
                if gcond.backward({"l1": error.abs().mean(), "mse": error.square().mean()}):
                    optimizer.step()  # in the second epoch Accelerate does nothing here

    epoch()
    with pytest.raises(RuntimeError, match=r"Accelerate .* accelerator.sync_gradients: .*resolve"):
        epoch()


# torch.compile, and base optimizers that go by more than .grad.


def losses_of(y):
    return {"a": y.abs().mean(), "b": (y - 1).square().mean()}


def compiled_step(model, optimizer, compiled):
    step, resolve = compiled(optimizer.step), compiled(optimizer.resolve)

    def one(x, last):
        if optimizer.backward(losses_of(model(x))) or last:
            resolve()
            step()

    return one


def compiled_loop(model, optimizer, compiled):
    def one(x, last):
        if optimizer.backward(losses_of(model(x))) or last:
            optimizer.resolve()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    return compiled(one)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [compiled_step, compiled_loop])
def test_compiled_training_steps_come_to_the_same(backend, make):
    def train(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
        one = make(model, GCondFused(adamw, {"a": 1.0, "b": 1.0}, accumulation_steps=2), compiled)
        for number, x in enumerate(torch.randn(5, 3, 4), start=1):
            one(x, number == 5)
        return runs.values(model)

    torch.compiler.reset()
    close(train(partial(torch.compile, backend=backend)), train(lambda function: function))


@pytest.mark.parametrize("name", ["LBFGS", "SAM", "AdaHessian", "SophiaH"])
def test_a_base_that_needs_more_than_a_gradient_is_refused_with_a_way_out(name):
    of = pytest.importorskip("pytorch_optimizer", reason="they are in pytorch_optimizer")
    model = nn.Linear(4, 2)
    options = {"base_optimizer": torch.optim.SGD, "lr": 0.1} if name == "SAM" else {}
    base = getattr(of, name)(model.parameters(), **options)

    def train():
        optimizer = GCondFused(base, {"a": 1.0})
        optimizer.backward({"a": model(torch.ones(4)).sum()})
        optimizer.step()

    refusal = rf"{name}.step .*(?:[Tt]ake|[Uu]se) a.* base optim"
    with pytest.raises((TypeError, RuntimeError), match=refusal):
        train()


def test_parameters_on_meta_are_refused_when_the_optimizer_is_made():
    model = nn.Linear(4, 2, device="meta")
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        GCondFused(torch.optim.SGD(model.parameters(), lr=0.1), {"a": 1.0})

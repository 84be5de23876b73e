"""Runs of the trainers' examples, with the plain sum in the place of GCond; and the plain loop.

By torchrun it runs all of them on two ranks, and saves the parameters that each came to.
"""

import importlib.util
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import l1_loss, mse_loss

from gcond_kernels import GCondFused, Sum

EXAMPLES = Path(__file__).parents[2] / "examples"
EPOCHS = 2
WINDOW = 8  # of 20 micro-batches in an epoch, or 10 of each of two ranks: the last one is short
autocast = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric|torch\.utils\.data")


def load(name, **options):
    """An example as a module, with more options of GCondFused; nothing runs yet."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}_example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.GCondFused = partial(GCondFused, **options)
    torch.manual_seed(0)
    return module


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def accelerate(accelerator, epochs=EPOCHS, method=None):
    example = load("accelerate", method=method or Sum())
    parts = example.prepare(accelerator)
    for _ in range(epochs):
        example.train(accelerator, *parts)
    return parts


def fabric(method=None, **options):
    from lightning_fabric import Fabric

    example, one = load("fabric", method=method or Sum()), Fabric(accelerator="cpu", **options)
    one.launch()
    model, optimizer, loader = example.prepare(one)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(EPOCHS):
        example.train(one, model, optimizer, scheduler, loader)
    return model, optimizer


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def lightning(
    method=None,
    ckpt_path=None,
    precision="bf16-mixed",
    max_epochs=EPOCHS,
    enable_checkpointing=False,
    **options,
):
    import pytorch_lightning as pl

    example = load("lightning", method=method or Sum())
    trainer = pl.Trainer(
        precision=precision,
        max_epochs=max_epochs,
        enable_checkpointing=enable_checkpointing,
        **QUIET,
        **options,
    )
    example.fit(trainer, ckpt_path)
    return trainer


def transformers(folder, method=None, **options):
    example = load("transformers", method=method or Sum())
    fixed = {
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.1,
        "gradient_accumulation_steps": WINDOW,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
    }
    return example.main(str(folder), **{**fixed, **options})


def plain(ranks=1, *, optimizer=None, rate=None, max_norm=0.5, bfloat16=None, shuffled=False):
    """What a plain loop of torch makes of the examples' data and model.

    Args:
        ranks: a micro-batch is that of all of them.
        optimizer: of the parameters; by default the SGD of the examples.
        rate: the learning rate as a function of the number of steps before.
        max_norm: of the gradient; None does not clip.
        bfloat16: by autocast, "all" or the "forward" pass of the model alone.
        shuffled: as DistributedSampler does it, of which Lightning takes one for several ranks.
    """
    torch.manual_seed(0)
    x = torch.randn(160, 8)
    model = torch.nn.Linear(8, 2)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer = (optimizer or sgd)(model.parameters())
    rate = rate or (lambda step: 0.1 * 0.9**step)
    step = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        batches = (x[order] if shuffled else x).split(8 * ranks)
        for start in range(0, len(batches), WINDOW):
            window = batches[start : start + WINDOW]
            optimizer.zero_grad()
            for batch in window:
                with autocast(enabled=bfloat16 is not None):
                    y = model(batch)
                with autocast(enabled=bfloat16 == "all"):
                    losses = [f(y, batch[:, :2] - batch[:, 2:4]) for f in (l1_loss, mse_loss)]
                # One after the other: their sum would be rounded otherwise in bfloat16.
                for weight, loss in zip((0.85, 0.15), losses, strict=True):
                    (weight / len(window) * loss).backward(retain_graph=True)
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            step += 1
    return values(model)


def on_two_ranks(folder):
    """All examples, one after the other, in one pair of processes."""
    from accelerate import Accelerator

    results = {}
    parts = accelerate(Accelerator(gradient_accumulation_steps=WINDOW, cpu=True))
    results["accelerate"] = values(parts[0]), parts[1].report().gradient_norm
    saved = transformers(folder / "trainer", save_strategy="steps", save_steps=2)
    results["transformers"] = values(saved.model), saved.gcond.report().gradient_norm
    resumed = transformers(folder / "trainer", resume=str(folder / "trainer" / "checkpoint-2"))
    results["resumed"] = values(resumed.model), resumed.gcond.report().gradient_norm
    results["fabric"] = values(fabric(strategy="ddp", devices=2)[0]), None
    trainer = lightning(strategy="ddp", devices=2, precision="32-true", default_root_dir=folder)
    results["lightning"] = values(trainer.lightning_module), trainer.global_step
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_two_ranks(Path(sys.argv[1]))
    # What the trainers still hold when Python ends, gloo's threads may let go of too late, which
    # aborts the process (torch's own, with or without GCond): so it ends without ceremony.
    sys.stdout.flush()
    os._exit(0)

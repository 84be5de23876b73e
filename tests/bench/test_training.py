"""The bench of a training step: its models, its figures, and the checks before them."""

import argparse
import importlib.util
import math
from functools import partial
from itertools import groupby
from types import ModuleType

import pytest
import torch
from torch import nn

from bench import models, training
from bench.models import ConvNeXtSize, TransformerSize, new_model, shapes_of
from bench.record import InputError
from bench.training import Training
from gcond_kernels import GCondFused

TOTALS = {
    "mobilenetv3_small": (2_542_856, 142),
    "convnext_tiny": (28_589_128, 182),
    "convnext_base": (88_591_464, 344),
    "transformer_1b": (1_013_686_272, 197),
}
QUARTILES = {"median", "low", "high"}
SMALL = {"convnext_pico": (32, 2), "transformer_pico": (0, 1)}


@pytest.fixture(autouse=True)
def _small_models(monkeypatch):
    monkeypatch.setitem(models.CONVNEXT, "convnext_pico", ConvNeXtSize((1, 1, 1, 1), (4, 8, 8, 8)))
    monkeypatch.setitem(models.TRANSFORMER, "transformer_pico", TransformerSize(1, 16, 2, 32, 8))


def small(name: str = "convnext_pico", **changes) -> Training:
    resolution, batch = SMALL[name]
    options = {"batch": batch, "resolution": resolution, "accumulation_steps": 4, "seconds": 0.0}
    return Training(name, torch.device("cpu"), **(options | changes))


def measured(by: str, case: Training) -> dict:
    (found,) = (each for each in training.competitors(case, None) if each.by == by)
    return training.measured(case, found, training.new_window(case, training.plain)[1])


@pytest.mark.parametrize("name", TOTALS)
def test_models_have_the_parameters_that_their_papers_say(name):
    shapes = shapes_of(name)
    assert (sum(map(math.prod, shapes)), len(shapes)) == TOTALS[name]


def test_a_token_sees_none_of_those_after_it():
    model = new_model("transformer_pico")
    tokens = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5] = 31
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("name", SMALL)
def test_each_loss_needs_all_parameters(name):
    model, (inputs, targets) = small(name).new_model(), small(name).batches[0]
    for task in small(name).tasks.values():
        model.zero_grad()
        task.loss(model(inputs), targets).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_figure_for_every_method(name):
    figures = {f["by"]: f for f in training.training_figures(small(name), None)}
    passes = {by: figure["backward_passes"] for by, figure in figures.items()}
    assert passes.pop("plain accumulation") == passes.pop("GCondFused stochastic") == 4
    assert passes == {"GCondFused exact": 8, "TorchJD UPGrad": 8}
    for by, figure in figures.items():
        assert "error" not in figure, figure
        assert (figure["section"], figure["operation"]) == ("training", "optimizer step")
        assert figure["model"] == name.replace("_", " ")
        assert figure["parameters"] == sum(p.numel() for p in new_model(name).parameters())
        assert figure["seconds"].keys() == figure["relative"].keys() == QUARTILES
        assert figure["samples_per_second"] > 0
        assert figure["bytes_per_parameter"] == figure["peak_bytes"] / figure["parameters"]
        assert ("backend" in figure) == by.startswith("GCondFused")
        assert "target" not in figure  # a small model has none


@pytest.mark.parametrize(("median", "met"), [(1.01, True), (1.02, False)])
def test_stochastic_is_held_to_its_target_in_large_models(monkeypatch, median, met):
    monkeypatch.setattr(training, "LEAST_PARAMETERS_WITH_TARGET", 1)
    monkeypatch.setattr(training, "in_turns", lambda *_: ([1.0] * 3, [median] * 3))
    figure = measured("GCondFused stochastic", small())
    assert (figure["target"], figure["met"]) == ({"relative": 1.01}, met)
    assert "target" not in measured("plain accumulation", small())


def test_samples_are_counted_once_whatever_their_losses(monkeypatch):
    monkeypatch.setattr(training, "in_turns", lambda *_: ([2.0] * 3, [1.0] * 3))
    assert measured("GCondFused exact", small(batch=3))["samples_per_second"] == 3 * 4 / 2.0


def test_the_published_code_takes_part_where_it_is_given(monkeypatch):
    made = []

    class Stub:
        def __init__(self, module, model, losses, _base, steps, mode):
            weights = {task: weight for task, (_, weight) in losses.items()}
            made.append((module, weights, steps, mode))
            self.window = lambda batches: model(batches[0][0])

    monkeypatch.setattr(training, "PublishedTraining", Stub)
    module = ModuleType("grad_conductor")
    case, weights = small(), {"hard": 0.5, "soft": 0.5}
    last = list(training.competitors(case, module))[-2:]
    for each, mode, passes in zip(last, ("exact", "stochastic"), (2, 1), strict=True):
        assert (each.by, each.passes) == (f"published code {mode}", passes)
        assert "seconds" in training.measured(case, each, lambda _: None)
        assert made.pop() == (module, weights, 4, mode)


def test_methods_take_turns():
    order = []
    run, baseline = (partial(order.append, name) for name in ("run", "baseline"))
    seconds, relative = training.in_turns(small(), run, baseline)
    assert len(seconds) == len(relative) == 5
    assert [name for name, _ in groupby(order)] == ["run", "baseline"] * 4  # as in the bench's test


@pytest.mark.parametrize("mode", ["exact", "stochastic"])
def test_the_check_finds_a_weight_that_is_wrong(monkeypatch, mode):
    training.check_sum(small(), mode)
    right = GCondFused.__init__

    def wrong(self, base, tasks, **options):
        right(self, base, {task: 1.001 * weight for task, weight in tasks.items()}, **options)

    monkeypatch.setattr(GCondFused, "__init__", wrong)
    with pytest.raises(AssertionError, match=r"differs from plain accumulation by 0\.001"):
        training.check_sum(small(), mode)
    assert "differs" in measured(f"GCondFused {mode}", small())["error"]


def test_a_loss_that_is_not_finite_is_an_error():
    model = small().new_model()
    training.check_losses(small(), model)
    nn.init.constant_(model.head.bias, math.nan)
    with pytest.raises(AssertionError, match="the loss 'hard' is nan after training"):
        training.check_losses(small(), model)


def test_without_torchjd_its_figure_says_so(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "torchjd" else real(name)
    )
    figure = measured("TorchJD UPGrad", small())
    assert "pip install" in figure["skipped"]
    assert "seconds" not in figure


def test_a_method_that_cannot_run_says_why():
    too_few = small(accumulation_steps=1)
    assert "accumulation_steps" in measured("GCondFused stochastic", too_few)["error"]


@pytest.mark.parametrize(("bytes_of_a_task", "met"), [(6.2, True), (5.9, False)])
def test_memory_grows_by_accumulator_and_history_of_a_task(monkeypatch, bytes_of_a_task, met):
    monkeypatch.setattr(training, "BYTES_OF_A_TASK", bytes_of_a_task)
    monkeypatch.setattr(training, "TASKS_OF_MEMORY", (2, 4))
    figures = list(training.memory_figures(torch.device("cpu"), width=512))
    assert [figure["tasks"] for figure in figures] == [1, 2, 4]
    assert [figure.get("met") for figure in figures] == [None, None, met]
    assert figures[0]["by"] == "plain accumulation"
    assert figures[2]["bytes_per_parameter_and_task"] == pytest.approx(6.0, abs=0.1)


@pytest.mark.parametrize(
    "message",
    [
        "--batch 0: must be 1 or more",
        "--resolution 30: must be a multiple of 32",
        "--accumulation-steps 1: stochastic mode",
    ],
)
def test_bad_options_are_named(message):
    with pytest.raises(InputError, match=message):
        training.check(parsed(*message.partition(":")[0].split()))


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    return parser.parse_args(arguments, argparse.Namespace(device=torch.device("cpu"), seconds=2.0))


def test_options_override_what_suits_the_device():
    assert [each.name for each in training.trainings(parsed())] == list(SMALL)
    assert training.trainings(parsed("--training-models")) == []
    arguments = "--training-models convnext_tiny --batch 3 --resolution 96 --accumulation-steps 2"
    (only,) = training.trainings(parsed(*arguments.split()))
    assert (only.name, only.batch, only.resolution) == ("convnext_tiny", 3, 96)
    assert only.accumulation_steps == 2

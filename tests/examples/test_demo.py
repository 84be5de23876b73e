"""The demo: its data, its training loop, and what it writes."""

import io
import json
import re
import subprocess
import sys
import urllib.request
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from skimage.io import imsave
from skimage.metrics import structural_similarity

import gcond_kernels.methods
from examples.demo import app, digits, photos, pictures, summary, training
from examples.demo.__main__ import main
from examples.demo.digits import Digits
from examples.demo.methods import BOUNDARY_X10, DEFAULT, KEYS, METHODS, methods_of
from examples.demo.photos import CROP, SPLIT, WIDTH, Photos
from examples.demo.physics import Kovasznay
from examples.demo.scenes import Batch
from gcond_kernels import GCondFused
from tests.conftest import slow

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
PLAIN, EXACT, STOCHASTIC = methods_of(DEFAULT)
PICTURES = {
    "photos": {"photos_losses.png", "photos_cosine.png", "photos_reconstructions.png"},
    "digits": {"digits_losses.png", "digits_cosine.png", "digits_examples.png"},
    "kovasznay": {f"kovasznay_{kind}.png" for kind in ("losses", "cosine", "error", "field")},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the demo: threads of small models wait for each other where the cores are busy."""
    with app.one_thread():
        yield


@pytest.fixture(scope="module")
def photos_scene() -> Photos:
    images, unreadable = photos.read_images(photos.bundled_files())
    assert not unreadable
    return Photos(images)


@pytest.fixture(scope="module")
def digits_scene() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def kovasznay_scene() -> Kovasznay:
    return Kovasznay()


@pytest.fixture(params=["photos", "digits"])
def scene(request):
    return request.getfixturevalue(f"{request.param}_scene")


def demo(*options: object) -> int:
    return main([str(option) for option in options])


def trained(scene, method, steps=2, seed=0) -> training.Run:
    run = training.new_run(scene, method, steps, seed, CPU)
    for _ in training.train(run, seed):
        pass
    return run


# The data.


def test_ssim_is_that_of_skimage():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 40, 48, generator=generator, dtype=torch.float64)
    b = (a + 0.2 * torch.randn(a.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    theirs = [
        structural_similarity(
            x.numpy(), y.numpy(), channel_axis=0, data_range=1.0, use_sample_covariance=False
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert photos.ssim(a, b).tolist() == pytest.approx(theirs, abs=1e-9)
    assert photos.ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    small = a[:1, :, :9, :9].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: photos.ssim(x, b[:1, :, :9, :9]), small)


def test_the_bundled_images_need_no_network(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("network"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("network"))
    images, unreadable = photos.read_images(photos.bundled_files())
    assert len(images) >= 15
    assert not unreadable
    assert all(i.shape[0] == 3 and i.shape[1] >= CROP and i.shape[2] == WIDTH for i in images)


def test_no_training_crop_touches_the_validation_region():
    # Bright where validation is, dark elsewhere.
    image = torch.zeros(3, 100, WIDTH, dtype=torch.uint8)
    image[:, :, SPLIT:] = 255
    scene = Photos([image])
    assert bool((scene.held_out == 255).all())
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        targets = scene.micro_batch(generator).targets
        assert bool((scene.denormalise(targets) == 0.0).all())


def test_three_quarters_of_the_patches_are_hidden_from_the_network(photos_scene):
    batch = photos_scene.micro_batch(torch.Generator().manual_seed(0))
    hidden = batch.inputs[:, 3:]
    assert hidden.mean().item() == 0.75
    # What is hidden has no part in what the network is given.
    other = torch.where(hidden.bool(), torch.randn(batch.targets.shape), batch.targets)
    assert torch.equal(photos.fill_in(other, hidden), batch.inputs[:, :3])
    assert torch.equal(batch.inputs[:, :3] * (1 - hidden), batch.targets * (1 - hidden))


def test_no_digit_is_in_both_training_and_validation(digits_scene):
    every = [*digits_scene.training_digits.tolist(), *digits_scene.validation_digits.tolist()]
    assert sorted(every) == list(range(len(digits_scene.images)))


def test_digits_are_pasted_completely():
    images = torch.rand(20, 8, 8)
    canvas = digits.paste(images, (3, 4), torch.Generator().manual_seed(0))
    assert torch.allclose(canvas.sum((1, 2)), images.sum((1, 2)))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((40, 50), np.uint8),
        ((40, 50, 3), np.uint8),
        ((40, 50, 4), np.uint8),
        ((500, 90), np.uint16),
        ((70, 900), np.uint8),
        ((1, 1), np.uint8),
    ],
)
def test_images_of_all_kinds_become_rgb_of_one_width(tmp_path, shape, dtype):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
    imsave(tmp_path / "image.png", pixels, check_contrast=False)
    image = photos.read_image(tmp_path / "image.png")
    assert image.dtype == torch.uint8
    assert (image.shape[0], image.shape[2]) == (3, WIDTH)
    assert image.shape[1] >= CROP


def test_floating_point_of_any_range_is_an_image():
    assert photos.to_rgb(np.linspace(-5, 300, 12, dtype=np.float32).reshape(3, 4)).max() == 1.0
    with pytest.raises(ValueError, match="finite"):
        photos.to_rgb(np.full((3, 4), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="shape"):
        photos.to_rgb(np.zeros((3, 4, 5, 6), dtype=np.float32))


# The methods.


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (DEFAULT, ["plain sum", "GCond exact", "GCond stochastic"]),
        (["MGDA", "PCGrad"], ["plain sum", "MGDA", "PCGrad"]),
        (["sum", "plain", "SUM"], ["plain sum", "Sum"]),
        (["plain"], ["plain sum"]),
        (["all"], [method.name for method in METHODS]),
        (
            ["upgrad", "all"],
            ["plain sum", "UPGrad", *[m.name for m in METHODS[1:] if m.key != "upgrad"]],
        ),
    ],
)
def test_methods_come_in_the_order_asked_for_behind_the_plain_sum(names, expected):
    assert [method.name for method in methods_of(names)] == expected


def test_every_method_of_the_package_can_be_compared():
    resolvers = {type(method.resolver).__name__ for method in METHODS if method.resolver}
    assert resolvers == set(gcond_kernels.methods.__all__) - {"Known", "Method", "State"}
    assert set(pictures.METHOD_STYLES) == {*KEYS, BOUNDARY_X10.key}
    # Without looking at colours alone.
    looks = [(s["color"], s["linestyle"], s["marker"]) for s in pictures.METHOD_STYLES.values()]
    assert len(set(looks)) == len({marker for _, _, marker in looks}) == 1 + len(METHODS)


# The training.


def test_all_methods_have_the_same_start_and_micro_batches_and_count_passes(scene, monkeypatch):
    seen: list[list[torch.Tensor]] = []
    draw = type(scene).micro_batch

    def recorded(self, generator):
        batch = draw(self, generator)
        seen[-1].append(torch.cat([batch.inputs.flatten(), batch.targets.flatten()]))
        return batch

    monkeypatch.setattr(type(scene), "micro_batch", recorded)
    untrained, passes = [], []
    for method in (PLAIN, EXACT, STOCHASTIC):
        seen.append([])
        run = trained(scene, method)
        untrained.append(summary.means(run.evaluations[0]))
        passes.append(run.backward_passes)
    assert len(seen[0]) == 2 * scene.accumulation_steps
    for one, other in pairwise(seen):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert untrained[0] == untrained[1] == untrained[2]
    assert passes == [8, 16, 8]


def test_plain_sum_is_ordinary_gradient_accumulation(scene):
    run = training.new_run(scene, PLAIN, 1, 0, CPU)
    generator = torch.Generator().manual_seed(0)
    batches = [scene.micro_batch(generator) for _ in range(scene.accumulation_steps)]
    inputs = torch.cat([batch.inputs for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    losses = scene.losses(run.model, Batch(inputs, targets), scene.tasks)
    total = sum(weight * losses[task].mean() for task, weight in scene.tasks.items())
    parameters = list(run.model.parameters())
    expected = torch.autograd.grad(total, parameters)

    step = training.plain_window(run, torch.optim.SGD(parameters, lr=0.0), batches)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert step.cosine is step.zone is step.winner is None
    assert run.backward_passes == scene.accumulation_steps


@pytest.mark.parametrize("method", [EXACT, methods_of(["sum"])[1]], ids=lambda m: m.name)
def test_without_a_conflict_the_gradient_is_that_of_plain_sum(photos_scene, method):
    generator = torch.Generator().manual_seed(0)
    batches = [photos_scene.micro_batch(generator) for _ in range(4)]
    gradients = []
    for one in (PLAIN, method):
        run = training.new_run(photos_scene, one, 1, 0, CPU)
        optimizer = training.new_optimizer(run, "auto")
        gcond = isinstance(optimizer, GCondFused)
        window = training.gcond_window if gcond else training.plain_window
        step = window(run, optimizer, batches)
        assert step.zone == ("none" if gcond else None)
        gradients.append([parameter.grad for parameter in run.model.parameters()])
    for plain, resolved in zip(*gradients, strict=True):
        assert torch.allclose(plain, resolved, rtol=1e-4, atol=1e-6)


def test_the_same_seed_makes_the_same_run(digits_scene):
    runs = [trained(digits_scene, STOCHASTIC, steps=3, seed=s) for s in (1, 1, 2)]
    assert runs[0].history == runs[1].history != runs[2].history


def test_the_learning_rate_rises_and_falls_to_zero():
    factors = [training.warmup_then_cosine(step, 100) for step in range(101)]
    assert factors[0] < factors[19] > factors[60] > factors[100] == 0.0


# The sentences.


def test_a_difference_within_the_validation_noise_is_called_so():
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0))
    gap, error = summary.difference(noise, torch.zeros(500))
    assert abs(gap) < error
    gap, error = summary.difference(noise + 1.0, torch.zeros(500))
    assert gap > error


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [
        ([0.5] * 19 + [-0.9], "hardly a conflict worth resolving"),
        ([0.5] * 8 + [-0.6, -0.9], "occasional conflicts, with a median cosine of -0.75"),
        ([0.1, -0.02], "frequent conflicts, with a median cosine of -0.02 among them: so weak"),
    ],
)
def test_the_verdict_on_the_conflict_follows_the_cosines(digits_scene, cosines, verdict):
    run = training.new_run(digits_scene, EXACT, len(cosines), 0, CPU)
    zones = ["none" if cosine >= 0.0 else "mild" for cosine in cosines]
    run.history = [training.Step({}, c, zone) for c, zone in zip(cosines, zones, strict=True)]
    assert verdict in summary.conflict_sentence([run])


def test_steps_against_a_task_are_counted(kovasznay_scene):
    run = training.new_run(kovasznay_scene, EXACT, 4, 0, CPU)
    assert summary.against(run) is None
    for rising in ([], ["boundary"], ["residual", "boundary"], ["boundary"]):
        run.history.append(training.Step({}, 0.0, "none", None, 0.0, rising))
    assert summary.against(run) == {"residual": 0.25, "boundary": 0.75}
    said = summary.against_sentence([run])
    assert "75 % of GCond exact (residual 25 %, boundary 75 %)" in said
    calm = training.new_run(kovasznay_scene, EXACT, 4, 0, CPU)
    calm.history = [training.Step({}, 0.5, "none", None, 0.0, [])]
    assert "boundary 75 %); 0 % of the others." in summary.against_sentence([run, calm])
    assert "none of any method." in summary.against_sentence([calm])
    figure = pictures.error_picture([run])
    bars = {c.get_label(): [b.get_width() for b in c] for c in figure.axes[1].containers}
    assert bars == {"against residual": [25.0], "against boundary": [75.0]}


@pytest.mark.parametrize("others", [3, 4])
def test_many_methods_are_summarized_in_one_sentence(digits_scene, others):
    runs = [training.new_run(digits_scene, method, 1, 0, CPU) for method in METHODS[: 1 + others]]
    for number, run in enumerate(runs):
        # Each a little better than the last.
        left = (torch.arange(1000) < 500 + 10 * number).float()
        scores = {"left": left, "right": torch.full((1000,), 0.5)}
        run.evaluations = [training.Evaluation(1, {}, scores)]
        run.history = [training.Step({})]
        if run.method.mode:
            run.history = [training.Step({}, -0.1 * number, "mild", None, 1.0, [])]
    said = summary.sentences(runs)
    differences = [sentence for sentence in said if sentence.startswith("Difference")]
    conflict = next(sentence for sentence in said if sentence.startswith("Conflict"))
    if others > summary.FEW:
        assert len(differences) == 1
        assert "PCGrad +4.0 points (+/- 1.2) in left correct." in differences[0]
        assert "median cosines of -0.40 to -0.10" in conflict
    else:
        assert len(differences) == others
        assert conflict.count("median cosine") == others + 1  # and that of the verdict


def widest_table(scene) -> str:
    """With the widest of what can stand in each column: on a console of 80 columns."""
    runs = [training.new_run(scene, method, 300, 0, CPU) for method in METHODS]
    for run in runs:
        ones = torch.ones(2)
        evaluation = training.Evaluation(300, {}, dict.fromkeys(scene.score_labels, ones))
        run.evaluations, run.seconds, run.backward_passes = [evaluation], 999.9, 99999
        for zone in summary.ALL_ZONES if run.method.mode else ():
            run.history += [training.Step({}, -1.0, zone, None, 1.0, [*scene.tasks])] * 75
    file = io.StringIO()
    Console(file=file, width=80).print(summary.table(runs))
    return file.getvalue()


@pytest.mark.parametrize("scene", ["photos", "digits", "kovasznay"], indirect=True)
def test_the_table_fits_80_columns(scene):
    lines = widest_table(scene).splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line[:17].strip(): line for line in lines}
    for method in METHODS:  # a row each: nothing is broken into two lines
        row = rows[method.name]
        assert "999.9" in row
        assert "99999" in row
        assert ("25/25/25/25" in row) == (method.mode is not None)
        assert row.endswith("100 % " if method.mode else "- ")


def test_what_is_not_a_number_becomes_null():
    found = summary.finite({"a": [1.0, float("nan")], "b": float("inf")})
    assert found == {"a": [1.0, None], "b": None}


# The whole demo.


@pytest.mark.parametrize("name", [slow("photos"), "digits"])
def test_the_demo_writes_pictures_table_and_results(name, tmp_path, capsys):
    output = tmp_path / "new" / "output"
    assert demo("--scene", name, "--steps", 1, "--output", output, "--device", "cpu") == 0
    assert {path.name for path in output.iterdir()} == PICTURES[name] | {"results.json"}
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["versions"]["torch"] == torch.__version__
    assert (results["seed"], results["device"], results["interrupted"]) == (0, "cpu", False)
    methods = results["scenes"][name]["methods"]
    assert list(methods) == ["plain sum", "GCond exact", "GCond stochastic"]
    assert all(len(method["history"]) == method["steps"] == 1 for method in methods.values())
    assert methods["plain sum"]["median_cosine"] is methods["plain sum"]["zone_shares"] is None
    assert sum(methods["GCond exact"]["zone_shares"].values()) == pytest.approx(1.0)
    printed = capsys.readouterr().out
    assert all(method in printed for method in methods)
    assert "one seed" in printed
    assert "Conflict: " in printed
    assert len(printed.splitlines()) < 60  # no flood where there is no terminal


@pytest.mark.parametrize("name", ["kovasznay", slow("burgers")])
def test_the_flows_are_compared_with_their_exact_solutions(name, tmp_path, capsys):
    options = ("--scene", name, "--steps", 2, "--output", tmp_path, "--device", "cpu")
    assert demo(*options) == 0
    kinds = ("losses", "cosine", "error", "field")
    written = {f"{name}_{kind}.png" for kind in kinds} | {"results.json"}
    assert {path.name for path in tmp_path.iterdir()} == written
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    methods = results["scenes"][name]["methods"]
    chosen = ["plain sum", "boundary x 10", "Sum", "GCond exact", "NonConflicting", "PCGrad"]
    assert list(methods) == chosen
    assert methods["boundary x 10"]["loss_weights"]["boundary"] == 10.0
    assert methods["Sum"]["loss_weights"]["boundary"] == 1.0
    assert set(methods["NonConflicting"]["against"].values()) == {0.0}
    assert methods["plain sum"]["against"] is None
    for method in methods.values():
        assert [set(one["scores"]) for one in method["evaluations"]] == [{"error"}] * 3
    printed = capsys.readouterr().out
    assert "as a multiple of the" in printed
    # NonConflicting is among those that no step of which went against a task.
    said = re.search(r"Against a task: .*first order: (.*?)\. What", " ".join(printed.split()))
    assert re.search(r"0 % of the others|none of any method", said[1])
    assert "NonConflicting" not in said[1]


def test_methods_that_do_not_fit_a_scene_are_left_out(digits_scene, kovasznay_scene):
    assert digits_scene.fits(STOCHASTIC)
    assert not digits_scene.fits(BOUNDARY_X10)  # there is no such task
    assert not kovasznay_scene.fits(STOCHASTIC)  # one micro-batch for two tasks
    assert kovasznay_scene.fits(BOUNDARY_X10)
    assert all(kovasznay_scene.fits(method) for method in methods_of(kovasznay_scene.methods))


@pytest.mark.parametrize("name", [slow("photos"), slow("digits")])
def test_other_methods_are_compared(name, tmp_path, capsys):
    options = ("--scene", name, "--steps", 2, "--output", tmp_path, "--device", "cpu")
    assert demo("--methods", "MGDA", "GradNorm", "graddrop", *options) == 0
    assert {path.name for path in tmp_path.iterdir()} == PICTURES[name] | {"results.json"}
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    methods = results["scenes"][name]["methods"]
    assert list(methods) == ["plain sum", "MGDA", "GradNorm", "GradDrop"]
    assert methods["plain sum"]["incidence"] is methods["plain sum"]["resolver"] is None
    assert methods["GradNorm"]["resolver"].startswith("GradNorm(alpha=1.5, lr=0.001")
    for method in list(methods.values())[1:]:
        below = [step["cosine"] < 0.0 for step in method["history"]]
        assert method["incidence"] == pytest.approx(sum(below) / 2)
        assert all(step["winner"] is None for step in method["history"])
    printed = capsys.readouterr().out
    assert "rises" in printed
    assert "AdamW" in printed


@pytest.mark.slow
@pytest.mark.parametrize("scene", [slow("photos"), "digits", slow("kovasznay")], indirect=True)
def test_pictures_of_all_methods_at_once(scene, tmp_path):
    runs = [training.new_run(scene, method, 2, 0, CPU) for method in METHODS]
    for run in runs:
        training.evaluate(run)
        compared = (0.5, "none", None, 0.0, []), (-0.5, "moderate", None, 1.0, [*scene.tasks])
        nothing = ((None, None, None, None, None),) * 2
        losses = dict.fromkeys(scene.tasks, 1.0)
        steps = compared if run.method.mode else nothing
        run.history = [training.Step(losses, *step) for step in steps]
    pictures.write_pictures(runs, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == PICTURES[scene.name]
    figure = pictures.cosine_picture(runs)
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert [title.partition(":")[0] for title in titles] == [m.name for m in METHODS[1:]]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "conflict (the method names no winner)" in legend


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The legacy `DICOM`")  # imageio, before it gives up a file
def test_images_of_the_users_own(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    imsave(folder / "one.PNG", pixels, check_contrast=False)
    imsave(folder / "two.jpg", pixels[:, :, 0], check_contrast=False)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image either")
    output = tmp_path / "output"
    assert demo("--images", folder, "--steps", 1, "--output", output, "--device", "cpu") == 0
    assert {path.name for path in output.iterdir()} == PICTURES["photos"] | {"results.json"}
    assert "broken.png" in capsys.readouterr().out


def test_bad_input_is_named_and_nothing_is_written(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("")
    bad = {
        ("--images", str(tmp_path / "missing")): "missing",
        ("--images", str(file)): str(file),
        ("--images", str(empty)): str(empty),
        ("--images", str(empty), "--scene", "digits"): "--images",
        ("--steps", "0"): "--steps",
        ("--seed", "-1"): "--seed",
        ("--device", "nonsense"): "nonsense",
        ("--device", "cuda:99"): "cuda:99",
        ("--device", "meta"): "meta",
        ("--backend", "nonsense"): "nonsense",
        ("--methods", "mgda", "Adam"): f"'Adam'; known: {', '.join(KEYS)}",
    }
    for options, named in bad.items():
        output = tmp_path / "output"
        assert demo("--output", output, *options) == 2, options
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
        assert not output.exists()
    assert demo("--output", file, "--scene", "digits") == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("after", [1, 6])
def test_ctrl_c_leaves_pictures_of_what_was_done(after, tmp_path, monkeypatch, capsys):
    draws = 0
    draw = Digits.micro_batch

    def interrupted(self, generator):
        nonlocal draws
        draws += 1
        # In the middle of the window after so many steps; methods have 4 steps each.
        if draws == after * self.accumulation_steps + 3:
            raise KeyboardInterrupt
        return draw(self, generator)

    monkeypatch.setattr(Digits, "micro_batch", interrupted)
    stale = tmp_path / "digits_cosine.png"
    stale.write_bytes(b"of an earlier run")
    options = ("--scene", "digits", "--steps", 4, "--output", tmp_path, "--device", "cpu")
    assert demo(*options) == 130
    written = {path.name for path in tmp_path.iterdir()}
    if after == 1:  # plain sum only: there is no cosine, and no old picture of one
        assert written == PICTURES["digits"] - {stale.name} | {"results.json"}
    else:
        assert written == PICTURES["digits"] | {"results.json"}
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["interrupted"] is True
    methods = results["scenes"]["digits"]["methods"]
    assert [method["steps"] for method in methods.values()] == ([1] if after == 1 else [4, 2])
    printed = capsys.readouterr().out
    assert "Interrupted" in printed
    assert "of 4 steps" in printed


@pytest.mark.slow
def test_ctrl_c_while_the_pictures_are_drawn_draws_them_again(tmp_path, monkeypatch):
    calls = []
    write = app.write_pictures

    def interrupted(runs, output):
        calls.append(len(runs))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return write(runs, output)

    monkeypatch.setattr(app, "write_pictures", interrupted)
    options = ("--scene", "digits", "--steps", 1, "--output", tmp_path, "--device", "cpu")
    assert demo(*options) == 130
    assert calls == [3, 3]
    assert {path.name for path in tmp_path.iterdir()} == PICTURES["digits"] | {"results.json"}


def test_ctrl_c_before_the_first_step(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Digits, "micro_batch", interrupted)
    assert demo("--scene", "digits", "--output", tmp_path, "--device", "cpu") == 130
    assert "nothing to show" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named_with_the_way_to_install_it():
    program = """
import sys
sys.modules |= dict.fromkeys(["matplotlib", "rich", "skimage", "sklearn"])
from examples.demo.__main__ import main
sys.exit(main([]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        'The demo needs rich, which is missing: pip install "gcond-kernels[demo]"\n'
    )

"""What the experiments share: options, variants of training, task gradients, tables, pictures."""

import argparse
import copy
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, nn

from bench.experiments import runs
from bench.experiments.runs import SCENES, Record
from examples.demo import training
from examples.demo.methods import PLAIN
from examples.demo.methods import Method as DemoMethod
from examples.demo.scenes import Batch, Scene
from examples.demo.summary import cosines, incidence, means, zone_shares
from examples.demo.training import new_run, train, warmup_then_cosine
from gcond_kernels import GCondFused
from gcond_kernels.methods import Method

RESULTS = Path(__file__).parents[1] / "results" / "experiments"
# Fewer than in the demo, which has 240 and 300: there are some 200 runs. With less than 100 steps
# the photos' model is no better than before.
STEPS = {"photos": 120, "digits": 200}
# Gradients are recorded in a part of them.
RECORDED = {"photos": 1 / 3, "digits": 0.5}
CPU = torch.device("cpu")
PLAIN_SUM = "plain"
DPI = 110


def parse(
    doc: str, arguments: Sequence[str] | None, default: dict[str, int] = STEPS
) -> argparse.Namespace:
    """The options that all experiments have; `default` are the steps of each scene."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    told = " and ".join(f"{steps} of {scene}" for scene, steps in default.items())
    parser.add_argument("--steps", type=int, metavar="N", help=f"default: {told}")
    parser.add_argument("--scene", choices=(*SCENES, "both"), default="both")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    found = parser.parse_args(arguments)
    if found.seeds < 1 or (found.steps is not None and found.steps < 1):
        parser.error("--seeds and --steps must be 1 or more")
    found.scenes = list(SCENES) if found.scene == "both" else [found.scene]
    found.steps_of = {scene: found.steps or default[scene] for scene in found.scenes}
    found.output.mkdir(parents=True, exist_ok=True)
    return found


def experiment(
    name: str,
    options: argparse.Namespace,
    jobs: Sequence[Any],
    work: tuple[Callable[[Any], Record], Callable[[Any], float]],
    report: Callable[[Sequence[Record]], Sequence[str]],
    picture: Callable[[Sequence[Record]], Figure],
    more: dict[str, Any] | None = None,
) -> int:
    """Performs the jobs and writes what came out, as JSON after each of them.

    Args:
        name: of the files.
        options: of `parse`.
        jobs: each has a seed and a scene.
        work: makes a record of a job, and tells roughly how many milliseconds that takes.
        report: makes the paragraphs of the Markdown file.
        picture: draws.
        more: goes to the JSON file as it is.
    """
    # Digits first: they take little, and what is interrupted has them.
    jobs = sorted(jobs, key=lambda job: (job.scene != "digits", job.seed))
    about, records = {**runs.about_run(options.scenes), **(more or {})}, []
    target = options.output / f"{name}.json"

    def keep(record: Record) -> None:
        records.append(record)
        runs.write_json(target, about, records, planned=len(jobs))

    interrupted = False
    try:
        runs.perform_all(jobs, *work, line, keep)
    except KeyboardInterrupt:
        interrupted = True
        print(f"Interrupted after {len(records)} of {len(jobs)} runs.")
    records = whole_seeds(records, jobs)
    if records:
        write_report(target, about, records, len(jobs), report, picture)
    return runs.INTERRUPTED if interrupted else 0


def whole_seeds(records: Sequence[Record], jobs: Sequence[Any]) -> list[Record]:
    """Those of the scenes and seeds of which there are all runs; others cannot be compared."""
    planned = Counter((job.scene, job.seed) for job in jobs)
    there = Counter((record["scene"], record["seed"]) for record in records)
    whole = [r for r in records if there[r["scene"], r["seed"]] == planned[r["scene"], r["seed"]]]
    return sorted(whole, key=lambda record: record["seed"])  # they end in any order


def write_report(
    target: Path,
    about: dict[str, Any],
    records: Sequence[Record],
    planned: int,
    report: Callable[[Sequence[Record]], Sequence[str]],
    picture: Callable[[Sequence[Record]], Figure],
) -> None:
    """The tables and the picture."""
    heading, *paragraphs = report(records)
    seeds = "; ".join(
        f"{scene} {', '.join(map(str, seeds_of(records, scene)))}" for scene in scenes_in(records)
    )
    which = f"Seeds, of initial parameters and micro-batches: {seeds}."
    if len(records) < planned:
        which += (
            f" **Interrupted: {len(records)} of {planned} runs; seeds that are not whole are left "
            "out.**"
        )
    drawn = f"![{heading.lstrip('# ')}]({target.with_suffix('.png').name})"
    text = "\n\n".join([heading, runs.told(about), which, *paragraphs, drawn]) + "\n"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    picture(records).savefig(target.with_suffix(".png"), dpi=DPI)
    for suffix in (".json", ".md", ".png"):
        print(target.with_suffix(suffix))


def seeds_of(records: Sequence[Record], scene: str) -> list[int]:
    return sorted({record["seed"] for record in records if record["scene"] == scene})


def line(record: Record) -> str:
    scores = " ".join(f"{value:.4f}" for value in record.get("scores", {}).values())
    return f"{record['scene']}, {record['method']}, seed {record['seed']}: {scores}"


# Training with other settings than the demo's.


class Variant(NamedTuple):
    """A way to train.

    Attributes:
        key: what it is called in the JSON file.
        name: what it is called in tables and pictures.
        resolver: of GCondFused; None is the plain sum, without it.
        baseline: key of the variant that its scores are compared with; "" is none.
        mode: of GCondFused.
        options: more of GCondFused.
        base: the optimizer below; a name of `base_optimizer`.
        learning_rate: None is the scene's.
        beta1: of AdamW.
        micro_batches: per step; None is the scene's.
        steps: a factor of the number of steps.
    """

    key: str
    name: str
    resolver: Method | None = None
    baseline: str = ""
    mode: Literal["exact", "stochastic"] = "exact"
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed
    base: str = "adamw"
    learning_rate: float | None = None
    beta1: float = 0.9
    micro_batches: int | None = None
    steps: float = 1.0


class Training(NamedTuple):
    """One run of a variant."""

    seed: int
    scene: str
    steps: int
    variant: Variant


def trainings(options: argparse.Namespace, variants: dict[str, Sequence[Variant]]) -> list[Any]:
    """Every seed, scene and variant (scene → variants)."""
    return [
        Training(seed, scene, max(1, round(options.steps_of[scene] * variant.steps)), variant)
        for seed in range(options.seeds)
        for scene in options.scenes
        for variant in variants[scene]
    ]


def with_micro_batches(scene: Scene, micro_batches: int | None) -> Scene:
    """The scene with another number of micro-batches per step."""
    scene = copy.copy(scene)
    scene.accumulation_steps = micro_batches or scene.accumulation_steps
    return scene


def perform_training(job: Training) -> Record:
    """Trains a variant as the demo does."""
    variant = job.variant
    scene = with_micro_batches(runs.scene_of(job.scene), variant.micro_batches)
    mode = None if variant.resolver is None else variant.mode
    method = DemoMethod(variant.key, variant.name, mode, 1.0, variant.resolver)
    run = new_run(scene, method, job.steps, job.seed, CPU)
    optimizer = new_optimizer(variant, scene, run.model)
    # Those before the last step would go nowhere.
    with patch.object(training, "EVALUATIONS", 1):
        for _ in train(run, job.seed, optimizer=optimizer):
            runs.advance(training_cost(job) / job.steps)
    values = cosines(run)
    return {
        "scene": job.scene,
        "method": variant.key,
        "seed": job.seed,
        "steps": job.steps,
        "micro_batches": scene.accumulation_steps,
        "resolver": None if variant.resolver is None else repr(variant.resolver),
        "options": {key: str(value) for key, value in variant.options.items()},
        "base": variant.base,
        "learning_rate": variant.learning_rate or scene.learning_rate,
        "beta1": variant.beta1 if variant.base == "adamw" else None,
        **means(run.evaluations[-1]),
        "zones": zone_shares(run),
        "incidence": incidence(run),
        "median_cosine": statistics.median(values) if values else None,
        **winners_told([step.winner for step in run.history], scene),
        "backward_passes": run.backward_passes,
        "seconds": run.seconds,
    }


def training_cost(job: Training) -> float:
    scene, variant = SCENES[job.scene], job.variant
    more = (variant.micro_batches or scene.accumulation_steps) / scene.accumulation_steps
    twice = variant.resolver is not None and variant.mode == "exact"
    return job.steps * scene.step_cost * more * (1.6 if twice else 1.0)


def new_optimizer(variant: Variant, scene: Scene, model: nn.Module) -> torch.optim.Optimizer:
    base = base_optimizer(variant, scene, model)
    if variant.resolver is None:
        return base
    return GCondFused(
        base,
        scene.tasks,
        accumulation_steps=scene.accumulation_steps,
        mode=variant.mode,
        method=variant.resolver,
        **variant.options,
    )


def base_optimizer(variant: Variant, scene: Scene, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as in the demo but for beta1, or SGD, with momentum or without."""
    rate = variant.learning_rate or scene.learning_rate
    if variant.base == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(variant.beta1, 0.95))
    momentum = {"sgd": 0.9, "sgd without momentum": 0.0}[variant.base]
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)


def winners_told(winners: Sequence[str | None], scene: Scene) -> dict[str, Any]:
    """How often each task won a conflict, and how often in a row, of the steps with one."""
    won = [winner for winner in winners if winner is not None]
    return {
        "conflicts": len(won),
        "won": {task: won.count(task) for task in scene.tasks},
        "longest_streak": longest_streak(won),
    }


def longest_streak(winners: Sequence[Any]) -> int:
    """The most equal entries one behind the other."""
    return max((len(list(same)) for _, same in groupby(winners)), default=0)


# Task gradients.


def task_gradients(model: nn.Module, scene: Scene, batch: Batch) -> Tensor:
    """[K, N] the gradient of each task's weighted loss of a micro-batch, as GCondFused sees it."""
    parameters = list(model.parameters())
    output = model(batch.inputs)
    rows = []
    for task, weight in scene.tasks.items():
        loss = weight * scene.losses(task, output, batch.targets).mean()
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def window_gradients(
    model: nn.Module, scene: Scene, generator: torch.Generator, stochastic: bool = False
) -> Tensor:
    """[K, N] accumulated over a window; in stochastic mode of each task's own micro-batches."""
    A, K = scene.accumulation_steps, len(scene.tasks)
    # [A, K] how much a micro-batch counts for each task; the blocks are those of GCondFused.
    shares = torch.full((A, K), 1.0 / A)
    if stochastic:
        block = torch.arange(A) * K // A
        shares = (block[:, None] == torch.arange(K)).float()
        shares /= shares.sum(0)
    total: Tensor | float = 0.0
    for share in shares:
        gradients = task_gradients(model, scene, scene.micro_batch(generator))
        total = total + share[:, None] * gradients
    return torch.as_tensor(total)


def plain_training(
    scene: Scene, steps: int, seed: int, stochastic: bool = False
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Trains as the demo's plain sum does; yields model and task gradients before each step."""
    model = new_run(scene, PLAIN, steps, seed, CPU).model
    variant = Variant(PLAIN_SUM, PLAIN.name)
    optimizer = base_optimizer(variant, scene, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_then_cosine(step, steps)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        gradients = window_gradients(model, scene, generator, stochastic)
        yield model, gradients
        set_gradient(model, gradients.sum(0))
        optimizer.step()
        scheduler.step()


def set_gradient(model: nn.Module, flat: Tensor) -> None:
    parts = flat.split([parameter.numel() for parameter in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.grad = part.view_as(parameter)


def cosine(a: Tensor, b: Tensor) -> float:
    """0 where one of them is zero."""
    a, b = a.double(), b.double()
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0.0 else 0.0


class Recorded(NamedTuple):
    """Inner products of the task gradients of a training by the plain sum, step by step.

    Attributes:
        gramians: [T, K, K], S of each step.
        crosses: [T, K, K], X_ij = ĝ_i of the step · ĝ_j of the step before; at first zeros.
        by_tensor: cosines of two tasks in each parameter tensor, of all steps.
    """

    gramians: Tensor
    crosses: Tensor
    by_tensor: list[float]


def recorded_steps(options: argparse.Namespace, scene: str) -> int:
    return max(2, round(RECORDED[scene] * options.steps_of[scene]))


def record_gradients(scene: Scene, steps: int, seed: int, stochastic: bool = False) -> Recorded:
    before, by_tensor, gramians, crosses = None, [], [], []
    for model, gradients in plain_training(scene, steps, seed, stochastic):
        sizes = [parameter.numel() for parameter in model.parameters()]
        by_tensor += [cosine(*part) for part in gradients.split(sizes, 1) if part.any(1).all()]
        wide = gradients.double()
        before = torch.zeros_like(wide) if before is None else before
        gramians.append(wide @ wide.T)
        crosses.append(wide @ before.T)
        before = wide
    return Recorded(torch.stack(gramians), torch.stack(crosses), by_tensor)


class Replay(NamedTuple):
    """What GCond made of recorded gradients, without any influence on them.

    Attributes:
        cosines: smallest cosine of each step, before anything was resolved.
        winners: of each conflict in order, numbers of tasks.
        changes: per step ‖g - Σ ĝ‖ / ‖Σ ĝ‖: how far the resolved gradient is from the sum.
        weights: [T, K]
    """

    cosines: list[float]
    winners: list[int]
    changes: list[float]
    weights: Tensor


def replay(recorded: Recorded, method: Any) -> Replay:
    """Resolves all steps of a recording by a `GCond`."""
    K = recorded.gramians.shape[-1]
    state, ones = method.new_state(K, CPU), torch.ones(K, dtype=torch.float64)
    found = Replay([], [], [], torch.empty(len(recorded.gramians), K))
    for step, (S, X) in enumerate(zip(recorded.gramians, recorded.crosses, strict=True)):
        decision = method.resolve(S, X, ones, state, "python")
        difference = decision.weights - ones
        found.cosines.append(smallest_cosine(S))
        found.winners.extend(int(e[3]) for e in decision.events if e[3] >= 0)
        found.changes.append(float((difference @ S @ difference / (ones @ S @ ones)).sqrt()))
        found.weights[step] = decision.weights
    return found


def smallest_cosine(gramian: Tensor) -> float:
    norms = gramian.diagonal().sqrt()
    cosines = (gramian / torch.outer(norms, norms)).nan_to_num(1.0)
    rows, columns = torch.triu_indices(*cosines.shape, offset=1)
    return float(cosines[rows, columns].min())


# Tables and pictures of scores.


def score_table(
    records: Sequence[Record],
    scene: str,
    variants: Sequence[Variant],
    more: dict[str, Callable[[Sequence[Record]], str]],
) -> str:
    """Scores, differences to each variant's baseline, and more columns of a variant's records."""
    labels = SCENES[scene].score_labels
    heads = ["", *(head for label in labels.values() for head in (label, "difference")), *more]
    rows = [heads]
    for variant in variants:
        cells = [variant.name]
        for task in labels:
            of_task = figures_of(records, scene, variant, task)
            cells += [of_task.mean_cell(), of_task.gap_cell()]
        own = list(runs.by_seed(records, scene, variant.key).values())
        rows.append(cells + [column(own) for column in more.values()])
    return runs.markdown(rows)


def figures_of(records: Sequence[Record], scene: str, variant: Variant, task: str) -> runs.Figures:
    return runs.figures(records, scene, variant.key, task, variant.baseline or variant.key)


def beyond_sentence(records: Sequence[Record], scene: str, variants: Sequence[Variant]) -> str:
    """Which differences to the baselines are beyond chance."""
    count, beyond = 0, []
    seeds = len(seeds_of(records, scene))
    if seeds < 2:
        return "With a single seed there is no telling a difference from chance."
    for variant in variants:
        found = []
        for task, label in SCENES[scene].score_labels.items():
            of_task = figures_of(records, scene, variant, task)
            count += of_task.error is not None
            if of_task.beyond:
                unit = " points" if of_task.percent else ""
                found.append(f"{of_task.number(of_task.gap, '+')}{unit} in {label}")
        if found:
            beyond.append(f"{variant.name} ({', '.join(found)})")
    return runs.chance_sentence(count, seeds, beyond)


def scene_heading(records: Sequence[Record], scene: str, what: str) -> list[str]:
    """Heading and how it was trained."""
    kind = runs.scene_of(scene)
    return [
        f"## {scene}: {kind.title}",
        f"{what} Scores ({runs.better(scene)}) of {kind.validation_note}: mean ± standard "
        "deviation over the seeds; difference with the same seed, mean ± standard error.",
    ]


def scenes_in(records: Sequence[Record]) -> list[str]:
    return [scene for scene in SCENES if any(record["scene"] == scene for record in records)]


def draw_score_panels(
    panels: Sequence[Axes],
    records: Sequence[Record],
    scene: str,
    variants: Sequence[Variant],
    baseline: str,
) -> None:
    """A panel for each score of a scene."""
    names = {variant.key: variant.name for variant in variants}
    for axes, (task, label) in zip(panels, SCENES[scene].score_labels.items(), strict=True):
        runs.draw_scores(axes, records, scene, task, names, baseline)
        axes.set_xlabel(f"validation {label} ({runs.better(scene)})", fontsize=11)
        axes.set_title(f"{scene}: {label}", fontsize=13)
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)


def score_legend(figure: Figure | SubFigure, records: Sequence[Record], baseline: str) -> None:
    seeds = sorted({record["seed"] for record in records})
    handles = runs.handles(seeds, baseline)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=12)


def score_picture(
    records: Sequence[Record],
    variants: dict[str, Sequence[Variant]],
    title: str,
    baseline: tuple[str, str],
    extra: Callable[[Axes, Sequence[Record], str], None] | None = None,
) -> Figure:
    """A row of panels for the scores of each scene, and one with what `extra` draws of each.

    `baseline` is the key of the variant with a dashed line, and what it is called.
    """
    scenes = scenes_in(records)
    trained = [scene for scene in scenes if variants[scene]]
    rows = [len(variants[scene]) + 2 for scene in trained] + ([12] if extra else [])
    figure = Figure(figsize=(13, sum(0.36 * r + 0.6 for r in rows) + 1.0), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False, height_ratios=rows)
    for scene, of_scene in zip(trained, panels, strict=False):
        draw_score_panels(of_scene, records, scene, variants[scene], baseline[0])
    if extra:
        for axes, scene in zip(panels[-1], scenes, strict=False):
            extra(axes, [record for record in records if record["scene"] == scene], scene)
        for axes in panels[-1][len(scenes) :]:
            axes.set_axis_off()
    figure.suptitle(title, fontsize=15)
    score_legend(figure, records, baseline[1])
    return figure


def percent(share: float | None) -> str:
    return "" if share is None else f"{100.0 * share:.0f} %"


def mean_of(key: str) -> Callable[[Sequence[Record]], str]:
    """A column with the mean of a share over the seeds, in %."""

    def column(records: Sequence[Record]) -> str:
        known = [record[key] for record in records if record[key] is not None]
        return percent(statistics.fmean(known)) if known else ""

    return column

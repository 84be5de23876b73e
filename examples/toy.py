"""Two losses of two numbers, on which methods differ to the eye: their ways to the Pareto front.

The objective of CAGrad (Liu et al. 2021, arXiv 2110.14048, appendix), with the first loss a tenth
of what it is there and the starts of Nash-MTL (Navon et al. 2022, arXiv 2202.01017, appendix). It
is as both papers print it: their published code has + tanh(-θ₂) in the second valley, not minus,
and that valley then lies at θ₁ = 5 above, not at 9.

    python -m examples.toy [PICTURE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from gcond_kernels import GCond, GCondFused, NonConflicting
from gcond_kernels.diagnostics.plots import BLACK, BLUE, GREEN, GREY, PURPLE, SKY, VERMILION
from gcond_kernels.methods import MGDA, CAGrad, Method, NashMTL, PCGrad, Sum, UPGrad

METHODS: dict[str, Method] = {
    "plain sum": Sum(),
    "GCond": GCond(),
    "NonConflicting(GCond)": NonConflicting(GCond()),
    "PCGrad": PCGrad(),
    "CAGrad": CAGrad(),
    "MGDA": MGDA(),
    "NashMTL": NashMTL(),
    "UPGrad": UPGrad(),
}
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
COLORS = (BLUE, VERMILION, GREEN, PURPLE, SKY)
SCALE = 0.1  # of the first loss
STEPS = 1100
LEARNING_RATE = 0.05
EXTENT = (-11.0, 11.0)


def losses(points: Tensor) -> Tensor:
    """Return [..., 2] both losses at points θ [..., 2].

    L_i = c₁ f_i + c₂ g_i, with a valley of f_i above, where θ₂ > 0, and bowls g_i below.
    """
    x, y = points.unbind(-1)
    above, below = torch.tanh(y / 2.0).clamp(min=0.0), torch.tanh(-y / 2.0).clamp(min=0.0)
    valleys = torch.stack(
        [(-x - 7.0) / 2.0 - torch.tanh(-y), (-x + 3.0) / 2.0 - torch.tanh(-y) + 2.0], -1
    )
    f = valleys.abs().clamp(min=5e-6).log() + 6.0
    far = 0.1 * (-y - 8.0) ** 2
    g = torch.stack([(-x + 7.0) ** 2 + far, (-x - 7.0) ** 2 + far], -1) / 10.0 - 20.0
    unscaled = above[..., None] * f + below[..., None] * g
    return unscaled * unscaled.new_tensor([SCALE, 1.0])


def trajectories(method: Method) -> Tensor:
    """Return [STEPS + 1, starts, 2] the points of Adam's way from every start.

    Each start is a parameter of its own, resolved by its own gradients.
    """
    points = [torch.nn.Parameter(torch.tensor(start)) for start in STARTS]
    # On the front nothing is left but rounding, of which a smaller eps would make full steps.
    adam = torch.optim.Adam(points, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-3)
    optimizer = GCondFused(
        adam, {"first": 1.0, "second": 1.0}, method=method, granularity="tensor", momentum=0.0
    )
    seen = [torch.stack(points).detach()]
    for _ in range(STEPS):
        first, second = losses(torch.stack(list(points))).sum(0)
        optimizer.backward({"first": first, "second": second})
        optimizer.step()
        seen.append(torch.stack(points).detach())
    return torch.stack(seen)


def pareto_set(count: int = 201) -> Tensor:
    """Return [count, 2] points that no other is better than in both losses.

    They are minima of weighted sums of the losses, each the best of a grid: both losses are
    convex below.
    """
    axes = torch.linspace(-7.0, 7.0, 281), torch.linspace(-10.0, -6.0, 161)
    grid = torch.cartesian_prod(*axes)
    weights = torch.linspace(0.0, 1.0, count)
    values = losses(grid) / torch.tensor([SCALE, 1.0])
    best = (values @ torch.stack([weights, 1.0 - weights])).argmin(0)
    return grid[best]


def picture(ways: dict[str, Tensor]) -> Figure:
    """Draw every method's ways [T, starts, 2] over the contours of the sum of both losses."""
    front = pareto_set()
    figure = Figure(figsize=(16, 8.6), layout="constrained")
    panels = figure.subplots(2, (len(ways) + 1) // 2, sharex=True, sharey=True)
    for axes, (name, way) in zip(panels.flat, ways.items(), strict=True):
        draw_contours(axes)
        axes.plot(*front.T.numpy(), color=BLACK, linewidth=4.0, alpha=0.8, solid_capstyle="round")
        for start, color in enumerate(COLORS):
            draw_way(axes, way[:, start], color)
        axes.set_title(name, fontsize=13)
    for axes in panels[-1]:
        axes.set_xlabel("θ₁", fontsize=12)
    for axes in panels[:, 0]:
        axes.set_ylabel("θ₂", fontsize=12)
    figure.suptitle(
        f"Two losses of two numbers, the first scaled by {SCALE:g}: {STEPS} steps of Adam from "
        f"{len(STARTS)} starts",
        fontsize=15,
    )
    handles = [
        Line2D([], [], color=BLACK, linewidth=4.0, label="Pareto set"),
        Line2D([], [], color=BLACK, linestyle="", marker="o", label="start"),
        Line2D([], [], color=BLACK, linestyle="", marker="*", markersize=13.0, label="end"),
        Line2D([], [], color=GREY, label="contours of the sum of both losses"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=12)
    return figure


def draw_contours(axes: Axes) -> None:
    """Draw the contours of the sum of both losses."""
    line = torch.linspace(*EXTENT, 241)
    values = losses(torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)).sum(-1)
    line, values = line.numpy(), values.numpy()
    axes.contourf(line, line, values, levels=30, cmap="Greys", alpha=0.35)
    axes.contour(line, line, values, levels=30, colors=GREY, linewidths=0.5)
    axes.set(xlim=EXTENT, ylim=EXTENT, aspect="equal")


def draw_way(axes: Axes, way: Tensor, color: str) -> None:
    """Draw one trajectory [T, 2]."""
    way = way.numpy()
    axes.plot(*way.T, color=color, linewidth=1.8)
    style = {"linestyle": "", "color": color, "markeredgecolor": BLACK}
    axes.plot(*way[0], marker="o", markersize=7.0, **style)
    axes.plot(*way[-1], marker="*", markersize=15.0, **style)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every method, and draw."""
    given = sys.argv[1:] if arguments is None else arguments
    path = Path(given[0] if given else "toy.png")
    torch.set_num_threads(1)
    ways = {name: trajectories(method) for name, method in METHODS.items()}
    picture(ways).savefig(path, dpi=80)
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()

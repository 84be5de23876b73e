"""Two flows learned from their equations alone (PINNs), by scenes whose tasks conflict hard.

A network is a function of the coordinates; the tasks are the residual of a partial differential
equation at random points, and the values on the boundary (and at the start). The score is the
error against the exact solution, which no loss sees.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import ClassVar, TypeAlias

import torch
from numpy.polynomial.hermite import hermgauss
from torch import Tensor, nn

from .scenes import Batch, Scene

REYNOLDS = 40.0
VISCOSITY = 0.01 / math.pi
NODES = 100  # of the quadrature, whose error is then that of rounding
RESIDUAL = "residual"

Field: TypeAlias = "Callable[[Tensor], Tensor]"  # from points [N, 2] to fields [N, fields]


class Physics(Scene):
    """A partial differential equation with an exact solution.

    A batch has the points of all tasks, one task behind the other, and as targets what the task's
    value is to be there: of the residual 0, of the others the field.
    """

    score_labels: ClassVar[dict[str, str]] = {"error": "relative L2 error"}
    score_in_percent = False
    accumulation_steps = 1
    evaluations = 40
    methods = ("plain", "boundary-x10", "sum", "gcond", "nonconflicting", "pcgrad")
    data = "each task's own points"
    counts: ClassVar[dict[str, int]]  # task → its points in a batch
    coordinates: tuple[str, str]
    fields: tuple[str, ...]
    low: tuple[float, float]  # corners of the domain
    high: tuple[float, float]
    grid: tuple[int, int]  # points of each coordinate, for the score
    width: int  # of the network's hidden layers
    depth: int  # their number

    def __init__(self) -> None:
        # A seed of its own: the points are the same whatever --seed is.
        self.validation = self.micro_batch(torch.Generator().manual_seed(0))
        axes = [
            torch.linspace(low, high, count, dtype=torch.float64)
            for low, high, count in zip(self.low, self.high, self.grid, strict=True)
        ]
        points = torch.cartesian_prod(*axes)
        self.points, self.field = points.float(), self.exact(points).float()
        self.validation_note = (
            "losses at points that stay the same, the error on a grid of "
            f"{self.grid[0]} x {self.grid[1]}, where {', '.join(self.fields)} "
            f"{'is' if len(self.fields) == 1 else 'are'} compared with the exact solution"
        )

    def new_model(self) -> nn.Module:
        """Return a network."""
        return Network(self)

    @abstractmethod
    def residual(self, field: Field, points: Tensor) -> Tensor:
        """Return [N, equations] by how much a field misses each equation.

        There are as many equations as fields; `points` [N, 2] require a gradient.
        """

    @abstractmethod
    def exact(self, points: Tensor) -> Tensor:
        """Return [N, fields] the exact solution at points [N, 2]; float64 for full precision."""

    def losses(self, model: nn.Module, batch: Batch, tasks: Iterable[str]) -> dict[str, Tensor]:
        """Return task → [its points] squared distances from the targets, by a pass per task."""
        sizes = list(self.counts.values())
        points = dict(zip(self.counts, batch.inputs.split(sizes), strict=True))
        targets = dict(zip(self.counts, batch.targets.split(sizes), strict=True))
        found = {}
        for task in tasks:
            if task == RESIDUAL:
                with torch.enable_grad():  # derivatives are needed in an evaluation too
                    value = self.residual(model, points[task].detach().requires_grad_())
            else:
                value = model(points[task])
            found[task] = (value - targets[task]).square().sum(1)
        return found

    def evaluate(
        self, model: nn.Module, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses at points that stay the same, and the error of the field."""
        losses = self.losses(model, self.validation.to(device), self.tasks)
        return losses, {"error": self.error(model(self.points.to(device)))}

    def error(self, field: Tensor) -> Tensor:
        """Return [1] ‖field − exact‖ / ‖exact‖ over grid and fields, of a field on the grid."""
        exact = self.field.to(field)
        return ((field - exact).norm() / exact.norm()).view(1)

    def inside(self, count: int, generator: torch.Generator) -> Tensor:
        """Return [count, 2] random points of the domain, evenly distributed."""
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return low + (high - low) * torch.rand(count, 2, generator=generator)


class Network(nn.Module):
    """From coordinates [N, 2] to fields [N, fields]: a tanh network of the scaled coordinates."""

    def __init__(self, scene: Physics) -> None:
        super().__init__()
        low, high = torch.tensor(scene.low), torch.tensor(scene.high)
        self.register_buffer("center", (low + high) / 2.0)
        self.register_buffer("radius", (high - low) / 2.0)
        sizes = [2, *[scene.width] * scene.depth]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(scene.width, len(scene.fields)))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Return the fields."""
        return self.layers((points - self.center) / self.radius)


class Kovasznay(Physics):
    """Find the steady plane flow behind a grid, of Navier and Stokes' equations at Re = 40.

    u·∇u + ∇p = ∇²u / Re and ∇·u = 0 on [−0.5, 1] × [−0.5, 0.5], velocity (u, v) and pressure p;
    all three are given on the boundary, which fixes the constant of the pressure. The exact
    solution is that of Kovasznay (1948).
    """

    name = "kovasznay"
    title = "Kovasznay flow"
    tasks: ClassVar[dict[str, float]] = {RESIDUAL: 1.0, "boundary": 1.0}
    loss_labels: ClassVar[dict[str, str]] = {
        RESIDUAL: "mean square of the residual",
        "boundary": "mean square error on the boundary",
    }
    counts: ClassVar[dict[str, int]] = {RESIDUAL: 128, "boundary": 64}
    coordinates, fields = ("x", "y"), ("u", "v", "p")
    low, high = (-0.5, -0.5), (1.0, 0.5)
    grid = (61, 41)
    width, depth = 32, 3
    steps = 1200
    learning_rate = 5e-3
    step_cost = 5.0

    def micro_batch(self, generator: torch.Generator) -> Batch:
        """Return new random points inside and, equally many on each edge, on the boundary."""
        inside = self.inside(self.counts[RESIDUAL], generator)
        boundary = self.inside(self.counts["boundary"], generator)
        for edge, part in enumerate(boundary.chunk(4)):  # views
            part[:, edge // 2] = (self.low, self.high)[edge % 2][edge // 2]
        targets = torch.cat([torch.zeros(len(inside), 3), self.exact(boundary)])
        return Batch(torch.cat([inside, boundary]), targets)

    def residual(self, field: Field, points: Tensor) -> Tensor:
        """Return [N, 3] the residuals of both components of momentum, and the divergence."""
        u, v, p = field(points).unbind(1)
        du, dv, dp = (gradient(one, points) for one in (u, v, p))
        momentum = [
            u * d[:, 0] + v * d[:, 1] + dp[:, place] - laplacian(d, points) / REYNOLDS
            for place, d in enumerate((du, dv))
        ]
        return torch.stack([*momentum, du[:, 0] + dv[:, 1]], 1)

    def exact(self, points: Tensor) -> Tensor:
        """Return [N, 3] u, v and p: λ = Re/2 − √(Re²/4 + 4π²) is the decay along x."""
        decay = REYNOLDS / 2.0 - math.sqrt(REYNOLDS**2 / 4.0 + 4.0 * math.pi**2)
        x, y = points.unbind(1)
        scale, phase = torch.exp(decay * x), 2.0 * math.pi * y
        u = 1.0 - scale * torch.cos(phase)
        v = decay / (2.0 * math.pi) * scale * torch.sin(phase)
        return torch.stack([u, v, (1.0 - scale**2) / 2.0], 1)


class Burgers(Physics):
    """Find u(t, x) of Burgers' equation with little viscosity, where a shock forms at x = 0.

    u_t + u u_x = ν u_xx with ν = 0.01 / π for t in [0, 1] and x in [−1, 1]; u = −sin πx at first,
    and 0 at both ends (Basdevant et al. 1986; as a PINN Raissi et al. 2019).
    """

    name = "burgers"
    title = "Burgers' equation"
    tasks: ClassVar[dict[str, float]] = {RESIDUAL: 1.0, "boundary": 1.0, "initial": 1.0}
    loss_labels: ClassVar[dict[str, str]] = {
        RESIDUAL: "mean square of the residual",
        "boundary": "mean square error at both ends",
        "initial": "mean square error at the start",
    }
    counts: ClassVar[dict[str, int]] = {RESIDUAL: 512, "boundary": 32, "initial": 64}
    coordinates, fields = ("t", "x"), ("u",)
    low, high = (0.0, -1.0), (1.0, 1.0)
    grid = (41, 201)
    width, depth = 32, 4
    steps = 2000
    learning_rate = 1e-2
    step_cost = 5.0

    def micro_batch(self, generator: torch.Generator) -> Batch:
        """Return new random points inside, at both ends, and at the start."""
        points = [self.inside(count, generator) for count in self.counts.values()]
        _, ends, start = points
        ends[:, 1] = ends[:, 1].sign()  # each point at the end that it is nearer to
        start[:, 0] = 0.0
        values = [torch.zeros(len(one), 1) for one in points[:2]]
        return Batch(torch.cat(points), torch.cat([*values, -torch.sin(math.pi * start[:, 1:])]))

    def residual(self, field: Field, points: Tensor) -> Tensor:
        """Return [N, 1] u_t + u u_x − ν u_xx."""
        u = field(points)[:, 0]
        u_t, u_x = gradient(u, points).unbind(1)
        u_xx = gradient(u_x, points)[:, 1]
        return (u_t + u * u_x - VISCOSITY * u_xx).unsqueeze(1)

    def exact(self, points: Tensor) -> Tensor:
        """Return [N, 1] u by the transformation of Cole and Hopf.

        u = −E[f sin πy] / E[f] with f = exp(−cos πy / 2πν) and y normal around x with variance
        2νt: both means are taken by Gauss-Hermite quadrature, in float64.
        """
        t, x = points.unbind(1)
        nodes, weights = (torch.from_numpy(one).to(points) for one in hermgauss(NODES))
        y = x[:, None] - torch.sqrt(4.0 * VISCOSITY * t)[:, None] * nodes
        # f alone spans some e^±50.
        shares = torch.softmax(
            weights.log() - torch.cos(math.pi * y) / (2.0 * math.pi * VISCOSITY), 1
        )
        return -(shares * torch.sin(math.pi * y)).sum(1, keepdim=True)


def gradient(values: Tensor, points: Tensor) -> Tensor:
    """Return [N, 2] the gradient of each of N values at its own point, to be derived again."""
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0]


def laplacian(gradients: Tensor, points: Tensor) -> Tensor:
    """Return [N] the Laplacian of a function with these gradients [N, 2]."""
    columns = [gradient(one, points)[:, place] for place, one in enumerate(gradients.unbind(1))]
    return columns[0] + columns[1]

"""The digits scene: two handwritten digits on top of each other, a classification task each."""

from __future__ import annotations

from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .scenes import Batch, Supervised

CANVAS = 12
SIDE = 8
SHIFTS = {"left": (0, 1), "right": (3, 4)}  # in both directions; so 4 to 6 rows and columns overlap
MICRO_BATCH = 32
VALIDATION_PAIRS = 1000


class Digits(Supervised):
    """Name the digit at the upper left and the one at the lower right."""

    name = "digits"
    title = "Two overlaid digits"
    tasks: ClassVar[dict[str, float]] = {"left": 1.0, "right": 1.0}
    loss_labels: ClassVar[dict[str, str]] = {
        "left": "cross-entropy of the left digit (nats)",
        "right": "cross-entropy of the right digit (nats)",
    }
    score_labels: ClassVar[dict[str, str]] = {"left": "left correct", "right": "right correct"}
    score_in_percent = True
    accumulation_steps = 4
    steps = 300
    learning_rate = 6e-3
    step_cost = 18.0

    def __init__(self) -> None:
        data = load_digits()
        images = torch.from_numpy(data.images).float() / 16.0
        labels = torch.from_numpy(data.target).long()
        # A seed of its own: split and validation are the same whatever --seed is.
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(images), generator=generator)
        self.training_digits, self.validation_digits = order.tensor_split([len(order) * 4 // 5])
        self.images, self.labels = images, labels
        self.validation = self._pairs(self.validation_digits, VALIDATION_PAIRS, generator)
        self.validation_note = (
            f"{VALIDATION_PAIRS} pairs of {len(self.validation_digits)} digits "
            "that are in no training pair"
        )

    def new_model(self) -> nn.Module:
        """Return a shared trunk and two heads."""
        return TwoHeads()

    def micro_batch(self, generator: torch.Generator) -> Batch:
        """Return random pairs of training digits, randomly shifted."""
        return self._pairs(self.training_digits, MICRO_BATCH, generator)

    def loss(self, task: str, output: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the task's digit."""
        head = list(self.tasks).index(task)
        return cross_entropy(output[:, head], targets[:, head], reduction="none")

    def score(self, task: str, output: Tensor, targets: Tensor) -> Tensor:
        """Return 1 where the task's digit is named correctly, else 0."""
        head = list(self.tasks).index(task)
        return (output[:, head].argmax(1) == targets[:, head]).float()

    def _pairs(self, digits: Tensor, count: int, generator: torch.Generator) -> Batch:
        chosen = digits[torch.randint(len(digits), (count, 2), generator=generator)]
        canvas = torch.zeros(count, CANVAS, CANVAS)
        for side, shifts in enumerate(SHIFTS.values()):
            pasted = paste(self.images[chosen[:, side]], shifts, generator)
            canvas = torch.maximum(canvas, pasted)
        return Batch(canvas.unsqueeze(1), self.labels[chosen])


class TwoHeads(nn.Module):
    """From canvases [B, 1, 12, 12] to the logits of both digits [B, 2, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 6 * 6, 128),
            nn.ReLU(),
        )
        self.left = nn.Linear(128, 10)
        self.right = nn.Linear(128, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        features = self.trunk(inputs)
        return torch.stack([self.left(features), self.right(features)], 1)


def paste(images: Tensor, shifts: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return [B, 12, 12] canvases with one 8×8 image each, shifted by one of `shifts` both ways."""
    canvas = torch.zeros(len(images), CANVAS, CANVAS)
    offsets = torch.tensor(shifts)[torch.randint(2, (len(images), 2), generator=generator)]
    for y in shifts:
        for x in shifts:
            here = (offsets == torch.tensor([y, x])).all(1)
            canvas[here, y : y + SIDE, x : x + SIDE] = images[here]
    return canvas

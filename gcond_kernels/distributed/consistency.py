"""What ranks tell each other to find out whether they have the same, and how they differ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.storage.accumulator import Segment
from gcond_kernels.storage.dtensor import is_dtensor, shard_coordinate


def digest(what: object) -> int:
    """A whole number of 63 bits that tells contents apart, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "big") >> 1


def description(segment: Segment) -> tuple[str, ...]:
    """What must be the same of a parameter on all ranks."""
    p: Any = segment.parameter
    if is_dtensor(p):
        where = f"placed {list(p.placements)} on a mesh of {tuple(p.device_mesh.shape)}"
    else:
        where = f"of strides {segment.stride}"
    return segment.name, f"shape {list(p.shape)}", str(p.dtype), where


def kinds_of(segments: Sequence[Segment]) -> tuple[list[object], list[int]]:
    """Kinds of parameters, by mesh and placement: this rank's coordinate in each; whose is which.

    Meshes are told apart by who comes first: their names and ranks differ from rank to rank.
    """
    numbers: dict[object, int] = {}
    coordinates: list[object] = []
    kind_of = []
    for segment in segments:
        p: Any = segment.parameter
        key = (p.device_mesh, tuple(p.placements)) if is_dtensor(p) else None
        if key not in numbers:
            numbers[key] = len(numbers)
            coordinates.append(shard_coordinate(p))
        kind_of.append(numbers[key])
    return coordinates, kind_of


FINGERPRINT_PIECE = 1 << 24  # elements that are widened at a time


def fingerprints(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Two numbers of each tensor that tell it from one of other values, or in another order."""
    prints = []
    for tensor in tensors:
        sums = torch.zeros(2, dtype=torch.float64, device=tensor.device)
        for piece in torch.split(tensor.flatten(), FINGERPRINT_PIECE):
            squares = piece.double().square()
            places = torch.arange(1, len(piece) + 1, dtype=torch.float32, device=tensor.device)
            ramp = places / len(piece)
            sums += torch.stack([squares.sum(), (squares * ramp).sum()])
        prints.append(sums)
    return torch.stack(prints).tolist() if prints else []


def holders_of(coordinates: Sequence[object]) -> dict[object, list[int]]:
    """Who holds which part of a kind of parameters, from the coordinate of every rank."""
    holders: dict[object, list[int]] = {}
    for rank, coordinate in enumerate(coordinates):
        holders.setdefault(coordinate, []).append(rank)
    return holders


def first_unlike(
    said: Sequence[Sequence[Sequence[float]]],
    holders: Sequence[dict[object, list[int]]],
    kind_of: Sequence[int],
    rel_tol: float,
    abs_tol: float = 0.0,
) -> tuple[int, int, int] | None:
    """The first tensor of which two ranks hold the same part, and of which they say otherwise.

    Args:
        said: of every rank, of every tensor some numbers.
        holders: of every kind of tensors, who holds which part.
        kind_of: of every tensor its kind.
        rel_tol: how far two numbers may lie apart.
        abs_tol: how far at least.

    Returns:
        The tensor and the two ranks; None where all agree.
    """
    for tensor, kind in enumerate(kind_of):
        for first, *others in holders[kind].values():
            for rank in others:
                for here, there in zip(said[rank][tensor], said[first][tensor], strict=True):
                    both_nan = here != here and there != there
                    close = math.isclose(here, there, rel_tol=rel_tol, abs_tol=abs_tol)
                    if not close and not both_nan:
                        return tensor, rank, first
    return None


HINT = "Ranks that train other parameters belong in another process_group="


def difference(said: Sequence[tuple[dict[str, str], list[tuple[str, ...]]]]) -> str:
    """How the settings or parameters of a rank differ from those of rank 0."""
    for rank, (settings, layout) in enumerate(said):
        for option, value in said[0][0].items():
            if settings.get(option) != value:
                return f"rank {rank} has {option}={settings.get(option)}, rank 0 {option}={value}"
        for here, there in zip(layout, said[0][1], strict=False):
            if here != there:
                return f"rank {rank} has {' '.join(here)}, rank 0 {' '.join(there)}. {HINT}"
        if len(layout) != len(said[0][1]):
            return (
                f"rank {rank} has {len(layout)} parameters that require a gradient, rank 0 "
                f"{len(said[0][1])}. {HINT}"
            )
    raise AssertionError("the ranks do not differ")

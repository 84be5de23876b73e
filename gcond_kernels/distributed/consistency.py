"""Checks that ranks have the same settings, parameters and state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcond_kernels.distributed.process_group import ProcessGroup
from gcond_kernels.ops.types import WORD_BITS
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.dtensor import is_dtensor, local_shard, shard_coordinate
from gcond_kernels.storage.layout import Segment

# Numbers by rank, by tensor: several of each.
Values = Sequence[Sequence[Sequence[float]]]
# The place of a shard along the dimensions of a mesh that shard it, and the size of those.
Coordinate = tuple[tuple[int, ...], tuple[int, ...]]
HINT = "Ranks that train other parameters belong in another process_group="
FINGERPRINT_CHUNK = 1 << 24  # elements that are converted to float64 at a time


class Replicas(NamedTuple):
    """Which ranks hold the same shard of each tensor.

    Attributes:
        kind_of: of each tensor its kind, one for each mesh with its placements.
        coordinates: of each kind this rank's coordinate.
        ranks: of each kind the ranks that have the same coordinate.
    """

    kind_of: list[int]
    coordinates: list[Coordinate]
    ranks: list[dict[Coordinate, list[int]]]

    def place(self, tensor: int, rank: int) -> tuple[int, int]:
        """Return which of a tensor's replicas this rank has, and how many there are."""
        kind = self.kind_of[tensor]
        same = self.ranks[kind][self.coordinates[kind]]
        return same.index(rank), len(same)

    @property
    def shard_number(self) -> int:
        """The number of this rank's shard, counted along the mesh; 0 where meshes differ."""
        number = 0
        if len(self.coordinates) == 1:
            for place, size in zip(*self.coordinates[0], strict=True):
                number = number * size + place
        return number

    def first_mismatch(
        self, values: Values, rel_tol: float, abs_tol: float = 0.0
    ) -> tuple[int, int, int] | None:
        """Return a tensor, and two ranks that hold the same shard with other values; or None."""
        for tensor, kind in enumerate(self.kind_of):
            for first, *others in self.ranks[kind].values():
                for rank in others:
                    for here, there in zip(
                        values[rank][tensor], values[first][tensor], strict=True
                    ):
                        both_nan = here != here and there != there
                        close = math.isclose(here, there, rel_tol=rel_tol, abs_tol=abs_tol)
                        if not close and not both_nan:
                            return tensor, rank, first
        return None


def check_ranks(
    storage: GradientStorage, group: ProcessGroup, settings: dict[str, str]
) -> Replicas:
    """Check that all ranks have the same settings, parameters and masks; all of them call it.

    Raises:
        RuntimeError: two ranks differ; the message names them and the difference.
    """
    segments = storage.segments
    layout = [description(segment) for segment in segments]
    coordinates, kind_of = kinds_of(segments)
    parameters = fingerprints([local_shard(segment.parameter) for segment in segments])
    own = digest([settings, layout]), coordinates, parameters, mask_fingerprints(storage)
    digests, of_ranks, values, masks = zip(*group.gather_objects(own), strict=True)
    if len(set(digests)) > 1:
        raise RuntimeError(difference(group.gather_objects((settings, layout))))
    by_kind = [ranks_by_coordinate(of_kind) for of_kind in zip(*of_ranks, strict=True)]
    replicas = Replicas(kind_of, coordinates, by_kind)
    if mismatch := replicas.first_mismatch(values, rel_tol=1e-6):
        tensor, rank, other = mismatch
        raise RuntimeError(
            f"{segments[tensor].name} of rank {rank} is not that of rank {other}: start from the "
            "same parameters (DistributedDataParallel sees to it; or load, or broadcast them)"
        )
    if storage.mask is not None and (mismatch := replicas.first_mismatch(masks, rel_tol=0.0)):
        tensor, rank, other = mismatch
        raise RuntimeError(
            f"mask of {segments[tensor].name} of rank {rank} is not that of rank {other}: make "
            "masks from the same weights, or broadcast them"
        )
    return replicas


def check_replicas(storage: GradientStorage, group: ProcessGroup, replicas: Replicas) -> None:
    """Check that ranks that hold the same shard have the same gradients of it, but for rounding.

    Raises:
        RuntimeError: two ranks have other gradients.
    """
    segments, rows = storage.segments, storage.accumulators
    tasks = [task for task, count in enumerate(storage.counts) if count > 0]
    own = [[float(segment.view(rows[task]).norm()) for task in tasks] for segment in segments]
    norms = group.gather_objects(own)
    # Beside large gradients one that is nothing but rounding may be another on every rank.
    largest = max((norm for rank in norms for tensor in rank for norm in tensor), default=0.0)
    if mismatch := replicas.first_mismatch(norms, rel_tol=1e-2, abs_tol=1e-3 * largest):
        tensor, rank, other = mismatch
        raise RuntimeError(
            f"rank {rank} and rank {other} hold the same part of {segments[tensor].name}, and have "
            "other gradients of it: nothing has reduced them. Shard it with the rest (fully_shard "
            "around the whole model, no ignored_params); give ranks of one tensor parallel group "
            "the same data; and ranks that train another model a process_group of their own"
        )


def digest(content: object) -> int:
    """Return 63 bits that tell contents apart, the same in every process."""
    hashed = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") >> 1


def description(segment: Segment) -> tuple[str, ...]:
    """Return what must be the same of a parameter on all ranks."""
    p: Any = segment.parameter
    if is_dtensor(p):
        where = f"placed {list(p.placements)} on a mesh of {tuple(p.device_mesh.shape)}"
    else:
        where = f"of strides {segment.stride}"
    return segment.name, f"shape {list(p.shape)}", str(p.dtype), where


def kinds_of(segments: Sequence[Segment]) -> tuple[list[Coordinate], list[int]]:
    """Return this rank's coordinate in each mesh with its placements, and of each tensor which.

    Meshes are numbered as they come: their names and ranks differ from rank to rank.
    """
    numbers: dict[object, int] = {}
    coordinates: list[Coordinate] = []
    for segment in segments:
        if (key := kind_of(segment)) not in numbers:
            numbers[key] = len(numbers)
            coordinates.append(shard_coordinate(segment.parameter))
    return coordinates, [numbers[kind_of(segment)] for segment in segments]


def kind_of(segment: Segment) -> object:
    """Return the mesh and the placements of a DTensor; None of any other parameter."""
    p: Any = segment.parameter
    return (p.device_mesh, tuple(p.placements)) if is_dtensor(p) else None


def ranks_by_coordinate(coordinates: Sequence[Coordinate]) -> dict[Coordinate, list[int]]:
    """Return the ranks that have the same coordinate, from the coordinate of every rank."""
    ranks: dict[Coordinate, list[int]] = {}
    for rank, coordinate in enumerate(coordinates):
        ranks.setdefault(coordinate, []).append(rank)
    return ranks


def fingerprints(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return two numbers of each tensor that tell other values or another order apart."""
    prints = []
    for tensor in tensors:
        sums = torch.zeros(2, dtype=torch.float64, device=tensor.device)
        for chunk in torch.split(tensor.flatten(), FINGERPRINT_CHUNK):
            squares = chunk.double().square()
            places = torch.arange(1, len(chunk) + 1, dtype=torch.float32, device=tensor.device)
            sums += torch.stack([squares.sum(), (squares * (places / len(chunk))).sum()])
        prints.append(sums)
    return torch.stack(prints).tolist() if prints else []


def mask_fingerprints(storage: GradientStorage) -> list[list[float]]:
    """Return a number of each tensor's mask that tells another one apart; nothing without one."""
    if storage.mask is None:
        return []
    words = storage.mask.cpu().numpy()
    prints = []
    for offset, size in zip(*storage.layout, strict=True):
        of_tensor = words[offset // WORD_BITS : -(-(offset + size) // WORD_BITS)].tobytes()
        # 48 bits, which a float holds.
        hashed = hashlib.blake2b(of_tensor, digest_size=6).digest()
        prints.append([float(int.from_bytes(hashed, "big"))])
    return prints


def difference(of_ranks: Sequence[tuple[dict[str, str], list[tuple[str, ...]]]]) -> str:
    """Return how settings or parameters of a rank differ from those of rank 0."""
    first_settings, first_layout = of_ranks[0]
    for rank, (settings, layout) in enumerate(of_ranks):
        for option, value in first_settings.items():
            if settings.get(option) != value:
                return f"rank {rank} has {option}={settings.get(option)}, rank 0 {option}={value}"
        for here, there in zip(layout, first_layout, strict=False):
            if here != there:
                return f"rank {rank} has {' '.join(here)}, rank 0 {' '.join(there)}. {HINT}"
        if len(layout) != len(first_layout):
            return (
                f"rank {rank} has {len(layout)} parameters that require a gradient, rank 0 "
                f"{len(first_layout)}. {HINT}"
            )
    raise AssertionError("the ranks do not differ")

"""Checks that ranks have the same settings, parameters and state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.distributed.process_group import ProcessGroup
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.dtensor import is_dtensor, local_shard, shard_coordinate
from gcond_kernels.storage.layout import Segment

# Of each tensor, the groups of ranks that hold the same shard of it.
Replicas = list[list[list[int]]]
# Numbers by rank, by tensor: several of each.
Values = Sequence[Sequence[Sequence[float]]]
FINGERPRINT_CHUNK = 1 << 24  # elements that are converted to float64 at a time


def check_ranks(
    storage: GradientStorage, group: ProcessGroup, settings: dict[str, str]
) -> Replicas:
    """Check that ranks have the same settings, parameters and masks; return who holds what."""
    segments = storage.segments
    described = [f"{option}={value}" for option, value in settings.items()]
    described += [description(segment) for segment in segments]
    described += [f"{len(segments)} parameters that require a gradient"]
    masks_here = [mask for s in segments if (mask := storage.mask_of(s)) is not None]
    own = (
        digest(repr(described).encode()),
        [shard_coordinate(segment.parameter) for segment in segments],
        fingerprints([local_shard(segment.parameter) for segment in segments]),
        [[digest(mask.cpu().numpy().tobytes())] for mask in masks_here],
    )
    digests, coordinates, parameters, masks = zip(*group.gather_objects(own), strict=True)
    if len(set(digests)) > 1:
        raise RuntimeError(difference(group.gather_objects(described)))
    replicas = [ranks_by_coordinate(of_tensor) for of_tensor in zip(*coordinates, strict=True)]
    advice = "load or broadcast the same parameters (DistributedDataParallel does)"
    checks = [("", parameters, 1e-6, advice)]
    if storage.mask is not None:
        checks.append(("mask of ", masks, 0.0, "make masks of the same weights, or broadcast them"))
    for what, values, rel_tol, advice in checks:
        if mismatch := first_mismatch(values, replicas, rel_tol):
            tensor, rank, other = mismatch
            raise RuntimeError(
                f"{what}{segments[tensor].name} of rank {rank} is not that of rank {other}: "
                f"{advice}"
            )
    return replicas


def check_gradients(storage: GradientStorage, group: ProcessGroup, replicas: Replicas) -> None:
    """Check that ranks that hold the same shard have the same gradients of it, but for rounding."""
    segments = storage.segments
    of_tasks = [storage.accumulators[task] for task, count in enumerate(storage.counts) if count]
    own = [[float(segment.view(of_task).norm()) for of_task in of_tasks] for segment in segments]
    norms = group.gather_objects(own)
    # Beside large gradients one that is nothing but rounding may be another on every rank.
    largest = max((norm for rank in norms for tensor in rank for norm in tensor), default=0.0)
    if mismatch := first_mismatch(norms, replicas, rel_tol=1e-2, abs_tol=1e-3 * largest):
        tensor, rank, other = mismatch
        raise RuntimeError(
            f"rank {rank} and rank {other} hold the same shard of {segments[tensor].name}, and "
            "have other gradients of it: nothing has reduced them. Shard it with the rest "
            "(fully_shard around the whole model, no ignored_params); give ranks of one tensor "
            "parallel group the same data; and ranks that train another model a process_group of "
            "their own"
        )


def first_mismatch(
    values: Values, replicas: Replicas, rel_tol: float, abs_tol: float = 0.0
) -> tuple[int, int, int] | None:
    """Return a tensor, and two ranks that hold the same shard with other values; or None."""
    for tensor, groups in enumerate(replicas):
        for first, *others in groups:
            for rank in others:
                pairs = zip(values[rank][tensor], values[first][tensor], strict=True)
                if not all(
                    math.isclose(a, b, rel_tol=rel_tol, abs_tol=abs_tol) or (a != a and b != b)
                    for a, b in pairs
                ):
                    return tensor, rank, first
    return None


def difference(of_ranks: Sequence[list[str]]) -> str:
    """Return how what describes a rank, item by item, differs from that of rank 0."""
    there = of_ranks[0]
    rank, own, first = next(
        (rank, own, first)
        for rank, here in enumerate(of_ranks)
        # The number of parameters, which comes last, where all that both have is the same.
        for own, first in [*zip(here[:-1], there[:-1], strict=False), (here[-1], there[-1])]
        if own != first
    )
    return (
        f"rank {rank} has {own}, rank 0 {first}. Ranks that train other parameters belong in "
        "another process_group"
    )


def ranks_by_coordinate(coordinates: Sequence[object]) -> list[list[int]]:
    """Return the groups of ranks that have the same coordinate, from that of every rank."""
    groups: dict[object, list[int]] = {}
    for rank, coordinate in enumerate(coordinates):
        groups.setdefault(coordinate, []).append(rank)
    return list(groups.values())


def shard_number(segments: Sequence[Segment]) -> int:
    """Return the number of this rank's shard, where all parameters have one placement; else 0."""
    parameters: list[Any] = [segment.parameter for segment in segments]
    of_each = {is_dtensor(p) and (p.device_mesh, tuple(p.placements)) for p in parameters}
    number = 0
    if len(of_each) == 1:
        for place, size in zip(*shard_coordinate(parameters[0]), strict=True):
            number = number * size + place
    return number


def description(segment: Segment) -> str:
    """Return what must be the same of a parameter on all ranks."""
    p: Any = segment.parameter
    where = f"of strides {segment.stride}"
    if is_dtensor(p):
        where = f"placed {list(p.placements)} on a mesh of {tuple(p.device_mesh.shape)}"
    return f"{segment.name} shape {list(p.shape)} {p.dtype} {where}"


def digest(content: bytes) -> int:
    """Return 63 bits that distinguish contents, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def fingerprints(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return two numbers of each tensor that distinguish values and their order."""
    prints = []
    for tensor in tensors:
        sums = torch.zeros(2, dtype=torch.float64, device=tensor.device)
        for chunk in torch.split(tensor.flatten(), FINGERPRINT_CHUNK):
            squares = chunk.double().square()
            places = torch.arange(1, len(chunk) + 1, dtype=torch.float32, device=tensor.device)
            sums += torch.stack([squares.sum(), (squares * (places / len(chunk))).sum()])
        prints.append(sums)
    return torch.stack(prints).tolist() if prints else []

"""A flag of the device that the host reads later, without synchronizing with the device."""

from __future__ import annotations

import torch
from torch import Tensor

from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.contexts import fixed_precision


def reads_at_once(device: torch.device) -> bool:
    """Return whether the host reads a device's flags when it needs them, and not later."""
    return device.type != "cuda"  # others than the CPU have no events of one kind


class HostFlag:
    """Whether a flag of the device has been True, as far as the host has learned."""

    def __init__(self) -> None:
        self._known = False
        self._host: Tensor | None = None  # [] bool in pinned memory, made when needed
        self._copied: torch.cuda.Event | None = None  # while a copy is pending

    def __reduce__(self) -> tuple[type[HostFlag], tuple[()]]:
        return HostFlag, ()  # a copy has seen nothing yet: an event belongs to one process

    def note(self, flag: Tensor) -> bool:
        """Start a copy of a flag, [] bool (on a CPU: read it), and return whether it was noted.

        It is not while a CUDA graph is captured or a copy is pending, nor once one was True.
        """
        device = flag.device
        if device.type == "meta" or launch_tables.is_capturing(device):
            return False
        self._read_copy()
        if self._known or self._copied is not None:
            return False
        if reads_at_once(device):
            self._known = bool(flag)
        else:
            self._copied = self._start_copy(flag)
        return True

    @property
    def known(self) -> bool:
        """Whether a flag that was noted is known to be True; once it is, it stays so."""
        self._read_copy()
        return self._known

    def _read_copy(self) -> None:
        """Read the copy where it is complete."""
        if self._copied is None or self._host is None:
            return
        # An event that is queried during a capture makes CUDA give the capture up.
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if self._copied.query():  # type: ignore[no-untyped-call]
            self._known, self._copied = bool(self._host), None

    @fixed_precision  # the memory is kept
    def _start_copy(self, flag: Tensor) -> torch.cuda.Event:
        """Start a copy to the host and return an event that is done when it is complete."""
        if self._host is None:
            self._host = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=True)
        self._host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(flag.device))
        return event

"""Flags that the host learns of late, as on a GPU, without one."""

from gcond_kernels.methods import host
from gcond_kernels.ops import host_flag
from gcond_kernels.ops.host_flag import HostFlag


class Event:
    """Stands in for a CUDA event: it is done when the test says so."""

    done = False

    def query(self):
        return self.done


def late_flags(monkeypatch) -> list[Event]:
    """Makes every `HostFlag` wait for an event, and lists these events as they are made."""
    events = []

    def start_copy(flag, value):
        flag._host = value.clone()
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(host_flag, "reads_at_once", lambda _device: False)
    monkeypatch.setattr(HostFlag, "_start_copy", start_copy)
    return events


def no_reads(monkeypatch) -> None:
    """Lets methods compute as on a GPU, which the host does not read."""
    monkeypatch.setattr(host, "may_read", lambda _: False)

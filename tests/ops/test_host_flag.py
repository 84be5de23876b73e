"""A flag of the device that the host learns of without waiting."""

import copy
import pickle

import pytest
import torch

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.host_flag import HostFlag
from tests.helpers.as_on_gpu import late_flags
from tests.helpers.host_reads import HostReads

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def test_on_a_cpu_it_is_known_at_once_and_stays_so():
    flag = HostFlag()
    assert not flag.known
    assert flag.note(FALSE)
    assert not flag.known
    assert flag.note(TRUE)
    assert flag.known
    assert not flag.note(FALSE)
    assert flag.known


def test_on_a_gpu_it_is_known_when_the_copy_is_there(monkeypatch):
    events, flag = late_flags(monkeypatch), HostFlag()
    assert flag.note(TRUE)
    with HostReads() as reads:
        assert not flag.known
        assert not flag.note(FALSE)  # a copy is pending
    assert reads.found == []
    (event,) = events
    event.done = True
    assert flag.known
    assert not flag.note(FALSE)
    assert flag.known
    assert len(events) == 1


def test_a_complete_copy_allows_the_next(monkeypatch):
    events, flag = late_flags(monkeypatch), HostFlag()
    assert flag.note(FALSE)
    events[0].done = True
    assert flag.note(TRUE)
    assert not flag.known
    events[1].done = True
    assert flag.known


def test_what_was_true_is_known_though_it_was_not_read_before_the_next(monkeypatch):
    events, flag = late_flags(monkeypatch), HostFlag()
    flag.note(TRUE)
    events[0].done = True
    assert not flag.note(FALSE)
    assert flag.known


def test_nothing_is_noted_or_read_while_a_graph_is_captured(monkeypatch):
    events, flag = late_flags(monkeypatch), HostFlag()
    assert flag.note(TRUE)
    events[0].done = True
    with monkeypatch.context() as capture:
        capture.setattr(tables, "is_capturing", lambda _device: True)
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not flag.note(TRUE)
        assert not flag.known
    assert flag.known


def test_a_tensor_without_values_is_not_noted():
    flag = HostFlag()
    assert not flag.note(torch.empty((), dtype=torch.bool, device="meta"))
    assert not flag.known


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda flag: pickle.loads(pickle.dumps(flag))])
def test_a_copy_of_it_has_seen_nothing(monkeypatch, copied):
    late_flags(monkeypatch)
    flag = HostFlag()
    flag.note(TRUE)
    twin = copied(flag)
    assert twin.note(FALSE)
    assert not twin.known

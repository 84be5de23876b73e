"""Pools of ranks, which all tests of a session share."""

import multiprocessing

import pytest
import torch

from tests.helpers.ranks import Ranks

POOLS = ("ranks2", "ranks4", "ranks")
collect_ignore_glob = [] if torch.distributed.is_available() else ["test_*.py"]


@pytest.hookimpl(tryfirst=True)  # before markers are selected
def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/distributed" in str(item.path) and set(POOLS) & set(item.fixturenames):
            item.add_marker(pytest.mark.distributed)


def pool(size):
    @pytest.fixture(scope="session")
    def ranks(tmp_path_factory):
        if "forkserver" not in multiprocessing.get_all_start_methods():
            pytest.skip("there is no fork here")
        ranks = Ranks(size, tmp_path_factory.mktemp("ranks"))
        yield ranks
        ranks.close()

    return ranks


ranks2, ranks4 = pool(2), pool(4)


@pytest.fixture
def ranks(request):
    return lambda size: request.getfixturevalue(f"ranks{size}")

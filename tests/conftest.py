"""What several test files share."""

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import seeds
import torch

from inference.compiler import fuse
from inference.core.handlers import isolated

pytest.register_assert_rewrite("laws")
# What one test has compiled must not decide how another runs.
os.environ["PPL_MODELS_PROGRAMS"] = ""
if seeds.SHIFT:
    seeds.install()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers side by side: two threads each would wait for each other at every operation, and so would processes.
    os.environ["LOKY_MAX_CPU_COUNT"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def seeds_of_documentation(request: pytest.FixtureRequest) -> Iterator[None]:
    """The examples of documentation print the figures of their own seeds."""
    with seeds.unmoved() if request.module.__name__ in ("test_doctests", "test_readme") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def nothing_spent() -> None:
    """What earlier tests have run does not decide what is compiled in this one."""
    fuse._SPENT.clear()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which a shell may have switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def alone() -> Iterator[None]:
    """A seed and a parameter store of its own, and one thread: the tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with isolated(0):
        yield
    torch.set_num_threads(threads)

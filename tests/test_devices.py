"""The tests of ``on_devices.py``, in processes of their own: torch starts a thread per device at the first gradient.

A device that pretends has to exist before that, and would be there for all tests that follow.
"""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("which", ["a_pair_runs", "not a_pair_runs"], ids=["entries", "verbs"])
def test_everything_runs_on_another_device(which: str) -> None:
    path = Path(__file__).with_name("on_devices.py")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=short", "-p", "no:cacheprovider"]
    ended = subprocess.run([*command, "-k", which, str(path)], cwd=path.parent.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    assert " passed" in ended.stdout and "failed" not in ended.stdout

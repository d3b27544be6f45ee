"""The README's Python blocks run in order and print what it says they print."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


def test_the_blocks_run_and_print_what_stands_below_them() -> None:
    assert len(BLOCKS) >= 3
    namespace: dict = {}
    for code, expected in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        got = printed.getvalue()
        assert NUMBER.sub("#", got).split() == NUMBER.sub("#", expected).split()
        numbers = zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True)
        for now, said in numbers:
            # Machines sum in different orders: figures may differ by one in the last place shown.
            places = len(said.split(".")[1])
            assert float(now) == pytest.approx(float(said), abs=1.01 * 10**-places)

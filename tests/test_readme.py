"""Python blocks of pages run in order and print what stands below them."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/howto/own_loop.md", "docs/howto/questions.md"]
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run_and_print_what_stands_below_them(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.endswith("questions.md"):
        pytest.importorskip("constriction", reason="constriction is not installed (the extra compression)")
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert len(blocks) >= 2
    namespace: dict = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), namespace)
        got = printed.getvalue()
        assert NUMBER.sub("#", got).split() == NUMBER.sub("#", expected).split()
        numbers = zip(NUMBER.findall(got), NUMBER.findall(expected), strict=True)
        for now, said in numbers:
            # Machines sum in different orders: figures may differ by one in the last place shown.
            places = len(said.split(".")[1])
            assert float(now) == pytest.approx(float(said), abs=1.01 * 10**-places)

"""The gallery: each example has a small figure that the script as it is now has made, and a notebook."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
GALLERY = ROOT / "docs/static/gallery"

SCRIPT = """\"\"\"Is it small? It is.\"\"\"

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

figure = Figure(figsize=({width}, {width}))
figure.add_subplot().imshow(np.random.default_rng(0).random(({pixels}, {pixels})))
figure.savefig(Path(sys.argv[2]) / "{name}.png", dpi=150)
"""


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("figures")


@pytest.fixture
def gallery(figures: ModuleType) -> ModuleType:
    return importlib.import_module("gallery")


@pytest.fixture
def few(figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of examples of its own, of which one fails, and the figure of one is too large."""
    for folder in ("examples", "gallery"):
        (tmp_path / folder).mkdir()
    for name, width, pixels in (("one", 12, 60), ("two", 6, 60), ("large", 12, 400)):
        (tmp_path / f"examples/{name}.py").write_text(SCRIPT.format(name=name, width=width, pixels=pixels))
    (tmp_path / "examples/bad.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(figures, "EXAMPLES", tmp_path / "examples")
    monkeypatch.setattr(figures, "GALLERY", tmp_path / "gallery")
    return tmp_path


def width(path: Path) -> int:
    return plt.imread(path).shape[1]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.stem)
def test_each_example_has_the_figure_that_it_makes_now(script: Path, figures: ModuleType) -> None:
    assert figures.current(script), f"python -m docs.figures {script.stem}"
    assert figures.record_of(script)["seconds"] < 1200


def test_the_figures_are_small_and_belong_to_examples() -> None:
    stems = {p.stem for p in EXAMPLES}
    pictures = sorted(GALLERY.glob("*.png"))
    assert {p.stem for p in GALLERY.iterdir()} == stems
    assert all(p.stat().st_size <= 100_000 for p in pictures)
    assert sum(p.stat().st_size for p in pictures) < 2_000_000
    for path in pictures:
        height, width, _ = plt.imread(path).shape
        assert width >= 700 and 0.35 < height / width < 1


def test_the_pictures_of_the_readme_are_there_and_small() -> None:
    paths = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert "docs/static/strip.png" in paths
    for path in paths:
        assert (ROOT / path).stat().st_size < 400_000
    assert (ROOT / "docs/static/strip.png").stat().st_size <= 100_000


def test_figures_are_made_once_until_the_script_changes(
    figures: ModuleType, few: Path, capsys: pytest.CaptureFixture
) -> None:
    assert figures.main([]) == 1
    said = capsys.readouterr().err
    assert "large.png: expected at most 100,000 bytes, got " in said and "2 failed: bad, large" in said
    assert {p.name for p in (few / "gallery").iterdir()} == {"one.json", "one.png", "two.json", "two.png"}
    one, two = (few / f"gallery/{name}.png" for name in ("one", "two"))
    assert (width(one), width(two)) == (figures.WIDTH, 900)
    assert max(p.stat().st_size for p in (one, two)) <= figures.LARGEST
    for name in ("bad", "large"):
        (few / f"examples/{name}.py").unlink()
    before = one.stat().st_mtime_ns, two.stat().st_mtime_ns
    (few / "examples/two.py").write_text(SCRIPT.format(name="two", width=7, pixels=60))
    assert not figures.current(few / "examples/two.py")
    assert figures.main([]) == 0
    assert one.stat().st_mtime_ns == before[0] and two.stat().st_mtime_ns > before[1]
    assert figures.current(few / "examples/two.py") and width(two) == 1050
    with pytest.raises(SystemExit, match=r"^figures: expected names of examples \(one, two\), got three$"):
        figures.main(["three"])


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.stem)
def test_a_notebook_holds_all_of_the_script(script: Path, gallery: ModuleType) -> None:
    whole = gallery.notebook(script)
    assert whole["nbformat"] == 4 and json.loads(json.dumps(whole)) == whole
    said, *code = ("".join(cell["source"]) for cell in whole["cells"])
    assert said.startswith(f"# {gallery.told(script)[0]}")
    for cell in code:
        compile(cell, script.name, "exec")
    body = script.read_text().partition('\n"""\n')[2].partition('if __name__ == "__main__":')[0]
    assert code[0].strip() == body.strip()


def test_a_notebook_runs_and_shows_the_figure(
    gallery: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.Image = shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    whole = ModuleType("IPython")
    whole.version_info = (9, 0)
    monkeypatch.setitem(sys.modules, "IPython", whole)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for cell in gallery.notebook(ROOT / "examples/em_is_variational.py")["cells"][1:]:
        exec("".join(cell["source"]), namespace)
    (path,) = shown
    assert Path(path).exists()

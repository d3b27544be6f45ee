"""The site: a card per entry, every page in a table of contents, and code of public names only."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from test_layers import check_public

from ppl_models import ZOO
from ppl_models.ledger import RECIPES

pytest.importorskip("sphinx", reason="sphinx is not installed (the extra docs)")
pytest.importorskip("latex2mathml", reason="latex2mathml is not installed (the extra docs)")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WRITTEN = sorted([*DOCS.glob("*.md"), *DOCS.glob("howto/*.md")])


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages that the build writes, without the graphs, which take the data."""
    folder = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.syspath_prepend(str(DOCS))
        pages = importlib.import_module("pages")
        patch.setattr(pages, "graph_of", lambda entry: "")
        pages.write(folder)
    return folder


def blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def contents(folder: Path) -> set[Path]:
    """Pages named in tables of contents of a folder."""
    found = set()
    for page in folder.rglob("*.md"):
        for body in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [line for line in body.split("\n") if line and not line.startswith(":")]
            found |= {(page.parent / f"{name}.md").resolve() for name in names}
    return found


def test_the_zoo_has_a_card_per_entry_with_its_story_data_and_methods(generated: Path) -> None:
    tiles = (generated / "zoo/index.md").read_text()
    for entry in ZOO.values():
        card = (generated / f"zoo/{entry.name}.md").read_text()
        assert f":link: {entry.name}\n" in tiles
        assert all(said in card for said in (entry.title, ".. math::", entry.data, entry.source, *entry.methods))
        shown = (DOCS / f"static/zoo/{entry.name}.png").exists()
        assert (f"static/zoo/{entry.name}.png" in card) is shown
        assert all(f"`{r.name}`" in card for r in RECIPES.values() if r.entry == entry.name)


def test_formulas_with_commands_that_cannot_be_drawn_are_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        mathml = importlib.import_module("mathml").mathml
    assert "argmax" in mathml(r"\operatorname{argmax}_\theta f(\theta)", "block")
    with pytest.raises(ValueError, match=r"commands that can be drawn, got \\arg in"):
        mathml(r"\arg\max_\theta f(\theta)", "block")
    for page in WRITTEN:
        for formula in re.findall(r"\$\$(.+?)\$\$", page.read_text(), re.DOTALL):
            mathml(formula, "block")


def test_every_example_has_a_page(generated: Path) -> None:
    stems = {p.stem for p in (ROOT / "examples").glob("*.py")}
    assert {p.stem for p in (generated / "gallery").glob("*.md")} == stems | {"index"}


def test_every_page_is_in_a_table_of_contents(generated: Path) -> None:
    listed = contents(DOCS)
    assert {p for p in WRITTEN if p.name != "index.md" or p.parent != DOCS} <= listed
    within = contents(generated)
    for page in generated.rglob("*.md"):
        stands = (DOCS / "generated" / page.relative_to(generated)).resolve()
        assert page.resolve() in within or stands in listed, page


@pytest.mark.parametrize("path", [p for p in WRITTEN if blocks(p)], ids=lambda p: p.stem)
def test_the_code_of_a_page_compiles_and_uses_public_names(path: Path) -> None:
    for block in blocks(path):
        check_public(ast.parse(block))


def test_the_lines_that_the_course_shows_are_there() -> None:
    """Each object that a page includes exists: the build would fail, later."""
    shown = re.findall(r"{literalinclude} (\S+)\n:pyobject: (\S+)", (DOCS / "course.md").read_text())
    assert len(shown) > 15
    for file, name in shown:
        node: ast.AST = ast.parse((DOCS / file).read_text())
        for part in name.split("."):
            (node,) = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part]

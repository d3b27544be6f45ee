"""The arrows between the packages: Pyro -> inference; Pyro -> model files; both -> zoo -> command line."""

import ast
from pathlib import Path

import pytest

import inference
import ppl_models

INFERENCE = sorted(Path(inference.__file__).parent.rglob("*.py"))
ZOO = sorted(Path(ppl_models.__file__).parent.rglob("*.py"))
MAY_USE_BOTH = {"methods.py", "zoo.py", "ledger.py", "recipes.py", "cli.py", "__main__.py"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", INFERENCE, ids=lambda p: p.stem)
def test_inference_knows_nothing_of_the_zoo(path: Path) -> None:
    assert "ppl_models" not in imported(path)


@pytest.mark.parametrize("path", [p for p in ZOO if p.name not in MAY_USE_BOTH], ids=lambda p: p.stem)
def test_model_files_do_not_import_inference(path: Path) -> None:
    assert "inference" not in imported(path)


def test_the_command_line_stands_on_top() -> None:
    for path in ZOO:
        text = path.read_text()
        if path.name not in MAY_USE_BOTH:
            assert "ppl_models.zoo" not in text, path.name
            assert "ppl_models.cli" not in text, path.name

"""The floors of the two packages: a file imports from floors below its own and from its own folder.

``python tests/test_layers.py`` prints the tree of CONTRIBUTING.md.
"""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import ppl_models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FLOORS = (
    ("inference/core",),
    ("inference/optim.py",),
    ("inference/compiler",),
    ("inference/draws",),
    ("inference/kernels", "inference/diagnostics", "inference/idata.py", "inference/groups.py"),
    ("inference/report",),
    (
        "inference/objectives",
        "inference/further.py",
        "inference/result.py",
        "inference/saved.py",
        "inference/checkpoint.py",
        "inference/stored.py",
        "inference/joined.py",
    ),
    ("inference/runners", "inference/predict.py"),
    ("inference/evidence",),
    ("inference/comparison", "inference/_fit.py", "inference/_sample.py"),
    # Their examples fit a pair by the public name.
    (
        "inference/__init__.py",
        "inference/outliers.py",
        "inference/imputation.py",
        "inference/alternation.py",
        "inference/compression.py",
        "inference/denoising.py",
        "inference/bits_back.py",
        "inference/coder.py",
    ),
)
MODELS = (
    ("ppl_models/models/checks.py", "ppl_models/models/parts"),
    ("ppl_models/models/pair.py",),
    ("ppl_models/models",),
    ("ppl_models/models/diffusion",),
)
ABOVE = (
    ("ppl_models/data",),
    ("ppl_models/zoo",),
    ("ppl_models/zoo/__main__.py", "ppl_models/sklearn.py"),
    ("ppl_models/ledger/recipes",),
    ("ppl_models/ledger/record.py", "ppl_models/ledger/pictures.py"),
    ("ppl_models/ledger",),
    ("ppl_models/__init__.py",),
    ("ppl_models/commands",),
    ("ppl_models/cli.py",),
    ("ppl_models/__main__.py",),
)
PACKAGES = {
    "inference": FLOORS,
    "ppl_models/models": MODELS,
    "ppl_models/data": (("ppl_models/data",),),
    "ppl_models": (*FLOORS, *MODELS, *ABOVE),
}
"""What the files of a folder may import: the most specific entry holds."""
PUBLIC = {"inference", "inference.kernels", "inference.objectives"}
FILES = sorted(p for package in ("inference", "ppl_models") for p in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Files of the project that a file imports, in its doctests too."""
    tree = ast.parse(path.read_text())
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    examples = [e.source for text in texts for e in doctest.DocTestParser().get_examples(text)]
    found = set()
    for node in (n for source in (tree, *map(ast.parse, examples)) for n in ast.walk(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {file_of(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names}
    return found - {None}


def file_of(module: str, name: str = "") -> str | None:
    """The file that holds a module, or a name of it; None outside of the project."""
    places = (f"{module}.{name}", module) if name else (module,)
    candidates = [ROOT / f"{place.replace('.', '/')}{end}" for place in places for end in (".py", "/__init__.py")]
    return next((str(c.relative_to(ROOT)) for c in candidates if c.exists()), None)


def floor(file: str, floors: tuple[tuple[str, ...], ...]) -> int:
    """Number of the floor that a file stands on: that of the longest entry which holds it."""
    entries = {e: k for k, floor in enumerate(floors) for e in floor if file == e or file.startswith(f"{e}/")}
    assert entries, f"{file} stands on no floor"
    return entries[max(entries, key=len)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_from_floors_below_and_its_own_folder(path: Path) -> None:
    own = str(path.relative_to(ROOT))
    floors = PACKAGES[max((p for p in PACKAGES if own.startswith(f"{p}/")), key=len)]
    for other in imported(path) - {own}:
        below = floor(other, floors) < floor(own, floors)
        together = floor(other, floors) == floor(own, floors) and Path(other).parent == path.relative_to(ROOT).parent
        assert below or together, f"{own} imports {other}"


def outside() -> list[Path]:
    """Files that use ``inference`` as its users do."""
    shown = [p for p in FILES if "ppl_models" in p.parts]
    return [*shown, *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("path", outside(), ids=lambda p: str(p.relative_to(ROOT)))
def test_users_of_inference_import_its_public_names(path: Path) -> None:
    check_public(ast.parse(path.read_text()))


def test_the_readme_imports_public_names() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        check_public(ast.parse(block))


def check_public(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "inference":
            assert node.module in PUBLIC, f"from {node.module}"
            package = importlib.import_module(node.module)
            for alias in node.names:
                assert alias.name in package.__all__, f"{alias.name} is no public name of {node.module}"
        elif isinstance(node, ast.Import):
            assert all(a.name in PUBLIC for a in node.names if a.name.split(".")[0] == "inference")


def test_no_public_function_hides_a_module() -> None:
    for package in (
        "inference",
        "inference.kernels",
        "inference.objectives",
        "ppl_models",
        "ppl_models.zoo",
        "ppl_models.ledger",
    ):
        module = importlib.import_module(package)
        folder = ROOT / package.replace(".", "/")
        hidden = [
            n
            for n in module.__all__
            if (folder / f"{n}.py").exists() and not isinstance(getattr(module, n), ModuleType)
        ]
        assert not hidden, f"{package}: {hidden}"


def test_another_module_of_the_name_inference_is_met_by_one_line(tmp_path: Path) -> None:
    (tmp_path / "inference.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import ppl_models"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: inference: expected the package in .*, got .*inference\.py; rename the latter", line)


def test_importing_the_zoo_is_quick() -> None:
    """The table of contents imports nothing: what it costs is what torch and pyro cost elsewhere."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ppl_models; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(done.stdout)
    assert not {"torch", "pyro", "numpy", "sklearn", "matplotlib", "inference"} & {m.split(".")[0] for m in loaded}
    assert not [m for m in loaded if m.startswith("ppl_models.")]


def test_every_public_name_of_the_zoo_is_there() -> None:
    assert all(getattr(ppl_models, name) is not None for name in ppl_models.__all__)
    assert {type(e.pair(e.load())).__name__ for e in ppl_models.ZOO.values() if e.name == "vae"} == {"VAE"}
    with pytest.raises(AttributeError, match="module 'ppl_models' has no attribute 'VEA'"):
        ppl_models.VEA  # noqa: B018


def tree() -> str:
    """The packages, what each holds in the first sentence of its docstring, and its files."""
    lines = []
    for init in (p for p in FILES if p.name == "__init__.py"):
        folder = init.parent.relative_to(ROOT)
        said = (ast.get_docstring(ast.parse(init.read_text())) or "").split("\n")[0]
        depth = "  " * (len(folder.parts) - 1)
        name = str(folder) if len(folder.parts) == 1 else folder.name
        lines.append(f"{depth}{name}/".ljust(22) + said)
        stems = ", ".join(p.stem for p in sorted(init.parent.glob("*.py")) if p.name != "__init__.py")
        lines += textwrap.wrap(stems, 118, initial_indent=" " * 24, subsequent_indent=" " * 24)
    return "\n".join(lines)


def test_the_notes_for_contributors_have_the_tree_as_it_is() -> None:
    assert f"```text\n{tree()}\n```" in (ROOT / "CONTRIBUTING.md").read_text()


def test_what_a_result_needs_is_imported_with_the_first_result() -> None:
    """ArviZ and what it brings along took two seconds of ``import inference``, on top of torch and Pyro."""
    late = ["arviz_base", "arviz_stats", "xarray", "pandas", "matplotlib", "scipy.stats", "sklearn", "joblib", "jinja2"]
    code = f"import sys, inference; print([m for m in {late} if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


if __name__ == "__main__":
    print(tree())

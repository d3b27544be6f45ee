"""A release of torch that lacks a private name runs everything eagerly, and says so once."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor

from inference.compiler.capture import traced
from inference.compiler.fuse import fused
from inference.core import private

ROOT = Path(__file__).parent.parent
NAMES = re.findall(r'_take\("([\w.]+)", "(\w+)"', Path(private.__file__).read_text())

WORK = """
import importlib, json, sys, types, warnings
take = importlib.import_module
hidden = set(map(tuple, json.loads(sys.argv[1])))

def without(module, *more):
    found = take(module, *more)
    lost = [name for where, name in hidden if where == module]
    return found if not lost else types.SimpleNamespace(**{k: getattr(found, k) for k in dir(found) if k not in lost})

importlib.import_module = without
import inference.core.private
importlib.import_module = take
import pyro, torch, pyro.distributions as dist
from pyro.infer.autoguide import AutoNormal
from inference import fit, posterior_predictive, sample

def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu + p[0], 1.0), obs=x)

x = torch.linspace(-1, 1, 8)
told = {}
for name, run in {
    "fit": lambda: fit((model, AutoNormal(model)), x, steps=20, compile=True, progress=False, draws=20),
    "sample": lambda: sample(model, x, draws=5, warmup=5, chains=8, compile=True, progress=False),
}.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    assert result.draws["mu"].isfinite().all()
    lines = [str(w.message) for w in caught]
    told[name] = [result.idata.attrs["execution"], [t for t in lines if "has no" in t]]
print(json.dumps(told))
"""


def outcome(hidden: list[tuple[str, str]]) -> dict[str, tuple[str, list[str]]]:
    command = [sys.executable, "-W", "ignore", "-c", WORK, json.dumps(hidden)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)  # type: ignore[no-any-return]


def check(hidden: list[tuple[str, str]]) -> None:
    for execution, told in outcome(hidden).values():
        assert execution == "eager"
        assert len(told) == 1
        assert all(f"{module}.{name}" in told[0] for module, name in hidden)


def test_without_any_of_them_everything_runs_eagerly() -> None:
    assert NAMES
    check(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_without_one_of_them_everything_runs_eagerly(name: tuple[str, str]) -> None:
    check([name])


def test_without_inductor_a_graph_runs_as_it_was_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._inductor, "compile")
    graph = traced(lambda x: x + 1, torch.zeros(3))
    with pytest.warns(UserWarning, match="runs traced, but not fused .AttributeError"):
        assert fused(graph, [torch.zeros(3)]) is graph


def test_all_are_there_in_this_release() -> None:
    assert not private.MISSING
    assert not private.lacking()


def test_no_other_file_uses_a_private_name_of_torch() -> None:
    """But for a question of the pairs, which import nothing of ``inference``, and answer it without the name too."""
    found = {}
    for path in sorted(p for package in ("inference", "ppl_models") for p in (ROOT / package).rglob("*.py")):
        text = path.read_text()
        names = [
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch"
            for alias in node.names
        ]
        names += [
            ast.unparse(node)
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.")
        ]
        private_names = {n for n in names if re.fullmatch(r"torch(\.\w+)*\._(?!_)\w+(\.\w+)*", n)}
        if private_names:
            found[str(path.relative_to(ROOT))] = private_names
    assert found == {
        "inference/compiler/capture.py": {"torch._C"},
        "ppl_models/models/pair.py": {"torch._C"},
    }

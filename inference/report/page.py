"""The page: sections into one HTML file, with its style and script inside."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from inference.core.files import write_whole
from inference.core.lazy import pd
from inference.report import chapters
from inference.report.asked import Reported, about_of, is_chains
from inference.report.blocks import Figure, Figures, Section, number, section
from inference.report.checks import checks, pictures
from inference.report.diagnosis import diagnosis
from inference.report.drawing import COLOURS
from inference.report.loo import loo


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its title.
        subtitle: What was done, in a sentence.
        facts: Facts in a line: names and values.
        verdict: What the diagnoses say, and whether that is nothing (``fine``) or something (``advice``).
        sections: Its sections.
        legend: Names of methods and their colours.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    verdict: tuple[str, str]
    sections: Sequence[Section]
    legend: Sequence[tuple[str, int]] = ()

    def html(self) -> str:
        """The page as HTML that needs no other file."""
        from jinja2 import Environment, FunctionLoader
        from markupsafe import Markup

        folder = files("inference.report") / "template"
        environment = Environment(
            loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        parts = {n: Markup((folder / f"{n}").read_text(encoding="utf-8")) for n in ("style.css", "script.js")}
        return environment.get_template("page.html").render(
            page=self, style=parts["style.css"], script=parts["script.js"]
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all."""
        text = self.html()
        return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def page_of_result(
    result: Reported,
    versions: Mapping[str, str],
    about: Mapping[str, Any] | None = None,
    shape: tuple[int, int] | None = None,
) -> Page:
    """The page of one Result."""
    known = {"command": command_line(), **about_of(result, about)}
    name, colour = result.method, {result.method: COLOURS[0]}
    sections = [
        section("model", "The model", partial(chapters.model, result.bound)),
        section("data", "The data", partial(chapters.data, result.bound)),
        *_parts(result, shape),
        section("loo", "Leave one out", partial(loo, {name: result})) if _scored(result) else None,
        section("origin", "How to repeat it", partial(chapters.origin, result, known, versions, commit())),
    ]
    if len(result.losses) > 1:
        sections.insert(-2, section("learning", "Learning curve", partial(chapters.learning, {name: result}, colour)))
    warned = len(result.diagnosis.advice) + len(result.diagnosis.unjudged)
    return Page(
        title=str(known.get("title") or result.bound.name),
        subtitle=name + _of_data(known),
        facts=_facts([result], known),
        verdict=_verdict({name: warned}),
        sections=_used(sections),
    )


def page_of_comparison(
    results: Mapping[str, Reported],
    tables: Sequence[Any],
    posteriors: Sequence[Figure],
    truth: Mapping[str, float],
    versions: Mapping[str, str],
    about: Mapping[str, Any] | None = None,
    shape: tuple[int, int] | None = None,
) -> Page:
    """The page of several Results on one pair.

    Args:
        results: Results by the name of their method.
        tables: Tables of the measures.
        posteriors: Posteriors of all methods over one another.
        truth: True means by quantity.
        versions: Versions by package.
        about: What made the Results.
        shape: Height and width of an image.
    """
    first = next(iter(results.values()))
    known = {"command": command_line(), **about_of(first, about)}
    colours = method_colours(results)
    curves = {n: r for n, r in results.items() if len(r.losses) > 1}
    scored = {n: r for n, r in results.items() if _scored(r)}
    warned = {n: len(r.diagnosis.advice) + len(r.diagnosis.unjudged) for n, r in results.items()}
    sections = [
        section("model", "The model", partial(chapters.model, first.bound)),
        section("data", "The data", partial(chapters.data, first.bound)),
        section("measures", "The methods compared", lambda: tables),
        section("posteriors", "Posteriors over one another", partial(_over, results, posteriors, colours, truth)),
        section("learning", "Learning curves", partial(chapters.learning, curves, colours)) if curves else None,
        section("loo", "Leave one out", partial(loo, scored)) if scored else None,
        *(s for k, (n, r) in enumerate(results.items(), 1) for s in _parts(r, shape, n, f"m{k}-")),
        section("origin", "How to repeat it", partial(chapters.origin, first, known, versions, commit())),
    ]
    return Page(
        title=str(known.get("title") or first.bound.name),
        subtitle=f"{len(results)} method{'s' if len(results) > 1 else ''}{_of_data(known)}",
        facts=_facts(list(results.values()), known),
        verdict=_verdict(warned),
        sections=_used(sections),
        legend=[(n, k % len(COLOURS)) for k, n in enumerate(results)],
    )


def _of_data(known: Mapping[str, Any]) -> str:
    return f" on {known['data']}" if "data" in known else ""


def method_colours(names: Any) -> dict[str, str]:
    """A colour for each method."""
    return {n: COLOURS[k % len(COLOURS)] for k, n in enumerate(names)}


def _parts(result: Reported, shape: Any, name: str = "", prefix: str = "") -> list[Section]:
    """Diagnosis, posterior, chains, predictive checks and pictures of one Result."""
    before = f"{name}: " if name else ""
    found = [section(f"{prefix}diagnosis", f"{before}diagnosis", partial(diagnosis, result))]
    if not result.diagnosis.table.empty:
        found.append(
            section(f"{prefix}posterior", f"{before}posterior", partial(chapters.posterior, result, brief=bool(name)))
        )
    if is_chains(result) and not result.diagnosis.table.empty:
        found.append(section(f"{prefix}chains", f"{before}chains", partial(chapters.chains, result)))
    if result.bound.select("observed") or result.bound.generated:
        found.append(section(f"{prefix}checks", f"{before}predictive checks", partial(checks, result)))
    found.append(section(f"{prefix}pictures", f"{before}samples", partial(pictures, result, shape)))
    return [Section(s.anchor, s.title[:1].upper() + s.title[1:], s.blocks) for s in found]


def _over(
    results: Mapping[str, Reported],
    posteriors: Sequence[Figure],
    colours: Mapping[str, str],
    truth: Mapping[str, float],
) -> list[Any]:
    draws = {n: chapters.quantities(r) for n, r in results.items()}
    said = "Densities of the quantities in which the methods differ most"
    said += ", over mean and standard deviation of the truth." if truth else "."
    said += " Signs and labels that the data leave open may differ; the log density does not depend on them."
    legend = [chapters.note(said)] if posteriors else []
    forests = chapters.forests(draws, colours, truth) if any(draws.values()) else []
    return [*legend, Figures(posteriors), *([Figures(forests)] if forests else [])] if posteriors or forests else []


def _used(sections: Sequence[Section | None]) -> list[Section]:
    return [s for s in sections if s is not None and s.blocks]


def _scored(result: Reported) -> bool:
    return bool(result.bound.select("observed")) and "posterior" in result.groups


def _verdict(warned: Mapping[str, int]) -> tuple[str, str]:
    """What the diagnoses say, in a sentence."""
    if not any(warned.values()):
        return "No warning.", "fine"
    if len(warned) == 1:
        count = next(iter(warned.values()))
        return f"{count} warning{'s' if count > 1 else ''}: see the diagnosis.", "advice"
    said = ", ".join(f"{n} ({count})" for n, count in warned.items() if count)
    return f"Warnings of {said}: see their diagnoses.", "advice"


def _facts(results: Sequence[Reported], known: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = results[0].bound.rows
    seconds = sum(r.seconds["setup"] + r.seconds["run"] for r in results)
    shown = results[0].bound.shown_rows
    facts = [("rows", f"{rows:,}" + (f" (shown: {shown})" if shown else ""))] if rows else []
    facts += [("seed", str(known["seed"]))] if "seed" in known else []
    return [
        *facts,
        ("seconds", number(round(seconds, 1))),
        ("date", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")),
    ]


def command_line() -> str:
    """The command that runs this process; empty in a notebook or at a prompt, where it would repeat nothing."""
    words = sys.orig_argv
    if len(words) < 2 or "ipykernel" in " ".join(words):
        return ""
    return shlex.join([Path(words[0]).name, *words[1:]])


def commit() -> str:
    """The commit of this package, where it lies in a git repository, and whether files differ from it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def excerpt(name: str, table: pd.DataFrame, said: str) -> str:
    """A short form for notebooks: a title, the first lines of a table, and what the diagnosis says."""
    from html import escape

    shown = table.head(12)
    more = f"<p>… and {len(table) - len(shown):,} more lines</p>" if len(table) > len(shown) else ""
    body = shown.to_html(float_format=number, border=0, na_rep="–") if len(shown) else ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in said.splitlines())
    return f"<div><p><b>{escape(name)}</b></p>{body}{more}{lines}</div>"

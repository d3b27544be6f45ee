"""Figures of the gallery: ``python -m docs.figures`` runs the examples whose figure is missing or old.

Each example runs in a process of its own on one core, and writes NAME.png. A small copy of it is kept in
docs/static/gallery, and beside it NAME.json: the SHA-256 of the script and the seconds of processor time that it took.
A figure is current if its script has not changed. ``python -m docs.figures NAME ...`` runs those examples in any case.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from inference import write_whole

ROOT = Path(__file__).parent.parent
EXAMPLES, GALLERY = ROOT / "examples", ROOT / "docs" / "static" / "gallery"
WIDTH, LARGEST = 1100, 100_000
"""Width of a figure, in pixels, and its size, in bytes, at most."""


def examples() -> list[Path]:
    """The scripts of the gallery."""
    return sorted(EXAMPLES.glob("*.py"))


def figure_of(script: Path) -> Path:
    """Where the figure of a script is kept."""
    return GALLERY / f"{script.stem}.png"


def record_of(script: Path) -> dict[str, Any]:
    """What is recorded of the figure of a script: ``script``, its SHA-256, and ``seconds``; empty where none is."""
    path = GALLERY / f"{script.stem}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}


def digest(script: Path) -> str:
    """The SHA-256 of a script."""
    return hashlib.sha256(script.read_bytes()).hexdigest()


def current(script: Path) -> bool:
    """Whether the figure of a script is there, and was made by the script as it is now."""
    return figure_of(script).exists() and record_of(script).get("script") == digest(script)


def shrink(picture: Path, path: Path, largest: int = LARGEST) -> None:
    """Write a small copy of a picture: at most ``WIDTH`` wide, with as many colours as ``largest`` bytes hold.

    Raises:
        ValueError: Sixteen colours take more bytes.
    """
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    for colours in (256, 128, 64, 32, 16):
        small = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(written := BytesIO(), format="PNG", optimize=True)
        if written.tell() <= largest:
            write_whole(path, lambda p: p.write_bytes(written.getvalue()))
            return
    raise ValueError(f"{picture.name}: expected at most {largest:,} bytes, got {written.tell():,}")


def run(script: Path) -> None:
    """Run an example; keep its figure and what it took."""
    used, digested = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, digest(script)
    with tempfile.TemporaryDirectory() as folder:
        started = _seconds_of_children()
        subprocess.run([sys.executable, str(script), "--out", folder], env=used, check=True)
        seconds = round(_seconds_of_children() - started)
        shrink(Path(folder) / f"{script.stem}.png", figure_of(script))
    record = {"script": digested, "seconds": seconds}
    path = GALLERY / f"{script.stem}.json"
    write_whole(path, lambda p: p.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8"))


def _seconds_of_children() -> float:
    """Processor time, which does not depend on what else runs on the machine."""
    spent = os.times()
    return spent.children_user + spent.children_system


def main(names: list[str]) -> int:
    """Run the examples that are named, or else those whose figure is not current; return 1 if one failed."""
    known, failed = {p.stem: p for p in examples()}, []
    if unknown := [n for n in names if n not in known]:
        sys.exit(f"figures: expected names of examples ({', '.join(known)}), got {', '.join(unknown)}")
    GALLERY.mkdir(parents=True, exist_ok=True)
    for script in [known[n] for n in names] or [p for p in known.values() if not current(p)]:
        print(f"--- {script.stem}", flush=True)
        try:
            run(script)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            failed.append(script.stem)
            print(f"{script.stem}: {error}", file=sys.stderr)
    if failed:
        print(f"figures: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

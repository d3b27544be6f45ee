"""Build the site: ``python -m docs`` writes ``docs/_build``, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from sphinx.cmd.build import build_main
except ImportError:
    sys.exit('docs: expected Sphinx, got none; run python -m pip install ".[docs]"')

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """Build all pages; further arguments are those of ``sphinx-build``."""
    return build_main(["-W", "--keep-going", "-q", *arguments, str(HERE), str(HERE / "_build")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

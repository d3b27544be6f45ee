"""``python -m ppl_models``: the command line."""

from __future__ import annotations

from ppl_models.cli import main

main()

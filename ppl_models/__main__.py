"""``python -m ppl_models``: the command line."""

from __future__ import annotations

import os
import sys

from ppl_models.cli import main
from ppl_models.commands.printing import MISUSED, complain

if int(os.environ.get("WORLD_SIZE", "1")) > 1 and sys.argv[1:2] not in (["fit"], ["sample"]):
    complain(
        "torchrun: expected the command fit, whose rows processes share, or sample, of which each runs chains, got "
        f"{' '.join(sys.argv[1:2]) or 'none'}"
    )
    sys.exit(MISUSED)
main()

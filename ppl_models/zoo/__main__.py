"""``python -m ppl_models.zoo`` writes ``list.json``, which ``ppl-models list`` prints without importing torch."""

import json
from pathlib import Path

from inference import write_whole
from ppl_models.zoo.entries import listed

if __name__ == "__main__":
    text = json.dumps(listed(), indent=1) + "\n"
    write_whole(Path(__file__).parent / "list.json", lambda path: path.write_text(text))

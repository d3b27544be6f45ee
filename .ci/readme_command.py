"""Print the README's test command: the line of a shell block that ends in pytest."""

import re
from pathlib import Path

text = (Path(__file__).parent.parent / "README.md").read_text()
blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", text, re.DOTALL)
(command,) = [line for block in blocks for line in block.splitlines() if line.endswith("&& pytest")]
print(command)

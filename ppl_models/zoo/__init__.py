"""The table of contents: how each pair is built, its data, its methods and its truth."""

from ppl_models.zoo.entries import ZOO, find, table
from ppl_models.zoo.entry import Entry

__all__ = ["ZOO", "Entry", "find", "table"]

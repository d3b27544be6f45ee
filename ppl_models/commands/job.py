"""What ``fit`` and ``sample`` have in common: a pair with its data, or the folder of a Result that is to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from inference import Result, Saved, isolated
from ppl_models.commands.arguments import about, changed, prepare
from ppl_models.commands.writing import check_whole, report, say_page
from ppl_models.data.sets import Dataset
from ppl_models.models.pair import Pair
from ppl_models.zoo.entries import find
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.restore import entry_of


@dataclass(frozen=True)
class Job:
    """The arguments that both commands take, and what they stand for.

    Attributes:
        pair: Name of the pair; None where a folder says it.
        data_name: Name of the data; None: the pair's own.
        label: Column of the labels in a CSV file.
        settings: Arguments of the pair that are replaced, each ``NAME=VALUE``.
        start: Folder of the Result that is to go on; None: a new run.
        seed: Seed of the run.
        device: Where to run.
        out_dir: Where to write; None: a folder named after pair and data.
        page: Whether to write a page too.
    """

    pair: str | None
    data_name: str | None
    label: str | None
    settings: list[str] | None
    start: str | None
    seed: int
    device: str
    out_dir: str | None
    page: bool

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> tuple[Job, dict[str, Any]]:
        """The job of a command, and the arguments that it alone takes."""
        shared = [f.name for f in fields(cls)]
        own = {n: v for n, v in arguments.items() if n not in shared}
        return cls(**{n: arguments[n] for n in shared}), own

    @cached_property
    def begun(self) -> Mapping[str, Any]:
        """What the folder says of how its Result was made, which has to be what is asked for; empty for a new run."""
        if self.start is None:
            return {}
        said = Saved.read(self.start).about
        asked = {"pair": self.pair, "data": self.data_name, "label": self.label, "set": self.settings or None}
        for name, value in asked.items():
            self.check_begun(said, name, value)
        return said

    def check_begun(self, said: Mapping[str, Any], name: str, value: Any) -> None:
        """Raise a ValueError where something else is asked for than what the folder says."""
        if value is not None and value != said.get(name):
            raise ValueError(f"{name}: expected {said.get(name)}, which {self.start} holds, got {value}")

    @cached_property
    def entry(self) -> Entry:
        """The entry, with the arguments of the pair that are replaced."""
        if self.start is not None:
            return entry_of(self.begun)
        if self.pair is None:
            raise ValueError("pair: expected the name of a pair, or --from with a folder, got none")
        return changed(find(self.pair), self.settings)

    @cached_property
    def prepared(self) -> tuple[Dataset, Path]:
        """The data set, and the folder to write to."""
        return prepare(self.entry, self.begun.get("data", self.data_name), self.out_dir, self.device, self.label)

    def new_pair(self) -> Pair:
        """A new pair for the data."""
        dataset, _ = self.prepared
        with isolated(self.seed):
            return self.entry.pair(dataset)

    def conclude(self, result: Result, method: str, name: str) -> None:
        """Print and write a Result under a name; end the command where it is none."""
        dataset, folder = self.prepared
        # A pair that is restored is built from the seed that it was first built from.
        made = about(self.entry, dataset, method, int(self.begun.get("seed", self.seed)))
        report(result, folder, name, made)
        if self.page:
            say_page(result, folder, made, self.entry, dataset)
        check_whole(result)

r"""Find reads of a tensor's value while a computation is traced.

A trace records operations on tensors. A value that is read out of a tensor as a number, a list, an array, a text or a
size becomes a constant of the trace, and so does every branch taken on it. Such a read is refused where the tensor
depends on an input of the trace or on noise, and the user's line is named. Tensors that depend on neither, such as the
data of a potential or the indices of a plate, may be read: the value is right as long as nobody changes the tensor in
place, and the version of each tensor that was read is noted, so that this can be seen.

``item`` is not refused: Pyro's objectives return their loss by it. Where the value depends on an input it returns a
tensor, and a branch on that, a number made of it, or its hash (an entry of a set, a key of a dictionary) is refused.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.fx import Node

from inference.compiler.passes import is_noise
from inference.compiler.recorder import INDEXED, Recorder, Recording, is_mask
from inference.core.private import current_mode, tree_leaves, without_modes

PACKAGE = Path(__file__).parent.parent
"""Folder of this package."""
STANDARD = Path(os.__file__).parent
"""Folder of Python's own modules."""


LONGEST_LINE = 100
"""Characters of a user's line in a message."""


READING_METHODS = (
    "tolist",
    "numpy",
    "__array__",
    "__dlpack__",
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
    "__format__",
    "__repr__",
    "__deepcopy__",
    "__reduce_ex__",
)
"""Methods that read the value of a tensor. Other operations that read are found by their tags."""


class ReadsValue(RuntimeError):
    """A traced computation reads the value of a tensor that depends on what is traced."""


class Reads:
    """Refuses reads of values that depend on the inputs of a trace, and notes the others.

    Attributes:
        allowed: Tensors that were read, with their versions at that time.
        refused: The first refusal, which the traced code may have caught.
        items: Tensors that stand for the numbers which ``item`` would return, by identity.
    """

    def __init__(self, *, lift: bool = False) -> None:
        self.allowed: list[tuple[Tensor, int]] = []
        self.refused: ReadsValue | None = None
        self.items: dict[int, Tensor] = {}
        self._sources: dict[Node, list[Tensor] | None] = {}
        self._recorder = Recorder(self._watch, lambda tensor: self.sources(tensor) is None, lift=lift)

    def record(self, function: Callable[..., Any], *inputs: Tensor) -> Recording:
        """The graph of a call of a function; ``meta["draws"]`` says what its last inputs are to be filled with."""
        graph = self._recorder.record(function, *inputs)
        graph.meta["draws"] = self._recorder.draws or []
        return graph

    @property
    def recording(self) -> bool:
        """Whether operations are being recorded now, and this is not a call that the recorder itself makes."""
        return current_mode() is self._recorder

    def _watch(self, func: Any, args: Any) -> bool:
        """Look at operations whose result, or its shape, depends on values; True where the result is a number."""
        tags = func.tags
        if torch.Tag.data_dependent_output in tags:
            for tensor in _tensors(args):
                self.look(tensor, func)
            return True
        if torch.Tag.dynamic_output_shape in tags:
            for tensor in _deciding(func, args):
                self.look(tensor, func)
        elif func in INDEXED:
            # Its masks are recorded as the places that they select, where they depend on nothing that is traced.
            for mask in filter(is_mask, args[1]):
                if self.sources(mask) is not None:
                    self.look(mask, func)
        return False

    def look(self, tensor: Tensor, by: Any) -> None:
        """Raise ReadsValue if a tensor depends on an input or on noise; else note the tensors that it depends on."""
        sources = self.sources(tensor)
        if sources is not None:
            self.allowed += [(t, t._version) for t in sources if not t.is_inference()]
            return
        self.refused = self.refused or ReadsValue(f"{users_line()} reads the value of a tensor by {_named(by)}")
        raise self.refused

    def sources(self, tensor: Tensor) -> list[Tensor] | None:
        """Tensors from outside the trace on which a tensor depends; None if it depends on an input or on noise."""
        if self._recorder.was_written(tensor):
            return None
        node = self._recorder.node_of(tensor)
        return [tensor] if node is None else self._of_node(node)

    def _of_node(self, node: Node) -> list[Tensor] | None:
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [n for n in last.all_input_nodes if n not in self._sources]
            if missing:
                waiting += missing
                continue
            self._sources[waiting.pop()] = self._combined(last)
        return self._sources[node]

    def _combined(self, node: Node) -> list[Tensor] | None:
        if node.op == "get_attr":
            return [attrgetter(str(node.target))(self._recorder.root)]
        parts = [self._sources[n] for n in node.all_input_nodes]
        if (
            node.op == "placeholder"
            or node in self._recorder.after_writes
            or is_noise(node)
            or any(p is None for p in parts)
        ):
            return None
        return list({id(t): t for p in parts for t in p or ()}.values())


@contextmanager
def reads_refused(*, lift: bool = False) -> Iterator[Reads]:
    """Refuse reads by what is recorded, and raise the first refusal though the code caught it."""
    with ExitStack() as stack:
        reads = Reads(lift=lift)
        for name in READING_METHODS:
            stack.enter_context(patch.object(Tensor, name, _watched(name, getattr(Tensor, name), reads)))
        stack.enter_context(patch.object(Tensor, "item", _item(Tensor.item, reads)))
        stack.enter_context(patch.object(Tensor, "__hash__", _hash(Tensor.__hash__, reads)))
        export = torch.utils.dlpack.to_dlpack
        stack.enter_context(patch.object(torch.utils.dlpack, "to_dlpack", _watched("to_dlpack", export, reads)))
        yield reads
    if reads.refused is not None:
        raise reads.refused


def is_library(module: str) -> bool:
    """Whether a module, by its dotted name, belongs to torch, Pyro or this package, and not to the user."""
    package = module.partition(".")[0]
    if package == "inference":
        file = getattr(sys.modules.get(module), "__file__", None)
        return file is not None and Path(file).is_relative_to(PACKAGE)
    return package in ("torch", "pyro")


def is_foreign(module: str) -> bool:
    """Whether a module is a library's, of this package or another, or Python's own."""
    if is_library(module) or is_standard(module):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and "site-packages" in file


def is_standard(module: str) -> bool:
    """Whether a module is one of Python's own, and not a file of the user's with such a name."""
    if module.partition(".")[0] not in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or (Path(file).is_relative_to(STANDARD) and "site-packages" not in file)


def users_line() -> str:
    """File, number and text of the innermost line of the user's code that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
        if not is_foreign(module) and not file.startswith("<"):
            code = linecache.getline(file, frame.f_lineno).strip()[:LONGEST_LINE]
            return f"{Path(file).name}:{frame.f_lineno} ({code})"
        frame = frame.f_back
    return "the model"


def _watched(name: str, original: Callable[..., Any], reads: Reads) -> Callable[..., Any]:
    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not reads.recording:
            return original(self, *args, **kwargs)
        if name == "__bool__" and _called_by("torch.distributions.distribution"):
            # A distribution that validates its values, though validation is off: one that was expanded before, say.
            return True
        reads.look(self, name)
        with without_modes():
            return original(self, *args, **kwargs)

    return read


def _item(original: Callable[..., Any], reads: Reads) -> Callable[..., Any]:
    """``item`` as a tensor where the value depends on what is traced: a loss that an objective returns as a number."""

    def item(self: Tensor) -> Any:
        if not reads.recording:
            return original(self)
        if reads.sources(self) is None:
            found = self.detach()
            reads.items[id(found)] = found
            return found
        reads.look(self, "item")
        with without_modes():
            return original(self)

    return item


def _hash(original: Callable[[Tensor], int], reads: Reads) -> Callable[[Tensor], int]:
    """The hash of a number is its value's; that of the tensor in its place would be found in no set."""

    def hashed(self: Tensor) -> int:
        if id(self) in reads.items and reads.recording:
            reads.look(self, "hash")
        return original(self)

    return hashed


def _called_by(module: str) -> bool:
    """Whether the function that asks for a value belongs to a module."""
    return sys._getframe(2).f_globals.get("__name__") == module


def _tensors(args: Any) -> list[Tensor]:
    return [v for v in tree_leaves(args) if isinstance(v, Tensor)]


def _deciding(func: Any, args: Any) -> list[Tensor]:
    """Arguments on whose values the shape of the result depends."""
    if func is torch.ops.aten.index.Tensor:
        return list(filter(is_mask, args[1]))
    return [args[1]] if func is torch.ops.aten.masked_select.default else _tensors(args)


def _named(by: Any) -> str:
    if isinstance(by, str):
        return f"{by.strip('_')}()"
    name = by._schema.name.partition("::")[2].strip("_")
    return {"local_scalar_dense": "item()", "index": "a boolean index"}.get(name, f"{name}()")

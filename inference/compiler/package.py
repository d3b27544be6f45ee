r"""A function of tensors as one program that is compiled ahead of time, in a file: loading it takes milliseconds.

The function is exported, loops included, and inductor writes C++ for all of it, so that a call runs no Python.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.core.private import PackageLoader, tree_flatten, tree_leaves, tree_unflatten

SUFFIX = ".pt2"
"""How the name of a package ends: torch asks for it."""


class Package:
    r"""A program from a file.

    Args:
        path: The file.
        example: Arguments, nested tensors, of the shapes, strides and types of all calls.
        result: Results of the function from a list of their tensors.

    Attributes:
        agrees: Whether a call was found to agree with the function.
    """

    agrees = False

    def __init__(self, path: Path, example: Any, result: Callable[[list[Tensor]], Any]) -> None:
        # One runner, of all threads.
        self._loader = PackageLoader(str(path), "model", False, 1, -1)
        self._result, self._forms = result, [_form(t) for t in tree_leaves(example)]

    def __call__(self, *inputs: Any) -> Any:
        """Results of the function."""
        tensors = tree_leaves(inputs)
        if [_form(t) for t in tensors] != self._forms:
            # The program reads memory without looking at shapes.
            raise ValueError("expected tensors of the shapes, strides and types that the program was compiled for")
        return self._result(self._loader.boxed_run(tensors))


def write_package(function: Callable[..., Any], example: Any, path: Path, options: dict[str, Any]) -> None:
    """Compile a function of nested tensors to a package.

    Args:
        function: The function. Its loops are ``while_loop`` and ``scan`` where ``torch.compiler.is_compiling()``.
        example: Its arguments, as a tuple.
        path: Where the file is to stand.
        options: Options of inductor.
    """
    tensors, form = tree_flatten(example)
    with torch.no_grad():
        exported = torch.export.export(_Flat(function, form), tuple(tensors), strict=False)
        inductor = import_module("torch._inductor")
        with _quiet():
            inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)


class _Flat(nn.Module):
    """A function of nested tensors as a module of a flat list of them."""

    def __init__(self, function: Callable[..., Any], form: Any) -> None:
        super().__init__()
        self._function, self._form = function, form

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(self._function(*tree_unflatten(list(tensors), self._form))))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out inductor's notes on operations, such as a Cholesky factor, that its program leaves to torch."""
    logger = logging.getLogger("torch._inductor.ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype

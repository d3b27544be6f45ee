"""Nested values as JSON and a list of tensors: what a file can hold without code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from inference.core.files import write_whole
from inference.core.memory import aligned
from inference.core.spacing import spaced

VALUE = "value"
"""Key of the metadata of a file under which the JSON stands."""


BLOCK_ROWS = 65_536
"""Rows of a tensor that are hashed at once."""


STAMPED = 1000
"""Entries of a tensor that its stamp holds."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes."""


def pack(value: Any) -> tuple[Any, list[Tensor]]:
    """A value as JSON, and the tensors in it.

    It may be made of mappings, lists, tuples, numbers, strings, None, tensors and NumPy arrays. A named tuple comes
    back as a tuple.

    Raises:
        TypeError: There is something else in it.

    Example:
        >>> packed, tensors = pack({"at": (1, torch.zeros(2)), 3: None})
        >>> unpack(packed, tensors)
        {'at': (1, tensor([0., 0.])), 3: None}
    """
    tensors: list[Tensor] = []
    return _pack(value, tensors), tensors


def unpack(packed: Any, tensors: list[Tensor]) -> Any:
    """The value of :func:`pack`."""
    if isinstance(packed, list):
        return [unpack(v, tensors) for v in packed]
    if not isinstance(packed, dict):
        return packed
    ((what, held),) = packed.items()
    if what == "tensor":
        return tensors[held]
    if what == "array":
        return tensors[held].numpy()
    if what == "tuple":
        return tuple(unpack(v, tensors) for v in held)
    return {unpack(k, tensors): unpack(v, tensors) for k, v in held}


def write_packed(path: str | Path, value: Any) -> Path:
    """Write a value to one safetensors file, whole or not at all.

    Raises:
        TypeError: The value holds something that :func:`pack` does not take.
        OSError: The file cannot be written; the old one stands.
    """
    packed, tensors = pack(value)
    # Copies: tensors that share memory cannot be written, and views would be written whole.
    kept = {str(k): t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in enumerate(tensors)}
    content = save(kept, {VALUE: json.dumps(packed)})
    # By Python, whose errors say that a disk is full.
    return write_whole(path, lambda file: file.write_bytes(content))


def read_packed(path: str | Path) -> Any:
    """The value that :func:`write_packed` has written.

    Raises:
        Exception: The file is damaged or foreign: whatever safetensors, JSON or :func:`unpack` raise.
    """
    with safe_open(path, "pt") as file:
        packed = json.loads(file.metadata()[VALUE])
        return unpack(packed, [aligned(file.get_tensor(str(k))) for k in range(len(file.keys()))])


def fingerprints(data: Mapping[str, Any]) -> dict[str, Any]:
    """Shape, type and SHA-256 of each tensor or array among data."""
    found = {}
    for name, value in data.items():
        if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
            tensor, digest = torch.as_tensor(value).detach(), hashlib.sha256()
            for block in tensor.split(BLOCK_ROWS) if tensor.dim() else (tensor,):
                content: Any = block.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                digest.update(content)
            found[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": digest.hexdigest()}
    return found


def stamp(data: Mapping[str, Any]) -> dict[str, tuple[int, bytes]]:
    """What tells whether tensors were changed in place: the sum of their bits, and a thousand of their entries.

    It takes milliseconds where a hash takes a second per gigabyte, and does not depend on the number of threads.
    """
    found = {}
    for name, value in data.items():
        if isinstance(value, Tensor) and value.numel():
            real = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
            flat = real.reshape(-1)
            some = flat[spaced(len(flat), STAMPED).to(flat.device)].cpu().contiguous()
            content: Any = some.view(torch.uint8).numpy()
            found[name] = int(flat.view(BITS[flat.element_size()]).sum()), content.tobytes()
    return found


def _pack(value: Any, tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        tensors.append(torch.as_tensor(value))
        return {"tensor" if isinstance(value, Tensor) else "array": len(tensors) - 1}
    if isinstance(value, Mapping):
        return {"items": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        held = list(_packed(value, tensors))
        return held if isinstance(value, list) else {"tuple": held}
    raise TypeError(f"expected numbers, strings and tensors, got {type(value).__name__}, which no file can hold")


def _packed(values: Any, tensors: list[Tensor]) -> Iterator[Any]:
    return (_pack(v, tensors) for v in values)

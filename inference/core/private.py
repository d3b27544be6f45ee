r"""The private names of torch that this package uses, in one place.

They may be renamed or dropped in any release. Where one that tracing needs is missing, everything runs eagerly, and the
first call that would have been traced warns once with the name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

MISSING: list[str] = []
"""Names that this release of torch lacks."""


def _take(module: str, name: str, otherwise: Any = None) -> Any:
    """What a module has by a name; where it has nothing, ``otherwise``, and the name is noted."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        MISSING.append(f"{module}.{name}")
        return otherwise


def _copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


TorchDispatchMode: Any = _take("torch.utils._python_dispatch", "TorchDispatchMode", object)
current_mode = _take("torch.utils._python_dispatch", "_get_current_dispatch_mode")
without_modes = _take("torch.utils._python_dispatch", "_disable_current_modes")
tree_flatten = _take("torch.utils._pytree", "tree_flatten")
tree_unflatten = _take("torch.utils._pytree", "tree_unflatten")
tree_leaves = _take("torch.utils._pytree", "tree_leaves")
tree_map = _take("torch.utils._pytree", "tree_map")
is_mapped = _take("torch._C._functorch", "is_functorch_wrapped_tensor")
unmapped = _take("torch._C._functorch", "get_unwrapped")
tracing_state = _take("torch._C", "_get_tracing_state")
scan = _take("torch._higher_order_ops.scan", "scan")
while_loop = _take("torch._higher_order_ops.while_loop", "while_loop")
sample_dirichlet = _take("torch", "_sample_dirichlet")
PackageLoader = _take("torch._C._aoti", "AOTIModelPackageLoader")
copy_all = _take("torch", "_foreach_copy_", _copy_each)
norms = _take("torch", "_foreach_norm", lambda tensors: [t.norm() for t in tensors])


def compile_graph(*args: Any, **settings: Any) -> Any:
    """``torch._inductor.compile``, imported when it is called: that takes seconds."""
    return import_module("torch._inductor").compile(*args, **settings)


def lacking() -> str:
    """What this release of torch lacks, as a reason why nothing is traced; empty if it lacks nothing."""
    return f"torch {torch.__version__} has no {', '.join(MISSING)}" if MISSING else ""

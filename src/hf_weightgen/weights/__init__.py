"""Tensors and names only: layouts, weight tokens, and the symmetries of weights. Knows nothing else of the package."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .layout import Layout, LayoutMismatchError, TensorSpec  # noqa: F401
    from .lora import canonical_factors, canonicalize, center_head, delta, join_lora, split_lora  # noqa: F401
    from .permutation import PermutationSpec, align, mlp_spec, permute, random_permutation  # noqa: F401
    from .tokenization import WeightTokenizer  # noqa: F401

_NAMES = {
    "layout": ["Layout", "LayoutMismatchError", "TensorSpec"],
    "lora": ["canonical_factors", "canonicalize", "center_head", "delta", "join_lora", "split_lora"],
    "permutation": ["PermutationSpec", "align", "mlp_spec", "permute", "random_permutation"],
    "tokenization": ["WeightTokenizer"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # transformers takes seconds to import, and only the tokenizer needs it
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return [*globals(), *__all__]

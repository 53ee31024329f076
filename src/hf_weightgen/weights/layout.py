"""Layout: the ordered names, shapes, dtypes and roles of the tensors of a checkpoint.

Two checkpoints have the same layout when one network can load both. The class axis of a classification head is left
open, so that a head with 2 classes and one with 77 share a layout.

Notation used for shapes:
    - C: classes, the length of the first axis of every head tensor; written -1 in a layout
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


class LayoutMismatchError(ValueError):
    """A checkpoint, or weight tokens, that do not fit the layout they are used with."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as safetensors cards and JSON spell it: `"float32"`, `"bfloat16"`, `"int64"`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorSpec:
    """
    One tensor of a layout.

    Args:
        name (`str`): Its key in the state dict.
        shape (`tuple[int, ...]`): Its shape; the first axis of a head tensor is -1.
        dtype (`str`): Its dtype without `torch.`, for example `"float32"`.
        head (`bool`): Whether its first axis counts the classes of a classification head.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    head: bool = False

    @classmethod
    def of(cls, name: str, tensor: Tensor, head: bool = False) -> "TensorSpec":
        shape = tuple(tensor.shape)
        if head and not shape:
            raise LayoutMismatchError(
                f"Head tensor {name!r} is a scalar; a tensor of the head needs the classes as its first axis."
            )
        return cls(name, (-1, *shape[1:]) if head else shape, dtype_name(tensor.dtype), head)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def shape_for(self, num_classes: int) -> tuple[int, ...]:
        """The shape of the tensor in a checkpoint with `num_classes` classes."""
        return (num_classes, *self.shape[1:]) if self.head else self.shape

    def __str__(self) -> str:
        axes = ", ".join("C" if size == -1 else str(size) for size in self.shape)
        return f"{self.dtype}[{axes}]"


@dataclass(frozen=True)
class Layout:
    """
    The ordered tensors of a checkpoint.

    Args:
        tensors (`tuple[TensorSpec, ...]`): One spec per tensor, in the order of the state dict.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self):
        names = [spec.name for spec in self.tensors]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"A layout names every tensor once, but got {twice} more than once.")

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor], head: Iterable[str] = ()) -> "Layout":
        """
        Reads the layout off a checkpoint.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): The checkpoint.
            head (`Iterable[str]`): Names of the tensors of the classification head, whose first axis counts classes.

        Raises:
            LayoutMismatchError: If a head tensor is absent or a scalar, or if head tensors disagree on the class
            count.
        """
        head = _as_names(head)
        absent = [name for name in head if name not in state_dict]
        if absent:
            raise LayoutMismatchError(
                f"Head tensor {absent[0]!r} is not in the checkpoint, which has {list(state_dict)[:8]}; pass `head` "
                "with names of the checkpoint."
            )
        layout = cls(tuple(TensorSpec.of(name, tensor, name in head) for name, tensor in state_dict.items()))
        layout.num_classes(state_dict)
        return layout

    @classmethod
    def from_list(cls, tensors: Iterable[Mapping]) -> "Layout":
        """Inverse of [`~Layout.to_list`]; other keys of an entry are left alone."""
        return cls(
            tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"], bool(t.get("head", False))) for t in tensors)
        )

    def to_list(self) -> list[dict]:
        """An ordered list of objects: a JSON object keyed by name would come back sorted from a config file."""
        return [{**asdict(spec), "shape": list(spec.shape)} for spec in self.tensors]

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the head tensors, in order."""
        return tuple(spec.name for spec in self.tensors if spec.head)

    def num_classes(self, state_dict: Mapping[str, Tensor]) -> int:
        """
        The class count C of a checkpoint, 0 for a layout without a head.

        Raises:
            LayoutMismatchError: If the head tensors disagree.
        """
        counts = {name: state_dict[name].shape[0] for name in self.head}
        if len(set(counts.values())) > 1:
            raise LayoutMismatchError(f"The tensors of one head need one class count, but got {counts}.")
        return next(iter(counts.values()), 0)

    def differences(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """One sentence for each tensor that is absent, unexpected, or of another shape or dtype; empty on a match."""
        found = []
        for spec in self.tensors:
            if spec.name not in state_dict:
                found.append(f"tensor {spec.name!r}: expected {spec}, but the checkpoint has no such tensor")
                continue
            tensor = state_dict[spec.name]
            came = TensorSpec(spec.name, tuple(tensor.shape), dtype_name(tensor.dtype))
            opened = came.shape and (-1, *came.shape[1:]) if spec.head else came.shape
            if (opened, came.dtype) != (spec.shape, spec.dtype):
                found.append(f"tensor {spec.name!r}: expected {spec}, but the checkpoint has {came}")
        names = {spec.name for spec in self.tensors}
        for name in state_dict:
            if name not in names:
                came = TensorSpec.of(name, state_dict[name])
                found.append(f"tensor {name!r}: the checkpoint has {came}, but the layout has no such tensor")
        return found

    def check(self, state_dict: Mapping[str, Tensor]) -> None:
        """
        Raises:
            LayoutMismatchError: Naming the first tensor that differs, what came and what was expected; also if head
                tensors disagree on the class count. The order of the names does not matter.
        """
        found = self.differences(state_dict)
        if found:
            more = f" ({len(found) - 1} more tensors differ)" if len(found) > 1 else ""
            raise LayoutMismatchError(f"The checkpoint does not fit the layout: {found[0]}{more}.")
        self.num_classes(state_dict)


def _as_names(head: Iterable[str]) -> tuple[str, ...]:
    if isinstance(head, str):
        raise TypeError(f"`head` is a sequence of tensor names, got the string {head!r}; write [{head!r}].")
    return tuple(head)

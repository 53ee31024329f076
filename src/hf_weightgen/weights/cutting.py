"""How the tensors of one layout are cut into weight tokens, and put together again.

Notation used for shapes:
    - S: token size; N: body tokens of the layout; C: classes of a checkpoint
    - b: the checkpoints of a batch that have this layout
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout, TensorSpec
from .moments import NARROW_DTYPES


TOKENIZED_DTYPES = NARROW_DTYPES | {"float32", "float64"}  # all others travel beside the tokens


@dataclass(frozen=True)
class Piece:
    """Where one tensor lies: tokens start..stop of the body, or scalars start..stop of every class token."""

    spec: TensorSpec
    mean: float
    std: float
    numel: int  # scalars of the tensor; of a head tensor, scalars per class
    start: int
    stop: int
    padding: int = 0  # zeros after the last scalar of a body tensor

    def standardise(self, values: Tensor, checkpoints: Sequence[int]) -> Tensor:
        """(b, numel) weights of any float dtype to float32 token values; `checkpoints` names each row in errors."""
        tokens = ((values.double() - self.mean) / self.std).float()
        if not tokens.isfinite().all():
            row = int((~tokens.isfinite()).any(1).nonzero()[0])
            cause = (
                f"which its scale {self.std:g} takes out of float32; fit the statistics on checkpoints like it"
                if values[row].float().isfinite().all()
                else "NaN or infinite; remove the checkpoint or repair the tensor"
            )
            raise ValueError(
                f"Tensor {self.spec.name!r} of checkpoint {checkpoints[row]} has a weight that is {cause}."
            )
        return tokens

    def restore(self, tokens: Tensor) -> Tensor:
        """Inverse of `standardise`, in the dtype of the tensor."""
        values = tokens.double() * self.std
        if self.mean:  # adding 0.0 would turn -0.0 into 0.0
            values = values + self.mean
        return values.to(self.spec.torch_dtype)


@dataclass(frozen=True)
class Cutting:
    """One layout with everything that the cutting needs."""

    layout: Layout
    statistics: list[tuple[float, float]]  # mean and std of each tensor
    body: list[Piece]
    head: list[Piece]
    beside: list[TensorSpec]
    token_size: int
    first_id: int  # token id of the first body token

    @classmethod
    def of(cls, entries: Sequence[Mapping], token_size: int, first_id: int) -> "Cutting":
        if not isinstance(token_size, int) or token_size < 1:
            raise ValueError(f"`token_size` must be a whole number of scalars, at least 1, got {token_size!r}.")
        layout = Layout.from_list(entries)
        plan = cls(layout, [], [], [], [], token_size, first_id)
        for spec, entry in zip(layout.tensors, entries, strict=True):
            mean, std = float(entry.get("mean", 0.0)), float(entry.get("std", 1.0))
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise ValueError(f"Tensor {spec.name!r} needs a finite mean and a positive std, got {mean} and {std}.")
            plan.statistics.append((mean, std))
            numel = math.prod(spec.shape[1:] if spec.head else spec.shape)
            if spec.head:
                if spec.dtype not in TOKENIZED_DTYPES:
                    raise ValueError(
                        f"Head tensor {spec.name!r} is {spec.dtype}; one of {sorted(TOKENIZED_DTYPES)} can be a token."
                    )
                start = plan.class_numel
                plan.head.append(Piece(spec, mean, std, numel, start, start + numel))
            elif spec.dtype in TOKENIZED_DTYPES and numel:
                start, length = plan.num_body, -(-numel // token_size)
                padding = length * token_size - numel
                plan.body.append(Piece(spec, mean, std, numel, start, start + length, padding))
            else:
                plan.beside.append(spec)
        if plan.class_numel > token_size:
            raise ValueError(
                f"A class of the head {list(layout.head)} has {plan.class_numel} scalars, which do not fit into one "
                f"token of {token_size}; use `token_size={plan.class_numel}` or more."
            )
        return plan

    @property
    def num_body(self) -> int:
        return self.body[-1].stop if self.body else 0

    @property
    def class_numel(self) -> int:
        return self.head[-1].stop if self.head else 0

    @property
    def num_ids(self) -> int:
        return self.num_body + bool(self.head)

    def body_mask(self) -> Tensor:
        """`torch.BoolTensor` of shape `(N_k, S)`."""
        mask = torch.ones(self.num_body, self.token_size, dtype=torch.bool)
        for piece in self.body:
            mask[piece.stop - 1, self.token_size - piece.padding :] = False
        return mask

    def filled(self, num_classes: int) -> Tensor:
        """`torch.LongTensor` of shape `(N_k + C,)`: the scalars that each token holds, which are its first ones."""
        filled = torch.full((self.num_body + num_classes,), self.token_size)
        for piece in self.body:
            filled[piece.stop - 1] -= piece.padding
        filled[self.num_body :] = self.class_numel
        return filled

    def class_positions(self, rows: Tensor, num_classes: Tensor) -> tuple[Tensor, Tensor]:
        """Checkpoint and token index of all class tokens of the checkpoints `rows`, each of shape (sum of C,)."""
        counts = num_classes[rows]
        first = counts.cumsum(0) - counts
        position = torch.arange(int(counts.sum())) - first.repeat_interleave(counts)
        return rows.repeat_interleave(counts), self.num_body + position

    def to_list(self) -> list[dict]:
        entries = zip(self.layout.to_list(), self.statistics, strict=True)
        return [{**entry, "mean": mean, "std": std} for entry, (mean, std) in entries]

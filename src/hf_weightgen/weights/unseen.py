"""Layouts of which there is no checkpoint: on which scale their tensors are, before any has been seen.

A generator writes standardised weights. Each tensor borrows mean and std from the known tensor that is most like it: of the same
kind, about as deep in its network, and of about its shape. Weights are rescaled so that sums over their inputs have the mean and
the variance that they had there (https://huggingface.co/papers/1502.01852, section 2.2).
"""

import math

from .descriptors import kind_of
from .layout import Layout, TensorSpec
from .tokenization import WeightTokenizer


DEPTH = 4.0  # how much it counts where tensors are, from 0 to 1, beside the factors of 10 by which their axes differ
NEAR = 0.01  # std of vectors of a kind that nobody has, such as a normalisation's


def with_layout(tokenizer: WeightTokenizer, layout: Layout) -> tuple[WeightTokenizer, int]:
    """
    Args:
        layout: Of a network; a head whose classes do not fit into tokens must be told as other tensors are.

    Returns:
        A tokenizer that knows this layout too, and its number; the same tokenizer if it knew it.

    Raises:
        ValueError: If a class of the head does not fit into a token, or no known tensor is of a kind that this layout has.
    """
    for number, known in enumerate(tokenizer.layouts):
        if set(known.tensors) == set(layout.tensors):
            return tokenizer, number
    known = [
        (spec, depth, entry["mean"], entry["std"])
        for entries in tokenizer.to_dict()["layouts"]
        for (spec, depth), entry in zip(_depths(Layout.from_list(entries)), entries, strict=True)
    ]
    entries = layout.to_list()
    for (spec, depth), entry in zip(_depths(layout), entries, strict=True):
        alike = [other for other in known if _role(other[0]) == _role(spec)]
        if not alike and len(spec.shape) < 2:  # about as torch has them before training
            entry["mean"], entry["std"] = float(spec.name.endswith(("weight", "running_var"))), NEAR
            continue
        if not alike:
            raise ValueError(
                f"Tensor {spec.name!r} is {spec}: no network that this generator knows has a tensor of this kind."
            )
        near, _, mean, std = min(alike, key=lambda other: _distance(spec, depth, *other[:2]))
        inputs = _fan_in(near) / _fan_in(spec)
        entry["mean"], entry["std"] = mean * inputs, std * inputs**0.5
    plans = [*tokenizer.to_dict()["layouts"], entries]
    return WeightTokenizer(tokenizer.token_size, plans), len(plans) - 1


def _depths(layout: Layout) -> list[tuple[TensorSpec, float]]:
    """Tensors, and how deep in the network they are, from 0 to 1."""
    last = max(1, len(layout.tensors) - 1)
    return [(spec, i / last) for i, spec in enumerate(layout.tensors)]


def _role(spec: TensorSpec) -> tuple:
    part = spec.name.rsplit(".", 1)[-1] if len(spec.shape) < 2 else None  # a scale is no running variance
    return spec.head, len(spec.shape), kind_of(spec), part


def _distance(spec: TensorSpec, depth: float, other: TensorSpec, at: float) -> float:
    sizes = [abs(math.log10(max(1, abs(a)) / max(1, abs(b)))) for a, b in zip(spec.shape, other.shape, strict=True)]
    return DEPTH * abs(depth - at) + sum(sizes)


def _fan_in(spec: TensorSpec) -> int:
    return max(1, math.prod(spec.shape[1:]))

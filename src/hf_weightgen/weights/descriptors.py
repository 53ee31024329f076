"""What a weight token is, in numbers: which tensor it belongs to, of which kind and shape, how deep in the network, and where in it.

A generator that knows tokens by their number reads known layouts only. Descriptions are the same for tokens that play the same
part in networks of other widths and depths. Position codes: https://huggingface.co/papers/1706.03762, section 3.5, and SANE
(https://huggingface.co/papers/2406.09997), section 3.1, for the positions of a token in the network, the layer, and the tensor.

Notation: L tokens, body tokens and then one per class; D the size of a description.
"""

import math

import torch
from torch import Tensor

from .cutting import Cutting, Piece
from .layout import TensorSpec


SIZE = 64  # D
WAVES = 8  # of a position; the longest is some 100,000 long
PART = slice(SIZE - 8, SIZE - 4)  # of a description: which part of a token, where tokens are cut further
KINDS = ("weight of a convolution", "weight of a linear layer", "vector", "bias", "lora_A", "lora_B", "other", "class")


def describe(cutting: Cutting, num_classes: int, part: slice = slice(None)) -> Tensor:
    """
    Args:
        cutting: Of the layout, see [`WeightTokenizer`].
        num_classes: Class tokens, all alike: what tells classes apart is their names.
        part: Of the tokens. Default: all.

    Returns:
        `torch.FloatTensor` of shape `(L, D)`, numbers from -2 to 2.
    """
    start, stop, _ = part.indices(cutting.num_body + num_classes)
    described = torch.zeros(stop - start, SIZE)
    for number, piece in enumerate(cutting.body):
        first, last = max(piece.start, start), min(piece.stop, stop)
        if first >= last:
            continue
        depth, within = _shares(torch.tensor([number]), len(cutting.body)), torch.arange(first, last) - piece.start
        inside = torch.cat([_waves(within), _shares(within, piece.stop - piece.start)], 1)
        of_tensor = torch.cat([_kind(piece), _sizes(piece), _waves(torch.tensor([number]))[0], depth[0]])
        known = torch.cat([of_tensor.expand(len(within), -1), inside], 1)
        described[first - start : last - start, : known.shape[1]] = known
    described[max(0, cutting.num_body - start) :, KINDS.index("class")] = 1
    described[:, -1] = math.log10(max(1, cutting.num_body)) - 2  # how large the network is
    return described


def describe_parts(described: Tensor, part: Tensor, parts: int) -> Tensor:
    """
    Args:
        described (`torch.FloatTensor` of shape `(n, D)`): Of the token that each piece belongs to.
        part (`torch.LongTensor` of shape `(n,)`): Which part of it the piece is, from 0 to `parts - 1`.

    Returns:
        `torch.FloatTensor` of shape `(n, D)`; unchanged where a token is one piece.
    """
    if parts == 1:
        return described
    described = described.clone()
    described[:, PART] = _shares(part, parts)
    return described


def kind_of(spec: TensorSpec) -> str:
    """Which of [`KINDS`] a tensor is, by its name and shape."""
    name, rank = spec.name, len(spec.shape)
    if ".lora_A." in name or ".lora_B." in name:
        return "lora_A" if ".lora_A." in name else "lora_B"
    if rank == 1:
        return "bias" if name.endswith("bias") else "vector"
    return {2: "weight of a linear layer", 4: "weight of a convolution"}.get(rank, "other")


def _kind(piece: Piece) -> Tensor:
    kind = kind_of(piece.spec)
    return torch.tensor([float(kind == known) for known in KINDS])


def _sizes(piece: Piece) -> Tensor:
    """Logarithms of the numbers of outputs, of inputs, and of the places of a kernel."""
    out, inputs, *kernel = [*piece.spec.shape, 1, 1][: max(2, len(piece.spec.shape))]
    return torch.tensor([math.log10(max(1, size)) - 1 for size in (out, inputs, math.prod(kernel))])


def _waves(positions: Tensor) -> Tensor:
    """`(n,)` to `(n, 2 WAVES)`: sines and cosines, each wave four times as long as the one before."""
    angles = positions[:, None] * (math.pi / 2) / 4.0 ** torch.arange(WAVES)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _shares(positions: Tensor, count: int) -> Tensor:
    """`(n,)` to `(n, 4)`: where in the whole positions are, as Chebyshev polynomials."""
    share = 2 * positions / max(1, count - 1) - 1
    return torch.stack([share, 2 * share**2 - 1, 4 * share**3 - 3 * share, 8 * share**4 - 8 * share**2 + 1], 1)

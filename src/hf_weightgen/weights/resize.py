"""A network of other widths, or with more layers, that computes what a known one does as nearly as its sizes let it.

References: Net2Net (https://huggingface.co/papers/1511.05641): units stand twice and what reads them reads a part of each, and a
further layer hands on what it gets. Where units are fewer, those that read alike become one, as in model folding
(https://huggingface.co/papers/2502.10216), found by Ward's clustering (1963), in which units count as much as they are read.

Networks are told by their layers in order, each a weight and a bias; channels of images are units, whose pixels the first linear
layer reads in row-major order.

Notation: O units of a layer, I units of the one before it, p pixels of each unit, n units of the new layer.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resizable(known: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> bool:
    """
    Whether a network with tensors of the shapes `known` can be given those of `wanted`, in order: convolutions of the same kernels,
    then as many linear layers or more, for the same inputs and as many pixels.
    """
    have, want = _layers(known), _layers(wanted)
    if have is None or want is None or len(have[0]) > len(want[0]) or have[1] != want[1]:
        return False
    (shapes, convs), (others, _) = have, want
    if len(others) > len(shapes) == convs + 1 or (convs and _pixels(shapes, convs) != _pixels(others, convs)):
        return False  # what is added reads units, neither pixels nor inputs: it comes behind linear layers
    same_ends = shapes[0][1] == others[0][1] and shapes[-1][0] == others[-1][0]
    return same_ends and all(a[2:] == b[2:] for a, b in zip(shapes[:convs], others[:convs], strict=True))


def resized(weights: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """
    Args:
        weights: A network, tensors in order.
        wanted: Names and shapes of the new one, in order.

    Returns:
        `dict[str, torch.Tensor]` with these names and shapes, on the CPU, in the dtype of the network. It computes the same where no
        layer has fewer units, and the activation of a further layer leaves what it reads as it is, as ReLU does behind ReLU.

    Raises:
        ValueError: If it is not [`resizable`].
    """
    known = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if not resizable(known, wanted):
        raise ValueError(f"A network with tensors of the shapes {known} cannot be given those of {dict(wanted)}.")
    tensors, names = [tensor.detach().double().cpu() for tensor in weights.values()], list(wanted)
    shapes, _ = _layers(wanted)
    layers = list(zip(tensors[::2], tensors[1::2], strict=True))
    units, dtype = layers[-1][0].shape[1], next(iter(weights.values())).dtype
    more = torch.eye(units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64)
    layers[-1:-1] = [more] * (len(shapes) - len(layers))
    reads, result = torch.eye(shapes[0][1], dtype=torch.float64), {}  # what is read in the place of old units: (O, n)
    for i, ((weight, bias), shape) in enumerate(zip(layers, shapes, strict=True)):
        old = weight.flatten(2).mT if weight.dim() > 2 else weight.unflatten(1, (len(reads), -1)).mT  # (O, p, I)
        old = old @ reads
        if i + 1 < len(layers):
            of_unit = layers[i + 1][0].transpose(0, 1).reshape(len(bias), -1)
            is_of, reads = _mapped(torch.cat([old.flatten(1), bias[:, None]], 1), of_unit.norm(dim=1), shape[0])
            old, bias = torch.einsum("no,opi->npi", is_of, old), is_of @ bias
        result[names[2 * i]] = old.mT.reshape(shape).to(dtype).contiguous()
        result[names[2 * i + 1]] = bias.to(dtype)
    return result


def _mapped(weights: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """
    Of which old units new ones are `(n, O)`, and which of them are read in the place of old ones `(O, n)`.

    Args:
        weights: With which old units read, and their biases, `(O, inputs + 1)`.
        sizes: How much they are read, `(O,)`.
        count: n.
    """
    old, numbers = len(weights), torch.arange(count)
    if count >= old:
        is_of = F.one_hot(numbers % old, old).double()
        # of copies that were read alike both would learn the same for ever
        parts = is_of * (1 + numbers // old)[:, None]
        return is_of, (parts / parts.sum(0)).mT
    mass = sizes.square().clamp(min=1e-12)  # units that are hardly read may be joined with any
    member = F.one_hot(_clusters(weights, mass, count), count).double()
    shares = member * mass[:, None]
    return (shares / shares.sum(0)).mT, member


def _clusters(weights: Tensor, mass: Tensor, count: int) -> Tensor:
    """
    In which of `count` clusters each row of `weights` is, `(O,)`: again and again those two are joined of which that costs the least
    (Ward; costs are updated by the formula of Lance and Williams, 1967). Those of scikit-learn and SciPy know no masses.
    """
    costs = torch.cdist(weights, weights).square() * mass * mass[:, None] / (mass + mass[:, None])
    costs.fill_diagonal_(torch.inf)
    cluster, mass = torch.arange(len(weights)), mass.clone()
    for _ in range(len(weights) - count):
        kept, joined = divmod(int(costs.argmin()), len(costs))
        both = (mass[kept] + mass) * costs[kept] + (mass[joined] + mass) * costs[joined] - mass * costs[kept, joined]
        both /= mass[kept] + mass[joined] + mass
        costs[kept] = costs[:, kept] = both
        costs[joined] = costs[:, joined] = costs[kept, kept] = torch.inf
        mass[kept] += mass[joined]
        cluster[cluster == joined] = kept
    return cluster.unique(return_inverse=True)[1]


def _layers(shapes: Mapping[str, Sequence[int]]) -> tuple[list[tuple[int, ...]], int] | None:
    """Shapes of the weights of all layers, and how many convolutions they begin with; `None` where it is no such network."""
    told = [tuple(shape) for shape in shapes.values()]
    weights, biases = told[::2], told[1::2]
    if len(weights) != len(biases) or any(bias != weight[:1] for weight, bias in zip(weights, biases, strict=True)):
        return None
    ranks = [len(shape) for shape in weights]
    convs = ranks.count(4)
    if not ranks or ranks != [4] * convs + [2] * (len(ranks) - convs) or ranks[-1] != 2:
        return None
    return weights, convs


def _pixels(weights: Sequence[Sequence[int]], convs: int) -> int:
    return weights[convs][1] // weights[convs - 1][0]

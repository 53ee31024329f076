"""Permutation symmetry: the hidden units of a network can be renumbered without changing its function.

References: weight matching in Git Re-Basin (https://huggingface.co/papers/2209.04836), section 3.2 and algorithm 1.

Notation used for shapes:
    - P: permutations of a spec, one per hidden layer
    - n_p: hidden units that permutation p renumbers; `perms[p]` (n_p,) is such that new unit i is old unit
      `perms[p][i]`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class PermutationSpec:
    """
    Which axes of which tensors carry the units of each hidden layer.

    An axis may be a multiple of n_p long: each unit then owns that many neighbouring entries, as where the channels
    of a convolution are flattened into a linear layer. n_p is the length of the first axis listed.

    Args:
        axes (`tuple[tuple[tuple[str, int], ...], ...]`): For each of the P permutations, its (tensor name, axis)
        pairs.
    """

    axes: tuple[tuple[tuple[str, int], ...], ...]

    def __post_init__(self):
        axes = tuple(tuple((str(name), int(axis)) for name, axis in carriers) for carriers in self.axes)
        object.__setattr__(self, "axes", axes)  # lists, as JSON gives them, become tuples
        flat = [pair for carriers in axes for pair in carriers]
        if not all(axes):
            raise ValueError(
                "Each permutation of a spec needs at least one (tensor name, axis) pair, but one has none."
            )
        twice = sorted({pair for pair in flat if flat.count(pair) > 1})
        if twice:
            raise ValueError(f"An axis carries the units of one layer, but the spec lists {twice} more than once.")

    def sizes(self, state_dict: Mapping[str, Tensor]) -> list[int]:
        """
        n_p of each permutation.

        Raises:
            ValueError: If a tensor or an axis is absent, or an axis is no multiple of n_p long.
        """
        sizes = []
        for p, carriers in enumerate(self.axes):
            for name, axis in carriers:
                if name not in state_dict:
                    raise ValueError(f"Permutation {p} needs tensor {name!r}, which is not in {list(state_dict)[:8]}.")
                shape = tuple(state_dict[name].shape)
                if not 0 <= axis < len(shape):
                    raise ValueError(f"Permutation {p} needs axis {axis} of {name!r}, which has the shape {shape}.")
                if len(sizes) == p:
                    sizes.append(shape[axis])
                if shape[axis] % max(sizes[p], 1):
                    raise ValueError(
                        f"Axis {axis} of {name!r} is {shape[axis]} long, expected a multiple of the {sizes[p]} units "
                        f"of {carriers[0][0]!r}."
                    )
        return sizes


def mlp_spec(layer_names: Sequence[str], bias: bool = True) -> PermutationSpec:
    """
    The spec of a stack of linear layers.

    Args:
        layer_names (`Sequence[str]`): Prefixes of the layers from input to output, such as `["0", "2", "4"]`.
        bias (`bool`, *optional*, defaults to `True`): Whether the layers have biases.
    """
    if isinstance(layer_names, str) or len(layer_names) < 2:
        raise ValueError(
            f"Hidden units lie between two layers: expected two or more layer names, got {layer_names!r}."
        )
    axes = []
    for name, following in pairwise(layer_names):
        own = [(f"{name}.weight", 0), (f"{name}.bias", 0)] if bias else [(f"{name}.weight", 0)]
        axes.append((*own, (f"{following}.weight", 1)))
    return PermutationSpec(tuple(axes))


def permute(state_dict: Mapping[str, Tensor], spec: PermutationSpec, perms: Sequence[Tensor]) -> dict[str, Tensor]:
    """
    Renumbers the hidden units: the same function, other weights.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): A checkpoint.
        spec (`PermutationSpec`): Where its hidden units lie.
        perms (`Sequence[torch.LongTensor]` of length P): New unit i of layer p is old unit `perms[p][i]`.

    Returns:
        `dict[str, torch.Tensor]`: the same names in the same order; tensors that the spec does not name are handed on.
    """
    _check_perms(spec.sizes(state_dict), perms)
    permuted = dict(state_dict)
    for carriers, perm in zip(spec.axes, perms, strict=True):
        for name, axis in carriers:
            permuted[name] = _take(permuted[name], axis, perm)
    return permuted


def random_permutation(
    state_dict: Mapping[str, Tensor], spec: PermutationSpec, generator: torch.Generator | None = None
) -> list[Tensor]:
    """A uniformly drawn permutation of each hidden layer, for [`permute`]: P tensors of shape `(n_p,)`."""
    return [torch.randperm(size, generator=generator) for size in spec.sizes(state_dict)]


def match_weights(
    state_dict: Mapping[str, Tensor], reference: Mapping[str, Tensor], spec: PermutationSpec, max_iter: int = 100
) -> list[Tensor]:
    """
    The permutations that bring a checkpoint closest to a reference, one hidden layer at a time until none moves.

    Coordinate descent from the identity, layers in the order of the spec, so that the result is reproducible. Each
    step is an exact assignment; the whole is a local optimum.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The checkpoint to renumber.
        reference (`Mapping[str, torch.Tensor]`): A checkpoint of the same layout.
        spec (`PermutationSpec`): Where their hidden units lie.
        max_iter (`int`, *optional*, defaults to 100): Rounds over all layers at most.

    Returns:
        `list[torch.LongTensor]` of length P, each of shape `(n_p,)`, for [`permute`].
    """
    sizes = spec.sizes(state_dict)
    names = {name for carriers in spec.axes for name, _ in carriers}
    for name in names:
        if name not in reference or reference[name].shape != state_dict[name].shape:
            came = tuple(reference[name].shape) if name in reference else "no such tensor"
            raise ValueError(f"Tensor {name!r}: the reference has {came}, expected {tuple(state_dict[name].shape)}.")
    carried = {name: [(p, axis) for p, c in enumerate(spec.axes) for n, axis in c if n == name] for name in names}
    weights = {name: state_dict[name].detach().double().cpu() for name in names}
    targets = {name: reference[name].detach().double().cpu() for name in names}
    perms = [torch.arange(size) for size in sizes]
    for _ in range(max_iter):
        moved = False
        for p, carriers in enumerate(spec.axes):
            similarity = torch.zeros(
                sizes[p], sizes[p], dtype=torch.float64
            )  # reference unit x unit of the checkpoint
            for name, axis in carriers:
                weight = weights[name]
                for other, other_axis in carried[name]:
                    if other_axis != axis:
                        weight = _take(weight, other_axis, perms[other])
                similarity += _units(targets[name], axis, sizes[p]) @ _units(weight, axis, sizes[p]).T
            rows = torch.arange(sizes[p])
            best = torch.as_tensor(linear_sum_assignment(similarity.numpy(), maximize=True)[1])
            gain = similarity[rows, best].sum() - similarity[rows, perms[p]].sum()
            if gain > 1e-12 * similarity.abs().sum():  # equal assignments would let layers swap for ever
                perms[p], moved = best, True
        if not moved:
            break
    return perms


def align(
    state_dict: Mapping[str, Tensor], reference: Mapping[str, Tensor], spec: PermutationSpec, max_iter: int = 100
) -> dict[str, Tensor]:
    """The checkpoint with its hidden units in the order that is closest to `reference`; see [`match_weights`]."""
    return permute(state_dict, spec, match_weights(state_dict, reference, spec, max_iter))


def _take(tensor: Tensor, axis: int, perm: Tensor) -> Tensor:
    """Reorders an axis whose units own `length / n_p` neighbouring entries each."""
    units = tensor.unflatten(axis, (len(perm), -1)) if len(perm) else tensor
    return units.index_select(axis, perm.to(tensor.device)).reshape(tensor.shape)


def _units(tensor: Tensor, axis: int, size: int) -> Tensor:
    """One row per unit: (n_p, all scalars that belong to it)."""
    return tensor.movedim(axis, 0).reshape(size, -1)


def _check_perms(sizes: Sequence[int], perms: Sequence[Tensor]) -> None:
    if len(perms) != len(sizes):
        raise ValueError(f"The spec has {len(sizes)} permutations, got {len(perms)}.")
    for p, (size, perm) in enumerate(zip(sizes, perms, strict=True)):
        if perm.shape != (size,) or not torch.equal(perm.sort().values.cpu(), torch.arange(size)):
            raise ValueError(f"`perms[{p}]` must hold each of 0 to {size - 1} once, got {perm.tolist()[:8]}…")

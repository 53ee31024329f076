"""Is it new, or a replay of the zoo? Distances between weights in one gauge, and overlap of errors.

Weights are compared in a canonical gauge, as much of them can change without the function: LoRA adapters with canonical
factors, networks with their hidden units matched to one member, both with a head that is centred over the classes. A generator that replays its zoo has distance 0 and an overlap of 1.

Reference: the overlap of wrong predictions is the similarity of p-diff (https://huggingface.co/papers/2402.13144).

Notation used for shapes and units:
    - N, M: networks; D: scalars of all floating-point tensors of one network
    - rows: examples of the test set
    - distances are Euclidean, in the unit of the weights
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..targets.architectures import HEAD
from ..targets.functional import BIAS, WEIGHT
from ..weights.layout import LayoutMismatchError
from ..weights.lora import canonicalize, center_head
from ..weights.permutation import PermutationSpec, align


def fix_gauge(
    state_dict: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None, head: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """
    The same function in canonical weights.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): An adapter with PEFT names.
        reference (`Mapping[str, torch.Tensor]`, *optional*): An adapter to whose `lora_A` factors the gauge stays
            close, such as the one from which the zoo was trained.
        head (`Iterable[str]`, *optional*): Names of the tensors of the head. Default: those of PEFT's sequence
            classifiers, where present.
    """
    if head is None:
        head = [name for name in (WEIGHT, BIAS) if name in state_dict]
    return center_head(canonicalize(state_dict, reference), head)


def fix_network_gauge(
    state_dicts: Sequence[Mapping[str, Tensor]], reference: Mapping[str, Tensor], spec: PermutationSpec
) -> list[dict[str, Tensor]]:
    """
    The same functions in canonical weights, of networks that are generated as a whole: hidden units matched to those of
    `reference` (weight matching of Git Re-Basin), and a head without the shift that all of its classes share.
    """
    return [center_head(align(state_dict, reference, spec), HEAD) for state_dict in state_dicts]


def flatten(
    state_dicts: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor] | None = None,
    head: Iterable[str] | None = None,
) -> Tensor:
    """
    Returns:
        `torch.DoubleTensor` of shape `(N, D)`: every network in its canonical gauge (see [`fix_gauge`]), its
        floating-point tensors one after another in the order of their names.

    Raises:
        ValueError: If there is no network, or a weight is NaN or infinite.
        LayoutMismatchError: If two networks differ in a name or a shape.
    """
    if not state_dicts:
        raise ValueError("Expected at least one network to flatten, got none.")
    head = None if head is None else list(head)
    vectors, expected = [], None
    for i, state_dict in enumerate(state_dicts):
        shapes = {name: tuple(t.shape) for name, t in sorted(state_dict.items()) if t.is_floating_point()}
        expected = expected or shapes
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name):
                raise LayoutMismatchError(
                    f"Network {i} has {shapes.get(name, 'no such tensor')} for {name!r}, the first one "
                    f"{expected.get(name, 'no such tensor')}; distances need networks of one layout."
                )
        # not in float64 where the weights are not: below their own precision, the rank of an update is noise
        values = {name: state_dict[name].detach().cpu() for name in shapes}
        values = {name: t if t.dtype == torch.float64 else t.float() for name, t in values.items()}
        for name, tensor in values.items():
            if not tensor.isfinite().all():
                raise ValueError(f"Network {i} holds NaN or infinity in {name!r}; its weights are broken.")
        fixed = fix_gauge(values, reference, head)
        vectors.append(torch.cat([fixed[name].double().flatten() for name in shapes]))
    return torch.stack(vectors)


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """
    Distance of each row of `a` to the nearest row of `b`.

    Args:
        a (`torch.Tensor` of shape `(N, D)`): For example generated networks, see [`flatten`].
        b (`torch.Tensor` of shape `(M, D)`): For example the members of the zoo.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(b):
        raise ValueError(f"Expected shapes (N, D) and (M, D) with M > 0, got {tuple(a.shape)} and {tuple(b.shape)}.")
    return torch.cat([_distances(part, b).min(1).values for part in a.split(64)]) if len(a) else a.new_zeros(0)


def within_nearest(x: Tensor, groups: Sequence[Hashable] | None = None) -> Tensor:
    """
    Distance of each network to the nearest other one.

    Args:
        x (`torch.Tensor` of shape `(N, D)`): See [`flatten`].
        groups (sequence of length N, *optional*): The run of each network; members of the same run, which are close
            because one was trained on from the other, are then left out.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Raises:
        ValueError: If there is no other network, or none of another run.
    """
    same = _same(len(x), groups)
    return _distances(x, x).masked_fill(same, torch.inf).min(1).values


def pairwise_spread(x: Tensor) -> float:
    """Median distance over all pairs of rows of `x`, `(N, D)` with N ≥ 2."""
    if len(x) < 2:
        raise ValueError(f"A spread needs at least 2 networks, got {len(x)}.")
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    return _distances(x, x)[i, j].quantile(0.5).item()


def wrong_iou(predictions_a: Tensor, predictions_b: Tensor, labels: Tensor) -> Tensor:
    """
    How far the errors of each network are those of some member: the examples that both get wrong, divided by the
    examples that at least one of them gets wrong, for the member with the largest such share.

    Args:
        predictions_a (`torch.LongTensor` of shape `(N, rows)`): For example of generated networks.
        predictions_b (`torch.LongTensor` of shape `(M, rows)`): For example of the members of the zoo.
        labels (`torch.LongTensor` of shape `(rows,)`).

    Returns:
        `torch.DoubleTensor` of shape `(N,)`, between 0 and 1. Two networks without any error count as 1.
    """
    if not len(predictions_b):
        raise ValueError("The overlap of errors needs at least one member to compare with, got none.")
    return _iou(predictions_a, predictions_b, labels).max(1).values


def within_wrong_iou(predictions: Tensor, labels: Tensor, groups: Sequence[Hashable] | None = None) -> Tensor:
    """[`wrong_iou`] of each network with the others, for `groups` as in [`within_nearest`]: `(N,)`."""
    same = _same(len(predictions), groups)
    return _iou(predictions, predictions, labels).masked_fill(same, -1.0).max(1).values


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the matrix-product form of the distance is faster, but gives 1e-4 and more where it should be 0
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _iou(predictions_a: Tensor, predictions_b: Tensor, labels: Tensor) -> Tensor:
    for predictions in (predictions_a, predictions_b):
        if predictions.ndim != 2 or predictions.shape[1:] != labels.shape:
            raise ValueError(
                f"Expected predictions of shape (N, {len(labels)}), one per label, got {tuple(predictions.shape)}."
            )
    a, b = ((predictions != labels).double() for predictions in (predictions_a, predictions_b))
    both = a @ b.T  # (N, M)
    either = a.sum(1)[:, None] + b.sum(1) - both
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _same(count: int, groups: Sequence[Hashable] | None) -> Tensor:
    groups = list(range(count)) if groups is None else list(groups)
    if len(groups) != count:
        raise ValueError(f"Expected one group per network, {count}, got {len(groups)}.")
    if len(set(groups)) < 2:
        raise ValueError(f"Expected networks of at least 2 groups to compare, got {count} of {len(set(groups))}.")
    return torch.tensor([[first == second for second in groups] for first in groups])

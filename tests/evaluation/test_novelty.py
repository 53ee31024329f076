"""Distances that see functions and not gauges, and the overlap of errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.evaluation.novelty import (
    flatten,
    nearest,
    pairwise_spread,
    within_nearest,
    within_wrong_iou,
    wrong_iou,
)
from hf_weightgen.targets.functional import BIAS, WEIGHT
from hf_weightgen.weights.layout import LayoutMismatchError


QUERY = "base_model.model.bert.encoder.layer.4.attention.self.query"
A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"


def adapter(seed: int, classes: int = 3, r: int = 2, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (r, size), B: (size, r), WEIGHT: (classes, size), BIAS: (classes,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same_function(sd: dict, seed: int) -> dict:
    """Other weights, the same classifier: another gauge, and all logits moved together."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(len(sd[A]), len(sd[A]), generator=generator).double() + 3 * torch.eye(len(sd[A])).double()
    shift = torch.randn(1, sd[WEIGHT].shape[1], generator=generator)
    return {
        A: (torch.linalg.inv(G) @ sd[A].double()).float(),
        B: (sd[B].double() @ G).float(),
        WEIGHT: sd[WEIGHT] + shift,
        BIAS: sd[BIAS] + 5.0,
    }


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_distances_do_not_see_the_gauge(seed, with_reference):
    reference = adapter(seed + 1) if with_reference else None
    members = [adapter(seed + 2 + i) for i in range(3)]
    moved = [same_function(member, seed + i) for i, member in enumerate(members)]
    x, y = flatten(members, reference), flatten(moved, reference)
    assert x.shape == (3, 2 * 8 + 8 * 2 + 3 * 8 + 3)
    assert nearest(x, y).max() < 1e-2 * pairwise_spread(x)
    assert pairwise_spread(y) == pytest.approx(pairwise_spread(x), rel=1e-2)
    plain = torch.stack([torch.cat([t.flatten() for t in sd.values()]) for sd in [*members, *moved]])
    assert nearest(plain[:3], plain[3:]).min() > 1  # so there was something not to see


def test_a_replay_is_at_distance_zero_with_an_overlap_of_one():
    members = [adapter(i) for i in range(4)]
    replay = [dict(members[2]), dict(members[0])]
    assert nearest(flatten(replay), flatten(members)).tolist() == [0, 0]
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    predictions = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 0]])
    assert wrong_iou(predictions[[1]], predictions, labels).tolist() == [1]


def test_small_distances_are_exact():
    x = torch.full((1, 5000), 100.0, dtype=torch.float64)
    near = x.clone()
    near[0, 17] += 1e-6
    assert nearest(near, torch.cat([x, x + 1])).item() == pytest.approx(1e-6, rel=1e-3)


def test_chunks_change_nothing():
    x, y = (torch.randn(n, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (150, 9))
    expected = (x[:, None] - y).norm(dim=-1).min(1).values
    torch.testing.assert_close(nearest(x, y), expected)


def test_within_the_zoo_nobody_is_compared_with_itself_or_its_siblings():
    x = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    assert within_nearest(x).tolist() == [1, 1, 2, 2]
    assert within_nearest(x, ["a", "a", "b", "b"]).tolist() == [10, 9, 9, 11]
    assert pairwise_spread(x) == pytest.approx(9.5)  # of 1, 2, 9, 10, 11, 12
    labels = torch.zeros(4).long()
    predictions = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]])
    assert within_wrong_iou(predictions, labels).tolist() == [1, 1, pytest.approx(1 / 3)]
    assert within_wrong_iou(predictions, labels, [0, 0, 1]).tolist() == [pytest.approx(1 / 3)] * 3


def test_the_overlap_counts_examples_that_either_gets_wrong():
    labels = torch.zeros(5).long()
    one, other = torch.tensor([[1, 1, 1, 0, 0]]), torch.tensor([[0, 2, 1, 1, 0], [0, 0, 0, 0, 1]])
    assert wrong_iou(one, other, labels).tolist() == [0.5]  # rows 1 and 2 of rows 0 to 3
    perfect = torch.zeros(1, 5).long()
    assert wrong_iou(perfect, perfect, labels).tolist() == [1]
    assert wrong_iou(perfect, one, labels).tolist() == [0]


def test_what_cannot_be_compared_is_told():
    with pytest.raises(LayoutMismatchError, match=r"Network 1 has .*\(2.*classifier.bias.*first one \(3"):
        flatten([adapter(0), adapter(1, classes=2)])
    with pytest.raises(ValueError, match="Network 1 holds NaN.*lora_B"):
        flatten([adapter(0), {**adapter(1), B: torch.full((8, 2), torch.nan)}])
    with pytest.raises(ValueError, match="at least one network"):
        flatten([])
    with pytest.raises(ValueError, match="at least 2 groups"):
        within_nearest(torch.randn(3, 2), groups=[7, 7, 7])
    with pytest.raises(ValueError, match="one group per network, 3, got 2"):
        within_nearest(torch.randn(3, 2), groups=[7, 8])
    with pytest.raises(ValueError, match="at least 2 networks"):
        pairwise_spread(torch.randn(1, 2))
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(0, 2\)"):
        nearest(torch.randn(3, 2), torch.randn(0, 2))
    with pytest.raises(ValueError, match=r"shape \(N, 3\)"):
        wrong_iou(torch.zeros(1, 2).long(), torch.zeros(1, 3).long(), torch.zeros(3).long())


def test_networks_without_the_names_of_a_classifier_are_compared_too():
    x = flatten(
        [{"w": torch.ones(2, 2), "steps": torch.tensor(3)}, {"w": torch.zeros(2, 2), "steps": torch.tensor(4)}]
    )
    assert x.shape == (2, 4)  # the counter is no weight
    assert pairwise_spread(x) == 2
    centred = flatten([{"w": torch.tensor([[1.0], [3.0]])}], head=["w"])
    assert centred.tolist() == [[-1, 1]]

"""p-diff at small size: it learns what members have in common, and its draws depend on the generator alone."""

import pytest
import torch

from hf_weightgen.evaluation.p_diff import p_diff
from tiny import random


def members(count: int = 12) -> list[dict]:
    """Around two centres, with tensors of very different size and one that is no weight."""
    made = []
    for k in range(count):
        draw, centre = random(k), 5.0 * (k % 2)
        made.append(
            {
                "w": centre + torch.randn(6, 8, generator=draw),
                "count": torch.tensor(7),
                "b": 100 + 20 * centre + torch.randn(4, generator=draw),
            }
        )
    return made


@pytest.mark.slow
def test_draws_have_what_members_have_in_common():
    made = p_diff(members(), 12, random(0), vae_steps=150, steps=150, timesteps=400)
    assert len(made) == 12 and all(m["count"] == 7 and m["w"].shape == (6, 8) and m["b"].shape == (4,) for m in made)
    centres, levels = (torch.stack([m[name].mean() for m in made]) for name in ("w", "b"))
    assert (centres > -1).all() and (centres < 6).all() and centres.std() > 0.5
    # a mean of each tensor would fit many networks, but not what joins the tensors: "b" is 100 + 20 times the centre of "w"
    assert (levels - 100 - 20 * centres).abs().mean() < 0.25 * levels.std()


def test_the_same_generator_makes_the_same_networks():
    first, second, other = (
        p_diff(members(), 2, random(seed), vae_steps=3, steps=3, timesteps=20) for seed in (0, 0, 1)
    )
    for name in ("w", "b"):
        assert torch.equal(first[1][name], second[1][name])
        assert not torch.equal(first[1][name], other[1][name])


def test_one_member_is_not_enough():
    with pytest.raises(ValueError, match="2 members or more, got 1"):
        p_diff(members(1), 2, random(0))

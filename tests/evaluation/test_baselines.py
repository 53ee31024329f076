"""Weights without a generator: their statistics, and the look-up's choice of task and head rows."""

import pytest
import torch

from hf_weightgen.evaluation.baselines import (
    average,
    choose,
    gaussian,
    kde,
    nearest_tasks,
    noisy,
    noisy_at_distance,
    pca_flow,
    random_init,
    transfer_head,
)
from hf_weightgen.evaluation.novelty import fix_gauge, flatten, nearest
from hf_weightgen.targets.functional import BIAS, WEIGHT


QUERY = "base_model.model.bert.encoder.layer.4.attention.self.query"
A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zoo(count: int, classes: int = 3) -> list[dict[str, torch.Tensor]]:
    """Members around one adapter, with a counter that is no weight."""
    generator = rng(7)
    centre = {A: (2, 16), B: (16, 2), WEIGHT: (classes, 16), BIAS: (classes,)}
    centre = {name: torch.randn(shape, generator=generator) for name, shape in centre.items()}
    return [
        {name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in centre.items()}
        | {"steps": torch.tensor(9)}
        for _ in range(count)
    ]


def test_random_init_has_no_update_and_the_shapes_of_the_template():
    template = zoo(1)[0]
    made = random_init(template, 40, rng())
    assert all({k: v.shape for k, v in sd.items()} == {k: v.shape for k, v in template.items()} for sd in made)
    assert all(not sd[B].any() and not sd[BIAS].any() and sd["steps"] == 9 for sd in made)
    stacked = torch.stack([sd[A] for sd in made])
    assert 0.9 / 4 < stacked.abs().max() <= 1 / 4
    assert torch.stack([sd[WEIGHT] for sd in made]).std() == pytest.approx(0.02, rel=0.1)


def test_average_and_gaussian_have_the_statistics_of_the_members():
    members = zoo(6)
    mean = average(members)
    torch.testing.assert_close(mean[A], sum(member[A] for member in members) / 6)
    drawn = gaussian(members, 4000, rng())
    torch.testing.assert_close(torch.stack([d[B] for d in drawn]).mean(0), mean[B], atol=0.03, rtol=0)
    stds = [torch.stack([d[B] for d in group]).std(0) for group in (drawn, members)]
    torch.testing.assert_close(stds[0], stds[1], atol=0.03, rtol=0)
    only = gaussian(members[:1], 2, rng())
    torch.testing.assert_close(only[1], members[0])


def test_noise_is_in_proportion_to_each_tensor():
    members = [{"small": torch.randn(5000, generator=rng()), "large": 100 * torch.randn(5000, generator=rng(1))}]
    (made,) = noisy(members, 0.15, 1, rng())
    for name, std in (("small", 0.15), ("large", 15.0)):
        assert (made[name] - members[0][name]).std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("distance", [0.0, 0.01, 1.0, 8.0])
def test_noise_at_a_distance_is_there_after_the_gauge(distance):
    members = [fix_gauge({k: v for k, v in m.items() if k != "steps"}) for m in zoo(5)]
    zoo_vectors = flatten(members)

    def measure(state_dicts):
        return nearest(flatten(state_dicts), zoo_vectors)

    made = noisy_at_distance(members, distance, 4, rng(), measure)
    torch.testing.assert_close(measure(made), torch.full((4,), distance).double(), rtol=0.0101, atol=1e-9)


def test_noise_at_a_distance_that_cannot_be_is_told():
    members = zoo(2)
    with pytest.raises(ValueError, match="finite distance"):
        noisy_at_distance(members, float("nan"), 1, rng(), len)
    with pytest.raises(RuntimeError, match="within 3 steps"):
        noisy_at_distance(members, 1.0, 1, rng(), lambda made: torch.full((1,), 5.0), steps=3)


def test_members_come_once_before_they_come_again():
    members = zoo(3)
    drawn = choose(members, 8, rng())
    counts = [sum(sd is member for sd in drawn) for member in members]
    assert sorted(counts) == [2, 3, 3]
    assert len({id(sd) for sd in drawn[:3]}) == 3


class AxisEncoder:
    """Each word is an axis; "film" and "movie" are nearly the same one."""

    axes = {"film": 0, "movie": 0, "news": 1, "bad": 2, "good": 3, "poor": 2}

    def embed(self, texts: list[str]) -> torch.Tensor:
        found = torch.full((len(texts), 5), 0.01)
        for row, text in zip(found, texts, strict=True):
            for word in text.split():
                row[self.axes.get(word, 4)] += 1
        return torch.nn.functional.normalize(found)


def test_the_look_up_finds_the_task_with_the_nearest_prompt():
    encoder = AxisEncoder()
    known = [
        {"name": "topics", "prompts": ["sort news", "what news is it"]},
        {"name": "reviews", "prompt_embeds": encoder.embed(["what", "film good bad"]).mul(7).tolist()},
    ]
    found = nearest_tasks(encoder, ["is this movie good", "news"], known)
    assert [task["name"] for task in found] == ["reviews", "topics"]
    with pytest.raises(ValueError, match="'empty'.*prompt_embeds"):
        nearest_tasks(encoder, ["news"], [{"name": "empty", "prompt_embeds": None}])
    with pytest.raises(ValueError, match="known_tasks"):
        nearest_tasks(encoder, ["news"], [])


def test_head_rows_follow_the_names_of_the_classes():
    encoder, (member,) = AxisEncoder(), zoo(1, classes=3)
    source = ["good", "bad", "news"]
    same = transfer_head(member, source, source, encoder)
    assert all(same[name] is member[name] for name in member)
    turned = transfer_head(member, source, ["poor", "good"], encoder)
    assert torch.equal(turned[WEIGHT], member[WEIGHT][[1, 0]]) and torch.equal(turned[BIAS], member[BIAS][[1, 0]])
    # both names are nearest to "bad": the second best is taken for one of them, so that the classes differ
    told_apart = transfer_head(member, source, ["poor", "bad"], encoder)
    assert not torch.equal(told_apart[WEIGHT][0], told_apart[WEIGHT][1])
    many = transfer_head(member, source, ["poor", "bad", "good", "news"], encoder)
    assert torch.equal(many[WEIGHT], member[WEIGHT][[1, 1, 0, 2]])
    with pytest.raises(ValueError, match="label per head row, 3"):
        transfer_head(member, ["good", "bad"], ["poor", "good"], encoder)


def test_choosing_none_of_the_members_is_no_error():
    assert choose([{"a": torch.zeros(1)}], 0, torch.Generator()) == []


def spread_out(count: int = 12) -> list[dict]:
    """Members around two centres, with an integer tensor that no baseline may touch."""
    made = []
    for k in range(count):
        draw = rng(k)
        centre = 5.0 * (k % 2)
        made.append(
            {
                "w": centre + torch.randn(3, 4, generator=draw),
                "count": torch.tensor(7),
                "b": torch.randn(2, generator=draw),
            }
        )
    return made


def test_a_density_estimate_without_bandwidth_gives_members_and_with_it_their_neighbours():
    members = spread_out()
    replayed = kde(members, 12, rng(0), bandwidth=0.0)
    found = {min(range(12), key=lambda i: (members[i]["w"] - made["w"]).norm()) for made in replayed}
    assert found == set(range(12))  # every member comes once before one comes again
    for made in replayed:
        nearest = min(members, key=lambda member: (member["w"] - made["w"]).norm())
        torch.testing.assert_close(made["w"], nearest["w"])
        torch.testing.assert_close(made["b"], nearest["b"])
        assert made["count"] == 7
    near, far = (
        torch.stack(
            [made["w"] - old["w"] for made, old in zip(kde(members, 12, rng(0), bandwidth), replayed, strict=True)]
        )
        for bandwidth in (0.1, 0.4)
    )
    assert 3 < far.norm() / near.norm() < 5


def test_the_flow_learns_where_members_are():
    members = spread_out()
    made = pca_flow(members, 40, rng(0), steps=1500, hidden=128)
    centres = torch.stack([state_dict["w"].mean() for state_dict in made])
    assert len(made) == 40 and all(state_dict["count"] == 7 for state_dict in made)
    near = [(centres - place).abs() < 0.8 for place in (0.0, 5.0)]
    assert all(part.sum() >= 5 for part in near)
    assert (
        near[0] | near[1]
    ).float().mean() > 0.42  # of one normal distribution with their mean and std it would be 0.31
    again = pca_flow(members, 2, rng(0), steps=5, hidden=8)
    assert torch.equal(again[0]["w"], pca_flow(members, 2, rng(0), steps=5, hidden=8)[0]["w"])

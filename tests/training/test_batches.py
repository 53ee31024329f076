"""Draws depend on (seed, step, place in the global batch) alone; batches show every task, and only real classes."""

from dataclasses import replace

import pytest
import torch

from hf_weightgen.targets.functional import BIAS, WEIGHT
from hf_weightgen.training.batches import StepRandom, ZooTensors
from hf_weightgen.weights.tokenization import WeightTokenizer
from tiny import adapter, zoo


TOTAL = 12


def draws(seed: int = 0, step: int = 0, rows: slice = slice(None)) -> StepRandom:
    return StepRandom(seed, step, TOTAL, rows)


def all_of(random: StepRandom, rows: ZooTensors) -> list[torch.Tensor]:
    """One tensor per kind of draw, its first axis the local batch."""
    tasks = rows.task_of[rows.draw_rows(random)]
    return [
        random.normal(3, 2),
        random.uniform(),
        random.uniform(5),
        torch.stack(random.uniform_rows(range(len(tasks)), [4] * len(tasks), 2)),
        random.integers(1000),
        rows.draw_rows(random),
        rows.names(tasks, random),
        rows.prompts(tasks, random),
        rows.other_tasks(tasks, random),
        rows.classes(tasks, 2, random),
    ]


@pytest.fixture(scope="module")
def tiny_zoo():
    return zoo()


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_together_draw_what_one_process_draws(processes, tiny_zoo):
    local = TOTAL // processes
    parts = [all_of(draws(rows=slice(r * local, (r + 1) * local)), tiny_zoo) for r in range(processes)]
    for whole, *pieces in zip(all_of(draws(), tiny_zoo), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces))


def test_a_row_draws_the_same_whatever_the_lengths_of_others_are():
    short, long = draws().uniform_rows([0, 1, 2], [3, 1, 2], 5), draws().uniform_rows([0, 1, 2], [3, 8, 0], 5)
    assert [len(own) for own in long] == [3, 8, 0] and torch.equal(short[0], long[0])
    assert not torch.equal(short[0][:1], short[1])
    assert torch.equal(draws().uniform_rows([2], [2], 5)[0], short[2])  # rows of one layout, among those of others


def test_every_process_draws_the_same_shared_numbers():
    first, second = draws(rows=slice(0, 6)), draws(rows=slice(6, 12))
    assert torch.equal(first.shared_integers(1000, 64), second.shared_integers(1000, 64))
    assert first.shared_integers(3, 500).unique().tolist() == [0, 1, 2]


def test_steps_seeds_and_purposes_differ_and_repeat():
    assert torch.equal(draws().normal(4), draws().normal(4))
    others = [draws(step=1).normal(4), draws(seed=1).normal(4), draws().normal(4, purpose=9)]
    assert not any(torch.equal(draws().normal(4), other) for other in others)


def test_tasks_come_evenly_although_their_rows_do_not():
    many = zoo(rows_per_task=10)
    keep = torch.cat([torch.arange(2), torch.arange(10, 30)])  # 2, 10 and 10 rows
    parts = {name: getattr(many, name)[keep] for name in ("weight_tokens", "padding_mask", "task_of")}
    uneven = replace(many, **parts)
    rows = torch.cat([uneven.draw_rows(draws(step=step)) for step in range(100)])
    assert (uneven.task_of[rows].bincount() / len(rows)).sub(1 / 3).abs().max() < 0.05
    assert len(rows.unique()) == 22


def test_other_tasks_are_of_other_families(tiny_zoo):
    tasks = torch.arange(3).repeat(4)
    others = torch.stack([tiny_zoo.other_tasks(tasks, draws(step=step)) for step in range(20)])
    assert set(others[:, tasks == 0].flatten().tolist()) == {1, 2}
    assert set(others[:, tasks != 0].flatten().tolist()) == {0}


def test_a_zoo_of_one_family_has_no_other(tiny_zoo):
    alone = replace(tiny_zoo, families=["one"] * 3)
    assert torch.equal(alone.other_tasks(torch.arange(3).repeat(4), draws()), torch.arange(3).repeat(4))


def test_half_of_the_names_are_the_own_wording(tiny_zoo):
    tasks = torch.ones(TOTAL, dtype=torch.long)
    names = torch.cat([tiny_zoo.names(tasks, draws(step=step)) for step in range(100)])  # (1200, C, E)
    own, other = ((names == wording).all(-1).all(-1).double().mean() for wording in tiny_zoo.class_embeds[1])
    assert own + other == 1 and 0.7 < own < 0.8  # the other half is drawn from both wordings


def test_real_classes_are_picked_before_padding(tiny_zoo):
    tasks = torch.arange(3).repeat(4)  # 2, 3 and 2 classes
    picked = tiny_zoo.classes(tasks, 2, draws())
    assert picked.shape == (TOTAL, 2)
    assert tiny_zoo.class_mask[tasks].gather(1, picked).all()
    every = tiny_zoo.classes(tasks, 99, draws())
    assert torch.equal(every.sort(1).values, torch.arange(3).expand(TOTAL, 3))
    seen = torch.cat([tiny_zoo.classes(torch.ones(TOTAL, dtype=torch.long), 1, draws(step=s)) for s in range(20)])
    assert set(seen.flatten().tolist()) == {0, 1, 2}


def test_a_zoo_of_adapters_with_different_class_counts():
    members = [adapter(0), adapter(1, classes=5), adapter(2)]
    tokenizer = WeightTokenizer.fit(members, token_size=385, head=(WEIGHT, BIAS))
    embeds = {"two": torch.randn(1, 2, 8), "five": torch.randn(3, 5, 8)}
    prompts = {name: torch.randn(2, 8) for name in embeds}
    rows = ZooTensors.of(tokenizer, members, ["two", "five", "two"], embeds, prompts, {"two": "x", "five": "y"})
    assert len(rows) == 3 and rows.tasks == ["two", "five"] and rows.task_of.tolist() == [0, 1, 0]
    assert rows.class_mask.sum(1).tolist() == [2, 5]
    assert [tuple(e.shape) for e in rows.class_embeds] == [(1, 5, 8), (3, 5, 8)]
    assert not rows.class_embeds[0][:, 2:].any() and torch.equal(rows.class_embeds[0][:, :2], embeds["two"])
    body = tokenizer.num_body_tokens()
    assert rows.padding_mask[:, body:, 0].sum(1).tolist() == [2, 5, 2]

"""Heads for whole datasets: what they learn from and are tested on, other starts, and fine-tuning that is the same for all."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeClassifier

from hf_weightgen.evaluation.few_shot import score_head
from hf_weightgen.evaluation.transfer import (
    ALPHAS,
    LEARNING_RATES,
    SCALES,
    choose_alpha,
    choose_settings,
    few_of,
    fine_tune,
    for_validation,
    halves,
    lookup_head,
    random_head,
    ridge_head,
    whole_task,
)
from hf_weightgen.zoo.features import FeatureSet
from tiny import random


CLASSES = 4
CENTRES = torch.randn(CLASSES, 1, 8, generator=random(0))


def split_of(seed: int, pool: int, names: str = "abcd") -> FeatureSet:
    """Examples around the same centres, which letters name; the last class has two examples fewer."""
    rows = torch.tensor(["abcdefgh".index(name) % CLASSES for name in names])
    points = F.normalize(CENTRES[rows] + 0.4 * torch.randn(len(rows), pool, 8, generator=random(seed)), dim=-1)
    counts = torch.full((len(rows),), pool)
    counts[-1] -= 2
    points[-1, -2:] = 0
    return FeatureSet("letters", points, counts, tuple(names))


@pytest.fixture(scope="module")
def task():
    return whole_task(split_of(1, 22), split_of(2, 12))


def test_both_splits_have_the_same_classes_and_no_padding():
    train, test = split_of(1, 20, "abcd"), split_of(2, 12, "dbc")
    task = whole_task(train, test)
    assert task.classes == ("b", "c", "d") and task.support.shape == (3, 18, 8) and task.queries.shape == (3, 10, 8)
    assert torch.equal(task.support[0], train.features[1, :18]) and torch.equal(task.queries[2], test.features[0, :10])
    assert task.support.norm(dim=-1).min() > 0.9 and task.queries.norm(dim=-1).min() > 0.9


def test_a_set_whose_splits_share_no_class_is_cut_in_two():
    test = split_of(2, 12, "efgh")
    task = whole_task(split_of(1, 20), test)
    assert task.classes == tuple("efgh") and task.support.shape == task.queries.shape == (4, 5, 8)
    assert torch.equal(torch.cat([task.support, task.queries], 1), test.features[:, :10])
    assert torch.equal(halves(test).support, task.support)


def test_what_is_held_out_or_drawn_is_of_the_training_examples(task):
    trial = for_validation(task)
    assert torch.equal(torch.cat([trial.support, trial.queries], 1), task.support) and trial.queries.shape[1] == 4
    few = few_of(trial, 3, random(0))
    assert few.support.shape == (CLASSES, 3, 8) and few.queries is trial.queries
    assert (few.support[:, :, None] == trial.support[:, None]).all(-1).any(2).all()
    with pytest.raises(ValueError, match="17 examples of each class were asked for, the set has 16"):
        few_of(trial, 17, random(0))


@pytest.mark.parametrize("classes", [2, CLASSES])
def test_ridge_regression_is_that_of_scikit_learn(task, classes):
    own = type(task)(task.support[:classes], task.queries[:classes], task.classes[:classes])
    head, labels = ridge_head(own, 0.3), torch.arange(classes).repeat_interleave(own.support.shape[1])
    fit = RidgeClassifier(alpha=0.3).fit(own.support.flatten(0, 1).numpy(), labels.numpy())
    said = F.linear(own.queries.flatten(0, 1), head["head.weight"], head["head.bias"]).argmax(-1)
    assert said.tolist() == fit.predict(own.queries.flatten(0, 1).numpy()).tolist()
    assert choose_alpha([own]) in ALPHAS


def test_the_lookup_finds_the_row_of_the_same_class(task):
    rows = torch.cat([torch.randn(20, 8, generator=random(3)) * 0.1, 5 * (CENTRES[:, 0] - CENTRES[:, 0].mean(0))])
    head = lookup_head(task, rows)
    torch.testing.assert_close(head["head.weight"], F.normalize(rows[20:], dim=-1))
    assert score_head(head, task) > 80 > score_head(random_head(task, 0), task)


def test_all_starts_learn_and_a_start_does_not_depend_on_its_neighbours(task):
    starts = {"ridge": [ridge_head(task, 1.0)], "random": [random_head(task, seed) for seed in range(2)]}
    settings = {"ridge": (1e-2, 8.0), "random": (3e-2, 1.0)}
    scores = fine_tune(task, starts, settings, epochs=(0, 1, 5))
    assert list(scores) == ["ridge", "random"] and list(scores["random"]) == [0, 1, 5]
    assert scores["ridge"][0].item() == pytest.approx(
        score_head(starts["ridge"][0], task)
    )  # a factor changes no answer
    assert scores["random"][5].mean() > scores["random"][0].mean() + 20
    alone = fine_tune(task, {"random": starts["random"][:1]}, settings, epochs=(0, 1, 5))
    assert [v.item() for v in alone["random"].values()] == [v[0].item() for v in scores["random"].values()]


def test_settings_are_the_best_on_the_examples_held_out(task):
    trial = for_validation(task)
    starts = {"random": [random_head(task, 0)]}
    chosen = choose_settings(trial, starts, epochs=(0, 1, 2))["random"]
    reached = {
        (lr, scale): sum(
            fine_tune(trial, starts, {"random": (lr, scale)}, epochs=(0, 1, 2))["random"][e] for e in (1, 2)
        )
        for lr in LEARNING_RATES
        for scale in SCALES
    }
    assert reached[chosen] == max(reached.values())

"""Metrics against scikit-learn, the bootstrap against simulations with a known truth, and what the cache keeps."""

import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, matthews_corrcoef

from hf_weightgen.evaluation.accuracy import (
    METRICS,
    Accuracy,
    BalancedAccuracy,
    MatthewsCorrelation,
    PredictionCache,
    bootstrap,
    bootstrap_difference,
    cosine_to_label_names,
    counts,
    get_metric,
    majority,
    rank_correlation,
    score,
    weights_hash,
)


def test_the_rank_correlation_sees_the_order_alone_and_shares_ties():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert rank_correlation(values, values.exp()) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert rank_correlation(torch.tensor([1, 2, 2, 3]), torch.tensor([1.0, 3, 2, 4])) == pytest.approx(0.9 / 0.9**0.5)
    assert np.isnan(rank_correlation(torch.ones(4), torch.arange(4.0)))


def random_predictions(seed: int, networks: int, rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    guesses = torch.randint(classes, (networks, rows), generator=generator)
    right = torch.rand(networks, rows, generator=generator) < 0.5
    return torch.where(right, labels, guesses), labels


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 30), st.integers(2, 6), st.sampled_from(list(METRICS)))
def test_the_vectorised_score_is_100_times_the_metric_object(seed, networks, rows, classes, name):
    predictions, labels = random_predictions(seed, networks, rows, classes)
    metric = get_metric(name)
    expected = [metric.compute(predictions=p.tolist(), references=labels.tolist())[name] for p in predictions]
    np.testing.assert_allclose(score(predictions, labels, name), 100 * np.array(expected), atol=1e-9)


def test_metric_objects_agree_with_scikit_learn():
    (predictions,), labels = random_predictions(0, 1, 200, 3)
    inputs = {"predictions": predictions, "references": labels}
    assert Accuracy().compute(**inputs) == {"accuracy": accuracy_score(labels, predictions)}
    assert MatthewsCorrelation().compute(**inputs)["matthews_correlation"] == pytest.approx(
        matthews_corrcoef(labels, predictions)
    )
    recalls = [(predictions[labels == c] == c).double().mean().item() for c in range(3)]
    assert BalancedAccuracy().compute(**inputs)["balanced_accuracy"] == pytest.approx(np.mean(recalls))


def test_metrics_leave_no_file_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric = Accuracy(cache_dir=str(tmp_path / "cache"))
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add(prediction=1, reference=1)
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)
    assert not list(tmp_path.iterdir())


def test_an_unknown_metric_is_named_with_the_known_ones():
    for call in (lambda: get_metric("f1"), lambda: score([[0]], [0], "f1")):
        with pytest.raises(ValueError, match="'f1'.*accuracy.*matthews_correlation"):
            call()


@pytest.mark.parametrize("classes", [2, 5])
def test_a_constant_prediction_has_balanced_accuracy_one_over_c_and_no_correlation(classes):
    labels = torch.arange(classes).repeat(7)[:-1]  # not even balanced
    constant = torch.ones(1, len(labels)).long()
    assert score(constant, labels, "balanced_accuracy") == pytest.approx(100 / classes)
    assert score(constant, labels, "matthews_correlation") == pytest.approx(0)


@pytest.mark.parametrize(
    ("predictions", "labels"), [([[0, 1]], [0]), ([0, 1], [0, 1]), (np.zeros((1, 0)), []), (np.zeros((0, 2)), [0, 1])]
)
def test_shapes_that_do_not_fit_are_told(predictions, labels):
    with pytest.raises(ValueError, match="Expected"):
        score(predictions, labels)


def simulated_accuracies(seed: int, mean: float, networks: int, difficulty: torch.Tensor) -> torch.Tensor:
    """Right or wrong `(N, rows)`: networks differ in skill, examples in difficulty."""
    generator = torch.Generator().manual_seed(seed)
    skill = mean + 0.04 * torch.randn(networks, 1, generator=generator)
    return torch.rand(networks, len(difficulty), generator=generator) < skill + difficulty


def test_the_bootstrap_covers_the_truth():
    covered, widths = 0, []
    for seed in range(120):
        difficulty = 0.1 * torch.randn(300, generator=torch.Generator().manual_seed(1000 + seed))
        a = simulated_accuracies(seed, 0.75, 20, difficulty)
        b = simulated_accuracies(seed + 500, 0.70, 15, difficulty)
        mean, low, high = bootstrap_difference(a, b, seed=seed, samples=300)
        assert mean == pytest.approx(100 * (a.double().mean() - b.double().mean()).item())
        covered += low <= 5.0 <= high
        widths.append(high - low)
    assert covered >= 0.9 * 120
    assert np.mean(widths) < 8  # an interval that is always right because it is wide is none


def test_equal_networks_differ_by_nothing_and_the_same_seed_gives_the_same_interval():
    (predictions,), labels = random_predictions(0, 1, 100, 2)
    correct = (predictions == labels)[None]
    # one network on each side: only the draw of examples could tell them apart, and it is shared
    assert bootstrap_difference(correct, correct, seed=0) == (0, 0, 0)
    noisy, labels = random_predictions(1, 5, 100, 3)
    first, again, other = (bootstrap(noisy, labels, "matthews_correlation", seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] == pytest.approx(score(noisy, labels, "matthews_correlation").mean()) == other[0]


def test_checkpoints_of_one_run_count_as_one_network():
    labels = torch.zeros(400).long()
    runs = simulated_accuracies(0, 0.7, 6, torch.zeros(400)).logical_not().long()
    copies = runs.repeat_interleave(5, 0)  # five checkpoints a run that are all the same
    _, low, high = bootstrap(runs, labels, seed=0)
    _, low_copies, high_copies = bootstrap(copies, labels, seed=0, groups=[i // 5 for i in range(30)])
    assert high_copies - low_copies == pytest.approx(high - low, rel=0.1)
    _, low_naive, high_naive = bootstrap(copies, labels, seed=0)
    assert high_naive - low_naive < 0.95 * (high - low)
    with pytest.raises(ValueError, match="one group per network, 30, got 3"):
        bootstrap(copies, labels, seed=0, groups=[1, 2, 3])


def test_majority_and_counted_tasks():
    assert majority([2, 0, 2, 1]) == 2
    assert majority([1, 0]) == 0
    with pytest.raises(ValueError, match="training split"):
        majority([])
    # RTE's 277 rows have a standard error of 3.0 points
    assert counts([61.8, 62.2], majority=52.7, n_test=277)
    assert not counts([61.0, 61.4], majority=52.7, n_test=277)
    assert not counts([9.0], majority=0.0, n_test=1000, metric="matthews_correlation")
    assert counts([9.6], majority=0.0, n_test=1000, metric="matthews_correlation")


class WordEncoder:
    """Embeds a text as the normalised sum of one fixed vector per word."""

    words = dict(zip(["sport", "money", "today", "new", "here"], torch.eye(5), strict=True))

    def embed(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.stack([sum(self.words[w] for w in t.split()) for t in texts]))


def test_cosine_to_label_names_reads_both_texts_of_a_pair():
    texts, encoder = ["sport today", "new money", "sport"] * 100, WordEncoder()
    assert cosine_to_label_names(encoder, texts, ["money", "sport"]).tolist() == [[1, 0, 1] * 100]
    paired = cosine_to_label_names(encoder, ["today", "new"], ["money", "sport"], ["money here", "sport"])
    assert paired.tolist() == [[0, 1]]


def test_the_hash_of_weights_sees_every_bit_and_no_order():
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.int64), "c": torch.ones(2).bfloat16()}
    assert weights_hash(weights) == weights_hash(dict(reversed(weights.items())))
    others = [
        {**weights, "a": torch.tensor([[1.0, 2.0]])},
        {**weights, "a": torch.tensor([1.0, 2.0]).nextafter(torch.tensor(5.0))},
        {**weights, "c": torch.ones(2).half()},
        {"x" + name: tensor for name, tensor in weights.items()},
    ]
    assert len({weights_hash(w) for w in [weights, *others]}) == 5


def test_the_cache_asks_once_and_survives_a_broken_file(tmp_path):
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]})
    networks = [{"w": torch.tensor([float(i)])} for i in range(5)]
    asked = []

    def predict(state_dicts, dataset):
        asked.append([int(s["w"]) for s in state_dicts])
        return torch.stack([s["w"].long().expand(len(dataset)) for s in state_dicts])

    cached = PredictionCache(tmp_path, context="base@1").wrap(predict, chunk=2)
    assert cached(networks[:3], dataset).tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert asked == [[0, 1], [2]]
    again = PredictionCache(tmp_path, context="base@1").wrap(predict, chunk=2)
    assert again(networks[::-1], dataset)[:, 0].tolist() == [4, 3, 2, 1, 0]
    assert asked[2:] == [[4, 3]]
    files = sorted(tmp_path.rglob("*"))
    assert all(path.is_dir() or path.suffix == ".npy" for path in files)

    victim = next(f for f in files if f.suffix == ".npy")
    os.truncate(victim, 20)
    asked.clear()
    assert cached(networks, dataset)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert len(asked) == 1
    asked.clear()
    for other in (PredictionCache(tmp_path, context="base@2").wrap(predict), PredictionCache().wrap(predict)):
        other(networks[:1], dataset)
    cached(networks[:1], dataset.select([0, 1]))
    assert asked == [[0], [0], [0]]


def test_an_interrupted_prediction_keeps_what_was_done(tmp_path):
    dataset = Dataset.from_dict({"text": ["a"], "label": [0]})
    networks = [{"w": torch.tensor([float(i)])} for i in range(3)]
    asked = []

    def predict(state_dicts, dataset):
        asked.append(int(state_dicts[0]["w"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return torch.zeros(1, 1).long()

    cached = PredictionCache(tmp_path).wrap(predict, chunk=1)
    with pytest.raises(KeyboardInterrupt):
        cached(networks, dataset)
    cached(networks, dataset)
    assert asked == [0, 1, 2, 2]

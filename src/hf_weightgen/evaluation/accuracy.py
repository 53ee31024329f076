"""Scores of many networks on one test set, and how sure they are.

Metric objects are plain `evaluate.Metric` subclasses over scikit-learn. They are instantiated directly and keep
everything in memory, so that no network and no cache folder is needed. [`score`] computes the same figures for N
networks at once, and [`bootstrap`] their intervals.

Notation used for shapes and units:
    - N: networks; G: groups of networks, such as the runs whose checkpoints they are
    - rows: examples of the dataset
    - S: resamples of the bootstrap
    - scores, differences and intervals are in percent points (0 to 100; Matthews correlation -100 to 100);
      what the metric objects return is a fraction, as is usual for `evaluate`
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Dataset, Features, Value
from numpy.typing import ArrayLike
from sklearn.metrics import accuracy_score, matthews_corrcoef, recall_score
from torch import Tensor

from ..zoo.tasks import data_hash


class _ClassificationMetric(evaluate.Metric):
    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs):
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # the base class makes a cache folder in any case; in memory nothing would ever be written there
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions, references: one class id per example.",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )


class Accuracy(_ClassificationMetric):
    """Share of examples with the right class."""

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class BalancedAccuracy(_ClassificationMetric):
    """Mean over the classes that occur of the share of their examples with the right class."""

    def _compute(self, predictions, references) -> dict[str, float]:
        # scikit-learn's balanced_accuracy_score, without its warning about classes that are only predicted
        recall = recall_score(references, predictions, labels=np.unique(references), average="macro", zero_division=0)
        return {"balanced_accuracy": float(recall)}


class MatthewsCorrelation(_ClassificationMetric):
    """Correlation of predicted and true classes; 0 for a constant prediction."""

    def _compute(self, predictions, references) -> dict[str, float]:
        if len(np.union1d(predictions, references)) < 2:  # scikit-learn gives 0 too, with a warning
            return {"matthews_correlation": 0.0}
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


METRICS = {
    "accuracy": Accuracy,
    "balanced_accuracy": BalancedAccuracy,
    "matthews_correlation": MatthewsCorrelation,
}


def get_metric(name: str) -> evaluate.Metric:
    """
    A new metric object; `compute(predictions=..., references=...)` returns `{name: fraction}`.

    Raises:
        ValueError: If the name is unknown.
    """
    return METRICS[_known(name)]()


def score(predictions: ArrayLike, labels: ArrayLike, metric: str = "accuracy") -> np.ndarray:
    """
    Args:
        predictions (array of shape `(N, rows)`): Class ids.
        labels (array of shape `(rows,)`): Class ids.
        metric (`str`): A name out of `METRICS`.

    Returns:
        `np.ndarray` of shape `(N,)`, in percent: 100 times what the metric object returns.

    Raises:
        ValueError: If the shapes do not fit, there are no rows, or the metric is unknown.
    """
    predictions, labels = _checked(predictions, labels)
    return _weighted_scores(predictions, labels, _known(metric), np.ones((1, len(labels))))[0]


def bootstrap(
    predictions: ArrayLike,
    labels: ArrayLike,
    metric: str = "accuracy",
    *,
    seed: int,
    minus: ArrayLike | None = None,
    groups: Sequence[Hashable] | None = None,
    minus_groups: Sequence[Hashable] | None = None,
    samples: int = 2000,
) -> tuple[float, float, float]:
    """
    The mean score of some networks, or its difference to that of others, with a 95 % interval. Networks *and* examples
    are drawn again; the same draw of examples serves both sides, as both were tested on the same rows.

    Args:
        predictions (array of shape `(N, rows)`): Class ids.
        labels (array of shape `(rows,)`): Class ids.
        metric (`str`): A name out of `METRICS`.
        seed (`int`): Of the draws.
        minus (array of shape `(M, rows)`, *optional*): Predictions of the networks whose mean is subtracted.
        groups, minus_groups (sequence of length N, M, *optional*):
            The run of each network. Checkpoints of one run are not independent, so that whole runs are drawn.
        samples (`int`): Draws.

    Returns:
        `(mean, low, high)` in percent points; the mean is that of the data, not of the draws.
    """
    metric = _known(metric)
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1 draw, got {samples}.")
    sides = [(*_checked(predictions, labels), _group_ids(groups, len(predictions)))]
    if minus is not None:
        sides.append((*_checked(minus, labels), _group_ids(minus_groups, len(minus))))
    rows = len(sides[0][1])
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, 4_000_000 // rows)  # draws at a time, to bound the memory of their counts
    draws = []
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        examples = _draw(rows, count, generator)  # (S, rows)
        means = []
        for side, side_labels, group in sides:
            weights = _draw(int(group.max()) + 1, count, generator)[:, group]  # (S, N)
            scores = _weighted_scores(side, side_labels, metric, examples)  # (S, N)
            means.append((weights * scores).sum(1) / weights.sum(1))
        draws.append(means[0] - means[1] if len(means) > 1 else means[0])
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
    point = [score(side, side_labels, metric).mean() for side, side_labels, _ in sides]
    return float(point[0] - sum(point[1:])), float(low), float(high)


def bootstrap_difference(
    correct_a: ArrayLike, correct_b: ArrayLike, seed: int, samples: int = 2000
) -> tuple[float, float, float]:
    """
    Difference of the mean accuracies of two sets of networks on the same rows, see [`bootstrap`].

    Args:
        correct_a, correct_b (boolean arrays of shapes `(N, rows)` and `(M, rows)`): Whether each prediction is right.

    Returns:
        `(mean, low, high)` of mean(a) - mean(b) in percent points, with a 95 % interval.
    """
    correct_a, correct_b = np.asarray(correct_a).astype(np.int64), np.asarray(correct_b).astype(np.int64)
    return bootstrap(correct_a, np.ones(correct_a.shape[-1], np.int64), seed=seed, minus=correct_b, samples=samples)


def majority(labels: ArrayLike) -> int:
    """The most frequent class id, the lowest one of several. Take it from the training split."""
    labels = np.asarray(labels)
    if not labels.size:
        raise ValueError("The majority class of no labels is not defined; give the labels of the training split.")
    return int(np.bincount(labels).argmax())


def counts(zoo_scores: ArrayLike, majority: float, n_test: int, metric: str = "accuracy") -> bool:
    """
    Whether a task is learned well enough for a comparison on it to mean something: its zoo mean is at least three
    standard errors of one score above the majority class.

    Args:
        zoo_scores (array of shape `(N,)`): In percent.
        majority (`float`): Score of the majority class, in percent.
        n_test (`int`): Rows of the test set.
        metric (`str`): The metric of the scores. An uninformed Matthews correlation has a standard error of 1/√rows.
    """
    if n_test < 1:
        raise ValueError(f"`n_test` must be at least 1 row, got {n_test}.")
    mean = float(np.mean(zoo_scores))
    if _known(metric) == "matthews_correlation":
        variance = 100.0**2
    else:
        variance = max(share * (100 - share) for share in (mean, majority))
    return bool(mean >= majority + 3 * np.sqrt(variance / n_test))


def cosine_to_label_names(
    encoder, texts: Sequence[str], labels: Sequence[str], text_pairs: Sequence[str] | None = None
) -> Tensor:
    """
    What needs no training at all: the class whose name is nearest to the text.

    Args:
        encoder: With `embed(list[str])`, which returns normalised embeddings of shape `(len, E)`.
        texts (`Sequence[str]`): One per row.
        labels (`Sequence[str]`): Class names in the order of the class ids.
        text_pairs (`Sequence[str]`, *optional*): Second texts; they are appended to the first with a space.

    Returns:
        `torch.LongTensor` of shape `(1, rows)`: class ids, as of one network.
    """
    if text_pairs is not None:
        texts = [f"{first} {second}" for first, second in zip(texts, text_pairs, strict=True)]
    names = encoder.embed(list(labels))  # (C, E)
    # in pieces, so that memory does not grow with the dataset
    pieces = [encoder.embed(list(texts[i : i + 256])) @ names.T for i in range(0, len(texts), 256)]
    return torch.cat(pieces).argmax(-1)[None]


def rank_correlation(predicted: Tensor, true: Tensor) -> float:
    """Spearman's: the correlation of the ranks of two tensors `(N,)`, ties sharing their mean rank; NaN where all are equal."""
    ranks = [
        ((values[:, None] > values).double().sum(1) + 0.5 * (values[:, None] == values).sum(1))
        for values in (predicted, true)
    ]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def weights_hash(state_dict: Mapping[str, Tensor]) -> str:
    """32 hex digits over names, dtypes, shapes and bits, whatever the order of the names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class PredictionCache:
    r"""
    Predictions on disk, so that a table that was interrupted resumes: one small `.npy` file per network and dataset.

    Args:
        folder (`str` or `Path`, *optional*):
            Where the files stand. `None` keeps nothing.
        context (`str`, defaults to `""`):
            What else the predictions depend on, for example the base model, its revision and the longest text;
            predictions of another context are not found.
    """

    def __init__(self, folder: str | Path | None = None, context: str = ""):
        self.folder = None if folder is None else Path(folder)
        self.context = context

    def path(self, state_dict: Mapping[str, Tensor], data: str) -> Path:
        context = hashlib.blake2b(f"{self.context}|{data}".encode(), digest_size=16).hexdigest()
        return self.folder / context / f"{weights_hash(state_dict)}.npy"

    def wrap(
        self, predict: Callable[[Sequence[Mapping[str, Tensor]], Dataset], Tensor], chunk: int = 16
    ) -> Callable[[Sequence[Mapping[str, Tensor]], Dataset], Tensor]:
        """
        `predict(state_dicts, dataset) -> (N, rows)`, asked only for what is not stored, `chunk` networks at a time;
        each chunk is stored as soon as it is there.
        """
        if self.folder is None:
            return predict

        def cached(state_dicts: Sequence[Mapping[str, Tensor]], dataset: Dataset) -> Tensor:
            data = data_hash(dataset)
            paths = [self.path(state_dict, data) for state_dict in state_dicts]
            known = {path: self._read(path, len(dataset)) for path in paths}
            missing = [i for i, path in enumerate(paths) if known[path] is None]
            for start in range(0, len(missing), chunk):
                part = missing[start : start + chunk]
                for i, values in zip(part, predict([state_dicts[i] for i in part], dataset), strict=True):
                    known[paths[i]] = values.long().cpu()
                    self._write(paths[i], known[paths[i]])
            return torch.stack([known[path] for path in paths]) if paths else torch.empty(0, len(dataset)).long()

        return cached

    def _read(self, path: Path, rows: int) -> Tensor | None:
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # absent, truncated or foreign: computed again and replaced
            return None
        return torch.from_numpy(values.astype(np.int64)) if values.shape == (rows,) else None

    def _write(self, path: Path, values: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, values.numpy().astype(np.int16 if values.abs().max() < 2**15 else np.int64))
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _weighted_scores(predictions: np.ndarray, labels: np.ndarray, metric: str, weights: np.ndarray) -> np.ndarray:
    """Scores `(S, N)` in percent, where draw s holds row j `weights[s, j]` times."""
    correct = (predictions == labels).astype(np.float64)  # (N, rows)
    total = weights.sum(1, keepdims=True)  # (S, 1)
    if metric == "balanced_accuracy":
        recalls, present = np.zeros((len(weights), len(predictions))), np.zeros_like(total)
        for label in np.unique(labels):
            of_label = labels == label
            weight = weights[:, of_label].sum(1, keepdims=True)  # (S, 1), 0 where the draw has no row of the class
            recalls += weights[:, of_label] @ correct[:, of_label].T / np.maximum(weight, 1)
            present += weight > 0
        return 100 * recalls / present
    hits = weights @ correct.T  # (S, N)
    if metric == "accuracy":
        return 100 * hits / total
    chance, predicted_squares, true_squares = np.zeros_like(hits), np.zeros_like(hits), np.zeros_like(total)
    for label in np.union1d(labels, predictions):
        predicted = weights @ (predictions == label).astype(np.float64).T  # (S, N)
        true = weights @ (labels == label).astype(np.float64)[:, None]  # (S, 1)
        chance += predicted * true
        predicted_squares += predicted**2
        true_squares += true**2
    spread = np.sqrt((total**2 - predicted_squares) * (total**2 - true_squares))
    return 100 * np.divide(hits * total - chance, spread, out=np.zeros_like(hits), where=spread > 0)


def _draw(size: int, count: int, generator: torch.Generator) -> np.ndarray:
    """How often each of `size` things is drawn in `size` draws with replacement, `count` times: `(count, size)`."""
    drawn = torch.randint(size, (count, size), generator=generator)
    times = torch.zeros(count, size, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(times)).numpy()


def _group_ids(groups: Sequence[Hashable] | None, networks: int) -> np.ndarray:
    if groups is None:
        return np.arange(networks)
    if len(groups) != networks:
        raise ValueError(f"Expected one group per network, {networks}, got {len(groups)}.")
    first = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.array([first[group] for group in groups])


def _checked(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if labels.ndim != 1 or not labels.size or predictions.ndim != 2 or predictions.shape[1:] != labels.shape:
        raise ValueError(
            "Expected predictions of shape (N, rows) and labels of shape (rows,) with at least one row, got "
            f"{predictions.shape} and {labels.shape}."
        )
    if not len(predictions):
        raise ValueError("Expected the predictions of at least one network, got none.")
    return predictions, labels


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise ValueError(f"Unknown metric {metric!r}; choose one of {list(METRICS)}.")
    return metric

"""Classifiers from a few examples, beside what a user would fit to the same examples on the same frozen features.

D2NWG's Table 1 (https://huggingface.co/papers/2402.18153, section 4.1.1): tasks of 5 classes with 1 or 5 examples of each, of
classes that training never saw. Differences are paired: all methods answer the same tasks. The paper reports the best 3 of 50
generated heads; that row stands apart, since it chooses on the queries.

Notation: C classes, n examples and q queries of each, F size of a feature; accuracies are in percent points.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch import Tensor

from ..zoo.features import FewShotTask


Fit = Callable[[Tensor, Tensor], object]  # examples (C n, F) and class ids (C n,) to an estimator with `predict`
DRAWS, TOP = 50, 3  # generated heads of a task, and how many of them the paper keeps


class NearestCentroid:
    """The class whose mean is nearest, by Euclidean distance or by cosine; scikit-learn's knows no cosine, and warns at one example."""

    def __init__(self, cosine: bool):
        self.cosine = cosine

    def fit(self, inputs: np.ndarray, labels: np.ndarray) -> "NearestCentroid":
        self.means = np.stack([inputs[labels == c].mean(0) for c in np.unique(labels)])
        if self.cosine:
            self.means /= np.linalg.norm(self.means, axis=1, keepdims=True).clip(1e-12)
        return self

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return (inputs @ self.means.T - 0.5 * np.square(self.means).sum(1)).argmax(1)


def baselines() -> dict[str, list[Callable[[], object]]]:
    """What a user would fit, each in the settings between which the training tasks choose."""
    return {
        "nearest_centroid": [partial(NearestCentroid, cosine) for cosine in (False, True)],
        "ridge": [partial(RidgeClassifier, alpha=alpha) for alpha in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)],
        "logistic_regression": [partial(LogisticRegression, C=C, max_iter=300) for C in (0.1, 1.0, 10.0, 100.0)],
    }


def accuracy(predict: Callable[[Tensor], Tensor], task: FewShotTask) -> float:
    """Of class ids `(q',)` for queries `(q', F)`."""
    C, q, _ = task.queries.shape
    truth = torch.arange(C).repeat_interleave(q)
    return 100 * (torch.as_tensor(predict(task.queries.flatten(0, 1))) == truth).double().mean().item()


def score_fit(make: Callable[[], object], centre: Tensor, task: FewShotTask) -> float:
    """Accuracy of an estimator fitted to the examples; features are centred and brought to unit length."""

    def prepared(features: Tensor) -> np.ndarray:
        return F.normalize(features - centre, dim=-1).numpy()

    C, n, _ = task.support.shape
    labels = np.repeat(np.arange(C), n)
    estimator = make().fit(prepared(task.support.flatten(0, 1)), labels)
    return accuracy(lambda queries: torch.from_numpy(estimator.predict(prepared(queries))), task)


def tune(tasks: Sequence[FewShotTask], mean: Tensor) -> dict[str, Callable[[FewShotTask], float]]:
    """
    Each baseline with the settings, and with or without `mean` (F,) taken off the features, that are best on training tasks.
    """
    chosen = {}
    for name, settings in baselines().items():
        options = [partial(score_fit, make, centre) for make in settings for centre in (torch.zeros_like(mean), mean)]
        chosen[name] = max(options, key=lambda option: np.mean([option(task) for task in tasks]))
    return chosen


def score_head(weights: Mapping[str, Tensor], task: FewShotTask) -> float:
    """Accuracy of a linear head with `head.weight` (C, F) and `head.bias` (C,)."""
    return accuracy(lambda queries: F.linear(queries, weights["head.weight"], weights["head.bias"]).argmax(-1), task)


def select(heads: Sequence[Mapping[str, Tensor]], task: FewShotTask) -> int:
    """The head with the smallest loss on the examples themselves."""
    C, n, _ = task.support.shape
    truth, inputs = torch.arange(C).repeat_interleave(n), task.support.flatten(0, 1)
    losses = [F.cross_entropy(F.linear(inputs, h["head.weight"], h["head.bias"]), truth).item() for h in heads]
    return int(np.argmin(losses))


def with_names(task: FewShotTask, embeds: Mapping[str, Tensor]) -> FewShotTask:
    """The task with the name of each class as one more example of it."""
    names = torch.stack([embeds[name] for name in task.classes])
    return FewShotTask(torch.cat([task.support, names[:, None]], 1), task.queries, task.classes)


def few_shot_rows(
    name: str,
    tasks: Sequence[FewShotTask],
    fitted: Mapping[str, Sequence[float]],
    generators: Mapping[str, Callable[[FewShotTask, int], Sequence[Mapping[str, Tensor]]]],
    seed: int = 0,
    draws: int = DRAWS,
) -> list[dict]:
    """
    Args:
        name: Of the set that the tasks are from.
        fitted: Accuracies of each baseline on the tasks, see [`tune`].
        generators: `(task, n) -> n heads`, from the task's examples alone.

    Returns:
        `list[dict]`: a row per method with `mean`, `ci95` and `n` tasks. Of a generator: its first head, the mean over all
        heads, the head that fits the examples best, and the mean of the [`TOP`] that answer the queries best. Each has a
        paired `difference` to every baseline; `best` is the baseline that is best on these very tasks.
    """
    scores = {method: np.array(values) for method, values in fitted.items()}
    made: dict[str, np.ndarray] = {}
    for method, generate in generators.items():
        found = []
        for task in tasks:
            heads = generate(task, draws)
            each = np.array([score_head(head, task) for head in heads])
            found.append((each[0], each.mean(), each[select(heads, task)], np.sort(each)[-TOP:].mean()))
        kinds = ("", f"_mean_of_{draws}", "_selected", f"_top_{TOP}_by_queries")
        made |= {method + kind: values for kind, values in zip(kinds, np.array(found).T, strict=True)}
    (C, n, _), rows = tasks[0].support.shape, []
    best = max(scores, key=lambda method: scores[method].mean())
    for method, values in (scores | made).items():
        row = {"task": name, "method": method, "metric": "accuracy", "ways": C, "shots": n, "n": len(tasks)}
        row |= {"mean": float(values.mean()), "ci95": _interval(values, seed)}
        if method in made:
            paired = {other: values - theirs for other, theirs in scores.items()}
            row["difference"] = {o: {"mean": float(d.mean()), "ci95": _interval(d, seed)} for o, d in paired.items()}
            row["best"] = best
        rows.append(row)
    return rows


def _interval(values: np.ndarray, seed: int) -> list[float]:
    """95 % interval of the mean, from resampled tasks."""
    if len(values) < 2 or not values.std():
        return [float(values.mean())] * 2
    drawn = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed))
    return [float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)]

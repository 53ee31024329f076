"""Heads for all classes of a dataset that training never saw, and what fine-tuning makes of them and of other starts.

D2NWG (https://huggingface.co/papers/2402.18153): Table 2, heads at first sight; Figure 3 and Table 22, after fine-tuning. All
starts are trained on the same batches by the same optimiser; its learning rate, and a factor on the logits of a start, are
chosen for each start on a fifth of the training examples, held out for that.

Notation: C classes, n examples and q queries of each, k of the examples that a head is made from, F size of a feature;
accuracies are in percent points, all classes count alike.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor

from ..targets.architectures import TargetConfig
from ..targets.stacked import stack, unstack
from ..zoo.features import FeatureSet, FewShotTask
from ..zoo.networks import initial, predict_networks, train_networks
from .few_shot import score_head


EPOCHS = (0, 1, 5, 25, 50)
LEARNING_RATES, SCALES = (5e-3, 2.5e-2, 1e-1), (1.0, 8.0)
BATCH_SIZE, WEIGHT_DECAY = 50, 0.05
ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
Head = Mapping[str, Tensor]  # `head.weight` (C, F) and `head.bias` (C,)


def whole_task(train: FeatureSet, test: FeatureSet) -> FewShotTask:
    """All classes of a dataset: of each as many training and test examples as its smallest class has."""
    shared = [name for name in train.classes if name in test.classes]
    if len(shared) < 2:  # splits that share no classes, such as Omniglot's
        return halves(test)
    parts = []
    for one in (train, test):
        rows = torch.tensor([one.classes.index(name) for name in shared])
        parts.append(one.features[rows, : one.counts[rows].min()])
    return FewShotTask(*parts, tuple(shared))


def halves(one: FeatureSet) -> FewShotTask:
    """All classes of a set, with half of the examples of each to learn from and the other half as queries."""
    half = int(one.counts.min()) // 2
    return FewShotTask(one.features[:, :half], one.features[:, half : 2 * half], one.classes)


def for_validation(task: FewShotTask) -> FewShotTask:
    """The task with the last fifth of its training examples as queries, which leaves the others."""
    kept = task.support.shape[1] * 4 // 5
    return FewShotTask(task.support[:, :kept], task.support[:, kept:], task.classes)


def few_of(task: FewShotTask, shots: int, generator: torch.Generator) -> FewShotTask:
    """
    The task with `shots` random examples of each class.

    Raises:
        ValueError: If it has fewer.
    """
    if task.support.shape[1] < shots:
        raise ValueError(f"{shots} examples of each class were asked for, the set has {task.support.shape[1]}.")
    rows = torch.randperm(task.support.shape[1], generator=generator)[:shots]
    return FewShotTask(task.support[:, rows], task.queries, task.classes)


def ridge_head(task: FewShotTask, alpha: float) -> dict[str, Tensor]:
    """Ridge regression on the examples, which are left as the encoder made them: elsewhere it would be no head of it."""
    C, n, _ = task.support.shape
    signs = 2 * torch.eye(C).repeat_interleave(n, 0) - 1
    fit = Ridge(alpha=alpha).fit(task.support.flatten(0, 1).numpy(), signs.numpy())
    return {"head.weight": torch.from_numpy(fit.coef_).float(), "head.bias": torch.from_numpy(fit.intercept_).float()}


def choose_alpha(tasks: Sequence[FewShotTask]) -> float:
    """Of [`ridge_head`], by its mean accuracy on tasks of training sets."""
    return max(ALPHAS, key=lambda alpha: sum(score_head(ridge_head(task, alpha), task) for task in tasks))


def lookup_head(task: FewShotTask, rows: Tensor) -> dict[str, Tensor]:
    """Of each class the row `(R, F)` of a zoo's heads that points where the class lies, seen from the mean of all classes."""
    means = task.support.mean(1)
    centre, known = means.mean(0), F.normalize(rows, dim=-1)
    weight = known[(F.normalize(means - centre, dim=-1) @ known.mT).argmax(1)]
    return {"head.weight": weight, "head.bias": -(weight @ centre)}


def random_head(task: FewShotTask, seed: int) -> dict[str, Tensor]:
    return unstack(initial(_target(task), [seed]), 0)


def fine_tune(
    task: FewShotTask,
    starts: Mapping[str, Sequence[Head]],
    settings: Mapping[str, tuple[float, float]],
    seed: int = 0,
    epochs: Sequence[int] = EPOCHS,
) -> dict[str, dict[int, Tensor]]:
    """
    Trains heads on all examples of a task by AdamW.

    Args:
        starts: By name one or several heads.
        settings: By name the learning rate, and the factor on the logits of the start.

    Returns:
        `dict[str, dict[int, torch.Tensor]]`: By name and epoch the accuracies of its heads on the queries.
    """
    C, n, _ = task.support.shape
    inputs, labels = task.support.flatten(0, 1), torch.arange(C).repeat_interleave(n)
    queries, truth = task.queries.flatten(0, 1), torch.arange(C).repeat_interleave(task.queries.shape[1])
    target = _target(task)
    scores: dict[str, dict[int, Tensor]] = {name: {} for name in starts}

    def score(params: Mapping[str, Tensor]) -> Tensor:
        return 100 * (predict_networks(target, params, queries) == truth).double().mean(1)

    for lr in sorted({settings[name][0] for name in starts}):
        own = [name for name in starts if settings[name][0] == lr]
        params = stack(
            [{key: settings[name][1] * t for key, t in head.items()} for name in own for head in starts[name]]
        )
        sizes, reached = [len(starts[name]) for name in own], {0: score(params)}
        training = train_networks(
            target,
            params,
            inputs,
            labels,
            lambda tensors, lr=lr: torch.optim.AdamW(tensors, lr=lr, weight_decay=WEIGHT_DECAY, fused=True),
            epochs=max(epochs),
            batch_size=min(BATCH_SIZE, len(labels)),
            generator=torch.Generator().manual_seed(seed),
        )
        for epoch, trained in enumerate(training, start=1):
            if epoch in epochs:
                reached[epoch] = score(trained)
        for epoch, values in reached.items():
            for name, part in zip(own, values.split(sizes), strict=True):
                scores[name][epoch] = part
    return scores


def choose_settings(
    task: FewShotTask, starts: Mapping[str, Sequence[Head]], seed: int = 0, epochs: Sequence[int] = EPOCHS
) -> dict[str, tuple[float, float]]:
    """For each start the settings of [`fine_tune`] with the best mean accuracy over all epochs but 0; see [`for_validation`]."""
    found: dict[str, dict[tuple[float, float], float]] = {name: {} for name in starts}
    for setting in itertools.product(LEARNING_RATES, SCALES):
        for name, scores in fine_tune(task, starts, dict.fromkeys(starts, setting), seed, epochs).items():
            found[name][setting] = sum(values.mean().item() for epoch, values in scores.items() if epoch)
    return {name: max(own, key=own.get) for name, own in found.items()}


def _target(task: FewShotTask) -> TargetConfig:
    return TargetConfig(input_shape=[task.support.shape[-1]], layers=[], num_classes=len(task.classes))

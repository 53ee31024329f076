"""One row of figures: what it is made of, for all the networks of one method on one task.

Notation used for shapes and units:
    - N: networks of a row; n: networks asked for
    - scores, their std and differences are in percent points
"""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..zoo.tasks import TaskData, evaluation_subset
from .accuracy import bootstrap, score, weights_hash
from .novelty import fix_gauge, flatten, nearest, pairwise_spread, within_nearest, within_wrong_iou, wrong_iou


StateDict = Mapping[str, Tensor]
SELECTED = ("zoo", "lookup", "generated")  # the rows of which a best network is selected on validation


class Unavailable(Exception):
    """Why a row cannot be computed here."""


class TaskRows:
    r"""
    What all rows of one task share: data, members, their predictions and their place in weight space.

    Args:
        predict (`Callable`): `(state_dicts, dataset) -> class ids (N, rows)`; asked once per network and dataset.
        data ([`TaskData`]): Test rows report, validation rows select.
        members (sequence of state dicts): The zoo's training members of this task; may be empty.
        member_seeds (sequence, *optional*): The run of each member.
        reference (state dict, *optional*): See [`fix_gauge`].
        n (`int`): Networks per row.
        best_of (`int`): How many networks the best one is chosen from.
        seed (`int`): From which the seed of every row is derived.
        test_limit, validation_limit (`int`, *optional*): See [`evaluation_subset`].
    """

    def __init__(
        self,
        predict: Callable[[Sequence[StateDict], Dataset], Tensor],
        data: TaskData,
        members: Sequence[StateDict] = (),
        member_seeds: Sequence[Hashable] | None = None,
        reference: StateDict | None = None,
        n: int = 10,
        best_of: int = 10,
        seed: int = 0,
        test_limit: int | None = None,
        validation_limit: int | None = None,
    ):
        self._predict, self._known = predict, {}
        self.spec, self.members, self.reference = data.spec, list(members), reference
        self.n, self.best_of, self.seed = n, best_of, seed
        self.groups = None if member_seeds is None else list(member_seeds)
        self.train = data.train
        self.test = evaluation_subset(data.test, test_limit)
        self.validation = evaluation_subset(data.validation, validation_limit)
        self.labels = np.asarray(self.test.with_format(None)["label"])
        self.validation_labels = np.asarray(self.validation.with_format(None)["label"])
        if self.members:
            self.aligned = [fix_gauge(member, reference) for member in self.members]
            self.vectors = flatten(self.members, reference)  # (N, D)
            self.predictions = self.predict(self.members, self.test)  # (N, rows)

    def predict(self, state_dicts: Sequence[StateDict], dataset: Dataset) -> Tensor:
        """Class ids `(N, rows)`; several rows look at the same networks."""
        keys = [(id(dataset), weights_hash(state_dict)) for state_dict in state_dicts]
        missing = {key: asked for key, asked in zip(keys, state_dicts, strict=True) if key not in self._known}
        if missing:
            made = self._predict(list(missing.values()), dataset)
            if tuple(made.shape) != (len(missing), len(dataset)):
                expected = (len(missing), len(dataset))
                raise ValueError(f"`predict` must return class ids of shape {expected}, got {tuple(made.shape)}.")
            self._known.update(zip(missing, made, strict=True))
        return torch.stack([self._known[key] for key in keys])

    def derived(self, *parts) -> int:
        """A seed that depends on what it is for, and not on which other rows are computed."""
        text = "|".join(map(str, (self.seed, self.spec.name, *parts)))
        # 31 bits: what every generator of random numbers takes as a seed
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1

    def generator(self, method: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.derived(method))

    def need_members(self) -> list[StateDict]:
        if not self.members:
            raise Unavailable("no zoo member of this task was given")
        return self.members

    def distance(self, state_dicts: Sequence[StateDict]) -> Tensor:
        return nearest(flatten(state_dicts, self.reference), self.vectors)

    def row(self, method, state_dicts, *, metric=None, pool=None, control=False, groups=None) -> dict:
        """
        The row of some networks. `pool` are those among which the best on validation is looked for (default: the first
        `best_of` of the row's own), for the methods of `SELECTED`. A `control` is meant to fail: it has no novelty.
        """
        for i, state_dict in enumerate(state_dicts):
            for name, tensor in state_dict.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"Network {i} of row {method!r} holds NaN or infinity in {name!r}.")
        predictions = self.predict(state_dicts, self.test)
        row = self.summary(method, predictions, metric, groups)
        if control:
            return row
        pool = list(state_dicts)[: self.best_of] if pool is None else pool
        if len(pool) > 1 and method in SELECTED:
            validation = score(self.predict(pool, self.validation), self.validation_labels, self.spec.metric)
            chosen = self.predict([pool[int(validation.argmax())]], self.test)
            row["best"] = float(score(chosen, self.labels, self.spec.metric)[0])
            row["best_of"] = len(pool)
        labels = torch.as_tensor(self.labels)
        if method == "zoo":
            row.update(self._novelty_of_zoo(labels))
        elif self.members:
            row["novelty_l2"] = self.distance(state_dicts).quantile(0.5).item()
            row["novelty_iou"] = wrong_iou(predictions, self.predictions, labels).quantile(0.5).item()
            if len(state_dicts) > 1:
                row["spread_l2"] = pairwise_spread(flatten(state_dicts, self.reference))
        return row

    def _novelty_of_zoo(self, labels: Tensor) -> dict:
        """Each member against the others; `..._other_runs` leaves the checkpoints of its own run out."""
        if len(self.members) < 2:
            return {}
        found = {
            "novelty_l2": within_nearest(self.vectors).quantile(0.5).item(),
            "novelty_iou": within_wrong_iou(self.predictions, labels).quantile(0.5).item(),
            "spread_l2": pairwise_spread(self.vectors),
        }
        if self.groups is not None and len(set(self.groups)) > 1:
            found["novelty_l2_other_runs"] = within_nearest(self.vectors, self.groups).quantile(0.5).item()
            found["novelty_iou_other_runs"] = (
                within_wrong_iou(self.predictions, labels, self.groups).quantile(0.5).item()
            )
        return found

    def summary(self, method: str, predictions: Tensor, metric: str | None = None, groups=None) -> dict:
        metric = metric or self.spec.metric
        scores = score(predictions, self.labels, metric)
        _, low, high = bootstrap(predictions, self.labels, metric, seed=self.derived(method, "draws"), groups=groups)
        row = self.empty(method, metric) | {
            "mean": float(scores.mean()),
            "std": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
            "median": float(np.median(scores)),
            "max": float(scores.max()),
            "ci95": [low, high],
            "n": len(scores),
        }
        return row

    def empty(self, method: str, metric: str | None = None) -> dict:
        nothing = dict.fromkeys(("mean", "std", "median", "max", "ci95", "best"))
        row = {"task": self.spec.name, "method": method, "metric": metric or self.spec.metric, **nothing, "n": 0}
        return row | {"novelty_l2": None, "novelty_iou": None, "stored": False, "test_rows": len(self.labels)}

    def difference(self, predictions: Tensor, others: Tensor, groups=None) -> dict:
        mean, low, high = bootstrap(
            predictions,
            self.labels,
            self.spec.metric,
            seed=self.derived("difference"),
            minus=others,
            minus_groups=groups,
        )
        return {"mean": mean, "ci95": [low, high]}

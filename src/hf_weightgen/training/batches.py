"""Zoo rows as tensors, and random draws that depend on (seed, step, place in the global batch) alone.

Every process draws the numbers of the whole global batch and keeps its own rows. So two processes train as one does,
and a resumed run continues exactly: the step number is all the state that sampling has.

Notation: R rows (checkpoints), T body tokens, C classes (padded), S scalars per token, E embedding size, P prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights.tokenization import WeightTokenizer


PROMPT_NOISE = 0.3  # length of the noise on a prompt embedding of length 1
FEW_CLASSES = 20  # tasks with at most so many classes are drawn equally often


@dataclass
class StepRandom:
    """Draws of one step; `rows` of the `total` rows of the global batch belong to this process."""

    seed: int
    step: int
    total: int
    rows: slice

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * 101 + purpose)

    def normal(self, *shape: int, purpose: int = 1) -> Tensor:
        """Unit Gaussian of shape `(local batch, *shape)`."""
        return torch.randn(self.total, *shape, generator=self._generator(purpose))[self.rows]

    def uniform(self, *shape: int, purpose: int = 2) -> Tensor:
        """Uniform in [0, 1) of shape `(local batch, *shape)`."""
        return torch.rand(self.total, *shape, generator=self._generator(purpose))[self.rows]

    def uniform_rows(self, rows: Sequence[int], lengths: Sequence[int], *shape: int, purpose: int = 9) -> list[Tensor]:
        """Uniform in [0, 1) of shape `(length, *shape)` for some rows of the local batch, whatever other rows have."""
        first, seed = self.rows.indices(self.total)[0], self._generator(purpose).initial_seed()
        generators = (torch.Generator().manual_seed(seed * 4099 + first + row) for row in rows)
        return [torch.rand(length, *shape, generator=own) for length, own in zip(lengths, generators, strict=True)]

    def integers(self, high: int, purpose: int = 3) -> Tensor:
        """Integers in [0, high) of shape `(local batch,)`."""
        return torch.randint(high, (self.total,), generator=self._generator(purpose))[self.rows]

    def shared_integers(self, high: int, count: int, purpose: int = 8) -> Tensor:
        """Integers in [0, high) of shape `(count,)`, the same in every process: for what all rows of a batch share."""
        return torch.randint(high, (count,), generator=self._generator(purpose))


@dataclass
class ZooTensors:
    """
    A zoo ready for training.

    Args:
        weight_tokens: `(R, T + C, S)`.
        padding_mask: `(R, T + C, S)`, `True` on scalars.
        task_of: `(R,)`, each row's place in `tasks`.
        class_embeds: per task `(V, C, E)`: the class names in V wordings, the first of them the task's own.
        class_mask: `(tasks, C)`, `True` on real classes.
        prompt_embeds: per task `(P, E)`.
        families: family of each task.
        layout_of: `(R,)`, each row's layout; T counts the body tokens of all layouts, side by side.
        start: Row of the shared start of all members, which is what no prompt asks for; the last row and task.
        dataset_of: `(tasks,)`, each task's dataset, where tasks that differ in their architecture alone share one.
        architecture_codes: `(tasks, E)`, see [`~targets.mixed.architecture_codes`]; absent if prompts tell tasks apart.
        odds: `(tasks,)`, how often rows of each task are drawn, all shares together 1. Default: see `draw_rows`.
    """

    weight_tokens: Tensor
    padding_mask: Tensor
    task_of: Tensor
    tasks: list[str]
    class_embeds: list[Tensor]
    class_mask: Tensor
    prompt_embeds: list[Tensor]
    families: list[str]
    layout_of: Tensor
    start: int | None = None
    dataset_of: Tensor | None = None
    architecture_codes: Tensor | None = None
    odds: Tensor | None = None

    def __post_init__(self):
        if self.odds is None:
            odds = self.class_mask.sum(1).clamp(min=FEW_CLASSES).double().sqrt()
            if self.start is not None:
                odds[-1] = odds.min()
            self.odds = odds / odds.sum()

    @classmethod
    def of(
        cls,
        tokenizer: WeightTokenizer,
        state_dicts: Sequence[Mapping[str, Tensor]],
        task_names: Sequence[str],
        class_embeds: Mapping[str, Tensor],
        prompt_embeds: Mapping[str, Tensor],
        families: Mapping[str, str],
        start: int | None = None,
    ) -> "ZooTensors":
        """
        Args:
            state_dicts, task_names: One checkpoint and its task per row.
            class_embeds: task -> `(V, classes, E)`; prompt_embeds: task -> `(P, E)`; families: task -> family.
        """
        tasks = list(dict.fromkeys(task_names))
        tokens, mask, layouts = tokenizer.side_by_side_of(state_dicts)
        widest = tokens.shape[1] - tokenizer.num_all_body_tokens
        padded = []
        for task in tasks:
            wordings, classes, size = class_embeds[task].shape
            padded.append(torch.cat([class_embeds[task], torch.zeros(wordings, widest - classes, size)], 1))
        counts = torch.tensor([class_embeds[task].shape[1] for task in tasks])
        return cls(
            tokens,
            mask,
            torch.tensor([tasks.index(t) for t in task_names]),
            tasks,
            padded,
            torch.arange(widest) < counts[:, None],
            [prompt_embeds[t] for t in tasks],
            [families[t] for t in tasks],
            layouts,
            start,
        )

    def __len__(self) -> int:
        return len(self.weight_tokens)

    def first_tasks(self, count: int) -> "ZooTensors":
        """The rows of the first tasks, with as many classes as these have."""
        kept, mask = self.kept(self.task_of < count), self.class_mask[:count]
        C = int(mask.sum(1).max())
        body = self.weight_tokens.shape[1] - self.class_mask.shape[1]
        return replace(
            kept,
            weight_tokens=kept.weight_tokens[:, : body + C],
            padding_mask=kept.padding_mask[:, : body + C],
            tasks=self.tasks[:count],
            class_embeds=[embeds[:, :C] for embeds in self.class_embeds[:count]],
            class_mask=mask[:, :C],
            prompt_embeds=self.prompt_embeds[:count],
            families=self.families[:count],
            start=kept.start if count == len(self.tasks) else None,
            dataset_of=None if self.dataset_of is None else self.dataset_of[:count],
            architecture_codes=None if self.architecture_codes is None else self.architecture_codes[:count],
            odds=self.odds[:count] / self.odds[:count].sum(),
        )

    def kept(self, rows: Tensor) -> "ZooTensors":
        """The rows where `rows` `(R,)` is `True`. Each task needs one, and the shared start, where there is one, is kept."""
        return replace(
            self,
            weight_tokens=self.weight_tokens[rows],
            padding_mask=self.padding_mask[rows],
            task_of=self.task_of[rows],
            layout_of=self.layout_of[rows],
            start=None if self.start is None else int(rows.sum()) - 1,
        )

    @property
    def prompted_tasks(self) -> list[str]:
        """The tasks that prompts ask for: all but the shared start."""
        return self.tasks if self.start is None else self.tasks[:-1]

    @cached_property
    def _rows_of(self) -> list[Tensor]:
        """Row numbers of each task."""
        return [torch.nonzero(self.task_of == task).flatten() for task in range(len(self.tasks))]

    def rows_of(self, task: int) -> Tensor:
        """Numbers of the rows of a task."""
        return self._rows_of[task]

    @cached_property
    def stds(self) -> Tensor:
        """`(tasks, T + C, S)`: the spread of the rows of each task."""
        return torch.stack([self.weight_tokens[rows].std(0, correction=0) for rows in self._rows_of])

    def draw_rows(self, random: StepRandom) -> Tensor:
        """
        Row numbers `(b,)` of a batch: a task at random, then a row of it, so that tasks with many rows do not crowd out
        others. Tasks with very many classes come more often: they have more to learn.
        """
        task = torch.searchsorted(self.odds.cumsum(0), random.uniform(purpose=11).double()).clamp(
            max=len(self.tasks) - 1
        )
        draws = zip((self._rows_of[t] for t in task.tolist()), random.uniform(purpose=12).tolist(), strict=True)
        return torch.stack([rows[int(u * len(rows))] for rows, u in draws])

    def names(self, tasks: Tensor, random: StepRandom, purpose: int = 13) -> Tensor:
        """Class-name embeddings `(b, C, E)` in a random wording each; half of the draws take the task's own wording."""
        draw = random.uniform(purpose=purpose)
        picked = []
        for t, u in zip(tasks.tolist(), draw.tolist(), strict=True):
            wordings = self.class_embeds[t]
            picked.append(wordings[0 if u < 0.5 else int((u - 0.5) * 2 * len(wordings))])
        return torch.stack(picked)

    def classes(self, tasks: Tensor, most: int, random: StepRandom, purpose: int = 17) -> Tensor:
        """Numbers `(b, k)` of at most `most` random classes of each task, real ones first: a step need not see all 77."""
        draw = random.uniform(self.class_mask.shape[1], purpose=purpose)
        return (draw + (~self.class_mask[tasks])).argsort(1)[:, :most]

    def prompts(
        self, tasks: Tensor, random: StepRandom, noise_length: float = PROMPT_NOISE, purpose: int = 40
    ) -> Tensor:
        """
        A prompt embedding `(b, E)` of each task: a random point between two of its prompts, with noise of a certain length,
        so that the space around and between the known phrasings belongs to the task as well.
        """
        pair, mix = random.uniform(2, purpose=purpose), random.uniform(1, purpose=purpose + 1)
        first, second = (
            torch.stack(
                [
                    self.prompt_embeds[t][int(u * len(self.prompt_embeds[t]))]
                    for t, u in zip(tasks.tolist(), column, strict=True)
                ]
            )
            for column in pair.mT.tolist()
        )
        mixed = F.normalize(first + mix * (second - first), dim=-1)
        noise = random.normal(mixed.shape[-1], purpose=purpose + 2) * (noise_length / mixed.shape[-1] ** 0.5)
        return F.normalize(mixed + noise, dim=-1)

    def other_tasks(self, tasks: Tensor, random: StepRandom, purpose: int = 15) -> Tensor:
        """For each task one of another family `(b,)`; itself if there is none."""
        draw = random.uniform(purpose=purpose)
        others = [
            [o for o, f in enumerate(self.families) if f != family] or [t] for t, family in enumerate(self.families)
        ]
        return torch.tensor(
            [others[t][int(u * len(others[t]))] for t, u in zip(tasks.tolist(), draw.tolist(), strict=True)]
        )

"""Training of the accuracy predictor, and the autoencoder that it guides.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), appendix B.1, eq. 9 and Algorithm 3. The paper trains the predictor
on pretrained weights. A zoo's members are nearly all equally good, so that ours sees others too, scored on validation data:
the one that guides the autoencoder, members that were disturbed, as reconstructions are; the one that ranks samples, samples
of the generator. They are two predictors because disturbed members teach that whatever is far from the known ones is bad,
which is wrong of samples and of new members.

Notation: R scored checkpoints; b rows of a batch; T body tokens, C classes, S scalars per token; accuracies from 0 to 1.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.modeling_predictor import AccuracyPredictor
from ..weights.tokenization import WeightTokenizer
from .batches import StepRandom, ZooTensors
from .objectives import PROMPT_DROPOUT
from .sources import Source, decode_rows


MOST_NOISE = 2.0  # of a disturbed member, in the spread of its task's members
WEIGHT_NOISE = (
    0.02  # std on the tokens of a step, in token units: a zoo has few members, which would be learned by heart
)


@dataclass
class ScoredRows:
    """
    Checkpoints whose accuracy is known, as the predictor reads them.

    Args:
        weight_tokens, padding_mask: `(R, T + C, S)`, see [`ZooTensors`].
        task_of: `(R,)`, each row's place in the zoo's tasks.
        accuracies: `(R,)`, on validation data: a predictor that chooses must know nothing of the test data.
    """

    weight_tokens: Tensor
    padding_mask: Tensor
    task_of: Tensor
    accuracies: Tensor

    @classmethod
    def of_zoo(cls, zoo: ZooTensors, accuracies: Tensor) -> "ScoredRows":
        """The rows of a zoo whose accuracy `(R,)` is not NaN."""
        known = ~accuracies.isnan()
        if not known.any():
            raise ValueError("No row of the zoo has a validation accuracy, so that there is nothing to predict.")
        return cls(zoo.weight_tokens[known], zoo.padding_mask[known], zoo.task_of[known], accuracies[known].float())

    @classmethod
    def of(
        cls, tokenizer: WeightTokenizer, zoo: ZooTensors, state_dicts: Sequence[Mapping[str, Tensor]], task: str,
        accuracies: Tensor,
    ) -> "ScoredRows":  # fmt: skip
        """State dicts of one task of the zoo."""
        tokens, mask, _ = tokenizer.side_by_side_of(state_dicts)
        missing = zoo.weight_tokens.shape[1] - tokens.shape[1]  # classes that other tasks have
        tokens, mask = (F.pad(values, (0, 0, 0, missing)) for values in (tokens, mask))
        index = zoo.tasks.index(task)
        return cls(tokens, mask, torch.full((len(tokens),), index), accuracies.float())

    @classmethod
    def joined(cls, parts: Sequence["ScoredRows"]) -> "ScoredRows":
        names = ("weight_tokens", "padding_mask", "task_of", "accuracies")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def __len__(self) -> int:
        return len(self.accuracies)


def disturbed(zoo: ZooTensors, task: int, count: int, generator: torch.Generator) -> Tensor:
    """
    Tokens `(count, T + C, S)` that are worse than a task's members: points between two members, with noise whose std is
    between 0 and twice the members' own.
    """
    members = zoo.weight_tokens[zoo.task_of == task]
    first, second = torch.randint(len(members), (2, count), generator=generator)
    mix, scale = torch.rand(2, count, 1, 1, generator=generator)
    noise = torch.randn(count, *members.shape[1:], generator=generator) * members.std(0, correction=0)
    tokens = members[first].lerp(members[second], 0.5 * mix) + MOST_NOISE * scale.square() * noise
    return tokens * zoo.padding_mask[zoo.task_of == task][0]


def guiding_rows(source: Source, count: int, generator: torch.Generator) -> ScoredRows:
    """
    What a guiding predictor learns from: the members of a zoo that [`GuidanceLoss`] may show it, and `count` disturbed ones of
    each task, where it takes no hours to score them.
    """
    zoo = source.train
    parts = [ScoredRows.of_zoo(zoo, source.accuracies)]
    for index, task in enumerate(zoo.prompted_tasks if source.validate is not None else ()):
        alike = (zoo.task_of == index).nonzero()[:1, 0].expand(count)  # rows of the same layout and classes
        tokens = disturbed(zoo, index, count, generator)
        counts = zoo.class_mask[zoo.task_of[alike]].sum(1)
        scores = source.validate(decode_rows(source.tokenizer, tokens, zoo.layout_of[alike], counts), task)
        parts.append(ScoredRows(tokens, zoo.padding_mask[alike], zoo.task_of[alike], scores.float()))
    return ScoredRows.joined(parts)


def predictor_loss(predictor: nn.Module, rows: ScoredRows, zoo: ZooTensors, random: StepRandom) -> Tensor:
    """
    Mean of (g(w, e) - a)² on a batch of scored rows, all of them equally often: w their weights, a their accuracies, and e an
    embedding of their task, a prompt or a dataset. For a tenth of the batch there is none, so that g works without.
    """
    index = random.integers(len(rows), purpose=30)
    tasks = rows.task_of[index]
    dropped = random.uniform(1, purpose=31) < PROMPT_DROPOUT
    tokens = rows.weight_tokens[index]
    return predictor(
        weight_tokens=tokens + WEIGHT_NOISE * random.normal(*tokens.shape[1:], purpose=32),
        padding_mask=rows.padding_mask[index],
        class_embeds=zoo.names(tasks, random),
        class_mask=zoo.class_mask[tasks],
        condition_embeds=zoo.prompts(tasks, random) * ~dropped,
        accuracies=rows.accuracies[index],
    ).loss


class GuidanceLoss:
    """
    The last term of eq. 9, `weight` * mean of (g(w) - g(f(w)))²: what the autoencoder f makes of weights shall be as good as they
    are, as far as the frozen predictor g can tell. Algorithm 3 compares predicted accuracies, so does this.

    Args:
        predictor: g; a frozen copy of it is kept.
        weight: The paper's is 1.
    """

    def __init__(self, predictor: AccuracyPredictor, zoo: ZooTensors, weight: float = 1.0):
        self.predictor = copy.deepcopy(predictor).eval().requires_grad_(False)
        self.zoo, self.weight = zoo, weight

    def __call__(self, tokens: Tensor, truth: Tensor, index: Tensor, random: StepRandom) -> Tensor:
        """See [`~training.objectives.vae_loss`]."""
        tasks = self.zoo.task_of[index]
        task = {
            "padding_mask": self.zoo.padding_mask[index],
            "class_embeds": torch.stack([self.zoo.class_embeds[t][0] for t in tasks.tolist()]),
            "class_mask": self.zoo.class_mask[tasks],
            "condition_embeds": self.zoo.prompts(tasks, random, purpose=33),
        }
        before, after = (self.predictor(weights, **task).predicted_accuracies for weights in (truth, tokens))
        return self.weight * F.mse_loss(after, before)


def summed(*losses: Callable | None) -> Callable | None:
    """The sum of those function losses that there are, see [`~training.objectives.vae_loss`]; `None` if there is none."""
    present = [loss for loss in losses if loss is not None]
    return (lambda *arguments: sum(loss(*arguments) for loss in present)) if present else None

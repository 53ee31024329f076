"""Zoos of different kinds as one: adapters for a text encoder and heads on it beside networks on images, for one generator.

A task that several of them have is one task in several architectures.

Notation: T body tokens of all layouts side by side, C classes (padded), S scalars per token, of one source or of all.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..targets.mixed import target_numbers
from ..weights.tokenization import WeightTokenizer
from .batches import StepRandom, ZooTensors
from .sources import Source, in_architecture


def joined(sources: Sequence[Source], first: Sequence[int] | None = None) -> Source:
    """
    Sources with tokens of one size as one; what is drawn of each goes with the square root of its rows, as a zoo of independent
    networks has more to learn than a few runs of many tasks. Where one of them asks decoded networks, the others' rows pass by;
    weight-space error counts in each layout as its source has it.

    Args:
        sources: Those with examples of datasets first; the last one alone may have a shared start.
        first: Their numbers in the order in which they give a task its default architecture. Default: as they come.

    Raises:
        ValueError: If token sizes differ, two sources have the same task in architectures of one name, or layouts of the same
            tensors, or the order is another.
    """
    sizes = [source.tokenizer.token_size for source in sources]
    if len(set(sizes)) > 1:
        raise ValueError(f"Sources must have tokens of one size, got {sizes}.")
    names = _names(sources)
    if any(source.train.start is not None for source in sources[:-1]):
        raise ValueError("A source with a shared start must be the last one.")
    shown = [source.features is not None for source in sources]
    if shown != sorted(shown, reverse=True):
        raise ValueError("Sources with examples of datasets must be in front of those without.")
    tokenizer = WeightTokenizer(sizes[0], [layout for s in sources for layout in s.tokenizer.to_dict()["layouts"]])
    parts = _parts(sources)
    first = range(len(sources)) if first is None else first
    targets, target_of, known = _targets(sources, parts, first)
    asked = {name: (source, own) for source, of in zip(sources, names, strict=True) for own, name in of.items()}

    def rows(zoos: Sequence[ZooTensors]) -> ZooTensors:
        return replace(_rows(zoos, parts), tasks=list(asked))

    def score(state_dicts: Sequence[Mapping[str, Tensor]], task: str) -> Tensor:
        source, own = asked[task]
        return source.score(state_dicts, own)

    def renamed(kept: str) -> dict:
        return {name: getattr(s, kept)[own] for name, (s, own) in asked.items() if own in getattr(s, kept)}

    return replace(
        sources[0],
        tokenizer=tokenizer,
        train=rows([source.train for source in sources]),
        held_out=rows([source.held_out for source in sources]),
        runs=[[part.rows.start + r for r in run] for s, part in zip(sources, parts, strict=True) for run in s.runs],
        target=targets[sum(len(source.targets or [source.target]) for source in sources[: first[0]])],
        targets=targets,
        target_of=target_of,
        known_tasks=known,
        thresholds={
            name: min(own.thresholds[name] for own in sources if name in own.thresholds)
            for source in sources
            for name in source.thresholds
        },
        score=score,
        validate=None,
        accuracies=None,
        task_steps=max(source.task_steps for source in sources),
        function_loss=_Dispatched.of([source.function_loss for source in sources], parts),
        task_loss=_Dispatched.of([source.task_loss for source in sources], parts),
        task_reconstruction=[weight for source in sources for weight in source.reconstruction_weights],
        task_learning_rate=min(source.task_learning_rate for source in sources),
        name_projection=next((s.name_projection for s in sources if s.name_projection is not None), None),
        majority=renamed("majority"),
        zoo_scores=renamed("zoo_scores"),
        samples=min(source.samples for source in sources),
        features=[own for source in sources for own in source.features or ()] or None,
        image_encoder=next((s.image_encoder for s in sources if s.image_encoder is not None), None),
    )


def _names(sources: Sequence[Source]) -> list[dict[str, str]]:
    """Of each source the names of its tasks, and their names among all: with that of the architecture where others have it too."""
    every = Counter(known["name"] for source in sources for known in source.known_tasks)
    names = []
    for source in sources:
        targets, own = source.targets or [source.target], {}
        for task, number in zip(source.train.tasks, source.targets_of_tasks, strict=True):
            name = targets[number].get("name")
            known = (one["name"] for one in source.known_tasks)
            base = next((one for one in known if task in (one, in_architecture(one, name))), task)
            own[task] = in_architecture(base, name) if every[base] > 1 else task
        names.append(own)
    told = [name for of in names for name in of.values()]
    if len(set(told)) < len(told):
        twice = next(name for name in told if told.count(name) > 1)
        raise ValueError(
            f"Two sources have the task {twice!r} in an architecture of the same name; leave one of them out."
        )
    return names


@dataclass(frozen=True)
class _Part:
    """What of the joined zoo comes in front of a source's, and how much of it is the source's own."""

    rows: range
    task: int
    layout: int
    token: int
    tokens: int
    all_tokens: int  # of all sources
    classes: int  # of this source
    all_classes: int

    def widened(self, tokens: Tensor) -> Tensor:
        """Side by side `(R, T + C, ...)`, from this source's places to those of all."""
        body, classes = tokens[:, : self.tokens], tokens[:, self.tokens :]
        wide = tokens.new_zeros(len(tokens), self.all_tokens + self.all_classes, *tokens.shape[2:])
        wide[:, self.token : self.token + self.tokens] = body
        wide[:, self.all_tokens : self.all_tokens + classes.shape[1]] = classes
        return wide

    def own(self, tokens: Tensor) -> Tensor:
        """Inverse of `widened`."""
        body, classes = tokens[:, self.token : self.token + self.tokens], tokens[:, self.all_tokens :]
        return torch.cat([body, classes[:, : self.classes]], 1)


def _parts(sources: Sequence[Source]) -> list[_Part]:
    tokens = [source.tokenizer.num_all_body_tokens for source in sources]
    classes = [source.train.class_mask.shape[1] for source in sources]
    parts, row, task, layout = [], 0, 0, 0
    for i, source in enumerate(sources):
        rows = range(row, row + len(source.train))
        parts.append(_Part(rows, task, layout, sum(tokens[:i]), tokens[i], sum(tokens), classes[i], max(classes)))
        row, task, layout = rows.stop, task + len(source.train.tasks), layout + len(source.tokenizer.layouts)
    return parts


def _rows(zoos: Sequence[ZooTensors], parts: Sequence[_Part]) -> ZooTensors:
    first, pairs = parts[0], list(zip(zoos, parts, strict=True))
    shares = torch.tensor([len(zoo) for zoo in zoos]).double().sqrt()

    def padded(tensor: Tensor, axis_from_last: int) -> Tensor:
        missing = first.all_classes - tensor.shape[-1 - axis_from_last]
        return F.pad(tensor, (0, 0) * axis_from_last + (0, missing))

    *_, (last, part) = pairs
    return ZooTensors(
        torch.cat([part.widened(zoo.weight_tokens) for zoo, part in pairs]),
        torch.cat([part.widened(zoo.padding_mask) for zoo, part in pairs]),
        torch.cat([part.task + zoo.task_of for zoo, part in pairs]),
        [task for zoo in zoos for task in zoo.tasks],
        [padded(embeds, 1) for zoo in zoos for embeds in zoo.class_embeds],
        torch.cat([padded(zoo.class_mask, 0) for zoo in zoos]),
        [embeds for zoo in zoos for embeds in zoo.prompt_embeds],
        [family for zoo in zoos for family in zoo.families],
        torch.cat([part.layout + zoo.layout_of for zoo, part in pairs]),
        None if last.start is None else part.rows.start + last.start,
        torch.cat([part.task + _datasets(zoo) for zoo, part in pairs]),
        odds=torch.cat([share * zoo.odds for share, zoo in zip(shares / shares.sum(), zoos, strict=True)]),
    )


def _datasets(zoo: ZooTensors) -> Tensor:
    """`(tasks,)`: each task's dataset."""
    return torch.arange(len(zoo.tasks)) if zoo.dataset_of is None else zoo.dataset_of


def _targets(
    sources: Sequence[Source], parts: Sequence[_Part], first: Sequence[int]
) -> tuple[list[dict], list[int], list[dict]]:
    """All targets, the number of that of each task, and known tasks with the numbers of theirs, one for all that have its name."""
    targets, target_of, known, source_of = [], [], {}, []
    for place, (source, part) in enumerate(zip(sources, parts, strict=True)):
        before = len(targets)
        own = source.targets or [{"layout": 0, **source.target}]
        targets += [{**target, "layout": part.layout + target["layout"]} for target in own]
        source_of += [place] * len(own)
        target_of += [before + number for number in source.targets_of_tasks]
        for task in source.known_tasks:
            same, numbers = known.get(task["name"]), [before + number for number in target_numbers(task)]
            if same is not None:
                task, numbers = same, sorted(target_numbers(same) + numbers, key=lambda n: first.index(source_of[n]))
            rest = {name: value for name, value in task.items() if name not in ("target", "targets")}
            known[task["name"]] = rest | ({"target": numbers[0]} if len(numbers) == 1 else {"targets": numbers})
    return targets, target_of, list(known.values())


class _Dispatched:
    """The loss of each source on its own rows of a batch: a mean over all of them."""

    def __init__(self, losses: Sequence[Callable | None], parts: Sequence[_Part]):
        self.losses, self.parts = losses, parts

    @classmethod
    def of(cls, losses: Sequence[Callable | None], parts: Sequence[_Part]) -> "_Dispatched | None":
        return cls(losses, parts) if any(losses) else None

    def __call__(self, tokens: Tensor, truth: Tensor, index: Tensor, random: StepRandom) -> Tensor:
        """See [`~training.objectives.vae_loss`]."""
        total = tokens.new_zeros(())
        for loss, part in zip(self.losses, self.parts, strict=True):
            rows = (index >= part.rows.start) & (index < part.rows.stop)
            if loss is not None and rows.any():
                own = loss(part.own(tokens[rows]), part.own(truth[rows]), index[rows] - part.rows.start, random)
                total = total + own * rows.sum() / len(index)
        return total

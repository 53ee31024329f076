"""What a call of a generator asks for: tasks in words, by examples or by both, their class names and their networks.

Notation: P prompts, E size of an embedding, C classes, n examples of a class, F size of a feature.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..targets.mixed import target_number
from .examples import channels_of, examples_of


UNIT = 0.02  # by which embeddings in half precision may miss a length of 1


@dataclass
class Request:
    """
    Args:
        prompts: As they were given; of a dataset its class names.
        embeds: `(P, E)`, of prompts and of examples together, unit length.
        of_prompts, of_dataset: `(P, E)` each, if there are any.
        labels: Class names of each prompt.
        class_embeds: `(1, C, E)`, if a dataset says what classes are; else it is the embedding of their names.
        nearest: Known tasks of each prompt, and their cosines.
        numbers: Of each prompt the place of its network among the generator's targets.
    """

    prompts: list[str]
    embeds: Tensor
    of_prompts: Tensor | None
    of_dataset: Tensor | None
    labels: list[list[str]]
    class_embeds: Tensor | None
    nearest: list[list[tuple[dict, float]]]
    numbers: list[int]


def read_request(
    pipe, size: int, prompt, labels, num_samples, generator, prompt_embeds, dataset, architecture
) -> Request:
    """
    Args:
        pipe: The generator.
        size: E.
        prompt, labels, ...: Of a call, see [`D2NWGPipeline`].

    Raises:
        TypeError, ValueError: If an argument does not fit.
    """
    if (prompt is None) == (prompt_embeds is None) and (dataset is None or prompt is not None):
        raise ValueError(
            "Give either `prompt` or `prompt_embeds`."
            if pipe.dataset_encoder is None
            else "Give `prompt`, `dataset`, or both."
        )
    if dataset is not None and labels is not None:
        raise ValueError("`dataset` names its classes itself; leave `labels` out.")
    if dataset is not None and (prompt_embeds is not None or not isinstance(prompt, (str, type(None)))):
        raise ValueError("Beside a `dataset` give one `prompt` or none, and no `prompt_embeds`.")
    if prompt_embeds is not None:
        shape = tuple(getattr(prompt_embeds, "shape", ()))
        if not isinstance(prompt_embeds, Tensor) or len(shape) != 2 or shape[1] != size or not shape[0]:
            raise ValueError(
                f"`prompt_embeds` must be a tensor of shape (prompts, {size}), got {type(prompt_embeds).__name__} {shape}."
            )
        if not prompt_embeds.isfinite().all():
            raise ValueError("`prompt_embeds` holds NaN or infinity; embed the prompts anew.")
        lengths = prompt_embeds.double().norm(dim=1)
        if (lengths - 1).abs().max() > UNIT:
            worst = lengths[(lengths - 1).abs().argmax()].item()
            raise ValueError(
                f"`prompt_embeds` must hold rows of length 1, as the generator's `encoder.embed` makes them, got {worst:.3g}."
            )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"`generator` must be one `torch.Generator`, from which every sample's own is seeded, got {type(generator).__name__}."
        )
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"`num_samples` must be a whole number of at least 1, got {num_samples!r}.")
    prompts = pipe.check_prompts(prompt) if prompt is not None else []
    names = pipe.check_labels(labels, len(prompts if prompt_embeds is None else prompt_embeds))
    of_prompts = pipe.encoder.embed(prompts) if prompts else prompt_embeds
    if of_prompts is not None and of_prompts.shape[1] != size:
        raise ValueError("This generator reads datasets, no prompts: give `dataset` alone.")
    of_dataset = class_embeds = channels = None
    if dataset is not None:
        names, of_dataset, class_embeds, channels = encode_dataset(pipe, dataset)
        names = [names]
    of_prompts = None if of_prompts is None else of_prompts.float().cpu()
    embeds = of_prompts if of_dataset is None else of_dataset
    if of_prompts is not None and of_dataset is not None:
        embeds = F.normalize(of_prompts + of_dataset, dim=-1)
    nearest = pipe.nearest_tasks(embeds, channels)
    if of_prompts is not None:
        prompts = prompts or ["(embedding)"] * len(of_prompts)
        of_texts = nearest if embeds is of_prompts else pipe.nearest_tasks(of_prompts, channels)
        for text, near in zip(prompts, of_texts, strict=True):
            pipe.warn_if_far(f"prompt {text[:80]!r}", near, "far_below")
    if of_dataset is not None:
        text = f"dataset of {', '.join(names[0])}"
        (near,) = nearest if embeds is of_dataset else pipe.nearest_tasks(of_dataset, channels)
        pipe.warn_if_far(text[:80], near, "datasets_above")
        prompts = prompts or [f"({text})"]
    names = names or [list(near[0][0]["labels"]) for near in nearest]
    numbers = [target_number(pipe.targets, near[0][0], architecture) for near in nearest]
    return Request(prompts, embeds, of_prompts, of_dataset, names, class_embeds, nearest, numbers)


def encode_dataset(pipe, dataset: object) -> tuple[list[str], Tensor, Tensor, int | None]:
    """
    Of a dataset, see [`examples_of`]: class names, its embedding `(1, E)`, those of its classes `(1, C, E)`, [`told_apart`] in a
    dataset of a known task, and the channels of its images, if it has any.
    """
    encoder = pipe.dataset_encoder
    if encoder is None:
        raise ValueError("This generator reads prompts, no datasets: it has no dataset encoder.")
    names, examples = examples_of(dataset)
    pipe.check_labels(names, 1)
    flat = [example for own in examples for example in own]
    kind = "texts" if pipe.config.image_encoder is None else "images"
    if isinstance(flat[0], Tensor) and flat[0].dim() == 1:
        size, sizes = encoder.config.feature_size, sorted({len(example) for example in flat})
        if sizes != [size]:
            raise ValueError(f"This generator reads features of size {size}, got {', '.join(map(str, sizes))}.")
        features = torch.stack(flat)  # (sum of n, F)
    elif isinstance(flat[0], str) != (kind == "texts"):
        raise TypeError(f"This generator reads datasets of {kind}, got {type(flat[0]).__name__}.")
    else:
        features = (pipe.encoder if kind == "texts" else pipe.image_encoder).embed(flat)
    counts = [len(own) for own in examples]
    padded = torch.nn.utils.rnn.pad_sequence(features.split(counts), batch_first=True)[None]  # (1, C, n, F)
    mask = (torch.arange(padded.shape[2]) < torch.tensor(counts)[:, None])[None]
    of_names = None
    if encoder.config.reads_names:
        of_names = pipe.encoder.embed(names)[None].to(encoder.device, encoder.dtype)
    of_dataset, of_classes = encoder.encode(
        padded.to(encoder.device, encoder.dtype), mask.to(encoder.device), of_names
    )
    if not (of_dataset.isfinite().all() and of_classes.isfinite().all()):
        raise ValueError("Features of `dataset` are NaN, infinite or beyond all measure; make them anew.")
    of_dataset, of_classes, channels = of_dataset.float().cpu(), of_classes.float(), channels_of(examples)
    task, cosine = pipe.nearest_tasks(of_dataset, channels)[0][0]
    is_known = cosine >= pipe.config["datasets_above"] and len(names) <= len(task["labels"])
    if is_known and not encoder.config.ridge:
        of_classes = told_apart(of_classes, pipe.encoder.embed(list(task["labels"])))
    return names, of_dataset, of_classes, channels


def told_apart(class_embeds: Tensor, known: Tensor) -> Tensor:
    """
    Classes of a dataset of a known task, as the known classes `(K, E)` of the assignment with the highest sum of cosines. From
    five examples each alone, two classes are now and then taken for the same one, which no two classes of a dataset are.

    Args:
        class_embeds (`torch.FloatTensor` of shape `(1, C, E)`): Unit length, C at most K.
    """
    known = known.to(class_embeds)
    _, of_known = linear_sum_assignment((class_embeds[0] @ known.mT).cpu().numpy(), maximize=True)
    return known[torch.from_numpy(of_known)][None]


def sample_generators(
    generator: torch.Generator | None, prompts: int, count: int
) -> tuple[list[int], list[torch.Generator]]:
    """Seeds and generators of `count` samples of each prompt; every sample's is seeded from its prompt's, that from the caller's."""
    of_prompt = [torch.Generator().manual_seed(_draw_seed(generator)) for _ in range(prompts)]
    seeds = [_draw_seed(own) for own in of_prompt for _ in range(count)]
    return seeds, [torch.Generator().manual_seed(seed) for seed in seeds]


def _draw_seed(generator: torch.Generator | None) -> int:
    return torch.randint(2**62, (), generator=generator).item()

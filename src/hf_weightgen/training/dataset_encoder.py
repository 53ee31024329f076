"""Training of the dataset encoder, and its datasets as further conditions of a generator.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), section 3.3. Each step shows other random examples of the zoo's
datasets, whose features were computed once.

Notation: b datasets of a batch; C classes, padded; n examples of a class; F size of a feature; E of an embedding.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.modeling_dataset_encoder import DatasetEncoder
from .batches import StepRandom, ZooTensors


FEWEST, MOST = 3, 10  # examples of a class in a step
SHOTS = 5
DRAWS = 64  # of each dataset, as conditions


def examples(features: Sequence[Tensor], tasks: Tensor, count: int, random: StepRandom, purpose: int = 50) -> Tensor:
    """
    Random examples of each class.

    Args:
        features: Per task `(C, pool, F)`, zeros in the place of classes that it does not have.
        tasks (`torch.LongTensor` of shape `(b,)`).

    Returns:
        `torch.FloatTensor` of shape `(b, C, count, F)`.
    """
    classes, pool, _ = features[0].shape
    picked = random.uniform(classes, pool, purpose=purpose).argsort(-1)[..., :count]  # (b, C, count)
    return torch.stack(
        [features[t].take_along_dim(rows[..., None], 1) for t, rows in zip(tasks.tolist(), picked, strict=True)]
    )


def dataset_loss(
    encoder: nn.Module, features: Sequence[Tensor], latents: Tensor, zoo: ZooTensors, random: StepRandom
) -> Tensor:
    """
    Alignment of datasets with weight latents (eq. 2), prompts and class names.

    Args:
        features: See [`examples`].
        latents (`torch.FloatTensor` of shape `(R, Z)`): Of the zoo's rows, in unit scale.
    """
    rows = zoo.draw_rows(random)
    tasks = zoo.task_of[rows]
    config, count = getattr(encoder, "module", encoder).config, SHOTS
    if config.pooling != "mlp":  # which reads one number of examples only
        count = FEWEST + int(random.shared_integers(MOST - FEWEST + 1, 1, purpose=52))
    shown = examples(features, tasks, count, random)
    return encoder(
        features=shown,
        example_mask=zoo.class_mask[tasks][..., None].expand(shown.shape[:3]),
        groups=tasks,
        latents=latents[rows],
        prompt_embeds=zoo.prompts(tasks, random),
        name_embeds=zoo.names(tasks, random),
    ).loss


@torch.no_grad()
def with_datasets(zoo: ZooTensors, encoder: DatasetEncoder, features: Sequence[Tensor], seed: int) -> ZooTensors:
    """The zoo with draws of its datasets as further prompts, and their classes as further wordings of the class names."""
    prompts, names = [], []
    for task in range(len(zoo.tasks)):
        tasks = torch.full((DRAWS,), task)
        shown = examples(features, tasks, SHOTS, StepRandom(seed, task, DRAWS, slice(None)), purpose=53)
        mask = zoo.class_mask[tasks][..., None].expand(shown.shape[:3])
        of_dataset, of_classes = encoder.encode(shown, mask)
        prompts.append(torch.cat([zoo.prompt_embeds[task], of_dataset]))
        names.append(torch.cat([zoo.class_embeds[task], of_classes * zoo.class_mask[task][:, None]]))
    return replace(zoo, prompt_embeds=prompts, class_embeds=names)

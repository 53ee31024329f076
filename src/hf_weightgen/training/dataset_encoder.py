"""Training of the dataset encoder, and its datasets as further conditions of a generator.

References: D2NWG (https://huggingface.co/papers/2402.18153), section 3.3, and appendix C.5 for an encoder that learns together
with the denoiser. Each step shows other random examples of the zoo's datasets, whose features were computed once.

Notation: b datasets of a batch; C classes, padded; n examples of a class; F size of a feature; E of an embedding.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.modeling_dataset_encoder import DatasetEncoder
from .batches import StepRandom, ZooTensors
from .objectives import WIDE_PROMPT_NOISE, diffusion_loss


FEWEST, MOST = 3, 10  # examples of a class in a step
SHOTS = 5
DRAWS = 256  # of each dataset, as conditions
REPEATS = 4  # of each text beside them, so that texts are asked often enough
ASKED = 0.5  # share of a batch that joint training asks for by prompts


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
    return encoder(
        **_shown(getattr(encoder, "module", encoder), features, zoo, tasks, random),
        groups=tasks if zoo.dataset_of is None else zoo.dataset_of[tasks],
        latents=latents[rows],
        prompt_embeds=zoo.prompts(tasks, random),
    ).loss


class JointDenoiser(nn.Module):
    """
    Denoiser and dataset encoder that learn together: the denoiser's loss alone tells what a dataset's embedding should be.

    Class embeddings still learn to match the class names, which the autoencoder reads. Prompts and weight latents are not
    aligned with datasets: neither ranks networks for a dataset, see [`DatasetEncoder.latent_embeds`].
    """

    def __init__(self, denoiser: nn.Module, encoder: DatasetEncoder):
        super().__init__()
        self.denoiser, self.encoder = denoiser, encoder
        encoder.latent_projection.requires_grad_(False)  # it has no part in the loss

    def forward(
        self,
        scheduler,
        latents: Tensor,
        log_std: Tensor,
        features: Sequence[Tensor],
        zoo: ZooTensors,
        random: StepRandom,
    ) -> Tensor:
        """Arguments as in [`~training.objectives.diffusion_loss`] and [`dataset_loss`]; some rows are asked for by prompts."""
        tasks = zoo.task_of[zoo.draw_rows(random)]
        output = self.encoder(**_shown(self.encoder, features, zoo, tasks, random))
        asked = random.uniform(1, purpose=54) < ASKED
        conditions = torch.where(asked, zoo.prompts(tasks, random, WIDE_PROMPT_NOISE), output.dataset_embeds)
        return output.loss + diffusion_loss(self.denoiser, scheduler, latents, log_std, zoo, random, conditions)


def _shown(
    encoder: DatasetEncoder, features: Sequence[Tensor], zoo: ZooTensors, tasks: Tensor, random: StepRandom
) -> dict[str, Tensor]:
    """What the encoder sees of some tasks in a step, with their class names."""
    count = SHOTS
    if encoder.config.pooling != "mlp":  # which reads one number of examples only
        count = FEWEST + int(random.shared_integers(MOST - FEWEST + 1, 1, purpose=52))
    shown = examples(features, tasks, count, random)
    mask = zoo.class_mask[tasks][..., None].expand(shown.shape[:3])
    return {"features": shown, "example_mask": mask, "name_embeds": zoo.names(tasks, random)}


@torch.no_grad()
def with_datasets(zoo: ZooTensors, encoder: DatasetEncoder, features: Sequence[Tensor], seed: int) -> ZooTensors:
    """
    The zoo with draws of its datasets as further prompts, and their classes as further wordings of the class names. The texts
    come [`REPEATS`] times, then the draws.
    """
    prompts, names = [], []
    for task in range(len(zoo.tasks)):
        tasks = torch.full((DRAWS,), task)
        shown = examples(features, tasks, SHOTS, StepRandom(seed, task, DRAWS, slice(None)), purpose=53)
        mask = zoo.class_mask[tasks][..., None].expand(shown.shape[:3])
        of_dataset, of_classes = encoder.encode(shown, mask)
        of_classes = of_classes * zoo.class_mask[task][:, None]
        prompts.append(torch.cat([zoo.prompt_embeds[task].repeat(REPEATS, 1), of_dataset]))
        names.append(torch.cat([zoo.class_embeds[task].repeat(REPEATS, 1, 1), of_classes]))
    return replace(zoo, prompt_embeds=prompts, class_embeds=names)

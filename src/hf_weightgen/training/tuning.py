"""A last lesson for the decoder: networks that the whole generator makes see images of their tasks, and it learns from their errors.

While the autoencoder trains, decoded networks come from latents of the zoo's members. In use they come from latents that the
denoiser samples for prompts and examples, and carry the decoder's noise. Here the decoder alone learns on those, end to end, as
Text-to-LoRA does (https://huggingface.co/papers/2506.06105, section 3.2). Latents are sampled once, since nothing changes what
makes them.

Notation: N sampled latents of a task, b of a batch; Z numbers of a latent; C classes; E size of an embedding; T body tokens, S scalars
of a token.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.modeling_weight_vae import SMALLEST_STD, WeightVAE
from ..targets.architectures import TargetConfig, TargetModel
from ..targets.mixed import target_numbers
from ..targets.stacked import stacked_logits
from ..targets.symmetry import BUFFERS
from ..targets.tasks import TaskSpec
from ..zoo.images import ImageData
from .batches import StepRandom
from .dataset_encoder import SHOTS, examples
from .function_loss import BatchDecoder
from .network_source import features


DRIFT, NOISE, LESS = 0.03, 0.2, 20.0  # weights of what keeps the decoder near the one it was
FIXED = ("token_in", "body_in", "class_in", "class_set", "to_latent", "match_")  # parameters that decode nothing


@dataclass
class TunedTask:
    """
    Args:
        latents: `(N, Z)`, scaled, as the denoiser samples them.
        class_embeds: `(N, C, E)`, of the condition that each of them was sampled for.
        data: The task's images, scaled as its networks read them.
        architecture: Of the networks, where the task has several.
    """

    spec: TaskSpec
    config: TargetConfig
    decoder: BatchDecoder
    latents: Tensor
    class_embeds: Tensor
    data: ImageData
    architecture: str | None

    @functools.cached_property
    def inputs(self) -> Tensor:
        """Training images as the networks read them: `(n, *input_shape)`."""
        return self.data.inputs(self.data.train)

    @functools.cached_property
    def scalars(self) -> tuple[Tensor, Tensor]:
        """Places among all scalars of `(T + C, S)` tokens that are weights of the network, and the stds that they are told in."""
        places = [place.flatten() for place in self.decoder.place.values()]
        return torch.cat(places), torch.cat([std.flatten() for std in self.decoder.std.values()])


class NoisyDecoder(nn.Module):
    """p(w|z) of an autoencoder, of which nothing else is trained; `token_bias`, which the encoder subtracts, is a part of it."""

    def __init__(self, vae: WeightVAE):
        super().__init__()
        self.vae = vae
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(not name.startswith(FIXED))

    def forward(self, latents: Tensor, class_embeds: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.likelihood(latents, class_embeds)


def tuned_tasks(pipe, spec: TaskSpec, data: ImageData, conditions: int, seed: int) -> list[TunedTask]:
    """
    A known task, once for each architecture that it has: as many latents for prompts as for datasets of a few training images
    of each class.

    Args:
        pipe: A [`D2NWGPipeline`] of networks on images.
        data: Images in the size that the networks read.

    Raises:
        ValueError: If the generator does not know the task, or makes parts of networks.
    """
    encoder, known = pipe.dataset_encoder, {task["name"]: task for task in pipe.config.tasks}
    if spec.name not in known:
        raise ValueError(f"The generator does not know the task {spec.name!r}, only {list(known)}.")
    prompts = [spec.prompts[i % len(spec.prompts)] for i in range(conditions)]
    embeds = pipe.encoder.embed(prompts)
    # a dataset of a known task has the embeddings of its class names too, see `told_apart`
    class_embeds = pipe.encoder.embed(list(spec.labels))[None]
    if encoder is not None:
        pool = features(pipe.image_encoder, data.train, len(spec.labels))  # (C, pool, F)
        draws = StepRandom(seed, 0, conditions, slice(None))
        seen = examples([pool], torch.zeros(conditions, dtype=torch.long), SHOTS, draws)  # (conditions, C, k, F)
        mask = torch.ones(seen.shape[:3], dtype=torch.bool)
        names = class_embeds.expand(conditions, -1, -1) if encoder.config.reads_names else None
        with torch.no_grad():
            shown, _ = encoder.encode(seen, mask, names)
        embeds = torch.cat([embeds, shown])
    numbers, tuned = target_numbers(known[spec.name]), []
    generator = torch.Generator().manual_seed(seed)
    for number in numbers:
        target = pipe.targets[number]
        settings, architecture = target["config"], target["name"] if len(numbers) > 1 else None
        config = TargetConfig(**settings, num_classes=len(spec.labels))
        decoder = BatchDecoder(pipe.weight_tokenizer, len(spec.labels), target["layout"])
        read = {name for name in TargetModel(config).state_dict() if not name.endswith(BUFFERS[2])}
        if missing := read - decoder.place.keys():
            raise ValueError(f"Of networks for {spec.name!r} only a part is generated, without {sorted(missing)[:3]}.")
        asked = {"prompt_embeds": embeds, "labels": list(spec.labels), "architecture": architecture}
        latents = pipe(**asked, generator=generator, output_type="latent").latents.flatten(1)
        tuned.append(
            TunedTask(
                spec,
                config,
                decoder,
                latents,
                class_embeds.expand(len(latents), -1, -1),
                replace(data, mean=settings["image_mean"], std=settings["image_std"]),
                architecture,
            )
        )
    return tuned


def tuning_loss(
    model: nn.Module,
    start: WeightVAE,
    tasks: Sequence[TunedTask],
    random: StepRandom,
    images: int = 128,
    spread: float = 1.0,
) -> Tensor:
    """
    Cross-entropy of sampled networks of one task, which steps take in turn, on images of its train split.

    Args:
        model: [`NoisyDecoder`].
        start: The autoencoder as it was, near which the decoder stays.
        images: That each network of a step sees.
        spread: The noise of a network's weights shall be at least so many times as long as it was. Without that, the decoder
            would learn to make one network.
    """
    task = tasks[random.step % len(tasks)]
    rows = random.integers(len(task.latents))
    given = task.latents[rows], task.class_embeds[rows]
    tokens, stds = model(*given)
    stds = stds.expand_as(tokens)
    noise = start.config.noise_scale * stds * random.normal(*tokens.shape[1:], purpose=80)
    labels = task.data.train.labels
    seen = random.shared_integers(len(labels), images)
    logits = stacked_logits(task.config, task.decoder(tokens + noise), task.inputs[seen][None])
    loss = F.cross_entropy(logits.flatten(0, 1), labels[seen].repeat(len(logits)))

    places, sizes = task.scalars
    with torch.no_grad():
        first_tokens, first_stds = (own.expand_as(tokens).flatten(1)[:, places] for own in start.likelihood(*given))
    tokens, stds = (own.flatten(1)[:, places] for own in (tokens, stds))
    stds, first_stds = stds.clamp(min=SMALLEST_STD), first_stds.clamp(min=SMALLEST_STD)  # calibrated noise may be none
    less = (spread - (stds * sizes).norm(dim=1) / (first_stds * sizes).norm(dim=1)).clamp(min=0)
    kept = DRIFT * F.mse_loss(tokens, first_tokens) + NOISE * F.mse_loss(stds.log(), first_stds.log())
    return loss + kept + LESS * less.square().mean()

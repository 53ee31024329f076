"""Losses that involve more than one network or the target: VAE with function-space reconstruction, latent diffusion.

References: D2NWG (https://huggingface.co/papers/2402.18153), eq. 1 (VAE), eq. 5 (latent noise prediction); v-prediction:
Salimans and Ho (https://huggingface.co/papers/2202.00512), appendix D; flow matching: Lipman et al.
(https://huggingface.co/papers/2210.02747), eq. 23 with sigma_min = 0.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..targets.mixed import with_architecture
from .batches import StepRandom, ZooTensors


CLASSES_PER_STEP = 20  # of each checkpoint, at random; the loss is the same on average
WIDE_PROMPT_NOISE = 0.6  # of the denoiser: phrasings never seen lose less than at the default, known ones nothing
NOISE_RAMP = 2000  # steps with a function loss until learned noise is whole
PROMPT_DROPOUT = 0.1  # share of a batch trained without its prompt, for classifier-free guidance


def vae_loss(
    vae: nn.Module,
    zoo: ZooTensors,
    random: StepRandom,
    function_loss: Callable | None = None,
    reconstruction_weight: float | Sequence[float] = 1.0,
) -> Tensor:
    """
    Eq. 1 on a batch, with the compatibility of prompts and class names. With learned noise, function losses see samples of p(w|z).

    Args:
        function_loss: `(reconstructed tokens, true tokens, row numbers, step's random) -> scalar`: how far the outputs of
            the decoded networks are from the originals'. Weight-space error says little about accuracy.
        reconstruction_weight: Of weight-space error beside it, or one for each task.
    """
    rows = zoo.draw_rows(random)
    tasks = zoo.task_of[rows]
    other = zoo.other_tasks(tasks, random)
    config = getattr(vae, "module", vae).config
    T = config.num_body_tokens
    most = zoo.class_mask.shape[1] if function_loss else CLASSES_PER_STEP
    shown, foreign = zoo.classes(tasks, most, random), zoo.classes(other, most, random, purpose=18)
    pick = torch.cat([torch.arange(T).expand(len(rows), T), T + shown], 1)  # body tokens and the classes of this step
    output = vae(
        weight_tokens=_take(zoo.weight_tokens[rows], pick),
        padding_mask=_take(zoo.padding_mask[rows], pick),
        class_embeds=_take(zoo.names(tasks, random), shown),
        class_mask=_take(zoo.class_mask[tasks], shown),
        noise=random.normal(torch.Size(config.latent_shape).numel()),
        prompt_embeds=zoo.prompts(tasks, random),
        other_embeds=_take(zoo.names(other, random, purpose=16), foreign),
        other_mask=_take(zoo.class_mask[other], foreign),
        zoo_stds=_take(zoo.stds[tasks], pick) if config.learns_noise else None,
    )
    if function_loss is None:
        return output.loss
    in_order = torch.cat([torch.arange(T).expand(len(rows), T), T + shown.argsort(1)], 1)
    decoded = _take(output.weight_tokens, in_order)
    if config.learns_noise:
        scale = config.noise_scale * min(1.0, random.step / NOISE_RAMP)
        noise = random.normal(*decoded.shape[1:], purpose=24)
        decoded = decoded + scale * _take(output.token_stds, in_order) * noise
    loss = output.loss + ((weights_of(reconstruction_weight, tasks) - 1) * output.reconstruction_errors).mean()
    return loss + function_loss(decoded, zoo.weight_tokens[rows], rows, random)


def weights_of(weight: float | Sequence[float], tasks: Tensor) -> Tensor:
    """Of each row of a batch, `(b,)`, of tasks `(b,)`: one weight for all, or that of its task."""
    return torch.tensor(
        [weight] * len(tasks) if isinstance(weight, (int, float)) else [weight[t] for t in tasks.tolist()]
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`values[b, index[b]]` for each b of the batch: `(b, n, ...)` and `(b, k)` to `(b, k, ...)`."""
    return values[torch.arange(len(values))[:, None], index]


def diffusion_loss(
    denoiser: nn.Module,
    scheduler,
    latents: Tensor,
    log_std: Tensor,
    zoo: ZooTensors,
    random: StepRandom,
    conditions: Tensor | None = None,
) -> Tensor:
    """
    Eq. 5 on a batch of posterior samples; `scheduler.config.prediction_type` decides what the denoiser predicts.

    Where the prompt is dropped, the zoo's shared start is what shall be generated (or any row, if there is none).
    Guidance then moves along the way from the start to the task's weights: 0 is the start, 1 the task's. The architecture is
    never dropped: decoders of other ones could not read what is generated.

    Args:
        latents, log_std (`torch.FloatTensor` of shape `(R, channels, height, width)`): Posterior means in unit scale,
            and the logarithms of the posterior stds in the same scale.
        conditions (`torch.FloatTensor` of shape `(b, E)`, *optional*): Of the rows that the step draws. Default: prompts.
    """
    rows = zoo.draw_rows(random)
    tasks = zoo.task_of[rows]
    prompts = zoo.prompts(tasks, random, WIDE_PROMPT_NOISE) if conditions is None else conditions
    dropped = random.uniform(purpose=6) < PROMPT_DROPOUT
    prompts = prompts * (~dropped)[:, None]
    if zoo.architecture_codes is not None:
        prompts = with_architecture(prompts, zoo.architecture_codes[tasks])
    if zoo.start is not None:
        rows = torch.where(dropped, zoo.start, rows)
    shape = latents.shape[1:]
    clean = latents[rows] + log_std[rows].exp() * random.normal(*shape, purpose=4)
    noise = random.normal(*shape, purpose=5)
    noisy, timesteps, target = noised(scheduler, clean, noise, random.uniform(purpose=7))
    return F.mse_loss(denoiser(noisy, timesteps, encoder_hidden_states=None, class_labels=prompts).sample, target)


def noised(scheduler, clean: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their timesteps `(b,)` and the denoiser's target, for `uniform` `(b,)` in [0, 1)."""
    steps = scheduler.config.num_train_timesteps
    kind = scheduler.config.get("prediction_type", "flow_prediction")  # flow schedulers have no such entry
    if kind == "flow_prediction":
        sigma = uniform[:, None, None, None]
        return (1 - sigma) * clean + sigma * noise, uniform * steps, noise - clean
    timesteps = (uniform * steps).long()
    noisy = scheduler.add_noise(clean, noise, timesteps)
    if kind == "v_prediction":
        return noisy, timesteps, scheduler.get_velocity(clean, noise, timesteps)
    if kind == "epsilon":
        return noisy, timesteps, noise
    raise ValueError(
        f"`prediction_type` {kind!r} cannot be trained; choose 'epsilon', 'v_prediction' or a flow-matching scheduler."
    )

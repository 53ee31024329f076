"""The stages of D2NWG between a zoo and a pipeline: gate, latents, calibration.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), sections 3.2 ("the quality of reconstruction is assessed by
evaluating the reconstructed weights") and 3.4. The gate and the calibration are ours.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from ..models.modeling_denoiser import WeightDenoiser
from ..models.modeling_weight_vae import WeightVAE
from .batches import ZooTensors


MEAN_LOSS, WORST_LOSS = (
    0.5,
    2.0,
)  # points of accuracy that reconstruction may cost: over all counted tasks, on any of them
FAR, DEVIATIONS = 1.5, 10  # of a latent that is not learned, see `usual_rows`


class GateError(RuntimeError):
    """Reconstruction costs too much accuracy for the second stage to make sense."""


@torch.no_grad()
def reconstruct(vae: WeightVAE, zoo: ZooTensors, batch_size: int = 64) -> Tensor:
    """Decoded posterior means of all rows: `(R, T + C, S)`."""
    out = []
    for rows in torch.arange(len(zoo)).split(batch_size):
        tasks = zoo.task_of[rows]
        embeds = torch.stack([zoo.class_embeds[t][0] for t in tasks.tolist()])
        mean, _ = vae.encode(zoo.weight_tokens[rows], embeds, zoo.class_mask[tasks])
        out.append(vae.decode(mean, embeds))
    return torch.cat(out)


@torch.no_grad()
def encode(vae: WeightVAE, zoo: ZooTensors, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Posterior means and log stds `(R, Z)` of all rows, in the encoder's own scale."""
    means, log_stds = [], []
    for rows in torch.arange(len(zoo)).split(batch_size):
        tasks = zoo.task_of[rows]
        embeds = torch.stack([zoo.class_embeds[t][0] for t in tasks.tolist()])
        mean, log_variance = vae.encode(zoo.weight_tokens[rows], embeds, zoo.class_mask[tasks])
        means.append(mean)
        log_stds.append(0.5 * log_variance)
    return torch.cat(means), torch.cat(log_stds)


def scaled_latents(vae: WeightVAE, zoo: ZooTensors) -> tuple[Tensor, Tensor]:
    """What the denoiser learns: means in unit scale and log stds in that scale, `(R, channels, height, width)`."""
    means, log_stds = encode(vae, zoo)
    shape = tuple(vae.config.latent_shape)
    return vae.scale(means).unflatten(1, shape), (log_stds - vae.latent_std.log()).unflatten(1, shape)


def usual_rows(latents: Tensor, zoo: ZooTensors) -> Tensor:
    """
    `True` for rows whose latents are not much farther from zero than others of their task, `(R,)`. The autoencoder may push a
    few members that it learned by heart far out; a denoiser that learns them too makes latents between them and the
    others, which are those of no network.

    Far is beyond 1.5 times the median norm of the task, and beyond ten of its median absolute deviations: along a
    trajectory norms differ much, and where a task has a few rows, their deviations may be small by chance.

    Args:
        latents (`torch.FloatTensor` of shape `(R, channels, height, width)`): Posterior means in unit scale.
    """
    norms, usual = latents.flatten(1).norm(dim=1), torch.ones(len(zoo), dtype=torch.bool)
    for task in range(len(zoo.tasks)):
        rows = zoo.rows_of(task)
        middle = norms[rows].median()
        deviation = (norms[rows] - middle).abs().median()
        usual[rows] = norms[rows] <= torch.maximum(FAR * middle, middle + DEVIATIONS * deviation)
    return usual


def check_gate(original: Mapping[str, float], reconstructed: Mapping[str, float]) -> dict:
    """
    Accuracy (0 to 1) of held-out members and of their reconstructions, by counted task.

    Returns:
        `dict` with `mean_loss`, `worst_loss` in points and `worst_task`.

    Raises:
        GateError: If reconstruction costs more than 0.5 points on average or 2 on one task, or no task counts.
    """
    if not original:
        raise GateError(
            "There is no task whose held-out members are clearly better than the majority class, so reconstruction cannot be "
            "judged: train the zoo longer or add tasks. `--skip-gate` goes on anyway and says so in the card."
        )
    loss = {task: 100 * (original[task] - reconstructed[task]) for task in original}
    worst = max(loss, key=loss.get)
    result = {
        "mean_loss": sum(loss.values()) / len(loss),
        "worst_loss": loss[worst],
        "worst_task": worst,
        "losses": loss,
    }
    if result["mean_loss"] > MEAN_LOSS or result["worst_loss"] > WORST_LOSS:
        raise GateError(
            f"Reconstructed members lose {result['mean_loss']:.2f} points on average (at most {MEAN_LOSS} wanted) and "
            f"{loss[worst]:.2f} on {worst!r} (at most {WORST_LOSS}). A generator over these latents cannot be better: train the "
            "autoencoder longer, widen it, or add rows to the zoo. `--skip-gate` goes on anyway and says so in the card."
        )
    return result


def fit_latent_scale(vae: WeightVAE, means: Tensor, log_stds: Tensor) -> None:
    """Sets `latent_mean` and `latent_std` so that posterior samples have mean 0 and std 1 in every dimension."""
    vae.latent_mean.copy_(means.mean(0))
    vae.latent_std.copy_((means.var(0) + (2 * log_stds).exp().mean(0)).sqrt().clamp(min=1e-4))


def calibrate_noise(
    vae: WeightVAE, zoo: ZooTensors, generated: Sequence[Tensor], runs: Sequence[Sequence[int]]
) -> dict:
    """
    Sets the observation noise so that generated weights vary within a task as much as independent runs do.

    Per token, noise variance = variance between the zoo's runs of a task - variance between noiseless samples of the
    task, averaged over tasks and never below 0.

    Args:
        generated: per task of `zoo.tasks`, tokens of noiseless samples `(N, T + C, S)`.
        runs: per task, one row number per independent run (a run's sibling checkpoints are no independent members).

    Returns:
        `dict`: the share of the zoo's variance that noise adds, for body and class tokens.
    """
    T = vae.config.num_body_tokens
    body_zoo, body_gen, class_zoo, class_gen = [], [], [], []
    for task, samples in enumerate(generated):
        members = zoo.weight_tokens[torch.tensor(runs[task])]
        mask = zoo.padding_mask[runs[task][0]].to(members.dtype)  # (T + C, S)
        count = mask.sum(-1).clamp(min=1)
        spread_zoo = (members.var(0) * mask).sum(-1) / count  # (T + C,)
        classes = int(zoo.class_mask[task].sum())
        rows = samples[:, T : T + classes]
        samples = torch.cat([samples[:, :T], rows - rows.mean(1, keepdim=True)], 1)
        spread_gen = (samples.var(0) * mask[: T + classes]).sum(-1) / count[: T + classes]
        body_zoo.append(spread_zoo[:T])
        body_gen.append(spread_gen[:T])
        kept = 1 - 1 / classes  # of independent noise, once the mean over classes is taken out
        class_zoo.append(spread_zoo[T : T + classes].mean() / kept)
        class_gen.append(spread_gen[T : T + classes].mean() / kept)
    present = (torch.stack(body_zoo) > 0).sum(0).clamp(min=1)  # tasks whose layout has the token
    body_zoo, body_gen = (torch.stack(spread).sum(0) / present for spread in (body_zoo, body_gen))
    class_zoo, class_gen = torch.stack(class_zoo).mean(), torch.stack(class_gen).mean()
    vae.body_noise.copy_((body_zoo - body_gen).clamp(min=0).sqrt())
    vae.class_noise.copy_((class_zoo - class_gen).clamp(min=0).sqrt())
    return {
        "body": (vae.body_noise.square().mean() / body_zoo.mean()).item(),
        "class": (vae.class_noise.square() / class_zoo).item(),
    }


def make_denoiser(kind: str) -> torch.nn.Module:
    """`"mlp"`: [`WeightDenoiser`]; `"unet"`: a small U-Net of diffusers, which reads the latent as an image (section 3.4)."""
    if kind == "mlp":
        return WeightDenoiser()
    return UNet2DConditionModel(  # no cross-attention: the prompt is added to the time embedding
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type="UNetMidBlock2D",
        class_embed_type="projection", projection_class_embeddings_input_dim=384, cross_attention_dim=32,
    )  # fmt: skip


def make_schedulers(prediction_type: str):
    """The scheduler that training draws noise with, and the few-step one that the pipeline is saved with."""
    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()
    training = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False
    )
    # fresh noise at each step corrects most latents that run away with a deterministic solver
    return training, DPMSolverMultistepScheduler.from_config(training.config, algorithm_type="sde-dpmsolver++")

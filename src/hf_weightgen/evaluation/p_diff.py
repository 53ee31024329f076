"""p-diff at small size: a noise-augmented autoencoder over flattened networks, and diffusion over its latents.

Reference: Neural Network Diffusion (https://huggingface.co/papers/2402.13144), with the settings that its second release has
for whole networks: 1-D convolutions with kernels of 7, noise of 0.001 on the input and of 0.1 on the latent, no KL term, a
denoiser that reads the latent as a signal, 1,000 steps of DDPM with a linear schedule.

Ours: an eighth of the channels, half the latent, and 1,600 batches of 16 at a larger learning rate in the place of 10,000 of 50,
so that a CPU is done in about half a minute; latents in unit std; one mean and std per tensor over all members. It knows one
task, and members should come aligned.

Notation used for shapes: b rows of a batch; L scalars of a padded network; Z scalars of a latent.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from .baselines import StateDict, from_vectors, vectors


CHANNELS = (8, 16, 32, 32, 8)  # of the encoder; each halves the signal
DENOISER = (16, 32, 64, 32, 16)
LATENT, KERNEL, TIME = 128, 7, 64
INPUT_NOISE, LATENT_NOISE = 0.001, 0.1
BATCH = 16


def p_diff(
    members: Sequence[StateDict],
    n: int,
    generator: torch.Generator,
    vae_steps: int = 400,
    steps: int = 1200,
    timesteps: int = 1000,
) -> list[dict[str, Tensor]]:
    """
    n draws of p-diff, trained on `members`.

    Args:
        members (sequence of state dicts): Of one layout; several, as one has no spread.
        vae_steps, steps (`int`): Of the autoencoder and of the denoiser, in batches of 16.
        timesteps (`int`): Of the diffusion; all of them are gone through in sampling.

    Raises:
        ValueError: If there are fewer than 2 members.
    """
    if len(members) < 2:
        raise ValueError(f"p-diff learns from 2 members or more, got {len(members)}.")
    mean, std = _of_tensors(members)
    scalars = ((vectors(members) - mean) / std).float()
    data = F.pad(scalars, (0, -scalars.shape[1] % 2 ** len(CHANNELS)))  # (members, L)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        vae, denoiser = _Autoencoder(data.shape[1]), _Denoiser()

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    def reconstruction_loss(rows: Tensor) -> Tensor:
        rows = rows + INPUT_NOISE * draw(rows)
        latents = vae.encode(rows)
        return F.mse_loss(vae.decode(latents + LATENT_NOISE * draw(latents)), rows)

    _fit(vae, reconstruction_loss, data, vae_steps, generator)
    with torch.no_grad():
        latents = vae.encode(data)  # (members, Z)
    centre, scale = latents.mean(0), latents.std()
    scheduler = DDPMScheduler(timesteps, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)

    def noise_loss(rows: Tensor) -> Tensor:
        noise, t = draw(rows), torch.randint(len(scheduler), (len(rows),), generator=generator)
        return F.mse_loss(denoiser(scheduler.add_noise(rows, noise, t), t), noise)

    _fit(denoiser, noise_loss, (latents - centre) / scale, steps, generator)
    scheduler.set_timesteps(len(scheduler))
    x = torch.randn(n, LATENT, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t.expand(n)), t, x, generator=generator).prev_sample
        made = vae.decode(x * scale + centre)[:, : scalars.shape[1]]
    return from_vectors(made.double() * std + mean, members[0])


class _Autoencoder(nn.Module):
    """Networks `(b, L)` to latents `(b, Z)` and back."""

    def __init__(self, length: int):
        super().__init__()
        last, self.shape = length // 2 ** len(CHANNELS), (CHANNELS[-1], length // 2 ** len(CHANNELS))
        down = [_down(a, b) for a, b in pairwise((1, *CHANNELS))]
        self.encode = nn.Sequential(
            nn.Unflatten(1, (1, length)), *down, nn.Flatten(), nn.Linear(CHANNELS[-1] * last, LATENT), nn.Linear(LATENT, LATENT)
        )  # fmt: skip
        up = [_up(a, b) for a, b in pairwise((*CHANNELS[::-1], CHANNELS[0]))]
        self.decode = nn.Sequential(
            nn.Linear(LATENT, CHANNELS[-1] * last), nn.Unflatten(1, self.shape), *up,
            nn.Conv1d(CHANNELS[0], 1, KERNEL, padding=KERNEL // 2), nn.Flatten(),
        )  # fmt: skip


def _down(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(a, b, KERNEL, 2, KERNEL // 2), nn.BatchNorm1d(b), nn.LeakyReLU())


def _up(a: int, b: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(a, b, KERNEL, 2, KERNEL // 2, output_padding=1), nn.BatchNorm1d(b), nn.ELU()
    )


class _Denoiser(nn.Module):
    """The noise of latents `(b, Z)` at timesteps `(b,)`: a stack of convolutions along the latent, with time added before each."""

    def __init__(self):
        super().__init__()
        stages = list(pairwise((1, *DENOISER)))
        self.time = nn.ModuleList(nn.Linear(TIME, LATENT) for _ in stages)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, KERNEL, padding=KERNEL // 2), nn.BatchNorm1d(b), nn.ELU()) for a, b in stages
        )
        self.out = nn.Conv1d(DENOISER[-1], 1, KERNEL, padding=KERNEL // 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, x = get_timestep_embedding(t, TIME), x[:, None]  # (b, 1, Z)
        for embed, stage in zip(self.time, self.stages, strict=True):
            x = stage(x + embed(time)[:, None])
        return self.out(x)[:, 0]


def _fit(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], data: Tensor, steps: int, generator: torch.Generator
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        loss = loss_of(data[torch.randint(len(data), (BATCH,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _of_tensors(members: Sequence[StateDict]) -> tuple[Tensor, Tensor]:
    """Mean and std of each tensor over all members, at each of its scalars: `(D,)` each."""
    means, stds = [], []
    for name, tensor in members[0].items():
        if tensor.is_floating_point():
            values = torch.stack([member[name].double() for member in members])
            means.append(values.mean().expand(tensor.numel()))
            stds.append(values.std().clamp(min=1e-8).expand(tensor.numel()))
    return torch.cat(means), torch.cat(stds)

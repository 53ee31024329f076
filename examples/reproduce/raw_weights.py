"""Diffusion over an autoencoder's latents beside diffusion over the weights themselves (D2NWG Figure 6b, appendix C.4).

    python examples/reproduce/raw_weights.py --out raw_weights.json                    # networks on scikit-learn's digits
    python examples/reproduce/raw_weights.py --zoo runs/images --out raw_weights.json

In-distribution samples, from prompts. Replaced: heads on 1,000 subsets of ImageNet, of which three are sampled, by the tasks of a
zoo of whole small networks. All denoisers have the same blocks, steps and batches; `raw_wide` is four times as wide, since the
paper supposes that raw weights need more capacity. `latent` has an autoencoder that learns what networks do too, as this library
trains it, `latent_of_weights` one that learns weights alone. Weights are brought to mean 0 and std 1 scalar by scalar.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from command import typed
from torch import Tensor

from hf_weightgen.evaluation.table import write_results
from hf_weightgen.models.modeling_denoiser import WeightDenoiser
from hf_weightgen.models.modeling_weight_vae import WeightVAE, WeightVAEConfig
from hf_weightgen.targets.base_models import MINILM, load_encoder
from hf_weightgen.targets.image_encoders import MOBILENET, load_image_encoder
from hf_weightgen.training.d2nwg import encode, fit_latent_scale, make_schedulers, scaled_latents
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.network_source import network_source
from hf_weightgen.training.objectives import diffusion_loss, vae_loss
from hf_weightgen.training.sources import decode_rows, digits_source


STEPS = 20  # of the sampler
WIDTH, WIDE = 256, 1024
PAPER = "paper, Figure 6b: a picture without figures; VAE+DDPM near the pretrained heads, DDPM on weights far below on all three"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", help="Folder or Hub id of a zoo on images. Default: digits.")
    parser.add_argument("--data_root", help="Folder with datasets under their Hub ids.")
    parser.add_argument("--image_encoder", default=MOBILENET, help="Id, or folder of a local copy.")
    parser.add_argument("--networks", type=int, default=1024, help="Networks per digit task.")
    parser.add_argument("--vae_steps", type=int)
    parser.add_argument("--max_train_steps", type=int, help="Steps of each denoiser.")
    parser.add_argument("--n", type=int, default=50, help="Samples per task.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    accelerator, encoder = Accelerator(cpu=True), load_encoder(MINILM)
    if args.zoo is None:
        source = digits_source(encoder, args.networks, args.seed)
    else:
        source = network_source(encoder, load_image_encoder(args.image_encoder), [args.zoo], args.data_root)
    zoo, rows = source.train, []
    noise_scheduler, scheduler = make_schedulers("v_prediction")

    def loop(steps: int, **settings) -> LoopConfig:
        return LoopConfig(args.out.parent, steps, seed=args.seed, **settings)

    def fit_vae(functions: bool) -> WeightVAE:
        torch.manual_seed(args.seed)
        sizes = {"token_size": source.tokenizer.token_size, "num_body_tokens": source.tokenizer.num_all_body_tokens}
        vae = WeightVAE(WeightVAEConfig(**sizes, **source.vae_settings))
        source.initialise(vae)
        steps, own = loop(args.vae_steps or source.vae_steps), source.function_loss if functions else None
        train(accelerator, vae, lambda m, r: vae_loss(m, zoo, r, own), steps, "vae")
        if functions and source.task_loss is not None:
            steps = loop(source.task_steps, train_batch_size=16, learning_rate=source.task_learning_rate)
            task_loss = source.task_loss, source.task_reconstruction
            train(accelerator, vae, lambda m, r: vae_loss(m, zoo, r, *task_loss), steps, "vae-task")
        fit_latent_scale(vae, *encode(vae, zoo))
        return vae.eval()

    def sampled(latents: Tensor, log_stds: Tensor, width: int) -> dict[str, Tensor]:
        """By task what a new denoiser makes of its prompts: `(n, channels, height, width)`."""
        torch.manual_seed(args.seed)
        channels, size, _ = latents.shape[1:]
        denoiser = WeightDenoiser(channels, size, zoo.prompt_embeds[0].shape[1], hidden_size=width)
        train(
            accelerator,
            denoiser,
            lambda m, r: diffusion_loss(m, noise_scheduler, latents, log_stds, zoo, r),
            loop(args.max_train_steps or source.max_train_steps, ema_decay=0.999),
            "denoiser",
        )
        denoiser.eval()
        return {
            task: sample(denoiser, scheduler, latents.shape[1:], prompts_of(zoo, task, args.n), args.seed)
            for task in zoo.tasks
        }

    def measure(method: str, tokens: dict[str, Tensor]) -> None:
        for task, made in tokens.items():
            row = int((zoo.task_of == zoo.tasks.index(task)).nonzero()[0])
            counts = zoo.class_mask[zoo.tasks.index(task)].sum().expand(len(made))
            add(method, task, decode_rows(source.tokenizer, made, zoo.layout_of[row].expand(len(made)), counts))

    def add(method: str, task: str, state_dicts: list) -> None:
        scores = 100 * source.score(state_dicts, task)
        row = {"task": task, "method": method, "metric": "accuracy", "mean": scores.mean().item()}
        rows.append(row | {"std": scores.std().item(), "best": scores.max().item(), "n": len(scores)})
        print("{task:12} {method:20} {mean:5.1f} ± {std:4.1f}, best {best:5.1f}".format(**rows[-1]), flush=True)

    for task in zoo.tasks:
        add("zoo", task, source.members(task))
    for method, functions in {"latent": True, "latent_of_weights": False}.items():
        vae = fit_vae(functions)
        found = sampled(*scaled_latents(vae, zoo), WIDTH)
        with torch.no_grad():
            measure(method, {task: decoded(vae, zoo, task, made) for task, made in found.items()})
    squares, restore = as_squares(zoo)
    certain = torch.full_like(squares, -math.inf)  # no posterior: the weights are what they are
    for method, width in {"raw": WIDTH, "raw_wide": WIDE}.items():
        measure(method, {task: restore(made) for task, made in sampled(squares, certain, width).items()})
    write_results(args.out, "D2NWG, Figure 6b", typed(), args.seed, rows)
    print(PAPER)


def prompts_of(zoo, task: str, count: int) -> Tensor:
    prompts = zoo.prompt_embeds[zoo.tasks.index(task)]
    return prompts[torch.arange(count) % len(prompts)]


@torch.no_grad()
def sample(denoiser, scheduler, shape, prompts: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(prompts), *shape, generator=generator)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        prediction = denoiser(latents, t, class_labels=prompts).sample
        latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
    return latents


def decoded(vae: WeightVAE, zoo, task: str, latents: Tensor) -> Tensor:
    embeds = zoo.class_embeds[zoo.tasks.index(task)][:1]
    return vae.decode(vae.unscale(latents.flatten(1)), embeds.expand(len(latents), -1, -1))


def as_squares(zoo) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """All scalars of each row as a picture `(R, 1, n, n)`, and the function that makes tokens `(N, T + C, S)` of such."""
    flat, shape = zoo.weight_tokens.flatten(1), zoo.weight_tokens.shape[1:]
    used = zoo.padding_mask.flatten(1).any(0)
    mean, std = flat[:, used].mean(0), flat[:, used].std(0).clamp(min=1e-4)
    count = int(used.sum())
    size = math.isqrt(count - 1) + 1

    def restore(squares: Tensor) -> Tensor:
        tokens = torch.zeros(len(squares), len(used))
        tokens[:, used] = squares.flatten(1)[:, :count] * std + mean
        return tokens.unflatten(1, shape)

    padded = F.pad((flat[:, used] - mean) / std, (0, size**2 - count))
    return padded.unflatten(1, (1, size, size)), restore


if __name__ == "__main__":
    main()

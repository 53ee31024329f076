"""Which denoiser for the latents of a text generator, at equal training time: residual MLP or U-Net, and what it predicts.

    python examples/reproduce/denoisers.py --zoo runs/text-zoo --seconds 60 --out examples/reproduce/results/denoisers.json

All are trained on the latents of one autoencoder, that of `--generator`, for the same time on the same machine, and
sampled without observation noise. The reconstruction is what none of them can exceed by more than luck.
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.hub.cards import add_figures
from hf_weightgen.models.modeling_denoiser import WeightDenoiser
from hf_weightgen.training.d2nwg import make_denoiser, make_schedulers, reconstruct, scaled_latents
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.objectives import diffusion_loss
from hf_weightgen.training.sources import text_source


VARIANTS = (
    ("mlp", "v_prediction"),
    ("mlp", "flow_prediction"),
    ("mlp", "epsilon"),
    ("unet", "v_prediction"),
    ("unet", "epsilon"),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", required=True, help="Folder or Hub id of the zoo.")
    parser.add_argument("--generator", default="bundled")
    parser.add_argument("--data_root", help="Folder with datasets under their Hub ids.")
    parser.add_argument("--seconds", type=float, default=60, help="Training time of each denoiser.")
    parser.add_argument("--samples", type=int, default=3, help="Generated adapters per task.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--card", type=Path, help="Folder of the generator: its card gets the table.")
    args = parser.parse_args()

    pipe = WeightGenPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.config.noise_scale = 0.0
    own = f"{'mlp' if isinstance(pipe.unet, WeightDenoiser) else 'unet'} {pipe.config.prediction_type}"
    source = text_source(pipe.encoder, args.zoo, args.data_root)
    zoo, held_out, vae = source.train, source.held_out, pipe.vae
    latents, log_stds = scaled_latents(vae, zoo)
    rows = [
        row_of("reconstruction", source.accuracy(source.state_dicts(held_out, reconstruct(vae, held_out)), held_out))
    ]
    counted = list(rows[0]["tasks"])

    for kind, prediction in VARIANTS:
        noise_scheduler, pipe.scheduler = make_schedulers(prediction)
        pipe.register_to_config(prediction_type=prediction)

        def fit(
            steps: int, kind=kind, prediction=prediction, noise_scheduler=noise_scheduler
        ) -> tuple[torch.nn.Module, float]:
            torch.manual_seed(args.seed)
            start = time.perf_counter()
            model = train(
                Accelerator(cpu=True),
                make_denoiser(kind),
                lambda m, random: diffusion_loss(m, noise_scheduler, latents, log_stds, zoo, random),
                LoopConfig(args.out.parent, steps, ema_decay=0.999, seed=args.seed),
                f"{kind}-{prediction}",
            )
            return model, time.perf_counter() - start

        fit(5)
        per_step = fit(30)[1] / 30
        steps = int(args.seconds / per_step)
        pipe.unet, seconds = fit(steps)
        scores = {}
        for task in counted:
            prompts = zoo.prompt_embeds[zoo.tasks.index(task)][: args.samples]
            labels = next(list(known["labels"]) for known in source.known_tasks if known["name"] == task)
            generator = torch.Generator().manual_seed(args.seed)
            weights = pipe(prompt_embeds=prompts, labels=labels, generator=generator).weights
            scores[task] = source.score(weights, task).mean().item()
        start = time.perf_counter()
        pipe(prompt_embeds=prompts[:1].expand(50, -1), labels=labels, output_type="latent")
        rows.append(
            row_of(f"{kind} {prediction}", scores)
            | {"steps": steps, "training_seconds": seconds, "seconds_per_latent": (time.perf_counter() - start) / 50}
            | {"parameters": sum(p.numel() for p in pipe.unet.parameters())}
        )
        print(rows[-1], flush=True)
    given = f"--zoo {args.zoo} --seconds {args.seconds:g} --samples {args.samples} --seed {args.seed}"
    command = f"python examples/reproduce/denoisers.py {given} --out {args.out}"
    write_results(args.out, "denoisers", command, args.seed, rows)
    if args.card:
        default = f"The generator's own is {own}, trained for longer."
        add_figures(args.card, "Denoisers at equal training time", command, f"{summary(rows)}\n\n{default}")


def summary(rows: list[dict]) -> str:
    lines = [
        "| denoiser | accuracy of samples | parameters | steps | ms a latent, in a batch of 50 |",
        "|" + "---|" * 5,
    ]
    for row in rows:
        cells = [row["method"], f"{row['mean']:.1f}"]
        if "steps" in row:
            cells += [f"{row['parameters']:,}", f"{row['steps']:,}", f"{1000 * row['seconds_per_latent']:.1f}"]
        lines.append("| " + " | ".join(cells + ["-"] * (5 - len(cells))) + " |")
    return "\n".join(lines)


def row_of(method: str, scores: dict[str, float]) -> dict:
    points = {task: round(100 * score, 2) for task, score in scores.items()}
    return {"method": method, "metric": "accuracy", "mean": sum(points.values()) / len(points), "tasks": points}


if __name__ == "__main__":
    main()

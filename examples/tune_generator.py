"""Trains the decoder of a generator of small networks on: what it generates sees images of its tasks, end to end.

accelerate launch examples/tune_generator.py --generator runs/cnns/pipeline     # datasets from the Hub
accelerate launch examples/tune_generator.py --generator PATH --data_root PATH  # local copies under their Hub ids

Nothing but the decoder changes, and no zoo is needed. The tuned generator is written to `pipeline/` of the output folder; accuracies
on validation and test images, before and after, to `report.json` beside it. The run may be killed; `--resume_from_checkpoint latest`
continues.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_weightgen import D2NWGPipeline, WeightGenPipeline
from hf_weightgen.evaluation.novelty import flatten, pairwise_spread
from hf_weightgen.hub.cards import told_options, write_card
from hf_weightgen.targets.image_encoders import MOBILENET, load_image_encoder
from hf_weightgen.targets.stacked import stack
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.tuning import NoisyDecoder, TunedTask, tuned_tasks, tuning_loss
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import keep_memory, predict_networks


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--generator", required=True, help="Folder or Hub id of a generator by diffusion, of networks on images.")
    add("--tasks", nargs="+", help="Default: all that the generator knows.")
    add("--data_root", help="Folder with datasets under their Hub ids.")
    add("--image_encoder", default=MOBILENET, help="Id or folder of the network that sees images of datasets.")
    add("--output_dir", type=Path, default=Path("runs/tuned"))
    add("--max_train_steps", type=int, default=10_000, help="Each asks for networks of one task; tasks take turns.")
    add("--train_batch_size", type=int, default=8, help="Networks of a step.")
    add("--images", type=int, default=128, help="That each of them sees.")
    add(
        "--conditions",
        type=int,
        default=96,
        help="Prompts, and as many datasets of five images a class, of each task.",
    )
    add("--spread", type=float, default=1.0, help="Size of a network's noise, at least so many times what it was.")
    add(
        "--noise_scale",
        type=float,
        help="Of the tuned generator in use. Default: as in training, that of `--generator`.",
    )
    add("--learning_rate", type=float, default=4e-4)
    add("--samples", type=int, default=50, help="Networks of each task in the report.")
    add("--seed", type=int, default=0)
    add("--checkpointing_steps", type=int, default=1000)
    add("--resume_from_checkpoint", help="'latest', or a checkpoint's name.")
    args = parser.parse_args()
    for name, least in (
        ("max_train_steps", 1),
        ("train_batch_size", 1),
        ("images", 1),
        ("conditions", 1),
        ("samples", 2),
    ):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.noise_scale is not None and not 0 <= args.noise_scale < math.inf:
        parser.error(f"--noise_scale must be a finite number of at least 0, got {args.noise_scale}")
    return args


def main():
    args = parse_args()
    accelerator = Accelerator(cpu=True)
    keep_memory()
    pipe = WeightGenPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    if pipe.dataset_encoder is not None:
        pipe.image_encoder = load_image_encoder(args.image_encoder)
    specs = [get_task(name) for name in args.tasks or [task["name"] for task in pipe.config.tasks]]
    data, tasks = load_images(specs, args.data_root, side(pipe)), []
    for spec in specs:
        tasks += tuned_tasks(pipe, spec, data[spec.name], args.conditions, args.seed)
        accelerator.print(f"{spec.name}: {len(tasks[-1].latents)} latents, {len(data[spec.name].train)} images")

    before, start = figures(pipe, tasks, args.samples, args.seed + 1), copy.deepcopy(pipe.vae).eval()
    settings = LoopConfig(
        args.output_dir,
        args.max_train_steps,
        args.train_batch_size,
        args.learning_rate,
        weight_decay=0.0,
        checkpointing_steps=args.checkpointing_steps,
        resume_from_checkpoint=args.resume_from_checkpoint,
        seed=args.seed,
    )
    train(
        accelerator,
        NoisyDecoder(pipe.vae),
        lambda model, random: tuning_loss(model, start, tasks, random, args.images, args.spread),
        settings,
        "decoder",
    )
    if not accelerator.is_main_process:
        return
    if args.noise_scale is not None:
        pipe.vae.config.noise_scale = args.noise_scale
    report = {"before": before, "after": figures(pipe, tasks, args.samples, args.seed + 1)}
    folder = args.output_dir / "pipeline"
    pipe.to(torch.float16)
    pipe.save_pretrained(folder)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1))
    write_card(
        folder,
        "generator",
        prompt=specs[0].prompts[0],
        generator="PATH_OR_ID",
        method="D2NWG",
        command=f"accelerate launch examples/tune_generator.py {told_options(sys.argv[1:])}",
        datasets=sorted({get_task(task["name"]).dataset_id for task in pipe.config.tasks}),
        facts={"seed": args.seed, "decoder": f"{args.max_train_steps} steps on what the generator makes"},
    )
    print(json.dumps(report, indent=1))
    print(f"saved {folder}")


def side(pipe: WeightGenPipeline) -> int:
    """Height and width of what the generator's networks read."""
    shapes = {tuple(target.get("config", {}).get("input_shape", ())) for target in pipe.targets}
    sides = {shape[-1] for shape in shapes if len(shape) == 3}
    if not isinstance(pipe, D2NWGPipeline) or len(sides) != 1 or any(len(shape) != 3 for shape in shapes):
        raise SystemExit(
            f"Only generators by diffusion, of networks that read images of one size, are tuned; this {type(pipe).__name__} makes "
            f"networks for inputs of the shapes {sorted(shapes)} (none: adapters)."
        )
    return sides.pop()


def figures(pipe: WeightGenPipeline, tasks: Sequence[TunedTask], samples: int, seed: int) -> list[dict]:
    """Of networks generated for prompts: accuracies in points, and the median distance of two of them."""
    rows = []
    for task in tasks:
        prompts = [task.spec.prompts[i % len(task.spec.prompts)] for i in range(samples)]
        generator = torch.Generator().manual_seed(seed)
        made = pipe(prompts, generator=generator, architecture=task.architecture).weights
        row = {"task": task.spec.name, "spread_l2": round(pairwise_spread(flatten(made, made[0])), 2)}
        row |= {"architecture": task.architecture} if task.architecture else {}
        for part in ("validation", "test"):
            images = getattr(task.data, part)
            right = predict_networks(task.config, stack(made), task.data.inputs(images)) == images.labels
            scores = 100 * right.double().mean(1)
            row |= {part: round(scores.mean().item(), 2), f"best_{part}": round(scores.max().item(), 2)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

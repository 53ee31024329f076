"""Trains a D2NWG weight generator: VAE over weight tokens, gate, latent diffusion, calibration, pipeline folder.

accelerate launch examples/train_d2nwg.py                               # small nets on digits, minutes, no network
accelerate launch examples/train_d2nwg.py --zoo PATH_OR_ID              # a zoo of LoRA adapters, of networks on images, or of heads
accelerate launch examples/train_d2nwg.py --zoo PATH_OR_ID PATH_OR_ID   # networks on images in several architectures
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_d2nwg.py --expected_processes 2
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_weightgen.evaluation.accuracy import rank_correlation
from hf_weightgen.evaluation.baselines import average, gaussian
from hf_weightgen.hub.cards import told_options, write_card
from hf_weightgen.models.modeling_dataset_encoder import ALIGNMENTS, POOLINGS, DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_predictor import AccuracyPredictor, AccuracyPredictorConfig
from hf_weightgen.models.modeling_weight_vae import WeightVAE, WeightVAEConfig
from hf_weightgen.pipelines.output import WeightGenOutput
from hf_weightgen.pipelines.pipeline_d2nwg import D2NWGPipeline
from hf_weightgen.pipelines.pipeline_utils import WeightGenPipeline
from hf_weightgen.targets.base_models import MINILM, PACKAGED, load_encoder
from hf_weightgen.targets.image_encoders import MOBILENET, load_image_encoder
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.training.d2nwg import (
    GateError,
    calibrate_noise,
    check_gate,
    encode,
    fit_latent_scale,
    make_denoiser,
    make_schedulers,
    reconstruct,
    scaled_latents,
    usual_rows,
)
from hf_weightgen.training.dataset_encoder import SHOTS, JointDenoiser, dataset_loss
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.network_source import network_source
from hf_weightgen.training.objectives import diffusion_loss, vae_loss
from hf_weightgen.training.predictor import GuidanceLoss, ScoredRows, guiding_rows, predictor_loss, summed
from hf_weightgen.training.sources import Source, digits_source, text_source
from hf_weightgen.zoo.folder import load_zoo


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--zoo",
        nargs="+",
        help="Folder or Hub id of a zoo; several of networks on images or of heads on sentences, one for each architecture, the default one "
        "first. Default: small networks on digits, built on the spot.",
    )
    add("--image_encoder", default=MOBILENET, help="Id or folder of the network that sees images of a zoo's datasets.")
    add("--data_root", help="Folder with datasets under their Hub ids, from which networks learn and are tested.")
    add("--cache", default="runs/features", help="Folder for sentences as heads read them.")
    add(
        "--output_dir",
        type=Path,
        default=Path("runs/d2nwg"),
        help="Checkpoints, results and, in `pipeline/`, the generator.",
    )
    add("--networks", type=int, default=1024, help="Networks per digit task.")
    add("--vae_steps", type=int, help="Steps of the autoencoder.")
    add("--task_steps", type=int, help="Further steps of it in which decoded adapters read sentences; 0 for none.")
    add("--task_batch_size", type=int, default=16, help="Rows per such step; one in four reads.")
    add("--task_learning_rate", type=float)
    add("--dataset_steps", type=int, default=2000, help="Steps of the dataset encoder, of zoos on images.")
    add(
        "--predictor_steps",
        type=int,
        default=0,
        help="Steps of a predictor of accuracy that ranks samples, e.g. 1200: after fewer it tells zoo and samples apart, and no more; "
        "0 for none.",
    )
    add(
        "--predictor_samples", type=int, default=200, help="Samples per task that it learns from, of zoos of networks."
    )
    add(
        "--predictor_weight",
        type=float,
        default=0.0,
        help="Weight of a frozen predictor's opinion of reconstructions in the autoencoder's loss (eq. 9; the paper has 1); 0 for none.",
    )
    add("--pooling", choices=POOLINGS, default=POOLINGS[0], help="Of the dataset encoder; 'mlp' is D2NWG's ablation.")
    add(
        "--alignment",
        choices=(*ALIGNMENTS, "joint"),
        default=ALIGNMENTS[0],
        help="Of datasets with weights; 'soft' as in its code; 'joint': none, the encoder learns with the denoiser (Figure 7).",
    )
    add("--max_train_steps", type=int, help="Steps of the denoiser.")
    add("--train_batch_size", type=int, default=64, help="Rows per step over all processes.")
    add("--learning_rate", type=float, default=1e-3)
    add("--kl_weight", type=float, help="Weight of the autoencoder's KL divergence. Default: that of the kind of zoo.")
    add("--denoiser", choices=("mlp", "unet"), default="mlp")
    add("--prediction_type", choices=("v_prediction", "epsilon", "flow_prediction"), default="v_prediction")
    add("--ema_decay", type=float, default=0.999)
    add("--seed", type=int, default=0)
    add("--checkpointing_steps", type=int, default=1000)
    add("--resume_from_checkpoint", help="'latest', or a checkpoint's name.")
    add("--report_to", help="Tracker of accelerate, e.g. 'tensorboard'.")
    add("--expected_processes", type=int, help="Stop if accelerate runs another number of processes.")
    add(
        "--skip_gate",
        "--skip-gate",
        action="store_true",
        help="Go on although reconstruction costs accuracy; the card says so.",
    )
    args = parser.parse_args()
    if args.predictor_weight and not args.predictor_steps:
        parser.error("--predictor_weight needs a predictor: give --predictor_steps too, e.g. 1200")
    return args


def main():
    args = parse_args()
    # zoos of this size stay on the CPU: a step is a few small matrix products, and a run takes minutes
    accelerator = Accelerator(cpu=True, log_with=args.report_to, project_dir=args.output_dir)
    accelerator.print(f"num_processes: {accelerator.num_processes}")
    if args.expected_processes not in (None, accelerator.num_processes):
        raise SystemExit(
            f"accelerate runs {accelerator.num_processes} process(es), {args.expected_processes} were expected. On CPUs: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N examples/train_d2nwg.py"
        )
    if args.report_to:
        accelerator.init_trackers("d2nwg", {k: str(v) for k, v in vars(args).items()})
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    encoder = load_encoder(MINILM)
    source = load_source(args, encoder, accelerator.mixed_precision == "bf16")
    zoo, held_out = source.train, source.held_out
    accelerator.print(
        f"zoo: {len(zoo)} rows to train on, {len(held_out)} held out, {len(zoo.prompted_tasks)} tasks ({time.perf_counter() - start:.0f} s)"
    )

    def loop(steps: int, **settings) -> LoopConfig:
        defaults = {"train_batch_size": args.train_batch_size, "learning_rate": args.learning_rate}
        return LoopConfig(
            args.output_dir,
            steps,
            **defaults | settings,
            seed=args.seed,
            checkpointing_steps=args.checkpointing_steps,
            resume_from_checkpoint=args.resume_from_checkpoint,
        )

    vae_steps, max_train_steps = args.vae_steps or source.vae_steps, args.max_train_steps or source.max_train_steps
    task_steps = source.task_steps if args.task_steps is None else args.task_steps * (source.task_loss is not None)

    def train_predictor(rows: ScoredRows, name: str) -> AccuracyPredictor:
        sizes = {"token_size": source.tokenizer.token_size, "num_body_tokens": source.tokenizer.num_all_body_tokens}
        model = AccuracyPredictor(AccuracyPredictorConfig(**sizes))
        return train(
            accelerator,
            model,
            lambda m, r: predictor_loss(m, rows, source.train, r),
            loop(args.predictor_steps, train_batch_size=64, learning_rate=1e-3),
            name,
        )

    guidance = None
    if args.predictor_weight:
        rows = guiding_rows(source, args.predictor_samples, torch.Generator().manual_seed(args.seed))
        guidance = GuidanceLoss(train_predictor(rows, "predictor-guide"), zoo, args.predictor_weight)

    # Stage 1: the autoencoder, and whether its reconstructions still work
    vae = WeightVAE(
        WeightVAEConfig(
            token_size=source.tokenizer.token_size,
            num_body_tokens=source.tokenizer.num_all_body_tokens,
            **source.vae_settings | ({} if args.kl_weight is None else {"kl_weight": args.kl_weight}),
        )
    )
    source.initialise(vae)
    train(
        accelerator,
        vae,
        lambda m, r: vae_loss(m, zoo, r, summed(source.function_loss, guidance)),
        loop(vae_steps),
        "vae",
    )
    dataset_encoder = None
    if source.features is not None:
        fit_latent_scale(vae, *encode(vae, zoo))
        latents = vae.scale(encode(vae, zoo)[0])
        dataset_encoder = DatasetEncoder(
            DatasetEncoderConfig(
                feature_size=source.features[0].shape[-1],
                latent_size=latents.shape[1],
                pooling=args.pooling,
                num_classes=source.features[0].shape[0],
                num_examples=SHOTS,
                alignment=ALIGNMENTS[0] if args.alignment == "joint" else args.alignment,
            )
        )
    joint = dataset_encoder is not None and args.alignment == "joint"
    if dataset_encoder is not None and not joint:
        train(
            accelerator,
            dataset_encoder,
            lambda m, r: dataset_loss(m, source.features, latents, source.train, r),
            loop(args.dataset_steps, train_batch_size=16),
            "dataset-encoder",
        )
        source.add_datasets(dataset_encoder.eval(), args.seed)
        zoo = source.train
    if task_steps:
        train(
            accelerator,
            vae,
            lambda m, r: vae_loss(m, zoo, r, summed(source.task_loss, guidance), source.task_reconstruction),
            loop(
                task_steps,
                train_batch_size=args.task_batch_size,
                learning_rate=args.task_learning_rate or source.task_learning_rate,
            ),
            "vae-task",
        )
    gate, skipped = judged(args, accelerator, source, reconstruct(vae, held_out))

    # Stage 2: diffusion over unit-std latents
    fit_latent_scale(vae, *encode(vae, zoo))
    latents, log_stds = scaled_latents(vae, zoo)
    usual = usual_rows(latents, zoo)
    latents, log_stds, seen = latents[usual], log_stds[usual], zoo.kept(usual)
    if not usual.all():
        far = len(zoo) - len(seen)
        accelerator.print(
            f"the denoiser leaves out {far} of {len(zoo)} rows: latents far from all others of their task"
        )
    denoiser = make_denoiser(args.denoiser)
    noise_scheduler, scheduler = make_schedulers(args.prediction_type)
    settings = loop(max_train_steps, ema_decay=args.ema_decay)
    if joint:
        both, shown = JointDenoiser(denoiser, dataset_encoder), (source.features, seen)
        train(accelerator, both, lambda m, r: m(noise_scheduler, latents, log_stds, *shown, r), settings, "denoiser")
        source.add_datasets(dataset_encoder.eval(), args.seed)
        zoo = source.train
    else:
        train(
            accelerator,
            denoiser,
            lambda m, r: diffusion_loss(m, noise_scheduler, latents, log_stds, seen, r),
            settings,
            "denoiser",
        )
    # Stage 3: bundle, calibrate, rank, measure
    pipe = D2NWGPipeline(
        vae=vae.eval(),
        unet=denoiser.eval(),
        scheduler=scheduler,
        weight_tokenizer=source.tokenizer,
        target=source.target,
        targets=source.targets,
        dataset_encoder=dataset_encoder,
        image_encoder=source.image_encoder,
        tasks=source.known_tasks,
        encoder={"id": MINILM, "revision": None, "sha256": PACKAGED[MINILM][1]},
        prediction_type=args.prediction_type,
        **source.thresholds,
    )
    pipe._encoder = encoder
    pipe.set_progress_bar_config(disable=True)
    generated = [sample_tokens(pipe, source, task, 16, args.seed) for task in zoo.prompted_tasks]
    noise = None if vae.config.learns_noise else calibrate_noise(vae, zoo, generated, source.runs)
    if args.predictor_steps:
        rows = [ScoredRows.of_zoo(zoo, source.accuracies), *sampled_rows(pipe, source, args)]
        predictor = train_predictor(ScoredRows.joined(rows), "predictor")
        pipe.register_modules(accuracy_predictor=predictor)
    if not accelerator.is_main_process:
        return
    report = {
        "gate": gate,
        "gate_skipped": skipped,
        "noise_share": noise,
        "tasks": figures(pipe, source, args.seed),
        "predictor": ranking(pipe, source, args.seed) if args.predictor_steps else None,
        "seconds": time.perf_counter() - start,
    }
    folder, first = args.output_dir / "pipeline", get_task(source.known_tasks[0]["name"]) if args.zoo else None
    architectures = list(dict.fromkeys(target["name"] for target in source.targets or () if "name" in target))
    pipe.to(torch.float16 if args.zoo else torch.float32)
    pipe.save_pretrained(folder)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1))
    notes = ["The reconstruction gate was skipped: the figures below it are not to be trusted."] if skipped else []
    write_card(
        folder,
        "generator",
        base_model=source.target.get("base_model"),
        prompt=first.prompts[0] if first else "which digit is it",
        generator="PATH_OR_ID",
        method="D2NWG",
        command=launched("examples/train_d2nwg.py", accelerator),
        notes=notes,
        datasets=sorted({get_task(task["name"]).dataset_id for task in source.known_tasks}) if args.zoo else (),
        facts={
            "seed": args.seed,
            "autoencoder": f"{vae_steps} steps" + f", {task_steps} more with the task loss" * bool(task_steps),
            "denoiser": f"{args.denoiser}, {args.prediction_type}, {max_train_steps} steps",
            **({"architectures": ", ".join(architectures)} if len(architectures) > 1 else {}),
        },
    )
    print(json.dumps(report["tasks"], indent=1))
    print(f"saved {folder} after {report['seconds']:.0f} s")


def launched(script: str, accelerator: Accelerator) -> str:
    """The command that this run is, for its card."""
    precision = accelerator.mixed_precision
    told = [
        "accelerate launch",
        f"--mixed_precision {precision}" * (precision != "no"),
        script,
        told_options(sys.argv[1:]),
    ]
    return " ".join(filter(None, told))


def load_source(args, encoder, bf16: bool) -> Source:
    """What training needs of `--zoo`, of whichever kind it is."""
    if args.zoo is None:
        return digits_source(encoder, args.networks, args.seed)
    kind = kind_of(args.zoo[0])
    if kind == "adapters" and len(args.zoo) == 1:
        return text_source(encoder, args.zoo[0], args.data_root, bf16)
    seen = None if kind == "heads" else load_image_encoder(args.image_encoder)
    return network_source(encoder, seen, args.zoo, args.data_root, cache=args.cache)


def kind_of(zoo: str) -> str:
    """What a zoo holds: `adapters`, networks on `images`, or `heads` on what an encoder says of sentences."""
    arch = load_zoo(zoo)[0]["arch"]
    return "adapters" if "base_model" in arch else "images" if len(arch["input_shape"]) == 3 else "heads"


def judged(args, accelerator: Accelerator, source: Source, reconstructed: torch.Tensor) -> tuple[dict, bool]:
    """The gate's figures for what is made of the held-out rows' tokens, and whether it was skipped; without `--skip_gate` it ends the run."""
    held_out, skipped = source.held_out, False
    original = source.accuracy(source.state_dicts(held_out, held_out.weight_tokens), held_out)
    scores = source.accuracy(source.state_dicts(held_out, reconstructed), held_out)
    try:
        gate = check_gate(original, scores)
    except GateError as error:
        if not args.skip_gate:
            raise SystemExit(f"Gate: {error}") from None
        accelerator.print(f"Gate skipped: {error}")
        gate, skipped = {"losses": {t: 100 * (original[t] - scores[t]) for t in original}}, True
    accelerator.print("gate: reconstruction costs", {t: round(x, 2) for t, x in gate["losses"].items()}, "points")
    return gate, skipped


def figures(pipe: WeightGenPipeline, source, seed: int) -> dict:
    """Per task: accuracies in points of the zoo, of its average and Gaussian, and of generated weights."""
    result, count = {}, source.samples
    generator = torch.Generator().manual_seed(seed)
    for task in source.train.prompted_tasks:
        members = source.members(task)
        rows = {
            "zoo": members,
            "average": [average(members)],
            "gaussian": gaussian(members, count, generator),
            "generated": sampled(pipe, source, task, count, generator).weights,
        }
        known = source.zoo_scores.get(task)  # measured when the zoo was built
        result[task] = {
            name: round(100 * (known if name == "zoo" and known else source.score(weights, task).mean().item()), 2)
            for name, weights in rows.items()
        }
        result[task]["counted"] = source.counts(task)
    return result


def sampled(pipe: WeightGenPipeline, source, task: str, count: int, generator: torch.Generator) -> WeightGenOutput:
    """One sample for each of `count` conditions of training."""
    prompts = source.train.prompt_embeds[source.train.tasks.index(task)]
    asked = source.asked_for(task)
    return pipe(prompt_embeds=prompts[torch.arange(count) % len(prompts)], generator=generator, **asked)


def sampled_rows(pipe: D2NWGPipeline, source, args) -> list[ScoredRows]:
    """Samples of each task with their validation accuracies; none of adapters, which would take hours."""
    rows, generator = [], torch.Generator().manual_seed(args.seed)
    for task in source.train.prompted_tasks if source.validate else ():
        made = sampled(pipe, source, task, args.predictor_samples, generator).weights
        rows.append(ScoredRows.of(source.tokenizer, source.train, made, task, source.validate(made, task)))
    return rows


def ranking(pipe: D2NWGPipeline, source, seed: int) -> dict:
    """Per task, of samples that the predictor never saw: the rank correlation of predicted with test accuracy, and test accuracy
    in points of all of them and of the one that it prefers."""
    result, count = {}, 2 * source.samples
    generator = torch.Generator().manual_seed(seed + 1)
    for task in source.train.prompted_tasks:
        output = sampled(pipe, source, task, count, generator)
        predicted, scores = torch.tensor(output.predicted_accuracies), source.score(output.weights, task)
        result[task] = {
            "rank_correlation": round(rank_correlation(predicted, scores), 3),
            "mean": round(100 * scores.mean().item(), 2),
            "chosen": round(100 * scores[predicted.argmax()].item(), 2),
            "best": round(100 * scores.max().item(), 2),
            "samples": count,
        }
    return result


@torch.no_grad()
def sample_tokens(pipe: D2NWGPipeline, source, task: str, count: int, seed: int) -> torch.Tensor:
    """Noiseless tokens of a task, each from a training prompt of its own."""
    index = source.train.tasks.index(task)
    prompts, embeds = source.train.prompt_embeds[index], source.train.class_embeds[index][:1]
    chosen = prompts[torch.arange(count) % len(prompts)]
    generator, asked = torch.Generator().manual_seed(seed), source.asked_for(task)
    latents = pipe(prompt_embeds=chosen, output_type="latent", generator=generator, **asked).latents
    return pipe.vae.decode(pipe.vae.unscale(latents.flatten(1)), embeds.expand(count, -1, -1))


if __name__ == "__main__":
    main()

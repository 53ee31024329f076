"""Trains an IGPG weight generator: Gumbel VQ-VAE over weight tokens, gate, prior over codes, pipeline folder.

accelerate launch examples/train_igpg.py                               # small nets on digits, minutes, no network
accelerate launch examples/train_igpg.py --zoo PATH_OR_ID              # networks on images, heads on sentences, or LoRA adapters
accelerate launch examples/train_igpg.py --zoo PATH_OR_ID PATH_OR_ID   # several of them in one generator
"""

import argparse
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_weightgen.hub.cards import told_targets, write_card
from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_igpg import IGPGConfig, IGPGPrior
from hf_weightgen.models.modeling_weight_vqvae import WeightVQVAE, WeightVQVAEConfig, perplexity
from hf_weightgen.pipelines.pipeline_igpg import IGPGPipeline
from hf_weightgen.targets.base_models import MINILM, PACKAGED, load_encoder
from hf_weightgen.targets.image_encoders import MOBILENET, load_image_encoder
from hf_weightgen.targets.mixed import in_words
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.training.dataset_encoder import dataset_loss
from hf_weightgen.training.igpg import (
    DecoderLoss,
    VQVAELoss,
    class_parts,
    encode_zoo,
    fit_names,
    fit_places,
    prior_loss,
    shown_datasets,
    wide_heads,
)
from hf_weightgen.training.joined_source import joined
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.network_source import network_source
from hf_weightgen.training.sources import Source, text_source
from hf_weightgen.weights.pieces import num_places
from train_d2nwg import figures, judged, kind_of, launched, load_source


PRIOR_RATE = 3.0  # learning rate of the prior, in those of the autoencoder
FUNCTION_WEIGHT = 10.0  # of what decoded networks do, beside weight-space error, which a few codes cannot take away


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--zoo", nargs="+", help="As of train_d2nwg.py. Default: small networks on digits, built on the spot.")
    add("--image_encoder", default=MOBILENET, help="Id or folder of the network that sees images of a zoo's datasets.")
    add("--data_root", help="Folder with datasets under their Hub ids.")
    add("--cache", default="runs/features", help="Folder for sentences as heads read them.")
    add("--output_dir", type=Path, default=Path("runs/igpg"), help="Checkpoints, results and `pipeline/`.")
    add("--networks", type=int, default=1024, help="Networks per digit task.")
    add("--num_codes", type=int, default=512, help="Codes of each codebook.")
    add("--codes_per_token", type=int, default=2)
    add("--vqvae_steps", type=int, default=1500, help="Steps of the autoencoder.")
    add("--task_steps", type=int, help="Further steps with the task loss, where the zoo has one.")
    add("--dataset_steps", type=int, default=2000, help="Steps of the dataset encoder, of zoos on images.")
    add("--max_train_steps", type=int, default=1000, help="Steps of the prior.")
    add("--train_batch_size", type=int, default=64, help="Rows per step over all processes.")
    add("--task_batch_size", type=int, default=16, help="Rows per step with the task loss.")
    add("--learning_rate", type=float, default=1e-3)
    add("--ema_decay", type=float, default=0.99, help="Of the prior.")
    add(
        "--temperature",
        type=float,
        default=0.6,
        help="Default of the generator's samples; 1 as learned, which small priors learn with errors.",
    )
    add("--seed", type=int, default=0)
    add("--checkpointing_steps", type=int, default=1000)
    add("--resume_from_checkpoint", help="'latest', or a checkpoint's name.")
    add("--skip_gate", action="store_true", help="Go on although codes cost accuracy; the card says so.")
    return parser.parse_args()


def main():
    args = parse_args()
    accelerator = Accelerator(cpu=True, project_dir=args.output_dir)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    encoder = load_encoder(MINILM)
    source = load_sources(args, encoder, accelerator.mixed_precision == "bf16")
    tokenizer, held_out = source.tokenizer, source.held_out
    accelerator.print(f"zoo: {len(source.train)} rows to train on, {len(held_out)} held out")

    def loop(steps: int, **settings) -> LoopConfig:
        defaults = {"train_batch_size": args.train_batch_size, "learning_rate": args.learning_rate}
        kept = {"checkpointing_steps": args.checkpointing_steps, "resume_from_checkpoint": args.resume_from_checkpoint}
        return LoopConfig(args.output_dir, steps, **defaults | settings, seed=args.seed, **kept)

    # Stage 1: codes, and whether the networks that they stand for still work
    codes = {"num_codes": args.num_codes, "codes_per_token": args.codes_per_token}
    parts = class_parts(tokenizer.token_size)
    size = tokenizer.token_size // parts
    noisy = {"learns_noise": source.task_loss is not None}  # which tells where weights matter least
    noisy |= {"num_places": num_places(tokenizer, size), "place_moments": source.train.start is not None}
    if noisy["place_moments"]:
        noisy["named_layouts"] = wide_heads(tokenizer, size)
    vqvae = WeightVQVAE(WeightVQVAEConfig(token_size=size, class_parts=parts, **codes, **noisy))
    source.initialise_names(vqvae)
    if vqvae.config.place_moments:
        fit_places(vqvae, source.train, tokenizer)
        fit_names(vqvae, source.train, tokenizer)

    function_loss = source.function_loss and (lambda *step: FUNCTION_WEIGHT * source.function_loss(*step))
    loss = VQVAELoss(vqvae, source.train, tokenizer, args.vqvae_steps, function_loss, accelerator.gather)
    train(accelerator, vqvae, loss, loop(args.vqvae_steps), "vqvae")
    accelerator.print(f"codes in use: {[round(used) for used in loss.perplexity]} of {args.num_codes}")
    of_zoo, _ = encode_zoo(vqvae, source.train, tokenizer)  # what follows leaves codes as they are
    dataset_encoder = None
    if source.features is not None:
        shown, those = source.shown, source.train.task_of < len(source.features)
        of_rows = vqvae.embed_codes(of_zoo[those]).detach().mean(1)
        latents = (of_rows - of_rows.mean(0)) / of_rows.std(0).clamp(min=1e-4)
        sizes = {"feature_size": source.features[0].shape[-1], "latent_size": latents.shape[1]}
        dataset_encoder = DatasetEncoder(DatasetEncoderConfig(**sizes, num_classes=source.features[0].shape[0]))
        train(
            accelerator,
            dataset_encoder,
            lambda m, r: dataset_loss(m, source.features, latents, shown, r),
            loop(args.dataset_steps, train_batch_size=16),
            "dataset-encoder",
        )
    texts = source.train
    if dataset_encoder is not None:
        source.add_datasets(dataset_encoder.eval(), args.seed)
    task_steps = source.task_steps if args.task_steps is None else args.task_steps * (source.task_loss is not None)
    if task_steps:
        loss = DecoderLoss(vqvae, source.train, tokenizer, of_zoo, source.task_loss, source.task_reconstruction)
        vqvae.freeze_codes()
        train(accelerator, vqvae, loss, loop(task_steps, train_batch_size=args.task_batch_size), "vqvae-task")
        vqvae.freeze_codes(False)
    gate, skipped = judged(args, accelerator, source, encode_zoo(vqvae.eval(), held_out, tokenizer)[1])

    # Stage 2: the prior over codes
    targets = source.targets or [source.target]
    in_text = encoder.embed([in_words(target) for target in targets])[source.targets_of_tasks]
    datasets = shown_datasets(source.shown) if dataset_encoder is not None else None
    prior = IGPGPrior(IGPGConfig(**codes, num_places=vqvae.config.num_places))
    train(
        accelerator,
        prior,
        lambda m, r: prior_loss(m, of_zoo, texts, tokenizer, r, vqvae.config.token_size, in_text, datasets),
        loop(args.max_train_steps, ema_decay=args.ema_decay, learning_rate=args.learning_rate * PRIOR_RATE),
        "prior",
    )
    if not accelerator.is_main_process:
        return
    pipe = IGPGPipeline(
        vqvae=vqvae,
        prior=prior.eval(),
        weight_tokenizer=tokenizer,
        target=source.target,
        targets=source.targets,
        dataset_encoder=dataset_encoder,
        image_encoder=source.image_encoder,
        tasks=source.known_tasks,
        encoder={"id": MINILM, "revision": None, "sha256": PACKAGED[MINILM][1]},
        temperature=args.temperature,
        **source.thresholds,
    )
    pipe._encoder = encoder
    report = {
        "gate": gate,
        "gate_skipped": skipped,
        "codes_in_use": perplexity(vqvae.counts(of_zoo)).tolist(),
        "codes": sizes_of_codes(source, of_zoo, args.num_codes),
        "tasks": figures(pipe, source, args.seed),
        "seconds": time.perf_counter() - start,
    }
    folder, first = args.output_dir / "pipeline", get_task(source.known_tasks[0]["name"]) if args.zoo else None
    pipe.to(torch.float16 if args.zoo else torch.float32)
    pipe.save_pretrained(folder)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1))
    write_card(
        folder,
        "generator",
        **told_targets(targets),
        prompt=first.prompts[0] if first else "which digit is it",
        generator="PATH_OR_ID",
        method="IGPG",
        command=launched("examples/train_igpg.py", accelerator),
        notes=["The reconstruction gate was skipped: the figures below it are not to be trusted."] if skipped else [],
        datasets=sorted({get_task(task["name"]).dataset_id for task in source.known_tasks}) if args.zoo else (),
        facts={
            "seed": args.seed,
            "codes": f"{args.codes_per_token} of {args.num_codes} for each token",
            "autoencoder": f"{args.vqvae_steps} steps" + f", {task_steps} more with the task loss" * bool(task_steps),
            "prior": f"{args.max_train_steps} steps",
        },
    )
    print(json.dumps({name: report[name] for name in ("codes", "tasks")}, indent=1))
    print(f"saved {folder} after {report['seconds']:.0f} s")


def load_sources(args, encoder, bf16: bool) -> Source:
    """What training needs of all zoos: those of networks on images are one source, of heads on texts one, of adapters one."""
    kinds: dict[str, list[str]] = {}
    for zoo in args.zoo or ():
        kinds.setdefault(kind_of(zoo), []).append(zoo)
    if len(kinds) < 2:
        return load_source(args, encoder, bf16)
    if len(kinds.get("adapters", ())) > 1:
        raise SystemExit(f"--zoo: one zoo of adapters trains a generator, got {kinds['adapters']}.")
    sources, size = {}, encoder.model.config.hidden_size + 1
    if "adapters" in kinds:
        sources["adapters"] = text_source(encoder, kinds["adapters"][0], args.data_root, bf16)
        size = sources["adapters"].tokenizer.token_size
    for kind in {"heads", "images"} & kinds.keys():
        seen = load_image_encoder(args.image_encoder) if kind == "images" else None
        sources[kind] = network_source(encoder, seen, kinds[kind], args.data_root, size, args.cache)
    order = [kind for kind in ("images", "heads", "adapters") if kind in kinds]  # see `joined`
    return joined([sources[kind] for kind in order], [order.index(kind) for kind in kinds])


def sizes_of_codes(source, codes: torch.Tensor, num_codes: int) -> dict:
    """Per task: codes of a network, and bits that they have for each of its weights."""
    result, zoo = {}, source.train
    for number, task in enumerate(zoo.tasks):
        row = (zoo.task_of == number).nonzero()[0]
        count, weights = int((codes[row] >= 0).sum()), int(zoo.padding_mask[row].sum())
        bits = count * torch.log2(torch.tensor(float(num_codes))).item()
        result[task] = {"codes": count, "weights": weights, "bits_per_weight": round(bits / weights, 3)}
    return result


if __name__ == "__main__":
    main()

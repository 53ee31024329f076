"""Trains a generator of linear heads on frozen features from a few examples of each class (D2NWG, section 4.1.1).

    accelerate launch examples/train_few_shot.py --output_dir runs/few-shot-text             # sentences, MiniLM
    accelerate launch examples/train_few_shot.py --images --output_dir runs/few-shot-images  # images, a MobileNet

Sets come from the Hub, or with --data_root from local copies under their ids. A set of your own: --sets ID ID:CONFIG FOLDER.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from hf_weightgen.hub.cards import write_card
from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_denoiser import WeightDenoiser
from hf_weightgen.models.modeling_weight_vae import WeightVAE, WeightVAEConfig
from hf_weightgen.pipelines.pipeline_d2nwg import D2NWGPipeline
from hf_weightgen.targets.architectures import HEAD
from hf_weightgen.targets.base_models import MINILM, PACKAGED, load_encoder, weights_sha256
from hf_weightgen.targets.image_encoders import MOBILENET, load_image_encoder
from hf_weightgen.training.d2nwg import make_schedulers
from hf_weightgen.training.few_shot import (
    HeadGenerator,
    HeadTensors,
    fit_ridge,
    latent_loss,
    scaled_head_latents,
    start_from_ridge,
)
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.sources import known_tasks
from hf_weightgen.weights.tokenization import WeightTokenizer
from hf_weightgen.zoo.features import drop_alike, embed_sets, spec_of
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.heads import HeadZooConfig, build_head_zoo
from hf_weightgen.zoo.networks import keep_memory
from hf_weightgen.zoo.schema import zoo_state_dicts


TEXTS = ("clinc150", "trec_fine", "newsgroups", "go_emotions", "ag_news", "emotion", "tweet_emoji")
IMAGES = ("zh-plus/tiny-imagenet", "mnist", "fashion_mnist", "svhn", "cifar10")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", action="store_true", help="Images in the place of sentences.")
    add("--sets", nargs="+", help=f"Known tasks, or datasets. Default: {' '.join(TEXTS)}, or {' '.join(IMAGES)}.")
    add(
        "--not_like",
        nargs="*",
        default=["banking77"],
        help="Classes named as those of these sets are left out (texts).",
    )
    add("--image_encoder", default=MOBILENET, help="Id, or folder of a local copy.")
    add("--data_root", help="Folder with datasets under their Hub ids.")
    add("--cache", default="runs/features", help="Folder for encoded sets.")
    add("--output_dir", type=Path, default=Path("runs/few-shot"))
    add("--heads", type=int, default=4096, help="Of the zoo.")
    add("--steps", type=int, default=400, help="Of autoencoder and dataset encoder.")
    add("--denoiser_steps", type=int, default=400)
    add("--learning_rate", type=float, default=5e-4)
    add("--kl_weight", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--resume_from_checkpoint", help="'latest', or a checkpoint's name.")
    return parser.parse_args()


def main():
    args, start = parse_args(), time.perf_counter()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(args.seed)
    keep_memory()
    texts = load_encoder(MINILM)
    encoder = load_image_encoder(args.image_encoder) if args.images else texts
    specs = [spec_of(name, args.data_root) for name in args.sets or (IMAGES if args.images else TEXTS)]
    sets = embed_sets(specs, encoder, args.data_root, args.cache, turns=args.images)
    names = None
    if not args.images:
        sets = drop_alike(sets, [spec_of(name, args.data_root) for name in args.not_like], texts)
        names = {name: texts.embed(one.classes) for name, one in sets.items()}
    accelerator.print({name: len(one) for name, one in sets.items()}, f"({time.perf_counter() - start:.0f} s)")

    # The zoo: a head for each of some thousand subsets of classes
    zoo_folder = args.output_dir / "zoo"
    if accelerator.is_main_process:
        build_head_zoo(sets, zoo_folder, HeadZooConfig(tuple(sets), tasks=args.heads, seed=args.seed))
    accelerator.wait_for_everyone()
    zoo = load_zoo(str(zoo_folder))
    rows = [i for i, split in enumerate(zoo["split"]) if split == "train"]
    size = next(iter(sets.values())).features.shape[-1]
    tokenizer = WeightTokenizer.fit(zoo_state_dicts(zoo, rows), token_size=size + 1, head=HEAD)
    tensors = HeadTensors.of(zoo, tokenizer, sets, "train", names)

    # Stage 1: ridge regression in a metric of its own, and an autoencoder around it
    vae = WeightVAE(
        WeightVAEConfig(
            token_size=size + 1,
            num_body_tokens=0,
            embedding_size=size + 1,
            latent_shape=(2, 4, 4),
            hidden_size=128,
            kl_weight=args.kl_weight,
            noise_scale=0.0,
        )
    )
    dataset_encoder = DatasetEncoder(
        DatasetEncoderConfig(
            feature_size=size,
            embedding_size=size + 1,
            latent_size=32,
            hidden_size=64,
            ridge=True,
            reads_names=not args.images,
        )
    )
    chosen = fit_ridge(dataset_encoder.ridge, sets, names, args.seed)
    start_from_ridge(vae, dataset_encoder, tensors, args.seed)
    accelerator.print("ridge:", chosen)

    def loop(steps: int, **settings) -> LoopConfig:
        return LoopConfig(
            args.output_dir,
            steps,
            train_batch_size=32,
            learning_rate=args.learning_rate,
            seed=args.seed,
            checkpointing_steps=500,
            resume_from_checkpoint=args.resume_from_checkpoint,
            **settings,
        )

    both = HeadGenerator(vae, dataset_encoder)
    train(accelerator, both, lambda m, r: m(tensors, r), loop(args.steps), "heads")

    # Stage 2: diffusion over latents, conditioned on the dataset
    draws = scaled_head_latents(vae, dataset_encoder.eval(), tensors, args.seed)
    denoiser = WeightDenoiser(
        in_channels=2, sample_size=4, projection_class_embeddings_input_dim=size + 1, hidden_size=128
    )
    noise_scheduler, scheduler = make_schedulers("v_prediction")
    train(
        accelerator,
        denoiser,
        lambda m, r: latent_loss(m, noise_scheduler, draws, r),
        loop(args.denoiser_steps, ema_decay=0.999),
        "denoiser",
    )
    if not accelerator.is_main_process:
        return

    # Stage 3: bundle
    task_of = [zoo["task"][i] for i in rows]
    seen = [name for name in sets if name in task_of]  # a small zoo may have no head of some set
    of_sets = [draws.of_dataset[torch.tensor([task == name for task in task_of])] for name in seen]
    known, _ = known_tasks(
        [{"name": name, "family": name, "labels": list(dict.fromkeys(sets[name].classes))} for name in seen],
        [[F.normalize(embeds, dim=-1)] for embeds in of_sets],
    )
    pipe = D2NWGPipeline(
        vae=vae.eval(),
        unet=denoiser.eval(),
        scheduler=scheduler,
        weight_tokenizer=tokenizer,
        dataset_encoder=dataset_encoder,
        target={"kind": "network", "config": {"input_shape": [size], "layers": [], "activation": "relu"}},
        tasks=known,
        encoder={"id": MINILM, "revision": None, "sha256": PACKAGED[MINILM][1]},
        image_encoder={
            "id": MOBILENET,
            "revision": None,
            "sha256": weights_sha256(encoder.model.name_or_path),
        }
        if args.images
        else None,
        datasets_above=-1.0,  # sets that it does not know are what it is for
    )
    folder = args.output_dir / "pipeline"
    pipe.save_pretrained(folder)
    seconds = time.perf_counter() - start
    (args.output_dir / "report.json").write_text(json.dumps({"ridge": chosen, "seconds": seconds}, indent=1))
    write_card(
        folder,
        "generator",
        examples="images" if args.images else "texts",
        generator="PATH_OR_ID",
        method="D2NWG",
        command="accelerate launch examples/train_few_shot.py" + " --images" * args.images,
        datasets=sorted({spec.dataset_id for spec in specs}),
        facts={"seed": args.seed, "heads": f"{len(tensors)} to train on", "ridge": json.dumps(chosen)},
    )
    print(f"saved {folder} after {seconds:.0f} s")


if __name__ == "__main__":
    main()

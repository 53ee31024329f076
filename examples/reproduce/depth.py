r"""ResNets of depths that no generator saw, from generated ResNet-32s (D2NWG Figure 2, section 4.1.4).

    python examples/build_trajectory_zoo.py runs/resnet32 --checkpoint checkpoints/resnet32.safetensors --burn_in 100 \
        --checkpoints 60 --every 3 --held_out 10 --lr 5e-3 --bf16
    accelerate launch examples/train_d2nwg.py --zoo runs/resnet32 --output_dir runs/resnet32-generator --vae_steps 250 \
        --train_batch_size 8 --dataset_steps 30 --max_train_steps 600
    python examples/reproduce/depth.py --generator runs/resnet32-generator/pipeline --zoo runs/resnet32 --checkpoints checkpoints \
        --n 2 --images 1280 --bf16 --out depth.json

Accuracy at first sight, and after one epoch on `--images` training images. Replaced: a zoo of many ResNet-32s by one
fine-tuning run; CIFAR-10 alone, without CIFAR-100. Statistics of batch normalisation are measured anew on 256 training
images wherever layers come from elsewhere. `pca_flow` is flow matching over the principal components of the zoo's rows, which
takes seconds; `--generator` may be left out.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from command import typed
from torch import Tensor

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation.baselines import average, pca_flow
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.architectures import TargetConfig, architecture
from hf_weightgen.targets.depth import with_depth
from hf_weightgen.targets.stacked import stack, unstack
from hf_weightgen.targets.symmetry import reestimate_norms
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.images import ImageData, load_images
from hf_weightgen.zoo.networks import initial, keep_memory, predict_one_by_one
from hf_weightgen.zoo.schema import zoo_state_dicts
from hf_weightgen.zoo.trajectory import draw_batches, fine_tune, read_network


CALIBRATION = 256  # training images on which statistics are measured, without their labels
PAPER = "paper, Figure 2: random initialisation 10.00 at every depth; of all other bars 93.53 is the only number told"
StateDict = Mapping[str, Tensor]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", help="Folder or Hub id.")
    parser.add_argument("--zoo", required=True, help="Folder or Hub id of the trajectory that it was trained on.")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="Folder with `resnetN.safetensors`, as far as there are."
    )
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 32, 44, 56])
    parser.add_argument("--n", type=int, default=3, help="Networks of rows that are drawn.")
    parser.add_argument("--images", type=int, default=1920, help="Training images of the epoch.")
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="Train under bfloat16 autocast.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    keep_memory()
    zoo = load_zoo(args.zoo)
    spec, first, split = get_task(zoo["task"][0]), zoo[0], list(zoo["split"])
    source = architecture(first["arch"]["name"], len(spec.labels))
    base = next(zoo_state_dicts(zoo, [split.index("base")]))
    rows_of = [i for i, part in enumerate(split) if part == "train"]
    members = [base | member for member in zoo_state_dicts(zoo, rows_of)]  # whole, also where rows are parts
    data = load_images([spec], args.data_root, source.input_shape[1])[spec.name]
    data.mean, data.std = first["provenance"]["mean"], first["provenance"]["std"]
    samples = {
        method: [[base | network for network in own] for own in made]  # counters of batches are not generated
        for method, made in drawn(args, members, list(spec.labels), spec.prompts[0]).items()
    }
    calibration = data.inputs(data.train.first(CALIBRATION))
    rows = []
    for depth in args.depths:
        wanted = architecture(f"resnet{depth}", len(spec.labels))
        reference = args.checkpoints / f"resnet{depth}.safetensors"
        for method, networks in starts(source, wanted, base, members, samples, calibration, args).items():
            rows.append(measure(method, depth, wanted, networks, data, args))
        if reference.is_file():
            pretrained = [read_network(reference, wanted)]
            rows.append(measure("pretrained", depth, wanted, pretrained, data, args))
        write_results(args.out, "D2NWG, Figure 2", typed(), args.seed, rows)
    print(PAPER)


def drawn(args, members: list[StateDict], labels: list[str], prompt: str) -> dict[str, list[list[StateDict]]]:
    """By method `n` lists of three source networks: what one network of another depth is made of."""
    generator = torch.Generator().manual_seed(args.seed)
    made = {"pca_flow": pca_flow(members, 3 * args.n, generator)}
    if args.generator is not None:
        pipe = WeightGenPipeline.from_pretrained(args.generator)
        pipe.set_progress_bar_config(disable=True)
        made["generated"] = pipe(prompt, labels=labels, num_samples=3 * args.n, generator=generator).weights
    return {method: [own[i : i + 3] for i in range(0, len(own), 3)] for method, own in made.items()}


def starts(source, wanted, base: StateDict, members, samples, calibration: Tensor, args) -> dict[str, list[StateDict]]:
    """Networks of each row in front of any training."""
    fresh = initial(wanted, [args.seed + i for i in range(args.n)])
    random = [unstack(fresh, i) for i in range(args.n)]
    rows = {
        "layers_copied": [copied(network, base) for network in random],
        "checkpoint_concatenated": [with_depth([base], source, wanted)],
        "zoo_average_concatenated": [with_depth([average(members)], source, wanted)],
    }
    for method, own in samples.items():
        rows[f"{method}_concatenated"] = [with_depth(sources, source, wanted) for sources in own]
    if len(wanted.layers) > len(source.layers):
        for name, network in {"checkpoint": base, "zoo_average": average(members)}.items():
            rows[f"{name}_silent_blocks"] = [silent(copied(random[0], network), network)]
        rows["checkpoint_shared_steps"] = [with_depth([base], source, wanted, shared_steps=True)]
        for method, own in samples.items():
            rows[f"{method}_shared_steps"] = [
                with_depth(sources, source, wanted, shared_steps=True) for sources in own
            ]
    measured = {
        method: [unstack(reestimate_norms(wanted, stack([network]), calibration, 64), 0) for network in networks]
        for method, networks in rows.items()
    }
    return {"random_init": random} | measured


def copied(network: StateDict, base: StateDict) -> dict[str, Tensor]:
    """A new network with all tensors of the checkpoint that have their name and shape in it."""
    return {name: base[name] if name in base and base[name].shape == t.shape else t for name, t in network.items()}


def silent(network: StateDict, base: StateDict) -> dict[str, Tensor]:
    """The checkpoint's function: blocks that it does not have add nothing to what passes them."""
    added = [name for name in network if name not in base and ".bn2." in name and name.endswith(("weight", "bias"))]
    return {name: torch.zeros_like(tensor) if name in added else tensor for name, tensor in network.items()}


def measure(method: str, depth: int, config: TargetConfig, networks, data: ImageData, args) -> dict:
    """Test accuracies in points: of all networks at first sight, and of the first one after an epoch."""
    test = data.test.first(args.test_images)
    inputs = data.inputs(test)

    def score(state_dicts) -> Tensor:
        return 100 * (predict_one_by_one(config, state_dicts, inputs) == test.labels).double().mean(1)

    before = score(networks)
    images = data.train.first(args.images)
    batches = draw_batches(data, images, args.images // 64, 64, torch.Generator().manual_seed(args.seed))
    *_, trained = fine_tune(config, networks[0], batches, lr=args.lr, bf16=args.bf16)
    row = {
        "task": data.spec.name,
        "architecture": f"resnet{depth}",
        "method": method,
        "metric": "accuracy",
        "mean": before.mean().item(),
        "std": before.std(correction=min(1, len(before) - 1)).item(),
        "n": len(before),
        "after_one_epoch": score([trained]).item(),
        "epoch_images": len(images),
        "test_rows": len(test),
    }
    told = "resnet{:<3} {:26} at first sight {:5.1f} ± {:4.1f}, after one epoch {:5.1f}"
    print(told.format(depth, method, row["mean"], row["std"], row["after_one_epoch"]), flush=True)
    return row


if __name__ == "__main__":
    main()

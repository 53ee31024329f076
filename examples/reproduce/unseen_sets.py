"""Networks for datasets that no training saw, from five images of each class, at first sight (D2NWG Table 19) and after an epoch.

    python examples/build_network_zoo.py runs/mnist-cifar10 --tasks mnist cifar10
    accelerate launch examples/train_d2nwg.py --zoo runs/mnist-cifar10 --output_dir runs/two-sets
    python examples/reproduce/unseen_sets.py --generator runs/two-sets/pipeline --zoo runs/mnist-cifar10 \
        --unseen svhn fashion_mnist --out unseen.json

The paper trains on two sets of the Tiny Model Zoo and is shown the other two. Replaced: STL-10 by Fashion-MNIST, S_KDE30 by kernel
densities of the nearest known set's members (`kde`). `members` are these members themselves: their classes are others, so that
what they have is chance, or a likeness of the sets. Where a set has another number of classes, these have heads of new networks.

With `--epochs 1` all rows are trained on the same batches, as the nearest set's members were. `--unseen` also takes JSON files with the
fields of `TaskSpec`.
"""

from dataclasses import replace

import torch
from command import typed
from curves import curve_rows, curve_table
from finetune import finetune
from tiny_zoo import init_of, load, make_parser, outputs

from hf_weightgen.evaluation import baselines
from hf_weightgen.evaluation.novelty import fix_network_gauge
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.architectures import HEAD, TargetConfig
from hf_weightgen.targets.stacked import unstack
from hf_weightgen.targets.symmetry import permutation_spec
from hf_weightgen.targets.tasks import IMAGE_TASKS, get_task, load_task_spec
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import initial
from hf_weightgen.zoo.schema import zoo_state_dicts


PAPER = """paper, Table 19 (S_KDE30 of one other set; D2NWG of two): SVHN 13.25, 18.80; MNIST 29.30, 36.64; CIFAR-10 15.40, 18.00;
    STL-10 15.20, 16.21"""


def main():
    parser = make_parser(__doc__, n=50)
    parser.add_argument("--unseen", nargs="+", required=True, help=f"Sets to be shown: {list(IMAGE_TASKS)} or files.")
    parser.add_argument("--epochs", type=int, default=0, help="Of fine-tuning all rows.")
    parser.add_argument("--images", type=int, default=10_000, help="Training images at most.")
    args = parser.parse_args()
    pipe, known, *_, zoo, architecture = load(args)
    specs = [load_task_spec(name) if name.endswith(".json") else get_task(name) for name in args.unseen]
    seen = [spec.name for spec in specs if spec.name in {task["name"] for task in pipe.config.tasks}]
    if seen:
        raise SystemExit(f"--unseen: this generator was trained on {seen[0]!r}.")
    where, rows = list(zip(zoo["task"], zoo["split"], strict=True)), []
    side = pipe.targets[0]["config"]["input_shape"][1]
    for spec in specs:
        data = load_images([spec], args.data_root, side)
        made = outputs(pipe, data, spec, [], "generated", args.n, args.seed, architecture)
        target, nearest = made[0].targets[0], made[0].tasks[0]
        config = TargetConfig(**target["config"], num_classes=len(spec.labels))
        own = [i for i, place in enumerate(where) if place == (nearest, "train")]
        own = own[-args.n :] if args.epochs else own
        members = list(zoo_state_dicts(zoo, own))
        aligned = fix_network_gauge(members, members[0], permutation_spec(config))
        draw = torch.Generator().manual_seed(args.seed)
        fresh = initial(config, torch.randint(2**31, (args.n,), generator=draw).tolist(), init_of(zoo, nearest))
        new = [unstack(fresh, k) for k in range(args.n)]
        methods = {
            "random_init": new,
            "members": [with_head(member, new[k % args.n]) for k, member in enumerate(members)],
            "kde": [with_head(one, new[k]) for k, one in enumerate(baselines.kde(aligned, args.n, draw))],
            "generated": [output.weights[0] for output in made if output.tasks[0] == nearest],
        }
        read, channels = data[spec.name], target["config"]["input_shape"][0]
        if read.test.pixels.shape[1] != channels:
            read = load_images([spec], args.data_root, side, channels)[spec.name]
        scaled = replace(read, mean=target["config"]["image_mean"], std=target["config"]["image_std"])
        epochs = sorted({0, args.epochs})
        curves = finetune(config, methods, scaled, args, epochs, as_on=nearest)
        rows += curve_rows(spec.name, curves, nearest=nearest)
        print(curve_table(spec.name, curves, epochs), flush=True)
        write_results(args.out, "D2NWG, Table 19; IGPG, unseen tasks", typed(), args.seed, rows)
    print(PAPER)


def with_head(network: dict, new: dict) -> dict:
    """The network, with the head of a new one if it has another number of classes."""
    same = all(network[name].shape == new[name].shape for name in HEAD)
    return network if same else network | {name: new[name] for name in HEAD}


if __name__ == "__main__":
    main()

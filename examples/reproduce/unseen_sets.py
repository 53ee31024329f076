"""Networks for datasets that no training saw, from five images of each class, without fine-tuning (D2NWG Table 19).

    python examples/build_network_zoo.py runs/mnist-cifar10 --tasks mnist cifar10
    accelerate launch examples/train_d2nwg.py --zoo runs/mnist-cifar10 --output_dir runs/two-sets
    python examples/reproduce/unseen_sets.py --generator runs/two-sets/pipeline --zoo runs/mnist-cifar10 \
        --unseen svhn fashion_mnist --out unseen.json

The paper trains on two sets of the Tiny Model Zoo and is shown the other two. Replaced: STL-10 by Fashion-MNIST, S_KDE30 by kernel
densities of the nearest known set's members (`kde`). `members` are these members themselves: their classes are others, so that
what they have is chance, or a likeness of the sets.
"""

import sys
from dataclasses import replace

import torch
from tiny_zoo import init_of, load, make_parser, outputs

from hf_weightgen.evaluation import baselines
from hf_weightgen.evaluation.novelty import fix_network_gauge
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.architectures import TargetConfig
from hf_weightgen.targets.stacked import stack, unstack
from hf_weightgen.targets.symmetry import permutation_spec
from hf_weightgen.targets.tasks import IMAGE_TASKS, get_task
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import initial, predict_networks
from hf_weightgen.zoo.schema import zoo_state_dicts


PAPER = """paper, Table 19 (S_KDE30 of one other set; D2NWG of two): SVHN 13.25, 18.80; MNIST 29.30, 36.64; CIFAR-10 15.40, 18.00;
    STL-10 15.20, 16.21"""


def main():
    parser = make_parser(__doc__, n=50)
    parser.add_argument("--unseen", nargs="+", required=True, choices=list(IMAGE_TASKS), help="Sets to be shown.")
    args = parser.parse_args()
    pipe, known, *_, zoo, architecture = load(args)
    seen = [name for name in args.unseen if name in {spec.name for spec in known}]
    if seen:
        raise SystemExit(f"--unseen: this generator was trained on {seen[0]!r}.")
    where, rows = list(zip(zoo["task"], zoo["split"], strict=True)), []
    side = pipe.targets[0]["config"]["input_shape"][1]
    for spec in map(get_task, args.unseen):
        data = load_images([spec], args.data_root, side)
        made = outputs(pipe, data, spec, [], "generated", args.n, args.seed, architecture)
        target, nearest = made[0].targets[0], made[0].tasks[0]
        config = TargetConfig(**target["config"], num_classes=len(spec.labels))
        own = [i for i, place in enumerate(where) if place == (nearest, "train")]
        members = list(zoo_state_dicts(zoo, own))
        aligned = fix_network_gauge(members, members[0], permutation_spec(config))
        draw = torch.Generator().manual_seed(args.seed)
        fresh = initial(config, torch.randint(2**31, (args.n,), generator=draw).tolist(), init_of(zoo, nearest))
        methods = {
            "random_init": [unstack(fresh, k) for k in range(args.n)],
            "members": members,
            "kde": baselines.kde(aligned, args.n, draw),
            "generated": [output.weights[0] for output in made if output.tasks[0] == nearest],
        }
        read, channels = data[spec.name], target["config"]["input_shape"][0]
        if read.test.pixels.shape[1] != channels:
            read = load_images([spec], args.data_root, side, channels)[spec.name]
        scaled = replace(read, mean=target["config"]["image_mean"], std=target["config"]["image_std"])
        inputs, labels = scaled.inputs(scaled.test), scaled.test.labels
        for method, networks in methods.items():
            scores = 100 * (predict_networks(config, stack(networks), inputs) == labels).double().mean(1)
            row = {"task": spec.name, "method": method, "metric": "accuracy", "nearest": nearest, "n": len(scores)}
            rows.append(row | {"mean": scores.mean().item(), "std": scores.std().item(), "max": scores.max().item()})
            print(f"{spec.name:16} {method:12} {rows[-1]['mean']:6.2f} ± {rows[-1]['std']:5.2f}", flush=True)
        write_results(args.out, "D2NWG, Table 19", f"python {' '.join(sys.argv)}", args.seed, rows)
    print(PAPER)


if __name__ == "__main__":
    main()

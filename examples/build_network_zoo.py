"""Trains a zoo of small networks on images: 100 seeds of MNIST, Fashion-MNIST, SVHN and CIFAR-10, 3 late checkpoints each.

    python examples/build_network_zoo.py runs/image-zoo                            # datasets from the Hub
    python examples/build_network_zoo.py runs/image-zoo --data_root PATH           # from local copies under their Hub ids
    python examples/build_network_zoo.py runs/published --protocol published --seeds 10
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 4 examples/build_network_zoo.py runs/image-zoo   # groups are shared

The run may be killed at any time; the same command continues, and a process that is lost costs the group it was at.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from hf_weightgen.targets.tasks import IMAGE_TASKS, get_task
from hf_weightgen.zoo.build_networks import PROTOCOLS, NetworkZooConfig, build_network_zoo
from hf_weightgen.zoo.folder import load_zoo


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(IMAGE_TASKS), help=f"Of {list(IMAGE_TASKS)}.")
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--architecture", default="tiny-cnn")
    parser.add_argument("--protocol", default="short", choices=list(PROTOCOLS))
    parser.add_argument("--seeds", type=int, default=100, help="Networks per task.")
    args = parser.parse_args()
    config = NetworkZooConfig(
        architecture=args.architecture, protocol=args.protocol, seeds=args.seeds, held_out=args.seeds // 5
    )
    zoo = build_network_zoo([get_task(name) for name in args.tasks], args.folder, config, args.data_root)
    rows, accuracies = load_zoo(str(zoo.path)), defaultdict(list)
    for task, checkpoint, metrics in zip(rows["task"], rows["checkpoint"], rows["metrics"], strict=True):
        if checkpoint == config.keep - 1:
            accuracies[task].append(100 * metrics["test"])
    for task, values in accuracies.items():
        print(
            f"{task}: {len(values)} networks, test accuracy {sum(values) / len(values):.2f}, {min(values):.2f} to {max(values):.2f}"
        )


if __name__ == "__main__":
    main()

"""Trains a zoo of small networks on images, or of heads on sentences: 100 seeds of MNIST, Fashion-MNIST, SVHN and CIFAR-10, 3 late checkpoints each.

    python examples/build_network_zoo.py runs/images                            # datasets from the Hub
    python examples/build_network_zoo.py runs/images --data_root PATH           # from local copies under their Hub ids
    python examples/build_network_zoo.py runs/published --protocol published --seeds 10
    python examples/build_network_zoo.py runs/text-heads --architecture linear --seeds 20   # heads on sentences
    torchrun --nproc_per_node 4 examples/build_network_zoo.py runs/images    # four processes share the work
    python examples/build_network_zoo.py runs/images --jobs 8 --cluster slurm --job_args slurm_partition=cpu timeout_min=240

The run may be killed at any time; the same command continues, and a process that is lost costs the group it was at.
"""

import argparse
from collections import defaultdict
from functools import partial
from pathlib import Path

from hf_weightgen.targets.tasks import IMAGE_TASKS, get_task
from hf_weightgen.zoo.build_networks import PROTOCOLS, NetworkZooConfig, build_network_zoo
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.recipe import default_tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--tasks", nargs="+", help=f"Of {list(IMAGE_TASKS)}, or single texts for heads. Default: those of a zoo."
    )
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--architecture", default="tiny-cnn")
    parser.add_argument("--protocol", default="short", choices=list(PROTOCOLS))
    parser.add_argument("--seeds", type=int, default=100, help="Networks per task.")
    parser.add_argument("--jobs", type=int, default=0, help="Share the work among so many jobs of a cluster.")
    parser.add_argument("--cluster", help="'slurm', or 'local' to try it. Default: what submitit finds.")
    parser.add_argument("--job_args", nargs="*", default=[], metavar="NAME=VALUE", help="Settings of submitit's jobs.")
    args = parser.parse_args()
    config = NetworkZooConfig(
        architecture=args.architecture, protocol=args.protocol, seeds=args.seeds, held_out=args.seeds // 5
    )
    known = list(IMAGE_TASKS.values())
    if config.reads_features:
        known = [task for task in default_tasks()[0] if not task.is_pair]
    folder, tasks = args.folder.resolve(), list(map(get_task, args.tasks)) if args.tasks else known
    build = partial(build_network_zoo, tasks, folder, config, args.data_root, cache=folder.parent / "features")
    if args.jobs:
        run_jobs(build, args)
    else:
        build()
    rows, accuracies = load_zoo(str(args.folder)), defaultdict(list)
    for task, checkpoint, metrics in zip(rows["task"], rows["checkpoint"], rows["metrics"], strict=True):
        if checkpoint == config.keep - 1:
            accuracies[task].append(100 * metrics["test"])
    for task, values in accuracies.items():
        print(
            f"{task}: {len(values)} networks, test accuracy {sum(values) / len(values):.2f}, {min(values):.2f} to {max(values):.2f}"
        )


def run_jobs(build, args) -> None:
    """Each job builds its share; a job that is lost costs the group it was at, and the same command continues."""
    try:
        import submitit
    except ImportError as error:
        raise SystemExit('`--jobs` needs submitit: pip install "hf-weightgen[cluster]"') from error
    executor = submitit.AutoExecutor(args.folder / "jobs", cluster=args.cluster)
    settings = dict(entry.split("=", 1) for entry in args.job_args)
    executor.update_parameters(**{name: int(v) if v.isdigit() else v for name, v in settings.items()})
    with executor.batch():
        jobs = [executor.submit(build, progress=False, share=(i, args.jobs)) for i in range(args.jobs)]
    print("jobs:", *(job.job_id for job in jobs), flush=True)
    for job in jobs:
        job.result()


if __name__ == "__main__":
    main()

"""A generator in the place of a store of pretrained models: accuracy, seconds and bytes of both (D2NWG Table 3).

    python examples/reproduce/retrieval.py --generator runs/cnns/pipeline --zoo runs/images --out retrieval.json
    python examples/reproduce/retrieval.py --generator model_cards/code-generator --zoo runs/images runs/mlp --out retrieval.json

The paper has 30 Meta-Album datasets in 10 domains, a MobileNetV3 subnet of 3 M parameters fine-tuned on each for 100 epochs (the
last 20 are the zoo), and compares the pretrained models with the mean of 5 samples: 68.32 and 69.47 on average. It sets 40 seconds
of sampling against 6 hours of pretraining.

Here: the sets and the architectures of the zoos at hand. A store need not train again either, so that reading its
members from disk stands beside generating, and the bytes of its shards beside those of the generator (the frozen encoders, which
are no part of it, and its samples apart). Best ones are chosen on validation images, of as many members as samples. Accuracies are
those of the last checkpoints of members that the generator was trained on, on the same test images.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from command import typed
from tiny_zoo import load, make_parser, samples

from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.stacked import stack
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.networks import predict_networks
from hf_weightgen.zoo.schema import row_to_state_dict, zoo_state_dicts


PAPER = (
    "paper, Table 3, average of 10 domains: pretrained 68.32, D2NWG 69.47; 6 hours of pretraining, 40 s of sampling"
)


def main():
    args, rows = make_parser(__doc__, n=5, zoos="+").parse_args(), []
    for zoo in args.zoo:
        rows += retrieved(argparse.Namespace(**vars(args) | {"zoo": zoo}))
        write_results(args.out, "D2NWG, Table 3", typed(), args.seed, rows)
    print(PAPER)


def retrieved(args: argparse.Namespace) -> list[dict]:
    """Rows of one zoo."""
    pipe, specs, configs, data, zoo, architecture = load(args)
    of_generator, of_zoo = weigh(pipe.folder, "**/*.safetensors"), weigh(Path(args.zoo), "data/*.parquet")
    where, rows = list(zip(zoo["task"], zoo["split"], zoo["checkpoint"], strict=True)), []
    last = max(zoo["checkpoint"])
    samples(pipe, data, specs[0], [], "generated", 1, args.seed, architecture)  # the first call loads the encoders
    for spec in specs:
        stored = [i for i, place in enumerate(where) if place == (spec.name, "train", last)]
        made, generating = timed(
            lambda spec=spec: samples(pipe, data, spec, [], "generated", args.n, args.seed, architecture)
        )
        _, reading = timed(lambda spec=spec: read(args.zoo, spec.name, args.n))
        for method, networks, costs, size in (
            ("stored", list(zoo_state_dicts(zoo, stored)), reading, of_zoo),
            ("generated", made, generating, of_generator),
        ):
            row = {"task": spec.name, "architecture": zoo[stored[0]]["arch"]["name"], "method": method}
            row |= scores(configs[spec.name], data[spec.name], networks, args.n, args.seed)
            rows.append(row | costs | {"seconds_for": args.n, "bytes": size})
    print(summary(rows, len(zoo)))
    return rows


def scores(config, data, networks: Sequence[Mapping], n: int, seed: int) -> dict:
    """Test accuracies in points; the best one on validation, of n of the networks."""
    params = stack(networks)
    test, validation = (
        100 * (predict_networks(config, params, data.inputs(part)) == part.labels).double().mean(1)
        for part in (data.test, data.validation)
    )
    pool = torch.randperm(len(networks), generator=torch.Generator().manual_seed(seed))[:n]
    best = test[pool[validation[pool].argmax()]].item()
    spread = test.std(correction=min(1, len(test) - 1)).item()
    row = {"metric": "accuracy", "mean": test.mean().item(), "std": spread, "max": test.max().item()}
    return row | {"best": best, "best_of": len(pool), "n": len(test)}


def timed(make: Callable[[], list[dict]]) -> tuple[list[dict], dict[str, float]]:
    """What is made, in how many seconds of the clock and of all processors."""
    clock, processors = time.perf_counter(), time.process_time()
    made = make()
    return made, {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processors}


def read(zoo: str, task: str, n: int) -> list[dict]:
    """n networks of a task from a zoo that is not open yet; the system may still have its files cached."""
    rows = load_zoo(zoo, streaming=True, filters=[("task", "==", task), ("split", "==", "train")])
    found = [row_to_state_dict(row) for row in itertools.islice(rows, n)]
    if len(found) < n:
        raise SystemExit(f"The zoo has {len(found)} networks of {task!r} to read, `--n` asks for {n}.")
    return found


def weigh(folder: Path | None, pattern: str) -> int | None:
    """Bytes of the files of a local folder; of one that is on the Hub they are not known here."""
    files = list(folder.glob(pattern)) if folder is not None and folder.is_dir() else []
    return sum(file.stat().st_size for file in files) or None


def summary(rows: Sequence[Mapping], stored: int) -> str:
    lines = [
        "| task | architecture | | accuracy | best of n | CPU seconds for n | megabytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
        lines.append(
            f"| {row['task']} | {row['architecture']} | {row['method']} | {row['mean']:.2f} ± {row['std']:.2f} ({row['n']}) | "
            f"{row['best']:.2f} ({row['best_of']}) | {row['cpu_seconds']:.2f} ({row['seconds_for']}) | {size} |"
        )
    return "\n".join([*lines, "", f"Megabytes: of all {stored} networks of all tasks, and of a generator of them."])


if __name__ == "__main__":
    main()

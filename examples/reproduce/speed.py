"""Seconds and memory that generated adapters cost in a warm process: one prompt with one sample, and with fifty.

    python examples/reproduce/speed.py --out examples/reproduce/results/speed.json

The prompt's encoding is part of the time, imports and loading are not. Told are the median and the slowest of several
calls, each with a prompt that was never asked before, and the process's peak of resident memory.

    python examples/reproduce/speed.py --format json

prints something else: what training, evaluating and generating small networks costs beside the plain loop, see `ratios.py`.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import ratios
import torch

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.hub.cards import add_figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="bundled")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--batch", type=int, default=50, help="Samples of the larger call.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the table.")
    parser.add_argument("--card", type=Path, help="Folder of the generator: its card gets the table.")
    parser.add_argument("--format", choices=("json", "table"), help="Print ratios to the plain loop in this form.")
    parser.add_argument("--data_root", help="Folder with datasets under their Hub ids: ratios on MNIST, not on noise.")
    parser.add_argument("--repeats", type=int, default=5, help="Of each side of a ratio; the median counts.")
    args = parser.parse_args()

    if args.format:
        rows = ratios.measure(args.generator, args.data_root, args.batch, args.repeats)
        print(json.dumps(rows, indent=1) if args.format == "json" else ratios.table(rows))
        if args.out:
            command = f"python examples/reproduce/speed.py --format json --batch {args.batch} --repeats {args.repeats}"
            write_results(args.out, "ratios", command, 0, rows)
        return
    pipe = WeightGenPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    labels = list(pipe.config.tasks[0]["labels"])
    known = pipe.config.tasks[0]["name"]

    def seconds(samples: int, call: int) -> float:
        generator = torch.Generator().manual_seed(args.seed + call)
        start = time.perf_counter()
        pipe(f"{known}, variant {samples}.{call}", labels=labels, num_samples=samples, generator=generator)
        return time.perf_counter() - start

    rows = []
    for samples in (1, args.batch):
        seconds(samples, -1)  # the first call warms up
        times = [seconds(samples, call) for call in range(args.calls)]
        row = {"task": known, "method": f"{samples} at once", "metric": "seconds", "mean": statistics.median(times)}
        row |= {"max": max(times), "n": len(times), "seconds_per_adapter": statistics.median(times) / samples}
        rows.append(row)
    # Linux counts in kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rows.append({"task": known, "method": "peak resident memory", "metric": "GB", "mean": peak, "n": 1})
    command = f"python examples/reproduce/speed.py --calls {args.calls} --batch {args.batch} --seed {args.seed}"
    if args.out:
        write_results(args.out, "speed", command, args.seed, rows)
    print(summary(rows))
    if args.card:
        add_figures(args.card, "Speed", command, summary(rows))


def summary(rows: list[dict]) -> str:
    *calls, memory = rows
    lines = ["| adapters | s a call, median (slowest) | s an adapter |", "|---|---|---|"]
    for row in calls:
        lines.append(f"| {row['method']} | {row['mean']:.3f} ({row['max']:.3f}) | {row['seconds_per_adapter']:.4f} |")
    threads = torch.get_num_threads()
    return "\n".join([*lines, "", f"{threads} thread(s); peak resident memory {memory['mean']:.2f} GB."])


if __name__ == "__main__":
    main()

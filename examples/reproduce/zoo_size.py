"""How much a generator of heads gains from more subsets and more datasets to learn from (D2NWG Figure 6a, appendix C.3).

    for heads in 512 1024 2048; do
        accelerate launch examples/train_few_shot.py --heads $heads --output_dir runs/heads-$heads
    done
    python examples/reproduce/zoo_size.py --runs runs/heads-* --unseen banking77 --out zoo_size.json

With `--sets` of other lengths the runs differ in datasets. Replaced: zoos of 5,000, 10,000 and 20,000 subsets of ImageNet by as many
as `--heads` says, on other sets; CIFAR-10 and STL-10 by classes that no training saw, in tasks of 5 classes with `--shots` examples
each. `generated_top_3_by_queries` is near to the paper's measure, the best 5 of 50 by the test images. Ridge regression on the same
examples, and on the names of classes where the generator reads them, tuned on `--tuning`, says what no zoo is needed for. A plot stands beside the table.
"""

import json
from functools import partial
from pathlib import Path

from command import typed
from few_shot import TUNING, draw, heads, load, make_parser, mean_feature, name_embeds, read_sets, refuse_known
from plots import pyplot

from hf_weightgen.evaluation.few_shot import few_shot_rows, tune, with_names
from hf_weightgen.evaluation.table import write_results


PAPER = "paper, Figure 6a, 5,000, 10,000 and 20,000 subsets: CIFAR-10 39.6, 42.2, 52.6; STL-10 44.7, 64.8, 80.5"


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="Output folders of `train_few_shot.py`.")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--draws", type=int, default=50, help="Heads of a task.")
    args = parser.parse_args()
    zoos = {run: json.loads((run / "zoo" / "zoo_config.json").read_text()) for run in args.runs}
    pipes = {run: load(run / "pipeline", args) for run in args.runs}
    refuse_known(pipes.values(), args)
    pipe = pipes[args.runs[0]]
    known, unseen = read_sets(pipe, args, args.tuning, "train"), read_sets(pipe, args, args.unseen, "test")
    seen, mean = draw(known, args.shots, TUNING // len(known) + 1, args.seed + 1), mean_feature(known)
    names = {} if args.images else name_embeds(pipe, [*known.values(), *unseen.values()])
    fits, rows = tune(seen, mean), []
    fits_named = tune([with_names(task, names) for task in seen], mean) if names else {}
    for name, one in unseen.items():
        tasks = draw({name: one}, args.shots, args.tasks, args.seed)
        fitted = {"ridge": [fits["ridge"](task) for task in tasks]}
        if names:
            fitted["ridge_with_names"] = [fits_named["ridge"](with_names(task, names)) for task in tasks]
        for run, pipe in pipes.items():
            own = few_shot_rows(
                name, tasks, fitted, {"generated": partial(heads, pipe, args.seed)}, args.seed, args.draws
            )
            size = {"heads": zoos[run]["tasks"], "sets": len(zoos[run]["sets"])}
            rows += [row | size for row in own]
            told = ", ".join(f"{row['method']} {row['mean']:.2f}" for row in own)
            print(f"{name}, {size['heads']} heads of {size['sets']} set(s): {told}", flush=True)
            write_results(args.out, "D2NWG, Figure 6a", typed(), args.seed, rows)
    plot(rows, args.out.with_suffix(".png"))
    print(PAPER)


def plot(rows: list[dict], path: Path) -> None:
    plt = pyplot()
    x = "heads" if len({row["heads"] for row in rows}) > 1 else "sets"
    figure, axis = plt.subplots(figsize=(4, 3))
    for name in dict.fromkeys(row["task"] for row in rows):
        for method, line in (("generated", "-"), ("ridge", ":")):
            own = sorted((row[x], row["mean"]) for row in rows if (row["task"], row["method"]) == (name, method))
            axis.plot(*zip(*own, strict=True), line, marker="o", label=f"{name}, {method}")
    axis.set(xlabel=x, ylabel="accuracy", xscale="log")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()

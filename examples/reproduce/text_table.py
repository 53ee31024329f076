"""The honest table of a generator of adapters over all its tasks (D2NWG Table 5, here on all-MiniLM-L6-v2), and unseen tasks.

    python examples/reproduce/text_table.py --zoo runs/text-zoo --out examples/reproduce/results/d2nwg_text.json
    python examples/reproduce/text_table.py --tasks one.json two.json --out unseen.json     # tasks of your own, unseen

`--card FOLDER` also writes the table into the card of the generator in FOLDER, and the rows beside it. Each task's rows
are written as soon as they are there, and a second call continues with the missing tasks.
"""

import argparse
import json
import sys
from pathlib import Path

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation.generator import evaluate_generator
from hf_weightgen.evaluation.table import format_table, write_results
from hf_weightgen.hub.cards import EVALUATION, add_figures, add_results, told_place
from hf_weightgen.targets.tasks import TASKS, get_task, load_task_spec
from hf_weightgen.zoo.tasks import TEST_LIMIT, load_tasks


LEGEND = """\
In points, on at most {rows:,} test rows, mean ± std over the adapters of a row: accuracy{except_for}.
- `zoo`: the members that the generator was trained on; `generated`: from prompts that it was trained on; `lookup`: random
  members of the task with the nearest known prompt; `zoo_average`, `gaussian`: the members' average, and draws around it;
  `noise_at_distance`: members with noise that takes them as far from the zoo as the generated ones are;
- `generated_held_out_prompts`: from prompts that it has never seen; `generated_mismatched`: from prompts of other tasks, in
  balanced accuracy; `generated_swapped`: with the two class names swapped; `zoo_start`: the adapter that all members start
  from; `cosine_label_names`: nearest class name in the text encoder; `majority`: the most frequent class;
- `best of n`: chosen on validation; `L2`: median distance to the nearest member, for the zoo to one of another run;
  `spread`: median distance between two of them.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="bundled")
    parser.add_argument("--zoo", help="Folder or Hub id of the zoo.")
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--tasks", nargs="*", help="Known tasks or JSON files. Default: all that the generator knows.")
    parser.add_argument("--n", type=int, default=10, help="Networks per row.")
    parser.add_argument("--best_of", type=int, help="Samples that the best one is chosen from. Default: --n.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action="store_true", help="Predict under bfloat16 autocast: faster, and a few predictions differ."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--card", type=Path, help="Folder of the generator: its card gets the table, and it the rows.")
    args = parser.parse_args()

    pipe = WeightGenPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    known = [task["name"] for task in pipe.config.tasks]
    specs = [load_task_spec(name) if name.endswith(".json") else get_task(name) for name in args.tasks or known]
    names, table = {spec.name for spec in specs}, f"{type(pipe).__name__.removesuffix('Pipeline').lower()}_text"
    seen = names <= set(known)
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    command = command_of(args)
    missing = [spec for spec in specs if not any(row["task"] == spec.name for row in rows)]
    others = [task for task in TASKS.values() if task.name not in names]  # their test splits are kept out of training
    data = load_tasks([*specs, *others], args.data_root) if missing else {}
    for spec in missing:
        print(spec.name, file=sys.stderr, flush=True)
        new = evaluate_generator(
            pipe,
            spec,
            args.data_root,
            args.zoo,
            n=args.n,
            best_of=args.best_of,
            seed=args.seed,
            data=data[spec.name],
            bf16=args.bf16,
        )
        rows += new
        print(format_table(new), flush=True)
        write_results(args.out, table, command, args.seed, rows)
    print(summary(rows))
    if args.card and seen:
        write_results(args.card / EVALUATION, table, command, args.seed, rows)
        add_results(args.card, rows, {spec.name: spec.dataset_id for spec in specs})
    if args.card:
        add_figures(args.card, "Figures" if seen else "Unseen tasks", command, summary(rows))


def command_of(args) -> str:
    """The command that makes the rows again; absolute folders are each machine's own, and told by their names."""
    parts = ["python examples/reproduce/text_table.py"]
    parts += [f"--generator {args.generator}"] * (args.generator != "bundled")
    parts += [f"--zoo {told_place(args.zoo)}"] if args.zoo else []
    parts += ["--tasks " + " ".join(Path(name).name for name in args.tasks)] if args.tasks else []
    parts += [f"--best_of {args.best_of}"] if args.best_of else []
    return " ".join([*parts, f"--n {args.n} --seed {args.seed}", *["--bf16"] * args.bf16])


def summary(rows: list[dict]) -> str:
    """A line per task and the criteria over all counted tasks, in Markdown; figures in points, 95 % intervals in brackets."""
    tasks = {}
    for row in rows:
        tasks.setdefault(row["task"], {})[row["method"]] = row
    columns = [
        "zoo",
        "generated",
        "lookup",
        "zoo_average",
        "gaussian",
        "noise_at_distance",
        "generated_held_out_prompts",
    ]
    columns += ["generated_mismatched", "generated_swapped", "zoo_start", "cosine_label_names", "majority"]
    head = ["task", *columns, "generated - zoo", "best of n / zoo", "L2 / zoo", "spread / zoo"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, row in tasks.items():
        made, zoo = row["generated"], row["zoo"]
        cells = [
            task + ("" if zoo.get("counted", True) else " (not counted)"),
            *(_points(row.get(name)) for name in columns),
        ]
        difference = made.get("difference") or {}
        cells.append(_interval(difference) if difference.get("ci95") else "-")
        cells.append(f"{_number(made['best'])} / {_number(zoo['best'])}")
        cells.append(f"{_number(made['novelty_l2'], 2)} / {_number(zoo.get('novelty_l2_other_runs'), 2)}")
        cells.append(f"{_number(made.get('spread_l2'), 2)} / {_number(zoo.get('spread_l2'), 2)}")
        lines.append("| " + " | ".join(cells) + " |")
    others = {
        task: row["generated"]["metric"] for task, row in tasks.items() if row["generated"]["metric"] != "accuracy"
    }
    except_for = "".join(f", for {task} {metric.replace('_', ' ')}" for task, metric in others.items())
    legend = LEGEND.format(rows=TEST_LIMIT, except_for=except_for)
    return "\n".join([legend, *lines, "", *_criteria(tasks)])


def _criteria(tasks: dict[str, dict[str, dict]]) -> list[str]:
    """How many tasks reach what; only tasks whose zoo is clearly above the majority class count."""
    counted = [
        row
        for row in tasks.values()
        if row["zoo"].get("counted") and row["generated"].get("difference", {}).get("ci95")
    ]
    if not counted:
        return _criteria_of_unseen(tasks)

    def count(holds) -> str:
        told = [holds(row) for row in counted]
        told = [bool(value) for value in told if value is not None]
        return f"{sum(told)} of {len(told)}"

    def mean(row: dict, method: str) -> float | None:
        return row[method]["mean"] if method in row else None

    def near(row: dict, method: str, points: float) -> bool | None:
        found = row[method]
        return None if found["mean"] is None else abs(found["mean"] - found["expected"]) <= points

    lines = {
        "generated - zoo at least -1.0 points, interval not wholly below -0.5": count(
            lambda r: r["generated"]["difference"]["mean"] >= -1.0 and r["generated"]["difference"]["ci95"][1] >= -0.5
        ),
        "best of n, selected on validation, at least the best of as many zoo members": count(
            lambda r: r["generated"]["best"] >= r["zoo"]["best"]
        ),
        "distance to the nearest member at least the zoo's own (sibling checkpoints are members)": count(
            lambda r: r["generated"]["novelty_l2"] >= r["zoo"]["novelty_l2"]
        ),
        "the same against the zoo's distance between runs": count(
            lambda r: r["generated"]["novelty_l2"] >= r["zoo"]["novelty_l2_other_runs"]
        ),
        "spread at least half the zoo's": count(lambda r: r["generated"]["spread_l2"] >= r["zoo"]["spread_l2"] / 2),
        "above zoo plus noise at the same distance": count(
            lambda r: (
                None if mean(r, "noise_at_distance") is None else mean(r, "generated") > mean(r, "noise_at_distance")
            )
        ),
        "held-out prompts at least 95 % of seen prompts": count(
            lambda r: mean(r, "generated_held_out_prompts") >= 0.95 * mean(r, "generated")
        ),
        "mismatched prompts within 5 points of chance": count(lambda r: near(r, "generated_mismatched", 5)),
        "swapped label names within 3 points of what they should give": count(
            lambda r: near(r, "generated_swapped", 3)
        ),
        "above cosine to label names": count(lambda r: mean(r, "generated") > mean(r, "cosine_label_names")),
    }
    average = sum(row["generated"]["difference"]["mean"] for row in counted) / len(counted)
    off = [row["generated_mismatched"]["mean"] - row["generated_mismatched"]["expected"] for row in counted]
    kept = {
        task: 100 * mean(row, "generated_held_out_prompts") / mean(row, "generated")
        for task, row in tasks.items()
        if row in counted
    }
    lowest = min(kept, key=kept.get)
    return [
        "Of the tasks that count:",
        "",
        *(f"- {name}: {value}" for name, value in lines.items()),
        f"- generated - zoo on average: {average:+.2f}; mismatched prompts above chance on average: {sum(off) / len(off):+.1f}",
        f"- held-out prompts keep {sum(kept.values()) / len(kept):.1f} % of the accuracy on average, at least {kept[lowest]:.1f} % ({lowest})",
    ]


def _criteria_of_unseen(tasks: dict[str, dict[str, dict]]) -> list[str]:
    rivals = ("cosine_label_names", "lookup", "zoo_average", "majority", "zoo_start")
    lines = []
    for rival in rivals:
        pairs = [(row["generated"]["mean"], row[rival]["mean"]) for row in tasks.values() if rival in row]
        pairs = [pair for pair in pairs if pair[1] is not None]
        if pairs:
            lines.append(f"- generated above {rival}: {sum(mine > its for mine, its in pairs)} of {len(pairs)}")
    about = "No member of these tasks or of their families is in the zoo. The task files are the caller's own."
    return [about, "", *lines]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _points(row: dict | None) -> str:
    if not row or row["mean"] is None:
        return "-"
    expected = f" (expected {row['expected']:.1f})" if row.get("expected") is not None else ""
    return f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if row["n"] > 1 else "") + expected


def _interval(difference: dict) -> str:
    low, high = difference["ci95"]
    return f"{difference['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"


if __name__ == "__main__":
    main()

"""The honest table of a text generator over all its tasks (D2NWG Table 5, here on all-MiniLM-L6-v2), and unseen tasks.

    python examples/reproduce/text_table.py --zoo runs/text-zoo --out examples/reproduce/results/d2nwg_text.json
    python examples/reproduce/text_table.py --tasks one.json two.json --out unseen.json     # tasks of your own, unseen

Each task's rows are written as soon as they are there, and a second call continues with the missing tasks.
"""

import argparse
import json
import sys
from pathlib import Path

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation.generator import evaluate_generator
from hf_weightgen.evaluation.table import format_table, write_results
from hf_weightgen.targets.tasks import TASKS, get_task, load_task_spec
from hf_weightgen.zoo.tasks import load_tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="bundled")
    parser.add_argument("--zoo", help="Folder or Hub id of the zoo.")
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--tasks", nargs="*", help="Known tasks or JSON files. Default: all that the generator knows.")
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    pipe = WeightGenPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    known = [task["name"] for task in pipe.config.tasks]
    specs = [load_task_spec(name) if name.endswith(".json") else get_task(name) for name in args.tasks or known]
    names = {spec.name for spec in specs}
    data = load_tasks([*specs, *(task for task in TASKS.values() if task.name not in names)], args.data_root)
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    command = f"python examples/reproduce/text_table.py --n {args.n} --seed {args.seed}"
    for spec in specs:
        if any(row["task"] == spec.name for row in rows):
            continue
        print(spec.name, file=sys.stderr, flush=True)
        new = evaluate_generator(pipe, spec, args.data_root, args.zoo, args.n, args.seed, data=data[spec.name])
        rows += new
        print(format_table(new), flush=True)
        write_results(args.out, "d2nwg_text", command, args.seed, rows)
    print(summary(rows))


def summary(rows: list[dict]) -> str:
    """One line per task: zoo, generated, their difference with its interval, and whether the first criterion holds."""
    by_task = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["method"]] = row
    lines, held, counted = [], 0, 0
    for task, row in by_task.items():
        generated, zoo = row["generated"], row["zoo"]
        difference = generated.get("difference")
        line = f"{task:24s} generated {generated['mean']:6.2f}"
        if difference and difference.get("ci95"):
            low, high = difference["ci95"]
            good = difference["mean"] >= -1.0 and high >= -0.5
            counts = bool(zoo.get("counted"))
            held, counted = held + (good and counts), counted + counts
            line += f"  zoo {zoo['mean']:6.2f}  difference {difference['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"
            line += ("  holds" if good else "  fails") if counts else "  not counted"
        lines.append(line)
    return "\n".join([*lines, f"holds on {held} of {counted} counted tasks"])


if __name__ == "__main__":
    main()

"""What fine-tuning gives for more patience: LoRA adapters that read as much of a task as the generator's training did.

    python examples/reproduce/longer_lora.py --zoo runs/text-zoo --out examples/reproduce/results/longer_lora.json

The members of the zoo read 4,000 sentences each (SST-2: 10,000), the generator's task loss reads more of the same pools. So
these adapters start like members, read the same pools, and go on for `--passes` sentences. They are what a generated
adapter is to be compared with, if the time that each takes does not matter.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from hf_weightgen.evaluation.generator import zoo_members
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.hub.cards import add_figures
from hf_weightgen.targets.base_models import MINILM, load_classifier, load_encoder, load_tokenizer
from hf_weightgen.targets.functional import AdapterTarget
from hf_weightgen.targets.tasks import TASKS, get_task
from hf_weightgen.zoo.build import train_members, training_pool
from hf_weightgen.zoo.recipe import ZooConfig, default_tasks, lora_config
from hf_weightgen.zoo.tasks import load_tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", required=True, help="Folder or Hub id of the zoo.")
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--tasks", nargs="*", help="Default: all that have members.")
    parser.add_argument("--passes", type=int, default=14_000, help="Sentences that an adapter reads.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="Train under bfloat16 autocast.")
    parser.add_argument("--table", type=Path, help="Results of text_table.py, to put generated adapters beside.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--card", type=Path, help="Folder of the generator: its card gets the table.")
    args = parser.parse_args()

    specs = [get_task(name) for name in args.tasks] if args.tasks else default_tasks()[0]
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    missing = [spec for spec in specs if not any(row["task"] == spec.name for row in rows)]
    data = load_tasks([*missing, *(t for t in TASKS.values() if t not in missing)], args.data_root) if missing else {}
    parts = [f"python examples/reproduce/longer_lora.py --passes {args.passes} --seeds {args.seeds}"]
    parts += ["--bf16"] * args.bf16 + (["--tasks", *args.tasks] if args.tasks else [])
    command = " ".join(parts)
    base = zoo_members(args.zoo)[3]
    config = ZooConfig(seeds=args.seeds, passes=args.passes, passes_of={}, checkpoints=(1.0,), bf16=args.bf16, seed=1)
    target, tokenizer = AdapterTarget(load_classifier(MINILM, num_labels=2), lora_config()), load_tokenizer(MINILM)
    for spec in missing:
        start = time.perf_counter()
        pool = training_pool(data[spec.name], ZooConfig())
        members = list(
            train_members(target, tokenizer, load_encoder(), replace(data[spec.name], train=pool), base, config)
        )
        scores = [100 * member["metrics"]["test"] for member in members]
        mean = sum(scores) / len(scores)
        spent = {"passes": args.passes, "seconds": time.perf_counter() - start}
        rows.append(
            {"task": spec.name, "method": "longer_lora", "metric": "accuracy", "mean": mean, "n": len(scores)} | spent
        )
        print(rows[-1], flush=True)
        write_results(args.out, "longer_lora", command, 1, rows)
    table = json.loads(args.table.read_text())["rows"] if args.table else []
    print(summary(rows, table))
    if args.card:
        add_figures(args.card, "Longer fine-tuning", command, summary(rows, table))


def summary(rows: list[dict], table: list[dict]) -> str:
    """A line per task, in Markdown: the zoo, adapters that were trained for longer, generated adapters."""
    known = {(row["task"], row["method"]): row["mean"] for row in table if row["metric"] == "accuracy"}
    lines = ["| task | zoo | trained for longer | generated |", "|---|---|---|---|"]
    for row in rows:
        zoo, made = known.get((row["task"], "zoo")), known.get((row["task"], "generated"))
        cells = [row["task"], *("-" if x is None else f"{x:.1f}" for x in (zoo, row["mean"], made))]
        lines.append("| " + " | ".join(cells) + " |")
    each = sum(row["seconds"] / row["n"] for row in rows) / len(rows)
    return "\n".join(
        [*lines, "", f"Each of the longer ones took {each:.0f} s to train, reading and scoring included."]
    )


if __name__ == "__main__":
    main()

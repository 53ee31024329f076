"""LoRA adapters of two generators on the same test rows, beside the zoo that both learned from: codes (IGPG) against diffusion (D2NWG).

    python examples/reproduce/two_generators.py --generator model_cards/text-code-generator --beside bundled --zoo model_cards/text-zoo --out two.json

Both are asked by the same prompts, in turn, and their adapters see the same sentences; `zoo` is the last checkpoint of each run, with
the one that is held out. Seconds are those of generating alone.
"""

import argparse
import time
from pathlib import Path

import torch
from command import typed

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation.generator import Predictor, zoo_members
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.hub.cards import add_figures, add_results
from hf_weightgen.targets.mixed import target_numbers
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.zoo.tasks import TEST_LIMIT, evaluation_subset, load_tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="Folder or Hub id.")
    parser.add_argument("--beside", default="bundled", help="Folder or Hub id of the other one.")
    parser.add_argument("--zoo", required=True, help="Folder or Hub id of the zoo.")
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--tasks", nargs="*", help="Default: all that both generators know.")
    parser.add_argument("--n", type=int, default=5, help="Adapters of each generator for each task.")
    parser.add_argument("--test_rows", type=int, default=TEST_LIMIT, help="At most, of each task.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--card", type=Path, help="Folder of the first generator: its card gets the table.")
    args = parser.parse_args()

    pipes = [WeightGenPipeline.from_pretrained(name) for name in (args.generator, args.beside)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe("any task at all")  # what is read at the first call is no part of the seconds
    known = [[task["name"] for task in pipe.config.tasks] for pipe in pipes]
    names = args.tasks or [name for name in known[0] if name in known[1]]
    specs = [get_task(name) for name in names]
    data, (members, held_out, seeds, _) = load_tasks(specs, args.data_root), zoo_members(args.zoo)
    adapters = [target for target in pipes[0].targets if target["kind"] == "adapter"]
    predict, rows = Predictor(adapters[0]), []
    for spec in specs:
        test = evaluation_subset(data[spec.name].test, args.test_rows)
        labels = torch.tensor(list(test["label"]))
        for pipe in pipes:
            generator, start = torch.Generator().manual_seed(args.seed), time.perf_counter()
            prompts = [spec.prompts[i % len(spec.prompts)] for i in range(args.n)]
            asked = {"labels": list(spec.labels), "architecture": adapter_of(pipe, spec.name)}
            made = pipe(prompts, **asked, generator=generator).weights
            seconds = (time.perf_counter() - start) / args.n
            rows.append(row(spec.name, type(pipe).__name__, made, predict(made, test), labels) | {"seconds": seconds})
        last = dict(zip(seeds[spec.name], members[spec.name], strict=True))  # of each run, whose rows are in order
        own = [*last.values(), held_out[spec.name][-1]]
        rows.append(row(spec.name, "zoo", own, predict(own, test), labels))
        print("  ".join(f"{one['method']} {one['mean']:.1f}" for one in rows[-3:]), spec.name, flush=True)
        write_results(args.out, "LoRA adapters by codes and by diffusion", typed(), args.seed, rows)
    print(summary(rows))
    if args.card:
        generated = [one | {"method": "generated"} for one in rows if one["method"] == type(pipes[0]).__name__]
        zoo = [one for one in rows if one["method"] == "zoo"]
        add_results(args.card, [*generated, *zoo], {spec.name: spec.dataset_id for spec in specs})
        add_figures(args.card, "Beside another generator", typed(), summary(rows))


def summary(rows: list[dict]) -> str:
    """A line per task, means over tasks and the paired difference of the two generators, in Markdown."""
    methods = list(dict.fromkeys(one["method"] for one in rows))
    scores = torch.tensor(
        [[one["mean"] for one in rows if one["method"] == method] for method in methods]
    )  # (3, tasks)
    seconds = [torch.tensor([one["seconds"] for one in rows if one["method"] == method]) for method in methods[:2]]
    lines = ["| task | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for task, own in zip(dict.fromkeys(one["task"] for one in rows), scores.T.tolist(), strict=True):
        lines.append(f"| {task} | " + " | ".join(f"{mean:.1f}" for mean in own) + " |")
    lines.append("| mean | " + " | ".join(f"{mean:.2f}" for mean in scores.mean(1)) + " |")
    paired = scores[0] - scores[1]
    error = (paired.std() / len(paired) ** 0.5).item()
    costs = " and ".join(f"{one.median():.2f}" for one in seconds)
    told = f"Difference of the first two: {paired.mean():+.2f} ± {error:.2f} (standard error over tasks); {costs} s an adapter (median)."
    return "\n".join([*lines, "", told])


def adapter_of(pipe, task: str) -> str | None:
    """By which name a task's adapter is asked for, where it has other networks too."""
    known = next(one for one in pipe.config.tasks if one["name"] == task)
    own = [pipe.targets[number] for number in target_numbers(known)]
    return None if len(own) == 1 else next(target["name"] for target in own if target["kind"] == "adapter")


def row(task: str, method: str, made: list, predictions: torch.Tensor, labels: torch.Tensor) -> dict:
    scores = 100 * (predictions == labels).double().mean(1)
    told = {"task": task, "method": method, "metric": "accuracy", "n": len(made), "rows": len(labels)}
    return told | {"mean": scores.mean().item(), "std": scores.std(correction=min(1, len(made) - 1)).item()}


if __name__ == "__main__":
    main()

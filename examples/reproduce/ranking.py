"""Which task does a generator that writes codes take a prompt, or a few images of each class, to be? (IGPG, by its own likelihood)

    python examples/reproduce/ranking.py --generator runs/igpg/pipeline --zoo runs/images --n 5 --out ranking.json

Of all tasks that the generator knows by prompts that no training saw; of those of the zoo by images of its datasets too. A row tells
in which share of the requests the first of the ranked pairs is the task that was asked for, and in which share it is among the first
three of different tasks, beside those of a guess. The paper has no such table.
"""

import torch
from command import typed
from tiny_zoo import few, load, make_parser

from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.tasks import get_task


def main():
    args = make_parser(__doc__, n=5).parse_args()
    pipe, specs, _, data, *_ = load(args)
    known, rows = [get_task(task["name"]) for task in pipe.config.tasks], []
    for spec in known:
        asked = {"held_out_prompts": [{"prompt": prompt} for prompt in spec.held_out_prompts[: args.n]]}
        if spec in specs:
            generator, names = torch.Generator().manual_seed(args.seed), list(spec.labels)
            shown = [few(data[spec.name].test, names, range(len(names)), generator) for _ in range(args.n)]
            asked["five_images_a_class"] = [{"dataset": dataset} for dataset in shown]
        for method, requests in asked.items():
            places = [place(pipe.rank(**request), spec.name) for request in requests]
            if places:
                shares = {f"first_{k}": sum(p < k for p in places) / len(places) for k in (1, 3)}
                shares |= {f"chance_{k}": min(1.0, k / len(known)) for k in (1, 3)}
                rows.append({"task": spec.name, "method": method, "n": len(places)} | shares)
                print(rows[-1], flush=True)
    write_results(args.out, "IGPG, ranking", typed(), args.seed, rows)


def place(ranked: list[dict], task: str) -> int:
    """Of a task among the different ones of a ranking, from 0."""
    return list(dict.fromkeys(pair["task"] for pair in ranked)).index(task)


if __name__ == "__main__":
    main()

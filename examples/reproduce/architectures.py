"""Networks of several architectures from one generator (D2NWG, appendix C.1, Table 9; IGPG, with `train_igpg.py`).

    python examples/build_network_zoo.py runs/small-lenet --architecture small-lenet --seeds 20
    accelerate launch examples/train_d2nwg.py --zoo runs/images runs/small-lenet --output_dir runs/mixed
    python examples/reproduce/architectures.py --generator runs/mixed/pipeline --zoo runs/images runs/small-lenet --out architectures.json

The paper mixes a ResNet-44 for CIFAR-10, one for CIFAR-100 and a MobileNetV2 for CIFAR-10, each pair with an index of its own and
all padded to 700,490 weights. Here: small networks, any number of tasks and architectures, of which every pair has independently
trained networks; layouts of different sizes without padding; the architecture is told beside a prompt or a dataset. Networks of
the row `wrong_architecture` are asked for with another architecture of their task, by prompts, and decoded as these. Codes of another
architecture cannot be decoded as these: of IGPG's generators the row is `generated_mismatched`, images of another task.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from command import typed
from tiny_zoo import DISTANCES, load, make_parser, samples, table_of

from hf_weightgen.evaluation.table import format_table, write_results
from hf_weightgen.hub.cards import EVALUATION, add_figures, add_results
from hf_weightgen.targets.mixed import target_number, target_numbers
from hf_weightgen.targets.tasks import get_task


METHODS = (
    "random_init", "majority", "zoo", "zoo_held_out", "zoo_average", "gaussian", "kde", "noise_at_distance", "reconstruction",
    "generated", "generated_from_prompts", "generated_mismatched",
)  # fmt: skip
TABLE = "D2NWG, Table 9; IGPG, several architectures"
LEGEND = (
    "Test accuracy in points; `generated` networks are shown five other images of each class, and the difference to the zoo is theirs. "
    f"{DISTANCES} Noise, as far: members with noise, as far from the zoo as samples."
)
MISMATCHED, CONTROL = "generated_mismatched", "wrong_architecture"
COLUMNS = {
    "zoo": "zoo", "zoo_held_out": "held out", "generated": "generated", "generated_from_prompts": "from prompts",
    "zoo_average": "plain average", "gaussian": "Gaussian", "kde": "KDE", "noise_at_distance": "noise, as far", "random_init": "random",
    "reconstruction": "reconstruction", CONTROL: "wrong architecture", MISMATCHED: "other task",
}  # fmt: skip
PAPER = {"ResNet-44, CIFAR-10": (94.01, 94.10), "ResNet-44, CIFAR-100": (71.63, 71.64), "MobileNetV2, CIFAR-10": (92.88, 93.11)}  # fmt: skip


def main():
    parser = make_parser(__doc__, n=20, zoos="+")
    parser.add_argument("--card", type=Path, help="Folder of the generator: its card gets the table, and it the rows.")
    args, rows, command = parser.parse_args(), [], typed()
    for table in itertools.chain.from_iterable(tables(args, zoo) for zoo in args.zoo):
        rows += table
        print(f"{table[0]['architecture']}, {format_table(table)}\n", flush=True)
        write_results(args.out, TABLE, command, args.seed, rows)
    print(summary(rows))
    if args.card:
        pairs = [row | {"task": f"{row['task']} ({row['architecture']})"} for row in rows]
        datasets = {pair["task"]: get_task(row["task"]).dataset_id for pair, row in zip(pairs, rows, strict=True)}
        write_results(args.card / EVALUATION, TABLE, command, args.seed, pairs)
        add_results(args.card, pairs, datasets, "image-classification")
        add_figures(args.card, "Figures", command, f"{summary(rows)}\n\n{LEGEND}")


def tables(args, zoo: str) -> Iterator[list[dict]]:
    """The rows of each task of a zoo that the generator knows."""
    pipe, specs, configs, data, members, architecture = load(argparse.Namespace(**vars(args) | {"zoo": zoo}))
    writes_codes = hasattr(pipe, "encode_weights")
    for spec in specs:

        def generate(method: str, count: int, seed: int, spec=spec) -> list[dict]:
            if method == MISMATCHED and not writes_codes:
                return of_other_architectures(pipe, spec, architecture, count, seed)
            others = [other for other in specs if other is not spec and len(other.labels) == len(spec.labels)]
            return samples(pipe, data, spec, others, method, count, seed, architecture)

        rows = table_of(args, pipe, configs[spec.name], data[spec.name], members, generate, METHODS)
        for row in rows:
            row["architecture"] = architecture
            if row["method"] == MISMATCHED and not writes_codes:
                row["method"] = CONTROL
            if row["method"] == "reconstruction" and writes_codes:
                row |= of_codes(pipe, spec, architecture)
        yield rows


def of_codes(pipe, spec, architecture: str | None) -> dict:
    """How many codes a network has, and what they cost for each of its weights."""
    made = pipe(spec.prompts[0], labels=list(spec.labels), architecture=architecture)
    count, weights = made.latents.numel(), sum(tensor.numel() for tensor in made.weights[0].values())
    return {"codes": count, "bits_per_weight": count * math.log2(pipe.vqvae.config.num_codes) / weights}


def of_other_architectures(pipe, spec, architecture: str | None, count: int, seed: int) -> list[dict]:
    """Networks of an architecture from latents that were asked for with the task's other ones in turn; none if it has no other."""
    task = next(task for task in pipe.config.tasks if task["name"] == spec.name)
    number = target_number(pipe.targets, task, architecture)
    others = [pipe.targets[other]["name"] for other in target_numbers(task) if other != number]
    if not others:
        return []
    names, generator, made = list(spec.labels), torch.Generator().manual_seed(seed), []
    class_embeds = pipe.encoder.embed(names)[None]
    for i in range(count):
        asked = {"prompt": spec.prompts[i % len(spec.prompts)], "architecture": others[i % len(others)]}
        latents = pipe(**asked, labels=names, output_type="latent", generator=generator).latents
        made += pipe._decode(latents, class_embeds, True, pipe.targets[number]["layout"], [generator])
    return made


def summary(rows: Sequence[Mapping]) -> str:
    """One line for each pair."""
    columns = [name for name in COLUMNS if any(row["method"] == name for row in rows)]
    head = ["task", "architecture", *(COLUMNS[name] for name in columns), "difference, 95 %", "best / zoo", "L2 / zoo"]
    head += ["spread / zoo", "codes", "bits per weight"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, architecture in dict.fromkeys((row["task"], row["architecture"]) for row in rows):
        of = {row["method"]: row for row in rows if (row["task"], row["architecture"]) == (task, architecture)}
        made, zoo, codes = of["generated"], of["zoo"], of["reconstruction"]
        cells = [task, architecture, *(told(of[name]) if name in of else "-" for name in columns)]
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(made["difference"]["mean"], *made["difference"]["ci95"]))
        cells.append(f"{made['best']:.1f} / {zoo['best']:.1f}")
        cells.append(f"{made['novelty_l2']:.1f} / {zoo['novelty_l2_other_runs']:.1f}")
        cells.append(f"{made['spread_l2']:.1f} / {zoo['spread_l2']:.1f}")
        cells += [f"{codes['codes']}", f"{codes['bits_per_weight']:.2f}"] if "codes" in codes else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    paper = "; ".join(f"{pair}: {zoo:.2f} -> {generated:.2f}" for pair, (zoo, generated) in PAPER.items())
    return "\n".join([*lines, "", f"paper, Table 9, pretrained -> generated: {paper}"])


def told(row: Mapping) -> str:
    return "-" if row["mean"] is None else f"{row['mean']:.2f}"


if __name__ == "__main__":
    main()

"""Networks of several architectures from one generator (D2NWG, appendix C.1, Table 9).

    python examples/build_network_zoo.py runs/lenet --architecture lenet
    accelerate launch examples/train_d2nwg.py --zoo runs/images runs/lenet --output_dir runs/mixed
    python examples/reproduce/architectures.py --generator runs/mixed/pipeline --zoo runs/images runs/lenet --out architectures.json

The paper mixes a ResNet-44 for CIFAR-10, one for CIFAR-100 and a MobileNetV2 for CIFAR-10, each pair with an index of its own and
all padded to 700,490 weights. Here: small networks, any number of tasks and architectures, of which every pair has independently
trained networks; layouts of different sizes without padding; the architecture is told beside a prompt or a dataset. Networks of
the row `wrong_architecture` are asked for with another architecture of their task, by prompts, and decoded as these.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from tiny_zoo import load, make_parser, samples, table_of

from hf_weightgen.evaluation.table import format_table, write_results
from hf_weightgen.targets.mixed import target_number, target_numbers


METHODS = (
    "random_init", "zoo", "zoo_held_out", "zoo_average", "reconstruction", "generated", "generated_from_prompts",
    "generated_mismatched",
)  # fmt: skip
CONTROL = "wrong_architecture"
RENAMED = {"generated_mismatched": CONTROL}
PAPER = {"ResNet-44, CIFAR-10": (94.01, 94.10), "ResNet-44, CIFAR-100": (71.63, 71.64), "MobileNetV2, CIFAR-10": (92.88, 93.11)}  # fmt: skip


def main():
    args, rows = make_parser(__doc__, n=20, zoos="+").parse_args(), []
    for table in itertools.chain.from_iterable(tables(args, zoo) for zoo in args.zoo):
        rows += table
        print(f"{table[0]['architecture']}, {format_table(table)}\n", flush=True)
        write_results(args.out, "D2NWG, Table 9", f"python {' '.join(sys.argv)}", args.seed, rows)
    print(summary(rows))


def tables(args, zoo: str) -> Iterator[list[dict]]:
    """The rows of each task of a zoo that the generator knows."""
    pipe, specs, configs, data, members, architecture = load(argparse.Namespace(**vars(args) | {"zoo": zoo}))
    for spec in specs:

        def generate(method: str, count: int, seed: int, spec=spec) -> list[dict]:
            if method == "generated_mismatched":
                return of_other_architectures(pipe, spec, architecture, count, seed)
            return samples(pipe, data, spec, [], method, count, seed, architecture)

        rows = table_of(args, pipe, configs[spec.name], data[spec.name], members, generate, METHODS)
        yield [
            row | {"architecture": architecture, "method": RENAMED.get(row["method"], row["method"])} for row in rows
        ]


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
    lines = [
        "| task | architecture | zoo | held out | generated | difference, 95 % | plain average | random | reconstruction | wrong architecture |",
        "|---" * 10 + "|",
    ]
    for task, architecture in dict.fromkeys((row["task"], row["architecture"]) for row in rows):
        of = {row["method"]: row for row in rows if (row["task"], row["architecture"]) == (task, architecture)}
        difference = of["generated"]["difference"]
        cells = [told(of[name]) for name in ("zoo", "zoo_held_out", "generated")]
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(difference["mean"], *difference["ci95"]))
        cells += [told(of[name]) for name in ("zoo_average", "random_init", "reconstruction", CONTROL)]
        lines.append(f"| {task} | {architecture} | {' | '.join(cells)} |")
    paper = "; ".join(f"{pair}: {zoo:.2f} -> {generated:.2f}" for pair, (zoo, generated) in PAPER.items())
    return "\n".join([*lines, "", f"paper, Table 9, pretrained -> generated: {paper}"])


def told(row: Mapping) -> str:
    return "-" if row["mean"] is None else f"{row['mean']:.2f}"


if __name__ == "__main__":
    main()

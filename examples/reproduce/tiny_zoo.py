"""Networks for a dataset from five images of each class, on the Tiny Model Zoo (D2NWG Tables 4, 20 and 21).

    python examples/reproduce/tiny_zoo.py --generator runs/cnns/pipeline --zoo runs/images --out tiny_zoo.json

Replaced: STL-10 by Fashion-MNIST; CLIP's image features by those of a small MobileNet; the published zoo by one that
`examples/build_network_zoo.py` trains in a short protocol. The paper's figures stand beside ours. Tasks whose rows of the same
generator, zoo, `--n` and `--seed` are in `--out` already are left as they are; `--card` puts the table into a generator's card.
"""

import argparse
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hf_weightgen import WeightGenOutput, WeightGenPipeline
from hf_weightgen.evaluation.generator import reconstruct_members
from hf_weightgen.evaluation.network_table import METHODS, network_table
from hf_weightgen.evaluation.table import format_table, write_results
from hf_weightgen.hub.cards import EVALUATION, add_figures, add_results, told_place
from hf_weightgen.targets.architectures import TargetConfig
from hf_weightgen.targets.image_encoders import MOBILENET, load_image_encoder
from hf_weightgen.targets.mixed import target_number
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.zoo.build_networks import SHORT, NetworkZooConfig
from hf_weightgen.zoo.features import load_texts
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.images import Images, load_images
from hf_weightgen.zoo.networks import keep_memory
from hf_weightgen.zoo.schema import zoo_state_dicts


SHOTS = 5
TABLE = "D2NWG, Tables 4 and 20"
COLUMNS = (
    "zoo", "zoo_held_out", "generated", "generated_from_prompts", "reconstruction", "random_init", "zoo_average", "gaussian", "kde",
    "pca_flow", "p_diff", "noise_0.15", "noise_at_distance", "generated_shuffled", "generated_mismatched",
)  # fmt: skip
DISTANCES = (
    "L2: median distance to the nearest member, and of members to the nearest one of another run; spread: median distance of two "
    "samples, of two members; both with hidden units matched."
)
LEGEND = (
    "Test accuracy in points. Every generated network is shown five other images of each class. Best: chosen on validation images, of as "
    f"many members as samples. {DISTANCES} `noise_at_distance`: members with noise, as "
    "far from the zoo as the samples. Shuffled and mismatched: the examples have wrong classes, or are those of another task."
)
PAPER = {  # Table 20: pretrained models; D2NWG's samples, "seen"
    "mnist": (82.82, 83.92),
    "svhn": (67.57, 61.81),
    "cifar10": (44.68, 43.08),
}


def main():
    parser = make_parser(__doc__, n=50)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="Rows. Default: all.")
    parser.add_argument("--card", type=Path, help="Folder of the generator: its card gets the table, and it the rows.")
    args = parser.parse_args()
    if args.card and args.methods is not METHODS:
        parser.error("--card needs all rows; leave --methods out")
    pipe, specs, configs, data, zoo, architecture = load(args)
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"command": ""}
    kept = before["command"].startswith(command_of(args))
    rows, commands = (before["rows"], [before["command"]]) if kept else ([], [])
    done = {row["task"] for row in rows}
    missing = [spec for spec in specs if spec.name not in done]
    if missing:  # `--tasks` also says of what mismatched examples may be
        commands.append(command_of(args) + (f" --tasks {' '.join(args.tasks)}" if args.tasks else ""))
    command = " && ".join(commands)
    for spec in missing:
        others = [other for other in specs if other is not spec and len(other.labels) == len(spec.labels)]

        def generate(method: str, count: int, seed: int, spec=spec, others=others) -> list[dict]:
            return samples(pipe, data, spec, others, method, count, seed, architecture)

        table = table_of(args, pipe, configs[spec.name], data[spec.name], zoo, generate, args.methods)
        rows += table
        print(format_table(table), flush=True)
        if spec.name in PAPER:
            print("paper, Table 20: zoo {}, D2NWG {}\n".format(*PAPER[spec.name]))
        write_results(args.out, TABLE, command, args.seed, rows)
    if args.card:
        write_results(args.card / EVALUATION, TABLE, command, args.seed, rows)
        add_results(args.card, rows, {spec.name: spec.dataset_id for spec in specs}, "image-classification")
        add_figures(args.card, "Figures", command, summary(rows))


def command_of(args) -> str:
    """The command that makes the rows again, but for `--tasks`."""
    places = f"--generator {told_place(args.generator)} --zoo {told_place(args.zoo)}"
    methods = "" if args.methods is METHODS else f" --methods {' '.join(args.methods)}"
    return (
        f"python examples/reproduce/tiny_zoo.py {places} --n {args.n} --seed {args.seed}{methods} --out results.json"
    )


def summary(rows: Sequence[Mapping]) -> str:
    """A line per task in Markdown: means in points, 95 % intervals in brackets."""
    head = ["task", *COLUMNS, "generated - zoo", "best of n / zoo", "L2 / zoo", "spread / zoo"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in dict.fromkeys(row["task"] for row in rows):
        row = {own["method"]: own for own in rows if own["task"] == task}
        made, zoo = row["generated"], row["zoo"]
        means = [row[name]["mean"] if name in row else None for name in COLUMNS]
        cells = [task, *("-" if mean is None else f"{mean:.1f}" for mean in means)]
        low, high = made["difference"]["ci95"]
        cells.append(f"{made['difference']['mean']:+.1f} [{low:+.1f}, {high:+.1f}]")
        cells.append(f"{made['best']:.1f} / {zoo['best']:.1f}")
        cells.append(f"{made['novelty_l2']:.1f} / {zoo['novelty_l2_other_runs']:.1f}")
        cells.append(f"{made['spread_l2']:.1f} / {zoo['spread_l2']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", LEGEND])


def table_of(args, pipe, config, data, zoo, generate, methods: Sequence[str] = METHODS) -> list[dict]:
    """Rows of one task of a zoo, see [`network_table`]."""
    spec, where = data.spec, {key: list(zoo[key]) for key in ("task", "split", "seed", "checkpoint")}
    last = max(where["checkpoint"])

    def of(split: str, latest: bool = False) -> list[int]:
        picked = [i for i, task in enumerate(where["task"]) if task == spec.name and where["split"][i] == split]
        return [i for i in picked if not latest or where["checkpoint"][i] == last]

    members, predict_accuracies = of("train"), None
    if getattr(pipe, "accuracy_predictor", None) is not None:
        predict_accuracies = functools.partial(
            pipe.predict_accuracies, prompt=spec.prompts[0], labels=list(spec.labels)
        )
    return network_table(
        generate,
        config,
        data,
        list(zoo_state_dicts(zoo, members)),
        list(zoo_state_dicts(zoo, of("held_out", latest=True))),
        init=init_of(zoo, spec.name),
        member_seeds=[where["seed"][i] for i in members],
        reconstruct=lambda state_dicts: reconstruct_members(pipe, state_dicts, spec.labels),
        predict_accuracies=predict_accuracies,
        n=args.n,
        seed=args.seed,
        methods=methods,
    )


def init_of(zoo, task: str) -> str:
    """How new networks of a zoo's architecture start."""
    return NetworkZooConfig(zoo[0]["arch"]["name"]).of(task).init if task in SHORT else "default"


def make_parser(description: str, n: int, zoos: str | None = None) -> argparse.ArgumentParser:
    """`zoos`: how many, as `nargs` of argparse."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="Folder or Hub id.")
    parser.add_argument(
        "--zoo",
        required=True,
        nargs=zoos,
        help="Folder or Hub id of a zoo that it was trained on; it tells the architecture.",
    )
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--image_encoder", default=MOBILENET, help="Id, or folder of a local copy.")
    parser.add_argument("--cache", default="runs/features", help="Folder for sentences as heads read them.")
    parser.add_argument("--tasks", nargs="*", help="Default: all of the zoo that the generator knows.")
    parser.add_argument("--n", type=int, default=n, help="Networks per row.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def load(args) -> tuple:
    """The generator, the specs of its tasks, by their names their networks and what these read, the zoo, and its architecture where
    the generator knows them by name."""
    keep_memory()
    pipe = WeightGenPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    known = {task["name"]: task for task in pipe.config.tasks}
    zoo = load_zoo(args.zoo)
    tasks, named = set(zoo["task"]), any("name" in target for target in pipe.targets)
    architecture = zoo[0]["arch"]["name"] if named else None
    specs = [get_task(name) for name in args.tasks or known if name in tasks]
    configs = {}
    for spec in specs:
        target = pipe.targets[target_number(pipe.targets, known[spec.name], architecture)]
        configs[spec.name] = TargetConfig(**target["config"], num_classes=len(spec.labels))
    shape = configs[specs[0].name].input_shape
    if len(shape) == 1:
        data = load_texts(specs, pipe.encoder, args.data_root, args.cache)
    else:
        data, pipe.image_encoder = load_images(specs, args.data_root, shape[1]), load_image_encoder(args.image_encoder)
    return pipe, specs, configs, data, zoo, architecture


def samples(
    pipe, data, spec, others, method: str, count: int, seed: int, architecture: str | None = None
) -> list[dict]:
    """
    `count` networks, each from five images a class of its own; for the controls from images that are not the task's. Heads on
    sentences are asked for by prompts, and for the controls by names in another order, or by prompts and names of another task.
    """
    made = outputs(pipe, data, spec, others, method, count, seed, architecture)
    return [weights for output in made for weights in output.weights]


def outputs(
    pipe, data, spec, others, method: str, count: int, seed: int, architecture: str | None = None
) -> list[WeightGenOutput]:
    """What the calls of [`samples`] return."""
    generator, shown, by_prompts = torch.Generator().manual_seed(seed), spec, method == "generated_from_prompts"
    of_texts = data[spec.name].train.pixels.dim() == 2
    if method == "generated_mismatched":
        channels = {s.name: data[s.name].train.pixels.shape[1] for s in (spec, *others)}
        shown = next((other for other in others if channels[other.name] == channels[spec.name]), None)
    if shown is None or (of_texts and by_prompts):  # `generated` are
        return []
    names, made = list(spec.labels), []
    if of_texts or by_prompts:
        prompts, names = [shown.prompts[i % len(shown.prompts)] for i in range(count)], list(shown.labels)
        if method == "generated_shuffled":
            names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        return [pipe(prompts, labels=names, generator=generator, architecture=architecture)]
    for _ in range(count):
        order = range(len(names))
        if method == "generated_shuffled":
            order = torch.randperm(len(names), generator=generator).tolist()
        dataset = few(data[shown.name].train, names, order, generator)
        made.append(pipe(dataset=dataset, generator=generator, architecture=architecture))
    return made


def few(images: Images, names: Sequence[str], order: Iterable[int], generator: torch.Generator) -> dict[str, list]:
    """Some images of each class, under the names of classes in another order."""
    rows = [(images.labels == c).nonzero().flatten() for c in range(len(names))]
    picked = [rows[c][torch.randperm(len(rows[c]), generator=generator)[:SHOTS]] for c in order]
    return {name: list(images.pixels[own]) for name, own in zip(names, picked, strict=True)}


if __name__ == "__main__":
    main()

"""Heads for all classes of unseen datasets: at first sight (D2NWG Table 2), and fine-tuned (D2NWG Figure 3 and Table 22).

    python examples/reproduce/transfer.py --images --generator runs/few-shot-images/pipeline --zoo runs/few-shot-images/zoo \
        --unseen tanganke/gtsrb --out transfer.json
    python examples/reproduce/transfer.py --generator runs/few-shot-text/pipeline --zoo runs/few-shot-text/zoo \
        --unseen banking77 --out transfer.json

The generator is shown `--shots` examples of every class. Then each start is fine-tuned on all training examples, at most 100 of
a class and as many of each; accuracies are of as many test examples of each class too; classes with fewer than 20 are left out.
Replaced: CIFAR-10, STL-10, Aircraft, Pets and CIFAR-100, and ten datasets of Kaggle, by sets that neither generator nor frozen
encoder has seen the classes of; a head of ResNet-18 or Swin, and a two-layer MLP on CLIP, by a linear head on MobileNet or MiniLM.
An average of the zoo's heads says nothing about other classes: `lookup` takes, for each class, the zoo's row that points nearest to
it. Rows of all examples are what a user may fit at once in the place of fine-tuning. A plot stands beside the table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from command import typed
from curves import curve_rows, curve_table, plot_curves
from few_shot import heads, load, make_parser, name_embeds, read_sets, refuse_known
from torch import Tensor

from hf_weightgen.evaluation.few_shot import tune, with_names
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.evaluation.transfer import (
    EPOCHS,
    Head,
    choose_alpha,
    choose_settings,
    few_of,
    fine_tune,
    for_validation,
    halves,
    lookup_head,
    random_head,
    ridge_head,
    whole_task,
)
from hf_weightgen.zoo.features import FewShotTask
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.schema import zoo_state_dicts


TUNING, TUNED_SHOTS = 2, 20  # draws of each training set; examples of a class there for what is fitted to all examples
PAPER = """paper, Table 2 (ResNet-18, CLIP's features as conditions; untrained): CIFAR-10 60.4 (10.9), STL-10 82.4 (6.8), Aircraft
    27.7 (3.8), Pets 32.2 (2.4), CIFAR-100 51.5 (1.4)
paper, Table 22 (random, pretrained, generated; then after 50 epochs): Gemstones, 87 classes, 1.1, 0.6, 1.9, then 70.6, 67.5, 76.1;
    Dessert, 5, 21.0, 12.5, 99.4, then 95.8, 94.6, 99.4; Colorectal Histology, 8, 11.8, 11.0, 18.1, then 90.3, 89.8, 93.7"""
Score = Callable[[FewShotTask], float]
Start = Callable[[FewShotTask, int], Head]  # from few examples and a seed


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--generator", required=True, help="Folder or Hub id.")
    parser.add_argument("--zoo", required=True, help="Folder or Hub id of the zoo that it was trained on.")
    parser.add_argument("--shots", nargs="+", type=int, default=[5], help="Examples of a class for a head.")
    parser.add_argument("--draws", type=int, default=3, help="Of these examples.")
    parser.add_argument("--epochs", nargs="+", type=int, default=EPOCHS)
    args = parser.parse_args()

    pipe = load(args.generator, args)
    refuse_known([pipe], args)
    known = {name: halves(one) for name, one in read_sets(pipe, args, args.tuning, "train").items()}
    train, test = (read_sets(pipe, args, args.unseen, split) for split in ("train", "test"))
    unseen = {name: whole_task(train[name], test[name]) for name in train}
    pipes = {"generated": pipe}
    names = {} if args.images else name_embeds(pipe, [*known.values(), *unseen.values()])
    if names:
        pipes["generated_without_names"] = load(args.generator, args, names=False)
    zoo_rows = torch.cat([head["head.weight"] for head in zoo_state_dicts(load_zoo(args.zoo))])
    mean = torch.stack([task.support.mean((0, 1)) for task in known.values()]).mean(0)
    generator = torch.Generator().manual_seed(args.seed)
    most = [few_of(task, min(TUNED_SHOTS, task.support.shape[1]), generator) for task in known.values()]
    to_all, rows = tune(most, mean), []
    for shots in args.shots:
        generator = torch.Generator().manual_seed(args.seed)
        seen = [few_of(task, shots, generator) for task in known.values() for _ in range(TUNING)]
        fits, makers = fitted(seen, names, mean), starts(pipes, seen, names, zoo_rows)
        for name, task in unseen.items():
            generator, trial = torch.Generator().manual_seed(args.seed), for_validation(task)
            few = [replace(few_of(trial, shots, generator), queries=task.queries) for _ in range(args.draws)]
            settings = choose_settings(trial, made(makers, few[:1], args.seed), args.seed, args.epochs)
            print("learning rate and factor:", settings)
            curves = fine_tune(task, made(makers, few, args.seed), settings, args.seed, args.epochs)
            at_once = {method: {0: torch.tensor([fit(one) for one in few])} for method, fit in fits.items()}
            at_once |= {f"{method}_all_examples": {0: torch.tensor([fit(task)])} for method, fit in to_all.items()}
            C, n, _ = task.support.shape
            counts = {"ways": C, "shots": shots, "examples": n, "tests": task.queries.shape[1]}
            rows += curve_rows(name, curves | at_once, **counts)
            title = f"{name}, {C} classes, {shots} of {n} example(s)"
            print(curve_table(title, curves | at_once, args.epochs), "\n", flush=True)
            write_results(args.out, "D2NWG, Tables 2 and 22", typed(), args.seed, rows)
    drawn = [row | {"task": f"{row['task']}, {row['shots']} example(s)"} for row in rows if row["method"] in makers]
    plot_curves(drawn, args.out.with_suffix(".png"))
    print(PAPER)


def fitted(seen: Sequence[FewShotTask], names: Mapping[str, Tensor], mean: Tensor) -> dict[str, Score]:
    """What a user would fit to the few examples, tuned on training sets; with class names as examples too, if there are."""
    fits: dict[str, Score] = dict(tune(seen, mean))
    if names:
        named = tune([with_names(task, names) for task in seen], mean)
        fits |= {f"{m}_with_names": lambda task, fit=fit: fit(with_names(task, names)) for m, fit in named.items()}
    return fits


def starts(pipes, seen: Sequence[FewShotTask], names: Mapping[str, Tensor], zoo_rows: Tensor) -> dict[str, Start]:
    """What fine-tuning begins with."""
    found: dict[str, Start] = {m: lambda task, seed, p=p: heads(p, seed, task, 1)[0] for m, p in pipes.items()}
    alpha = choose_alpha(seen)
    found["ridge_head"] = lambda task, _: ridge_head(task, alpha)
    if names:
        named = choose_alpha([with_names(task, names) for task in seen])
        found["ridge_head_with_names"] = lambda task, _: ridge_head(with_names(task, names), named)
    found["lookup"] = lambda task, _: lookup_head(task, zoo_rows)
    found["random"] = random_head
    return found


def made(makers: Mapping[str, Start], tasks: Sequence[FewShotTask], seed: int) -> dict[str, list[Head]]:
    """By name the head of each task."""
    return {name: [make(task, seed + i) for i, task in enumerate(tasks)] for name, make in makers.items()}


if __name__ == "__main__":
    main()

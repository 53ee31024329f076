"""Generated networks beside their zoo: accuracy against distance, a map of the weights, and their density (D2NWG Figure 10).

    python examples/reproduce/novelty.py --generator runs/cnns/pipeline --zoo runs/images --out novelty.json

`novelty.png` beside the figures has, for each task, accuracy against the distance to the nearest member of the zoo, and a t-SNE
of the weights; `novelty_density.png` has the density of the weights, for all of them and layer by layer.

The paper shows MNIST, and accuracies without distances. What a distance is worth tells the curve of members with noise: a
generator that does more than disturb its zoo lies above it. All weights have their hidden units matched to one member
and their heads centred over the classes, without which neither distances nor the map would compare functions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from command import typed
from plots import pyplot
from scipy.stats import ks_2samp
from sklearn.manifold import TSNE
from tiny_zoo import load, make_parser, samples
from torch import Tensor

from hf_weightgen.evaluation.baselines import noisy
from hf_weightgen.evaluation.novelty import fix_network_gauge, flatten, nearest, within_nearest
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.stacked import stack
from hf_weightgen.targets.symmetry import permutation_spec
from hf_weightgen.zoo.networks import predict_networks
from hf_weightgen.zoo.schema import zoo_state_dicts


NOISE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of the std of each tensor
COLOURS = {"zoo": "0.6", "zoo_held_out": "tab:blue", "generated": "tab:red"}
ALL = "all layers"


def main():
    args = make_parser(__doc__, n=50).parse_args()
    plt = pyplot()  # is missing before anything is computed, or never
    pipe, specs, configs, data, zoo, architecture = load(args)
    where, rows, drawn = {key: list(zoo[key]) for key in ("task", "split", "seed", "checkpoint")}, [], []
    for spec in specs:
        members, runs, latest = members_of(zoo, where, spec.name, "train")
        others, _, latest_others = members_of(zoo, where, spec.name, "held_out")
        made = samples(pipe, data, spec, [], "generated", args.n, args.seed, architecture)
        units = permutation_spec(configs[spec.name])
        members, others, made = (fix_network_gauge(many, members[0], units) for many in (members, others, made))
        known = flatten(members)
        groups = {
            "zoo": [members[i] for i in latest],
            "zoo_held_out": [others[i] for i in latest_others],
            "generated": made,
        }
        for scale in NOISE:
            generator = torch.Generator().manual_seed(args.seed)
            groups[f"noise_{scale}"] = noisy(groups["zoo"], scale, args.n, generator)
        groups = {name: many for name, many in groups.items() if many}
        distances = {name: nearest(flatten(many), known) for name, many in groups.items()}
        distances["zoo"] = within_nearest(known, runs)[latest]
        points = {
            name: (accuracy(configs[spec.name], data[spec.name], many), distances[name])
            for name, many in groups.items()
        }
        weights = {name: layers(groups[name]) for name in ("zoo", "generated")}
        rows += [row_of(spec.name, name, *pair) for name, pair in points.items()]
        rows += [
            density_row(spec.name, name, weights["zoo"][name], weights["generated"][name]) for name in weights["zoo"]
        ]
        drawn.append((spec.name, points, {name: groups[name] for name in COLOURS if name in groups}, weights))
        print(summary(rows, spec.name), flush=True)
        write_results(args.out, "D2NWG, Figure 10", typed(), args.seed, rows)
    plot(plt, drawn, args.out.with_suffix(".png"), args.seed)
    plot_density(plt, drawn, args.out.with_name(f"{args.out.stem}_density.png"))


def members_of(zoo, where: Mapping[str, Sequence], task: str, split: str) -> tuple[list, list, list[int]]:
    """A task's networks of a split, the run of each, and which of them are the last of their runs."""
    rows = [i for i, place in enumerate(zip(where["task"], where["split"], strict=True)) if place == (task, split)]
    latest = [k for k, i in enumerate(rows) if where["checkpoint"][i] == max(where["checkpoint"])]
    return list(zoo_state_dicts(zoo, rows)), [where["seed"][i] for i in rows], latest


def accuracy(config, data, networks) -> Tensor:
    """On the test images, in points: `(N,)`."""
    predictions = predict_networks(config, stack(networks), data.inputs(data.test))
    return 100 * (predictions == data.test.labels).double().mean(1)


def layers(networks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights and biases of each layer, and of all together, over all networks."""
    names = dict.fromkeys(
        name.rpartition(".")[0] for name, tensor in networks[0].items() if tensor.is_floating_point()
    )
    found = {
        layer: torch.cat([t.flatten() for one in networks for n, t in one.items() if n.rpartition(".")[0] == layer])
        for layer in names
    }
    return {ALL: torch.cat(list(found.values()))} | found


def row_of(task: str, method: str, accuracy: Tensor, distance: Tensor) -> dict:
    row = {"task": task, "method": method, "metric": "accuracy", "n": len(accuracy)}
    row |= {"mean": accuracy.mean().item(), "std": accuracy.std(correction=min(1, len(accuracy) - 1)).item()}
    row |= {"max": accuracy.max().item(), "novelty_l2": distance.quantile(0.5).item()}
    return row | {"accuracies": accuracy.tolist(), "distances": distance.tolist()}


def density_row(task: str, layer: str, zoo: Tensor, generated: Tensor) -> dict:
    """`ks`: the largest difference of the two distribution functions (Kolmogorov-Smirnov), from 0, alike, to 1."""
    row = {"task": task, "method": "weights", "layer": layer, "ks": float(ks_2samp(zoo, generated).statistic)}
    for name, values in (("zoo", zoo), ("generated", generated)):
        row |= {f"{name}_mean": values.mean().item(), f"{name}_std": values.std().item()}
    return row


def summary(rows: Sequence[Mapping], task: str) -> str:
    own = [row for row in rows if row["task"] == task]
    lines = [f"| {task} | accuracy | best | distance to the nearest member |", "|---|---|---|---|"]
    lines += [
        f"| {row['method']} | {row['mean']:.1f} ± {row['std']:.1f} | {row['max']:.1f} | {row['novelty_l2']:.2f} |"
        for row in own
        if row["method"] != "weights"
    ]
    lines += ["", "| weights of | std in the zoo | std of generated ones | Kolmogorov-Smirnov |", "|---|---|---|---|"]
    lines += [
        f"| {row['layer']} | {row['zoo_std']:.3f} | {row['generated_std']:.3f} | {row['ks']:.3f} |"
        for row in own
        if row["method"] == "weights"
    ]
    return "\n".join([*lines, ""])


def plot(plt, drawn: Sequence[tuple], path: Path, seed: int) -> None:
    figure, axes = plt.subplots(len(drawn), 2, figsize=(10, 4 * len(drawn)), squeeze=False, layout="constrained")
    for (scatter, tsne), (task, points, groups, _) in zip(axes, drawn, strict=True):
        noise = [points[f"noise_{scale}"] for scale in NOISE]
        curve = [(distance.quantile(0.5), accuracy.mean()) for accuracy, distance in noise]
        for accuracy, distance in noise:
            scatter.scatter(distance, accuracy, s=6, color="tab:orange", alpha=0.3, linewidths=0)
        scatter.plot(
            *zip(*curve, strict=True),
            color="tab:orange",
            marker="o",
            markersize=4,
            label="zoo + noise (share of std), mean",
        )
        for (x, y), scale in zip(curve, NOISE, strict=True):
            scatter.annotate(str(scale), (x, y), (6, 2), textcoords="offset points", fontsize=7)
        for name in groups:
            accuracy, distance = points[name]
            scatter.scatter(distance, accuracy, s=14, color=COLOURS[name], label=name.replace("_", " "))
        scatter.set(
            title=f"{task}: accuracy and distance", xlabel="distance to the nearest member (of another run)", ylabel="test accuracy",
        )  # fmt: skip
        scatter.legend(fontsize=8)
        places = embed([flatten(many) for many in groups.values()], seed)
        for name, place in zip(groups, places, strict=True):
            tsne.scatter(*place.T, s=14, color=COLOURS[name], label=name.replace("_", " "))
        tsne.set(title=f"{task}: t-SNE of the weights", xticks=[], yticks=[])
        tsne.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def embed(vectors: Sequence[Tensor], seed: int) -> list:
    """Places in the plane `(N, 2)` for each group of networks `(N, D)`, of one map."""
    every = torch.cat(list(vectors)).numpy()
    tsne = TSNE(init="pca", perplexity=min(30, (len(every) - 1) / 3), random_state=seed)
    return list(torch.from_numpy(tsne.fit_transform(every)).split([len(own) for own in vectors]))


def plot_density(plt, drawn: Sequence[tuple], path: Path) -> None:
    wide = max(len(weights["zoo"]) for *_, weights in drawn)
    figure, axes = plt.subplots(
        len(drawn), wide, figsize=(3 * wide, 2.6 * len(drawn)), squeeze=False, layout="constrained"
    )
    for line, (task, _, _, weights) in zip(axes, drawn, strict=True):
        for axis in line[len(weights["zoo"]) :]:
            axis.set_axis_off()
        for axis, (layer, of_zoo) in zip(line, weights["zoo"].items(), strict=False):
            both = torch.cat([of_zoo, weights["generated"][layer]])
            low, high = (both.kthvalue(max(1, int(share * len(both)))).values.item() for share in (0.002, 0.998))
            for name, colour, values in (
                ("zoo", "black", of_zoo),
                ("generated", "tab:red", weights["generated"][layer]),
            ):
                axis.hist(
                    values.numpy(), bins=60, range=(low, high), density=True, histtype="step", color=colour, label=name,
                )  # fmt: skip
            axis.set(title=f"{task}, {layer}", yticks=[])
        line[0].set_ylabel("density")
        line[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

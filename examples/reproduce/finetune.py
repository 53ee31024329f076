"""Fine-tuning from generated weights, from a new initialisation, from the zoo's average and from its nearest member (D2NWG Table 4).

    python examples/reproduce/finetune.py --generator runs/cnns/pipeline --zoo runs/images --out finetune.json

All rows of a task are trained at once, on the same batches, with the zoo's optimiser; `finetune.png` beside the table has the
curves. The paper fine-tunes on all images; `--images` takes fewer.
"""

import argparse
import sys
from pathlib import Path

import torch

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation.baselines import average
from hf_weightgen.evaluation.novelty import flatten
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.architectures import TargetConfig
from hf_weightgen.targets.image_encoders import MOBILENET, load_image_encoder
from hf_weightgen.targets.stacked import stack, unstack
from hf_weightgen.targets.symmetry import permutation_spec
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.weights.permutation import align
from hf_weightgen.zoo.build_networks import BIAS, PROTOCOLS
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import initial, keep_memory, predict_networks, train_networks
from hf_weightgen.zoo.schema import zoo_state_dicts


SHOTS = 5
EPOCHS = (0, 1, 5, 25, 50)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="Folder or Hub id.")
    parser.add_argument("--zoo", required=True, help="Folder or Hub id of the zoo that it was trained on.")
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--image_encoder", default=MOBILENET, help="Id, or folder of a local copy.")
    parser.add_argument("--tasks", nargs="*", help="Default: all that the generator knows.")
    parser.add_argument("--n", type=int, default=5, help="Networks per row.")
    parser.add_argument("--images", type=int, default=10_000, help="Training images at most.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    keep_memory()
    pipe = WeightGenPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    pipe.image_encoder = load_image_encoder(args.image_encoder)
    known = {task["name"]: task for task in pipe.config.tasks}
    specs = [get_task(name) for name in args.tasks or known]
    targets = {spec.name: pipe.targets[known[spec.name].get("target", 0)]["config"] for spec in specs}
    data = load_images(specs, args.data_root, targets[specs[0].name]["input_shape"][1])
    zoo, rows = load_zoo(args.zoo), []
    where = {key: list(zoo[key]) for key in ("task", "split")}
    for spec in specs:
        config = TargetConfig(**targets[spec.name], num_classes=len(spec.labels))
        members = [i for i, task in enumerate(where["task"]) if task == spec.name and where["split"][i] == "train"]
        starts = starting_points(pipe, spec, data[spec.name], list(zoo_state_dicts(zoo, members)), config, args)
        curves = finetune(config, starts, data[spec.name], args)
        for method, scores in curves.items():
            for epoch, values in scores.items():
                row = {"task": spec.name, "method": method, "metric": "accuracy", "epoch": epoch}
                rows.append(row | {"mean": values.mean().item(), "std": values.std().item(), "n": len(values)})
        print(summary(spec.name, curves), flush=True)
        write_results(args.out, "D2NWG, Table 4", f"python {' '.join(sys.argv)}", args.seed, rows)
    plot(rows, args.out.with_suffix(".png"))


def starting_points(pipe, spec, data, members, config, args) -> dict[str, list[dict]]:
    """Networks of each row at epoch 0."""
    draw = torch.Generator().manual_seed(args.seed)
    names, made = list(spec.labels), []
    rows = [(data.train.labels == c).nonzero().flatten() for c in range(len(names))]
    for _ in range(args.n):
        picked = [own[torch.randint(len(own), (SHOTS,), generator=draw)] for own in rows]
        dataset = {name: list(data.train.pixels[own]) for name, own in zip(names, picked, strict=True)}
        made += pipe(dataset=dataset, generator=draw).weights
    units = permutation_spec(config)
    aligned = [align(member, members[0], units) for member in members]
    flat = flatten(aligned)
    near = [(flat - flatten([align(network, members[0], units)])).norm(dim=1).argmin() for network in made]
    fresh = initial(config, list(range(args.n)), PROTOCOLS["short"][spec.name].init, BIAS)
    return {
        "generated": made,
        "random": [unstack(fresh, k) for k in range(args.n)],
        "zoo_average": [average(aligned)],
        "nearest_member": [members[int(i)] for i in near],
    }


def finetune(config, starts, data, args) -> dict[str, dict[int, torch.Tensor]]:
    """Per row and epoch the test accuracies of its networks, in points."""
    protocol = PROTOCOLS["short"][data.spec.name]
    sizes = [len(networks) for networks in starts.values()]
    params = stack([network for networks in starts.values() for network in networks])
    images = data.train.where(torch.arange(len(data.train)) < args.images)
    training = train_networks(
        config,
        params,
        data.inputs(images),
        images.labels,
        lambda tensors: torch.optim.Adam(tensors, lr=protocol.lr, weight_decay=protocol.weight_decay, fused=True),
        epochs=EPOCHS[-1],
        batch_size=protocol.batch_size,
        generator=torch.Generator().manual_seed(args.seed),
    )
    test, scores = data.inputs(data.test), {}
    scores[0] = accuracy(config, params, test, data.test.labels)
    for epoch, trained in enumerate(training, start=1):
        if epoch in EPOCHS:
            scores[epoch] = accuracy(config, trained, test, data.test.labels)
    parts = {epoch: values.split(sizes) for epoch, values in scores.items()}
    return {name: {epoch: values[k] for epoch, values in parts.items()} for k, name in enumerate(starts)}


def accuracy(config, params, inputs, labels) -> torch.Tensor:
    return 100 * (predict_networks(config, params, inputs) == labels).double().mean(1)


def summary(task: str, curves) -> str:
    lines = [
        f"| {task} | " + " | ".join(f"epoch {epoch}" for epoch in EPOCHS) + " |",
        "|---" * (len(EPOCHS) + 1) + "|",
    ]
    for method, scores in curves.items():
        cells = [f"{values.mean():.1f} ± {values.std(correction=0):.1f}" for values in scores.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit('The curves need matplotlib: pip install "hf-weightgen[plots]"') from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            axis.errorbar(
                [row["epoch"] for row in own], [row["mean"] for row in own], [row["std"] for row in own], label=method
            )
        axis.set(title=task, xlabel="epochs", ylabel="accuracy", xscale="symlog")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

r"""The normalisation layers of a trained ResNet, generated from one fine-tuning run (D2NWG Table 11, p-diff's protocol).

    python examples/build_trajectory_zoo.py runs/norms --checkpoint resnet32.safetensors --tensors norms --burn_in 200 \
        --checkpoints 200 --every 2 --held_out 40 --lr 1e-2 --score_every 20 --bf16
    accelerate launch examples/train_d2nwg.py --zoo runs/norms --output_dir runs/norm-layers --vae_steps 600 \
        --train_batch_size 32 --dataset_steps 50 --max_train_steps 800
    python examples/reproduce/norm_layers.py --generator runs/norm-layers/pipeline --zoo runs/norms --out norm_layers.json

Replaced: ResNet-18 by ResNet-32, two normalisation layers of 2,048 weights by all of them, 2,272; CIFAR-100 is left out.
What is generated is put onto the checkpoint that the run began with, with statistics of batch normalisation that are averages
of the run, in all rows alike. The zoo is a single trajectory: its plain average and independent Gaussians stand beside every
figure, with distances to its nearest row.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from command import typed
from datasets import Dataset
from torch import Tensor

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation import baselines
from hf_weightgen.evaluation.novelty import flatten
from hf_weightgen.evaluation.p_diff import p_diff
from hf_weightgen.evaluation.rows import TaskRows, Unavailable
from hf_weightgen.evaluation.table import format_table, generated_row, members_at_distance, write_results, zoo_row
from hf_weightgen.targets.architectures import HEAD, architecture
from hf_weightgen.targets.symmetry import BUFFERS
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.images import ImageData, Images, load_images
from hf_weightgen.zoo.networks import keep_memory, predict_one_by_one
from hf_weightgen.zoo.schema import zoo_state_dicts


PAPER = {
    "p-diff": (94.46, 94.46, 94.52),
    "D2NWG": (94.46, 94.47, 94.50),
}  # Table 11, CIFAR-10: mean, median, max of 100
StateDict = Mapping[str, Tensor]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="Folder or Hub id.")
    parser.add_argument("--zoo", required=True, help="Folder or Hub id of the trajectory that it was trained on.")
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--n", type=int, default=20, help="Generated networks, and of how many the best is chosen.")
    parser.add_argument("--baseline_n", type=int, default=10, help="Networks of the other rows.")
    parser.add_argument("--members", type=int, default=20, help="Rows of the zoo that are scored, evenly spread.")
    parser.add_argument("--images", type=int, default=500, help="Of the test and of the validation split.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    keep_memory()
    zoo = load_zoo(args.zoo)
    split, spec, first = list(zoo["split"]), get_task(zoo["task"][0]), zoo[0]
    base = next(zoo_state_dicts(zoo, [split.index("base")]))
    of_split = {
        part: list(zoo_state_dicts(zoo, [i for i, name in enumerate(split) if name == part]))
        for part in ("train", "held_out")
    }
    rest = base | {n: t for n, t in baselines.average(of_split["train"]).items() if n.endswith(BUFFERS[:2])}
    members, held_out = ([part_of(row) for row in rows] for rows in of_split.values())
    data = load_images([spec], args.data_root, first["arch"]["input_shape"][1])[spec.name]
    data.mean, data.std = first["provenance"]["mean"], first["provenance"]["std"]
    rows = table(rest, members, held_out, generated(args, list(spec.labels), spec.prompts), data, first["arch"], args)
    rows.insert(0, {**rows[0], **dict.fromkeys(rows[0]), **recorded(zoo[split.index("base")])})
    print(format_table(rows))
    for method, figures in PAPER.items():
        print("paper, Table 11, {}: mean {}, median {}, max {}".format(method, *figures))
    write_results(args.out, "D2NWG, Table 11", typed(), args.seed, rows)


def part_of(state_dict: StateDict) -> dict[str, Tensor]:
    """What is generated of a row: neither the head, which is fixed, nor statistics."""
    return {n: tensor for n, tensor in state_dict.items() if n not in HEAD and not n.endswith(BUFFERS)}


def recorded(row: Mapping) -> dict:
    """The checkpoint with its own statistics, as it was scored when the zoo was built."""
    images = row["provenance"]["hyper_parameters"]["score_images"]
    figures = {"mean": 100 * row["metrics"]["test"], "std": 0.0, "n": 1, "test_rows": images, "stored": True}
    return {"task": row["task"], "method": "base_checkpoint", "metric": "accuracy"} | figures


def generated(args, labels: list[str], prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    pipe = WeightGenPipeline.from_pretrained(args.generator)
    pipe.set_progress_bar_config(disable=True)
    asked = [prompts[i % len(prompts)] for i in range(args.n)]
    made = pipe(asked, labels=labels, generator=torch.Generator().manual_seed(args.seed)).weights
    return [part_of(state_dict) for state_dict in made]


def table(rest: StateDict, members, held_out, samples, data: ImageData, arch: Mapping, args) -> list[dict]:
    config = architecture(arch["name"], len(data.spec.labels), arch["input_shape"][0], input_shape=arch["input_shape"])

    def view(images: Images) -> Dataset:
        return Dataset.from_dict({"row": list(range(len(images))), "label": images.labels.tolist()})

    own = {part: getattr(data, part).first(args.images) for part in ("validation", "test")}
    views = {part: view(images) for part, images in own.items()}
    rows_of = SimpleNamespace(spec=data.spec, train=views["validation"], **views)  # pixels stay where they are
    inputs = {id(views[part]): data.inputs(images) for part, images in own.items()}

    def predict(parts: Sequence[StateDict], dataset: Dataset) -> Tensor:
        return predict_one_by_one(config, [{**rest, **part} for part in parts], inputs[id(dataset)])

    spread = torch.linspace(0, len(members) - 1, min(args.members, len(members))).round().long().tolist()
    some = [members[i] for i in spread]
    task = TaskRows(predict, rows_of, some, n=args.baseline_n, best_of=args.n, seed=args.seed)
    task.vectors = flatten(members)  # only some members are scored, but distances are to the nearest of all
    n, rows = args.baseline_n, {}
    makers = {
        "base_zoo_statistics": lambda g: [{name: rest[name] for name in members[0]}],
        "zoo_held_out": lambda g: held_out[-1:],
        "zoo_average": lambda g: [baselines.average(members)],
        "gaussian": lambda g: baselines.gaussian(members, n, g),
        "kde": lambda g: baselines.kde(members, n, g),
        "pca_flow": lambda g: baselines.pca_flow(members, n, g),
        "p_diff": lambda g: p_diff(members, n, g),
        "noise_0.05": lambda g: baselines.noisy(members, 0.05, n, g),
        "noise_at_distance": lambda g: members_at_distance(task, samples, g),
    }
    rows["zoo"] = zoo_row(task, {"mean": 100 / len(data.spec.labels)})
    rows["zoo"]["spread_l2"] = flatten_spread(members)
    for method, make in makers.items():
        try:
            rows[method] = task.row(method, make(task.generator(method)))
        except Unavailable as reason:
            rows[method] = task.empty(method) | {"note": str(reason)}
    rows["generated"] = generated_row(task, samples, samples, held_out[-1:], rows["zoo"])
    return list(rows.values())


def flatten_spread(members: Sequence[StateDict]) -> float:
    """Median distance between rows of the zoo: neighbours of a trajectory are closer than that."""
    return torch.pdist(flatten(members)).quantile(0.5).item()


if __name__ == "__main__":
    main()

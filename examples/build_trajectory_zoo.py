"""Fine-tunes a trained ResNet a little and keeps its checkpoints: a zoo of one trajectory, whole or of some layers only.

    python examples/build_trajectory_zoo.py runs/norms --checkpoint resnet32.safetensors --tensors norms
    python examples/build_trajectory_zoo.py runs/resnet32 --checkpoint resnet32.safetensors --checkpoints 50

Its rows are no independent networks, and say so; their plain average is printed beside them.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from hf_weightgen.evaluation.baselines import average
from hf_weightgen.targets.architectures import architecture
from hf_weightgen.targets.tasks import IMAGE_TASKS, get_task
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import predict_one_by_one
from hf_weightgen.zoo.schema import zoo_state_dicts
from hf_weightgen.zoo.trajectory import TrajectoryConfig, build_trajectory_zoo


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Safetensors file of the trained network.")
    parser.add_argument("--task", default="cifar10", choices=list(IMAGE_TASKS))
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--tensors", default="all", help="'all', 'norms', or a regular expression of names.")
    parser.add_argument("--bf16", action="store_true", help="Train under bfloat16 autocast.")
    for entry in fields(TrajectoryConfig):
        if type(entry.default) in (int, float) or entry.name == "architecture":
            parser.add_argument(f"--{entry.name}", type=type(entry.default), default=entry.default)
    args = parser.parse_args()
    known = {entry.name for entry in fields(TrajectoryConfig)} & vars(args).keys()
    config, spec = TrajectoryConfig(**{name: getattr(args, name) for name in known}), get_task(args.task)
    build_trajectory_zoo(spec, args.checkpoint, args.folder, config, args.data_root)
    zoo = load_zoo(args.folder)
    for row in zoo.select_columns(["id", "split", "metrics"]):
        if row["metrics"]["test"] is not None:
            print(f"{row['id']} ({row['split']}): test accuracy {100 * row['metrics']['test']:.2f}")
    split = list(zoo["split"])
    base = next(zoo_state_dicts(zoo, [split.index("base")]))
    mean = average(list(zoo_state_dicts(zoo, [i for i, name in enumerate(split) if name == "train"])))
    data = load_images([spec], args.data_root, architecture(config.architecture).input_shape[1])[spec.name]
    data.mean, data.std = config.mean, config.std
    test = data.test.where(i < config.score_images for i in range(len(data.test)))
    right = predict_one_by_one(architecture(config.architecture), [base | mean], data.inputs(test)) == test.labels
    print(f"average of the rows to train on: test accuracy {100 * right.double().mean():.2f}")


if __name__ == "__main__":
    main()

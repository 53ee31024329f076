"""Builds a zoo of small networks on images: seeds x late checkpoints x tasks, a group of seeds trained at once.

The Tiny Model Zoo's networks (https://huggingface.co/papers/2209.14764) with their published initialisation, activation
and optimiser of each dataset, by default in a short protocol: 10 epochs of batches of 64 in the place of 50 of batches
of 10.

Every group of seeds becomes one shard as soon as it is trained, so that a restart, or another process, goes on with the
groups that are missing; a group's randomness depends on the task and its seeds only.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch.optim import Adam
from tqdm.auto import tqdm

from ..targets.architectures import TargetConfig, architecture
from ..targets.stacked import unstack
from ..targets.tasks import TaskSpec
from .folder import ZooFolder
from .images import ImageData, load_images
from .networks import initial, predict_networks, train_networks
from .recipe import check_same_config, seed_of, versions, write_config
from .schema import METRICS, make_row


@dataclass(frozen=True)
class Protocol:
    """Of one dataset of the Tiny Model Zoo: what differs between them."""

    activation: str
    init: str
    lr: float
    weight_decay: float = 0.0


PROTOCOLS = {  # as published; of Fashion-MNIST nothing is known to us, so it has what MNIST has
    "mnist": Protocol("tanh", "uniform", 3e-4),
    "fashion_mnist": Protocol("tanh", "uniform", 3e-4),
    "svhn": Protocol("tanh", "uniform", 3e-3),
    "cifar10": Protocol("gelu", "kaiming_uniform", 1e-4, 1e-2),
}
BIAS = 0.01  # all biases start with it


@dataclass(frozen=True)
class NetworkZooConfig:
    """
    Args:
        architecture: See [`~targets.architectures.architecture`].
        seeds, held_out: Networks per task, and how many of them, the last ones, train no generator.
        epochs, batch_size, keep: Training, and how many of its last epochs are kept.
        group: Networks that are trained at once, in one order of the images.
    """

    architecture: str = "tiny-cnn"
    seeds: int = 100
    held_out: int = 20
    epochs: int = 10
    batch_size: int = 64
    keep: int = 3
    group: int = 20
    seed: int = 0


def build_network_zoo(
    specs: Sequence[TaskSpec],
    folder: str | Path,
    config: NetworkZooConfig | None = None,
    data_root: str | Path | None = None,
    progress: bool = True,
) -> ZooFolder:
    """
    Trains what is missing of a zoo in `folder`; calling it again continues, and started by `accelerate launch` or `torchrun`
    its processes share the groups.

    Raises:
        ValueError: If a task has no protocol, or the folder holds a zoo of another configuration.
    """
    folder, config, state = ZooFolder(folder), config or NetworkZooConfig(), PartialState()
    for spec in specs:
        if spec.name not in PROTOCOLS:
            raise ValueError(f"Task {spec.name!r} has no protocol; there are {list(PROTOCOLS)}.")
    if not 0 < config.keep <= config.epochs:
        raise ValueError(f"`keep` must be 1 to {config.epochs} epochs, got {config.keep}.")
    check_same_config(folder.path, asdict(config))
    if state.is_main_process:
        write_config(folder.path, asdict(config))
    side = architecture(config.architecture).input_shape[1]
    data = load_images(specs, data_root, side)
    done = folder.finished()
    groups = [
        (spec, list(range(start, min(start + config.group, config.seeds))))
        for spec in specs
        for start in range(0, config.seeds, config.group)
    ]
    groups = [(spec, seeds) for spec, seeds in groups if not {_id(spec, s, config.epochs) for s in seeds} <= done]
    with state.split_between_processes(groups) as mine:
        total = sum(len(data[spec.name].train) * config.epochs * len(seeds) for spec, seeds in mine)
        with tqdm(total=total, desc="zoo", unit="pass", unit_scale=True, disable=not progress) as bar:
            for spec, seeds in mine:
                bar.set_postfix_str(f"{spec.name} {seeds[0]}-{seeds[-1]}")
                folder.add(f"{spec.name}-{seeds[0]:04d}", train_group(data[spec.name], seeds, config, bar))
    return folder


def network_of(spec: TaskSpec, channels: int, config: NetworkZooConfig) -> TargetConfig:
    """What the members of a task are."""
    activation = PROTOCOLS[spec.name].activation
    return architecture(config.architecture, len(spec.labels), channels, activation=activation)


def train_group(data: ImageData, seeds: Sequence[int], config: NetworkZooConfig, bar=None) -> list[dict]:
    """Trains the networks of some seeds at once: their rows, `len(seeds) * keep` of them."""
    spec, protocol = data.spec, PROTOCOLS[data.spec.name]
    target = network_of(spec, data.train.pixels.shape[1], config)
    params = initial(target, [seed_of(config.seed, spec.name, seed) for seed in seeds], protocol.init, BIAS)
    evaluation = {name: getattr(data, name) for name in METRICS}
    inputs = {name: data.inputs(images) for name, images in evaluation.items()}
    training = train_networks(
        target,
        params,
        data.inputs(data.train),
        data.train.labels,
        lambda tensors: Adam(tensors, lr=protocol.lr, weight_decay=protocol.weight_decay),
        epochs=config.epochs,
        batch_size=config.batch_size,
        generator=torch.Generator().manual_seed(seed_of(config.seed, spec.name, list(seeds))),
        on_step=lambda losses: bar is not None and bar.update(len(losses) * config.batch_size),
    )
    rows = []
    for epoch, trained in enumerate(training, start=1):
        if epoch <= config.epochs - config.keep:
            continue
        scores = {
            name: (predict_networks(target, trained, inputs[name]) == images.labels).double().mean(1).tolist()
            for name, images in evaluation.items()
        }
        rows += [
            make_row(
                unstack(trained, k),
                id=_id(spec, seed, epoch),
                task=spec.name,
                family=spec.family,
                split="held_out" if seed >= config.seeds - config.held_out else "train",
                text=spec.prompts[0] if spec.prompts else spec.name,
                labels=list(spec.labels),
                seed=seed,
                checkpoint=epoch - (config.epochs - config.keep) - 1,
                epoch=epoch,
                arch={"name": config.architecture, "activation": target.activation, "input_shape": target.input_shape},
                metrics={name: values[k] for name, values in scores.items()},
                provenance={
                    "dataset": spec.dataset_id,
                    "config": spec.config,
                    "data_revision": data.data_revision,
                    "removed_duplicates": data.removed_duplicates,
                    "mean": data.mean,
                    "std": data.std,
                    "hyper_parameters": {**asdict(config), **asdict(protocol), "bias": BIAS, "optimizer": "Adam"},
                    "versions": versions(),
                },
            )
            for k, seed in enumerate(seeds)
        ]
    return rows


def _id(spec: TaskSpec, seed: int, epoch: int) -> str:
    return f"{spec.name}-s{seed}-e{epoch}"

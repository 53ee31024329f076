"""Builds a zoo of small networks on images, or of heads on sentences as a frozen encoder sees them: seeds x late checkpoints x tasks, a group of seeds trained at once.

The Tiny Model Zoo's networks (https://huggingface.co/papers/2209.14764) with their published initialisation, activation
and optimiser of each dataset: in their published protocol, or by default in a short one, which is told in every row.

Every group of seeds becomes one shard as soon as it is trained, so that a restart goes on with the groups that are
missing; a group's randomness depends on the task and its seeds only.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch.optim import Adam
from tqdm.auto import tqdm

from ..targets.architectures import TargetConfig, architecture
from ..targets.base_models import MINILM, TextEncoder, load_encoder, resolve_base, weights_sha256
from ..targets.stacked import unstack
from ..targets.tasks import TaskSpec
from .features import MOST_TEXTS, load_texts
from .folder import ZooFolder
from .images import ImageData, load_images
from .networks import initial, keep_memory, predict_networks, train_networks
from .recipe import check_same_config, seed_of, versions, write_config
from .schema import METRICS, make_row


@dataclass(frozen=True)
class Protocol:
    """
    Of one dataset: what all of its networks share.

    Args:
        epochs: Of training.
    """

    activation: str
    init: str
    lr: float
    weight_decay: float = 0.0
    batch_size: int = 10
    epochs: int = 25


PUBLISHED = {  # D2NWG reads epochs 21 to 25 (appendix D.1); Fashion-MNIST, of which nothing is published, has what MNIST has
    "mnist": Protocol("tanh", "uniform", 3e-4),
    "fashion_mnist": Protocol("tanh", "uniform", 3e-4),
    "svhn": Protocol("tanh", "uniform", 3e-3),
    "cifar10": Protocol("gelu", "kaiming_uniform", 1e-4, 1e-2),
}
# Larger batches, fewer epochs, and the learning rate grows with the batch. SVHN's subset of 6,500 images is too small for
# weights that start in U(0, 1): after 10,000 such steps its networks are no better than one answer to all images.
SHORT = {name: replace(known, lr=6.4 * known.lr, batch_size=64, epochs=10) for name, known in PUBLISHED.items()}
SHORT["svhn"] = Protocol("tanh", "kaiming_uniform", 3e-3, batch_size=64, epochs=30)
PROTOCOLS = {"short": SHORT, "published": PUBLISHED}
# of all heads on features, whose length is 1: decay that images bear leaves of heads of many classes half their accuracy
HEAD = Protocol("relu", "default", 1e-2, weight_decay=0.0, batch_size=64, epochs=20)
TINY = "tiny-cnn"  # the protocols' network; a LeNet that starts in U(0, 1) stays at one answer in five
BIAS = 0.01  # all biases start with it


@dataclass(frozen=True)
class NetworkZooConfig:
    """
    Args:
        architecture: See [`~targets.architectures.architecture`].
        protocol: One of [`PROTOCOLS`]; other networks than the tiny CNN start with `kaiming_uniform`. Heads have one of their own.
        seeds, held_out: Networks per task, and how many of them, the last ones, train no generator.
        keep: How many of the last epochs are kept.
        group: Networks that are trained at once, in one order of the images.
        epochs: In the place of the protocol's.
    """

    architecture: str = TINY
    protocol: str = "short"
    seeds: int = 100
    held_out: int = 20
    keep: int = 3
    group: int = 20
    epochs: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.seeds > self.held_out >= 0:
            raise ValueError(f"A zoo needs `seeds` > `held_out` >= 0, got {self.seeds} and {self.held_out}.")

    @property
    def reads_features(self) -> bool:
        """Whether networks are heads, which read sentences as a frozen encoder sees them."""
        return len(architecture(self.architecture).input_shape) == 1

    def of(self, task: str) -> Protocol:
        """
        How the networks of a task are trained.

        Raises:
            ValueError: If there is no such protocol, or none for the task, or it has fewer epochs than shall be kept.
        """
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"`protocol` must be one of {list(PROTOCOLS)}, got {self.protocol!r}.")
        known = PROTOCOLS[self.protocol]
        if self.reads_features:
            known = {task: HEAD}
        if task not in known:
            raise ValueError(f"Task {task!r} has no protocol; there are {list(known)}.")
        found = known[task] if self.epochs is None else replace(known[task], epochs=self.epochs)
        if self.architecture != TINY and not self.reads_features:
            found = replace(found, init="kaiming_uniform")
        if not 0 < self.keep <= found.epochs:
            raise ValueError(f"`keep` must be 1 to {found.epochs} epochs, got {self.keep}.")
        return found


def build_network_zoo(
    specs: Sequence[TaskSpec],
    folder: str | Path,
    config: NetworkZooConfig | None = None,
    data_root: str | Path | None = None,
    progress: bool = True,
    share: tuple[int, int] | None = None,
    encoder: TextEncoder | None = None,
    cache: str | Path | None = None,
) -> ZooFolder:
    """
    Trains what is missing of a zoo in `folder`; calling it again continues.

    Args:
        share: `(i, n)`: the i-th of n workers, which split the groups. Default: those of `accelerate launch` or `torchrun`.
        encoder, cache: Of heads: what sees the sentences, and a folder for what it saw.

    Raises:
        ValueError: If a task has no protocol, or the folder holds a zoo of another configuration.
    """
    folder, config = ZooFolder(folder), config or NetworkZooConfig()
    if share is None:
        state = PartialState(cpu=True)
        share = state.process_index, state.num_processes
    epochs = {spec.name: config.of(spec.name).epochs for spec in specs}
    settings, encoder = asdict(config), encoder or (load_encoder(MINILM) if config.reads_features else None)
    if config.reads_features:
        settings |= {"encoder": weights_sha256(resolve_base(encoder.model.name_or_path)), "sentences": MOST_TEXTS}
    check_same_config(folder.path, settings)
    write_config(folder.path, settings)
    keep_memory()
    if config.reads_features:
        data = load_texts(specs, encoder, data_root, cache)
    else:
        data = load_images(specs, data_root, architecture(config.architecture).input_shape[1])
    done = folder.finished()
    groups = [
        (spec, list(range(start, min(start + config.group, config.seeds))))
        for start in range(0, config.seeds, config.group)
        for spec in specs
    ]
    mine = [  # of each worker the same, whenever it starts and whatever is done by then
        (spec, seeds)
        for spec, seeds in groups[share[0] :: share[1]]
        if not {_id(spec, s, epochs[spec.name]) for s in seeds} <= done
    ]
    total = sum(len(data[spec.name].train) * epochs[spec.name] * len(seeds) for spec, seeds in mine)
    with tqdm(total=total, desc="zoo", unit="pass", unit_scale=True, disable=not progress) as bar:
        for spec, seeds in mine:
            bar.set_postfix_str(f"{spec.name} {seeds[0]}-{seeds[-1]}")
            folder.add(f"{spec.name}-{seeds[0]:04d}", train_group(data[spec.name], seeds, config, bar))
    return folder


def network_of(spec: TaskSpec, channels: int, config: NetworkZooConfig) -> TargetConfig:
    """What the members of a task are."""
    activation = config.of(spec.name).activation
    return architecture(config.architecture, len(spec.labels), channels, activation=activation)


def train_group(data: ImageData, seeds: Sequence[int], config: NetworkZooConfig, bar=None) -> list[dict]:
    """Trains the networks of some seeds at once: their rows, `len(seeds) * keep` of them."""
    spec, protocol = data.spec, config.of(data.spec.name)
    target = network_of(spec, data.train.pixels.shape[1], config)
    params = initial(target, [seed_of(config.seed, spec.name, seed) for seed in seeds], protocol.init, BIAS)
    evaluation = {name: getattr(data, name) for name in METRICS}
    inputs = {name: data.inputs(images) for name, images in evaluation.items()}
    training = train_networks(
        target,
        params,
        data.inputs(data.train),
        data.train.labels,
        lambda tensors: Adam(tensors, lr=protocol.lr, weight_decay=protocol.weight_decay, fused=True),
        epochs=protocol.epochs,
        batch_size=protocol.batch_size,
        generator=torch.Generator().manual_seed(seed_of(config.seed, spec.name, list(seeds))),
        on_step=lambda losses: bar is not None and bar.update(len(losses) * protocol.batch_size),
    )
    rows = []
    for epoch, trained in enumerate(training, start=1):
        if epoch <= protocol.epochs - config.keep:
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
                checkpoint=epoch - (protocol.epochs - config.keep) - 1,
                epoch=epoch,
                arch={"name": config.architecture, "activation": target.activation, "input_shape": target.input_shape},
                metrics={name: values[k] for name, values in scores.items()},
                provenance={
                    "dataset": spec.dataset_id,
                    "config": spec.config,
                    "data_revision": data.data_revision,
                    "removed_duplicates": data.removed_duplicates,
                    "encoder": getattr(data, "encoder", None),
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

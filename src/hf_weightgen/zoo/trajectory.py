"""Checkpoints along one fine-tuning run as a zoo: what p-diff learns from, where training many networks is out of reach.

All rows come from one checkpoint by small steps. They are no independent networks: they lie close together, their average is
as good as they are, and every row's provenance says `single_trajectory`.

Reference: p-diff (https://huggingface.co/papers/2402.13144) on its training data: a trained network is trained on with all but a
few tensors (there two normalisation layers) fixed, and the checkpoints of this are kept; D2NWG
(https://huggingface.co/papers/2402.18153), appendix C.6, compares itself on the same.

Notation: n images of shape `input_shape`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..targets.architectures import HEAD, TargetConfig, TargetModel, architecture
from ..targets.tasks import TaskSpec
from .folder import ZooFolder
from .images import ImageData, Images, load_images
from .networks import keep_memory, predict_one_by_one
from .recipe import check_same_config, seed_of, versions, write_config
from .schema import METRICS, make_row


TENSORS = {"all": r"", "norms": r"(^|\.)bn\d*\."}  # names of tensors that may be trained, as regular expressions
IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and std of channels, with which many checkpoints read images


@dataclass(frozen=True)
class TrajectoryConfig:
    """
    Args:
        architecture: See [`~targets.architectures.architecture`].
        tensors: What is trained: one of [`TENSORS`], or a regular expression that their names are searched for. All
            else is fixed, statistics of batch normalisation too.
        burn_in: Steps before the first row, in which the checkpoint gets used to the images.
        checkpoints, every: Rows, and steps from one to the next.
        held_out: How many of them, the last ones, train no generator.
        lr: Of SGD with momentum 0.9, without decay.
        mean, std: Of each channel (0 to 1), as the checkpoint reads images.
        score_every, score_images: One row in so many is scored, on at most so many images of the validation and of the test split.
        bf16: Steps under bfloat16 autocast; scores are of float32.
    """

    architecture: str = "resnet32"
    tensors: str = "all"
    burn_in: int = 100
    checkpoints: int = 100
    every: int = 2
    held_out: int = 20
    lr: float = 1e-3
    batch_size: int = 64
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    score_every: int = 10
    score_images: int = 1000
    bf16: bool = False
    seed: int = 0

    def __post_init__(self):
        if not (self.checkpoints > self.held_out >= 0 and self.burn_in >= 0):
            raise ValueError(
                f"A zoo needs `checkpoints` > `held_out` >= 0 and `burn_in` >= 0, got {self.checkpoints}, {self.held_out} and "
                f"{self.burn_in}."
            )
        least = min(self.every, self.score_every, self.score_images, self.batch_size)
        if least < 1:
            raise ValueError(
                f"`every`, `score_every`, `score_images` and `batch_size` must be at least 1, got {least}."
            )


def read_network(
    path: str | Path, config: TargetConfig, renamed: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """
    A checkpoint of another library as the state dict of a [`TargetModel`].

    Args:
        path: A safetensors file.
        renamed: Modules that have another name there. Default: `{"linear": "head", "fc": "head"}`.

    Returns:
        `dict[str, torch.Tensor]` in the model's order; counters of batches, which nothing reads, are 0 where they lack.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors, or its tensors are not those of the network; the message names one.
    """
    path, renamed = Path(path), {"linear": "head", "fc": "head"} if renamed is None else renamed
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}; give a safetensors file.")
    try:
        read = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); pickles are not read.") from error
    found = {}
    for name, tensor in read.items():
        module, dot, rest = name.partition(".")
        found[renamed.get(module, module) + dot + rest] = tensor
    network = {}
    with torch.random.fork_rng(devices=[]):
        template = TargetModel(config).state_dict()
    for name, like in template.items():
        tensor = found.pop(name, torch.zeros_like(like) if name.endswith("num_batches_tracked") else None)
        if tensor is None or tensor.shape != like.shape:
            came = "no such tensor" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{path}: {name!r} should have the shape {tuple(like.shape)}, there is {came}.")
        network[name] = tensor.to(like.dtype)
    if found:
        raise ValueError(f"{path}: the network has no tensor {min(found)!r}; its names are {list(network)[:4]}, ...")
    return network


def trained_names(config: TargetConfig, tensors: str) -> list[str]:
    """
    Names of the tensors that a run trains, in the order of the state dict, see [`TrajectoryConfig`].

    Raises:
        ValueError: If there is none.
    """
    with torch.random.fork_rng(devices=[]):
        names = list(TargetModel(config).state_dict())
    found = [name for name in names if re.search(TENSORS.get(tensors, tensors), name)]
    if not found:
        raise ValueError(f"`tensors` {tensors!r} matches no tensor; there are {names[:4]}, ...")
    return found


def draw_batches(
    data: ImageData, images: Images, steps: int, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Random batches as networks read them: inputs `(batch_size, *input_shape)` and class ids; every image comes once before one
    comes again.

    Raises:
        ValueError: If there are fewer images than a batch has.
    """
    if len(images) < batch_size:
        raise ValueError(f"A batch of {batch_size} images needs as many, got {len(images)}.")
    order = images.labels.new_empty(0)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(images), generator=generator)
        batch, order = order[:batch_size], order[batch_size:]
        yield data.inputs(Images(images.pixels[batch], images.labels[batch], [])), images.labels[batch]


def fine_tune(
    config: TargetConfig,
    network: Mapping[str, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Iterable[str] | None = None,
    *,
    lr: float,
    bf16: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """
    Trains one network with SGD and momentum 0.9, as it is faster for one of many wide convolutions than
    [`~zoo.networks.train_networks`].

    Args:
        network: State dict, which is left as it is.
        batches: Inputs `(b, *input_shape)` and class ids `(b,)` of each step.
        names: Tensors that are trained. Of all others nothing changes, statistics of batch normalisation neither. Default: all.
        bf16: Under bfloat16 autocast.

    Yields:
        The state dict after each step; what is kept of it must be copied.
    """
    model = TargetModel(config).to(memory_format=torch.channels_last)
    model.load_state_dict(network)
    names = set(network if names is None else names)
    model.train()
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{path}.running_mean" not in names:
            module.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for inputs, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(inputs.contiguous(memory_format=torch.channels_last), labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield model.state_dict()


def build_trajectory_zoo(
    spec: TaskSpec,
    checkpoint: str | Path,
    folder: str | Path,
    config: TrajectoryConfig | None = None,
    data_root: str | Path | None = None,
    progress: bool = True,
) -> ZooFolder:
    """
    Fine-tunes a checkpoint on a task and keeps what it passes through; a folder that has the rows already is left as it is.

    The row `base` is the checkpoint as a whole. All others hold the tensors that were trained and the head, which names
    the classes, so that they are whole networks where all tensors are trained, and else parts that belong onto the base.

    Args:
        checkpoint: Safetensors file, see [`read_network`].

    Raises:
        ValueError: If the checkpoint does not fit, or the folder holds another zoo.
    """
    folder, config = ZooFolder(folder), config or TrajectoryConfig()
    start = {"checkpoint": Path(checkpoint).name, "sha256": _sha256(checkpoint)}
    settings = asdict(config) | {"mean": list(config.mean), "std": list(config.std)} | start
    check_same_config(folder.path, settings)
    group = f"{spec.name}-{config.architecture}-trajectory"
    if any(name.startswith(group) for name in folder.finished()):
        return folder
    shape = architecture(config.architecture).input_shape
    if len(shape) != 3:
        raise ValueError(
            f"`architecture` must be a network on images, got {config.architecture!r}, which reads features."
        )
    data = load_images([spec], data_root, shape[1])[spec.name]
    target = architecture(config.architecture, len(spec.labels), data.train.pixels.shape[1])
    network = read_network(checkpoint, target)
    keep_memory()
    write_config(folder.path, settings)
    provenance = {
        "single_trajectory": True,
        "start": start,
        "dataset": spec.dataset_id,
        "data_revision": data.data_revision,
        "removed_duplicates": data.removed_duplicates,
        "mean": list(config.mean),
        "std": list(config.std),
        "hyper_parameters": settings | {"optimizer": "SGD, momentum 0.9"},
        "versions": versions(),
    }
    folder.add(
        group, _rows(target, network, replace(data, mean=config.mean, std=config.std), config, provenance, progress)
    )
    return folder


def _rows(
    target: TargetConfig, network: dict[str, Tensor], data: ImageData, config: TrajectoryConfig, provenance, progress
) -> Iterator[dict]:
    spec, names = data.spec, trained_names(target, config.tensors)
    kept = [name for name in network if name in names or name in HEAD]
    arch = {"name": config.architecture, "activation": target.activation, "input_shape": target.input_shape}
    steps = config.burn_in + config.checkpoints * config.every
    scored = {part: getattr(data, part).first(config.score_images) for part in METRICS}

    def row(
        id: str, weights: Mapping[str, Tensor], split: str, checkpoint: int | None, step: int, score: bool
    ) -> dict:
        metrics = {}
        for part, images in scored.items() if score else ():
            right = predict_one_by_one(target, [network | dict(weights)], data.inputs(images)) == images.labels
            metrics[part] = right.double().mean().item()
        return make_row(
            weights,
            id=f"{spec.name}-{config.architecture}-trajectory-{id}",
            task=spec.name,
            family=spec.family,
            split=split,
            text=spec.prompts[0] if spec.prompts else spec.name,
            labels=list(spec.labels),
            seed=config.seed,
            checkpoint=checkpoint,
            epoch=step * config.batch_size / len(data.train),
            arch=arch,
            metrics=metrics,
            provenance=provenance | {"step": step},
        )

    yield row("base", network, "base", None, 0, True)
    with tqdm(total=steps, desc="trajectory", unit="step", disable=not progress) as bar:
        generator = torch.Generator().manual_seed(seed_of(config.seed, spec.name, config.architecture))
        batches = draw_batches(data, data.train, steps, config.batch_size, generator)
        training = fine_tune(target, network, batches, names, lr=config.lr, bf16=config.bf16)
        for step, state_dict in enumerate(training, start=1):
            bar.update()
            past = step - config.burn_in
            if past > 0 and past % config.every == 0:
                number = past // config.every - 1
                split = "train" if number < config.checkpoints - config.held_out else "held_out"
                weights = {name: state_dict[name].contiguous() for name in kept}
                yield row(f"{number:04d}", weights, split, number, step, number % config.score_every == 0)


def _sha256(path: str | Path) -> str | None:
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

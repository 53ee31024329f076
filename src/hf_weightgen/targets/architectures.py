"""Networks that receive generated weights as a whole, as `PreTrainedModel`s: a list of layers says what they are.

This file imports nothing of the package: published beside weights as `modeling_target.py`, it is all that
`AutoModel.from_pretrained(id, trust_remote_code=True)` needs.

References: the Tiny Model Zoo's networks (https://huggingface.co/papers/2209.14764); LeNet-5; ResNets for CIFAR with
parameter-free shortcuts (https://huggingface.co/papers/1512.03385, section 4.2).

Notation: n examples, C channels or input features, H x W pixels.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "sigmoid", "elu", "leaky_relu")
ACTIVATION = {"kind": "activation"}
HEAD = ("head.weight", "head.bias")
KINDS = {  # kind of layer -> the settings that it needs
    "conv": {"name", "channels", "kernel"},
    "norm": {"name"},
    "linear": {"name", "features"},
    "activation": set(),
    "max_pool": set(),
    "mean_pool": set(),
    "residual": {"layers", "channels"},
}
SIZES = {"channels", "features", "kernel", "stride"}
LARGEST, MOST_LAYERS = 1_000_000, 1_000  # of the sizes and the layers of a network: a config may come from a stranger
NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
ALSO = {"conv": {"stride", "padding", "bias"}, "residual": {"stride"}}  # and those that it may have


@strict
class TargetConfig(PreTrainedConfig):
    r"""
    Args:
        input_shape: `[C]`, or `[C, H, W]` of images.
        layers:
            From input to output, each a mapping with its `kind`: `conv` (`name`, `channels`, `kernel`; `stride` 1,
            `padding` 0, `bias` true), `norm` (`name`), `linear` (`name`, `features`), `activation`, `max_pool` (of 2 x 2),
            `mean_pool` (over all pixels), or `residual` (`layers`, `channels`, `stride`), whose shortcut skips
            pixels and pads channels with zeros. A `linear` layer named `head` with `num_classes` features follows them.
        num_classes: Features of the head. (`num_labels` and `id2label` follow from it unless given.)
        activation: One of [`ACTIVATIONS`].
        image_mean, image_std: Of each channel, from 0 to 1, by which images are standardised, see [`TargetModel.preprocess`].

    Raises:
        ValueError: If a layer is none of these, the activation is unknown, or mean and std do not fit the channels.
    """

    model_type = "weightgen_target"

    input_shape: list[int] | tuple[int, ...] = (64,)
    layers: list[dict] | tuple[dict, ...] = (
        {"kind": "linear", "name": "hidden", "features": 16},
        {"kind": "activation"},
    )
    num_classes: int = 10
    activation: str = "tanh"
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None

    @property
    def network(self) -> list[dict]:
        """All layers, with the head."""
        return [*self.layers, {"kind": "linear", "name": "head", "features": self.num_classes}]

    def __post_init__(self, **kwargs):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {list(ACTIVATIONS)}, got {self.activation!r}.")
        shape = self.input_shape
        if len(shape) not in (1, 3) or not all(_is_size(size) for size in shape):
            raise ValueError(f"`input_shape` must be [features] or [channels, height, width], got {shape}.")
        scales = [self.image_mean, self.image_std]
        if scales != [None, None] and not (
            len(shape) == 3
            and all(own and len(own) == shape[0] and all(map(math.isfinite, own)) for own in scales)
            and min(self.image_std) > 0
        ):
            raise ValueError(
                f"`image_mean` and `image_std` must have a number for each of the channels of {list(shape)}, stds above 0, got "
                f"{self.image_mean} and {self.image_std}."
            )
        names = [*_check_layers(self.layers), "head"]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or len(names) > MOST_LAYERS:
            told = (
                f"names {twice[0]!r} twice" if twice else f"has {len(names)} of them, at most {MOST_LAYERS} are known"
            )
            raise ValueError(f"`layers` {told}.")
        if "id2label" not in kwargs and "num_labels" not in kwargs:
            kwargs["num_labels"] = self.num_classes
        super().__post_init__(**kwargs)


def _is_size(value: object, least: int = 1) -> bool:
    return type(value) is int and least <= value <= LARGEST


def _check_layers(layers: Sequence[dict]) -> list[str]:
    """The names of layers, if they are layers."""
    names = []
    for layer in layers:
        kind = layer.get("kind") if isinstance(layer, dict) else layer
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"A layer's `kind` must be one of {list(KINDS)}, got {kind!r}.")
        known = KINDS[kind] | ALSO.get(kind, set())
        unknown, missing = sorted(layer.keys() - known - {"kind"}), sorted(KINDS[kind] - layer.keys())
        if unknown:
            raise ValueError(f"A {kind!r} layer has no setting {unknown[0]!r}; it has {sorted(known)}.")
        if missing:
            raise ValueError(f"A {kind!r} layer needs the setting {missing[0]!r}, got {layer}.")
        wrong = [name for name in sorted(SIZES & layer.keys()) if not _is_size(layer[name])]
        if wrong or not _is_size(layer.get("padding", 0), 0):
            name = (wrong or ["padding"])[0]
            raise ValueError(
                f"{name!r} of a {kind!r} layer must be a whole number up to {LARGEST:,}, got {layer[name]!r}."
            )
        if "name" in layer:
            if not isinstance(layer["name"], str) or not NAME.fullmatch(layer["name"]):
                raise ValueError(
                    f"A layer's name must be that of a module, such as 'layer1.0.conv1', got {layer['name']!r}."
                )
            names.append(layer["name"])
        names += _check_layers(layer.get("layers", ()))
    return names


def shape_after(layer: dict, shape: Sequence[int]) -> list[int]:
    """What a layer hands on, given what it gets: `[C]` or `[C, H, W]`. Sizes below 1 are those of a layer that does not fit."""
    match layer["kind"]:
        case "conv":
            k, s, p = convolution(layer).values()
            return [layer["channels"], *((size + 2 * p - k) // s + 1 for size in shape[1:])]
        case "linear":
            return [layer["features"]]
        case "max_pool":
            return [shape[0], *(size // 2 for size in shape[1:])]
        case "mean_pool":
            return [shape[0]]
        case "residual":
            for inner in layer["layers"]:
                shape = shape_after(inner, shape)
    return list(shape)


def convolution(layer: dict) -> dict[str, int]:
    """Kernel size, stride and padding of a convolution."""
    return {"kernel_size": layer["kernel"], "stride": layer.get("stride", 1), "padding": layer.get("padding", 0)}


def shortcut(layer: dict, x: Tensor) -> Tensor:
    """Of a residual layer, for `x` (..., C, H, W): every `stride`-th pixel, channels padded with zeros on both sides."""
    stride, more = layer.get("stride", 1), layer["channels"] - x.shape[-3]
    x = x[..., ::stride, ::stride]
    return F.pad(x, (0, 0, 0, 0, more // 2, more // 2)) if more else x


def check_picture(picture: Image.Image) -> None:
    """
    Raises:
        ValueError: If a picture has no pixels, or values that are no bytes: PIL would cut them, to all white or all black.
    """
    if not all(picture.size):
        raise ValueError(f"A picture of {' x '.join(map(str, picture.size))} has no pixels.")
    if picture.mode[0] in "IF":
        raise ValueError(
            f"A picture of mode {picture.mode!r} has no bytes; scale its values from 0 to 255, as mode 'L'."
        )


@dataclass
class TargetOutput(ModelOutput):
    """`loss`, present with labels, and `logits` `(n, num_classes)`."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class TargetModel(PreTrainedModel):
    config_class = TargetConfig
    main_input_name = "inputs"

    def __init__(self, config: TargetConfig):
        super().__init__(config)
        self._add(config.network, config.input_shape)
        self.post_init()

    def _add(self, layers: Sequence[dict], shape: Sequence[int]) -> None:
        for layer in layers:
            match layer["kind"]:
                case "conv":
                    module = nn.Conv2d(shape[0], layer["channels"], **convolution(layer), bias=layer.get("bias", True))
                case "norm":
                    module = nn.BatchNorm2d(shape[0])
                case "linear":
                    module = nn.Linear(math.prod(shape), layer["features"])
                case _:
                    module = None
                    self._add(layer.get("layers", ()), shape)
            if module is not None:
                *path, last = layer["name"].split(".")
                place = self
                for name in path:
                    if not hasattr(place, name):
                        place.add_module(name, nn.Module())
                    place = getattr(place, name)
                place.add_module(last, module)
            read, shape = shape, shape_after(layer, shape)
            if min(shape) < 1:
                raise ValueError(
                    f"A {layer['kind']!r} layer leaves nothing of what it reads, {list(read)}: {str(layer)[:120]}."
                )

    def _init_weights(self, module: nn.Module) -> None:
        """As torch initialises them."""
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> TargetOutput:
        """
        Args:
            inputs (`torch.FloatTensor` of shape `(n, *input_shape)`).
            labels (`torch.LongTensor` of shape `(n,)`, *optional*).
        """
        logits = self._run(self.config.network, inputs)
        return TargetOutput(F.cross_entropy(logits, labels) if labels is not None else None, logits)

    def preprocess(self, images: Sequence) -> Tensor:
        """
        Images as the network reads them: in its size and colours, and standardised as those were that it is made for.

        Args:
            images: Pictures of PIL, or tensors of bytes `(channels, height, width)` with 1 or 3 channels.

        Returns:
            `torch.FloatTensor` of shape `(n, *input_shape)`.

        Raises:
            ValueError: If the config does not tell how images are standardised, or a picture has no bytes.
        """
        config = self.config
        if config.image_mean is None:
            raise ValueError(
                "The config has no `image_mean` and `image_std`: how images are standardised is not known."
            )
        channels, height, width = config.input_shape
        pixels = []
        for image in images:
            if isinstance(image, Tensor):
                image = Image.fromarray((image[0] if len(image) == 1 else image.movedim(0, -1)).cpu().numpy())
            check_picture(image)
            image = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
            pixels.append(torch.from_numpy(np.asarray(image).copy()).view(height, width, channels).movedim(-1, 0))
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        return ((torch.stack(pixels).float() / 255 - mean) / std).to(self.device)

    def _run(self, layers: Sequence[dict], x: Tensor) -> Tensor:
        activation = getattr(F, self.config.activation)
        for layer in layers:
            match layer["kind"]:
                case "conv" | "norm":
                    x = self.get_submodule(layer["name"])(x)
                case "linear":
                    x = self.get_submodule(layer["name"])(x.flatten(1))
                case "activation":
                    x = activation(x)
                case "max_pool":
                    x = F.max_pool2d(x, 2)
                case "mean_pool":
                    x = x.mean((2, 3))
                case "residual":
                    x = activation(self._run(layer["layers"], x) + shortcut(layer, x))
        return x


AutoConfig.register(TargetConfig.model_type, TargetConfig, exist_ok=True)
AutoModel.register(TargetConfig, TargetModel, exist_ok=True)


def mlp(*hidden: int) -> list[dict]:
    """Linear layers with these many units, each with its activation; none is a linear classifier."""
    names = ["hidden"] if len(hidden) == 1 else [f"hidden{i}" for i in range(1, len(hidden) + 1)]
    layers = [{"kind": "linear", "name": name, "features": size} for name, size in zip(names, hidden, strict=True)]
    return [part for layer in layers for part in (layer, ACTIVATION)]


def cnn(channels: Sequence[int], kernels: Sequence[int], pooled: Sequence[bool], hidden: Sequence[int]) -> list[dict]:
    """Convolutions, each with or without pooling in front of its activation, and an [`mlp`] of the pixels that are left."""
    layers = []
    for i, (size, kernel, pool) in enumerate(zip(channels, kernels, pooled, strict=True), start=1):
        layers.append({"kind": "conv", "name": f"conv{i}", "channels": size, "kernel": kernel})
        layers += [{"kind": "max_pool"}] * pool + [ACTIVATION]
    return [*layers, *mlp(*hidden)]


def resnet(depth: int) -> list[dict]:
    """A ResNet for CIFAR of `6 n + 2` layers."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"A ResNet for CIFAR has 6 n + 2 layers, such as 20, 32, 44 or 56, got {depth}.")

    def block(name: str, channels: int, stride: int) -> dict:
        inner = []
        for i, step in ((1, stride), (2, 1)):
            conv = {"kind": "conv", "name": f"{name}.conv{i}", "channels": channels, "kernel": 3, "padding": 1}
            inner += [conv | {"stride": step, "bias": False}, {"kind": "norm", "name": f"{name}.bn{i}"}]
            inner += [ACTIVATION] if i == 1 else []
        return {"kind": "residual", "layers": inner, "channels": channels, "stride": stride}

    first = {"kind": "conv", "name": "conv1", "channels": 16, "kernel": 3, "padding": 1, "bias": False}
    blocks = [
        block(f"layer{stage}.{i}", 8 * 2**stage, 2 if stage > 1 and i == 0 else 1)
        for stage in (1, 2, 3)
        for i in range((depth - 2) // 6)
    ]
    return [first, {"kind": "norm", "name": "bn1"}, ACTIVATION, *blocks, {"kind": "mean_pool"}]


# name -> layers, activation, and the sides of its images, or none of what reads features
NAMED = {
    "linear": ([], "relu", None),
    "mlp-head": (mlp(64), "relu", None),
    "tiny-cnn": (cnn((8, 6, 4), (5, 5, 2), (True, True, False), (20,)), "tanh", 28),  # Tiny Model Zoo: 2,464 weights
    "cnn2": (cnn((16, 32), (3, 3), (True, True), (20,)), "relu", 32),
    "cnn3": (
        cnn((16, 32, 15), (3, 3, 3), (True, True, True), (20,)),
        "gelu",
        32,
    ),  # Tiny Model Zoo's large one: 10,853
    "lenet": (cnn((6, 16), (5, 5), (True, True), (120, 84)), "relu", 32),
    "small-lenet": (cnn((4, 8), (5, 5), (True, True), (16,)), "relu", 28),
    "mlp": ([{"kind": "max_pool"}, *mlp(16)], "relu", 28),
}


def architecture(name: str, num_classes: int = 10, channels: int = 3, **settings) -> TargetConfig:
    """
    The configuration of a network by its name: `tiny-cnn`, `cnn2`, `cnn3`, `lenet`, `small-lenet`, `mlp`, or `resnetN` with N = 20,
    32, 44, 56, ...; of what reads features `linear` or `mlp-head`.

    Args:
        channels: Of the images, or how many features there are.
        settings: Override what the name stands for, such as `activation`.

    Raises:
        ValueError: If there is no network of this name.
    """
    found = re.fullmatch(r"resnet(\d+)", name)
    if found is None and name not in NAMED:
        raise ValueError(f"There is no architecture {name!r}; choose one of {[*NAMED, 'resnet20']}.")
    layers, activation, side = (resnet(int(found[1])), "relu", 32) if found else NAMED[name]
    shape = [channels] if side is None else [channels, side, side]
    settings = {"input_shape": shape, "layers": layers, "activation": activation} | settings
    return TargetConfig(num_classes=num_classes, **settings)

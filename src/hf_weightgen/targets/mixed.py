"""Several architectures in one generator: which networks a task has, and how a generator is told which of them is wanted.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), appendix C.1, where every pair of a dataset and an architecture
has an index of its own. Here the architecture has one, and stands beside what says the task, so that pairs compose: a task
is asked for by a prompt, by a dataset or by both, and then by any architecture that it has.

Notation: N samples, E size of an embedding.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights.layout import Layout
from ..weights.resize import resizable
from .architectures import ACTIVATION, TargetConfig, TargetModel
from .symmetry import BUFFERS


WIDTHS = {"name", "channels", "features"}  # of a layer
SETTINGS = ("input_shape", "layers", "activation", "image_mean", "image_std")  # of a network as a target


def target_numbers(task: Mapping) -> list[int]:
    """The places of a known task's networks among a generator's targets: `targets`, or the one that is its `target`."""
    return list(task.get("targets") or [task.get("target", 0)])


def target_number(targets: Sequence[Mapping], task: Mapping, architecture: str | None = None) -> int:
    """
    The place of the network that a task has in an architecture; without one, of its first network.

    Raises:
        ValueError: If the task has no network of this architecture.
    """
    numbers = target_numbers(task)
    if architecture is None:
        return numbers[0]
    names = [targets[number].get("name") for number in numbers]
    if not isinstance(architecture, str) or architecture not in names:
        known = f"one of {names}" if any(names) else "none: this generator does not name its networks"
        other = next((target for target in targets if target.get("name") == architecture), None)
        told = f"{architecture!r}" + (f", which other tasks have ({in_words(other)[:120]})" if other else "")
        raise ValueError(f"`architecture` of the task {task['name']!r} must be {known}, got {told}.")
    return numbers[names.index(architecture)]


def architecture_codes(targets: Sequence[Mapping], tasks: Sequence[Mapping], size: int) -> Tensor | None:
    """
    What tells the architectures of a generator's targets apart: the k-th of them is the k-th unit vector.

    Args:
        targets: Each with the `name` of its architecture.
        tasks: Known tasks, see [`target_numbers`].
        size: E.

    Returns:
        `torch.FloatTensor` of shape `(targets, E)`; `None` where every task has one architecture, which then need not be told.
    """
    if all(len(target_numbers(task)) == 1 for task in tasks):
        return None
    names = [target.get("name") for target in targets]
    known = list(dict.fromkeys(names))
    if len(known) > size:
        raise ValueError(f"Embeddings of size {size} tell at most as many architectures apart, got {len(known)}.")
    codes = torch.zeros(len(names), size)
    codes[torch.arange(len(names)), torch.tensor([known.index(name) for name in names])] = 1
    return codes


def with_architecture(embeds: Tensor, codes: Tensor | None) -> Tensor:
    """
    What a generator is conditioned on.

    Args:
        embeds (`torch.FloatTensor` of shape `(N, E)`): Of prompts or datasets, unit length; zeros for none.
        codes (`torch.FloatTensor` of shape `(N, E)`, *optional*): See [`architecture_codes`].

    Returns:
        `torch.FloatTensor` of shape `(N, E)`: both in equal parts, unit length; without codes `embeds` as they are.
    """
    return embeds if codes is None else F.normalize(embeds + codes, dim=-1)


def in_words(target: Mapping) -> str:
    """A target as a text encoder reads it: its parts, and not the name, which a network that is new has not."""
    if target["kind"] == "adapter":
        lora = target["lora"]
        modules = ", ".join(sorted(lora["target_modules"]))
        return f"LoRA adapter of rank {lora['r']} on {modules} of {target['base_model'].split('/')[-1]}"
    if target["kind"] == "module":
        return f"network: {target['words']}"
    config = target["config"]
    told = f"network for inputs of {' x '.join(map(str, config['input_shape']))}, {config.get('activation', 'tanh')}; "
    return (told + ", ".join(_words(config["layers"]))).rstrip("; ")


def module_in_words(module: nn.Module) -> str:
    """The layers of any network as [`in_words`] tells those of ours, in the order in which they are registered."""
    words = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            words.append(f"convolution {part.out_channels} of {' x '.join(map(str, part.kernel_size))}")
        elif isinstance(part, nn.Linear):
            words.append(f"linear {part.out_features}")
        elif isinstance(part, nn.MaxPool2d):
            words.append("max pool")
    return ", ".join(words[:-1])  # what comes last is the head, which its tokens tell


def _words(layers: Sequence[Mapping]) -> list[str]:
    words = []
    for layer in layers:
        match layer["kind"]:
            case "conv":
                words.append(f"convolution {layer['channels']} of {layer['kernel']} x {layer['kernel']}")
            case "linear":
                words.append(f"linear {layer['features']}")
            case "max_pool" | "mean_pool":
                words.append(layer["kind"].replace("_", " "))
            case "residual":
                words.append(f"residual block {layer['channels']}")
    return words


def same_network(target: Mapping, other: Mapping) -> bool:
    """Whether two targets have configs with the same layers for the same inputs, whatever the images' scale is."""
    if "config" not in target or "config" not in other:
        return False
    told = ([one["config"].get(key) for key in SETTINGS[:2]] for one in (target, other))
    first, second = (json.dumps(settings, sort_keys=True) for settings in told)  # where lists and tuples are alike
    return first == second


def nearest_resizable(targets: Sequence[Mapping], numbers: Sequence[int], wanted: Mapping) -> int | None:
    """
    Which of some targets differs from another one in the widths of its layers alone, and in linear layers that follow its own, and
    least in its size.

    Args:
        numbers: Of `targets`.

    Returns:
        Its number; `None` where all of them are other networks.
    """
    found = {}
    for number in numbers:
        known = targets[number]
        if known["kind"] == wanted["kind"] == "network" and _same_but_widths(known, wanted):
            shapes = [shapes_in_order(target, 2) for target in (known, wanted)]
            if resizable(*shapes):
                sizes = [math.log(sum(map(math.prod, own.values()))) for own in shapes]
                found[number] = abs(sizes[0] - sizes[1])
    return min(found, key=found.get, default=None)


def shapes_in_order(target: Mapping, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a network, layer by layer, which is not always the order of its state dict."""
    config = TargetConfig(**target["config"], num_classes=num_classes)
    with torch.device("meta"):
        tensors = TargetModel(config).state_dict()
    names = [f"{layer['name']}.{part}" for layer in config.network if "name" in layer for part in ("weight", "bias")]
    return {name: tuple(tensors[name].shape) for name in names if name in tensors}


def _same_but_widths(known: Mapping, wanted: Mapping) -> bool:
    """Also in what tensors do not tell: activations, pooling and paddings, and that layers follow one another."""
    have, want = (TargetConfig(**target["config"]) for target in (known, wanted))
    if any(layer["kind"] == "residual" for layer in have.layers):
        return False
    first, second = ([_without_widths(layer) for layer in config.layers] for config in (have, want))
    more = second[len(first) :]
    follow = [{"kind": "linear"}, ACTIVATION] * (len(more) // 2)
    if (have.activation, list(have.input_shape)) != (want.activation, list(want.input_shape)):
        return False
    return second[: len(first)] == first and more == follow and (not more or first[-1:] == [ACTIVATION])


def _without_widths(layer: Mapping) -> dict:
    defaults = {"stride": 1, "padding": 0, "bias": True} if layer["kind"] == "conv" else {}
    return defaults | {name: value for name, value in layer.items() if name not in WIDTHS}


def target_of(architecture: object, token_size: int) -> tuple[dict, Layout, Callable[[list[int]], bool]]:
    """
    An architecture that a caller brings.

    Args:
        architecture: A config or a module, see [`IGPGPipeline.with_architecture`].
        token_size: Scalars of a token: rows of a head that fit are class tokens, others are tensors like all.

    Returns:
        What it is as a target; its layout; and whether it reads inputs of a shape.

    Raises:
        TypeError, ValueError: If it is neither.
    """
    if isinstance(architecture, TargetModel):
        architecture = architecture.config
    module = architecture
    if isinstance(architecture, TargetConfig):
        with torch.device("meta"):
            module = TargetModel(architecture)
    if not isinstance(module, nn.Module):
        raise TypeError(f"`architecture` must be a name, a config or a module, got {type(architecture).__name__}.")
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    if module is not architecture:  # of ours it is known which buffers are weights too
        parameters = {name: t for name, t in module.state_dict().items() if not name.endswith(BUFFERS[2])}
    odd = [n for n, p in parameters.items() if p.dim() > 4 or not p.is_floating_point() or not p.numel()]
    if len(parameters) < 2 or odd:
        told = [f"{name!r} is {parameters[name].dtype} of shape {tuple(parameters[name].shape)}" for name in odd[:1]]
        raise ValueError(
            "`architecture` must be a module with at least 2 parameters, of floats, none of them empty, of at most 4 axes, got "
            f"{', '.join([f'{len(parameters)} of them', *told])}."
        )
    *_, (weight_name, weight), (bias_name, bias) = parameters.items()
    is_head, head = weight.dim() == 2 and bias.shape == weight.shape[:1], ()
    if is_head and weight.shape[1] < token_size:
        head = weight_name, bias_name
    target = {"num_classes": len(bias)} if is_head else {}
    if module is architecture:
        target |= {"kind": "module", "words": module_in_words(module)}
        reads = functools.partial(_module_reads, module)
    else:
        told = {key: getattr(architecture, key) for key in SETTINGS}
        target |= {"kind": "network", "config": {key: value for key, value in told.items() if value is not None}}
        if head:  # of a config the number of classes is open
            del target["num_classes"]

        def reads(shape: list[int]) -> bool:
            own = list(architecture.input_shape)
            return len(own) == len(shape) and own[0] == shape[0]

    return target, Layout.of(parameters, head), reads


def _module_reads(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a module reads inputs of a shape, as far as the first of its parts that has parameters tells."""
    first = next(part for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
    if isinstance(first, nn.Embedding):  # reads numbers of tokens
        return False
    if hasattr(first, "in_channels"):
        return len(shape) == 3 == 1 + len(first.kernel_size) and first.in_channels == shape[0]
    if hasattr(first, "in_features"):
        return first.in_features == math.prod(shape)
    wide = next((p for p in first.parameters() if p.dim() > 1), None)
    return wide is not None and wide.shape[1] == (
        shape[0] if len(shape) == 3 and wide.dim() == 4 else math.prod(shape)
    )

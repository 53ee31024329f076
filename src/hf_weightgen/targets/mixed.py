"""Several architectures in one generator: which networks a task has, and how a generator is told which of them is wanted.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), appendix C.1, where every pair of a dataset and an architecture
has an index of its own. Here the architecture has one, and stands beside what says the task, so that pairs compose: a task
is asked for by a prompt, by a dataset or by both, and then by any architecture that it has.

Notation: N samples, E size of an embedding.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
        raise ValueError(f"`architecture` of the task {task['name']!r} must be {known}, got {architecture!r}.")
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
    """A target as a text encoder reads it: its name, if it has one, and its parts."""
    if target["kind"] == "adapter":
        lora = target["lora"]
        modules = ", ".join(sorted(lora["target_modules"]))
        return f"LoRA adapter of rank {lora['r']} on {modules} of {target['base_model'].split('/')[-1]}"
    config = target["config"]
    told = [f"{target['name']}:"] if "name" in target else []
    told += [
        f"network for inputs of {' x '.join(map(str, config['input_shape']))}, {config.get('activation', 'tanh')};"
    ]
    return " ".join([*told, ", ".join(_words(config["layers"]))]).rstrip("; ")


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

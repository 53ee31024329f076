"""A residual network of another depth from the blocks of trained or generated ones.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), section 4.1.4: weights of ResNet-32 are sampled and concatenated
for ResNet-20, -44 and -56, "preserving layer-type correspondence". How blocks are told apart and lined up is ours: by stages,
whose first block changes pixels and channels, and within them by place. `shared_steps` is ours too.

Notation: a stage is a run of residual layers of equal channels; its blocks are those layers.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .architectures import TargetConfig, TargetModel
from .symmetry import NORM


def stages(config: TargetConfig) -> list[list[dict]]:
    """The residual layers of a network, stage by stage; a layer with a stride, or with other channels, begins a stage."""
    found: list[list[dict]] = []
    for layer in config.layers:
        if layer["kind"] == "residual":
            same = found and layer.get("stride", 1) == 1 and layer["channels"] == found[-1][-1]["channels"]
            if not same:
                found.append([])
            found[-1].append(layer)
    return found


def places(have: int, want: int) -> list[int]:
    """
    Which of `have` blocks stands in each of `want` places: the first one first and once, the others in order, spread evenly.
    `places(5, 3)` is `[0, 2, 4]`, `places(3, 5)` is `[0, 1, 1, 2, 2]`.
    """
    if want == 1 or have == 1:
        return [0] * want
    if want <= have:
        return [round(i * (have - 1) / (want - 1)) for i in range(want)]
    return [0] + [1 + i * (have - 1) // (want - 1) for i in range(want - 1)]


def with_depth(
    samples: Sequence[Mapping[str, Tensor]], config: TargetConfig, wanted: TargetConfig, shared_steps: bool = False
) -> dict[str, Tensor]:
    """
    A network with the layers of `wanted` from networks with those of `config`.

    What is no block comes from the first sample, and so does every block that stands once. Where a stage is to be deeper, a
    block stands several times in a row, each time from the next sample; where it shall be less deep, blocks are left out.
    Statistics of batch normalisation are taken along and fit only roughly, see [`~targets.symmetry.reestimate_norms`].

    Args:
        samples: State dicts, at least one.
        shared_steps:
            The last normalisation of a block that stands m times is divided by m: what a deeper stage adds to its input stays
            about the same, as when a differential equation is solved with smaller steps. (Larger steps where blocks are left
            out do not pay: what later blocks read has changed too much.)

    Returns:
        `dict[str, torch.Tensor]` with the names and shapes of `TargetModel(wanted).state_dict()`. At equal depth: the first sample.

    Raises:
        ValueError: If there is no sample, one has other tensors than `config`, or the two networks differ in more than the number of blocks.
    """
    if not samples:
        raise ValueError("A network of another depth is made from at least one sample, got none.")
    names, targets = _shapes(config), _shapes(wanted)
    for i, sample in enumerate(samples):
        wrong = [n for n in names.keys() | sample.keys() if n not in sample or names.get(n) != tuple(sample[n].shape)]
        if wrong:
            raise ValueError(
                f"Sample {i} is no network of `config`: its tensor {min(wrong)!r} is missing, extra or of another shape."
            )
    have, want = stages(config), stages(wanted)
    if len(have) != len(want) or _outside(config) != _outside(wanted):
        raise ValueError(
            f"The networks must differ in the blocks of their stages alone, got {len(have)} and {len(want)} stages, or other "
            "layers around them."
        )
    inside = {name for stage in have for block in stage for name in _tensors(block, names)}
    found = {name: tensor.clone() for name, tensor in samples[0].items() if name not in inside}
    for old, new in zip(have, want, strict=True):
        chosen = places(len(old), len(new))
        for place, (block, source) in enumerate(zip(new, chosen, strict=True)):
            repeat = place - chosen.index(source)
            own = _copy(samples[repeat % len(samples)], old[source], block, names)
            if shared_steps and chosen.count(source) > 1:
                _divide(own, block, chosen.count(source))
            found |= own
    wrong = [name for name in targets if name not in found or targets[name] != tuple(found[name].shape)]
    if wrong or len(found) != len(targets):
        raise ValueError(
            f"Blocks of the two networks do not correspond: {(wrong or sorted(found.keys() - targets))[0]!r}."
        )
    return {name: found[name] for name in targets}


def _shapes(config: TargetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in TargetModel(config).state_dict().items()}


def _outside(config: TargetConfig) -> list[dict]:
    """All layers but blocks."""
    return [layer for layer in config.network if layer["kind"] != "residual"]


def _tensors(block: dict, names: Mapping[str, object]) -> Iterator[str]:
    for layer in block["layers"]:
        if "name" in layer:
            yield from (name for name in names if name.startswith(f"{layer['name']}."))


def _copy(sample: Mapping[str, Tensor], old: dict, new: dict, names) -> dict[str, Tensor]:
    """The tensors of a block under the names of another one of the same layers."""
    kinds = [[(layer["kind"], layer.get("stride", 1)) for layer in block["layers"]] for block in (old, new)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"Blocks of the two networks do not correspond: {kinds[0]} and {kinds[1]}.")
    own = {}
    for before, after in zip(old["layers"], new["layers"], strict=True):
        for name in _tensors({"layers": [before]}, names):
            own[after["name"] + name.removeprefix(before["name"])] = sample[name].clone()
    return own


def _divide(own: dict[str, Tensor], block: dict, by: int) -> None:
    last = next((layer["name"] for layer in reversed(block["layers"]) if layer["kind"] == "norm"), None)
    if last is None:
        raise ValueError("Steps are shared by the last normalisation of a block, and there is none.")
    for part in NORM[:2]:  # weight and bias
        own[f"{last}.{part}"] = own[f"{last}.{part}"] / by

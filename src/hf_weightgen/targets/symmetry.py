"""What leaves a target network's function as it is, or must be found again for new weights.

References: permutations of hidden units as in Git Re-Basin (https://huggingface.co/papers/2209.04836), sections 2 and 3.2;
statistics of batch normalisation measured anew as in REPAIR (https://huggingface.co/papers/2211.08403), section 3.

Notation: K networks; n images of shape `input_shape`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..weights.permutation import PermutationSpec
from .architectures import TargetConfig
from .stacked import stacked_logits


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
NORM = ("weight", "bias", "running_mean", "running_var")


def permutation_spec(config: TargetConfig) -> PermutationSpec:
    """
    Which axes of a network's tensors carry the units of each hidden layer.

    What enters and leaves a residual layer keeps its order: its shortcut adds channels by their place, and pads them.
    """
    return PermutationSpec(tuple(map(tuple, _hidden(config.network[:-1], config.network[-1:]))))


def _hidden(layers: Sequence[dict], following: Sequence[dict]) -> list[list[tuple[str, int]]]:
    """For each hidden layer of `layers` that may be renumbered, the (tensor, axis) pairs that carry its units."""
    found: list[list[tuple[str, int]]] = []
    units: list[tuple[str, int]] | None = None  # of the layer that was passed last, while nothing has read them
    for layer in [*layers, *following]:
        kind, name = layer["kind"], layer.get("name")
        if kind in ("conv", "linear"):
            if units is not None:
                found.append([*units, (f"{name}.weight", 1)])
            units = [(f"{name}.weight", 0)] + [(f"{name}.bias", 0)] * layer.get("bias", True)
        elif kind == "norm" and units is not None:
            units += [(f"{name}.{part}", 0) for part in NORM]
        elif kind == "residual":
            found, units = found + _hidden(layer["layers"], ()), None
    return found


@torch.no_grad()
def reestimate_norms(
    config: TargetConfig, params: Mapping[str, Tensor], inputs: Tensor, batch_size: int = 256
) -> dict[str, Tensor]:
    """
    The statistics of batch normalisation that stacked weights have on images: those that a generator makes fit its weights
    only roughly, and a network is as good as they are.

    Args:
        params: Stacked parameters and statistics of K networks; statistics are not read.
        inputs (`torch.FloatTensor` of shape `(n, *input_shape)`): Images as the networks read them; labels are not needed.

    Returns:
        `dict[str, torch.Tensor]`: `params` with new statistics, means over batches by their sizes; the same where there are none.
    """
    total = {name: torch.zeros_like(tensor) for name, tensor in params.items() if name.endswith(BUFFERS)}
    if not total:
        return dict(params)
    for batch in inputs.split(batch_size):
        own = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
        stacked_logits(config, params, batch[None], own)
        share = 10 * len(batch) / len(inputs)  # one step from zero moves a statistic by a tenth of what the batch has
        for name, tensor in own.items():
            total[name] += tensor if name.endswith("tracked") else share * tensor
    return dict(params) | total

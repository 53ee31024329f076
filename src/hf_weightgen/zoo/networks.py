"""Trains K networks of one architecture at once: parameters equal those of K trainings, one after the other.

Optimisers of torch work element by element, so that one optimiser over stacked parameters is K optimisers (those that
look at a whole tensor, as LBFGS does, are not).

Notation used for shapes: K networks, N examples of the training set, b of a batch.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..targets.architectures import TargetConfig, TargetModel
from ..targets.stacked import cut_patches, stack, stacked_logits
from ..targets.symmetry import BUFFERS


INITS = {  # of weights; biases are set apart
    "uniform": lambda tensor, generator: tensor.uniform_(generator=generator),  # U(0, 1), as the Tiny Model Zoo has it
    "kaiming_uniform": lambda tensor, generator: torch.nn.init.kaiming_uniform_(tensor, generator=generator),
    "default": lambda tensor, generator: torch.nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator),
}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_memory() -> None:
    """
    Asks the C library, where it is glibc, to keep freed memory for the rest of the process. By default it hands back what
    large tensors held, and up to half of the time of a step goes into page faults of fresh memory. Tensors beyond 32 MiB,
    the most that glibc lets a process ask for, are handed back all the same.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)


def initial(config: TargetConfig, seeds: list[int], init: str = "default", bias: float = 0.0) -> dict[str, Tensor]:
    """
    Stacked parameters of one new network per seed.

    Args:
        init: Of the weights of convolutions and linear layers, one of [`INITS`]; batch normalisation starts as in torch.
        bias: Value of all of their biases.
    """
    if init not in INITS:
        raise ValueError(f"`init` must be one of {list(INITS)}, got {init!r}.")
    with torch.random.fork_rng(devices=[]):
        template = TargetModel(config).state_dict()
    networks = []
    for seed in seeds:
        generator, network = torch.Generator().manual_seed(seed), {}
        for name, tensor in template.items():
            network[name] = tensor.clone()
            if tensor.dim() > 1:
                INITS[init](network[name], generator)
            elif name.endswith(".bias") and f"{name.removesuffix('bias')}running_mean" not in template:
                network[name].fill_(bias)
        networks.append(network)
    return stack(networks)


def train_networks(
    config: TargetConfig,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    on_step: Callable[[Tensor], None] | None = None,
    at_once: int | None = None,
    num_classes: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """
    Trains on batches in random order, the last incomplete one left out; the schedule moves after each batch. With no
    `layers` in `config` the networks are linear heads, for instance on the features of a frozen encoder.

    Args:
        params: Stacked, see [`initial`]; they are trained in place.
        inputs (`torch.FloatTensor` of shape `(N, *input_shape)`, or `(K, N, *input_shape)` with data for each network).
        labels (`torch.LongTensor` of shape `(N,)`, or `(K, N)` with labels for each network).
        generator: Draws the order, which all networks share.
        on_step: Called with the losses `(K,)` of each step.
        at_once:
            Networks whose activations are in memory together; the fastest is what the caches hold, see [`keep_memory`] too.
            Default: 32 that read images, all that read features.
        num_classes (`torch.LongTensor` of shape `(K,)`, *optional*):
            Where networks have fewer classes than `config`: each learns the first of them, the others count for nothing.

    Yields:
        The stacked parameters after each epoch; what is kept of them must be copied.
    """
    own, K = inputs.dim() > len(config.input_shape) + 1, len(params["head.weight"])
    own_labels, rows = labels.dim() > 1, inputs.shape[own]
    if rows < batch_size:
        raise ValueError(f"A batch of {batch_size} examples needs as many in `inputs`, got {rows}.")
    inputs, labels = inputs if own else inputs[None], labels if own_labels else labels[None]
    trained = {name: tensor.requires_grad_() for name, tensor in params.items() if not name.endswith(BUFFERS)}
    parts = _parts(config, K, at_once)
    views = [{name: t.detach()[part].requires_grad_(name in trained) for name, t in params.items()} for part in parts]
    optimizer = make_optimizer(list(trained.values()))
    scheduler = make_scheduler(optimizer) if make_scheduler is not None else None
    for _ in range(epochs):
        for batch in torch.randperm(rows, generator=generator)[: rows // batch_size * batch_size].split(batch_size):
            # the order within a batch is nothing to its loss
            read, target = (t if batch_size == rows else _taken(t, batch) for t in (inputs, labels))
            target = target.expand(K, -1)
            losses, grads = [], []
            for part, own_params in zip(parts, views, strict=True):
                own_running = {name: tensor for name, tensor in own_params.items() if name not in trained}
                logits = stacked_logits(config, own_params, read[part] if own else read, own_running)  # (k, b, C)
                logits = _masked(logits, num_classes, part)
                losses.append(F.cross_entropy(logits.mT, target[part], reduction="none").mean(1))
                grads.append(torch.autograd.grad(losses[-1].sum(), [own_params[name] for name in trained]))
            losses = torch.cat(losses).detach()  # (K,)
            for tensor, grad in zip(trained.values(), zip(*grads, strict=True), strict=True):
                # in the parameter's own layout in memory: torch's fused optimisers read a gradient as it lies there, and with
                # another layout they move the wrong weights without a word
                whole = torch.cat(grad) if len(grad) > 1 else grad[0]
                tensor.grad = torch.empty_like(tensor).copy_(whole) if whole.stride() != tensor.stride() else whole
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if on_step is not None:
                on_step(losses)
        yield {name: tensor.detach() for name, tensor in params.items()}


@torch.no_grad()
def predict_networks(
    config: TargetConfig,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    chunk: int | None = None,
    at_once: int | None = None,
    num_classes: Tensor | None = None,
) -> Tensor:
    """
    Class predictions `(K, n)` of K networks for inputs `(n, *input_shape)`, or `(K, n, *input_shape)` with inputs for each.

    Args:
        chunk: Examples that are read together. Default: 128 images, 256 rows of features.
        at_once, num_classes: See [`train_networks`].
    """
    own, K = inputs.dim() > len(config.input_shape) + 1, len(params["head.weight"])
    chunk = chunk or (128 if len(config.input_shape) > 1 else 256)
    predictions = []
    for examples in (inputs if own else inputs[None]).split(chunk, 1):
        columns, patches = [], [] if own else cut_patches(config, examples)
        for part in _parts(config, K, at_once):
            logits = stacked_logits(
                config, {n: t[part] for n, t in params.items()}, examples[part] if own else examples, patches=patches
            )
            columns.append(_masked(logits, num_classes, part).max(-1).indices)  # `argmax` reads number by number
        predictions.append(torch.cat(columns))
    return torch.cat(predictions, 1)


def _taken(data: Tensor, batch: Tensor) -> Tensor:
    """`data[:, batch]` of `(K, N, ...)`: picked from all rows of all networks at once, which takes half as long."""
    places = len(data[0]) * torch.arange(len(data))[:, None] + batch  # (K, b)
    return data.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)


def _parts(config: TargetConfig, K: int, at_once: int | None) -> list[slice]:
    size = at_once or (32 if len(config.input_shape) > 1 else K)
    return [slice(start, start + size) for start in range(0, K, size)]


def _masked(logits: Tensor, num_classes: Tensor | None, part: slice) -> Tensor:
    """Logits `(k, b, C)` of the networks of a part, without the classes that a network does not have."""
    if num_classes is None:
        return logits
    beyond = torch.arange(logits.shape[2]) >= num_classes[part, None]  # (k, C)
    return logits.masked_fill(beyond[:, None], -torch.inf)


@torch.no_grad()
def predict_one_by_one(
    config: TargetConfig, state_dicts: Iterable[Mapping[str, Tensor]], inputs: Tensor, chunk: int = 250
) -> Tensor:
    """[`predict_networks`] of networks that fill a CPU alone, such as ResNets, for which it is several times as fast."""
    model = TargetModel(config).to(memory_format=torch.channels_last).eval()
    predictions = []
    for state_dict in state_dicts:
        model.load_state_dict(state_dict)
        parts = (part.contiguous(memory_format=torch.channels_last) for part in inputs.split(chunk))
        predictions.append(torch.cat([model(part).logits.argmax(-1) for part in parts]))
    return torch.stack(predictions)

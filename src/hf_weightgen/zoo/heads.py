"""A zoo of linear heads on frozen features: thousands of tasks, each some classes of a set, a group of them trained at once.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), section 4.1.1: "linear probing a classifier head on each of the
50,000 subsets".

Every group is a shard as soon as it is trained; the same call continues with what is missing.

Notation: K heads of a group, C classes, n examples of all classes together, F size of a feature.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from ..targets.architectures import TargetConfig
from ..targets.stacked import unstack
from .features import FeatureSet
from .folder import ZooFolder
from .networks import initial, predict_networks
from .recipe import check_same_config, seed_of, versions, write_config
from .schema import make_row


@dataclass(frozen=True)
class HeadZooConfig:
    """
    Args:
        tasks: Heads in all; the last tenth trains no generator.
        ways: Class counts, one per group in turn.
        group: Heads that are trained at once.
        examples, tests:
            Of each class, to train on and to measure. More examples make better heads, but generators that learn from
            them are no better, and training slows down once the Gram matrices of a group leave the cache.
        sets: Names of the sets, which are drawn by the square root of their class counts.
        steps: Of SGD, each on all examples.
        lr, momentum, weight_decay:
            Of SGD. Features have unit length and a bias is one more of length 1, so that the loss's curvature is at most 1 and
            steps are stable up to a learning rate of 2 (1 + `momentum`).
    """

    sets: tuple[str, ...]
    tasks: int = 4096
    ways: tuple[int, ...] = (5, 2, 5, 10)
    group: int = 256
    examples: int = 16
    tests: int = 20
    steps: int = 100
    lr: float = 3.0
    momentum: float = 0.9
    weight_decay: float = 1e-3
    seed: int = 0


@torch.no_grad()
def train_heads(
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    *,
    steps: int,
    make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
) -> dict[str, Tensor]:
    r"""
    Trains K linear heads at once by cross-entropy, each on all examples of its own in every step.

    Gradients of a head's weights are weighted sums of its examples X `(n, F)`, so that the weights stay $W_t = c_t W_0 + A_t X$
    with A `(C, n)` and a number c, and what SGD does to them, with momentum and decay too, it does alike to A and c. These
    are trained in the place of W: a step multiplies once by the examples' Gram matrix `(n, n)`, where weights need two
    products with the examples themselves. The fewer examples, the larger the gain; for more examples than features use
    [`~zoo.networks.train_networks`].

    Args:
        params: Stacked `head.weight` `(K, C, F)` and `head.bias` `(K, C)`, see [`~zoo.networks.initial`]; they are left as they are.
        inputs (`torch.FloatTensor` of shape `(K, n, F)`).
        labels (`torch.LongTensor` of shape `(K, n)`).
        make_optimizer: Makes an [`~torch.optim.SGD`] of what stands for weights and biases.
        make_scheduler: Makes its schedule, which moves after each step.

    Returns:
        `dict[str, torch.Tensor]`: As `params`; equal to those of K single trainings within float tolerance, if these are stable.

    Raises:
        ValueError: If shapes do not fit, or the optimiser is another: those that scale every weight on its own leave the span.
    """
    start, n = params["head.weight"], inputs.shape[1]
    if inputs.shape != (len(start), n, start.shape[2]) or labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"Heads {tuple(start.shape)} need inputs (K, n, F) and labels (K, n), got {tuple(inputs.shape)} and {tuple(labels.shape)}."
        )
    # in one layout with its gradient: torch's fused optimisers read both as they lie in memory
    bias = params["head.bias"].clone(memory_format=torch.contiguous_format).requires_grad_()
    gram, at_start = inputs @ inputs.mT, start @ inputs.mT  # (K, n, n), (K, C, n)
    coordinates = F.pad(torch.zeros_like(at_start), (0, 1), value=1.0).requires_grad_()  # (K, C, n + 1): A, then c
    optimizer = make_optimizer([coordinates, bias])
    if type(optimizer) is not SGD:
        raise ValueError(
            f"Heads are trained as sums of their examples, which needs `torch.optim.SGD`, got {type(optimizer).__name__}; "
            "`train_networks` takes any optimiser."
        )
    scheduler = make_scheduler(optimizer) if make_scheduler is not None else None
    truth = F.one_hot(labels, start.shape[1]).mT.to(inputs.dtype).contiguous()  # (K, C, n)
    coordinates.grad = torch.zeros_like(coordinates)
    weights, scale, grad = coordinates[..., :n], coordinates[..., n:], coordinates.grad[..., :n]
    for _ in range(steps):
        logits = torch.baddbmm(bias[..., None], weights, gram).addcmul_(scale, at_start)  # (K, C, n)
        torch.sub(logits.softmax(1), truth, out=grad).div_(n)
        coordinates.grad[..., n:] = 0  # some optimisers write there
        bias.grad = grad.sum(2)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {"head.weight": torch.baddbmm(scale * start, weights, inputs), "head.bias": bias.detach()}


def build_head_zoo(
    sets: Mapping[str, FeatureSet], folder: str | Path, config: HeadZooConfig | None = None, progress: bool = True
) -> ZooFolder:
    """
    Trains what is missing of a zoo in `folder`.

    Raises:
        ValueError: If the folder holds a zoo of another configuration or of other features, or no set has as many classes as `ways` asks for.
    """
    folder, config = ZooFolder(folder), config or HeadZooConfig(tuple(sets))
    settings = json.loads(json.dumps(asdict(config)))  # lists in the place of tuples, as a file tells them
    settings["contents"] = {name: _digest(sets[name]) for name in config.sets}
    check_same_config(folder.path, settings)
    write_config(folder.path, settings)
    done, starts = folder.finished(), range(0, config.tasks, config.group)
    for number, start in enumerate(tqdm(starts, desc="head zoo", unit="group", disable=not progress)):
        if f"head-{start}" not in done:
            count = min(config.group, config.tasks - start)
            folder.add(
                f"heads-{start:06d}", _train(sets, config, config.ways[number % len(config.ways)], start, count)
            )
    return folder


def _digest(one: FeatureSet) -> str:
    told = json.dumps(one.classes).encode() + one.counts.numpy().tobytes() + one.features.numpy().tobytes()
    return hashlib.blake2b(told, digest_size=16).hexdigest()


def _train(sets: Mapping[str, FeatureSet], config: HeadZooConfig, ways: int, start: int, count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed_of(config.seed, "heads", start))
    usable = [name for name in config.sets if len(sets[name]) >= ways]
    if not usable:
        raise ValueError(f"No set has {ways} classes; `ways` of a zoo must fit one of its sets.")
    odds = torch.tensor([len(sets[name]) for name in usable]).sqrt()
    chosen = [usable[i] for i in torch.multinomial(odds, count, replacement=True, generator=generator).tolist()]
    classes = [torch.randperm(len(sets[name]), generator=generator)[:ways] for name in chosen]
    drawn = [_examples(sets[n], c, config, generator) for n, c in zip(chosen, classes, strict=True)]
    inputs, tests = (torch.stack(part) for part in zip(*drawn, strict=True))  # (K, C, examples or tests, F)
    target = TargetConfig(input_shape=[inputs.shape[-1]], layers=[], num_classes=ways)
    labels = torch.arange(ways).repeat_interleave(config.examples).expand(count, -1)
    trained = train_heads(
        initial(target, [seed_of(config.seed, start + k) for k in range(count)]),
        inputs.flatten(1, 2),
        labels,
        lambda tensors: SGD(tensors, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay),
        steps=config.steps,
    )
    truth = torch.arange(ways).repeat_interleave(config.tests)
    scores = (predict_networks(target, trained, tests.flatten(1, 2)) == truth).double().mean(1).tolist()
    rows = []
    for k, (name, own) in enumerate(zip(chosen, classes, strict=True)):
        names = [sets[name].classes[c] for c in own.tolist()]
        rows.append(
            make_row(
                unstack(trained, k),
                id=f"head-{start + k}",
                task=name,
                family=name,
                split="held_out" if start + k >= config.tasks * 0.9 else "train",
                text=f"{name}: {', '.join(names)}",
                labels=names,
                seed=start + k,
                checkpoint=0,
                epoch=config.steps,
                arch={"name": "head", "input_shape": target.input_shape},
                metrics={"validation": scores[k]},
                provenance={"hyper_parameters": asdict(config) | {"optimizer": "SGD"}, "versions": versions()},
            )
        )
    return rows


def _examples(
    features: FeatureSet, classes: Tensor, config: HeadZooConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features to train on and to measure, of some classes; of small classes some come twice, but none on both sides."""
    parts = ([], [])
    for c in classes.tolist():
        order = torch.randperm(int(features.counts[c]), generator=generator)
        tests = max(1, min(config.tests, len(order) // 4))
        for part, rows, wanted in zip(
            parts, (order[tests:], order[:tests]), (config.examples, config.tests), strict=True
        ):
            part.append(features.features[c, rows[torch.arange(wanted) % len(rows)]])
    return torch.stack(parts[0]), torch.stack(parts[1])

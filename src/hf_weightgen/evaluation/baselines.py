"""Weights without a generator: what every generated network stands beside.

All functions take and return state dicts and draw from a `torch.Generator`. Tensors that are not floating-point are
taken over from a member as they are. Average, Gaussian and noise depend on the gauge of the members, so that members
should come through [`~evaluation.novelty.fix_gauge`] first.

Notation used for shapes:
    - n: networks to make; C: classes
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..targets.functional import BIAS, WEIGHT


StateDict = Mapping[str, Tensor]

# Standard deviation of a fresh classification head, as in BERT (https://huggingface.co/papers/1810.04805).
HEAD_STD = 0.02


def random_init(template: StateDict, n: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """
    n untrained networks with the shapes of `template`, initialised as PEFT and BERT do: `lora_A` uniform within
    1/√inputs, `lora_B` zero, other matrices normal with std 0.02, vectors zero.
    """

    def draw(name: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return like.clone()
        if name.endswith("lora_A.weight"):
            values = (2 * torch.rand(like.shape, generator=generator) - 1) / like.shape[-1] ** 0.5
        elif name.endswith("lora_B.weight") or like.ndim < 2:
            values = torch.zeros(like.shape)
        else:
            values = HEAD_STD * torch.randn(like.shape, generator=generator)
        return values.to(like.dtype)

    return [{name: draw(name, tensor) for name, tensor in template.items()} for _ in range(n)]


def average(members: Sequence[StateDict]) -> dict[str, Tensor]:
    """The mean of all members, tensor by tensor."""
    return {name: _mean(members, name) for name in members[0]}


def gaussian(members: Sequence[StateDict], n: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """n draws from independent normal distributions with the mean and std that each scalar has over the members."""
    mean = average(members)
    std = {
        name: torch.stack([member[name].double() for member in members]).std(0, correction=int(len(members) > 1))
        for name, tensor in mean.items()
        if tensor.is_floating_point()
    }
    return [
        {name: value + _noise(value, std[name], generator) if name in std else value for name, value in mean.items()}
        for _ in range(n)
    ]


def noisy(members: Sequence[StateDict], scale: float, n: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """n random members, each with normal noise of `scale` times the std of each of its tensors."""
    drawn = choose(members, n, generator)
    return [_add(member, _direction(member, generator), scale) for member in drawn]


def noisy_at_distance(
    members: Sequence[StateDict],
    distance: float,
    n: int,
    generator: torch.Generator,
    measure: Callable[[Sequence[StateDict]], Tensor],
    tolerance: float = 0.01,
    steps: int = 30,
) -> list[dict[str, Tensor]]:
    """
    n random members, each with normal noise in proportion to the std of each tensor, so strong that the network is
    as far from the zoo as asked. This is what novelty costs without a generator.

    Args:
        members (sequence of state dicts): Training members.
        distance (`float`): In the unit of `measure`.
        measure (`Callable`): State dicts -> distance of each to its nearest member, of shape `(n,)`.
        tolerance (`float`): Relative error of the distance at which the search stops.
        steps (`int`): Steps of the search at most. Where singular values cross, a gauge jumps, and with it the
            distance: the nearest distance that was met is then taken.

    Raises:
        ValueError: If the distance is negative or not finite.
        RuntimeError: If the median of the distances misses the one asked for by more than 5 %.
    """
    if not 0 <= distance < torch.inf:
        raise ValueError(f"Expected a finite distance of at least 0, got {distance}.")
    drawn = choose(members, n, generator)
    directions = [_direction(member, generator) for member in drawn]
    if distance == 0:
        return [dict(member) for member in drawn]
    lengths = [sum(noise.double().square().sum() for noise in d.values()).sqrt().item() for d in directions]
    scales = torch.tensor([distance / length for length in lengths], dtype=torch.float64)
    best, error = scales.clone(), torch.full((n,), torch.inf, dtype=torch.float64)
    reached = error.clone()
    for _ in range(steps):
        made = [_add(*parts, scale) for *parts, scale in zip(drawn, directions, scales.tolist(), strict=True)]
        measured = measure(made).double()
        ratio = distance / measured
        closer = ratio.log().abs() < error
        best, reached = torch.where(closer, scales, best), torch.where(closer, measured, reached)
        error = torch.where(closer, ratio.log().abs(), error)
        if (error <= tolerance).all():
            break
        # In a gauge the distance grows with the noise or with its square: the square root converges for both.
        scales = scales * ratio.clamp(0.01, 100).sqrt()
    if not abs(reached.quantile(0.5).item() - distance) <= 0.05 * distance:
        raise RuntimeError(
            f"No noise brings members to the distance {distance:.4g} within {steps} steps; the nearest ones are at "
            f"{[round(value, 4) for value in reached.tolist()]}."
        )
    return [_add(*parts, scale) for *parts, scale in zip(drawn, directions, best.tolist(), strict=True)]


def kde(
    members: Sequence[StateDict], n: int, generator: torch.Generator, bandwidth: float = 0.2
) -> list[dict[str, Tensor]]:
    """
    n draws of a kernel density estimate over the principal components of the members, each scaled to unit std: a random
    member's, plus normal noise with a std of `bandwidth` (as SANE samples its latents, https://huggingface.co/papers/2406.09997).
    """
    components = _Components(members)
    drawn = choose(range(len(members)), n, generator)
    noise = torch.randn(n, components.coordinates.shape[1], generator=generator, dtype=torch.float64)
    return components.state_dicts(components.coordinates[drawn] + bandwidth * noise)


def pca_flow(
    members: Sequence[StateDict], n: int, generator: torch.Generator, steps: int = 3000, hidden: int = 512
) -> list[dict[str, Tensor]]:
    """
    n draws of a flow-matching MLP over the principal components of the members: DeepWeightFlow
    (https://huggingface.co/papers/2601.05052), the plainest generator that there is. Batches of 8, AdamW, 100 steps of Euler.
    """
    components = _Components(members, alike=False)
    data = components.coordinates.float()
    size = data.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        widths = [size + 1, hidden, hidden // 2, hidden, size]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.GELU())][:-1]
        field = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(field.parameters(), lr=5e-4)
    for _ in range(steps):
        clean = data[torch.randint(len(data), (8,), generator=generator)]
        noise, sigma = torch.randn(8, size, generator=generator), torch.rand(8, 1, generator=generator)
        found = field(torch.cat([clean + sigma * (noise - clean), sigma], 1))
        loss = F.mse_loss(found, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(100)
    x = torch.randn(n, size, generator=generator)
    with torch.no_grad():
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
            x = scheduler.step(field(torch.cat([x, sigma.expand(n, 1)], 1)), t, x).prev_sample
    return components.state_dicts(x.double())


class _Components:
    """
    Principal components of members, and their coordinates `(members, components)` in unit std: each of its own if `alike`, or
    one for all, so that directions in which members differ much stay the large ones.
    """

    def __init__(self, members: Sequence[StateDict], alike: bool = True):
        self.like, flat = members[0], vectors(members)
        self.mean = flat.mean(0)
        left, values, self.directions = torch.linalg.svd(flat - self.mean, full_matrices=False)
        kept = values > 1e-9 * values.max()
        self.directions, coordinates = self.directions[kept], (left * values)[:, kept]
        self.std = coordinates.std(0) if alike else coordinates.std().expand(coordinates.shape[1])
        self.coordinates = coordinates / self.std

    def state_dicts(self, coordinates: Tensor) -> list[dict[str, Tensor]]:
        return from_vectors(self.mean + (coordinates * self.std) @ self.directions, self.like)


def vectors(members: Sequence[StateDict]) -> Tensor:
    """All floating-point scalars of each member in the order of its tensors: `torch.DoubleTensor` of shape `(members, D)`."""
    return torch.stack(
        [torch.cat([t.double().flatten() for t in member.values() if t.is_floating_point()]) for member in members]
    )


def from_vectors(flat: Tensor, like: StateDict) -> list[dict[str, Tensor]]:
    """Inverse of [`vectors`]; names, shapes, types and what is not floating-point are those of `like`."""
    made, start = [dict(like) for _ in flat], 0
    for name, tensor in like.items():
        if tensor.is_floating_point():
            values = flat[:, start : start + tensor.numel()]
            for state_dict, value in zip(made, values, strict=True):
                state_dict[name] = value.view_as(tensor).to(tensor.dtype)
            start += tensor.numel()
    return made


def choose(members: Sequence[StateDict], n: int, generator: torch.Generator) -> list[StateDict]:
    """n random members; every member comes once before one comes again."""
    if n == 0:
        return []
    order = torch.cat([torch.randperm(len(members), generator=generator) for _ in range(-(-n // len(members)))])
    return [members[i] for i in order[:n].tolist()]


def nearest_tasks(encoder, prompts: Sequence[str], known_tasks: Sequence[Mapping]) -> list[Mapping]:
    """
    For each prompt the known task that has the nearest prompt, by cosine.

    Args:
        encoder: With `embed(list[str])`, which returns normalised embeddings of shape `(len, E)`.
        prompts (`Sequence[str]`): What was asked for.
        known_tasks (sequence of mappings): Each with `name` and either `prompt_embeds` of shape `(P, E)` or `prompts`.
    """
    if not known_tasks:
        raise ValueError("There is no known task to compare prompts with; give at least one in `known_tasks`.")
    queries = encoder.embed(list(prompts))  # (Q, E)
    similarities = []
    for task in known_tasks:
        embeds = task.get("prompt_embeds")
        if embeds is None:
            if not task.get("prompts"):
                raise ValueError(f"Known task {task['name']!r} has neither `prompt_embeds` nor `prompts`; give one.")
            embeds = encoder.embed(list(task["prompts"]))
        embeds = F.normalize(torch.as_tensor(embeds).to(queries), dim=-1)  # (P, E)
        similarities.append((queries @ embeds.T).max(1).values)
    return [known_tasks[i] for i in torch.stack(similarities).argmax(0).tolist()]


def transfer_head(
    state_dict: StateDict, source_labels: Sequence[str], target_labels: Sequence[str], encoder
) -> dict[str, Tensor]:
    """
    A member of another task as a classifier for `target_labels`: each class gets the head row of the member's class
    with the nearest name, by cosine. Where the member has enough classes no two get the same row, as equal rows could
    not tell their classes apart.
    """
    if len(state_dict[WEIGHT]) != len(source_labels):
        raise ValueError(f"Expected one label per head row, {len(state_dict[WEIGHT])}, got {list(source_labels)[:8]}.")
    if list(source_labels) == list(target_labels):
        return dict(state_dict)
    similarity = encoder.embed(list(target_labels)) @ encoder.embed(list(source_labels)).T  # (C target, C source)
    if len(target_labels) <= len(source_labels):
        rows = torch.as_tensor(linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1])
    else:
        rows = similarity.argmax(1).cpu()
    return {**state_dict, WEIGHT: state_dict[WEIGHT][rows], BIAS: state_dict[BIAS][rows]}


def _mean(members: Sequence[StateDict], name: str) -> Tensor:
    first = members[0][name]
    if not first.is_floating_point():
        return first.clone()
    return torch.stack([member[name].double() for member in members]).mean(0).to(first.dtype)


def _direction(member: StateDict, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal noise with the std of each tensor; a tensor of one scalar, which has none, gets no noise."""
    return {
        name: _noise(tensor, tensor.double().std() if tensor.numel() > 1 else torch.tensor(0.0), generator)
        for name, tensor in member.items()
        if tensor.is_floating_point()
    }


def _noise(like: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    return (std * torch.randn(like.shape, generator=generator, dtype=torch.float64)).to(like.dtype)


def _add(member: StateDict, direction: StateDict, scale: float) -> dict[str, Tensor]:
    return {name: tensor + scale * direction[name] if name in direction else tensor for name, tensor in member.items()}

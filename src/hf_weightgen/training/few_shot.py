"""Training of generators of linear heads from a few examples of each class, on frozen features.

References: D2NWG (https://huggingface.co/papers/2402.18153), sections 3.2 to 3.4 and 4.1.1. Ours: a class is shown to the
generator as the row that ridge regression in a learned metric gives it (R2-D2, https://huggingface.co/papers/1805.08136), and
decoded heads are trained on further examples of their classes, also where their latents come from the prior.

Notation: b heads of a batch; C classes, padded; n examples and q queries of a class; F size of a feature; S = F + 1.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from ..models.modeling_dataset_encoder import DatasetEncoder, Ridge
from ..models.modeling_weight_vae import WeightVAE, centred
from ..targets.architectures import HEAD
from ..weights.tokenization import WeightTokenizer
from ..zoo.features import FeatureSet, draw_task
from ..zoo.schema import zoo_state_dicts
from .batches import StepRandom
from .d2nwg import fit_latent_scale
from .objectives import PROMPT_DROPOUT, noised


POWERS, STRENGTHS, NAME_WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (-3.0, -2.0, -1.0, 0.0), (0.5, 1.0, 2.0, 4.0)
TRIALS = 60  # tasks of a set and number of shots
MOST_SHOTS, QUERIES = 5, 8
SPECIFIC = 300.0  # weight of what the decoder adds to ridge regression: else it learns the zoo's classes by heart


def within_class_covariance(sets: Sequence[FeatureSet]) -> Tensor:
    """`(F, F)`, a mean over sets of the covariance of features around their class's mean."""
    total = 0
    for features in sets:
        real = torch.arange(features.features.shape[1]) < features.counts[:, None]  # (C, pool)
        means = features.features.sum(1) / features.counts[:, None]
        off = (features.features - means[:, None])[real]
        total = total + off.mT @ off / (len(off) - len(features))
    return total / len(sets)


def whitening(covariance: Tensor, power: float) -> Tensor:
    """The symmetric `(covariance / its mean eigenvalue + 1) ** (-power / 2)`: 0 leaves features as they are, 1 is near LDA's."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * (values.clamp(min=0) / values.mean() + 1) ** (-power / 2) @ vectors.mT


@torch.no_grad()
def fit_ridge(
    ridge: Ridge, sets: Mapping[str, FeatureSet], names: Mapping[str, Tensor] | None = None, seed: int = 0
) -> dict:
    """
    Chooses metric, strength and weight of the names that are best on each set in the metric of the *other* sets, then takes
    the metric of all.

    Args:
        names: Per set `(C, F)`: its class names as the encoder of the features reads them.

    Returns:
        `dict`: what was chosen, and the `accuracy` (0 to 1) that it has in that trial with 1 and with [`MOST_SHOTS`] examples.
    """
    tasks, covariances = {}, {name: within_class_covariance([one]) for name, one in sets.items()}
    for name, features in sets.items():
        generator = torch.Generator().manual_seed(seed)
        ways = min(5, len(features))
        tasks[name] = [
            [draw_task(features, ways, shots, QUERIES, generator) for _ in range(TRIALS)] for shots in (1, MOST_SHOTS)
        ]
    ridge.centre.copy_(torch.stack([one.features.sum(1).sum(0) / one.counts.sum() for one in sets.values()]).mean(0))
    known = {n: {label: names[n][c] for c, label in enumerate(sets[n].classes)} for n in sets} if names else {}

    def metric(power: float, without: str | None = None) -> Tensor:
        others = [c for name, c in covariances.items() if name != without] or list(covariances.values())
        return whitening(torch.stack(others).mean(0), power)

    def trial(metrics: Mapping[str, Tensor], of_shots: int) -> float:
        scores = []
        for name, groups in tasks.items():
            ridge.metric.copy_(metrics[name])
            group = groups[of_shots]
            support, shown = torch.stack([task.support for task in group]), None
            if names:
                shown = torch.stack([torch.stack([known[name][c] for c in task.classes]) for task in group])
            rows = ridge(support, torch.ones(support.shape[:3], dtype=torch.bool), shown)
            said = head_logits(rows, torch.stack([task.queries for task in group])).argmax(-1)
            scores.append((said == torch.arange(said.shape[1])[:, None]).double().mean())
        # geometric mean of errors (and a hundredth, for sets without any): hopeless sets would drown the others in a plain mean
        return 1 - (1.01 - torch.stack(scores)).log().mean().exp().item()

    found: dict[float, list[tuple]] = {}
    for power in POWERS:
        metrics, found[power] = {name: metric(power, without=name) for name in sets}, []
        for of_shots in (0, 1):
            results = []
            for strength, weight in itertools.product(STRENGTHS, NAME_WEIGHTS if names else (1.0,)):
                ridge.log_strength.copy_(torch.tensor([strength, 0.0]))
                ridge.log_name_weight.copy_(torch.tensor([math.log(weight), 0.0]))
                results.append((trial(metrics, of_shots), strength, math.log(weight)))
            found[power].append(max(results))
    power = max(found, key=lambda power: sum(best[0] for best in found[power]))
    (one, *few), (five, *more) = found[power]
    for parameter, first, last in zip((ridge.log_strength, ridge.log_name_weight), few, more, strict=True):
        parameter.copy_(torch.tensor([first, (last - first) / math.log(MOST_SHOTS)]))
    ridge.metric.copy_(metric(power))
    strength, name_weight = (parameter.tolist() for parameter in (ridge.log_strength, ridge.log_name_weight))
    return {"power": power, "log_strength": strength, "log_name_weight": name_weight, "accuracy": [one, five]}


def head_logits(rows: Tensor, queries: Tensor) -> Tensor:
    """Of rows with weight and bias `(b, C, S)` for queries `(b, D, q, F)`: `(b, D, q, C)`."""
    return torch.einsum("bdqf,bcf->bdqc", queries, rows[..., :-1]) + rows[:, None, None, :, -1]


@dataclass
class HeadTensors:
    """
    A zoo of heads ready for training.

    Args:
        weight_tokens: `(R, C, S)`, standardised, the class mean removed.
        class_mask: `(R, C)`, `True` on real classes.
        rows_of: `(R, C)`, the place of each class among the classes of all sets.
        features, counts: `(G, pool, F)` and `(G,)`, the examples of all classes of all sets.
        names: `(G, F)`, embeddings of the class names where the generator reads them.
        offset, scale: `(S,)`: a token is `(row - offset) / scale`.
    """

    weight_tokens: Tensor
    class_mask: Tensor
    rows_of: Tensor
    features: Tensor
    counts: Tensor
    names: Tensor | None
    offset: Tensor
    scale: Tensor

    @classmethod
    def of(
        cls,
        zoo: Dataset,
        tokenizer: WeightTokenizer,
        sets: Mapping[str, FeatureSet],
        split: str,
        names: Mapping[str, Tensor] | None = None,
    ) -> "HeadTensors":
        """The rows of one split; `names` as in [`fit_ridge`]."""
        where = [i for i, part in enumerate(zoo["split"]) if part == split]
        encoded = tokenizer(list(zoo_state_dicts(zoo, where)))
        mask = torch.arange(encoded["weight_tokens"].shape[1]) < encoded["num_classes"][:, None]
        pool, first, place = max(one.features.shape[1] for one in sets.values()), 0, {}
        for name, one in sets.items():
            place |= {(name, label): first + c for c, label in enumerate(one.classes)}
            first += len(one)
        labels, tasks = zoo["labels"], zoo["task"]
        rows_of = torch.zeros(mask.shape, dtype=torch.long)
        for k, i in enumerate(where):
            rows_of[k, : len(labels[i])] = torch.tensor([place[tasks[i], label] for label in labels[i]])
        stats = {entry["name"]: entry for entry in tokenizer.to_dict()["layouts"][0]}
        size = encoded["weight_tokens"].shape[-1] - 1

        def each(what: str) -> Tensor:
            weight, bias = (torch.tensor(stats[name][what]) for name in HEAD)
            return torch.cat([weight.expand(size), bias[None]])

        return cls(
            centred(encoded["weight_tokens"], mask) * mask[..., None],
            mask,
            rows_of,
            torch.cat([F.pad(one.features, (0, 0, 0, pool - one.features.shape[1])) for one in sets.values()]),
            torch.cat([one.counts for one in sets.values()]),
            None if names is None else torch.cat([names[name] for name in sets]),
            each("mean"),
            each("std"),
        )

    def __len__(self) -> int:
        return len(self.weight_tokens)

    def draw(self, rows: Tensor, shots: int, random: StepRandom, purpose: int = 30) -> tuple[Tensor, Tensor]:
        """Different examples `(b, C, shots, F)` and queries `(b, C, QUERIES, F)` of the classes of some rows."""
        own = self.rows_of[rows]  # (b, C)
        pool = self.features.shape[1]
        order = random.uniform(own.shape[1], pool, purpose=purpose) + (
            torch.arange(pool) >= self.counts[own][..., None]
        )
        picked = order.argsort(-1)[..., : shots + QUERIES]
        found = self.features[own[..., None], picked]
        return found[:, :, :shots], found[:, :, shots:]


class HeadGenerator(nn.Module):
    """What learns together: autoencoder and dataset encoder."""

    def __init__(self, vae: WeightVAE, encoder: DatasetEncoder):
        super().__init__()
        self.vae, self.encoder = vae, encoder
        for frozen in (*encoder.ridge.parameters(), *vae.name_projection.parameters()):
            frozen.requires_grad_(False)  # found on other sets: trained on the zoo's classes they would fit those

    def forward(self, zoo: HeadTensors, random: StepRandom) -> Tensor:
        rows = random.integers(len(zoo), purpose=11)
        shots = 1 + int(random.shared_integers(MOST_SHOTS, 1, purpose=31))
        support, queries = zoo.draw(rows, shots, random)
        mask, tokens = zoo.class_mask[rows], zoo.weight_tokens[rows]
        names = None if zoo.names is None else zoo.names[zoo.rows_of[rows]]
        of_dataset, of_classes = self.encoder.encode(support, mask[..., None].expand(support.shape[:3]), names)
        size = self.vae.latent_mean.shape[0]
        output = self.vae(
            weight_tokens=tokens,
            padding_mask=mask[..., None].expand_as(tokens),
            class_embeds=of_classes,
            class_mask=mask,
            noise=random.normal(size, purpose=4),
        )
        made = self.vae.decode(random.normal(size, purpose=5), of_classes)
        logits = head_logits(made * zoo.scale, queries)  # (b, C, q, C): the offset is shared by all classes
        logits = logits.masked_fill(~mask[:, None, None], -1e4)
        truth = torch.arange(mask.shape[1]).expand(logits.shape[:1] + (mask.shape[1],))
        loss = F.cross_entropy(
            logits.movedim(-1, 1), truth[..., None].expand(logits.shape[:3]), reduction="none"
        )  # (b, C, q)
        task_loss = (loss.mean(-1) * mask).sum(1) / mask.sum(1)
        of_latents = self.encoder.latent_embeds(output.latents.detach())
        aligned = self.encoder.align(of_dataset, of_latents, torch.arange(len(rows)))
        specific = made - self.vae.name_projection(of_classes)
        return output.loss + task_loss.mean() + 0.1 * aligned + SPECIFIC * (specific.square().mean(-1) * mask).mean()


@dataclass
class HeadLatents:
    """Posterior means and log stds `(R, channels, height, width)` in unit scale, and an embedding `(R, S)` of each dataset."""

    means: Tensor
    log_stds: Tensor
    of_dataset: Tensor


@torch.no_grad()
def scaled_head_latents(vae: WeightVAE, encoder: DatasetEncoder, zoo: HeadTensors, seed: int = 0) -> HeadLatents:
    """What the denoiser learns, each head beside one draw of its dataset; sets the scale of the latents."""
    means, log_stds, of_dataset = [], [], []
    for number, rows in enumerate(torch.arange(len(zoo)).split(256)):
        random = StepRandom(seed, number, len(rows), slice(None))
        support, _ = zoo.draw(rows, MOST_SHOTS, random)
        mask = zoo.class_mask[rows]
        names = None if zoo.names is None else zoo.names[zoo.rows_of[rows]]
        embeds, of_classes = encoder.encode(support, mask[..., None].expand(support.shape[:3]), names)
        mean, log_variance = vae.encode(zoo.weight_tokens[rows], of_classes, mask)
        means.append(mean)
        log_stds.append(0.5 * log_variance)
        of_dataset.append(embeds)
    means, log_stds = torch.cat(means), torch.cat(log_stds)
    fit_latent_scale(vae, means, log_stds)
    shape = tuple(vae.config.latent_shape)
    scaled, spread = vae.scale(means).unflatten(1, shape), (log_stds - vae.latent_std.log()).unflatten(1, shape)
    return HeadLatents(scaled, spread, torch.cat(of_dataset))


def latent_loss(denoiser: nn.Module, scheduler, draws: HeadLatents, random: StepRandom) -> Tensor:
    """Eq. 5, conditioned on the dataset; a tenth of the batch without."""
    rows = random.integers(len(draws.means), purpose=11)
    shape = draws.means.shape[1:]
    clean = draws.means[rows] + draws.log_stds[rows].exp() * random.normal(*shape, purpose=12)
    noise = random.normal(*shape, purpose=13)
    noisy, timesteps, target = noised(scheduler, clean, noise, random.uniform(purpose=14))
    condition = draws.of_dataset[rows] * (random.uniform(1, purpose=15) >= PROMPT_DROPOUT)
    return F.mse_loss(denoiser(noisy, timesteps, class_labels=condition).sample, target)


@torch.no_grad()
def start_from_ridge(vae: WeightVAE, encoder: DatasetEncoder, zoo: HeadTensors, seed: int = 0) -> float:
    """Lets the decoder begin with the rows that the encoder hands it, as long as those of the zoo are; returns the factor."""
    rows = torch.arange(min(256, len(zoo)))
    support, _ = zoo.draw(rows, MOST_SHOTS, StepRandom(seed, 0, len(rows), slice(None)))
    mask = zoo.class_mask[rows]
    names = None if zoo.names is None else zoo.names[zoo.rows_of[rows]]
    found = encoder.ridge(support, mask[..., None].expand(support.shape[:3]), names)
    made = centred(found, mask) / zoo.scale * mask[..., None]
    factor = ((made * zoo.weight_tokens[rows]).sum() / made.square().sum()).item()
    vae.name_projection.weight.copy_(torch.diag(factor / zoo.scale))
    vae.name_out[-1].weight.mul_(0.1)
    return factor

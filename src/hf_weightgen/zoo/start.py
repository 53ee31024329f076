"""The start that all members of a zoo share, its *base* row (as T2W's `base.pt`).

It is trained over all tasks together, and its head is no matrix of classes but a projection of class names, so that it
classifies any list of names at first sight. It keeps the members of the zoo in one basin, where they can be averaged and
generated.

    f(x) pooled [CLS] features, e(.) sentence embedding of the frozen encoder, W and b the name projection
    g(x) = W' f(x) + b                          an estimate of e(x) that the LoRA may change
    logits_c = LOGIT_SCALE * <g(x), e(name_c)>  hence row_c = LOGIT_SCALE * W e(name_c), bias_c = LOGIT_SCALE * <b, e(name_c)>
    loss = cross-entropy + DISTILLATION * |g(x) - e(x)|^2
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from ..targets.functional import BIAS, WEIGHT, AdapterTarget
from .recipe import DISTILLATION, LOGIT_SCALE, ZooConfig, arch_of, provenance_of, seed_of
from .schema import make_row
from .tasks import VALIDATION_LIMIT, TaskData, evaluation_subset


BASE = "base"  # id, task, family and split of the row
NAME_PROJECTION = "name_projection"


def train_base(
    target: AdapterTarget, tokenizer, encoder, data: Mapping[str, TaskData], config: ZooConfig, progress: bool
) -> dict[str, Tensor]:
    """The LoRA tensors and the name projection."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, BASE))
    torch.manual_seed(seed_of(config.seed, BASE, "dropout"))
    params = {}
    for name, inner in target.names.items():
        shape = target.shapes()[name]
        bound = 1 / math.sqrt(shape[1])  # PEFT's initialisation: Kaiming uniform with a = sqrt(5) for A, zeros for B
        params[inner] = (
            torch.empty(1, *shape).uniform_(-bound, bound, generator=generator)
            if "lora_A" in name
            else torch.zeros(1, *shape)
        )
    tasks = []
    for task in tqdm(data.values(), desc="reading", unit="task", disable=not progress):
        subset = evaluation_subset(task.train, config.base_pool)
        texts = (
            subset["text"]
            if "text_pair" not in subset.column_names
            else [f"{a} {b}" for a, b in zip(subset["text"], subset["text_pair"], strict=True)]
        )
        embeddings = encoder.embed([text[:1000] for text in texts])  # (rows, E)
        tasks.append(
            (
                target.buckets(tokenizer, subset, config.max_length),
                embeddings,
                [encoder.embed(wording) for wording in task.spec.wordings],
                len(subset),
            )
        )

    target.eval()
    with torch.no_grad():  # W and b start as the ridge regression of e(x) on f(x)
        features = torch.cat([target.pooled(params, b.hidden, b.mask)[0] for buckets, *_ in tasks for b in buckets])
        wanted = torch.cat([embeddings[b.rows] for buckets, embeddings, *_ in tasks for b in buckets])
        features = F.pad(features, (0, 1), value=1.0).double()
        ridge = torch.linalg.solve(
            features.mT @ features + 10 * torch.eye(features.shape[1]), features.mT @ wanted.double()
        ).float()
    weight, bias = ridge[:-1].mT.contiguous().requires_grad_(), ridge[-1].clone().requires_grad_()  # (E, D), (E,)

    lora = [p.requires_grad_() for p in params.values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": config.base_lr},
            {"params": [weight, bias], "lr": config.base_projection_lr / LOGIT_SCALE},
        ],
        weight_decay=0.0,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup * config.base_steps), config.base_steps)
    odds = torch.tensor(
        [math.sqrt(rows * min(len(names[0]), 30)) for _, _, names, rows in tasks]
    )  # more for many classes
    target.train()
    for _ in tqdm(range(config.base_steps), desc="base adapter", unit="step", disable=not progress):
        buckets, embeddings, wordings, _ = tasks[torch.multinomial(odds, 1, generator=generator).item()]
        names = wordings[max(0, torch.randint(-len(wordings), len(wordings), (), generator=generator).item())]
        bucket = buckets[torch.randint(len(buckets), (), generator=generator)]
        index = torch.randint(len(bucket.rows), (config.base_batch_size,), generator=generator)
        pooled = F.dropout(target.pooled(params, bucket.hidden[index], bucket.mask[index])[0], 0.1)
        guess = pooled @ weight.mT + bias  # (b, E)
        distillation = (guess - embeddings[bucket.rows[index]]).square().sum(-1).mean()
        loss = F.cross_entropy(LOGIT_SCALE * guess @ names.mT, bucket.labels[index]) + DISTILLATION * distillation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {
        **target.unstack(params, 0),
        f"{NAME_PROJECTION}.weight": weight.detach(),
        f"{NAME_PROJECTION}.bias": bias.detach(),
    }


def base_row(target, tokenizer, encoder, data, config, progress) -> dict:
    """Trains the shared start; its metrics are means over all tasks."""
    state_dict = train_base(target, tokenizer, encoder, data, config, progress)
    target.eval()
    metrics = {}
    for name, task in data.items():
        buckets = target.buckets(tokenizer, evaluation_subset(task.validation, VALIDATION_LIMIT), config.max_length)
        member = state_dict | head_of_names(state_dict, encoder.embed(task.spec.labels))
        metrics[name] = target.accuracy([member], buckets).item()
    return make_row(
        state_dict,
        id=BASE,
        task=BASE,
        family=BASE,
        split=BASE,
        text="",
        labels=[],
        seed=config.seed,
        checkpoint=0,
        epoch=0.0,
        arch=arch_of(config),
        metrics={"validation": sum(metrics.values()) / len(metrics), "test": float("nan")},
        provenance={"tasks": metrics} | provenance_of(config, config.base_steps * config.base_batch_size),
    )


def name_projection(base: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The base row's head as a function of a class name's embedding e: `e @ weight` and `e @ bias`; `(E, D)` and `(E,)`."""
    return LOGIT_SCALE * base[f"{NAME_PROJECTION}.weight"], LOGIT_SCALE * base[f"{NAME_PROJECTION}.bias"]


def head_of_names(base: Mapping[str, Tensor], names: Tensor) -> dict[str, Tensor]:
    """The head that the base adapter gives to classes with the name embeddings `names` `(C, E)`: `(C, D)` and `(C,)`."""
    weight, bias = name_projection(base)
    return {WEIGHT: names @ weight, BIAS: names @ bias}

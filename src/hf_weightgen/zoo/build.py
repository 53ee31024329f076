"""Builds a zoo of LoRA adapters: seeds x late checkpoints x tasks, all seeds of a task trained at once.

All members start from one shared adapter, see [`zoo.start`], with its head for the task's class names, and are trained by
cross-entropy on their task.

Restart after a kill continues: each task's rows are written as one shard when they are done, and their randomness
depends on the task and the seeds only.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from ..targets.base_models import load_classifier, load_encoder, load_tokenizer
from ..targets.functional import BIAS, WEIGHT, AdapterTarget, Bucket
from ..targets.tasks import TaskSpec
from .folder import ZooFolder
from .recipe import (
    ZooConfig,
    arch_of,
    check_same_config,
    hyper_parameters,
    lora_config,
    provenance_of,
    seed_of,
    write_config,
)
from .schema import make_row, row_to_state_dict
from .start import BASE, base_row, head_of_names
from .tasks import TEST_LIMIT, VALIDATION_LIMIT, TaskData, evaluation_subset, load_tasks


def build_zoo(
    specs: Sequence[TaskSpec],
    folder: str | Path,
    config: ZooConfig | None = None,
    data_root: str | Path | None = None,
    base_only: Sequence[TaskSpec] = (),
    progress: bool = True,
) -> ZooFolder:
    """
    Trains what is missing of a zoo in `folder`; calling it again continues.

    Args:
        specs: Tasks with members in the zoo.
        folder: Where the Parquet shards are written.
        config: Default: [`ZooConfig`] as it is.
        data_root: Folder with datasets under their Hub ids, see [`~zoo.tasks.load_tasks`].
        base_only: Further tasks whose training split only the shared base adapter sees.

    Raises:
        ValueError: If the folder holds a zoo of another configuration, or a member has too few steps for its checkpoints.
    """
    folder, config = ZooFolder(folder), config or ZooConfig()
    for spec in specs:
        _checkpoint_steps(spec, config)
    check_same_config(folder.path, hyper_parameters(config))
    data = load_tasks([*specs, *base_only], data_root)
    write_config(folder.path, hyper_parameters(config))
    encoder, tokenizer = load_encoder(config.base_model), load_tokenizer(config.base_model)
    target = AdapterTarget(load_classifier(config.base_model, num_labels=2), lora_config())
    done = folder.finished()
    if BASE not in done:
        folder.add(BASE, [base_row(target, tokenizer, encoder, data, config, progress)])
    base = row_to_state_dict(folder.row(BASE))

    todo = [
        spec
        for spec in specs
        if not {_id(spec, s, c) for s in range(config.seeds) for c in range(len(config.checkpoints))} <= done
    ]
    total = sum(config.passes_of.get(spec.name, config.passes) for spec in todo) * config.seeds
    with tqdm(total=total, desc="zoo", unit="pass", disable=not progress, smoothing=0.05) as bar:
        for spec in todo:
            bar.set_postfix_str(spec.name)
            folder.add(spec.name, list(train_members(target, tokenizer, encoder, data[spec.name], base, config, bar)))
    return folder


def train_members(
    target: AdapterTarget, tokenizer, encoder, data: TaskData, base: Mapping[str, Tensor], config: ZooConfig, bar=None
) -> Iterator[dict]:
    """Trains all seeds of one task at once and yields their rows, `seeds * len(checkpoints)` of them."""
    spec, K = data.spec, config.seeds
    passes = config.passes_of.get(spec.name, config.passes)
    generator = torch.Generator().manual_seed(seed_of(config.seed, spec.name))
    torch.manual_seed(seed_of(config.seed, spec.name, "dropout"))  # vmap draws dropout masks from the global generator
    target.eval()  # the prefix is computed without dropout
    buckets = target.buckets(tokenizer, training_pool(data, config), config.max_length)
    names = encoder.embed(spec.labels)  # (C, E)
    head = head_of_names(base, names)
    params = {
        **{inner: base[name].expand(K, *base[name].shape).clone() for name, inner in target.names.items()},
        WEIGHT: head[WEIGHT].expand(K, -1, -1).clone(),
        BIAS: head[BIAS].expand(K, -1).clone(),
    }
    lora = [params[inner].requires_grad_() for inner in target.names.values()]
    save_at = _checkpoint_steps(spec, config)
    steps = passes // config.batch_size
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": config.lr},
            {"params": [params[WEIGHT].requires_grad_(), params[BIAS].requires_grad_()], "lr": config.head_lr},
        ],
        weight_decay=0.01,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, int(config.warmup * steps), steps)
    evaluation = [
        target.buckets(tokenizer, evaluation_subset(split, limit), config.max_length)
        for split, limit in ((data.validation, VALIDATION_LIMIT), (data.test, TEST_LIMIT))
    ]
    source = {
        "dataset": spec.dataset_id,
        "config": spec.config,
        "data_revision": data.data_revision,
        "removed_duplicates": data.removed_duplicates,
    }
    batches = _batches(buckets, config.batch_size, K, generator)
    for step in range(1, steps + 1):
        target.train()
        bucket, index = next(batches)  # index (K, b): every seed reads sentences of its own
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            pooled = target.pooled(
                {n: params[n] for n in target.names.values()}, bucket.hidden[index], bucket.mask[index]
            )
        pooled = F.dropout(pooled.float(), 0.1)
        logits = pooled @ params[WEIGHT].mT + params[BIAS][:, None]  # (K, b, C)
        loss = F.cross_entropy(logits.flatten(0, 1), bucket.labels[index].flatten(), reduction="sum") / index.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if bar is not None:
            bar.update(index.numel())
        if step in save_at:
            target.eval()
            members = [
                {
                    **target.unstack(params, k),
                    WEIGHT: params[WEIGHT][k].detach().clone(),
                    BIAS: params[BIAS][k].detach().clone(),
                }
                for k in range(K)
            ]
            last = step == max(save_at)  # the test split is read once per run
            accuracy = [
                target.accuracy(members, split).tolist() if last or i == 0 else [None] * K
                for i, split in enumerate(evaluation)
            ]
            for k, member in enumerate(members):
                yield make_row(
                    member,
                    id=_id(spec, k, save_at[step]),
                    task=spec.name,
                    family=spec.family,
                    split="held_out" if k == K - 1 else "train",
                    text=spec.prompts[0] if spec.prompts else spec.name,
                    labels=list(spec.labels),
                    seed=k,
                    checkpoint=save_at[step],
                    epoch=step * config.batch_size / len(data.train),
                    arch=arch_of(config),
                    metrics={"validation": accuracy[0][k], "test": accuracy[1][k]},
                    provenance=source | provenance_of(config, step * config.batch_size),
                )


def _checkpoint_steps(spec: TaskSpec, config: ZooConfig) -> dict[int, int]:
    """Step -> number of the checkpoint that is saved after it."""
    passes = config.passes_of.get(spec.name, config.passes)
    steps = {
        max(1, round(fraction * (passes // config.batch_size))): i for i, fraction in enumerate(config.checkpoints)
    }
    if passes < config.batch_size or len(steps) < len(config.checkpoints):
        raise ValueError(
            f"Task {spec.name!r}: {passes} passes are {passes // config.batch_size} steps of {config.batch_size} sentences, too few for "
            f"checkpoints at {list(config.checkpoints)} of them; raise `passes`, or lower `batch_size`."
        )
    return steps


def training_pool(data: TaskData, config: ZooConfig) -> Dataset:
    """The sentences of a task that its members may read."""
    limit = max(config.pool, config.passes_of.get(data.spec.name, config.passes))
    if data.spec.name not in config.longest_of:
        return evaluation_subset(data.train, limit)
    lengths = torch.tensor([len(text) for text in data.train["text"]])
    return data.train.select(lengths.argsort(descending=True, stable=True)[:limit].sort().values.tolist())


def _batches(
    buckets: Sequence[Bucket], batch_size: int, K: int, generator: torch.Generator
) -> Iterator[tuple[Bucket, Tensor]]:
    """Endless epochs: a bucket of similar lengths in random order, and for each of K seeds its own batch of it `(K, b)`."""
    while True:
        batches = []
        for number, bucket in enumerate(buckets):
            orders = torch.stack([torch.randperm(len(bucket.rows), generator=generator) for _ in range(K)])  # (K, n)
            batches += [
                (number, index) for index in orders.split(batch_size, dim=1) if index.shape[1] > batch_size // 2
            ]
        if not batches:  # a pool smaller than half a batch
            batches = [(0, torch.stack([torch.randperm(len(buckets[0].rows), generator=generator) for _ in range(K)]))]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield buckets[batches[i][0]], batches[i][1]


def _id(spec: TaskSpec, seed: int, checkpoint: int) -> str:
    return f"{spec.name}-s{seed}-c{checkpoint}"

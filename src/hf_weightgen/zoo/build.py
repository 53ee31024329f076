"""Builds a zoo of LoRA adapters: seeds x late checkpoints x tasks, all seeds of a task trained at once.

All members start from one shared adapter, the *base* row (as T2W's `base.pt`): it is trained over all tasks together, and
its head is no matrix of classes but a projection of class names, so that it classifies any list of names at first sight.
That shared start keeps the members of the zoo in one basin, where they can be averaged and generated.

    base row: f(x) pooled [CLS] features, e(.) sentence embedding of the frozen encoder, W and b the name projection
        g(x) = W' f(x) + b                          an estimate of e(x) that the LoRA may change
        logits_c = LOGIT_SCALE * <g(x), e(name_c)>  hence row_c = LOGIT_SCALE * W e(name_c), bias_c = LOGIT_SCALE * <b, e(name_c)>
        loss = cross-entropy + DISTILLATION * |g(x) - e(x)|^2

    member: cross-entropy on its task, starting from the base adapter and the base's head for the task's class names.

Restart after a kill continues: each task's rows are written as one shard when they are done, and their randomness
depends on the task and the seeds only.
"""

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, TaskType
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from ..targets.base_models import MINILM, load_classifier, load_encoder, load_tokenizer
from ..targets.functional import BIAS, WEIGHT, AdapterTarget, Bucket
from ..targets.tasks import TASKS, TaskSpec
from .schema import ZooFolder, make_row, row_to_state_dict
from .tasks import TEST_LIMIT, VALIDATION_LIMIT, TaskData, evaluation_subset, load_tasks


LOGIT_SCALE = 20.0
DISTILLATION = 3.0
NAME_PROJECTION = "name_projection"
CONFIG = "zoo_config.json"


def lora_config() -> LoraConfig:
    """r = 4 on query and value of the last two of MiniLM's six layers."""
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=4,
        lora_alpha=8,
        target_modules=["query", "value"],
        layers_to_transform=[4, 5],
        layers_pattern="layer",
    )


@dataclass(frozen=True)
class ZooConfig:
    """
    How a zoo is trained.

    Args:
        seeds: Members per task; the last one is held out (split `"held_out"`), never used to train a generator.
        passes: Sentences that one member reads in training. `passes_of` overrides it by task name.
        checkpoints: Fractions of the training at which a member is saved.
        pool: Most training sentences that are prepared per task; `passes` where that is larger.
        longest_of: Tasks whose pool is their longest texts, not a random choice: SST-2's train split holds every phrase of
            its sentences, its test split sentences only.
        lr, head_lr, batch_size, warmup: AdamW, linear decay.
        bf16: Members are trained under bfloat16 autocast (twice as fast where the processor has it), evaluated in float32.
        base_steps, base_batch_size, base_lr, base_projection_lr, base_pool: The shared start.
    """

    base_model: str = MINILM
    seeds: int = 6
    passes: int = 4000
    passes_of: Mapping[str, int] = field(default_factory=lambda: {"sst2": 10_000})
    checkpoints: tuple[float, ...] = (0.6, 0.8, 1.0)
    pool: int = 4000
    longest_of: tuple[str, ...] = ("sst2",)
    lr: float = 2e-3
    head_lr: float = 1e-2
    batch_size: int = 32
    warmup: float = 0.06
    bf16: bool = False
    max_length: int = 64
    seed: int = 0
    base_steps: int = 3000
    base_batch_size: int = 64
    base_lr: float = 2e-3
    base_projection_lr: float = 1e-3
    base_pool: int = 1500


def default_tasks() -> tuple[list[TaskSpec], list[TaskSpec]]:
    """The tasks with members in the text zoo, and those that only its shared start reads: many class names widen it."""
    base_only = [TASKS["clinc150"]]
    return [task for task in TASKS.values() if task not in base_only], base_only


def build_zoo(
    specs: Sequence[TaskSpec],
    folder: str | Path,
    config: ZooConfig = ZooConfig(),
    data_root: str | Path | None = None,
    base_only: Sequence[TaskSpec] = (),
    progress: bool = True,
) -> ZooFolder:
    """
    Trains what is missing of a zoo in `folder`; calling it again continues.

    Args:
        specs: Tasks with members in the zoo.
        folder: Where the Parquet shards are written.
        data_root: Folder with datasets under their Hub ids, see [`~zoo.tasks.load_tasks`].
        base_only: Further tasks whose training split only the shared base adapter sees.

    Raises:
        ValueError: If the folder holds a zoo of another configuration, or a member has too few steps for its checkpoints.
    """
    folder = ZooFolder(folder)
    for spec in specs:
        _checkpoint_steps(spec, config)
    _check_same_config(Path(folder.path), config)
    data = load_tasks([*specs, *base_only], data_root)
    _write_config(Path(folder.path), config)
    encoder, tokenizer = load_encoder(config.base_model), load_tokenizer(config.base_model)
    target = AdapterTarget(load_classifier(config.base_model, num_labels=2), lora_config())
    done = folder.finished()
    if "base" not in done:
        rows = [_base_row(target, tokenizer, encoder, data, config, progress)]
        folder.add("base", rows)
    base = row_to_state_dict(folder.row("base"))

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
    generator = torch.Generator().manual_seed(_seed(config.seed, spec.name))
    torch.manual_seed(_seed(config.seed, spec.name, "dropout"))  # vmap draws dropout masks from the global generator
    target.eval()  # the prefix is computed without dropout
    buckets = target.buckets(tokenizer, training_pool(data, max(config.pool, passes), config), config.max_length)
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
                _accuracy(target, members, split) if last or i == 0 else [None] * K
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
                    arch=_arch(config),
                    metrics={"validation": accuracy[0][k], "test": accuracy[1][k]},
                    provenance=_provenance(config, data) | {"sentence_passes": step * config.batch_size},
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


def training_pool(data: TaskData, limit: int, config: ZooConfig) -> Dataset:
    """The sentences of a task that its members may read."""
    if data.spec.name not in config.longest_of:
        return evaluation_subset(data.train, limit)
    lengths = torch.tensor([len(text) for text in data.train["text"]])
    return data.train.select(lengths.argsort(descending=True, stable=True)[:limit].sort().values.tolist())


def head_of_names(base: Mapping[str, Tensor], names: Tensor) -> dict[str, Tensor]:
    """The head that the base adapter gives to classes with the name embeddings `names` `(C, E)`: `(C, D)` and `(C,)`."""
    weight, bias = base[f"{NAME_PROJECTION}.weight"], base[f"{NAME_PROJECTION}.bias"]  # (E, D), (E,)
    return {WEIGHT: LOGIT_SCALE * names @ weight, BIAS: LOGIT_SCALE * names @ bias}


def train_base(
    target: AdapterTarget, tokenizer, encoder, data: Mapping[str, TaskData], config: ZooConfig, progress: bool
) -> dict[str, Tensor]:
    """The shared start of all members: LoRA tensors and the name projection. See the head of this module."""
    generator = torch.Generator().manual_seed(_seed(config.seed, "base"))
    torch.manual_seed(_seed(config.seed, "base", "dropout"))
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


def _base_row(target, tokenizer, encoder, data, config, progress) -> dict:
    state_dict = train_base(target, tokenizer, encoder, data, config, progress)
    target.eval()
    metrics = {}
    for name, task in data.items():
        buckets = target.buckets(tokenizer, evaluation_subset(task.validation, VALIDATION_LIMIT), config.max_length)
        member = state_dict | head_of_names(state_dict, encoder.embed(task.spec.labels))
        metrics[name] = _accuracy(target, [member], buckets)[0]
    return make_row(
        state_dict,
        id="base",
        task="base",
        family="base",
        split="base",
        text="",
        labels=[],
        seed=config.seed,
        checkpoint=0,
        epoch=0.0,
        arch=_arch(config),
        metrics={"validation": sum(metrics.values()) / len(metrics), "test": float("nan")},
        provenance={
            "tasks": metrics,
            "hyper_parameters": _hyper(config),
            "versions": _versions(),
            "sentence_passes": config.base_steps * config.base_batch_size,
        },
    )


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


def _accuracy(
    target: AdapterTarget, members: Sequence[Mapping[str, Tensor]], buckets: Sequence[Bucket]
) -> list[float]:
    labels = torch.empty(sum(len(b.rows) for b in buckets), dtype=torch.long)
    for bucket in buckets:
        labels[bucket.rows] = bucket.labels
    return (target.predict(members, buckets) == labels).double().mean(1).tolist()


def _id(spec: TaskSpec, seed: int, checkpoint: int) -> str:
    return f"{spec.name}-s{seed}-c{checkpoint}"


def _seed(*parts) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest())


def _arch(config: ZooConfig) -> dict:
    return {"base_model": config.base_model, "task_type": "SEQ_CLS", **lora_settings(lora_config())}


def lora_settings(config: LoraConfig) -> dict:
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
    }


def _hyper(config: ZooConfig) -> dict:
    return json.loads(
        json.dumps(
            asdict(config)
            | {"passes_of": dict(config.passes_of), "logit_scale": LOGIT_SCALE, "distillation": DISTILLATION}
        )
    )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "peft", "datasets")},
    }


def _provenance(config: ZooConfig, data: TaskData) -> dict:
    return {
        "dataset": data.spec.dataset_id,
        "config": data.spec.config,
        "data_revision": data.data_revision,
        "removed_duplicates": data.removed_duplicates,
        "hyper_parameters": _hyper(config),
        "versions": _versions(),
    }


def _check_same_config(path: Path, config: ZooConfig) -> None:
    """A zoo is one configuration: later calls must bring the one of the first."""
    file, wanted = path / CONFIG, _hyper(config)
    if not file.exists():
        return
    found = json.loads(file.read_text())
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise ValueError(
            f"{file} was started with `{key}` = {found.get(key)!r}, now {wanted[key]!r} is asked for. "
            "Continue with the same settings, or choose another folder."
        )


def _write_config(path: Path, config: ZooConfig) -> None:
    if (path / CONFIG).exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    temporary = (path / CONFIG).with_suffix(".tmp")
    temporary.write_text(json.dumps(_hyper(config), indent=2, sort_keys=True))
    temporary.replace(path / CONFIG)

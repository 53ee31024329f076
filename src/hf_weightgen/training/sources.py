"""What the stages of D2NWG need of a zoo, for each kind of zoo: tensors, tokenizer, target, and how to score weights."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from ..models.modeling_dataset_encoder import DatasetEncoder
from ..models.modeling_weight_vae import WeightVAE
from ..models.modeling_weight_vqvae import WeightVQVAE
from ..targets.architectures import HEAD
from ..targets.base_models import MINILM, TextEncoder, load_classifier, load_tokenizer, pack_embeddings
from ..targets.functional import BIAS, SMALL_BUCKET, WEIGHT, AdapterTarget, Bucket
from ..targets.stacked import stacked_logits
from ..targets.tasks import get_task
from ..weights.lora import canonicalize, center_head
from ..weights.tokenization import WeightTokenizer
from ..zoo.build import training_pool
from ..zoo.digits import CONFIG, NETWORK, TASKS, build_digit_zoo, digit_accuracy, digit_images
from ..zoo.folder import load_zoo
from ..zoo.recipe import WIDE_TASK, config_of, lora_config, lora_settings
from ..zoo.schema import zoo_state_dicts
from ..zoo.start import BASE, head_of_names, name_projection
from ..zoo.tasks import TEST_LIMIT, evaluation_subset, load_tasks
from .batches import StepRandom, ZooTensors
from .dataset_encoder import DRAWS, with_datasets
from .function_loss import AdapterLoss, BatchDecoder
from .objectives import weights_of


PROMPT_CENTRES = 4  # per known task


@dataclass
class Source:
    """
    A zoo with all that training asks about it.

    Args:
        train, held_out: The rows, see [`ZooTensors`]; what has several architectures is a task of its own for each.
        runs: per task of `train`, one row number per independent run.
        vae_steps: Steps of the autoencoder with `function_loss`, see [`~training.objectives.vae_loss`].
        task_steps: Further steps with `task_loss` in its place, which asks more than to do what the zoo does; task_reconstruction:
            the weight of weight-space error in them, or one for each task.
        score: `(state dicts, task) -> accuracies (N,)` in [0, 1] on test data.
        name_projection: The base adapter's head as a function of class names: weight `(E, D)` and bias `(E,)`.
        thresholds: `far_below`, `known_above` and `datasets_above`, see [`D2NWGPipeline`].
        majority: per task the share of the largest class and the number of test rows; zoo_scores: mean accuracy of members.
        samples: Generated networks per task in the report.
        targets: All targets, where the zoo has several; `target` is the first of them.
        target_of: The number of each task's target. Default: with `targets`, each task has one of its own.
        accuracies: `(R,)`, of the rows of `train` on validation data, NaN where it was not measured.
        validate: As `score` on validation data; absent where that takes too long for hundreds of networks.
        features: Per task `(C, pool, F)`: examples of its classes as `image_encoder` sees them, for a dataset encoder; of the first
            tasks, where others have none.
    """

    tokenizer: WeightTokenizer
    train: ZooTensors
    held_out: ZooTensors
    runs: list[list[int]]
    target: dict
    known_tasks: list[dict]
    thresholds: dict[str, float]
    score: Callable[[Sequence[Mapping[str, Tensor]], str], Tensor]
    vae_steps: int
    max_train_steps: int
    vae_settings: dict = field(default_factory=dict)
    function_loss: Callable | None = None
    task_steps: int = 0
    task_loss: Callable | None = None
    task_reconstruction: float | list[float] = 1.0
    task_learning_rate: float = 3e-4
    name_projection: tuple[Tensor, Tensor] | None = None
    majority: dict[str, tuple[float, int]] = field(default_factory=dict)
    zoo_scores: dict[str, float] = field(default_factory=dict)
    samples: int = 20
    targets: list[dict] | None = None
    target_of: list[int] | None = None
    features: list[Tensor] | None = None
    image_encoder: dict | None = None
    accuracies: Tensor | None = None
    validate: Callable[[Sequence[Mapping[str, Tensor]], str], Tensor] | None = None

    @property
    def targets_of_tasks(self) -> list[int]:
        """The number of each task's target."""
        count = len(self.train.tasks)
        return self.target_of or (list(range(count)) if self.targets else [0] * count)

    @property
    def reconstruction_weights(self) -> list[float]:
        """`task_reconstruction` of each task."""
        return weights_of(self.task_reconstruction, torch.arange(len(self.train.tasks))).tolist()

    def initialise(self, vae: WeightVAE) -> None:
        """What is known before training: zoo means, and the base adapter's head as a function of class names."""
        T = vae.config.num_body_tokens
        with torch.no_grad():
            real = self.train.padding_mask[:, :T].sum(0).clamp(min=1)
            vae.token_bias.copy_(self.train.weight_tokens[:, :T].sum(0) / real)
        self.initialise_names(vae)

    def initialise_names(self, autoencoder: WeightVAE | WeightVQVAE) -> None:
        """The base adapter's head as a function of class names, if there is one."""
        if self.name_projection is None:
            return
        weight, bias = self.name_projection  # (E, D), (E,): row_c = e_c W, bias_c = e_c b
        size = weight.shape[1]
        stats = [self._scale(name) for name in (WEIGHT, BIAS)]
        with torch.no_grad():
            projection = autoencoder.name_projection.weight.zero_()
            if isinstance(autoencoder, WeightVQVAE):
                projection = autoencoder.map_of_names(int(self.train.layout_of[self.train.start]))
            projection[:size] = weight.mT / stats[0][1]
            projection[size] = bias / stats[1][1]

    def add_datasets(self, encoder: DatasetEncoder, seed: int) -> None:
        """From now on a task is asked for by its dataset too, see [`with_datasets`]."""
        prompts, classes = self.train.prompt_embeds, self.train.class_mask.shape[1]
        shown = with_datasets(self.shown, encoder, self.features, seed)
        kinds = [(own, both[-DRAWS:]) for own, both in zip(prompts, shown.prompt_embeds, strict=False)]
        kinds += [(own,) for own in prompts[len(kinds) :]]
        names = [F.pad(own, (0, 0, 0, classes - own.shape[1])) for own in shown.class_embeds]
        self.train = replace(
            self.train,
            prompt_embeds=[*shown.prompt_embeds, *prompts[len(names) :]],
            class_embeds=[*names, *self.train.class_embeds[len(names) :]],
        )
        firsts = [next(t for t in range(len(kinds)) if self._is_of(t, task)) for task in self.known_tasks]
        self.known_tasks, self.thresholds = known_tasks(self.known_tasks, [kinds[t] for t in firsts])

    @property
    def shown(self) -> ZooTensors:
        """The rows of tasks of which there are `features`."""
        return self.train.first_tasks(len(self.features))

    def _is_of(self, number: int, known: Mapping) -> bool:
        """Whether a task of `train` is a known task, in one of its architectures."""
        target = (self.targets or [self.target])[self.targets_of_tasks[number]]
        return self.train.tasks[number] in (known["name"], in_architecture(known["name"], target.get("name")))

    def asked_for(self, task: str) -> dict:
        """What a call of the pipeline says of a task of `train` beside its condition: `labels`, and its `architecture` where
        the known task has several."""
        number = self.train.tasks.index(task)
        known = next(k for k in self.known_tasks if self._is_of(number, k))
        asked = {"labels": list(known["labels"])}
        return asked | (
            {"architecture": self.targets[self.targets_of_tasks[number]]["name"]} if "targets" in known else {}
        )

    def _scale(self, name: str) -> tuple[float, float]:
        entry = next(e for layout in self.tokenizer.to_dict()["layouts"] for e in layout if e["name"] == name)
        return entry["mean"], entry["std"]

    def state_dicts(self, zoo: ZooTensors, tokens: Tensor) -> list[dict[str, Tensor]]:
        """The weights of tokens `(R, T + C, S)` that belong to the rows of `zoo`."""
        return decode_rows(self.tokenizer, tokens, zoo.layout_of, zoo.class_mask[zoo.task_of].sum(1))

    def accuracy(self, state_dicts: Sequence[Mapping[str, Tensor]], zoo: ZooTensors) -> dict[str, float]:
        """Mean accuracy by task; tasks that count, see [`Source.counts`]."""
        by_task = defaultdict(list)
        for row, task in enumerate(zoo.task_of.tolist()):
            by_task[zoo.tasks[task]].append(state_dicts[row])
        scores = {task: self.score(members, task).mean().item() for task, members in by_task.items()}
        return {task: score for task, score in scores.items() if self.counts(task)}

    def counts(self, task: str) -> bool:
        """Whether the zoo's members are at least 3 standard errors better than the majority class."""
        if task not in self.majority:
            return True
        share, rows = self.majority[task]
        mean = self.zoo_scores[task]
        return mean - share >= 3 * (mean * (1 - mean) / rows) ** 0.5

    def members(self, task: str) -> list[dict[str, Tensor]]:
        """State dicts of the rows of a task that training sees."""
        rows = torch.nonzero(self.train.task_of == self.train.tasks.index(task)).flatten()
        counts = self.train.class_mask[self.train.task_of[rows]].sum(1)
        return decode_rows(self.tokenizer, self.train.weight_tokens[rows], self.train.layout_of[rows], counts)


def in_architecture(task: str, name: str) -> str:
    """What a task is called among the rows of a zoo, where it has several architectures."""
    return f"{task} ({name})"


def decode_rows(
    tokenizer: WeightTokenizer, tokens: Tensor, layouts: Tensor, counts: Tensor
) -> list[dict[str, Tensor]]:
    """State dicts of tokens side by side `(R, T + C, S)`, with their layouts and class counts `(R,)`."""
    state_dicts: list = [None] * len(tokens)
    for k in layouts.unique().tolist():
        rows = (layouts == k).nonzero().flatten()
        own = tokenizer.decode(tokenizer.own_tokens(tokens[rows], k), layouts[rows], counts[rows])
        for row, state_dict in zip(rows.tolist(), own, strict=True):
            state_dicts[row] = state_dict
    return state_dicts


def known_tasks(
    tasks: Iterable[Mapping], conditions: Iterable[Sequence[Tensor]]
) -> tuple[list[dict], dict[str, float]]:
    """
    Known tasks for the pipeline's config, and its thresholds, see [`D2NWGPipeline`]: of prompts the cosine to the nearest centre
    above which nearly all lie that are worded anew, and one that is surely near; of datasets one that is far below.

    Args:
        tasks: What is told of each.
        conditions: Of each prompts `(P, E)`, and for some datasets beside them.
    """
    known, cosines = [], defaultdict(list)
    for task, kinds in zip(tasks, conditions, strict=True):
        # a task is asked for in ways that are far apart, by its dataset's name or in plain words: one centre is too few
        known.append({**task, "prompt_embeddings": pack_embeddings(torch.cat(list(map(_centres, kinds))))})
        for kind, embeds in enumerate(kinds):
            cosines[kind].append(_left_out_cosines(embeds))
    lows = {kind: torch.cat(own).quantile(0.02).item() for kind, own in cosines.items()}
    thresholds = {"far_below": lows[0], "known_above": min(lows[0] + 0.1, 1)}
    if len(lows) > 1:  # a dataset of a known task is near all others of it, however it was drawn
        thresholds["datasets_above"] = lows[1] - 0.1
    return known, {name: round(low, 3) for name, low in thresholds.items()}


def _left_out_cosines(embeds: Tensor) -> Tensor:
    """How near each of `(P, E)` is to centres of the others, a quarter of all at a time: what was never seen lies as far."""
    if len(embeds) == 1:  # it tells nothing
        return embeds.new_ones(1)
    part = torch.arange(len(embeds)) % 4
    return torch.cat([(embeds[part == k] @ _centres(embeds[part != k]).mT).amax(1) for k in part.unique()])


def _centres(embeds: Tensor) -> Tensor:
    clusters = KMeans(min(PROMPT_CENTRES, len(embeds)), n_init=4, random_state=0).fit(embeds.numpy())
    return F.normalize(torch.from_numpy(clusters.cluster_centers_), dim=1)


def told(task) -> dict:
    """What a generator says of a task that it knows."""
    return {"name": task.name, "family": getattr(task, "family", task.name), "labels": list(task.labels)}


def digits_source(encoder: TextEncoder, networks: int, seed: int) -> Source:
    """The embedded default: see [`zoo.digits`]."""
    rows = build_digit_zoo(networks, seed=seed)
    tokenizer = WeightTokenizer.fit(
        (row["weights"] for row in rows if row["split"] == "train"), token_size=64, head=HEAD
    )
    prompts = {task.name: encoder.embed(task.prompts) for task in TASKS}
    names = {task.name: encoder.embed(task.labels)[None] for task in TASKS}
    families = {task.name: task.name for task in TASKS}
    parts = {
        split: ZooTensors.of(
            tokenizer,
            [r["weights"] for r in rows if r["split"] == split],
            [r["task"] for r in rows if r["split"] == split],
            names,
            prompts,
            families,
        )
        for split in ("train", "held_out")
    }
    train = parts["train"]
    images = digit_images()["train"][0]
    counts = train.class_mask.sum(1)
    decoders = {classes: BatchDecoder(tokenizer, classes) for classes in counts.unique().tolist()}

    def logits(tokens: Tensor, classes: int, probe: Tensor) -> Tensor:
        return stacked_logits(CONFIG, decoders[classes](tokens), probe).log_softmax(-1)

    def function_loss(tokens: Tensor, truth: Tensor, index: Tensor, random: StepRandom) -> Tensor:
        """KL divergence of decoded from original networks on random training images."""
        probe = images[random.shared_integers(len(images), 64, purpose=21)][None]  # (1, n, F), alike in all processes
        loss = tokens.new_zeros(())
        for classes in decoders:
            rows = torch.nonzero(counts[train.task_of[index]] == classes).flatten()
            if len(rows):
                target, guess = (logits(t[rows], classes, probe) for t in (truth, tokens))
                loss = loss + F.kl_div(guess, target, reduction="sum", log_target=True) / (len(index) * probe.shape[1])
        return loss

    def validate(state_dicts: Sequence[Mapping[str, Tensor]], task: str) -> Tensor:
        return digit_accuracy(list(state_dicts), task, "validation")

    known, thresholds = known_tasks(map(told, TASKS), [[prompts[task.name]] for task in TASKS])
    members = [[r["weights"] for r in rows if r["split"] == "train" and r["task"] == t] for t in train.tasks]
    return Source(
        tokenizer,
        train,
        parts["held_out"],
        [torch.nonzero(train.task_of == t).flatten().tolist() for t in range(len(train.tasks))],
        {"kind": "network", "config": NETWORK},
        known,
        thresholds,
        lambda weights, task: digit_accuracy(list(weights), task, "test"),
        vae_steps=2400,
        max_train_steps=2000,
        # networks of independent seeds: a narrow latent keeps what the functions share, a wide one each network's accidents
        vae_settings={"token_width": 32, "hidden_size": 256, "noise_scale": 0.0, "kl_weight": 0.4},
        function_loss=function_loss,
        accuracies=torch.cat([validate(own, task) for own, task in zip(members, train.tasks, strict=True)]),
        validate=validate,
    )


def text_source(encoder: TextEncoder, zoo: str, data_root: str | None, bf16: bool = False) -> Source:
    """
    A zoo of LoRA adapters made by [`zoo.build`]: rows in the base adapter's gauge, heads with the class mean removed.

    Args:
        bf16: Read the sentences of the task loss under bfloat16 autocast.
    """
    dataset = load_zoo(zoo)
    split, task_names, seeds = dataset["split"], dataset["task"], dataset["seed"]
    base = next(zoo_state_dicts(dataset, [split.index(BASE)]))
    reference = {n: t for n, t in base.items() if "lora_" in n}
    where = {part: [i for i, s in enumerate(split) if s == part] for part in ("train", "held_out")}
    checkpoints = dataset["checkpoint"]
    latest = max(checkpoints)
    where["held_out"] = [i for i in where["held_out"] if checkpoints[i] == latest]  # one member a task, for the gate
    weights = {
        part: [center_head(canonicalize(sd, reference), (WEIGHT, BIAS)) for sd in zoo_state_dicts(dataset, rows)]
        for part, rows in where.items()
    }
    tokenizer = WeightTokenizer.fit(
        weights["train"], token_size=name_projection(base)[0].shape[1] + 1, head=(WEIGHT, BIAS)
    )
    specs = [get_task(name) for name in dict.fromkeys(task_names) if name != BASE]
    wide = get_task(WIDE_TASK)  # its names stand for all names in the head of the shared start
    prompts = {spec.name: encoder.embed(spec.prompts) for spec in [*specs, wide]}
    names = {spec.name: torch.stack([encoder.embed(wording) for wording in spec.wordings]) for spec in [*specs, wide]}
    families = {spec.name: spec.family for spec in specs} | {BASE: BASE}
    names[BASE], prompts[BASE] = names[wide.name], torch.zeros(1, names[wide.name].shape[-1])
    start = center_head(canonicalize(reference, reference) | head_of_names(base, names[BASE][0]), (WEIGHT, BIAS))
    weights["train"].append(start)
    rows_of = {p: [task_names[i] for i in rows] for p, rows in where.items()}
    rows_of["train"].append(BASE)
    start_of = {"train": len(weights["train"]) - 1, "held_out": None}
    parts = {p: ZooTensors.of(tokenizer, weights[p], rows_of[p], names, prompts, families, start_of[p]) for p in where}
    runs = []
    for task in parts["train"].prompted_tasks:
        last = {
            seeds[i]: n for n, i in enumerate(where["train"]) if task_names[i] == task
        }  # the last checkpoint of each seed
        runs.append(list(last.values()))
    data = load_tasks([*specs, wide] if wide not in specs else specs, data_root)
    target = AdapterTarget(load_classifier(MINILM, num_labels=2), lora_config())
    text_tokenizer, config = load_tokenizer(MINILM), config_of(dataset["provenance"][split.index(BASE)])

    @functools.cache
    def test_buckets(task: str) -> list[Bucket]:
        return target.buckets(text_tokenizer, evaluation_subset(data[task].test, TEST_LIMIT), bucket_size=SMALL_BUCKET)

    def score(state_dicts: Sequence[Mapping[str, Tensor]], task: str) -> Tensor:
        return target.accuracy(list(state_dicts), test_buckets(task))

    known, thresholds = known_tasks(map(told, specs), [[prompts[spec.name]] for spec in specs])
    source = Source(
        tokenizer,
        parts["train"],
        parts["held_out"],
        runs,
        {
            "kind": "adapter",
            "name": "lora",
            "base_model": MINILM,
            "lora": lora_settings(),
        },
        known,
        thresholds,
        score,
        vae_steps=14000,
        task_steps=3000,
        task_loss=AdapterLoss(
            target,
            text_tokenizer,
            tokenizer,
            parts["train"],
            lambda task: training_pool(data[task], config),
            bf16,
        ),
        vae_settings={"kl_weight": 1e-3},
        max_train_steps=8000,
        samples=5,
        name_projection=name_projection(base),
    )
    metrics = dataset["metrics"]
    source.accuracies = torch.tensor(
        [*(metrics[i]["validation"] for i in where["train"]), torch.nan]
    )  # NaN: the start
    for spec in specs:
        test = torch.tensor(list(evaluation_subset(data[spec.name].test, TEST_LIMIT)["label"]))
        source.majority[spec.name] = test.bincount().max().item() / len(test), len(test)
        scores = [metrics[i]["test"] for i in where["train"] if task_names[i] == spec.name]
        scores = [score for score in scores if score is not None]  # of the last checkpoints
        source.zoo_scores[spec.name] = sum(scores) / len(scores)
    return source

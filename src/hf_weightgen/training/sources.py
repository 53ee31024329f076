"""What the stages of D2NWG need of a zoo, for each kind of zoo: tensors, tokenizer, target, and how to score weights."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.modeling_weight_vae import WeightVAE
from ..targets.architectures import HEAD, mlp_logits
from ..targets.base_models import MINILM, TextEncoder, load_classifier, load_tokenizer
from ..targets.functional import BIAS, WEIGHT, AdapterTarget
from ..targets.tasks import get_task
from ..weights.lora import canonicalize, center_head
from ..weights.tokenization import WeightTokenizer
from ..zoo.build import LOGIT_SCALE, NAME_PROJECTION, lora_config, lora_settings
from ..zoo.digits import ACTIVATION, HIDDEN, TASKS, build_digit_zoo, digit_accuracy, digit_images
from ..zoo.schema import load_zoo, zoo_state_dicts
from ..zoo.tasks import TEST_LIMIT, evaluation_subset, load_tasks
from .batches import StepRandom, ZooTensors


@dataclass
class Source:
    """
    A zoo with all that training asks about it.

    Args:
        train, held_out: The rows, see [`ZooTensors`].
        runs: per task of `train`, one row number per independent run.
        function_loss: See [`~training.objectives.vae_loss`].
        score: `(state dicts, task) -> accuracies (N,)` in [0, 1] on test data.
        name_projection: The base adapter's head as a function of class names: weight `(E, D)` and bias `(E,)`.
        majority: per task the share of the largest class and the number of test rows; zoo_scores: mean accuracy of members.
        samples: Generated networks per task in the report.
    """

    tokenizer: WeightTokenizer
    train: ZooTensors
    held_out: ZooTensors
    runs: list[list[int]]
    target: dict
    known_tasks: list[dict]
    far_below: float
    score: Callable[[Sequence[Mapping[str, Tensor]], str], Tensor]
    vae_steps: int
    max_train_steps: int
    vae_settings: dict = field(default_factory=dict)
    function_loss: Callable | None = None
    name_projection: tuple[Tensor, Tensor] | None = None
    majority: dict[str, tuple[float, int]] = field(default_factory=dict)
    zoo_scores: dict[str, float] = field(default_factory=dict)
    samples: int = 20

    def initialise(self, vae: WeightVAE) -> None:
        """What is known before training: zoo means, and the base adapter's head as a function of class names."""
        T = vae.config.num_body_tokens
        with torch.no_grad():
            vae.token_bias.copy_(self.train.weight_tokens[:, :T].mean(0))
            if self.name_projection is not None:
                weight, bias = self.name_projection  # (E, D), (E,): row_c = e_c W, bias_c = e_c b
                size = weight.shape[1]
                stats = [self._scale(name) for name in (WEIGHT, BIAS)]
                vae.name_projection.weight.zero_()
                vae.name_projection.weight[:size] = weight.mT / stats[0][1]
                vae.name_projection.weight[size] = bias / stats[1][1]

    def _scale(self, name: str) -> tuple[float, float]:
        entry = next(e for e in self.tokenizer.to_dict()["layouts"][0] if e["name"] == name)
        return entry["mean"], entry["std"]

    def state_dicts(self, zoo: ZooTensors, tokens: Tensor) -> list[dict[str, Tensor]]:
        counts = zoo.class_mask[zoo.task_of].sum(1)
        return self.tokenizer.decode(tokens, num_classes=counts)

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

    def report(self, pipe, seed: int) -> dict:
        """Per task: accuracies in points of the zoo, of its average and Gaussian, and of generated weights."""
        result = {}
        zoo, generator, count = self.train, torch.Generator().manual_seed(seed), self.samples
        members_of = self.state_dicts(zoo, zoo.weight_tokens)
        for index, task in enumerate(zoo.tasks):
            members = [members_of[row] for row in torch.nonzero(zoo.task_of == index).flatten().tolist()]
            stacked = {name: torch.stack([m[name] for m in members]) for name in members[0]}
            gaussian = [
                {n: t.mean(0) + t.std(0) * torch.randn(t.shape[1:], generator=generator) for n, t in stacked.items()}
                for _ in range(count)
            ]
            prompts = zoo.prompt_embeds[index]
            labels = next(t["labels"] for t in self.known_tasks if t["name"] == task)
            output = pipe(
                prompt_embeds=prompts[torch.arange(count) % len(prompts)], labels=list(labels), generator=generator
            )
            rows = {
                "average": [{n: t.mean(0) for n, t in stacked.items()}],
                "gaussian": gaussian,
                "generated": output.weights,
            }
            if task not in self.zoo_scores:
                rows["zoo"] = members
            result[task] = {
                name: round(100 * self.score(weights, task).mean().item(), 2) for name, weights in rows.items()
            }
            result[task] |= {"zoo": round(100 * self.zoo_scores[task], 2)} if task in self.zoo_scores else {}
            result[task]["counted"] = self.counts(task)
        return result


def _known(tasks, prompt_embeds: Mapping[str, Tensor]) -> tuple[list[dict], float]:
    """Known tasks for the pipeline's config, and the cosine under which hardly any of their own prompts lies."""
    known, cosines = [], []
    for task in tasks:
        embeds = prompt_embeds[task.name]
        centre = F.normalize(embeds.mean(0), dim=0)
        cosines.append(embeds @ centre)
        known.append(
            {
                "name": task.name,
                "family": getattr(task, "family", task.name),
                "labels": list(task.labels),
                "prompt_embedding": [round(x, 5) for x in centre.tolist()],
            }
        )
    return known, round(torch.cat(cosines).quantile(0.02).item() - 0.05, 3)


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

    def function_loss(tokens: Tensor, truth: Tensor, index: Tensor, random: StepRandom) -> Tensor:
        """KL divergence of decoded from original networks on random training images."""
        probe = images[random.shared_integers(len(images), 64, purpose=21)][None]  # (1, n, F), alike in all processes
        loss = tokens.new_zeros(())
        for classes in counts.unique().tolist():
            rows = torch.nonzero(counts[train.task_of[index]] == classes).flatten()
            if len(rows):
                old, new = (_mlp_of(tokenizer, t[rows], classes) for t in (truth, tokens))
                target = mlp_logits(old, probe, ACTIVATION).log_softmax(-1)
                guess = mlp_logits(new, probe, ACTIVATION).log_softmax(-1)
                loss = loss + F.kl_div(guess, target, reduction="sum", log_target=True) / (len(index) * probe.shape[1])
        return loss

    known, far_below = _known(TASKS, prompts)
    return Source(
        tokenizer,
        train,
        parts["held_out"],
        [torch.nonzero(train.task_of == t).flatten().tolist() for t in range(len(train.tasks))],
        {"kind": "network", "config": {"input_size": 64, "hidden_size": HIDDEN, "activation": ACTIVATION}},
        known,
        far_below,
        lambda weights, task: digit_accuracy(list(weights), task, "test"),
        vae_steps=3000,
        max_train_steps=3000,
        vae_settings={"token_width": 32, "hidden_size": 256, "noise_scale": 0.0},
        function_loss=function_loss,
    )


def _mlp_of(tokenizer: WeightTokenizer, tokens: Tensor, classes: int) -> dict[str, Tensor]:
    decoded = tokenizer.decode(
        tokens[:, : tokenizer.num_body_tokens(0) + classes], num_classes=torch.full((len(tokens),), classes)
    )
    return {name: torch.stack([d[name] for d in decoded]) for name in decoded[0]}


def text_source(encoder: TextEncoder, zoo: str, data_root: str | None) -> Source:
    """A zoo of LoRA adapters made by [`zoo.build`]: rows in the base adapter's gauge, heads with the class mean removed."""
    dataset = load_zoo(zoo)
    split, task_names, seeds = dataset["split"], dataset["task"], dataset["seed"]
    base = next(zoo_state_dicts(dataset, [split.index("base")]))
    reference = {n: t for n, t in base.items() if "lora_" in n}
    where = {part: [i for i, s in enumerate(split) if s == part] for part in ("train", "held_out")}
    last = max(dataset["checkpoint"])
    where["held_out"] = [
        i for i in where["held_out"] if dataset[i]["checkpoint"] == last
    ]  # one member per task for the gate
    weights = {
        part: [center_head(canonicalize(sd, reference), (WEIGHT, BIAS)) for sd in zoo_state_dicts(dataset, rows)]
        for part, rows in where.items()
    }
    tokenizer = WeightTokenizer.fit(
        weights["train"], token_size=base[f"{NAME_PROJECTION}.weight"].shape[1] + 1, head=(WEIGHT, BIAS)
    )
    specs = [get_task(name) for name in dict.fromkeys(task_names) if name != "base"]
    prompts = {spec.name: encoder.embed(spec.prompts) for spec in specs}
    names = {spec.name: torch.stack([encoder.embed(wording) for wording in spec.wordings]) for spec in specs}
    families = {spec.name: spec.family for spec in specs}
    parts = {
        p: ZooTensors.of(tokenizer, weights[p], [task_names[i] for i in where[p]], names, prompts, families)
        for p in where
    }
    runs = []
    for task in parts["train"].tasks:
        last = {
            seeds[i]: n for n, i in enumerate(where["train"]) if task_names[i] == task
        }  # the last checkpoint of each seed
        runs.append(list(last.values()))
    data = load_tasks([*specs, get_task("clinc150")] if "clinc150" not in families else specs, data_root)
    target = AdapterTarget(load_classifier(MINILM, num_labels=2), lora_config())
    text_tokenizer, cache = load_tokenizer(MINILM), {}

    def score(state_dicts: Sequence[Mapping[str, Tensor]], task: str) -> Tensor:
        if task not in cache:
            test = evaluation_subset(data[task].test, TEST_LIMIT)
            cache[task] = target.buckets(text_tokenizer, test), torch.tensor(list(test["label"]))
        buckets, labels = cache[task]
        return (target.predict(list(state_dicts), buckets) == labels).double().mean(1)

    known, far_below = _known(specs, prompts)
    source = Source(
        tokenizer,
        parts["train"],
        parts["held_out"],
        runs,
        {
            "kind": "adapter",
            "base_model": MINILM,
            "lora": {"task_type": "SEQ_CLS", **lora_settings(lora_config())},
        },
        known,
        far_below,
        score,
        vae_steps=7000,
        max_train_steps=5000,
        samples=5,
        name_projection=tuple(LOGIT_SCALE * base[f"{NAME_PROJECTION}.{part}"] for part in ("weight", "bias")),
    )
    metrics = dataset["metrics"]
    for spec in specs:
        test = torch.tensor(list(evaluation_subset(data[spec.name].test, TEST_LIMIT)["label"]))
        source.majority[spec.name] = test.bincount().max().item() / len(test), len(test)
        scores = [metrics[i]["test"] for i in where["train"] if task_names[i] == spec.name]
        scores = [score for score in scores if score is not None]  # of the last checkpoints
        source.zoo_scores[spec.name] = sum(scores) / len(scores)
    return source

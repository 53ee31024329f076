"""What the stages of D2NWG need of zoos of small networks on images, or of heads on sentences, see [`zoo.build_networks`].

One generator for all tasks of the zoos, whatever networks they have: the weights of each layout have token places of their
own. A task is asked for by prompts or by its dataset; one that has several architectures, also by one of them, and in training
each pair counts as a task (D2NWG, https://huggingface.co/papers/2402.18153, appendix C.1).

Notation: R rows of the zoos; C classes; F size of an image feature.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..targets.architectures import HEAD, TargetConfig, architecture
from ..targets.base_models import TextEncoder, resolve_base, weights_sha256
from ..targets.image_encoders import MOBILENET, ImageEncoder
from ..targets.mixed import architecture_codes
from ..targets.stacked import stack
from ..targets.symmetry import BUFFERS, permutation_spec
from ..targets.tasks import TaskSpec, get_task
from ..weights.permutation import align
from ..weights.tokenization import WeightTokenizer
from ..zoo.features import load_texts
from ..zoo.folder import load_zoo
from ..zoo.images import ImageData, Images, load_images
from ..zoo.networks import keep_memory, predict_networks, predict_one_by_one
from ..zoo.schema import zoo_state_dicts
from .batches import ZooTensors
from .function_loss import NetworkLoss
from .sources import Source, in_architecture, known_tasks, told


TOKEN_SIZE = 64
LARGE = 65_536  # scalars of a network from which it reads images alone, and none in training
TASK_RECONSTRUCTION = 0.1  # weight of the error in weight space beside what networks do
TEST_IMAGES = 1000  # that such a network is scored on
POOL = 200  # images of each class that the dataset encoder sees in training
PARTS = ("train", "held_out")


@dataclass
class Networks:
    """
    What zoos have of one task in one architecture.

    Args:
        name: Of the architecture.
        data: The task's images, in the size that the networks read.
        weights: Per part of a zoo the state dicts of its rows.
        runs: Of the rows that train, the last one of each run.
        metrics: Of the rows that train, as the zoo has them.
        base: Of a trajectory what its rows lack.
    """

    spec: TaskSpec
    name: str
    config: TargetConfig
    data: ImageData
    weights: dict[str, list[dict[str, Tensor]]]
    runs: list[int]
    metrics: list[Mapping]
    base: Mapping[str, Tensor]
    trajectory: bool

    @functools.cached_property
    def size(self) -> int:
        """Scalars of a network."""
        return sum(tensor.numel() for tensor in self.weights["train"][0].values())

    @property
    def large(self) -> bool:
        """Whether the network reads images alone, and few of them, and none in training."""
        return self.trajectory or self.size > LARGE


def network_source(
    encoder: TextEncoder,
    images: ImageEncoder | None,
    zoos: Sequence[str],
    data_root: str | None,
    token_size: int = TOKEN_SIZE,
    cache: str | None = None,
) -> Source:
    """
    Rows of each task with their hidden units matched to those of its first member (weight matching of Git Re-Basin).

    Of a trajectory, see [`zoo.trajectory`], rows may be parts of networks: they are scored with the rest from the zoo's base,
    and nothing of them is matched, since what they fit is fixed. Their statistics of batch normalisation are not generated but
    averaged: those of silent channels are so small that a generator makes some of them negative. Its rows count as runs of
    their own, as there is one run.

    Args:
        images: Sees the examples of a dataset. Default: networks are heads that read what `encoder` says of sentences.
        zoos: Folders or Hub ids; where several have a task, the architecture of the first one is the default.
        token_size: Scalars of a token; more where a class needs them.
        cache: Folder for what the encoder says of sentences.

    Raises:
        ValueError: If a zoo has other networks, or two zoos have the same task in the same architecture.
    """
    keep_memory()
    opened = [load_zoo(zoo) for zoo in zoos]
    _check(zoos, opened, 1 if images is None else 3, encoder)
    specs = [get_task(name) for name in dict.fromkeys(name for rows in opened for name in rows["task"])]
    if images is None:
        texts = load_texts(specs, encoder, data_root, cache)
        load = lambda _: texts  # noqa: E731
    else:
        load = functools.cache(lambda shape: load_images(specs, data_root, shape[1]))
    pairs = [pair for rows in opened for pair in _networks(rows, load)]
    numbers = [[t for t, pair in enumerate(pairs) if pair.spec == spec] for spec in specs]  # of each task its pairs
    task_of = [specs.index(pair.spec) for pair in pairs]
    by_name = {
        pair.spec.name if len(numbers[t]) == 1 else in_architecture(pair.spec.name, pair.name): pair
        for t, pair in zip(task_of, pairs, strict=True)
    }

    weights = {part: [row for pair in pairs for row in pair.weights[part]] for part in PARTS}
    widest = max(one[HEAD[0]].shape[1] for one in weights["train"]) + 1  # a class's row of the head is one token
    tokenizer = WeightTokenizer.fit(weights["train"], token_size=max(token_size, widest), head=HEAD)
    prompts = {spec.name: encoder.embed(spec.prompts) for spec in specs}
    labels = {
        spec.name: torch.stack([encoder.embed(wording) for wording in spec.wordings]) for spec in specs
    }  # (V, C, E)
    parts = {
        part: ZooTensors.of(
            tokenizer,
            weights[part],
            [name for name, pair in by_name.items() for _ in pair.weights[part]],
            {name: labels[pair.spec.name] for name, pair in by_name.items()},
            {name: prompts[pair.spec.name] for name, pair in by_name.items()},
            {name: pair.spec.family for name, pair in by_name.items()},
        )
        for part in PARTS
    }
    train = parts["train"]
    layouts = [int(train.layout_of[train.task_of == t][0]) for t in range(len(pairs))]
    targets = [
        {"kind": "network", "name": pair.name, "config": _settings(pair), "layout": layout}
        for pair, layout in zip(pairs, layouts, strict=True)
    ]
    known, thresholds = known_tasks(
        [
            told(spec) | ({"target": own[0]} if len(own) == 1 else {"targets": own})
            for spec, own in zip(specs, numbers, strict=True)
        ],
        [[prompts[spec.name]] for spec in specs],
    )
    train = replace(
        train,
        dataset_of=torch.tensor(task_of),
        architecture_codes=architecture_codes(targets, known, train.prompt_embeds[0].shape[1]),
    )
    large = any(pair.large for pair in pairs)
    splits = {name: [pair.data.validation, pair.data.test] for name, pair in by_name.items()}
    splits = {n: [s.first(TEST_IMAGES) if by_name[n].large else s for s in both] for n, both in splits.items()}
    inputs = {name: [by_name[name].data.inputs(split) for split in both] for name, both in splits.items()}

    def validate(state_dicts: Sequence[Mapping[str, Tensor]], task: str, part: int = 0) -> Tensor:
        networks = [{**by_name[task].base, **state_dict} for state_dict in state_dicts]
        if by_name[task].large:
            predictions = predict_one_by_one(by_name[task].config, networks, inputs[task][part])
        else:
            predictions = predict_networks(by_name[task].config, stack(networks), inputs[task][part])
        return (predictions == splits[task][part].labels).double().mean(1)

    def score(state_dicts: Sequence[Mapping[str, Tensor]], task: str) -> Tensor:
        return validate(state_dicts, task, part=1)

    task_loss = None
    if not all(pair.large for pair in pairs):
        asked = [None if pair.large else (pair.config, k) for pair, k in zip(pairs, layouts, strict=True)]
        task_loss = NetworkLoss(tokenizer, train, asked, _training_images(pairs))
    vae_settings = {
        "kl_weight": 1e-3,
        "learns_noise": not large,
        "noise_weight": 5e-3,
        "hidden_size": 192,
        "token_width": 28,
    }
    if any(
        pair.trajectory for pair in pairs
    ):  # the KL term counts in what rows differ by, which is little; and the spread is theirs, not a half
        rows_of = [(train.task_of == t).nonzero().flatten() for t in range(len(pairs))]
        spreads = [train.weight_tokens[rows].var(0)[train.padding_mask[rows[0]]] for rows in rows_of]
        differ = torch.cat(spreads).mean().item()
        vae_settings = {"kl_weight": 1e-3 * min(1.0, differ)}
    if large:
        vae_settings["token_width"] = max(1, min(32, 500_000 // sum(pair.size for pair in pairs)))
    seen = None
    if images is not None:
        seen = of_one_shape(
            [features(images, pairs[own[0]].data.train, len(s.labels)) for s, own in zip(specs, numbers, strict=True)]
        )
    measured = [metrics["validation"] for pair in pairs for metrics in pair.metrics]
    starts = itertools.accumulate((len(pair.weights["train"]) for pair in pairs), initial=0)
    source = Source(
        tokenizer,
        train,
        parts["held_out"],
        [[start + row for row in pair.runs] for start, pair in zip(starts, pairs, strict=False)],
        targets[0],
        known,
        thresholds,
        score,
        vae_steps=1500,
        task_steps=8000 if task_loss else 0,
        task_loss=task_loss,
        task_reconstruction=[1.0 if pair.large else TASK_RECONSTRUCTION for pair in pairs],
        task_learning_rate=5e-4,
        vae_settings=vae_settings,
        max_train_steps=2000,
        samples=5 if large else 20,
        targets=targets,
        features=seen and [seen[t] for t in task_of],
        image_encoder=images
        and {"id": MOBILENET, "revision": None, "sha256": weights_sha256(images.model.name_or_path)},
        accuracies=torch.tensor([torch.nan if value is None else value for value in measured]),
        validate=validate,
    )
    for name, pair in by_name.items():
        counts = splits[name][1].labels.bincount()
        source.majority[name] = (counts.max() / counts.sum()).item(), int(counts.sum())
        scores = [metrics["test"] for metrics in pair.metrics if metrics["test"] is not None]
        source.zoo_scores[name] = sum(scores) / len(scores)
    return source


def _check(zoos: Sequence[str], opened: Sequence[Dataset], axes: int, encoder: TextEncoder) -> None:
    places: dict[tuple[str, str], str] = {}
    for zoo, rows in zip(zoos, opened, strict=True):
        arch, saw = rows[0]["arch"], rows[0]["provenance"].get("encoder")
        if len(arch.get("input_shape", ())) != axes or "activation" not in arch:  # those from few examples have none
            kind = "networks on images" if axes == 3 else "heads on features"
            raise ValueError(
                f"The zoo {zoo!r} holds no {kind}: its first row is {str(arch)[:80]}. Only zoos of {kind} train one "
                "generator together; give another zoo alone."
            )
        if axes == 1 and saw != weights_sha256(resolve_base(encoder.model.name_or_path)):
            raise ValueError(
                f"The heads of the zoo {zoo!r} read what another encoder says of sentences: weights {saw}."
            )
        tasks = list(rows["task"])
        for task in dict.fromkeys(tasks):
            pair = task, rows[tasks.index(task)]["arch"]["name"]
            if pair in places:
                raise ValueError(
                    f"The zoos {places[pair]!r} and {zoo!r} both have {pair[1]!r} networks of the task {task!r}; give one of them."
                )
            places[pair] = zoo


def _networks(zoo: Dataset, load: Callable[[tuple[int, ...]], dict[str, ImageData]]) -> list[Networks]:
    """Of each task of a zoo, which has one architecture; `load` gives what networks for inputs of a shape read of all tasks."""
    names, split, checkpoints, seeds = (list(zoo[key]) for key in ("task", "split", "checkpoint", "seed"))
    metrics = zoo["metrics"]
    last = max(checkpoint for checkpoint in checkpoints if checkpoint is not None)
    found = []
    for task in dict.fromkeys(names):
        own = [i for i, name in enumerate(names) if name == task]
        where = {part: [i for i in own if split[i] == part] for part in (*PARTS, "base")}
        where["held_out"] = [i for i in where["held_out"] if checkpoints[i] == last]
        spec, arch, provenance = get_task(task), zoo[own[0]]["arch"], zoo[own[0]]["provenance"]
        trajectory = provenance.get("single_trajectory", False)
        config = _config(arch, len(spec.labels))
        units = permutation_spec(config)
        data = load(tuple(config.input_shape))[task]
        base, *_ = [*zoo_state_dicts(zoo, where["base"]), {}]
        weights, statistics = {}, []
        for part in PARTS:
            rows, weights[part] = where[part], []
            for row in tqdm(zoo_state_dicts(zoo, rows), f"align {part} of {task}", len(rows)):
                # counters of batches, which nothing reads, are not generated; torch does without them
                state_dict = {n: t for n, t in row.items() if not n.endswith(BUFFERS if trajectory else BUFFERS[2])}
                reference = weights["train"][0] if weights["train"] else state_dict
                weights[part].append(state_dict if trajectory else align(state_dict, reference, units))
                if trajectory and part == "train":
                    statistics.append({n: t for n, t in row.items() if n.endswith(BUFFERS[:2])})
        if statistics:
            base = base | {n: torch.stack([one[n] for one in statistics]).mean(0) for n in statistics[0]}
        runs = {i if trajectory else seeds[i]: n for n, i in enumerate(where["train"])}  # their last checkpoints
        found.append(
            Networks(
                spec,
                arch["name"],
                config,
                replace(data, mean=provenance["mean"], std=provenance["std"]),
                weights,
                list(runs.values()),
                [metrics[i] for i in where["train"]],
                base,
                trajectory,
            )
        )
    return found


def _training_images(pairs: Sequence[Networks]) -> list[tuple[Tensor, Tensor] | None]:
    """What networks that read in training read, and its classes; of pairs that read the same it is in memory once."""
    known: dict[tuple, Tensor] = {}
    for pair in pairs:
        key = _reads(pair)
        if not pair.large and key not in known:
            known[key] = pair.data.inputs(pair.data.train)
    return [None if pair.large else (known[_reads(pair)], pair.data.train.labels) for pair in pairs]


def _reads(pair: Networks) -> tuple:
    return pair.spec.name, tuple(pair.config.input_shape), tuple(pair.data.mean), tuple(pair.data.std)


def features(encoder: ImageEncoder, images: Images, classes: int) -> Tensor:
    """What an encoder sees of the first images of each class: `(C, pool, F)`."""
    rows = [(images.labels == c).nonzero().flatten()[:POOL] for c in range(classes)]
    pool = min(len(own) for own in rows)
    return encoder.embed(images.pixels[torch.cat([own[:pool] for own in rows])]).unflatten(0, (classes, pool))


def of_one_shape(features: Sequence[Tensor]) -> list[Tensor]:
    """Of tasks `(C, pool, F)` as [`~training.dataset_encoder.examples`] reads them: the smallest pool of all, and zeros for absent classes."""
    pool, classes = min(own.shape[1] for own in features), max(len(own) for own in features)
    return [F.pad(own[:, :pool], (0, 0, 0, 0, 0, classes - len(own))) for own in features]


def _config(arch: Mapping, classes: int) -> TargetConfig:
    settings = {name: arch[name] for name in ("input_shape", "activation")}
    return architecture(arch["name"], classes, **settings)


def _settings(pair: Networks) -> dict:
    settings = {
        "input_shape": list(pair.config.input_shape),
        "layers": [dict(layer) for layer in pair.config.layers],
        "activation": pair.config.activation,
    }
    scale = {"image_mean": list(pair.data.mean), "image_std": list(pair.data.std)}
    return settings | (scale if len(pair.config.input_shape) == 3 else {})

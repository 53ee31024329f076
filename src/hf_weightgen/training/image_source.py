"""What the stages of D2NWG need of a zoo of small networks on images, see [`zoo.build_networks`].

One generator for all tasks of the zoo, whatever networks they have: the weights of each layout have token places of their
own. A task is asked for by prompts or by its dataset.

Notation: R rows of the zoo; C classes; F size of an image feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..targets.architectures import HEAD, TargetConfig, architecture
from ..targets.base_models import TextEncoder, weights_sha256
from ..targets.image_encoders import MOBILENET, ImageEncoder
from ..targets.stacked import stack
from ..targets.symmetry import BUFFERS, permutation_spec
from ..targets.tasks import get_task
from ..weights.permutation import align
from ..weights.tokenization import WeightTokenizer
from ..zoo.folder import load_zoo
from ..zoo.images import Images, load_images
from ..zoo.networks import keep_memory, predict_networks, predict_one_by_one
from ..zoo.schema import zoo_state_dicts
from .batches import ZooTensors
from .function_loss import NetworkLoss
from .sources import Source, known_tasks, told


TOKEN_SIZE = 64
LARGE = 65_536  # scalars of a network from which it reads images alone, and none in training
TEST_IMAGES = 1000  # that such a network is scored on
POOL = 60  # images of each class that the dataset encoder sees in training


def image_source(encoder: TextEncoder, images: ImageEncoder, zoo: str, data_root: str | None) -> Source:
    """
    Rows of each task with their hidden units matched to those of its first member (weight matching of Git Re-Basin).

    Of a trajectory, see [`zoo.trajectory`], rows may be parts of networks: they are scored with the rest from the zoo's base,
    and nothing of them is matched, since what they fit is fixed. Their statistics of batch normalisation are not generated but
    averaged: those of silent channels are so small that a generator makes some of them negative. Its rows count as runs of
    their own, as there is one run.

    Args:
        images: Sees the examples of a dataset.
    """
    keep_memory()
    dataset = load_zoo(zoo)
    names, split, checkpoints = list(dataset["task"]), list(dataset["split"]), list(dataset["checkpoint"])
    specs = [get_task(name) for name in dict.fromkeys(names)]
    configs = [_config(dataset[names.index(spec.name)]["arch"], len(spec.labels)) for spec in specs]
    of_task = {spec.name: config for spec, config in zip(specs, configs, strict=True)}
    side = configs[0].input_shape[1]
    data = load_images(specs, data_root, side)
    where = {part: [i for i, s in enumerate(split) if s == part] for part in ("train", "held_out")}
    last = max(checkpoint for checkpoint in checkpoints if checkpoint is not None)
    where["held_out"] = [i for i in where["held_out"] if checkpoints[i] == last]
    told_of = {spec.name: dataset[names.index(spec.name)]["provenance"] for spec in specs}
    for name, provenance in told_of.items():
        data[name] = replace(data[name], mean=provenance["mean"], std=provenance["std"])
    trajectory = any(provenance.get("single_trajectory", False) for provenance in told_of.values())
    bases = [i for i, part in enumerate(split) if part == "base"]
    base = dict(zip((names[i] for i in bases), zoo_state_dicts(dataset, bases), strict=True))
    first: dict[str, Mapping[str, Tensor]] = {}
    statistics: dict[str, list[Mapping[str, Tensor]]] = {spec.name: [] for spec in specs}
    weights = {}
    for part, rows in where.items():
        weights[part] = []
        for i, row in zip(rows, tqdm(zoo_state_dicts(dataset, rows), f"align {part}", len(rows)), strict=True):
            # counters of batches, which nothing reads, are not generated; torch does without them
            state_dict = {n: t for n, t in row.items() if not n.endswith(BUFFERS if trajectory else BUFFERS[2])}
            reference, units = first.setdefault(names[i], state_dict), permutation_spec(of_task[names[i]])
            weights[part].append(state_dict if trajectory else align(state_dict, reference, units))
            if trajectory and part == "train":
                statistics[names[i]].append({n: t for n, t in row.items() if n.endswith(BUFFERS[:2])})
    for name, own in statistics.items():
        if own:
            base[name] |= {n: torch.stack([one[n] for one in own]).mean(0) for n in own[0]}
    widest = max(one[HEAD[0]].shape[1] for one in first.values()) + 1  # a class's row of the head is one token
    tokenizer = WeightTokenizer.fit(weights["train"], token_size=max(TOKEN_SIZE, widest), head=HEAD)
    prompts = {spec.name: encoder.embed(spec.prompts) for spec in specs}
    labels = {
        spec.name: torch.stack([encoder.embed(wording) for wording in spec.wordings]) for spec in specs
    }  # (V, C, E)
    families = {spec.name: spec.family for spec in specs}
    parts = {
        part: ZooTensors.of(tokenizer, weights[part], [names[i] for i in rows], labels, prompts, families)
        for part, rows in where.items()
    }
    train = parts["train"]
    layouts = [int(train.layout_of[train.task_of == t][0]) for t in range(len(specs))]
    targets = [
        {"kind": "network", "config": _settings(config), "layout": layout}
        for config, layout in zip(configs, layouts, strict=True)
    ]
    known, thresholds = known_tasks(
        [told(spec) | {"target": t} for t, spec in enumerate(specs)], [[prompts[spec.name]] for spec in specs]
    )
    sizes = [sum(tensor.numel() for tensor in one.values()) for one in first.values()]
    large = trajectory or max(sizes) > LARGE
    splits = {spec.name: [data[spec.name].validation, data[spec.name].test] for spec in specs}
    if large:
        splits = {name: [split.first(TEST_IMAGES) for split in both] for name, both in splits.items()}
    inputs = {task: [data[task].inputs(split) for split in both] for task, both in splits.items()}

    def validate(state_dicts: Sequence[Mapping[str, Tensor]], task: str, part: int = 0) -> Tensor:
        networks = [base.get(task, {}) | dict(state_dict) for state_dict in state_dicts]
        if large:
            predictions = predict_one_by_one(of_task[task], networks, inputs[task][part])
        else:
            predictions = predict_networks(of_task[task], stack(networks), inputs[task][part])
        return (predictions == splits[task][part].labels).double().mean(1)

    def score(state_dicts: Sequence[Mapping[str, Tensor]], task: str) -> Tensor:
        return validate(state_dicts, task, part=1)

    seeds, runs = dataset["seed"], []
    for spec in specs:
        rows = [(i if trajectory else seeds[i], n) for n, i in enumerate(where["train"]) if names[i] == spec.name]
        runs.append(list(dict(rows).values()))  # the last checkpoint of each seed
    task_loss = None
    if not large:
        task_loss = NetworkLoss(
            tokenizer,
            train,
            list(zip(configs, layouts, strict=True)),
            [(data[s.name].inputs(data[s.name].train), data[s.name].train.labels) for s in specs],
        )
    vae_settings = {"kl_weight": 1e-3, "learns_noise": not large}
    if trajectory:  # the KL term counts in what rows differ by, which is little; and the spread is theirs, not a half
        differ = train.weight_tokens.var(0)[train.padding_mask[0]].mean().item()
        vae_settings = {"kl_weight": 1e-3 * min(1.0, differ)}
    if large:
        vae_settings["token_width"] = max(1, min(32, 500_000 // sum(sizes)))
    measured = [dataset["metrics"][i]["validation"] for i in where["train"]]
    source = Source(
        tokenizer,
        train,
        parts["held_out"],
        runs,
        targets[0],
        known,
        thresholds,
        score,
        vae_steps=1500,
        task_steps=0 if large else 6000,
        task_loss=task_loss,
        task_reconstruction=0.1,
        task_learning_rate=5e-4,
        vae_settings=vae_settings,
        max_train_steps=2000,
        samples=5 if large else 20,
        targets=targets,
        features=of_one_shape([features(images, data[spec.name].train, len(spec.labels)) for spec in specs]),
        image_encoder={
            "id": MOBILENET,
            "revision": None,
            "sha256": weights_sha256(images.model.name_or_path),
        },
        accuracies=torch.tensor([torch.nan if value is None else value for value in measured]),
        validate=validate,
    )
    for spec in specs:
        counts = splits[spec.name][1].labels.bincount()
        source.majority[spec.name] = (counts.max() / counts.sum()).item(), int(counts.sum())
        scores = [dataset["metrics"][i]["test"] for i in where["train"] if names[i] == spec.name]
        scores = [score for score in scores if score is not None]
        source.zoo_scores[spec.name] = sum(scores) / len(scores)
    return source


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


def _settings(config: TargetConfig) -> dict:
    return {
        "input_shape": list(config.input_shape),
        "layers": [dict(layer) for layer in config.layers],
        "activation": config.activation,
    }

"""Labelled sets as a frozen encoder sees them, and tasks with few examples that are drawn from them.

Encoding is what takes time: with a folder for it, every set is encoded once.

Reference: the N-way k-shot protocol of D2NWG (https://huggingface.co/papers/2402.18153), section 4.1.1.

Notation: C classes, n examples and q queries of each; F size of a feature; `pool` the most examples that a class has.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import ClassLabel, Image, Value, load_dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..targets.base_models import TextEncoder, resolve_base, weights_sha256
from ..targets.image_encoders import ImageEncoder
from ..targets.tasks import TaskSpec, get_task
from .images import ImageData, Images, load_images
from .tasks import evaluation_subset, load_tasks


PER_CLASS = 100
FEWEST = 20  # of a class: what has less is left out
FEW_CLASSES = 10
MOST_TEXTS = 2000  # of a split that a head reads, or is scored on
ALIKE = 0.5  # cosine from which two class names may mean the same


@dataclass
class FeatureSet:
    """
    Args:
        features (`torch.FloatTensor` of shape `(C, pool, F)`): Of unit length; zeros behind a class's last example.
        counts (`torch.LongTensor` of shape `(C,)`): Examples of each class.
        classes: Their names.
    """

    name: str
    features: Tensor
    counts: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.classes)


@dataclass
class EncodedTexts(ImageData):
    """
    A text task as a frozen encoder sees it: features `(n, F)` in the place of pixels, which networks read as they are.

    Args:
        encoder: SHA-256 of its weights.
    """

    encoder: str = ""

    def inputs(self, images: Images) -> Tensor:
        return images.pixels


@dataclass
class FewShotTask:
    """Features of the examples `(C, n, F)` and of the queries `(C, q, F)` of some classes of a set."""

    support: Tensor
    queries: Tensor
    classes: tuple[str, ...]


def spec_of(dataset_id: str, data_root: str | Path | None = None) -> TaskSpec:
    """
    A known task by its name, or what a labelled dataset is, read off its columns: one of class labels, and one of images or,
    first of several, of texts.

    Args:
        dataset_id: Name of a task, id on the Hub, or a folder; `id:config` names a configuration.
        data_root: Folder with datasets under their Hub ids.

    Raises:
        ValueError: If it has no such columns; write a `TaskSpec` for it.
    """
    with suppress(ValueError):
        return get_task(dataset_id)
    dataset_id, _, config = dataset_id.partition(":")
    local = Path(data_root or "") / dataset_id
    splits = load_dataset(str(local) if local.is_dir() else dataset_id, config or None)
    columns = next(iter(splits.values())).features
    labels = [name for name, kind in columns.items() if isinstance(kind, ClassLabel)]
    images = [name for name, kind in columns.items() if isinstance(kind, Image)]
    texts = [name for name, kind in columns.items() if kind == Value("string")]
    if not labels or not images + texts:
        raise ValueError(
            f"Dataset {dataset_id!r} has no column of class labels beside one of images or texts: {columns}."
        )
    return TaskSpec(
        name=Path(dataset_id).name.replace("-", "_"),
        dataset_id=dataset_id,
        config=config or None,
        label_column="label" if "label" in labels else labels[0],
        labels=tuple(columns["label" if "label" in labels else labels[0]].names),
        image_column=images[0] if images else None,
        text_columns=() if images else (texts[0],),
        test_split="test" if "test" in splits else None,
    )


def draw_task(features: FeatureSet, ways: int, shots: int, queries: int, generator: torch.Generator) -> FewShotTask:
    """
    Some classes at random and different examples of each.

    Raises:
        ValueError: If the set has fewer classes, or a class fewer examples.
    """
    if len(features) < ways or features.counts.min() < shots + queries:
        raise ValueError(
            f"A task of {ways} classes with {shots} + {queries} examples needs as many: {features.name!r} has {len(features)} "
            f"classes, of which one has {int(features.counts.min())} examples."
        )
    chosen = torch.randperm(len(features), generator=generator)[:ways]
    drawn = []
    for c in chosen.tolist():
        rows = torch.randperm(int(features.counts[c]), generator=generator)[: shots + queries]
        drawn.append(features.features[c, rows])
    examples = torch.stack(drawn)  # (C, n + q, F)
    return FewShotTask(examples[:, :shots], examples[:, shots:], tuple(features.classes[c] for c in chosen.tolist()))


def embed_sets(
    specs: Iterable[TaskSpec],
    encoder: TextEncoder | ImageEncoder,
    data_root: str | Path | None = None,
    cache: str | Path | None = None,
    split: str = "train",
    per_class: int = PER_CLASS,
    turns: bool = False,
) -> dict[str, FeatureSet]:
    """
    The sets of some tasks, all of texts or all of images.

    Args:
        specs: Loaded together, so that no test row of one of them stands in the train split of another.
        data_root: As in [`~zoo.tasks.load_tasks`].
        cache: Folder for what was encoded.
        split: `"train"` or `"test"`.
        per_class: Examples of a class that are encoded at most.
        turns: Images turned by 90, 180 and 270 degrees make further classes, of sets with at most [`FEW_CLASSES`].

    Raises:
        ValueError: If two texts make an example, or fewer than two classes have [`FEWEST`] examples.
    """
    specs = _of_one_text(specs)
    images = isinstance(encoder, ImageEncoder)
    data = (load_images if images else load_tasks)(specs, data_root)
    sets = {}
    for spec in tqdm(specs, desc=f"encode {split}", unit="set"):
        rows = getattr(data[spec.name], split)
        inputs, labels = (rows.pixels, rows.labels) if images else (rows["text"][:], torch.tensor(rows["label"][:]))
        picked = _picked(labels, len(spec.labels), per_class)
        if len(picked) < 2:
            raise ValueError(
                f"Task {spec.name!r} has fewer than two classes with {FEWEST} examples in its {split} split."
            )
        every, counts = torch.cat(list(picked.values())), [len(own) for own in picked.values()]
        chosen = inputs[every] if images else [inputs[i] for i in every.tolist()]
        classes, embedded = [spec.labels[c] for c in picked], _remembered(encoder, chosen, cache)
        if turns and images and len(picked) <= FEW_CLASSES:
            for turn in (1, 2, 3):
                turned = _remembered(encoder, chosen.rot90(turn, (2, 3)).contiguous(), cache)
                embedded = torch.cat([embedded, turned])
                classes += [f"{spec.labels[c]}, turned by {90 * turn} degrees" for c in picked]
            counts = 4 * counts
        padded = pad_sequence(embedded.split(counts), batch_first=True)
        sets[spec.name] = FeatureSet(spec.name, padded, torch.tensor(counts), tuple(classes))
    return sets


def drop_alike(
    sets: dict[str, FeatureSet], others: Iterable[TaskSpec], encoder: TextEncoder, most: float = ALIKE
) -> dict[str, FeatureSet]:
    """The sets without the classes whose name is close to that of a class of the `others`: cosine `most` or more."""
    foreign = [label for spec in others for label in spec.labels]
    if not foreign:
        return sets
    known, kept = encoder.embed(foreign), {}
    for name, one in sets.items():
        rows = (encoder.embed(one.classes) @ known.mT).amax(1) < most
        if rows.sum() > 1:
            classes = tuple(label for label, keep in zip(one.classes, rows.tolist(), strict=True) if keep)
            kept[name] = FeatureSet(name, one.features[rows], one.counts[rows], classes)
    return kept


def _picked(labels: Tensor, classes: int, per_class: int) -> dict[int, Tensor]:
    """Row numbers of each class that has enough."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = {c: order[labels[order] == c][:per_class] for c in range(classes)}
    return {c: own for c, own in rows.items() if len(own) >= FEWEST}


def load_texts(
    specs: Iterable[TaskSpec],
    encoder: TextEncoder,
    data_root: str | Path | None = None,
    cache: str | Path | None = None,
    limit: int | None = MOST_TEXTS,
) -> dict[str, EncodedTexts]:
    """
    Text tasks as images are given to networks, see [`~zoo.images.load_images`], without those that are read by none.

    Args:
        data_root, cache: As of [`embed_sets`].
        limit: Sentences of each split that are encoded at most, see [`~zoo.tasks.evaluation_subset`].

    Raises:
        ValueError: If two texts make an example.
    """
    specs = _of_one_text(specs)
    data, found, told = load_tasks(specs, data_root), {}, weights_sha256(resolve_base(encoder.model.name_or_path))
    for spec in tqdm(specs, desc="encode", unit="task"):
        own, parts = data[spec.name], []
        for rows in (own.train, own.validation, own.test):
            rows = evaluation_subset(rows, limit)
            seen = _remembered(encoder, rows["text"][:], cache)
            parts.append(Images(seen, torch.tensor(rows["label"][:]), [b""] * len(rows)))
        found[spec.name] = EncodedTexts(spec, *parts, [], [], own.removed_duplicates, own.data_revision, told)
    return found


def _of_one_text(specs: Iterable[TaskSpec]) -> list[TaskSpec]:
    specs = list(specs)
    pairs = [spec.name for spec in specs if spec.is_pair]
    if pairs:
        raise ValueError(f"Task {pairs[0]!r} has two texts per example, a frozen encoder reads one.")
    return specs


def _remembered(encoder: TextEncoder | ImageEncoder, inputs: Tensor | list[str], cache: str | Path | None) -> Tensor:
    """Features `(N, F)`, in float16 on disk under a name that depends on the encoder and on what it reads."""
    if cache is None:
        return encoder.embed(inputs)
    content = inputs.numpy().tobytes() if isinstance(inputs, Tensor) else "\0".join(inputs).encode()
    told = f"{encoder.model.name_or_path}|{getattr(inputs, 'shape', len(inputs))}".encode()
    file = Path(cache) / f"{hashlib.blake2b(told + content, digest_size=12).hexdigest()}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:  # of this process alone
            save_file({"features": encoder.embed(inputs).half()}, Path(temporary) / file.name)
            os.replace(Path(temporary) / file.name, file)
    return F.normalize(load_file(file)["features"].float(), dim=-1)

"""The data of image tasks: splits as for texts, see [`zoo.tasks`], with pixels in the place of words.

Images with equal pixels have one key, go together, and stand in no train split if they stand in the test or validation
split of any task at hand.

Notation used for shapes: n images of C channels, H x W pixels.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..targets.tasks import TaskSpec
from .tasks import open_dataset, separate


@dataclass
class Images:
    """Pixels `(n, C, H, W)` from 0 to 255, class ids `(n,)`, and a key for each image."""

    pixels: Tensor
    labels: Tensor
    keys: list[bytes]

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: Iterable[bool]) -> "Images":
        rows = torch.tensor(list(keep), dtype=torch.bool)
        return Images(
            self.pixels[rows], self.labels[rows], [k for k, kept in zip(self.keys, rows.tolist(), strict=True) if kept]
        )

    def first(self, count: int) -> "Images":
        return self.where(i < count for i in range(len(self)))


@dataclass
class ImageData:
    """
    The images of one task.

    Args:
        mean, std: Of each channel over the training images, from 0 to 1.
        removed_duplicates, data_revision: As in [`~zoo.tasks.TaskData`].
    """

    spec: TaskSpec
    train: Images
    validation: Images
    test: Images
    mean: list[float]
    std: list[float]
    removed_duplicates: int
    data_revision: str

    def inputs(self, images: Images) -> Tensor:
        """Standardised pixels `(n, C, H, W)`, what networks read."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images.pixels.float() / 255 - mean) / std


def load_images(
    specs: Iterable[TaskSpec],
    data_root: str | Path | None = None,
    side: int | None = None,
    channels: int | None = None,
) -> dict[str, ImageData]:
    """
    Reads, splits and de-duplicates the datasets of all specs.

    Args:
        data_root: As in [`~zoo.tasks.load_tasks`].
        side: Height and width to which images are resized (bilinear). Default: as they are.
        channels: 1 or 3. Default: 1 if the first image of a split is grey, else 3.

    Raises:
        FileNotFoundError, ValueError: As [`~zoo.tasks.load_tasks`], and if a spec has no `image_column`.
    """
    specs, read, revisions = list(specs), {}, {}
    for spec in specs:
        if spec.image_column is None:
            raise ValueError(f"Task {spec.name!r} has texts, not images; see `load_tasks`.")
        splits, commit = open_dataset(spec, data_root)
        parts = [_images(spec, name, splits, side, channels) for name in (spec.train_split, spec.test_split) if name]
        digest = hashlib.blake2b(b"".join(key for part in parts for key in part.keys), digest_size=16)
        revisions[spec.name] = commit or f"content:{digest.hexdigest()}"
        read[spec.name] = parts[0], parts[1] if len(parts) > 1 else None
    tasks, separated = {}, separate(specs, read)
    for spec in specs:
        train, validation, test, removed = separated[spec.name]
        pixels = train.pixels.float().div(255).movedim(1, 0).flatten(1)  # (C, n H W)
        mean = [round(value, 4) for value in pixels.mean(1).tolist()]
        std = [round(max(value, 1e-4), 4) for value in pixels.std(1).tolist()]
        tasks[spec.name] = ImageData(spec, train, validation, test, mean, std, removed, revisions[spec.name])
    return tasks


def _images(spec: TaskSpec, split: str, splits, side: int | None, channels: int | None) -> Images:
    if split not in splits:
        raise ValueError(
            f"Task {spec.name!r}: dataset {spec.dataset_id!r} has no split {split!r}, only {list(splits)}."
        )
    dataset: Dataset = splits[split]
    for column in (spec.image_column, spec.label_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"Task {spec.name!r}: dataset {spec.dataset_id!r} has no column {column!r} in split {split!r}, only "
                f"{dataset.column_names}; set `image_column` and `label_column` of the spec accordingly."
            )
    labels = torch.tensor(dataset[spec.label_column][:])
    if labels.min() < 0 or labels.max() >= len(spec.labels):
        raise ValueError(
            f"Task {spec.name!r}: split {split!r} has labels from {labels.min()} to {labels.max()}, the spec names "
            f"{len(spec.labels)} classes."
        )
    pixels, keys = [], []
    for image in dataset[spec.image_column]:
        channels = channels or (1 if image.mode in ("L", "1") else 3)
        image = image.convert("L" if channels == 1 else "RGB")
        keys.append(hashlib.blake2b(image.tobytes(), digest_size=16).digest())
        pixels.append(np.asarray(image if side is None else image.resize((side, side), Image.Resampling.BILINEAR)))
    if len({image.shape for image in pixels}) > 1:
        raise ValueError(
            f"Task {spec.name!r}: its images have different sizes; give `side`, to which they are resized."
        )
    stacked = torch.from_numpy(np.stack(pixels))
    return Images(stacked[:, None] if channels == 1 else stacked.movedim(-1, 1).contiguous(), labels, keys)

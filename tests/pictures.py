"""Small image datasets and an image encoder for tests, written as the Hub keeps them."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import MobileNetV1Config, MobileNetV1Model

from hf_weightgen.targets.tasks import TaskSpec


def images(count: int, seed: int, mode: str = "L", side: int = 8) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    shape = (count, side, side) if mode == "L" else (count, side, side, 3)
    return [Image.fromarray(pixels, mode) for pixels in draw.integers(0, 256, shape, dtype=np.uint8)]


def in_two_tones(pictures: list[Image.Image]) -> list[Image.Image]:
    """Dark and light ones in turn, as [`write`] labels them."""
    return [p.point(lambda v, low=128 * (i % 2): low + v // 2) for i, p in enumerate(pictures)]


def write(folder: Path, **splits: list[Image.Image]) -> TaskSpec:
    """A dataset in Parquet with two classes in turn, and its spec."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["dark", "light"])})
    for split, pictures in splits.items():
        columns = {"image": pictures, "label": [i % 2 for i in range(len(pictures))]}
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-0.parquet")
    test = "test" if "test" in splits else None
    return TaskSpec(folder.name, str(folder), "label", ("dark", "light"), image_column="image", test_split=test)


def image_encoder(folder: Path) -> Path:
    """A MobileNet with random weights, which reads images of 32 x 32."""
    torch.manual_seed(0)
    folder = folder / "encoder"
    MobileNetV1Model(MobileNetV1Config(depth_multiplier=0.25, image_size=32, initializer_range=0.3)).save_pretrained(
        folder
    )
    sides = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(sides | {"image_processor_type": "MobileNetV1ImageProcessor"})
    )
    return folder

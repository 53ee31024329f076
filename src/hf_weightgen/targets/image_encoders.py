"""Frozen image encoders by id: what a dataset of images looks like to a generator."""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from .base_models import PROCESSORS, named, quiet_loading, resolve_base


MOBILENET = "google/mobilenet_v1_0.75_224"


class ImageEncoder:
    """
    A frozen encoder whose pooled features have unit length. It is no pipeline component, so that it is never saved into a
    generator.

    Args:
        model (`PreTrainedModel`): Its output has `pooler_output` (or it has `get_image_features`, as CLIP). Set to evaluation.
        processor: Its image processor.
    """

    def __init__(self, model: PreTrainedModel, processor):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image] | Tensor, batch_size: int = 16) -> Tensor:
        """
        Args:
            images: Pictures, or `torch.ByteTensor` of shape `(n, 1 or 3, H, W)`.

        Returns:
            `torch.FloatTensor` of shape `(n, F)`: rows of unit length.
        """
        rows = []
        for start in range(0, len(images), batch_size):
            pictures = [_picture(image) for image in images[start : start + batch_size]]
            inputs = self.processor(pictures, return_tensors="pt").to(self.model.device)
            if hasattr(self.model, "get_image_features"):
                features = self.model.get_image_features(**inputs)
                features = getattr(features, "pooler_output", features)
            else:
                features = self.model(**inputs).pooler_output
            rows.append(F.normalize(features.flatten(1).float(), dim=-1))
        return torch.cat(rows)


def _picture(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Tensor):
        pixels = image.movedim(0, -1).numpy()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return image.convert("RGB")


def load_image_encoder(
    model_id: str | os.PathLike | ImageEncoder = MOBILENET,
    revision: str | None = None,
    local_files_only: bool | None = None,
    sha256: str | None = None,
) -> ImageEncoder:
    """
    Loads a frozen image encoder in float32, any `AutoModel` with pooled features; a given one comes back as it is. See
    [`~targets.base_models.resolve_base`].
    """
    if isinstance(model_id, ImageEncoder):
        return model_id
    folder = resolve_base(model_id, revision, local_files_only, sha256, needs=PROCESSORS)
    with quiet_loading():
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return ImageEncoder(named(model, model_id), processor)

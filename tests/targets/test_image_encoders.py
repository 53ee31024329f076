"""Frozen image encoders: the same picture has the same features in every form, and what cannot be loaded is told."""

import pytest
import torch

from hf_weightgen.targets.image_encoders import load_image_encoder
from pictures import image_encoder, images


def test_pictures_and_pixels_have_the_same_features_of_unit_length(tmp_path):
    encoder = load_image_encoder(image_encoder(tmp_path))
    pictures = images(5, 0, mode="RGB")
    pixels = torch.stack([torch.tensor(list(p.tobytes()), dtype=torch.uint8).view(8, 8, 3) for p in pictures])
    features = encoder.embed(pictures, batch_size=2)
    assert len(features) == 5
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(encoder.embed(pixels.movedim(-1, 1)), features)
    grey = images(2, 1)
    torch.testing.assert_close(encoder.embed(grey), encoder.embed([p.convert("RGB") for p in grey]))


def test_a_given_encoder_comes_back_as_it_is(tmp_path):
    encoder = load_image_encoder(image_encoder(tmp_path))
    assert load_image_encoder(encoder) is encoder
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_a_folder_without_a_processor_is_refused(tmp_path):
    folder = image_encoder(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor"):
        load_image_encoder(folder)

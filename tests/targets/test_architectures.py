"""Networks read images as those of their training set were read."""

import PIL.Image
import pytest
import torch

from hf_weightgen.targets.architectures import TargetConfig, TargetModel, cnn
from hf_weightgen.zoo.images import load_images
from pictures import images, write


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_images_are_read_as_the_zoo_reads_them(tmp_path, mode, channels):
    pictures = images(40, 0, mode)
    spec = write(tmp_path / "set", train=pictures[:30], test=pictures[30:])
    data = load_images([spec], side=6)[spec.name]
    config = TargetConfig(input_shape=[channels, 6, 6], layers=[], image_mean=data.mean, image_std=data.std)
    model, expected = TargetModel(config), data.inputs(data.test)
    torch.testing.assert_close(model.preprocess(pictures[30:]), expected)
    assert model(expected).logits.shape == (10, 10)
    as_bytes = [
        torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(8, 8, channels) for p in pictures[30:]
    ]
    torch.testing.assert_close(model.preprocess([one.movedim(-1, 0) for one in as_bytes]), expected)
    other = images(2, 1, "RGB" if mode == "L" else "L", side=11)
    assert model.preprocess(other).shape == (2, channels, 6, 6)


def test_without_mean_and_std_images_are_refused():
    with pytest.raises(ValueError, match="no `image_mean`"):
        TargetModel(TargetConfig(input_shape=[1, 6, 6], layers=[])).preprocess(images(1, 0))


def test_pictures_without_bytes_are_refused():
    config = TargetConfig(input_shape=[1, 6, 6], layers=[], image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ValueError, match="mode 'I;16' has no bytes"):
        TargetModel(config).preprocess([PIL.Image.new("I;16", (6, 6))])


@pytest.mark.parametrize("layers", [cnn((4, 4), (5, 5), (True, True), (8,)), [{"kind": "max_pool"}] * 3])
def test_layers_that_leave_no_pixel_are_named(layers):
    with pytest.raises(ValueError, match=r"leaves nothing of what it reads, \["):
        TargetModel(TargetConfig(input_shape=[1, 4, 4], layers=layers))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5]},
        {"image_mean": [0.5], "image_std": [0.1]},
        {"image_mean": [0.5] * 3, "image_std": [0.1, 0.1, 0.0]},
        {"image_mean": [float("nan")] * 3, "image_std": [0.1] * 3},
        {"input_shape": [3], "image_mean": [0.5] * 3, "image_std": [0.1] * 3},
    ],
)
def test_mean_and_std_must_fit(settings):
    with pytest.raises(ValueError, match="`image_mean` and `image_std`"):
        TargetConfig(**{"input_shape": [3, 6, 6], "layers": []} | settings)

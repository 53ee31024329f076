"""Image tasks: splits by pixels, no image of one split in another, inputs as networks read them."""

import numpy as np
import pytest
import torch

from hf_weightgen.targets.tasks import IMAGE_TASKS, TaskSpec, get_task
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.tasks import load_tasks
from pictures import images, write


def keys(images) -> set[bytes]:
    return set(images.keys)


def test_no_image_of_one_split_stands_in_another(tmp_path):
    shared = images(5, 0)
    first = write(tmp_path / "first", train=images(100, 1) + shared, test=images(20, 2) + shared[:2])
    second = write(tmp_path / "second", train=images(60, 3) + shared, test=images(10, 4) + shared[2:4])
    data = load_images([first, second])
    held_out = set().union(*(keys(part) for task in data.values() for part in (task.validation, task.test)))
    assert all(not keys(task.train) & held_out for task in data.values())
    assert len(data["first"].test) == 22 and data["first"].removed_duplicates >= 4
    assert not set().union(*(keys(task.validation) for task in data.values())) & set().union(
        *(keys(task.test) for task in data.values())
    )
    assert 0 < len(data["first"].validation) <= 0.15 * 105 + 1


def test_splits_depend_on_pixels_alone(tmp_path):
    pictures = images(80, 1)
    forward, backward = write(tmp_path / "a", train=pictures), write(tmp_path / "b", train=pictures[::-1])
    first, second = (load_images([spec])[spec.name] for spec in (forward, backward))
    for part in ("train", "validation", "test"):
        assert keys(getattr(first, part)) == keys(getattr(second, part))
    assert len(first.test) == 16 and first.data_revision != second.data_revision


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_inputs_are_standardised_pixels(tmp_path, mode, channels):
    pictures = images(60, 5, mode)
    data = load_images([write(tmp_path / "task", train=pictures, test=images(9, 6, mode))])["task"]
    inputs = data.inputs(data.train)
    assert inputs.shape == (len(data.train), channels, 8, 8) and data.test.pixels.dtype == torch.uint8
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3)), torch.ones(channels), atol=1e-3, rtol=0)
    expected = np.asarray(images(9, 6, mode)[4]).reshape(8, 8, channels).transpose(2, 0, 1)
    assert np.array_equal(data.test.pixels[4].numpy(), expected) and data.test.labels.tolist() == [0, 1] * 4 + [0]


def test_images_are_resized_and_made_grey(tmp_path):
    spec = write(tmp_path / "task", train=images(30, 7, "RGB", 12), test=images(5, 8, "RGB", 10))
    data = load_images([spec], side=6, channels=1)["task"]
    assert data.train.pixels.shape[1:] == data.test.pixels.shape[1:] == (1, 6, 6)


def test_faults_name_the_task(tmp_path):
    spec = write(tmp_path / "task", train=images(30, 7), test=images(5, 8))
    text = TaskSpec("films", "acme/films", "label", ("a", "b"), ("text",))
    odd = write(tmp_path / "odd", train=[*images(20, 1), *images(3, 2, side=9)], test=images(5, 3))
    wrong = [
        (text, "'films' has texts, not images"),
        (
            TaskSpec("task", spec.dataset_id, "label", spec.labels, image_column="img"),
            "no column 'img'.*'image', 'label'",
        ),
        (
            TaskSpec("task", spec.dataset_id, "label", spec.labels, image_column="image", test_split="dev"),
            "no split 'dev'",
        ),
        (odd, "'odd': its images have different sizes; give `side`"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            load_images([given])
    with pytest.raises(ValueError, match="'task' has images, not texts"):
        load_tasks([spec])
    with pytest.raises(ValueError, match="`image_column` or `text_columns`, not both"):
        TaskSpec("x", "x", "label", ("a", "b"), ("text",), image_column="image")


def test_bundled_image_tasks_are_known_by_name():
    assert {"mnist", "fashion_mnist", "svhn", "cifar10"} == IMAGE_TASKS.keys()
    for name, spec in IMAGE_TASKS.items():
        assert get_task(name) is spec and len(spec.labels) == 10 and len(spec.held_out_prompts) == 10

"""What a user may hand over as a dataset."""

import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_weightgen.pipelines.examples import MOST_EXAMPLES, examples_of
from pictures import images


def rows(pictures: list, labels: list[int], **more) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "owl"])})
    return Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def test_all_forms_give_the_same_examples():
    pictures = images(4, 0)
    by_class = {"cat": [pictures[0], pictures[3]], "dog": [pictures[1]], "owl": [pictures[2]]}
    pairs = [(pictures[i], name) for i, name in ((0, "cat"), (1, "dog"), (2, "owl"), (3, "cat"))]
    for dataset in (by_class, pairs, rows(pictures, [0, 1, 2, 0])):
        names, examples = examples_of(dataset)
        assert names == ["cat", "dog", "owl"]
        assert [[e.tobytes() for e in own] for own in examples] == [
            [e.tobytes() for e in own] for own in by_class.values()
        ]


def test_texts_and_pixels_are_examples_and_no_more_than_needed_are_read():
    names, examples = examples_of({"good": ["fine"] * 100, "bad": ["poor", "dull"]})
    assert names == ["good", "bad"] and [len(own) for own in examples] == [MOST_EXAMPLES, 2]
    pixels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    assert examples_of({"a": [pixels], "b": [pixels]})[1] == [[pixels], [pixels]]
    assert examples_of(rows(images(3, 0), [2, 0, 2]))[0] == ["cat", "owl"]  # a class without a row is none


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("cats", "must be a mapping .* got str"),
        (5, "must be a mapping .* got int"),
        ({"a": ["x"]}, "at least 2 classes, got \\['a'\\]"),
        ({"a": ["x"], "b": []}, "no example of class 'b'"),
        ({"a": ["x"], "b": [torch.zeros(1, 4, 4, dtype=torch.uint8)]}, "mixes images and texts"),
        ({"a": [torch.zeros(1, 4, 4)], "b": ["x"]}, "tensor of bytes .* got Tensor \\(1, 4, 4\\)"),
        ({"a": "good film", "b": ["x"]}, "a list of examples of class 'a', got str"),
        ({"a": images(1, 0)[0], "b": ["x"]}, "a list of examples of class 'a', got Image"),
        ({"a": None, "b": ["x"]}, "a list of examples of class 'a', got NoneType"),
        ({1: ["x"], "1": ["y"], 2: ["z"]}, "names the class '1' twice"),
        ([("x", torch.tensor(0)), ("y", torch.tensor(1))], "texts or whole numbers, got 'tensor\\(0\\)' of Tensor"),
        ([("x", None), ("y", "b")], "texts or whole numbers, got 'None'"),
        ({"a": [PIL.Image.new("I;16", (2, 2))], "b": images(1, 0)}, "mode 'I;16' has no bytes"),
        ({"a": [PIL.Image.new("L", (0, 2))], "b": images(1, 0)}, "picture of 0 x 2 has no pixels"),
        ({"a": [PIL.Image.new("F", (2, 2))], "b": images(1, 0)}, "mode 'F' has no bytes"),
        (["a", "b"], "pairs \\(example, label\\), got 'a'"),
        (DatasetDict(test=Dataset.from_dict({"text": ["a"]})), "has the splits \\['test'\\]; give one of them"),
        (Dataset.from_dict({"text": ["a"], "label": [0]}), "one column of class labels and one of images or texts"),
    ],
)
def test_what_is_no_dataset_is_refused(dataset, message):
    with pytest.raises((TypeError, ValueError), match=message):
        examples_of(dataset)


def test_texts_of_a_dataset_are_found():
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    assert examples_of(dataset) == (["no", "yes"], [["b"], ["a"]])

"""A dataset that a user hands over, as examples by class.

Notation: C classes.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value
from PIL.Image import Image as Picture
from torch import Tensor

from ..targets.architectures import check_picture


MOST_EXAMPLES = 32  # of a class that are read: more cost time and add little


def examples_of(dataset: object) -> tuple[list[str], list[list]]:
    """
    Args:
        dataset: Examples by class, `{"cat": [image, ...], "dog": [...]}`; or a `datasets.Dataset` with a column of class labels
            and one of images or texts; or pairs `(example, label)`.

    Returns:
        The C class names, and the examples of each: pictures, texts, pixels `(channels, height, width)` from 0 to 255, or
        features `(F,)` that the generator's frozen encoder made of them.

    Raises:
        TypeError, ValueError: If it is none of these, a class has no example, or images and texts are mixed.
    """
    if isinstance(dataset, DatasetDict):
        raise TypeError(f"`dataset` has the splits {list(dataset)}; give one of them, such as `dataset['train']`.")
    if isinstance(dataset, Dataset):
        by_class = _of_dataset(dataset)
    elif isinstance(dataset, Mapping):
        by_class = {}
        for name, examples in dataset.items():
            if isinstance(examples, (str, Picture)) or not isinstance(examples, Iterable):
                raise TypeError(
                    f"`dataset` must have a list of examples of class {name!r}, got {type(examples).__name__}."
                )
            if _name_of(name) in by_class:
                raise ValueError(f"`dataset` names the class {_name_of(name)!r} twice; classes need different names.")
            by_class[_name_of(name)] = list(itertools.islice(examples, MOST_EXAMPLES))
    elif isinstance(dataset, Sequence) and not isinstance(dataset, str):
        by_class = {}
        for pair in dataset:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise TypeError(f"`dataset` must hold pairs (example, label), got {str(pair)[:60]!r}.")
            own = by_class.setdefault(_name_of(pair[1]), [])
            if len(own) < MOST_EXAMPLES:
                own.append(pair[0])
    else:
        raise TypeError(
            f"`dataset` must be a mapping of class names to examples, a `datasets.Dataset`, or pairs, got {type(dataset).__name__}."
        )
    if len(by_class) < 2:
        raise ValueError(f"`dataset` must have examples of at least 2 classes, got {list(by_class)}.")
    empty = [name for name, examples in by_class.items() if not examples]
    if empty:
        raise ValueError(f"`dataset` has no example of class {empty[0]!r}; give at least one, or leave the class out.")
    kinds = {_kind(example) for examples in by_class.values() for example in examples}
    if len(kinds) > 1:
        raise TypeError(f"`dataset` mixes {' and '.join(sorted(kinds))}; give examples of one kind.")
    return list(by_class), list(by_class.values())


def channels_of(examples: Sequence[Sequence]) -> int | None:
    """Of the images among examples by class: 1 if all of them are grey, 3 if one has colours; `None` if they are no images."""
    flat = [example for own in examples for example in own]
    if _kind(flat[0]) != "images":
        return None
    grey = (len(one) == 1 if isinstance(one, Tensor) else one.mode[0] in "1LIF" and one.mode != "LAB" for one in flat)
    return 1 if all(grey) else 3


def _of_dataset(dataset: Dataset) -> dict[str, list]:
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    inputs = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    inputs = inputs or [name for name, feature in dataset.features.items() if feature == Value("string")]
    if len(labels) != 1 or len(inputs) != 1:
        raise ValueError(
            "`dataset` must have one column of class labels and one of images or texts, got "
            f"{ {name: type(feature).__name__ for name, feature in dataset.features.items()} }; select its columns, or give "
            "examples by class."
        )
    names = dataset.features[labels[0]].names
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(dataset[labels[0]]):
        if label is not None and label >= 0 and len(rows.setdefault(label, [])) < MOST_EXAMPLES:
            rows[label].append(row)
    return {names[label]: dataset[rows[label]][inputs[0]] for label in sorted(rows)}


def _name_of(label: object) -> str:
    if isinstance(label, bool) or not isinstance(label, (str, Integral)):
        raise TypeError(
            f"Classes of `dataset` must be texts or whole numbers, got {str(label)[:60]!r} of {type(label).__name__}."
        )
    return str(label)


def _kind(example: object) -> str:
    if isinstance(example, str):
        return "texts"
    if isinstance(example, Picture):
        check_picture(example)
        return "images"
    if isinstance(example, Tensor) and example.dtype == torch.uint8 and example.dim() == 3 and len(example) in (1, 3):
        return "images"
    if isinstance(example, Tensor) and example.is_floating_point() and example.dim() == 1:
        return "features"
    raise TypeError(
        "An example must be a text, a picture, a tensor of bytes (1 or 3, height, width), or a vector of features, got "
        f"{type(example).__name__} {tuple(getattr(example, 'shape', ()))}."
    )

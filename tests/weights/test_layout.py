import json

import pytest
import torch

from hf_weightgen.weights.layout import Layout, LayoutMismatchError, TensorSpec


HEAD = ["classifier.weight", "classifier.bias"]


def checkpoint(num_classes=3):
    return {
        "z.weight": torch.zeros(4, 5),
        "a.steps": torch.tensor(7),
        "classifier.weight": torch.zeros(num_classes, 4),
        "classifier.bias": torch.zeros(num_classes),
        "empty": torch.zeros(0, 2, dtype=torch.bfloat16),
    }


def test_a_layout_keeps_the_order_and_leaves_the_class_axis_open():
    layout = Layout.of(checkpoint(), head=HEAD)
    assert layout.tensors == (
        TensorSpec("z.weight", (4, 5), "float32", False),
        TensorSpec("a.steps", (), "int64", False),
        TensorSpec("classifier.weight", (-1, 4), "float32", True),
        TensorSpec("classifier.bias", (-1,), "float32", True),
        TensorSpec("empty", (0, 2), "bfloat16", False),
    )
    assert layout.head == tuple(HEAD)
    assert layout == Layout.of(checkpoint(77), head=HEAD)
    assert layout.tensors[2].shape_for(77) == (77, 4)
    assert layout.tensors[4].torch_dtype == torch.bfloat16


def test_a_json_file_with_sorted_keys_gives_the_same_layout_back():
    layout = Layout.of(checkpoint(), head=HEAD)
    text = json.dumps({"layout": layout.to_list()}, sort_keys=True)
    assert Layout.from_list(json.loads(text)["layout"]) == layout


def test_num_classes():
    layout = Layout.of(checkpoint(), head=HEAD)
    assert layout.num_classes(checkpoint(5)) == 5
    assert Layout.of(checkpoint()).num_classes(checkpoint(5)) == 0
    with pytest.raises(LayoutMismatchError, match="one class count.*'classifier.weight': 3, 'classifier.bias': 4"):
        layout.check(checkpoint() | {"classifier.bias": torch.zeros(4)})


def test_check_accepts_other_class_counts_and_another_order():
    layout = Layout.of(checkpoint(), head=HEAD)
    layout.check(checkpoint(9))
    layout.check(dict(reversed(checkpoint().items())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z.weight": torch.zeros(5, 4)}, r"'z.weight': expected float32\[4, 5\], .* has float32\[5, 4\]"),
        ({"z.weight": torch.zeros(4, 5).half()}, r"'z.weight': expected float32\[4, 5\], .* has float16\[4, 5\]"),
        ({"classifier.bias": torch.zeros(3, 1)}, r"'classifier.bias': expected float32\[C\], .* has float32\[3, 1\]"),
        ({"classifier.bias": torch.zeros(())}, r"'classifier.bias': expected float32\[C\], .* has float32\[\]"),
        ({"new": torch.ones(1)}, r"'new': the checkpoint has float32\[1\], but the layout has no such tensor"),
        ({"a.steps": None}, r"'a.steps': expected int64\[\], but the checkpoint has no such tensor"),
    ],
)
def test_check_names_the_tensor_what_came_and_what_was_expected(change, message):
    changed = {name: tensor for name, tensor in (checkpoint() | change).items() if tensor is not None}
    with pytest.raises(LayoutMismatchError, match=message):
        Layout.of(checkpoint(), head=HEAD).check(changed)


def test_check_counts_further_differences():
    with pytest.raises(LayoutMismatchError, match=r"'z.weight'.*\(4 more tensors differ\)"):
        Layout.of(checkpoint(), head=HEAD).check({})


def test_bad_heads_are_refused():
    with pytest.raises(LayoutMismatchError, match="'score.weight' is not in the checkpoint"):
        Layout.of(checkpoint(), head=["score.weight"])
    with pytest.raises(LayoutMismatchError, match="'a.steps' is a scalar"):
        Layout.of(checkpoint(), head=["a.steps"])
    with pytest.raises(TypeError, match=r"write \['classifier.bias'\]"):
        Layout.of(checkpoint(), head="classifier.bias")


def test_a_name_stands_once():
    twice = TensorSpec("w", (1,), "float32")
    with pytest.raises(ValueError, match=r"got \['w'\] more than once"):
        Layout((twice, twice))

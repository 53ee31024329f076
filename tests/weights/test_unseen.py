"""Layouts that no checkpoint has borrow the scale of the tensors that are most like theirs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.targets.architectures import HEAD, TargetConfig, TargetModel, mlp
from hf_weightgen.weights.layout import Layout
from hf_weightgen.weights.tokenization import WeightTokenizer
from hf_weightgen.weights.unseen import with_layout


def network(*hidden: int) -> dict[str, torch.Tensor]:
    return TargetModel(TargetConfig(input_shape=[9], layers=mlp(*hidden), num_classes=4)).state_dict()


def tokenizer_of(*networks) -> WeightTokenizer:
    return WeightTokenizer.fit(networks, token_size=80, head=HEAD)


def scales(tokenizer: WeightTokenizer, layout: int) -> dict[str, tuple[float, float]]:
    return {entry["name"]: (entry["mean"], entry["std"]) for entry in tokenizer.to_dict()["layouts"][layout]}


def test_a_known_layout_stays_as_it_is():
    tokenizer = tokenizer_of(network(5), network(6, 7))
    again, number = with_layout(tokenizer, Layout.of(network(6, 7), HEAD))
    assert again is tokenizer and number == 1


@given(widths=st.lists(st.integers(1, 40), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_known_layouts_keep_their_numbers_and_new_ones_come_after_them(widths):
    tokenizer, new = tokenizer_of(network(41)), network(*widths)
    wider, number = with_layout(tokenizer, Layout.of(new, HEAD))
    assert number == 1 and wider.layouts[0] == tokenizer.layouts[0] and scales(wider, 0) == scales(tokenizer, 0)
    features = wider([new])
    assert features["layout_ids"].tolist() == [1]
    (decoded,) = wider.decode(features["weight_tokens"], [1], [4])
    for name, tensor in new.items():
        torch.testing.assert_close(decoded[name], tensor)


def test_sums_over_more_inputs_keep_their_mean_and_variance():
    known = network(16)
    tokenizer = tokenizer_of({name: tensor + 0.5 for name, tensor in known.items()}, known)
    wider, number = with_layout(tokenizer, Layout.of(network(64), HEAD))
    before, after = scales(tokenizer, 0), scales(wider, number)
    assert after["hidden.weight"] == before["hidden.weight"]  # it has as many inputs
    (mean, std), (own_mean, own_std) = before["head.weight"], after["head.weight"]
    assert own_mean == pytest.approx(mean / 4) and own_std == pytest.approx(std / 2)
    assert after["hidden.bias"] == before["hidden.bias"] and after["head.bias"] == before["head.bias"]


def test_the_scale_is_that_of_the_tensor_at_the_same_depth():
    early, late = network(8, 8), {}
    for name, tensor in early.items():
        late[name] = tensor * (100 if name == "hidden2.weight" else 1)
    wider, number = with_layout(tokenizer_of(late), Layout.of(network(9, 9), HEAD))
    found, known = scales(wider, number), scales(wider, 0)
    assert found["hidden1.weight"][1] == known["hidden1.weight"][1]
    assert found["hidden2.weight"][1] == pytest.approx(known["hidden2.weight"][1] * (8 / 9) ** 0.5)


def test_tensors_of_a_kind_that_nobody_has_are_told():
    layout = Layout.of({"conv.weight": torch.zeros(2, 2, 3), "head.weight": torch.zeros(4, 2)}, ["head.weight"])
    with pytest.raises(ValueError, match="Tensor 'conv.weight' is .*: no network that this generator knows"):
        with_layout(tokenizer_of(network(5)), layout)

"""Which networks a task has, and what a generator is told of them."""

import pytest
import torch
import torch.nn.functional as F

from hf_weightgen.targets.architectures import ACTIVATION, cnn, mlp
from hf_weightgen.targets.mixed import (
    architecture_codes,
    nearest_resizable,
    shapes_in_order,
    target_number,
    target_numbers,
    with_architecture,
)


TARGETS = [{"kind": "module", "words": name[:3], "name": name} for name in ("lenet", "cnn2", "lenet", "cnn3")]
ONE, TWO = {"name": "one", "target": 1}, {"name": "two", "targets": [2, 3]}


def test_a_task_has_one_network_or_several():
    assert [target_numbers(task) for task in ({"name": "old"}, ONE, TWO)] == [[0], [1], [2, 3]]
    assert [target_number(TARGETS, task) for task in (ONE, TWO)] == [1, 2]  # the first is the default
    assert target_number(TARGETS, ONE, "cnn2") == 1 and target_number(TARGETS, TWO, "cnn3") == 3
    with pytest.raises(
        ValueError,
        match=r"task 'two' must be one of \['lenet', 'cnn3'\], got 'cnn2', which other tasks have \(network: cnn\)",
    ):
        target_number(TARGETS, TWO, "cnn2")
    with pytest.raises(ValueError, match=r"task 'two' must be one of \['lenet', 'cnn3'\], got 'vgg'\.$"):
        target_number(TARGETS, TWO, "vgg")
    with pytest.raises(ValueError, match="must be none"):
        target_number([{"kind": "adapter"}], {"name": "old"}, "lenet")


def test_codes_are_those_of_architectures_and_only_where_a_task_has_several():
    assert architecture_codes(TARGETS, [ONE, {"name": "other", "target": 3}], 8) is None
    codes = architecture_codes(TARGETS, [ONE, TWO], 8)
    assert torch.equal(codes, torch.eye(8)[[0, 1, 0, 2]])
    with pytest.raises(ValueError, match="size 2 .* got 3"):
        architecture_codes(TARGETS, [ONE, TWO], 2)


def test_prompt_and_architecture_count_alike():
    embeds, codes = F.normalize(torch.randn(3, 8), dim=-1), torch.eye(8)[:3]
    assert with_architecture(embeds, None) is embeds
    both = with_architecture(embeds, codes)
    torch.testing.assert_close((both * embeds).sum(-1), (both * codes).sum(-1))
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(3))
    assert torch.equal(with_architecture(torch.zeros(3, 8), codes), codes)


def target(layers, activation="tanh", shape=(1, 8, 8)) -> dict:
    return {"kind": "network", "config": {"input_shape": list(shape), "layers": layers, "activation": activation}}


def test_networks_are_resized_from_the_nearest_one_that_differs_in_sizes_alone():
    small, large = (cnn((size, 2), (3, 2), (True, False), (size,)) for size in (2, 9))
    block = {"kind": "residual", "channels": 2, "layers": [{"kind": "conv", "name": "in", "channels": 2, "kernel": 1}]}
    known = [{"kind": "adapter"}, target(small), target(large), target([*small[:1], block, *small[1:]])]
    every = range(len(known))
    assert nearest_resizable(known, every, target(cnn((3, 2), (3, 2), (True, False), (3,)))) == 1
    assert nearest_resizable(known, every, target(cnn((8, 2), (3, 2), (True, False), (9, 9)))) == 2
    assert nearest_resizable(known, [1], target(cnn((8, 2), (3, 2), (True, False), (9, 9)))) == 1
    for other in (
        target(small, "relu"),
        target(small, shape=(1, 9, 9)),
        target(cnn((3, 2), (3, 2), (False, True), (3,))),
        target(cnn((3, 2), (3, 3), (True, False), (3,))),
        target([*small, ACTIVATION]),
        target(small[:-2]),
        target(mlp(3)),
        target([*cnn((3, 2), (3, 2), (True, False), (3,))[:1], block, *small[1:]]),
        target([*small[:-1], {"kind": "linear", "name": "more", "features": 2}, ACTIVATION]),
        {"kind": "module", "words": "linear 3"},
    ):
        assert nearest_resizable(known, every, other) is None
    told = [{"stride": 1, "bias": True, **layer} if layer["kind"] == "conv" else layer for layer in small]
    assert nearest_resizable([target(told)], [0], target(small)) == 0  # defaults that one of them tells


def test_shapes_are_told_layer_by_layer_whatever_the_order_of_the_state_dict():
    layers = [
        {"kind": "linear", "name": name, "features": size} for name, size in (("net.a", 3), ("mid", 4), ("net.b", 5))
    ]
    assert shapes_in_order(target(layers, shape=(2,)), 6) == {
        "net.a.weight": (3, 2), "net.a.bias": (3,), "mid.weight": (4, 3), "mid.bias": (4,), "net.b.weight": (5, 4), "net.b.bias": (5,),
        "head.weight": (6, 5), "head.bias": (6,),
    }  # fmt: skip
    assert list(shapes_in_order(target(layers, shape=(2,)), 6))[2] == "mid.weight"

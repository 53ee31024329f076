"""Networks in other sizes compute what they did: exactly where no layer is narrower, and where copies become one again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.targets.architectures import TargetConfig, TargetModel, cnn, mlp
from hf_weightgen.weights.resize import _clusters, resizable, resized
from tiny import random


MAPS = (True, True)  # pooled
UNITS = st.integers(1, 7)


def network(channels, hidden, activation="relu", shape=(2, 12, 12), kernels=(3, 2)) -> TargetModel:
    layers = cnn(channels, kernels, MAPS, hidden) if channels else mlp(*hidden)
    model = TargetModel(TargetConfig(input_shape=list(shape), layers=layers, num_classes=3, activation=activation))
    generator = random(sum(channels) + sum(hidden))
    model.load_state_dict(
        {name: torch.randn(t.shape, generator=generator) / 2 for name, t in model.state_dict().items()}
    )
    return model


def shapes(model: TargetModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def in_sizes_of(model: TargetModel, other: TargetModel) -> TargetModel:
    made = resized(model.state_dict(), shapes(other))
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in made.values())
    other.load_state_dict(made)
    return other


@settings(max_examples=40, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from(["relu", "tanh", "gelu"]))
def test_wider_networks_compute_the_same_and_joined_copies_are_the_network_again(data, images, activation):
    channels = data.draw(st.tuples(UNITS, UNITS)) if images else ()
    hidden = data.draw(st.lists(UNITS, min_size=1, max_size=2))
    more = data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=4))
    shape = (2, 12, 12) if images else (6,)
    model = network(channels, hidden, activation, shape)
    wide = [[n + k for n, k in zip(own, more[i:], strict=False)] for i, own in ((0, channels), (2, hidden))]
    wider = in_sizes_of(model, network(*wide, activation, shape))
    inputs = torch.randn(5, *shape, generator=random(1))
    torch.testing.assert_close(wider(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-5)
    again = in_sizes_of(wider, network(channels, hidden, activation, shape))
    torch.testing.assert_close(again(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden, deeper", [((4,), (4, 4, 4)), ((5, 3), (6, 3, 5, 4))])
@pytest.mark.parametrize("channels", [(), (3, 4)])
def test_further_layers_hand_on_what_they_get(channels, hidden, deeper):
    shape = (2, 12, 12) if channels else (6,)
    model = network(channels, hidden, shape=shape)
    made = in_sizes_of(model, network(channels, deeper, shape=shape))
    inputs = torch.randn(5, *shape, generator=random(1))
    torch.testing.assert_close(made(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-5)


def test_copies_are_read_in_unequal_parts_so_that_they_can_learn_to_differ():
    model = network((), (2,), shape=(4,))
    made = resized(model.state_dict(), shapes(network((), (4,), shape=(4,))))
    first, copy = made["head.weight"][:, 0], made["head.weight"][:, 2]
    assert torch.equal(made["hidden.weight"][0], made["hidden.weight"][2])
    torch.testing.assert_close(2 * first, copy)


def test_units_that_read_alike_are_joined_and_others_kept():
    weights = {"a.weight": torch.tensor([[1.0, 0], [0, 2], [1.01, 0]]), "a.bias": torch.zeros(3)}
    weights |= {"head.weight": torch.tensor([[1.0, 2, 3], [0, 5, 0]]), "head.bias": torch.ones(2)}
    made = resized(weights, {"b.weight": (2, 2), "b.bias": (2,), "head.weight": (2, 2), "head.bias": (2,)})
    order = made["b.weight"][:, 1].argsort()
    torch.testing.assert_close(made["b.weight"][order], torch.tensor([[1.009, 0], [0, 2]]))
    torch.testing.assert_close(made["head.weight"][:, order], torch.tensor([[4.0, 2], [0, 5]]))
    assert torch.equal(made["head.bias"], torch.ones(2))


@pytest.mark.parametrize(
    "other",
    [
        network((3, 4), (4,), kernels=(2, 2)),
        network((3, 4), (), shape=(2, 12, 12)),
        network((3, 4), (4,), shape=(1, 12, 12)),
        network((3, 4), (4,), shape=(2, 16, 16)),
        network((), (4,), shape=(6,)),
    ],
)
def test_other_networks_cannot_be_had(other):
    model = network((3, 4), (4,))
    assert resizable(shapes(model), shapes(model)) and not resizable(shapes(model), shapes(other))
    with pytest.raises(ValueError, match="cannot be given those of"):
        resized(model.state_dict(), shapes(other))


def test_layers_behind_pixels_or_inputs_cannot_be_added():
    pixels, deeper = network((3, 4), ()), network((3, 4), (4,))
    assert not resizable(shapes(pixels), shapes(deeper))
    assert resizable(shapes(pixels), shapes(network((5, 2), ())))
    linear = network((), (), shape=(6,))
    assert resizable(shapes(linear), shapes(linear))
    assert not resizable(shapes(linear), shapes(network((), (6,), shape=(6,))))


def test_joining_is_that_of_ward_at_each_step():
    generator = random(3)
    weights, mass = torch.randn(9, 4, generator=generator).double(), torch.rand(9, generator=generator).double() + 0.1
    clusters = [[k] for k in range(9)]
    for count in range(8, 1, -1):

        def error(own: list[int]) -> float:
            mean = (weights[own] * mass[own, None]).sum(0) / mass[own].sum()
            return ((weights[own] - mean).square().sum(1) * mass[own]).sum().item()

        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[:i]]
        first, second = min(pairs, key=lambda pair: error(pair[0] + pair[1]) - error(pair[0]) - error(pair[1]))
        clusters = [own for own in clusters if own not in (first, second)] + [first + second]
        found = _clusters(weights, mass, count)
        assert {frozenset((found == k).nonzero().flatten().tolist()) for k in range(count)} == {
            frozenset(own) for own in clusters
        }

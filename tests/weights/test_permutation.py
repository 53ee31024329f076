import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_weightgen.weights.permutation import (
    PermutationSpec,
    align,
    match_weights,
    mlp_spec,
    permute,
    random_permutation,
)


quick = settings(max_examples=25, deadline=None)
widths = st.lists(st.integers(1, 12), min_size=3, max_size=5)
seeds = st.integers(0, 2**31)


def mlp(widths, seed, bias=True):
    torch.manual_seed(seed)
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.Tanh()]
    net = nn.Sequential(*layers[:-1]).double()
    return net, mlp_spec([str(2 * i) for i in range(len(widths) - 1)], bias=bias)


def distance(a, b):
    return sum((a[name] - b[name]).square().sum() for name in a).sqrt().item()


@quick
@given(widths, seeds, st.booleans())
def test_a_permutation_preserves_the_function(widths, seed, bias):
    net, spec = mlp(widths, seed, bias)
    x = torch.randn(7, widths[0], dtype=torch.float64)
    before, weights = net(x), {name: value.clone() for name, value in net.state_dict().items()}
    perms = random_permutation(weights, spec, torch.Generator().manual_seed(seed))
    permuted = permute(weights, spec, perms)
    net.load_state_dict(permuted)
    torch.testing.assert_close(net(x), before)
    assert list(permuted) == list(weights)
    inverse = permute(permuted, spec, [perm.argsort() for perm in perms])
    assert all(torch.equal(inverse[name], weights[name]) for name in weights)


@quick
@given(widths, seeds)
def test_align_preserves_the_function_and_never_moves_away_from_the_reference(widths, seed):
    net, spec = mlp(widths, seed)
    reference = mlp(widths, seed + 1)[0].state_dict()
    x = torch.randn(7, widths[0], dtype=torch.float64)
    before, weights = net(x), {name: value.clone() for name, value in net.state_dict().items()}
    aligned = align(weights, reference, spec)
    assert distance(aligned, reference) <= distance(weights, reference) + 1e-9
    net.load_state_dict(aligned)
    torch.testing.assert_close(net(x), before)
    again = align(aligned, reference, spec)
    assert all(torch.equal(again[name], aligned[name]) for name in aligned)


@pytest.mark.parametrize("seed", range(5))
def test_align_finds_a_planted_permutation(seed):
    net, spec = mlp([16, 24, 20, 4], seed)
    reference = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    noisy = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in reference.items()}
    planted = random_permutation(reference, spec, generator)
    aligned = align(permute(noisy, spec, planted), reference, spec)
    assert all(torch.equal(aligned[name], noisy[name]) for name in reference)


def test_a_flattened_convolution_moves_blocks_of_features():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3)).double()
    net[1].running_mean.normal_()
    net.eval()
    carriers = [("0.weight", 0), ("0.bias", 0), ("4.weight", 1)]
    carriers += [(f"1.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")]
    spec = PermutationSpec([carriers])
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    before, weights = net(x), {name: value.clone() for name, value in net.state_dict().items()}
    permuted = permute(weights, spec, random_permutation(weights, spec, torch.Generator().manual_seed(3)))
    assert not torch.equal(permuted["4.weight"], weights["4.weight"])
    assert permuted["1.num_batches_tracked"] is weights["1.num_batches_tracked"]
    net.load_state_dict(permuted)
    torch.testing.assert_close(net(x), before)
    restored = align(permuted, weights, spec)
    assert all(torch.equal(restored[name], weights[name]) for name in weights)


def test_drawing_follows_the_generator():
    net, spec = mlp([4, 30, 2], 0)
    draws = [
        random_permutation(net.state_dict(), spec, torch.Generator().manual_seed(seed))[0].tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_errors_name_the_tensor():
    net, spec = mlp([4, 6, 2], 0)
    weights = net.state_dict()
    with pytest.raises(ValueError, match="Permutation 0 needs tensor '0.weight', which is not in"):
        permute({"w": torch.zeros(2)}, spec, [torch.arange(6)])
    with pytest.raises(ValueError, match=r"needs axis 1 of '0.bias', which has the shape \(6,\)"):
        PermutationSpec((((("0.bias"), 1),),)).sizes(weights)
    with pytest.raises(ValueError, match="Axis 1 of '2.weight' is 5 long, expected a multiple of the 6 units"):
        permute(weights | {"2.weight": torch.zeros(2, 5)}, spec, [torch.arange(6)])
    with pytest.raises(ValueError, match="must hold each of 0 to 5 once"):
        permute(weights, spec, [torch.zeros(6, dtype=torch.long)])
    with pytest.raises(ValueError, match="1 permutations, got 0"):
        permute(weights, spec, [])
    with pytest.raises(ValueError, match=r"'0.weight': the reference has \(7, 4\), expected \(6, 4\)"):
        match_weights(weights, weights | {"0.weight": torch.zeros(7, 4)}, spec)
    with pytest.raises(ValueError, match="two or more layer names"):
        mlp_spec(["0"])
    with pytest.raises(ValueError, match="more than once"):
        PermutationSpec(((("w", 0),), (("w", 0),)))
    with pytest.raises(ValueError, match="at least one"):
        PermutationSpec(((),))

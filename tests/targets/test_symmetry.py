"""Permutations leave every target's function as it is; statistics of batch normalisation are found again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.targets.architectures import TargetConfig, TargetModel, architecture, mlp, resnet
from hf_weightgen.targets.stacked import stack, unstack
from hf_weightgen.targets.symmetry import permutation_spec, reestimate_norms
from hf_weightgen.weights.permutation import align, permute, random_permutation
from tiny import random


CONFIGS = {
    "tiny-cnn": (architecture("tiny-cnn", channels=1), [8, 6, 4, 20]),
    "cnn3": (architecture("cnn3"), [16, 32, 15, 20]),
    "lenet": (architecture("lenet", num_classes=4), [6, 16, 120, 84]),
    "mlp": (TargetConfig(input_shape=[7], layers=mlp(5, 6)), [5, 6]),
    "linear": (TargetConfig(input_shape=[7], layers=mlp()), []),
    "resnet8": (TargetConfig(input_shape=[3, 8, 8], layers=resnet(8), activation="relu"), [16, 32, 64]),
}


def network(config: TargetConfig, seed: int) -> TargetModel:
    torch.manual_seed(seed)
    model = TargetModel(config).double().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_permutation_preserves_the_function_and_can_be_undone(name, seed):
    config, sizes = CONFIGS[name]
    spec, model = permutation_spec(config), network(config, seed)
    inputs = torch.randn(3, *config.input_shape, generator=random(seed), dtype=torch.float64)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert spec.sizes(weights) == sizes
    before, perms = model(inputs).logits, random_permutation(weights, spec, random(seed))
    permuted = permute(weights, spec, perms)
    model.load_state_dict(permuted)
    torch.testing.assert_close(model(inputs).logits, before)
    back = permute(permuted, spec, [perm.argsort() for perm in perms])
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("name", ["tiny-cnn", "mlp", "resnet8"])
def test_weight_matching_finds_a_permuted_network_again(name):
    config, _ = CONFIGS[name]
    spec, weights = permutation_spec(config), network(config, 0).state_dict()
    found = align(permute(weights, spec, random_permutation(weights, spec, random(1))), weights, spec)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_statistics_are_those_of_the_images():
    config, _ = CONFIGS["resnet8"]
    models = [network(config, seed) for seed in range(2)]
    images = torch.randn(64, *config.input_shape, generator=random(2), dtype=torch.float64)
    found = reestimate_norms(config, stack([model.state_dict() for model in models]), images, batch_size=64)
    for k, model in enumerate(models):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(images)  # with momentum 1 the statistics become those of the batch
        for name, tensor in unstack(found, k).items():
            if name.endswith(("running_mean", "running_var")):
                torch.testing.assert_close(tensor, model.state_dict()[name])


def test_every_image_counts_alike_for_statistics():
    config = TargetConfig(
        input_shape=[2, 4, 4], layers=[{"kind": "norm", "name": "norm"}, {"kind": "mean_pool"}], activation="relu"
    )
    images = torch.randn(9, 2, 4, 4, generator=random(0), dtype=torch.float64)
    images[8] += 100  # alone in the last batch
    found = reestimate_norms(config, stack([network(config, 0).state_dict()]), images, batch_size=4)
    torch.testing.assert_close(found["norm.running_mean"][0], images.mean((0, 2, 3)))


def test_networks_without_norms_come_back_as_they_are():
    config, _ = CONFIGS["tiny-cnn"]
    params = stack([network(config, 0).state_dict()])
    found = reestimate_norms(config, params, torch.zeros(2, *config.input_shape, dtype=torch.float64))
    assert all(found[name] is tensor for name, tensor in params.items())

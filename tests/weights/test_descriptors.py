"""Descriptions tell the tokens of a network apart, and stay alike where networks of other sizes have the same part."""

import pytest
import torch

from hf_weightgen.targets.architectures import HEAD, TargetConfig, TargetModel, architecture, mlp, resnet
from hf_weightgen.weights.descriptors import SIZE
from hf_weightgen.weights.tokenization import WeightTokenizer
from tiny import adapter


def tokenizer_of(*configs: TargetConfig, token_size: int = 128) -> WeightTokenizer:
    return WeightTokenizer.fit([TargetModel(config).state_dict() for config in configs], token_size, head=HEAD)


@pytest.mark.parametrize("name", ["tiny-cnn", "lenet", "cnn3", "resnet20"])
def test_tokens_of_a_network_are_told_apart(name):
    tokenizer = tokenizer_of(architecture(name))
    described = tokenizer.describe(0, 3)
    body = tokenizer.num_body_tokens(0)
    assert described.shape == (body + 3, SIZE) and described.isfinite().all() and described.abs().max() <= 2
    distances = torch.cdist(described[:body].double(), described[:body].double()) + torch.eye(body)
    assert distances.min() > 0.05
    assert torch.equal(described[body], described[body + 2]) and not torch.equal(described[body], described[body - 1])


def test_tokens_of_adapters_are_told_apart():
    tokenizer = WeightTokenizer.fit(
        [adapter(0)], 385, head=["base_model.model.classifier.weight", "base_model.model.classifier.bias"]
    )
    described = tokenizer.describe(0, 2)[: tokenizer.num_body_tokens(0)]
    assert (torch.cdist(described.double(), described.double()) + torch.eye(len(described))).min() > 0.05


def test_the_same_part_of_a_wider_network_is_nearest():
    sizes = ((8, 8), (10, 9))
    configs = [TargetConfig(input_shape=[9], layers=mlp(*hidden), num_classes=4) for hidden in sizes]
    tokenizer = tokenizer_of(*configs, token_size=200)  # a tensor is a token: weight, bias, weight, bias
    small, wider = (tokenizer.describe(k, 0) for k in range(2))
    assert not torch.equal(small, wider)
    assert torch.equal(torch.cdist(wider, small).argmin(1), torch.arange(4))


def test_empty_bodies_and_heads():
    tokenizer = tokenizer_of(TargetConfig(input_shape=[9], layers=[], num_classes=4))
    assert tokenizer.describe(0, 4).shape == (4, SIZE)
    assert tokenizer_of(TargetConfig(input_shape=[3, 8, 8], layers=resnet(8))).describe(0, 0).shape[1] == SIZE

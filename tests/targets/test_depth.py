"""A ResNet of another depth is made of blocks that do what they did, in the stage and in the order in which they stood."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.targets.architectures import TargetConfig, TargetModel, architecture, mlp, resnet
from hf_weightgen.targets.depth import places, stages, with_depth
from tiny import random


def config(depth: int, **settings) -> TargetConfig:
    return TargetConfig(input_shape=[3, 8, 8], layers=resnet(depth), activation="relu", num_classes=4, **settings)


def network(depth: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    weights = TargetModel(config(depth)).state_dict()
    for name, tensor in weights.items():
        if ".bn" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    return weights


def logits(depth: int, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = TargetModel(config(depth)).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.randn(5, 3, 8, 8, generator=random(9))).logits


@settings(max_examples=60, deadline=None)
@given(have=st.integers(1, 12), want=st.integers(1, 24))
def test_places_keep_the_order_and_the_first_block_once(have, want):
    chosen = places(have, want)
    assert len(chosen) == want and chosen == sorted(chosen) and chosen[0] == 0
    assert set(chosen) <= set(range(have))
    if have > 1:
        assert chosen.count(0) == 1
        counts = [chosen.count(i) for i in set(chosen) - {0}]
        assert not counts or max(counts) - min(counts) <= 1
        assert want < have or len(set(chosen)) == have


def test_stages_begin_where_pixels_or_channels_change():
    found = stages(architecture("resnet32"))
    assert [len(stage) for stage in found] == [5, 5, 5]
    assert [[block["channels"] for block in stage][0] for stage in found] == [16, 32, 64]
    assert [stage[0]["stride"] for stage in found] == [1, 2, 2]


@pytest.mark.parametrize("shared_steps", [False, True])
@pytest.mark.parametrize("wanted", [8, 14, 20, 26, 32, 44])
def test_a_network_of_any_depth_has_the_tensors_of_its_target(wanted, shared_steps):
    samples = [network(20, seed) for seed in range(3)]
    made = with_depth(samples, config(20), config(wanted), shared_steps)
    template = TargetModel(config(wanted)).state_dict()
    assert list(made) == list(template)
    assert all(
        made[name].shape == tensor.shape and made[name].dtype == tensor.dtype for name, tensor in template.items()
    )
    assert logits(wanted, made).isfinite().all()


def test_equal_depth_is_the_first_sample_and_a_copy():
    samples = [network(14, 0), network(14, 1)]
    made = with_depth(samples, config(14), config(14), shared_steps=True)
    assert all(torch.equal(made[name], tensor) for name, tensor in samples[0].items())
    made["conv1.weight"].zero_()
    assert samples[0]["conv1.weight"].any()


def test_blocks_that_stand_again_come_from_the_next_sample():
    first, second = network(14, 0), network(14, 1)
    made = with_depth([first, second], config(14), config(26))  # blocks 0, 1, 1, 1 of each stage
    for stage in (1, 2, 3):
        for block, (source, old) in enumerate([(first, 0), (first, 1), (second, 1), (first, 1)]):
            for part in ("conv1.weight", "conv2.weight", "bn1.weight", "bn2.running_var"):
                assert torch.equal(made[f"layer{stage}.{block}.{part}"], source[f"layer{stage}.{old}.{part}"])
    assert torch.equal(made["head.weight"], first["head.weight"])


def test_blocks_of_zeros_leave_the_function_as_it_is():
    """What a silent block gives, and a deeper network has more of, is nothing: the shortcut is all that is left."""
    weights = network(14, 0)
    silent = {f"layer{stage}.1.bn2.{part}" for stage in (1, 2, 3) for part in ("weight", "bias")}
    weights |= {name: torch.zeros_like(weights[name]) for name in silent}
    for wanted in (8, 20, 32):
        made = with_depth([weights], config(14), config(wanted))
        torch.testing.assert_close(logits(wanted, made), logits(14, weights))


def test_shared_steps_add_up_to_the_same():
    """Where a block's branch does not look at what it adds to, m blocks with an m-th of it each do what one does."""
    weights = network(14, 0)
    for stage in (1, 2, 3):  # the branch of the second block is a positive constant
        weights[f"layer{stage}.1.bn2.weight"].zero_()
        weights[f"layer{stage}.1.bn2.bias"].uniform_(0.1, 1)
    for wanted in (20, 32):
        made = with_depth([weights], config(14), config(wanted), shared_steps=True)
        torch.testing.assert_close(logits(wanted, made), logits(14, weights))
        assert not torch.allclose(
            logits(wanted, with_depth([weights], config(14), config(wanted))), logits(14, weights)
        )


def test_faults_name_what_does_not_fit():
    weights = network(14, 0)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        with_depth([], config(14), config(20))
    with pytest.raises(ValueError, match="Sample 1 is no network of `config`: its tensor 'layer1.1.bn1.bias'"):
        with_depth([weights, network(8, 0)], config(14), config(20))
    wide = architecture("resnet14", 7, input_shape=[3, 8, 8])
    with pytest.raises(ValueError, match="must differ in the blocks of their stages alone"):
        with_depth([weights], config(14), wide)
    plain = TargetConfig(input_shape=[6], layers=mlp(5))
    with pytest.raises(ValueError, match="got 3 and 0 stages"):
        with_depth([weights], config(14), plain)

"""Members through a generator's autoencoder: the same that training sees of them."""

import pytest
import torch

from hf_weightgen.evaluation.generator import reconstruct_members
from hf_weightgen.models.modeling_weight_vae import WeightVAE
from hf_weightgen.targets.architectures import HEAD, TargetConfig, TargetModel, mlp
from hf_weightgen.training.batches import ZooTensors
from hf_weightgen.training.d2nwg import reconstruct
from hf_weightgen.training.sources import decode_rows
from hf_weightgen.weights.layout import LayoutMismatchError
from hf_weightgen.weights.tokenization import WeightTokenizer
from tiny import pipeline, random, randomised


TASKS = {"small": (6, ["a", "b"]), "large": (4, ["c", "d", "e"])}  # inputs, class names


def members(task: str, count: int = 3) -> list[dict[str, torch.Tensor]]:
    inputs, labels = TASKS[task]
    network = TargetModel(TargetConfig(input_shape=[inputs], layers=mlp(5), num_classes=len(labels)))
    return [
        {name: torch.randn(t.shape, generator=random(seed + t.numel())) for name, t in network.state_dict().items()}
        for seed in range(count)
    ]


@pytest.fixture(scope="module")
def networks_pipe(encoder):
    """Two layouts side by side, as image zoos have them; untrained, but every weight counts."""
    tokenizer = WeightTokenizer.fit(
        [state_dict for task in TASKS for state_dict in members(task)], token_size=6, head=list(HEAD)
    )
    pipe = pipeline(encoder, tokenizer=tokenizer)
    config = pipe.vae.config
    config.num_body_tokens = tokenizer.num_all_body_tokens
    torch.manual_seed(0)
    pipe.register_modules(vae=randomised(WeightVAE(config)).eval())
    pipe._encoder = encoder
    return pipe


@pytest.mark.parametrize("task", TASKS)
def test_networks_come_back_as_in_training(networks_pipe, encoder, task):
    originals, tokenizer = members(task), networks_pipe.weight_tokenizer
    names = encoder.embed(TASKS[task][1])
    rows = ZooTensors.of(
        tokenizer, originals, [task] * 3, {task: names[None]}, {task: names[:1]}, {task: task}
    )  # fmt: skip
    expected = decode_rows(
        tokenizer, reconstruct(networks_pipe.vae, rows), rows.layout_of, rows.class_mask[rows.task_of].sum(1)
    )
    found = reconstruct_members(networks_pipe, originals, TASKS[task][1])
    for own, wanted, original in zip(found, expected, originals, strict=True):
        assert own.keys() == original.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(own[name], tensor)
    assert not torch.allclose(found[0]["hidden.weight"], found[1]["hidden.weight"])


def test_a_network_that_the_generator_does_not_know_is_refused(networks_pipe):
    stranger = TargetModel(TargetConfig(input_shape=[9], layers=mlp(5), num_classes=2))
    with pytest.raises(LayoutMismatchError, match="none of the 2 known layouts"):
        reconstruct_members(networks_pipe, [dict(stranger.state_dict())], ["a", "b"])

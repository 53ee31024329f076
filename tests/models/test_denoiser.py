"""The MLP denoiser, which stands where a diffusers U-Net can stand."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from hf_weightgen.models.modeling_denoiser import WeightDenoiser
from tiny import random, randomised


SETTINGS = {
    "in_channels": 2, "sample_size": 4, "projection_class_embeddings_input_dim": 8, "hidden_size": 16, "num_layers": 2
}  # fmt: skip


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return WeightDenoiser(**SETTINGS).eval()


@pytest.fixture
def inputs():
    generator = random(1)
    prompts = F.normalize(torch.randn(3, 8, generator=generator), dim=-1)
    return torch.randn(3, 2, 4, 4, generator=generator), torch.tensor([1.0, 500.0, 999.0]), prompts


@torch.no_grad()
def test_it_starts_at_zero(denoiser, inputs):
    sample, timestep, prompts = inputs
    assert torch.equal(denoiser(sample, timestep, class_labels=prompts).sample, torch.zeros(3, 2, 4, 4))


@torch.no_grad()
def test_every_input_counts_and_rows_do_not_mix(denoiser, inputs):
    randomised(denoiser)
    before = denoiser(*inputs[:2], class_labels=inputs[2]).sample
    for position in range(3):
        changed = [value.clone() for value in inputs]
        changed[position][1] = 0
        after = denoiser(*changed[:2], class_labels=changed[2]).sample
        assert not torch.allclose(after[1], before[1], atol=1e-4), position
        torch.testing.assert_close(after[[0, 2]], before[[0, 2]])


@torch.no_grad()
@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500, 500, 500])])
def test_timesteps_may_be_numbers_or_tensors(timestep, denoiser, inputs):
    randomised(denoiser)
    expected = denoiser(inputs[0], torch.full((3,), 500.0), class_labels=inputs[2]).sample
    torch.testing.assert_close(denoiser(inputs[0], timestep, class_labels=inputs[2]).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [500, torch.tensor([1, 500, 999])], ids=["one time", "times"])
def test_one_prompt_stands_for_all(timestep, denoiser, inputs):
    randomised(denoiser)
    one = inputs[2][:1]
    expected = denoiser(inputs[0], timestep, class_labels=one.expand(3, -1)).sample
    torch.testing.assert_close(denoiser(inputs[0], timestep, class_labels=one).sample, expected)


@torch.no_grad()
def test_unit_prompts_weigh_as_much_as_the_time(denoiser, inputs):
    """Embeddings of unit length have tiny components; without a factor the prompt would hardly be seen."""
    size = torch.tensor(8.0).sqrt()
    seen = denoiser.class_embedding(inputs[2] * size) - denoiser.class_embedding(torch.zeros(3, 8))
    assert seen.norm(dim=1).min() > 0.1 * denoiser.time_embedding(denoiser.time_proj(inputs[1])).norm(dim=1).mean()


def test_it_is_called_as_a_unet_is(denoiser):
    names = inspect.signature(UNet2DConditionModel.forward).parameters
    assert set(inspect.signature(denoiser.forward).parameters) <= set(names)
    shared = {"in_channels", "sample_size", "projection_class_embeddings_input_dim"}
    assert shared <= set(denoiser.config) & set(inspect.signature(UNet2DConditionModel.__init__).parameters)


@torch.no_grad()
def test_a_folder_gives_it_back(denoiser, inputs, tmp_path):
    randomised(denoiser).save_pretrained(tmp_path)
    again = WeightDenoiser.from_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    assert {key: again.config[key] for key in SETTINGS} == SETTINGS
    sample, timestep, prompts = inputs
    expected = denoiser(sample, timestep, class_labels=prompts).sample
    assert torch.equal(again(sample, timestep, class_labels=prompts).sample, expected)


def test_gradients_reach_every_parameter(denoiser, inputs):
    sample, timestep, prompts = inputs
    randomised(denoiser)(sample, timestep, class_labels=prompts).sample.square().mean().backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, denoiser, inputs):
    sample, timestep, prompts = inputs
    expected = randomised(denoiser)(sample, timestep, class_labels=prompts).sample
    found = denoiser.to(dtype)(sample.to(dtype), timestep, class_labels=prompts.to(dtype)).sample
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)

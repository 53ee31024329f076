"""Between zoo and pipeline: the gate refuses bad reconstructions, latents get unit scale, samples the zoo's spread."""

from dataclasses import replace

import pytest
import torch

from hf_weightgen.training.d2nwg import (
    GateError,
    calibrate_noise,
    check_gate,
    encode,
    fit_latent_scale,
    reconstruct,
    usual_rows,
)
from tiny import random, randomised, vae, zoo


@pytest.fixture
def tiny_zoo():
    return zoo()


@pytest.fixture
def model(tiny_zoo):
    return randomised(vae(tiny_zoo)).eval()


def test_the_gate_opens_within_its_limits():
    result = check_gate({"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}, {"a": 0.881, "b": 0.8, "c": 0.7, "d": 0.61})
    assert result["worst_task"] == "a"
    assert result["worst_loss"] == pytest.approx(1.9) and result["mean_loss"] == pytest.approx(0.225)
    assert result["losses"] == pytest.approx({"a": 1.9, "b": 0.0, "c": 0.0, "d": -1.0})


@pytest.mark.parametrize(
    ("reconstructed", "message"),
    [
        (
            {"a": 0.879, "b": 0.81, "c": 0.72, "d": 0.6},
            r"2\.10 on 'a' \(at most 2\.0\)",
        ),  # one task
        ({"a": 0.894, "b": 0.794, "c": 0.694, "d": 0.594}, r"lose 0\.60 points on average"),  # all of them
    ],
)
def test_the_gate_shuts_beyond_them(reconstructed, message):
    with pytest.raises(GateError, match=message):
        check_gate({"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}, reconstructed)


def test_the_gate_names_the_remedies():
    with pytest.raises(GateError, match="train the autoencoder longer, .*`--skip-gate`"):
        check_gate({"a": 0.9}, {"a": 0.5})


def test_the_gate_does_not_open_where_no_task_counts():
    with pytest.raises(GateError, match="no task whose held-out members"):
        check_gate({}, {})


def test_rows_far_from_all_others_of_their_task_are_left_out(tiny_zoo):
    latents = torch.randn(len(tiny_zoo), 4, 8, 8, generator=random(0))
    assert usual_rows(latents, tiny_zoo).all()
    far = tiny_zoo.rows_of(1)[0]
    latents[far] *= 3
    usual = usual_rows(latents, tiny_zoo)
    assert (~usual).nonzero().flatten().tolist() == [far]
    kept = tiny_zoo.kept(usual)
    assert len(kept) == len(tiny_zoo) - 1 and kept.tasks == tiny_zoo.tasks
    assert torch.equal(kept.weight_tokens, tiny_zoo.weight_tokens[usual])
    assert len(kept.rows_of(1)) == len(tiny_zoo.rows_of(1)) - 1


def test_the_shared_start_is_kept(tiny_zoo):
    latents = torch.randn(len(tiny_zoo), 4, 8, 8, generator=random(0))
    latents[0] *= 3
    last = len(tiny_zoo) - 1
    alone = replace(
        tiny_zoo, start=last, task_of=torch.cat([torch.zeros(6), torch.ones(11), torch.tensor([2.0])]).long()
    )
    kept = alone.kept(usual_rows(latents, alone))
    assert kept.start == last - 1
    assert torch.equal(kept.weight_tokens[kept.start], tiny_zoo.weight_tokens[last])
    assert kept.rows_of(2).tolist() == [kept.start]


def test_rows_of_a_trajectory_and_of_small_spread_are_usual(tiny_zoo):
    latents = torch.zeros(len(tiny_zoo), 4, 8, 8)
    assert usual_rows(latents, tiny_zoo).all()  # all the same
    for task in range(len(tiny_zoo.tasks)):
        rows = tiny_zoo.rows_of(task)
        latents[rows, 0, 0, 0] = torch.linspace(-2, 2, len(rows))
    assert usual_rows(latents, tiny_zoo).all()
    latents[:, 0, 0, 0] = 1.0
    latents[tiny_zoo.rows_of(0)[0], 0, 0, 0] = 1.4
    assert usual_rows(latents, tiny_zoo).all()


def test_encoding_does_not_depend_on_the_batch_size(model, tiny_zoo):
    means, log_stds = encode(model, tiny_zoo)
    assert means.shape == log_stds.shape == (len(tiny_zoo), 4)
    torch.testing.assert_close(encode(model, tiny_zoo, batch_size=5), (means, log_stds))
    torch.testing.assert_close(reconstruct(model, tiny_zoo, batch_size=5), reconstruct(model, tiny_zoo))


@torch.no_grad()
def test_reconstructions_are_the_decoded_posterior_means(model, tiny_zoo):
    means, _ = encode(model, tiny_zoo)
    names = torch.stack([tiny_zoo.class_embeds[t][0] for t in tiny_zoo.task_of.tolist()])
    torch.testing.assert_close(reconstruct(model, tiny_zoo), model.decode(means, names))


@torch.no_grad()
def test_posterior_samples_get_unit_scale(model):
    means = torch.randn(4000, 4, generator=random(0)) * torch.tensor([0.01, 1.0, 2.0, 5.0]) + torch.arange(4)
    log_stds = torch.tensor([0.5, 0.5, 3.0, 1.0]).log().expand(4000, 4)
    fit_latent_scale(model, means, log_stds)
    samples = model.scale(means + log_stds.exp() * torch.randn(4000, 4, generator=random(1)))
    torch.testing.assert_close(samples.mean(0), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.ones(4), atol=0.05, rtol=0)


@torch.no_grad()
def test_a_collapsed_dimension_does_not_divide_by_zero(model):
    fit_latent_scale(model, torch.ones(10, 4), torch.full((10, 4), -50.0))
    assert model.scale(torch.ones(1, 4)).isfinite().all()


def members(many, noise: float, task: int, count: int) -> torch.Tensor:
    """Tokens around a centre of the task, with independent noise, class tokens without their mean."""
    generator, rows = random(task), many.weight_tokens[many.task_of == task][:1]
    classes, T = int(many.class_mask[task].sum()), rows.shape[1] - many.class_mask.shape[1]
    tokens = rows + noise * torch.randn(count, *rows.shape[1:], generator=generator)
    real = tokens[:, T : T + classes]
    tokens[:, T : T + classes] = real - real.mean(1, keepdim=True)
    return tokens


@pytest.fixture
def noisy_zoo():
    many = zoo(rows_per_task=300)
    for task in range(3):
        many.weight_tokens[many.task_of == task] = members(many, 0.5, task, 300)
    return many


def runs(many) -> list[list[int]]:
    return [torch.nonzero(many.task_of == task).flatten().tolist() for task in range(3)]


@torch.no_grad()
def test_samples_without_spread_get_all_of_the_zoos(model, noisy_zoo):
    share = calibrate_noise(model, noisy_zoo, [members(noisy_zoo, 0.0, t, 20) for t in range(3)], runs(noisy_zoo))
    torch.testing.assert_close(model.body_noise, torch.full_like(model.body_noise, 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(model.class_noise, torch.tensor(0.5), atol=0.03, rtol=0)
    assert share == pytest.approx({"body": 1.0, "class": 1.0}, abs=0.01)


@torch.no_grad()
def test_samples_with_a_part_of_the_spread_get_the_rest(model, noisy_zoo):
    calibrate_noise(model, noisy_zoo, [members(noisy_zoo, 0.3, t, 300) for t in range(3)], runs(noisy_zoo))
    torch.testing.assert_close(model.body_noise, torch.full_like(model.body_noise, 0.4), atol=0.05, rtol=0)
    torch.testing.assert_close(model.class_noise, torch.tensor(0.4), atol=0.05, rtol=0)


@torch.no_grad()
def test_samples_with_more_spread_than_the_zoo_get_none(model, noisy_zoo):
    share = calibrate_noise(model, noisy_zoo, [members(noisy_zoo, 0.9, t, 50) for t in range(3)], runs(noisy_zoo))
    assert not model.body_noise.any() and not model.class_noise.any() and share == {"body": 0.0, "class": 0.0}

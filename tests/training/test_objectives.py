"""The losses: what they are means of, which noise and which target they use, and that training lowers them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from hf_weightgen.training import objectives
from hf_weightgen.training.batches import StepRandom
from hf_weightgen.training.objectives import diffusion_loss, noised, vae_loss
from tiny import denoiser, vae, zoo


TOTAL = 12


def replace_config(config, **changes):
    return type(config)(**config.to_dict() | changes)


def draws(step: int = 0, rows: slice = slice(None)) -> StepRandom:
    return StepRandom(0, step, TOTAL, rows)


def scheduler(kind: str):
    if kind == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind, clip_sample=False)


@pytest.fixture(scope="module")
def tiny_zoo():
    return zoo()


@pytest.fixture
def latents(tiny_zoo):
    """Each task has latents of its own, so that the prompt tells them."""
    centres = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return centres[tiny_zoo.task_of], torch.full((len(tiny_zoo), 1, 2, 2), -3.0)


def test_the_vae_loss_of_a_batch_is_the_mean_over_its_shares(tiny_zoo):
    model = vae(tiny_zoo)
    whole = vae_loss(model, tiny_zoo, draws())
    shares = [vae_loss(model, tiny_zoo, draws(rows=slice(i, i + 4))) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def test_function_losses_see_samples_of_learned_noise(tiny_zoo):
    """The noise grows to its whole size, on real classes in their order."""
    plain = vae(tiny_zoo)
    model = type(plain)(replace_config(plain.config, learns_noise=True))
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected

    def seen(model: nn.Module, step: int) -> torch.Tensor:
        found = []
        loss = vae_loss(model, tiny_zoo, draws(step), lambda tokens, *_: found.append(tokens) or tokens.sum())
        assert torch.isfinite(loss)
        return found[0].detach()

    noise = [seen(model, step) - seen(plain, step) for step in (0, objectives.NOISE_RAMP // 2, objectives.NOISE_RAMP)]
    assert not noise[0].any()
    assert 0.4 < noise[1].std() / noise[2].std() < 0.6
    assert 0.9 < noise[2].std() < 1.1  # its size at first, before anything is learned


def test_the_diffusion_loss_of_a_batch_is_the_mean_over_its_shares(tiny_zoo, latents):
    model = denoiser()
    whole = diffusion_loss(model, scheduler("v_prediction"), *latents, tiny_zoo, draws())
    parts = [slice(i, i + 4) for i in (0, 4, 8)]
    shares = [diffusion_loss(model, scheduler("v_prediction"), *latents, tiny_zoo, draws(rows=part)) for part in parts]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def train(model: nn.Module, loss_of, steps: int) -> tuple[float, float]:
    """Mean loss of the first and of the last 20 steps."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for step in range(steps):
        loss = loss_of(model, draws(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[:20]) / 20, sum(losses[-20:]) / 20


def test_training_lowers_the_vae_loss_and_reaches_every_parameter(tiny_zoo):
    model = vae(tiny_zoo)
    before, after = train(model, lambda m, random: vae_loss(m, tiny_zoo, random), 150)
    assert after < 0.5 * before
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "flow_prediction"])
def test_training_lowers_the_diffusion_loss(kind, tiny_zoo, latents):
    model = denoiser()
    before, after = train(model, lambda m, r: diffusion_loss(m, scheduler(kind), *latents, tiny_zoo, r), 150)
    assert after < 0.7 * before


def test_a_step_may_show_a_part_of_the_classes(tiny_zoo, monkeypatch):
    model, whole = vae(tiny_zoo), vae_loss(vae(tiny_zoo), tiny_zoo, draws())
    monkeypatch.setattr(objectives, "CLASSES_PER_STEP", 3)
    assert vae_loss(model, tiny_zoo, draws()) == whole
    monkeypatch.setattr(objectives, "CLASSES_PER_STEP", 2)
    part = vae_loss(model, tiny_zoo, draws())
    assert part != whole and 0.5 < part / whole < 2


def test_the_function_loss_sees_all_classes_in_their_order(tiny_zoo):
    model, seen = vae(tiny_zoo), {}

    def function_loss(decoded, truth, rows, random):
        seen.update(decoded=decoded, truth=truth, rows=rows)
        return decoded.new_tensor(7.0)

    with torch.no_grad():
        model.from_latent[0].weight.zero_()  # the decoder then sees class names alone
        loss = vae_loss(model, tiny_zoo, draws(), function_loss)
        plain, double, without = (
            vae_loss(model, tiny_zoo, draws(), lambda *_: torch.tensor(0.0), weight) for weight in (1.0, 2.0, 0.0)
        )
        random = draws()
        rows = tiny_zoo.draw_rows(random)
        names = tiny_zoo.names(tiny_zoo.task_of[rows], random)
        expected = model.decode(torch.zeros(TOTAL, 4), names)
    torch.testing.assert_close(loss, plain + 7.0)
    assert double > plain
    torch.testing.assert_close(double - plain, plain - without)
    assert torch.equal(seen["rows"], rows) and torch.equal(seen["truth"], tiny_zoo.weight_tokens[rows])
    torch.testing.assert_close(seen["decoded"], expected)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_the_target_gives_back_the_clean_latents(kind):
    clean, noise, uniform = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2), torch.rand(5)
    noisy, timesteps, target = noised(scheduler(kind), clean, noise, uniform)
    assert timesteps.dtype == torch.long and timesteps.max() < 1000
    alpha = scheduler(kind).alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if kind == "epsilon":
        found = (noisy - (1 - alpha).sqrt() * target) / alpha.sqrt()
    else:
        found = alpha.sqrt() * noisy - (1 - alpha).sqrt() * target
    torch.testing.assert_close(found, clean, atol=1e-3, rtol=1e-3)


def test_the_flow_leads_from_noise_to_the_clean_latents():
    clean, noise, uniform = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2), torch.rand(5)
    noisy, timesteps, velocity = noised(scheduler("flow_prediction"), clean, noise, uniform)
    torch.testing.assert_close(timesteps, 1000 * uniform)
    torch.testing.assert_close(noisy - uniform.view(-1, 1, 1, 1) * velocity, clean)


def test_a_tenth_of_the_prompts_is_dropped(tiny_zoo, latents):
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = denoiser()

        def forward(self, sample, timestep, encoder_hidden_states, class_labels):
            seen.append(class_labels)
            return self.inner(sample, timestep, encoder_hidden_states, class_labels)

    for step in range(60):
        diffusion_loss(Recorder(), scheduler("epsilon"), *latents, tiny_zoo, draws(step))
    prompts = torch.cat(seen)
    dropped = ~prompts.any(1)
    assert 0.06 < dropped.double().mean() < 0.14
    torch.testing.assert_close(prompts[~dropped].norm(dim=1), torch.ones(int((~dropped).sum())))


def test_without_a_prompt_the_shared_start_is_learned(tiny_zoo, latents, monkeypatch):
    tiny_zoo = replace(tiny_zoo, start=len(tiny_zoo) - 1)
    means, log_stds = latents
    means[:-1] = torch.nan  # whoever reads another latent is found out
    for share, finite in ((1.0, True), (0.0, False)):
        monkeypatch.setattr(objectives, "PROMPT_DROPOUT", share)
        loss = diffusion_loss(denoiser(), scheduler("epsilon"), means, log_stds, tiny_zoo, draws())
        assert bool(loss.isfinite()) == finite


def test_an_adapter_says_nothing_of_foreign_class_names(tiny_zoo):
    """Gradient descent on the loss shrinks what an adapter adds to names that are not its own, and to no others."""
    model = vae(tiny_zoo)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        loss = vae_loss(model, tiny_zoo, draws(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rows = torch.nonzero(tiny_zoo.task_of == 0).flatten()[:1]
        own = tiny_zoo.class_embeds[0][:1, :2]
        mean, _ = model.encode(tiny_zoo.weight_tokens[rows], tiny_zoo.class_embeds[0][:1], tiny_zoo.class_mask[:1])
        hidden = model.from_latent(mean)
        foreign = tiny_zoo.class_embeds[1][:1]
        sizes = [model._specific_rows(hidden, names).square().mean() for names in (own, foreign)]
    assert sizes[1] < 0.5 * sizes[0]


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'sample' cannot be trained; choose 'epsilon'"):
        noised(DDPMScheduler(prediction_type="sample"), *torch.zeros(2, 1, 1, 2, 2), torch.zeros(1))


def test_masked_scalars_do_not_count(tiny_zoo):
    model, padded = vae(tiny_zoo), zoo()
    padded.weight_tokens = torch.where(padded.padding_mask, padded.weight_tokens, 100.0)
    T = model.config.num_body_tokens
    batch = {
        "class_embeds": torch.stack([padded.class_embeds[t][0] for t in padded.task_of.tolist()]),
        "class_mask": padded.class_mask[padded.task_of],
        "noise": torch.zeros(len(padded), 4),
        "padding_mask": padded.padding_mask,
    }
    with torch.no_grad():
        model.body_in.weight.zero_()  # what the encoder makes of padding is another question
        tokens = padded.weight_tokens.clone()
        plain = model(weight_tokens=torch.where(padded.padding_mask, tokens, 0.0), **batch)
        tokens[:, T:] = torch.where(padded.padding_mask[:, T:], tokens[:, T:], 0.0)
        other = model(weight_tokens=tokens, **batch)
    assert (tokens[:, :T] == 100).any()
    torch.testing.assert_close(other.reconstruction_loss, plain.reconstruction_loss)
    assert F.mse_loss(other.weight_tokens, plain.weight_tokens) == 0

"""The autoencoder: any number of classes in any order, loss as documented, and a folder gives it back."""

import json

import pytest
import torch
import torch.nn.functional as F

from hf_weightgen.models.modeling_weight_vae import SHARE_WEIGHT, WeightVAE, WeightVAEConfig
from tiny import random, randomised


B, T, C, S, E = 3, 4, 3, 6, 5


def make_vae(**settings) -> WeightVAE:
    torch.manual_seed(0)
    config = WeightVAEConfig(
        token_size=S, num_body_tokens=T, embedding_size=E, latent_shape=[1, 2, 2], token_width=3, hidden_size=16,
        match_size=4, **settings,
    )  # fmt: skip
    return randomised(WeightVAE(config)).eval()


@pytest.fixture
def vae():
    return make_vae()


@pytest.fixture
def batch():
    generator = random(1)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
    padding = torch.ones(B, T + C, S, dtype=torch.bool)
    padding[:, T - 1, 4:] = False  # the tail of a tensor
    padding[:, T:] = mask[..., None]
    return {
        "weight_tokens": torch.randn(B, T + C, S, generator=generator) * padding,
        "padding_mask": padding,
        "class_embeds": F.normalize(torch.randn(B, C, E, generator=generator), dim=-1) * mask[..., None],
        "class_mask": mask,
        "noise": torch.randn(B, 4, generator=generator),
    }


def encode(vae, batch):
    return torch.cat(vae.encode(batch["weight_tokens"], batch["class_embeds"], batch["class_mask"]), 1)


def test_shapes(vae, batch):
    mean, log_variance = vae.encode(batch["weight_tokens"], batch["class_embeds"], batch["class_mask"])
    assert mean.shape == log_variance.shape == (B, 4)
    assert vae.decode(mean, batch["class_embeds"]).shape == (B, T + C, S)
    assert vae.decode(mean, torch.randn(B, 77, E)).shape == (B, T + 77, S)
    output = vae(**batch)
    assert output.loss.shape == () and output.weight_tokens.shape == (B, T + C, S) and output.match_loss is None


def test_the_order_of_the_classes_does_not_matter(vae, batch):
    turned = dict(batch)
    order = torch.tensor([2, 0, 1])
    turned["weight_tokens"] = torch.cat([batch["weight_tokens"][:, :T], batch["weight_tokens"][:, T:][:, order]], 1)
    turned["class_embeds"], turned["class_mask"] = batch["class_embeds"][:, order], batch["class_mask"][:, order]
    torch.testing.assert_close(encode(vae, turned), encode(vae, batch))
    decoded, again = (vae.decode(batch["noise"], some["class_embeds"]) for some in (batch, turned))
    torch.testing.assert_close(again[:, T:], decoded[:, T:][:, order])
    assert torch.equal(again[:, :T], decoded[:, :T])


def test_padding_classes_do_not_matter(vae, batch):
    padded = {name: value.clone() for name, value in batch.items()}
    padded["weight_tokens"][0, T + 2], padded["class_embeds"][0, 2] = 50.0, 50.0
    torch.testing.assert_close(encode(vae, padded), encode(vae, batch))
    torch.testing.assert_close(vae(**padded).loss, vae(**batch).loss)


def test_a_shift_of_all_class_tokens_does_not_matter(vae, batch):
    """The softmax over classes does not see it."""
    shifted = {name: value.clone() for name, value in batch.items()}
    shifted["weight_tokens"][:, T:] += 3.0 * batch["padding_mask"][:, T:]
    torch.testing.assert_close(encode(vae, shifted), encode(vae, batch))
    torch.testing.assert_close(vae(**shifted).reconstruction_loss, vae(**batch).reconstruction_loss)


def test_every_part_of_the_input_is_read(vae, batch):
    before = encode(vae, batch)
    for name, at in (("weight_tokens", (1, 0)), ("weight_tokens", (1, T + 2)), ("class_embeds", (1, 0))):
        changed = {key: value.clone() for key, value in batch.items()}
        changed[name][at] = -changed[name][at] + 1
        after = encode(vae, changed)
        assert not torch.allclose(after[1], before[1], atol=1e-4), name
        torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    latents, names = batch["noise"], batch["class_embeds"]
    assert not torch.allclose(vae.decode(latents + 1, names)[:, T:], vae.decode(latents, names)[:, T:], atol=1e-4)


def test_the_loss_is_the_sum_of_its_documented_terms(vae, batch):
    output = vae(**batch)
    mean, log_variance = vae.encode(batch["weight_tokens"], batch["class_embeds"], batch["class_mask"])
    decoded = vae.decode(mean + (0.5 * log_variance).exp() * batch["noise"], batch["class_embeds"])
    torch.testing.assert_close(output.weight_tokens, decoded)
    total = 0.0
    for b in range(B):
        error, mask = decoded[b] - batch["weight_tokens"][b], batch["padding_mask"][b]
        rows = error[T:][batch["class_mask"][b]]
        total += (error[:T][mask[:T]] ** 2).mean() + ((rows - rows.mean(0)) ** 2).mean()
    torch.testing.assert_close(output.reconstruction_loss, total / B)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(torch.zeros(4), torch.ones(4)))
    torch.testing.assert_close(output.kl_loss, kl.mean())
    torch.testing.assert_close(output.loss, output.reconstruction_loss + vae.config.kl_weight * output.kl_loss)


def test_prompts_and_class_names_learn_to_match(vae):
    """Two families: prompts of each with the class names of each."""
    generator = random(2)
    prompts = F.normalize(torch.randn(2, E, generator=generator), dim=-1)
    names = F.normalize(torch.randn(2, C, E, generator=generator), dim=-1)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for _ in range(100):
        fits, foreign = vae.match(prompts, names, mask), vae.match(prompts, names.flip(0), mask.flip(0))
        loss = F.softplus(-fits).mean() + F.softplus(foreign).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fits, foreign = vae.match(prompts, names, mask), vae.match(prompts, names.flip(0), mask.flip(0))
    assert (fits > 0).all() and (foreign < 0).all()
    names[0, 2] = 9.0  # a padding class
    torch.testing.assert_close(vae.match(prompts, names, mask), fits)


def test_other_class_names_add_the_match_loss(vae, batch):
    prompts, mask = torch.randn(B, E), batch["class_mask"].roll(1, 0)
    others = batch["class_embeds"].roll(1, 0)
    plain, output = vae(**batch), vae(**batch, prompt_embeds=prompts, other_embeds=others, other_mask=mask)
    fits = vae.match(prompts, batch["class_embeds"], batch["class_mask"])
    expected = -F.logsigmoid(fits).mean() - F.logsigmoid(-vae.match(prompts, others, mask)).mean()
    torch.testing.assert_close(output.match_loss, expected)
    assert output.loss > plain.loss and torch.equal(output.reconstruction_loss, plain.reconstruction_loss)


@torch.no_grad()
def test_scaling_is_undone(vae, batch):
    vae.latent_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    vae.latent_std.fill_(0.5)
    torch.testing.assert_close(vae.unscale(vae.scale(batch["noise"])), batch["noise"])
    assert torch.equal(vae.scale(vae.latent_mean[None]), torch.zeros(1, 4))


@torch.no_grad()
def test_samples_are_the_mean_plus_noise_of_the_calibrated_size(vae, batch):
    names, latents = batch["class_embeds"], batch["noise"]
    unit = torch.ones(B, T + C, S)
    vae.latent_mean.fill_(0.3)
    mean = vae.decode(vae.unscale(latents), names)
    assert torch.equal(vae.sample_tokens(latents, names, True, unit), mean)  # nothing was calibrated yet
    vae.body_noise.copy_(torch.arange(T))
    vae.class_noise.fill_(10.0)
    vae.config.noise_scale = 0.5
    added = vae.sample_tokens(latents, names, True, unit) - mean
    torch.testing.assert_close(added[0, :, 0], torch.tensor([0, 0.5, 1, 1.5, 5, 5, 5]))


def test_learned_noise_is_what_samples_differ_by_and_its_loss_is_the_divergence_from_the_zoo(batch):
    vae, names, unit = make_vae(learns_noise=True), batch["class_embeds"], torch.ones(B, T + C, S)
    stds = 0.1 + torch.rand(B, T + C, S)
    plain, output = vae(**batch), vae(**batch, zoo_stds=stds)
    assert plain.noise_loss is None and torch.equal(plain.token_stds, output.token_stds)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(0.0, output.token_stds), normal(0.0, stds))
    total = 0.0
    for own, mask in zip(divergence, batch["padding_mask"], strict=True):
        total += own[:T][mask[:T]].mean() + own[T:][mask[T:]].mean()
    torch.testing.assert_close(output.noise_loss, total / B)
    share, mask = 0.0, batch["padding_mask"]
    for own, zoo, real in zip(output.token_stds, stds, mask, strict=True):
        reached = torch.minimum(own, zoo)[real].square().sum().sqrt() / zoo[real].square().sum().sqrt()
        share += max(0.0, vae.config.noise_share - reached.item()) ** 2 / B
    torch.testing.assert_close(output.share_loss.item(), share)
    added = vae.config.noise_weight * output.noise_loss + SHARE_WEIGHT * output.share_loss
    torch.testing.assert_close(output.loss, plain.loss + added)
    with torch.no_grad():
        latents = vae.scale(output.latents)
        added = vae.sample_tokens(latents, names, True, unit) - vae.decode(output.latents, names)
        assert (added > 0).all()
        vae.config.noise_scale = 0.5
        half = vae.sample_tokens(latents, names, True, unit) - vae.decode(output.latents, names)
        torch.testing.assert_close(half, added / 2)


def test_learned_noise_becomes_the_zoo_s(batch):
    vae = WeightVAE(make_vae(learns_noise=True).config)
    optimizer, stds = torch.optim.Adam(vae.parameters(), lr=3e-2), torch.full((B, T + C, S), 0.25)
    for _ in range(200):
        optimizer.zero_grad()
        output = vae(**batch, zoo_stds=stds)
        output.noise_loss.backward()
        optimizer.step()
    real = batch["padding_mask"]
    torch.testing.assert_close(output.token_stds[real], stds[real], rtol=0.05, atol=0)


@torch.no_grad()
def test_class_tokens_without_a_match_are_noise_alone(vae, batch):
    vae.class_noise.fill_(2.0)
    noise = torch.randn(B, T + C, S)
    matched, unmatched = (vae.sample_tokens(batch["noise"], batch["class_embeds"], m, noise) for m in (True, False))
    assert torch.equal(matched[:, :T], unmatched[:, :T])
    torch.testing.assert_close(unmatched[:, T:], 2.0 * noise[:, T:])


def test_a_folder_gives_it_back(vae, batch, tmp_path):
    with torch.no_grad():
        for buffer in vae.buffers():
            buffer.uniform_(0.1, 1)
    vae.save_pretrained(tmp_path)
    again = WeightVAE.from_pretrained(tmp_path)
    assert not again.training and again.config.latent_shape in ([1, 2, 2], (1, 2, 2))
    assert vae.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in vae.state_dict().items())
    assert torch.equal(again(**batch).loss, vae(**batch).loss)


def test_what_a_folder_lacks_is_initialised(vae, tmp_path):
    """Loading builds the network without memory first: what no file fills must not come back as garbage."""
    partial = {name: value for name, value in vae.state_dict().items() if "name_" in name}
    vae.save_pretrained(tmp_path, state_dict=dict(partial))
    again = WeightVAE.from_pretrained(tmp_path)
    assert torch.equal(again.name_projection.weight, vae.name_projection.weight)
    for name, value in WeightVAE(vae.config).state_dict().items():
        found = again.state_dict()[name]
        if name in partial:
            assert torch.equal(found, partial[name]), name
        elif value.numel() == 1 or not value.std():  # a constant
            assert torch.equal(found, value), name
        else:
            assert 0.5 < found.std() / value.std() < 2, name


def test_the_config_refuses_what_is_no_number():
    with pytest.raises(Exception, match="token_size"):
        WeightVAEConfig(token_size="many")


def test_the_order_of_the_config_does_not_matter(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps(dict(sorted(entries.items(), reverse=True))))
    again = WeightVAE.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in vae.state_dict().items())

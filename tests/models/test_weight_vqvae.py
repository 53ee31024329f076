"""The Gumbel VQ-VAE: codes are nearest ones, padding says nothing, training learns, and dead codes come back."""

import pytest
import torch

from hf_weightgen.models.modeling_weight_vae import SHARE_WEIGHT
from hf_weightgen.models.modeling_weight_vqvae import LEAST_SPREAD, WeightVQVAE, WeightVQVAEConfig, perplexity
from tiny import random


SIZES = {
    "token_size": 6,
    "descriptor_size": 5,
    "embedding_size": 4,
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
}
CODES = {"num_codes": 16, "code_size": 8, "codes_per_token": 2}
BODY, CLASSES = 4, 3


@pytest.fixture
def vqvae():
    torch.manual_seed(0)
    return WeightVQVAE(WeightVQVAEConfig(**SIZES, **CODES)).eval()


def batch(count: int = 8) -> dict[str, torch.Tensor]:
    """Checkpoints of two kinds; every second one has a body token and a class less."""
    generator, length = random(1), BODY + CLASSES
    kinds = torch.randn(2, length, 6, generator=generator)
    tokens = kinds[torch.arange(count) % 2] + 0.1 * torch.randn(count, length, 6, generator=generator)
    mask = torch.ones(count, length, 6, dtype=torch.bool)
    mask[1::2, [BODY - 1, -1]] = False
    mask[:, 1, 4:] = False
    is_class = (torch.arange(length) >= BODY) & mask.any(-1)
    names = torch.randn(length, 4, generator=generator) * is_class[..., None]
    descriptors = torch.randn(length, 5, generator=generator).expand(count, -1, -1)
    return {
        "weight_tokens": tokens * mask, "padding_mask": mask, "descriptors": descriptors, "name_embeds": names, "class_parts": is_class.long(),
    }  # fmt: skip


def draws(step: int, count: int = 8) -> torch.Tensor:
    return torch.rand(count, BODY + CLASSES, 2, 16, generator=random(step))


@torch.no_grad()
def test_codes_are_the_nearest_ones_and_decode_to_the_reconstruction(vqvae):
    data = batch()
    output, mask = vqvae(**data), data["padding_mask"].any(-1)
    assert output.codes.shape == (8, BODY + CLASSES, 2)
    assert (output.codes[~mask] == -1).all() and output.codes[mask].min() >= 0 and output.codes.max() < 16
    values = vqvae.encode(data["weight_tokens"], data["descriptors"], data["name_embeds"], mask)[mask]
    first = torch.cdist(values, vqvae.codebook[0]).argmin(1)
    second = torch.cdist(values - vqvae.codebook[0][first], vqvae.codebook[1]).argmin(1)
    assert torch.equal(output.codes[mask], torch.stack([first, second], 1))
    embedded = vqvae.embed_codes(output.codes)
    assert not embedded[~mask].any()
    decoded = vqvae.decode(embedded, data["descriptors"], data["name_embeds"], mask, data["class_parts"])
    torch.testing.assert_close(decoded, output.weight_tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_trains_under_bfloat16_autocast(vqvae, temperature):
    data = batch() | {"temperature": temperature, "uniform": draws(0)}
    exact = vqvae(**data)
    with torch.autocast("cpu", torch.bfloat16):
        output = vqvae(**data)
        again = vqvae(**batch(), codes=exact.codes)
    assert output.loss.dtype == torch.float32
    assert (output.codes == exact.codes).double().mean() > 0.9
    torch.testing.assert_close(
        again.weight_tokens.float(), vqvae(**batch(), codes=exact.codes).weight_tokens, rtol=0, atol=0.05
    )
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in vqvae.parameters() if p.grad is not None)
    assert vqvae.codebook.grad.abs().sum() > 0


@torch.no_grad()
def test_padding_says_nothing(vqvae):
    data = batch()
    before, mask = vqvae(**data), data["padding_mask"].any(-1)
    data["descriptors"] = torch.where(mask[..., None], data["descriptors"], 7.0)
    longer = {name: torch.nn.functional.pad(t, (0, 0, 0, 2) if t.dim() == 3 else (0, 2)) for name, t in data.items()}
    for changed in (data, longer):
        after = vqvae(**changed)
        assert torch.equal(after.codes[:, : BODY + CLASSES][mask], before.codes[mask])
        torch.testing.assert_close(after.loss, before.loss)


@torch.no_grad()
def test_a_shift_of_all_classes_costs_nothing(vqvae):
    vqvae.token_in.weight.zero_()  # the codes then do not depend on the weights
    data = batch()
    before = vqvae(**data)
    shifted = data["weight_tokens"] + 3.0 * data["class_parts"][..., None]
    after = vqvae(**data | {"weight_tokens": shifted})
    torch.testing.assert_close(after.reconstruction_loss, before.reconstruction_loss)
    after = vqvae(**data | {"weight_tokens": data["weight_tokens"] + 3.0})
    assert after.reconstruction_loss > 2.5 * before.reconstruction_loss


@torch.no_grad()
def test_each_part_of_a_class_has_a_shift_and_a_map_of_names_of_its_own():
    torch.manual_seed(0)
    vqvae, data = WeightVQVAE(WeightVQVAEConfig(**SIZES, **CODES, class_parts=2)).eval(), batch()
    parts = data["class_parts"].clone()
    parts[:, BODY + 1 :: 2] *= 2
    data["class_parts"] = parts
    vqvae.token_in.weight.zero_()  # the codes then do not depend on the weights
    before = vqvae(**data)
    shifted = data["weight_tokens"] + 3.0 * (parts == 1)[..., None] - 2.0 * (parts == 2)[..., None]
    after = vqvae(**data | {"weight_tokens": shifted})
    torch.testing.assert_close(after.reconstruction_loss, before.reconstruction_loss)
    vqvae.name_projection.weight[6:].normal_(generator=random(0))  # of the second part
    moved = (vqvae(**data).weight_tokens != before.weight_tokens).any(-1)
    assert torch.equal(moved, parts == 2)


@torch.no_grad()
def test_windows_do_not_see_each_other_and_decode_one_by_one():
    torch.manual_seed(0)
    vqvae, data = WeightVQVAE(WeightVQVAEConfig(**SIZES, **CODES, window=3)).eval(), batch()
    before, mask = vqvae(**data), data["padding_mask"].any(-1)
    other = data | {"weight_tokens": torch.cat([data["weight_tokens"][:, :3] + 1, data["weight_tokens"][:, 3:]], 1)}
    after = vqvae(**other)
    assert torch.equal(after.codes[:, 3:], before.codes[:, 3:]) and not torch.equal(after.codes, before.codes)
    embedded = vqvae.embed_codes(before.codes)
    read = embedded, data["descriptors"], data["name_embeds"], mask, data["class_parts"]
    for start in range(0, BODY + CLASSES, 3):
        part = [t[:, start : start + 3] for t in read]
        whole = before.weight_tokens[:, start : start + 3]
        torch.testing.assert_close(vqvae.decode(*part)[part[3]], whole[part[3]])


def test_training_learns_through_gumbel_softmax_and_uses_several_codes(vqvae):
    data = batch()
    optimizer = torch.optim.Adam(vqvae.train().parameters(), lr=3e-3)
    first = vqvae(**data).reconstruction_loss.item()
    for step in range(150):
        output = vqvae(**data, temperature=max(0.2, 1 - step / 100), uniform=draws(step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step == 0:
            assert all(
                p.grad is not None and p.grad.any()
                for p in (vqvae.token_in.weight, vqvae.codebook, vqvae.to_code.weight)
            )
    output = vqvae.eval()(**data)
    assert output.reconstruction_loss.item() < 0.3 * first
    assert output.perplexity.max() > 3


def test_hard_codes_of_gumbel_softmax_follow_the_temperature(vqvae):
    data = batch()
    nearest = vqvae(**data).codes
    cold, warm = (vqvae(**data, temperature=t, uniform=draws(0)).codes for t in (1e-4, 1.0))
    assert torch.equal(cold, nearest) and torch.equal(warm >= 0, nearest >= 0)
    assert not torch.equal(warm, nearest)
    with pytest.raises(ValueError, match="`uniform` must hold the draws"):
        vqvae(**data, temperature=0.5)


def test_dead_codes_come_back_where_they_are_asked_for(vqvae):
    data = batch()
    output = vqvae(**data)
    counts = vqvae.counts(output.codes)
    assert counts.shape == (2, 16) and counts.sum(1).tolist() == [int(data["padding_mask"].any(-1).sum())] * 2
    before, dead = vqvae.codebook.detach().clone(), counts < 1
    moved = vqvae.revive(counts.float(), output.residuals, random(3))
    assert moved == dead.sum() > 0
    changed = (vqvae.codebook != before).any(-1)
    assert torch.equal(changed, dead)
    for codebook, own, asked in zip(vqvae.codebook, dead, output.residuals, strict=True):
        assert (codebook[own][:, None] == asked).all(-1).any(1).all()
    assert perplexity(vqvae.counts(vqvae(**data).codes))[0] > perplexity(counts)[0]


def test_perplexity_counts_codes_in_use():
    counts = torch.tensor([[5, 5, 0, 0], [1, 1, 1, 1], [9, 0, 0, 0]])
    torch.testing.assert_close(perplexity(counts), torch.tensor([2.0, 4.0, 1.0]))


def test_saved_and_loaded(vqvae, tmp_path):
    vqvae.save_pretrained(tmp_path)
    again = WeightVQVAE.from_pretrained(tmp_path).eval()
    data = batch()
    torch.testing.assert_close(again(**data).weight_tokens, vqvae(**data).weight_tokens, atol=0, rtol=0)
    with pytest.raises(ValueError, match="must divide over 3 attention heads, got 16"):
        WeightVQVAEConfig(hidden_size=16, num_attention_heads=3)


def with_places(**settings) -> WeightVQVAE:
    torch.manual_seed(0)
    model = WeightVQVAE(WeightVQVAEConfig(**SIZES, **CODES, num_places=BODY, place_size=4, **settings)).eval()
    if settings:
        torch.nn.init.normal_(model.noise_out.weight)
    return model


def test_layouts_have_maps_of_names_of_their_own_and_all_others_share_one():
    model = WeightVQVAE(WeightVQVAEConfig(**SIZES, **CODES, num_places=BODY, named_layouts=[2, 4])).eval()
    read, length = told(model), BODY + CLASSES

    def of_layout(layout: int) -> torch.Tensor:
        return model.decode(*read, torch.where(torch.arange(length) < BODY, torch.arange(length), -1 - layout))

    torch.nn.init.normal_(model.name_projection.weight, generator=random(0))
    rows, without = torch.einsum("ble,se->bls", read[2], model.map_of_names(4)), model.name_projection.weight.clone()
    with torch.no_grad():
        before, shared = of_layout(4), [of_layout(layout) for layout in (0, 3, 9)]
        model.map_of_names(4).zero_()
    torch.testing.assert_close(before - of_layout(4), rows)
    assert rows[:, BODY:].any() and not torch.equal(of_layout(2), of_layout(4))
    for layout, same in zip((0, 3, 9), shared, strict=True):
        torch.testing.assert_close(of_layout(layout), same)
        torch.testing.assert_close(same, shared[0])
    torch.testing.assert_close(model.decode(*read), shared[0])  # where nothing is told
    assert (model.name_projection.weight != without).any(1).sum() == SIZES["token_size"]


def told(model: WeightVQVAE) -> list[torch.Tensor]:
    """What `decode` reads of the batch."""
    data, mask = batch(), batch()["padding_mask"].any(-1)
    embedded = model.embed_codes(model(**data).codes)
    return [embedded, data["descriptors"], data["name_embeds"], mask, data["class_parts"]]


@torch.no_grad()
def test_known_tokens_have_maps_of_their_own_and_new_ones_do_without():
    model, length = with_places(), BODY + CLASSES
    places = torch.where(torch.arange(length) < BODY, torch.arange(length), -1)
    read = told(model)
    plain = model.decode(*read)
    torch.testing.assert_close(model.decode(*read, places), plain)  # untrained they say nothing
    torch.nn.init.normal_(model.place_out)
    apart = (model.decode(*read, places) - plain).abs().amax((0, 2)) > 1e-4
    assert torch.equal(apart, places >= 0)
    torch.testing.assert_close(model.decode(*read), plain)
    for unknown in (torch.full((length,), -1), torch.arange(length) + BODY):
        torch.testing.assert_close(model.decode(*read, unknown), plain)


@torch.no_grad()
def test_with_moments_known_tokens_are_told_by_how_they_differ_from_their_mean():
    plain, model = with_places(learns_noise=True), with_places(learns_noise=True, place_moments=True)
    data, length = batch(), BODY + CLASSES
    data["places"] = torch.where(torch.arange(length) < BODY, torch.arange(length), -1)
    data = {name: part if name == "places" else part[::2] for name, part in data.items()}  # of the larger kind
    seen = data["weight_tokens"][:, :BODY]
    for fitted in (plain, model):
        torch.nn.init.normal_(fitted.place_out, generator=random(5))
        torch.nn.init.normal_(fitted.noise_out.weight, generator=random(6))
    model.fit_places(seen, torch.arange(BODY))
    mean, std = seen.mean(0), seen.std(0, correction=0).clamp(min=LEAST_SPREAD)
    assert std.max() > 2 * LEAST_SPREAD
    own = data | {"weight_tokens": data["weight_tokens"].clone()}
    own["weight_tokens"][:, :BODY] = (seen - mean) / std
    output, expected = model(**data), plain(**own)
    assert torch.equal(output.codes, expected.codes)
    torch.testing.assert_close(output.reconstruction_errors, expected.reconstruction_errors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.weight_tokens[:, :BODY], mean + std * expected.weight_tokens[:, :BODY])
    torch.testing.assert_close(output.token_stds[:, :BODY], std * expected.token_stds[:, :BODY])
    torch.testing.assert_close(output.weight_tokens[:, BODY:], expected.weight_tokens[:, BODY:])
    new = model(**data, places_told=False)  # of a network that is new nothing is known
    torch.testing.assert_close(new.weight_tokens, plain(**own, places_told=False).weight_tokens)
    assert torch.equal(new.codes, output.codes)
    model.fit_places(torch.ones(3, 1, 6), torch.tensor([2]))
    assert model.place_mean[2].eq(1).all() and model.place_std[2].eq(LEAST_SPREAD).all()  # where all are alike


@torch.no_grad()
def test_noise_is_what_the_decoder_says_that_codes_leave_open():
    model, data = with_places(learns_noise=True), batch()
    read, noise = told(model), torch.randn(8, BODY + CLASSES, 6, generator=random(3))
    mean, stds = model.decode(*read), model(**data).token_stds
    assert stds.min() > 0 and len(stds.unique()) > 10
    torch.testing.assert_close(model.decode(*read, noise=noise), mean + stds * noise)
    torch.testing.assert_close(model(**data).weight_tokens, mean)


def test_noise_learns_its_share_of_the_spread_of_the_zoo():
    model, data = with_places(learns_noise=True, noise_share=0.6).train(), batch()
    spread = 0.1 * data["padding_mask"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(80):
        loss = model(**data, temperature=0.1, uniform=draws(step), zoo_stds=spread).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    stds = model(**data).token_stds[data["padding_mask"]]
    assert 0.05 < stds.mean() < 0.15  # as the zoo's, where nothing speaks against it


def test_a_task_of_one_row_says_nothing_of_noise():
    model, data = with_places(learns_noise=True), batch()
    losses = [model(**data, zoo_stds=spread * data["padding_mask"]).loss for spread in (0.0, 0.1)]
    alone = model(**data).loss
    lacking = SHARE_WEIGHT * model.config.noise_share**2
    torch.testing.assert_close(losses[0], alone + lacking)
    assert not torch.isclose(losses[1], alone, atol=1e-2)


def test_given_codes_are_decoded_and_what_makes_codes_may_be_frozen():
    model, data = with_places(), batch()
    codes = model(**data).codes.flip(0)[:, :BODY]  # of rows whose first tokens are all there
    part = {name: tensor[:, :BODY] for name, tensor in data.items()}
    part["padding_mask"] = torch.ones_like(part["padding_mask"])
    model.freeze_codes()
    output = model(**part, codes=codes)
    read = [part["descriptors"], part["name_embeds"], part["padding_mask"].any(-1), part["class_parts"]]
    torch.testing.assert_close(output.weight_tokens, model.decode(model.embed_codes(codes), *read))
    output.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("decoder") for name in trained)
    assert not any(name.startswith(("encoder", "codebook", "to_code", "token_in")) for name in trained)
    model.freeze_codes(False)
    assert all(parameter.requires_grad for parameter in model.parameters())

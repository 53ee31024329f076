"""IGPG's prior: what it learns it writes, sample by sample, within its context and beyond it."""

import pytest
import torch
import torch.nn.functional as F

from hf_weightgen.models import modeling_igpg
from hf_weightgen.models.modeling_igpg import IGPGConfig, IGPGPrior
from tiny import random


SETTINGS = {
    "num_codes": 8, "codes_per_token": 2, "descriptor_size": 5, "embedding_size": 4, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "tail": 8, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = 6


@pytest.fixture
def prior():
    torch.manual_seed(0)
    return IGPGPrior(IGPGConfig(**SETTINGS)).eval()


@pytest.fixture
def placed():
    torch.manual_seed(0)
    return IGPGPrior(IGPGConfig(**SETTINGS, num_places=TOKENS, place_size=4)).eval()


def asked(count: int, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    generator = random(1)
    return {
        "conditions": F.normalize(torch.randn(2, 3, 4, generator=generator), dim=-1)[torch.arange(count) % 2],
        "descriptors": torch.randn(1, tokens, 5, generator=generator).expand(count, -1, -1),
        "name_embeds": torch.zeros(count, tokens, 4),
    }


def generators(count: int) -> list[torch.Generator]:
    return [random(10 + k) for k in range(count)]


def test_it_learns_what_each_condition_asks_for_and_writes_it(prior):
    wanted = torch.randint(8, (2, TOKENS, 2), generator=random(2))
    data, optimizer = asked(2), torch.optim.Adam(prior.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        losses.append(prior(codes=wanted, **data).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 1.8 and losses[-1] < 0.1
    prior.eval()
    assert torch.equal(prior.write(**data), wanted)
    for settings in ({"top_k": 1}, {"temperature": 0.1}, {"top_p": 0.5}):
        assert torch.equal(prior.write(**data, generators=generators(2), **settings), wanted)
    swapped = data | {"conditions": data["conditions"].flip(0)}
    assert torch.equal(prior.write(**swapped), wanted.flip(0))


def test_samples_are_their_own_in_any_batch_and_codes_are_valid(prior):
    several = prior.write(**asked(4), generators=generators(4))
    assert several.shape == (4, TOKENS, 2) and several.min() >= 0 and several.max() < 8
    assert len(several.flatten(1).unique(dim=0)) == 4
    fewer = prior.write(**{name: value[:2] for name, value in asked(4).items()}, generators=generators(2))
    assert torch.equal(fewer, several[:2])
    assert torch.equal(prior.write(**asked(4), generators=generators(4)), several)


@pytest.mark.parametrize("tokens", [TOKENS, 40], ids=["one context", "longer than the context"])
def test_the_cache_changes_nothing(prior, tokens):
    data = asked(2, tokens)
    for drawn in (lambda: None, lambda: generators(2)):
        cached = prior.write(**data, generators=drawn())
        assert cached.shape == (2, tokens, 2)
        assert torch.equal(prior.write(**data, generators=drawn(), use_cache=False), cached)


def test_of_a_long_network_a_context_is_described_at_once(prior, monkeypatch):
    data = asked(2, 90)  # 180 codes, of which 59 fit beside the prefix
    expected, seen, slots = prior.write(**data, generators=generators(2)), [], prior.slots
    monkeypatch.setattr(modeling_igpg, "AT_ONCE", 7)
    monkeypatch.setattr(prior, "slots", lambda *described: seen.append(described[0].shape[1]) or slots(*described))
    assert torch.equal(prior.write(**data, generators=generators(2)), expected)
    assert max(seen) <= SETTINGS["max_position_embeddings"] // 2 and seen.count(7) > 10


@torch.no_grad()
def test_parts_of_a_long_network_follow_from_what_stands_at_their_slots(prior):
    prior.config.max_position_embeddings, prior.config.tail = 5 + 9, 3  # parts start within a token
    data = asked(2, 11)
    written = prior.write(**data)
    slots, levels = prior.slots(data["descriptors"], data["name_embeds"]), torch.tensor([0, 8])
    prefix, ids = prior.prefix(data["conditions"], slots.mean(1, keepdim=True)), (written + levels).flatten(1)
    done = 0
    while done < ids.shape[1]:
        start = max(0, done - 3)
        end = min(start + 9, ids.shape[1])
        before = torch.cat([prior.start.expand(2, 1, -1), prior.model.embed_tokens(ids[:, start : end - 1])], 1)
        inputs = torch.cat([prefix, before + slots[:, start:end]], 1)
        logits = prior.lm_head(prior.model(inputs_embeds=inputs).last_hidden_state[:, prefix.shape[1] :])
        for place in range(done, end):
            level = 8 * (place % 2)
            likeliest = logits[:, place - start, level : level + 8].argmax(-1) + level
            assert torch.equal(likeliest, ids[:, place])
        done = end


def test_what_is_longer_than_the_context_sees_the_tail_of_what_is_there(prior):
    data = asked(1, 40)  # 80 codes, of which 59 fit beside the prefix
    for parameter in (*prior.model.parameters(), prior.lm_head.weight):
        parameter.data *= 5  # untrained, the context would hardly count
    long, short = (prior.write(**data, generators=generators(1), tail=tail) for tail in (20, 1))
    fit = SETTINGS["max_position_embeddings"] - 5
    assert torch.equal(long.flatten()[:fit], short.flatten()[:fit]) and not torch.equal(long, short)


def test_parts_are_read_from_their_start_on_as_far_as_the_context_goes(prior):
    codes, data = torch.randint(8, (2, 40, 2), generator=random(2)), asked(2, 40)
    room = (SETTINGS["max_position_embeddings"] - 5) // 2  # tokens
    whole, part = (prior.code_losses(codes, **data, start=start)[0] for start in (0, 25))
    assert len(whole) == 2 * 2 * room and len(part) == 2 * 2 * 15
    changed = codes.clone()
    changed[:, :25] = (codes[:, :25] + 1) % 8
    torch.testing.assert_close(prior.code_losses(changed, **data, start=25)[0], part)
    changed[:, 25] = (codes[:, 25] + 1) % 8
    assert not torch.allclose(
        prior.code_losses(changed, **data, start=25)[0].view(2, -1)[:, 2:], part.view(2, -1)[:, 2:]
    )


def test_known_places_have_maps_of_what_is_asked_for(placed):
    data = asked(2, 40)
    described = {name: data[name][:, :1].expand(-1, 40, -1) for name in ("descriptors", "name_embeds")}  # all alike
    for places in (torch.arange(40) - 3, torch.arange(40)[:4].repeat(10)):
        with_places, without = (
            placed.slots(**described, places=told, conditions=data["conditions"]) for told in (places, None)
        )
        of_token = (with_places - without).unflatten(1, (40, 2)).abs().sum((0, 2, 3))
        assert torch.equal(of_token > 0, (places >= 0) & (places < TOKENS))
    first, second = placed._of_places(torch.eye(2, SETTINGS["hidden_size"]), torch.arange(TOKENS), TOKENS)
    assert not torch.isclose(first, second).all(-1).any()


def test_with_places_the_cache_changes_nothing_beyond_the_context(placed):
    data = asked(2, 40) | {"places": torch.arange(40) - 3}
    cached = placed.write(**data, generators=generators(2))
    assert torch.equal(cached, placed.write(**data, generators=generators(2), use_cache=False))


def test_with_places_it_learns_what_is_asked_for_from_wrong_codes_too(placed):
    wanted, places = torch.randint(8, (2, TOKENS, 2), generator=random(2)), torch.arange(TOKENS)
    data, optimizer = asked(2), torch.optim.Adam(placed.train().parameters(), lr=3e-3)
    for step in range(120):
        read = torch.randint(8, wanted.shape, generator=random(step))
        optimizer.zero_grad()
        placed(codes=wanted, read=read, places=places, **data).loss.backward()
        optimizer.step()
    placed.eval()
    for read in (None, wanted.flip(0), (wanted + 1) % 8):
        losses, _ = placed.code_losses(wanted, **data, places=places, read=read)
        assert losses.mean() < 0.1
    assert torch.equal(placed.write(**data, places=places), wanted)


def test_what_is_read_is_scored_by_what_is_wanted(prior):
    codes, data = torch.randint(8, (2, TOKENS, 2), generator=random(2)), asked(2)
    losses = prior.code_losses(codes, **data)[0].view(2, -1)
    read = codes.clone()
    read[:, 3] = (codes[:, 3] + 1) % 8
    misled = prior.code_losses(codes, **data, read=read)[0].view(2, -1)
    torch.testing.assert_close(misled[:, :7], losses[:, :7])
    assert not torch.allclose(misled[:, 7:], losses[:, 7:])
    torch.testing.assert_close(prior.code_losses(codes, **data, read=codes)[0].view(2, -1), losses)


def test_padding_and_what_is_not_told_say_nothing(prior):
    codes, data = torch.randint(8, (2, TOKENS, 2), generator=random(2)), asked(2)
    codes[1, 4:] = -1
    losses, of = prior.code_losses(codes, **data)
    assert of.bincount().tolist() == [2 * TOKENS, 8]
    single = {name: value[1:, :4] if name != "conditions" else value[1:] for name, value in data.items()}
    torch.testing.assert_close(prior.code_losses(codes[1:, :4], **single)[0], losses[of == 1])
    silent = data | {"conditions": torch.zeros(2, 3, 4)}
    assert not torch.allclose(prior(codes=codes, **silent).loss, prior(codes=codes, **data).loss)
    for parameter in prior.condition_in.parameters():
        parameter.data.normal_(generator=random(5))
    again = prior(codes=codes, **silent).loss
    torch.testing.assert_close(again, prior(codes=codes, **silent).loss)


def test_every_condition_and_description_counts(prior):
    codes, data = torch.randint(8, (2, TOKENS, 2), generator=random(2)), asked(2)
    before = prior.code_losses(codes, **data)[0]
    for name in data:
        changed = data | {name: data[name] + 1.0}
        assert not torch.allclose(prior.code_losses(codes, **changed)[0], before, atol=1e-5), name
    later = data["descriptors"].clone()
    later[:, -1] += (
        1  # of the last token: nothing of what is in front of it but through the mean, which the prefix has
    )
    assert not torch.allclose(prior.code_losses(codes, **data | {"descriptors": later})[0], before, atol=1e-5)


def test_saved_and_loaded(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    again = IGPGPrior.from_pretrained(tmp_path).eval()
    assert torch.equal(
        again.write(**asked(2), generators=generators(2)), prior.write(**asked(2), generators=generators(2))
    )
    with pytest.raises(ValueError, match="`tail` must be 1 to 58 codes.* got 59"):
        IGPGConfig(**SETTINGS | {"tail": 59})

"""What the predictor learns from, and that the autoencoder which it guides heeds it."""

import functools
from dataclasses import replace

import pytest
import torch

from hf_weightgen.models.modeling_predictor import AccuracyPredictor, AccuracyPredictorConfig
from hf_weightgen.targets.architectures import HEAD
from hf_weightgen.training.batches import StepRandom, ZooTensors
from hf_weightgen.training.objectives import vae_loss
from hf_weightgen.training.predictor import (
    GuidanceLoss,
    ScoredRows,
    disturbed,
    guiding_rows,
    predictor_loss,
    summed,
)
from hf_weightgen.training.sources import Source
from hf_weightgen.weights.tokenization import WeightTokenizer
from tiny import random, randomised, vae, zoo


TOTAL = 12


def draws(step: int = 0, rows: slice = slice(None)) -> StepRandom:
    return StepRandom(0, step, TOTAL, rows)


@pytest.fixture(scope="module")
def tiny_zoo():
    return zoo()


@pytest.fixture
def scored(tiny_zoo):
    return ScoredRows.of_zoo(tiny_zoo, torch.linspace(0.2, 0.9, len(tiny_zoo)))


def predictor(zoo: ZooTensors) -> AccuracyPredictor:
    torch.manual_seed(0)
    body = zoo.weight_tokens.shape[1] - zoo.class_mask.shape[1]
    config = AccuracyPredictorConfig(token_size=4, num_body_tokens=body, embedding_size=8, hidden_size=16, dropout=0.0)
    return randomised(AccuracyPredictor(config))


def test_rows_without_an_accuracy_are_left_out(tiny_zoo):
    accuracies = torch.full((len(tiny_zoo),), torch.nan)
    with pytest.raises(ValueError, match="nothing to predict"):
        ScoredRows.of_zoo(tiny_zoo, accuracies)
    accuracies[[2, 7]] = torch.tensor([0.5, 0.25])
    rows = ScoredRows.of_zoo(tiny_zoo, accuracies.double())
    assert len(rows) == 2 and rows.accuracies.tolist() == [0.5, 0.25] and rows.accuracies.dtype == torch.float32
    assert torch.equal(rows.weight_tokens, tiny_zoo.weight_tokens[[2, 7]])
    assert rows.task_of.tolist() == tiny_zoo.task_of[[2, 7]].tolist()


def test_state_dicts_take_the_places_of_the_zoo(scored):
    many = [{"head.weight": torch.randn(c, 4), "head.bias": torch.randn(c), "hidden.weight": torch.randn(4, 3)} for c in (2, 3)]  # fmt: skip
    tokenizer = WeightTokenizer.fit(many, token_size=5, head=list(HEAD))
    embeds = {name: torch.randn(1, count, 8) for name, count in (("two", 2), ("three", 3))}
    prompts = {name: torch.randn(1, 8) for name in embeds}
    rows = ZooTensors.of(tokenizer, many, list(embeds), embeds, prompts, {name: name for name in embeds})
    found = ScoredRows.of(tokenizer, rows, many[:1] * 2, "two", torch.tensor([0.1, 0.2]))
    assert found.task_of.tolist() == [0, 0]
    for part in ("weight_tokens", "padding_mask"):
        assert torch.equal(getattr(found, part), getattr(rows, part)[[0, 0]])
    both = ScoredRows.joined([found, ScoredRows.of_zoo(rows, torch.tensor([0.3, 0.4]))])
    assert len(both) == 4 and both.accuracies.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_disturbed_members_are_near_and_far_and_padding_stays_empty(tiny_zoo):
    for task in range(3):
        members = tiny_zoo.weight_tokens[tiny_zoo.task_of == task]
        made = disturbed(tiny_zoo, task, 200, random(0))
        assert torch.equal(made, disturbed(tiny_zoo, task, 200, random(0)))
        assert not made[:, ~tiny_zoo.padding_mask[tiny_zoo.task_of == task][0]].any()
        distance = torch.cdist(made.flatten(1), members.flatten(1)).amin(1)
        apart = torch.cdist(members.flatten(1), members.flatten(1)).max()
        assert distance.min() < 0.6 * apart and distance.max() > apart


def test_the_loss_of_a_batch_is_the_mean_over_its_shares(tiny_zoo, scored):
    model = predictor(tiny_zoo)
    whole = predictor_loss(model, scored, tiny_zoo, draws())
    shares = [predictor_loss(model, scored, tiny_zoo, draws(rows=slice(i, i + 4))) for i in (0, 4, 8)]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def test_training_lowers_the_loss_and_reaches_every_parameter(tiny_zoo, scored):
    model, losses = predictor(tiny_zoo), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        loss = predictor_loss(model, scored, tiny_zoo, draws(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_guide_compares_weights_with_their_reconstruction(tiny_zoo):
    model = predictor(tiny_zoo)
    guide, rows = GuidanceLoss(model, tiny_zoo, weight=3.0), torch.arange(0, 18, 3)
    truth = tiny_zoo.weight_tokens[rows]
    assert guide(truth, truth, rows, draws(rows=slice(6))) == 0
    other = truth + torch.randn(truth.shape, generator=random(0))
    conditions = tiny_zoo.prompts(tiny_zoo.task_of[rows], draws(rows=slice(6)), purpose=33)
    embeds = torch.stack([tiny_zoo.class_embeds[t][0] for t in tiny_zoo.task_of[rows].tolist()])
    said = [
        model(tokens, tiny_zoo.padding_mask[rows], embeds, tiny_zoo.class_mask[tiny_zoo.task_of[rows]], conditions)
        for tokens in (truth, other)
    ]
    expected = 3 * (said[0].predicted_accuracies - said[1].predicted_accuracies).square().mean()
    torch.testing.assert_close(guide(other, truth, rows, draws(rows=slice(6))), expected)


def test_the_guide_reaches_the_encoder_and_stays_as_it_is(tiny_zoo):
    model, guided = predictor(tiny_zoo), vae(tiny_zoo)
    guide = GuidanceLoss(model, tiny_zoo, weight=1.0)

    def gradient(*losses) -> dict[str, torch.Tensor]:
        guided.zero_grad()
        vae_loss(guided, tiny_zoo, draws(), summed(*losses)).backward()
        return {name: p.grad.clone() for name, p in guided.named_parameters()}

    # zero: with a function loss all classes are shown
    plain, with_guide = gradient(lambda tokens, *_: tokens.sum() * 0), gradient(None, guide)
    for name in ("token_in", "body_in.weight", "class_in.weight", "to_latent.2.weight", "token_out"):
        assert not torch.allclose(plain[name], with_guide[name]), name
    assert all(p.grad is None and not p.requires_grad for p in guide.predictor.parameters())
    assert all(p.requires_grad for p in model.parameters())  # the guide has a copy of its own


def test_the_guided_autoencoder_keeps_what_the_predictor_sees(tiny_zoo):
    """Trained for the guide's term alone, predictions of reconstructions come close to those of the originals."""
    guided, guide = vae(tiny_zoo), GuidanceLoss(predictor(tiny_zoo), tiny_zoo)
    optimizer, losses = torch.optim.Adam(guided.parameters(), lr=3e-3), []

    def of_guide(tokens, truth, index, random):
        losses.append(guide(tokens, truth, index, random))
        return losses[-1]

    for step in range(120):
        vae_loss(guided, tiny_zoo, draws(step), of_guide)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])


def test_no_losses_are_none_and_several_are_summed():
    assert summed() is None and summed(None, None) is None
    assert summed(lambda x: x, None, lambda x: 2 * x)(3) == 9


def test_a_guide_learns_from_members_and_disturbed_ones_where_they_are_scored(tiny_zoo):
    source = functools.partial(
        Source, None, tiny_zoo, None, [], {}, [], {}, None, 0, 0, accuracies=torch.full((len(tiny_zoo),), 0.9)
    )
    assert len(guiding_rows(source(), 5, random(0))) == len(tiny_zoo)  # of adapters the members alone
    state_dicts = [{"body": torch.randn(5, 3), "head": torch.randn(classes, 4)} for classes in (2, 3)]
    tokenizer = WeightTokenizer.fit(state_dicts, token_size=4, head=["head"])

    def validate(made, task):
        assert [len(weights["head"]) for weights in made] == [3 if task == "b" else 2] * 5
        return torch.full((5,), 0.1).double()

    rows = guiding_rows(replace(source(), tokenizer=tokenizer, validate=validate), 5, random(0))
    assert len(rows) == len(tiny_zoo) + 15
    assert rows.accuracies.unique().tolist() == pytest.approx([0.1, 0.9])
    assert rows.task_of[-15:].tolist() == [0] * 5 + [1] * 5 + [2] * 5

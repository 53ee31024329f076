"""The accuracy predictor sees what counts and nothing else, learns to rank, and is saved whole."""

import pytest
import torch
import torch.nn.functional as F

from hf_weightgen.models.modeling_predictor import AccuracyPredictor, AccuracyPredictorConfig
from tiny import random, randomised


B, T, C, S, E = 5, 4, 3, 6, 8


def predictor(**settings) -> AccuracyPredictor:
    torch.manual_seed(0)
    sizes = {"token_size": S, "num_body_tokens": T, "embedding_size": E, "hidden_size": 16}
    return randomised(AccuracyPredictor(AccuracyPredictorConfig(**sizes, **settings))).eval()


def batch(size: int = B, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = random(seed)
    mask = torch.ones(size, T + C, S, dtype=torch.bool)
    mask[:, 1, 4:] = False  # the end of a tensor
    return {
        "weight_tokens": torch.randn(size, T + C, S, generator=draw),
        "padding_mask": mask,
        "class_embeds": F.normalize(torch.randn(size, C, E, generator=draw), dim=-1),
        "class_mask": torch.ones(size, C, dtype=torch.bool),
        "condition_embeds": F.normalize(torch.randn(size, E, generator=draw), dim=-1),
    }


def test_the_loss_is_the_mean_squared_error_of_accuracies():
    model, true = predictor(), torch.rand(B, generator=random(1))
    output = model(**batch(), accuracies=true)
    assert output.predicted_accuracies.shape == (B,)
    assert ((output.predicted_accuracies > 0) & (output.predicted_accuracies < 1)).all()
    torch.testing.assert_close(output.loss, (output.predicted_accuracies - true).square().mean())
    assert output[0] is output.loss and model(**batch()).loss is None


def test_every_input_counts():
    model, given = predictor(), batch()
    plain = model(**given).predicted_accuracies
    for name, changed in batch(seed=1).items():
        if changed.is_floating_point():
            assert (model(**given | {name: changed}).predicted_accuracies - plain).abs().min() > 1e-6, name
    without = given | {"condition_embeds": None}
    zeros = given | {"condition_embeds": torch.zeros(B, E)}
    torch.testing.assert_close(model(**without).predicted_accuracies, model(**zeros).predicted_accuracies)


def test_padding_the_order_of_classes_and_a_shift_of_all_of_them_are_not_seen():
    model, given = predictor(), batch()
    plain = model(**given).predicted_accuracies
    filled = given | {"weight_tokens": given["weight_tokens"].where(given["padding_mask"], 99.0)}
    torch.testing.assert_close(model(**filled).predicted_accuracies, plain)
    order = [2, 0, 1]
    turned = given | {
        "weight_tokens": torch.cat([given["weight_tokens"][:, :T], given["weight_tokens"][:, T:][:, order]], 1),
        "class_embeds": given["class_embeds"][:, order],
    }
    torch.testing.assert_close(model(**turned).predicted_accuracies, plain)
    shifted = given["weight_tokens"].clone()
    shifted[:, T:] += 3.0
    torch.testing.assert_close(model(**given | {"weight_tokens": shifted}).predicted_accuracies, plain)
    wider = {name: F.pad(given[name], (0, 0, 0, 2)) for name in ("weight_tokens", "padding_mask", "class_embeds")}
    wider["class_mask"] = F.pad(given["class_mask"], (0, 2))
    torch.testing.assert_close(model(**given | wider).predicted_accuracies, plain)


def test_it_learns_to_rank_weights_that_it_never_saw():
    model = predictor(token_width=8, dropout=0.0).train()

    def true(given):  # small weights are good ones
        return (-given["weight_tokens"][:, :T].square().mean((1, 2))).exp()

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(200):
        given = batch(64, seed=step)
        given["weight_tokens"] *= torch.rand(64, 1, 1, generator=random(step))
        optimizer.zero_grad()
        model(**given, accuracies=true(given)).loss.backward()
        optimizer.step()
    given = batch(64, seed=1000)
    given["weight_tokens"] *= torch.rand(64, 1, 1, generator=random(1000))
    with torch.no_grad():
        predicted = model.eval()(**given).predicted_accuracies
    assert torch.corrcoef(torch.stack([predicted, true(given)]))[0, 1] > 0.9


@pytest.mark.parametrize("wrong", [85.0, -0.1, float("nan")])
def test_accuracies_in_points_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`accuracies` must lie in \[0, 1\]"):
        predictor()(**batch(), accuracies=torch.tensor([0.5, 0.5, 0.5, 0.5, wrong]))


def test_it_is_saved_and_loaded_whole(tmp_path):
    model = predictor(dropout=0.2)
    model.save_pretrained(tmp_path)
    again = AccuracyPredictor.from_pretrained(tmp_path)
    assert again.config.dropout == 0.2 and not again.training
    assert torch.equal(again(**batch()).predicted_accuracies, model(**batch()).predicted_accuracies)


def test_an_untrained_one_says_the_same_of_everything():
    plain = AccuracyPredictor(AccuracyPredictorConfig(token_size=S, num_body_tokens=T, embedding_size=E))
    torch.testing.assert_close(plain(**batch()).predicted_accuracies, torch.full((B,), 0.5))

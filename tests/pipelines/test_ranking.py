"""`best_of`: more samples are drawn than returned, and the accuracy predictor says which."""

import pytest
import torch

from hf_weightgen import WeightGenPipeline
from hf_weightgen.models.modeling_predictor import AccuracyPredictor, AccuracyPredictorConfig
from hf_weightgen.pipelines.ranking import best
from tiny import KNOWN, random, randomised


SST2, NEWS, _ = (prompts[0] for _, _, prompts in KNOWN.values())


@pytest.fixture
def ranked(pipe):
    """The generator of adapters with a predictor, which was never trained either."""
    vae = pipe.vae.config
    sizes = {"token_size": vae.token_size, "num_body_tokens": vae.num_body_tokens, "hidden_size": 16}
    predictor = randomised(AccuracyPredictor(AccuracyPredictorConfig(**sizes)).eval())
    with torch.no_grad():
        predictor.accuracy_out.weight.normal_(generator=random(0))
    pipe.register_modules(accuracy_predictor=predictor)
    pipe.check_parts()
    return pipe


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)


def test_the_best_of_each_are_returned_the_best_first():
    assert best([0.2, 0.9, 0.5, 0.9, 0.1, 0.3], 3, 2) == [1, 2, 3, 5]
    assert best([0.5, 0.5, 0.5], 3, 2) == [0, 1]  # ties as they came


def test_the_best_samples_by_prediction_are_returned(ranked):
    drawn = ranked([SST2, NEWS], num_samples=6, generator=random(0))
    chosen = ranked([SST2, NEWS], num_samples=2, best_of=6, generator=random(0))
    assert len(drawn.predicted_accuracies) == 12 and len(set(drawn.predicted_accuracies)) == 12
    expected = []
    for first in (0, 6):
        order = sorted(range(first, first + 6), key=lambda j: -drawn.predicted_accuracies[j])
        expected += order[:2]
    assert chosen.predicted_accuracies == pytest.approx([drawn.predicted_accuracies[j] for j in expected], abs=1e-5)
    assert chosen.seeds == [drawn.seeds[j] for j in expected]
    assert chosen.prompts == [SST2, SST2, NEWS, NEWS] and chosen.tasks == ["sst2"] * 2 + ["ag_news"] * 2
    assert [len(labels) for labels in chosen.labels] == [2, 2, 4, 4] and len(chosen.targets) == 4
    assert_same(chosen.weights, [drawn.weights[j] for j in expected])
    torch.testing.assert_close(chosen.latents, drawn.latents[expected], atol=1e-5, rtol=0)
    assert chosen.select([1]).predicted_accuracies == chosen.predicted_accuracies[1:2]


def test_with_one_best_of_the_first_samples_are_the_same_for_any_number(ranked):
    most = ranked(SST2, num_samples=4, best_of=6, generator=random(3))
    for count in (1, 3):
        fewer = ranked(SST2, num_samples=count, best_of=6, generator=random(3))
        assert fewer.seeds == most.seeds[:count]
        assert_same(fewer.weights, most.weights[:count])
    again = ranked(SST2, num_samples=4, best_of=6, generator=random(3))
    assert again.predicted_accuracies == pytest.approx(most.predicted_accuracies)
    assert most.predicted_accuracies == sorted(most.predicted_accuracies, reverse=True)


def test_latents_are_chosen_too(ranked):
    weights = ranked(SST2, num_samples=2, best_of=5, generator=random(1))
    latents = ranked(SST2, num_samples=2, best_of=5, generator=random(1), output_type="latent")
    assert latents.weights == [] and latents.seeds == weights.seeds
    torch.testing.assert_close(latents.latents, weights.latents)
    assert ranked(SST2, output_type="latent").predicted_accuracies is None  # nothing was decoded


def test_own_weights_are_judged_as_samples_are(ranked):
    output = ranked(SST2, num_samples=3, generator=random(0))
    for labels in (None, output.labels[0]):
        found = ranked.predict_accuracies(output.weights, SST2, labels)
        assert found.tolist() == pytest.approx(output.predicted_accuracies, abs=1e-5)
    with pytest.raises(ValueError, match="Give one `prompt`, got 2"):
        ranked.predict_accuracies(output.weights, [SST2, NEWS])


def test_it_is_saved_and_loaded(ranked, encoder, tmp_path):
    ranked.save_pretrained(tmp_path)
    again = WeightGenPipeline.from_pretrained(tmp_path)
    again._encoder = encoder
    again.set_progress_bar_config(disable=True)
    settings = {"num_samples": 2, "best_of": 5}
    mine, theirs = (pipe(SST2, generator=random(2), **settings) for pipe in (ranked, again))
    assert theirs.seeds == mine.seeds
    assert theirs.predicted_accuracies == pytest.approx(mine.predicted_accuracies)
    assert_same(theirs.weights, mine.weights)


def test_a_generator_without_a_predictor_says_so(pipe):
    for ask in (lambda: pipe(SST2, best_of=4), lambda: pipe.predict_accuracies([], SST2)):
        with pytest.raises(ValueError, match="has no accuracy predictor. Leave `best_of` out .*`--predictor_steps`"):
            ask()
    assert pipe(SST2).predicted_accuracies is None


@pytest.mark.parametrize("wrong", [2, 0, True, 4.0, "4"])
def test_fewer_than_asked_for_are_refused(ranked, wrong):
    with pytest.raises(ValueError, match="`best_of` must be a whole number of at least `num_samples`, which is 3"):
        ranked(SST2, num_samples=3, best_of=wrong)


def test_a_predictor_of_another_generator_is_refused(ranked):
    ranked.accuracy_predictor.config.num_body_tokens += 1
    with pytest.raises(ValueError, match="accuracy predictor has .*different generators"):
        ranked.check_parts()

"""Datasets as conditions: examples stay with their class, shares of a batch agree, and the encoder learns whose they are."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_denoiser import WeightDenoiser
from hf_weightgen.targets.base_models import unpack_embeddings
from hf_weightgen.training.batches import StepRandom
from hf_weightgen.training.d2nwg import make_schedulers
from hf_weightgen.training.dataset_encoder import DRAWS, REPEATS, JointDenoiser, dataset_loss, examples, with_datasets
from hf_weightgen.training.objectives import noised
from hf_weightgen.training.sources import known_tasks
from tiny import random, zoo


TOTAL = 8


def draws(step: int = 0, rows: slice = slice(None)) -> StepRandom:
    return StepRandom(0, step, TOTAL, rows)


@pytest.fixture(scope="module")
def rows():
    return zoo()


@pytest.fixture(scope="module")
def features(rows):
    """Per task and class a centre of its own, and examples around it; zeros where a task has no such class."""
    made = []
    for mask in rows.class_mask:
        centres = F.normalize(torch.randn(len(mask), 1, 6, generator=random(len(made))), dim=-1)
        pool = F.normalize(centres + 0.2 * torch.randn(len(mask), 12, 6, generator=random(9)), dim=-1)
        made.append(pool * mask[:, None, None])
    return made


def encoder(rows) -> DatasetEncoder:
    torch.manual_seed(0)
    size = rows.prompt_embeds[0].shape[1]
    return DatasetEncoder(DatasetEncoderConfig(feature_size=6, embedding_size=size, latent_size=4, hidden_size=32))


def test_examples_are_of_their_task_and_class(features):
    tasks = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    shown = examples(features, tasks, 5, draws())
    for example_set, task in zip(shown, tasks.tolist(), strict=True):
        for of_class, pool in zip(example_set, features[task], strict=True):
            found = (of_class[:, None] == pool).all(-1).any(1)
            assert found.all()
    assert not torch.equal(shown, examples(features, tasks, 5, draws(1)))


def test_shares_of_a_batch_show_what_the_whole_batch_shows(features):
    tasks = torch.tensor([0, 1] * 4)
    whole = examples(features, tasks, 3, draws())
    for part in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(examples(features, tasks[part], 3, draws(rows=part)), whole[part], atol=0, rtol=0)


def test_training_brings_datasets_to_their_prompts_and_classes_to_their_names(rows, features):
    model, latents = encoder(rows), torch.randn(len(rows), 4, generator=random(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(400):
        loss = dataset_loss(model, features, latents, rows, draws(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    more = with_datasets(rows, model.eval(), features, seed=1)
    for task, (before, after) in enumerate(zip(rows.prompt_embeds, more.prompt_embeds, strict=True)):
        assert len(after) == REPEATS * len(before) + DRAWS
        assert torch.equal(after[:-DRAWS], before.repeat(REPEATS, 1))
        others = torch.stack([F.normalize(p.mean(0), dim=0) for p in rows.prompt_embeds])
        assert ((after[-DRAWS:] @ others.mT).argmax(1) == task).float().mean() > 0.9
        mask, (own, other) = rows.class_mask[task], rows.class_embeds[task]
        texts, of_classes = more.class_embeds[task].split([REPEATS * len(rows.class_embeds[task]), DRAWS])
        assert torch.equal(texts, rows.class_embeds[task].repeat(REPEATS, 1, 1)) and not of_classes[:, ~mask].any()
        expected = F.normalize(0.75 * own + 0.25 * other, dim=-1)  # the first wording comes three times of four
        assert (of_classes * expected).sum(-1)[:, mask].mean() > 0.9
    assert torch.equal(more.weight_tokens, rows.weight_tokens)


@pytest.mark.parametrize("alignment", ["info_nce", "soft"])
def test_the_mlp_of_the_ablation_learns_too(rows, alignment):
    same = replace(rows, class_mask=torch.ones_like(rows.class_mask))  # it reads one number of classes
    features = [
        F.normalize(torch.randn(*same.class_mask.shape[1:], 12, 6, generator=random(t)), dim=-1)
        for t in range(len(same.class_mask))
    ]
    torch.manual_seed(0)
    config = DatasetEncoderConfig(
        feature_size=6, embedding_size=rows.prompt_embeds[0].shape[1], latent_size=4, hidden_size=32, pooling="mlp",
        num_classes=same.class_mask.shape[1], alignment=alignment,
    )  # fmt: skip
    model, latents = DatasetEncoder(config), torch.randn(len(rows), 4, generator=random(3))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for step in range(30):
        loss = dataset_loss(model, features, latents, same, draws(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_an_encoder_that_learns_with_the_denoiser_tells_it_whose_weights_to_make(rows, features):
    torch.manual_seed(0)
    size = rows.prompt_embeds[0].shape[1]
    model = JointDenoiser(WeightDenoiser(1, 2, size, hidden_size=32, num_layers=1), encoder(rows))
    noise_scheduler, _ = make_schedulers("v_prediction")
    latents = (2.0 * rows.task_of - 1)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()  # -1 and 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(300):
        loss = model(noise_scheduler, latents, torch.full_like(latents, -6.0), features, rows, draws(step))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # as several processes need it
        optimizer.step()
    model.eval()
    tasks = torch.arange(TOTAL) % 2
    shown = examples(features, tasks, 5, draws(999))
    with torch.no_grad():
        embeds, _ = model.encoder.encode(shown, rows.class_mask[tasks][..., None].expand(shown.shape[:3]))
        clean = latents[[rows.task_of.tolist().index(t) for t in tasks.tolist()]]
        noise = torch.randn(clean.shape, generator=random(1))
        noisy, timesteps, target = noised(noise_scheduler, clean, noise, torch.full((TOTAL,), 0.9))
        errors = [
            F.mse_loss(model.denoiser(noisy, timesteps, class_labels=condition).sample, target)
            for condition in (embeds, embeds.roll(1, 0))  # the other task's
        ]
    assert errors[0] < 0.5 * errors[1]


def test_thresholds_tell_conditions_that_were_never_seen_from_those_of_other_tasks():
    def near(task: int, noise: float, seed: int) -> torch.Tensor:
        centre = F.normalize(torch.randn(3, 64, generator=random(task)), dim=-1)  # asked for in three ways
        drawn = torch.randn(40, 64, generator=random(100 * seed + task)) * noise / 8
        return F.normalize(centre[torch.arange(40) % 3] + drawn, dim=-1)

    def cosines(conditions: torch.Tensor) -> torch.Tensor:
        centres = torch.cat([unpack_embeddings(task["prompt_embeddings"], 64) for task in known])
        return (conditions @ centres.mT).amax(1)

    tasks, wide, narrow = [{"name": name} for name in "abc"], 0.8, 0.1
    known, thresholds = known_tasks(tasks, [(near(t, wide, 1), near(t + 10, narrow, 2)) for t in range(3)])
    assert thresholds["far_below"] < thresholds["known_above"] < thresholds["datasets_above"] < 1
    for t in range(3):
        assert (cosines(near(t, wide, 3)) > thresholds["far_below"]).float().mean() > 0.85
        assert (cosines(near(t + 20, wide, 3)) < thresholds["far_below"]).float().mean() > 0.95
        assert (cosines(near(t + 10, narrow, 3)) > thresholds["datasets_above"]).all()
        assert (cosines(near(t + 10, wide, 3)) < thresholds["datasets_above"]).all()
    assert known_tasks(tasks, [(near(t, wide, 1)[:1],) for t in range(3)])[1] == {"far_below": 1.0, "known_above": 1.0}

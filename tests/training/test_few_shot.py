"""Generators of heads from a few examples: they start as ridge regression, learn, and heads that they make work."""

import pytest
import torch

from hf_weightgen.evaluation.few_shot import few_shot_rows, score_head, tune, with_names
from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig, Ridge
from hf_weightgen.models.modeling_denoiser import WeightDenoiser
from hf_weightgen.models.modeling_weight_vae import WeightVAE, WeightVAEConfig
from hf_weightgen.pipelines.pipeline_d2nwg import D2NWGPipeline
from hf_weightgen.pipelines.pipeline_utils import WeightGenPipeline
from hf_weightgen.targets.architectures import HEAD
from hf_weightgen.targets.base_models import MINILM, pack_embeddings
from hf_weightgen.training.batches import StepRandom
from hf_weightgen.training.d2nwg import make_schedulers
from hf_weightgen.training.few_shot import (
    HeadGenerator,
    HeadTensors,
    fit_ridge,
    head_logits,
    latent_loss,
    scaled_head_latents,
    start_from_ridge,
    whitening,
)
from hf_weightgen.weights.tokenization import WeightTokenizer
from hf_weightgen.zoo.features import FeatureSet, draw_task
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.heads import HeadZooConfig, build_head_zoo
from hf_weightgen.zoo.schema import zoo_state_dicts
from tiny import random


SIZE, CLASSES = 8, 12


def noisy_set(name: str, seed: int) -> FeatureSet:
    """Classes differ in the first half of their features; the second half is noise, as it is in every such set."""
    generator = random(seed)
    centres = torch.cat(
        [torch.randn(CLASSES, 1, SIZE // 2, generator=generator), torch.zeros(CLASSES, 1, SIZE // 2)], -1
    )
    loud = torch.tensor([0.2] * (SIZE // 2) + [1.0] * (SIZE // 2))
    points = centres + loud * torch.randn(CLASSES, 30, SIZE, generator=generator)
    points = points / points.norm(dim=-1, keepdim=True)
    return FeatureSet(name, points, torch.full((CLASSES,), 30), tuple(f"{name} {c}" for c in range(CLASSES)))


@pytest.fixture(scope="module")
def sets() -> dict[str, FeatureSet]:
    return {name: noisy_set(name, seed) for seed, name in enumerate(("a", "b"))}


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory) -> tuple[D2NWGPipeline, HeadTensors, list[float]]:
    folder = tmp_path_factory.mktemp("heads")
    config = HeadZooConfig(tuple(sets), tasks=40, ways=(5, 3), group=20, examples=10, tests=5, steps=20)
    build_head_zoo(sets, folder, config, progress=False)
    zoo = load_zoo(str(folder))
    rows = [i for i, split in enumerate(zoo["split"]) if split == "train"]
    tokenizer = WeightTokenizer.fit(zoo_state_dicts(zoo, rows), token_size=SIZE + 1, head=HEAD)
    tensors = HeadTensors.of(zoo, tokenizer, sets, "train")
    torch.manual_seed(0)
    sizes = {"embedding_size": SIZE + 1, "hidden_size": 16}
    vae = WeightVAE(
        WeightVAEConfig(
            token_size=SIZE + 1, num_body_tokens=0, latent_shape=(1, 2, 2), noise_scale=0.0, kl_weight=1.0, **sizes
        )
    )
    encoder = DatasetEncoder(
        DatasetEncoderConfig(feature_size=SIZE, latent_size=4, num_attention_heads=2, ridge=True, **sizes)
    )
    fit_ridge(encoder.ridge, sets)
    start_from_ridge(vae, encoder, tensors)
    both = HeadGenerator(vae, encoder)
    optimizer, losses = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=1e-3), []
    for step in range(40):
        loss = both(tensors, StepRandom(0, step, 16, slice(None)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    draws = scaled_head_latents(vae, encoder.eval(), tensors)
    denoiser = WeightDenoiser(1, 2, SIZE + 1, hidden_size=16, num_layers=1)
    noise_scheduler, scheduler = make_schedulers("v_prediction")
    assert latent_loss(denoiser, noise_scheduler, draws, StepRandom(0, 0, 8, slice(None))).isfinite()
    known = {
        "name": "a",
        "family": "a",
        "labels": ["x", "y"],
        "prompt_embeddings": pack_embeddings(draws.of_dataset[:2]),
    }
    pipe = D2NWGPipeline(
        vae.eval(), denoiser.eval(), scheduler, tokenizer,
        target={"kind": "network", "config": {"input_shape": [SIZE], "layers": [], "activation": "relu"}},
        tasks=[known], encoder={"id": MINILM, "revision": None, "sha256": None}, dataset_encoder=encoder,
        datasets_above=-1.0, num_inference_steps=4,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe, tensors, losses


def test_the_metric_of_other_sets_helps(sets):
    generator = random(3)
    unseen, plain, ridge = noisy_set("c", 7), Ridge(SIZE), Ridge(SIZE)
    for one in (plain, ridge):
        one.requires_grad_(False)
        one.metric.copy_(torch.eye(SIZE))
        for parameter in (one.centre, one.log_strength, one.log_name_weight):
            parameter.zero_()
    chosen = fit_ridge(ridge, sets)
    assert chosen["power"] > 0 and 0 < chosen["accuracy"][0] < chosen["accuracy"][1] < 1
    tasks = [draw_task(unseen, 5, 1, 10, generator) for _ in range(100)]
    support, queries = (torch.stack([getattr(task, part) for task in tasks]) for part in ("support", "queries"))

    def accuracy(one: Ridge) -> float:
        rows = one(support, torch.ones(support.shape[:3], dtype=torch.bool))
        return (head_logits(rows, queries).argmax(-1) == torch.arange(5)[:, None]).double().mean().item()

    assert accuracy(ridge) > accuracy(plain) + 0.02


def test_whitening_makes_a_covariance_flatter():
    covariance = torch.diag(torch.tensor([4.0, 1.0, 0.25]))
    torch.testing.assert_close(whitening(covariance, 0.0), torch.eye(3))
    scales = whitening(covariance, 1.0).diagonal()
    assert scales[0] < scales[1] < scales[2]
    assert (scales.square() * covariance.diagonal()).max() / (scales.square() * covariance.diagonal()).min() < 16


def test_training_reads_examples_and_queries_of_the_rows_own_classes(trained, sets):
    _, tensors, losses = trained
    assert sum(losses[-10:]) < sum(losses[:10])
    rows = torch.tensor([0, 25])
    support, queries = tensors.draw(rows, 3, StepRandom(0, 0, 2, slice(None)))
    assert support.shape[:3] == (2, 5, 3)
    for r, row in enumerate(rows.tolist()):
        for c in range(int(tensors.class_mask[row].sum())):
            known = tensors.features[tensors.rows_of[row, c]]
            seen = torch.cat([support[r, c], queries[r, c]])
            assert len(seen.unique(dim=0)) == len(seen) and (seen[:, None] == known).all(-1).any(1).all()


def test_heads_of_unseen_classes_work_and_are_saved(trained, tmp_path):
    pipe, _, _ = trained
    pipe.save_pretrained(tmp_path)
    loaded = WeightGenPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    unseen = noisy_set("c", 7)
    task = draw_task(unseen, 4, 5, 10, random(0))
    dataset = {name: list(own) for name, own in zip(task.classes, task.support, strict=True)}
    made, again = (p(dataset=dataset, num_samples=3, generator=random(1)) for p in (pipe, loaded))
    assert made.weights[0]["head.weight"].shape == (4, SIZE)
    for one, two in zip(made.weights, again.weights, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert score_head(made.weights[0], task) > 60  # chance is 25
    assert made.to_model(0)(task.queries[0]).logits.shape == (10, 4)
    with pytest.raises(ValueError, match="features of size 8, got 5"):
        pipe(dataset={"x": [torch.zeros(5)], "y": [torch.ones(5)]})
    with pytest.raises(ValueError, match="reads datasets, no prompts"):
        pipe(prompt_embeds=None, prompt="digits", dataset=dataset)


def test_the_table_pairs_all_methods_on_the_same_tasks(trained):
    pipe, _, _ = trained
    unseen = noisy_set("c", 7)
    tasks = [draw_task(unseen, 3, 2, 6, random(seed)) for seed in range(12)]
    fits = tune([draw_task(noisy_set("d", 8), 3, 2, 6, random(seed)) for seed in range(3)], torch.zeros(SIZE))
    assert set(fits) == {"nearest_centroid", "ridge", "logistic_regression"}

    def generate(task, count):
        dataset = {name: list(own) for name, own in zip(task.classes, task.support, strict=True)}
        return pipe(dataset=dataset, num_samples=count, generator=random(0)).weights

    fitted = {method: [fit(task) for task in tasks] for method, fit in fits.items()}
    rows = {row["method"]: row for row in few_shot_rows("c", tasks, fitted, {"generated": generate}, draws=4)}
    mine = sum(score_head(generate(task, 1)[0], task) for task in tasks) / len(tasks)
    assert rows["generated"]["mean"] == pytest.approx(mine)
    ridge = sum(fitted["ridge"]) / len(tasks)
    assert rows["generated"]["difference"]["ridge"]["mean"] == pytest.approx(mine - ridge)
    low, high = rows["generated"]["difference"]["ridge"]["ci95"]
    assert low <= mine - ridge <= high
    assert rows["generated_top_3_by_queries"]["mean"] >= rows["generated_mean_of_4"]["mean"]
    assert rows["ridge"]["mean"] > 50 and rows["nearest_centroid"]["n"] == 12  # chance is 33


def test_names_count_as_examples():
    task = draw_task(noisy_set("c", 7), 3, 2, 6, random(0))
    names = {name: torch.full((SIZE,), float(i)) for i, name in enumerate(task.classes)}
    named = with_names(task, names)
    assert named.support.shape == (3, 3, SIZE) and named.queries is task.queries
    assert torch.equal(named.support[:, :2], task.support) and named.support[2, 2, 0] == 2

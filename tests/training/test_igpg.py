"""IGPG's two stages on networks of two layouts: codes that decode to the networks, and a prior that learns to write them."""

import copy
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_weightgen import WeightGenPipeline
from hf_weightgen.models.modeling_igpg import IGPGConfig, IGPGPrior
from hf_weightgen.models.modeling_weight_vqvae import WeightVQVAE, WeightVQVAEConfig, perplexity
from hf_weightgen.training.batches import StepRandom, ZooTensors
from hf_weightgen.training.igpg import (
    REVIVE_EVERY,
    DecoderLoss,
    VQVAELoss,
    _misread,
    by_layout,
    encode_zoo,
    of_layout,
    prior_loss,
)
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.objectives import NOISE_RAMP
from hf_weightgen.weights.descriptors import SIZE
from hf_weightgen.weights.pieces import num_places
from hf_weightgen.weights.tokenization import WeightTokenizer
from tiny import random


EMBEDDING, STEPS = 8, 120
SHAPES = {"a": {"body": (5, 3)}, "b": {"first": (2, 3), "second": (4,)}, "c": {"body": (5, 3)}}
CLASSES = {"a": 2, "b": 3, "c": 3}


@pytest.fixture(scope="module")
def zoo() -> tuple[ZooTensors, WeightTokenizer]:
    generator, state_dicts, names = random(0), [], []
    for task, shapes in SHAPES.items():
        shapes = shapes | {"head": (CLASSES[task], 4)}
        centre = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(6):
            state_dicts.append({n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in centre.items()})
            names.append(task)
    tokenizer = WeightTokenizer.fit(state_dicts, token_size=4, head=["head"])
    embeds = {t: F.normalize(torch.randn(2, n, EMBEDDING, generator=generator), dim=-1) for t, n in CLASSES.items()}
    prompts = {t: F.normalize(torch.randn(3, EMBEDDING, generator=generator), dim=-1) for t in CLASSES}
    rows = ZooTensors.of(tokenizer, state_dicts, names, embeds, prompts, {task: task for task in CLASSES})
    return rows, tokenizer


@pytest.fixture
def vqvae() -> WeightVQVAE:
    torch.manual_seed(0)
    config = WeightVQVAEConfig(
        token_size=4, descriptor_size=SIZE, embedding_size=EMBEDDING, hidden_size=32, num_layers=1, num_attention_heads=2,
        num_codes=16, code_size=8, codes_per_token=2,
    )  # fmt: skip
    return WeightVQVAE(config)


def draws(step: int, rows: slice = slice(None)) -> StepRandom:
    return StepRandom(0, step, 12, rows)


def fit(model, loss_of, steps: int = STEPS) -> list[float]:
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=4e-3), []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def test_rows_of_a_layout_are_its_networks(zoo):
    rows, tokenizer = zoo
    for layout, own in by_layout(rows, torch.arange(len(rows))):
        names = torch.stack([rows.class_embeds[t][0] for t in rows.task_of[own].tolist()])
        pieces, data = of_layout(rows, tokenizer, own, layout, names, size=4)
        count = tokenizer.num_body_tokens(layout) + 3
        assert len(pieces) == count
        assert data["weight_tokens"].shape == (len(own), count, 4)
        assert data["descriptors"].shape == (len(own), count, SIZE) and data["name_embeds"].shape == (
            len(own),
            count,
            EMBEDDING,
        )
        assert torch.equal(data["class_parts"].sum(1), rows.class_mask[rows.task_of[own]].sum(1))
        assert (data["name_embeds"].any(-1) == data["class_parts"].bool()).all()
        assert not data["weight_tokens"][~data["padding_mask"]].any()


def test_function_losses_see_the_networks_side_by_side(zoo, vqvae):
    rows, tokenizer = zoo
    seen = []

    def function_loss(tokens, truth, index, random):
        seen.append((tokens.detach(), truth, index))
        return tokens.square().mean()

    loss = VQVAELoss(vqvae, rows, tokenizer, STEPS, function_loss)
    plain = VQVAELoss(vqvae, rows, tokenizer, STEPS)(vqvae, draws(0))
    whole = loss(vqvae, draws(0))
    (tokens, truth, index), T = seen[0], tokenizer.num_all_body_tokens
    torch.testing.assert_close(whole, plain + tokens.square().mean())
    assert tokens.shape == truth.shape and torch.equal(truth, rows.weight_tokens[index])
    body = rows.padding_mask[index][:, :T].any(-1)
    assert (tokens[:, :T].any(-1) == body).all()


def test_training_makes_codes_that_decode_and_a_prior_that_writes_them(zoo, vqvae):
    rows, tokenizer = zoo
    loss = VQVAELoss(vqvae, rows, tokenizer, STEPS)
    losses = fit(vqvae, lambda step: loss(vqvae, draws(step)))
    assert losses[-1] < 0.3 * losses[0]
    assert all(1 < used <= 16 for used in loss.perplexity)
    codes, decoded = encode_zoo(vqvae, rows, tokenizer)
    assert codes.shape == (18, 4 + 3, 2)  # of the larger layout: 15 weights in tokens of 4
    assert torch.equal((codes >= 0).sum((1, 2)), 2 * rows.padding_mask.any(-1).sum(1))
    error = ((decoded - rows.weight_tokens) * rows.padding_mask)[:, : tokenizer.num_all_body_tokens]
    assert error.square().sum() < 0.2 * rows.weight_tokens[:, : tokenizer.num_all_body_tokens].square().sum()
    torch.manual_seed(0)
    config = IGPGConfig(
        num_codes=16, codes_per_token=2, descriptor_size=SIZE, embedding_size=EMBEDDING, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    prior = IGPGPrior(config)
    losses = fit(prior, lambda step: prior_loss(prior, codes, rows, tokenizer, draws(step), size=4))
    assert losses[0] > 2 and losses[-1] < 0.8


def test_codes_say_what_members_of_a_task_differ_by():
    generator, count = random(3), 64
    shapes = {"body": (8, 16), "head": (2, 16)}
    weights = [{n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for _ in range(count)]
    tokenizer = WeightTokenizer.fit(weights, token_size=16, head=["head"])
    embeds = F.normalize(torch.randn(2, EMBEDDING, generator=generator), dim=-1)
    rows = ZooTensors.of(tokenizer, weights, ["a"] * count, {"a": embeds[None]}, {"a": embeds}, {"a": "a"})
    torch.manual_seed(0)
    config = WeightVQVAEConfig(
        token_size=16, embedding_size=EMBEDDING, hidden_size=32, num_layers=1, num_attention_heads=2, num_codes=256
    )
    vqvae, steps = WeightVQVAE(config), 200
    loss = VQVAELoss(vqvae, rows, tokenizer, steps)
    fit(vqvae, lambda step: loss(vqvae, StepRandom(0, step, 32, slice(None))), steps)
    codes, decoded = encode_zoo(vqvae, rows, tokenizer)
    before, after = (tokens[:, : tokenizer.num_body_tokens()] for tokens in (rows.weight_tokens, decoded))
    spread = [torch.pdist(tokens.flatten(1)).median() for tokens in (before, after)]
    assert (after - before).square().mean() < 0.4 * before.var() and spread[1] > 0.75 * spread[0]
    assert perplexity(vqvae.counts(codes)).min() > 64


def test_the_decoder_learns_what_networks_do_and_codes_stay(zoo, vqvae):
    rows, tokenizer = zoo
    settings = {"num_places": num_places(tokenizer, 4), "place_size": 8, "learns_noise": True}
    model = WeightVQVAE(WeightVQVAEConfig(**vqvae.config.to_diff_dict() | settings))
    asked = []

    def function_loss(tokens, truth, index, random):
        asked.append(tokens.detach())
        return (tokens * rows.padding_mask[index] - truth).square().mean()

    codes = encode_zoo(model, rows, tokenizer)[0]
    loss = DecoderLoss(model, rows, tokenizer, codes, function_loss, [0.5, 0.1, 0.1])
    model.freeze_codes()
    losses = fit(model, lambda step: loss(model, draws(step)))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert torch.equal(encode_zoo(model, rows, tokenizer)[0], codes)
    first, late = (loss(model, StepRandom(0, step, 12, slice(None))) for step in (0, NOISE_RAMP))
    assert not torch.equal(first, late)
    assert asked[0].shape == (12, *rows.weight_tokens.shape[1:])


def test_the_decoder_reads_codes_that_are_mixed_with_those_of_the_same_task(zoo, vqvae):
    rows, tokenizer = zoo
    model = WeightVQVAE(WeightVQVAEConfig(**vqvae.config.to_diff_dict() | {"num_codes": len(rows)}))
    codes, seen = torch.arange(len(rows))[:, None, None].expand(-1, 7, 2), []  # whose codes they are

    def decoder(**data):
        mixed, own = data["codes"], drawn.pop(0)[:, None, None]
        assert torch.equal(rows.task_of[mixed], rows.task_of[own].expand_as(mixed))
        seen.append((mixed != own).double().mean((1, 2)))
        return model(**data)

    loss = DecoderLoss(model, rows, tokenizer, codes, lambda *step: 0.0)
    for step in range(40):
        index = rows.draw_rows(draws(step))
        drawn = [index[own] for _, own in by_layout(rows, index)]
        loss(decoder, draws(step))
        assert not drawn
    share = torch.cat(seen)
    assert 0.4 < (share == 0).double().mean() < 0.75 and share.max() > 0.3


def test_a_prior_reads_codes_of_other_networks_of_the_layout_but_is_asked_for_its_own(zoo):
    rows, tokenizer = zoo
    index, seen = torch.arange(12), []
    codes = torch.arange(len(rows))[:, None, None].expand(-1, 7, 2).clone()  # whose codes they are
    codes[rows.layout_of == 0, 5:] = -1
    for step in range(40):
        read = _misread(codes, rows, index, draws(step))
        assert torch.equal(read < 0, codes[index] < 0)
        wrong = read != codes[index]
        whose = rows.layout_of[read.clamp(min=0)]
        assert (whose == rows.layout_of[index][:, None, None])[wrong].all()
        seen.append(wrong[:, :5].double().mean((1, 2)))
    share = torch.cat(seen)
    assert 0.4 < (share == 0).double().mean() < 0.7 and share.max() > 0.8
    told = []

    def prior(codes, read, places, **rest):
        told.append((read, codes, places))
        return type("Output", (), {"loss": codes.sum() * 0.0})

    for step in range(40):
        prior_loss(prior, codes, rows, tokenizer, draws(step), size=4)
    assert all(read.shape == own.shape and ((read < 0) == (own < 0)).all() for read, own, _ in told)
    unplaced = [(places < 0).all().item() for *_, places in told]
    assert 0 < sum(unplaced) < 0.4 * len(told)


def test_dead_codes_are_revived_between_steps(zoo, vqvae):
    rows, tokenizer = zoo
    loss = VQVAELoss(vqvae, rows, tokenizer, 10 * REVIVE_EVERY)
    loss.usage = torch.zeros_like(loss.usage)
    loss.usage[:, 0] = 100
    before = vqvae.codebook.detach().clone()
    loss(vqvae, draws(REVIVE_EVERY)).backward()  # nothing was asked for yet
    assert torch.equal(vqvae.codebook, before)
    loss.usage = torch.zeros_like(loss.usage)
    loss.usage[:, 0] = 100
    loss(vqvae, draws(2 * REVIVE_EVERY)).backward()
    moved = (vqvae.codebook != before).any(-1)
    assert torch.equal(moved, (torch.arange(16) > 0).expand(2, -1))


class Interrupted(VQVAELoss):
    """Of a run that is stopped before some step."""

    stop: int | None = None

    def __call__(self, model, random):
        if random.step == self.stop:
            raise KeyboardInterrupt
        return super().__call__(model, random)


def test_a_run_that_was_stopped_ends_with_the_same_codes(zoo, vqvae, tmp_path):
    (rows, tokenizer), steps, stop = zoo, 2 * REVIVE_EVERY + 2, REVIVE_EVERY + 10

    def run(folder: str, stop: int | None) -> WeightVQVAE:
        model = copy.deepcopy(vqvae)
        loss = Interrupted(model, rows, tokenizer, 10 * REVIVE_EVERY)
        loss.stop = stop
        settings = {"train_batch_size": 8, "checkpointing_steps": 10, "resume_from_checkpoint": "latest"}
        return train(Accelerator(cpu=True), model, loss, LoopConfig(tmp_path / folder, steps, **settings), "codes")

    whole = run("whole", None)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop)
    resumed = run("stopped", None)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)


def test_two_processes_end_with_the_same_codes(tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    script = Path(__file__).with_name("run_codes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}-of-2.safetensors") for rank in range(2))
    assert len(first) > 40 and all(torch.equal(second[name], value) for name, value in first.items())
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.slow
def test_the_script_trains_a_generator_of_digit_classifiers(tmp_path, monkeypatch):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(examples)
    settings = ["--networks", "64", "--vqvae_steps", "300", "--max_train_steps", "400", "--skip_gate"]
    monkeypatch.setattr(sys, "argv", ["train_igpg.py", *settings, "--output_dir", str(tmp_path)])
    runpy.run_path(str(examples / "train_igpg.py"), run_name="__main__")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["codes"]["digit"]["codes"] == 2 * 27 and 0 < report["codes"]["digit"]["bits_per_weight"] < 1
    assert report["tasks"]["digit"]["generated"] > 60  # of 10 classes
    pipe = WeightGenPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("which digit is it").to_model(0)(torch.zeros(1, 64)).logits.shape == (1, 10)

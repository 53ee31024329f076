"""Zoos of two architectures as one source: each pair of a task and an architecture is a task of training, and of no dataset."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from huggingface_hub import ModelCard

from hf_weightgen import WeightGenPipeline
from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_denoiser import WeightDenoiser
from hf_weightgen.models.modeling_weight_vae import WeightVAE, WeightVAEConfig
from hf_weightgen.pipelines.pipeline_d2nwg import D2NWGPipeline
from hf_weightgen.targets import architectures, tasks
from hf_weightgen.targets.architectures import cnn
from hf_weightgen.targets.image_encoders import load_image_encoder
from hf_weightgen.training.batches import StepRandom
from hf_weightgen.training.d2nwg import calibrate_noise, encode, fit_latent_scale, reconstruct, scaled_latents
from hf_weightgen.training.dataset_encoder import dataset_loss
from hf_weightgen.training.network_source import network_source
from hf_weightgen.training.objectives import diffusion_loss, vae_loss
from hf_weightgen.zoo import build_networks
from hf_weightgen.zoo.build_networks import NetworkZooConfig, build_network_zoo
from hf_weightgen.zoo.folder import ZooFolder, load_zoo
from pictures import image_encoder, images, in_two_tones, write
from rows import rows_of
from run_network_zoo import PROTOCOL, SMALL
from tiny import network_pipeline, random


NARROW = {
    "small": SMALL,
    "wide": (cnn((4,), (3,), (True,), (7,)), "tanh", 10),
}  # the sides of their images are 8 and 10
ASKED = {"colour": "is the picture dark or light", "grey": "is the grey photograph bright"}
PAIRS = ["colour (small)", "grey (small)", "colour (wide)", "grey (wide)"]
BATCH = 8


def draws(step: int = 0) -> StepRandom:
    return StepRandom(0, step, BATCH, slice(None))


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    """Two folders with networks of both tasks each: 3 networks with 2 checkpoints, the last one held out."""
    folder, patch = tmp_path_factory.mktemp("zoos"), pytest.MonkeyPatch()
    with patch.context() as patched:
        specs = []
        for seed, (name, mode) in enumerate({"colour": "RGB", "grey": "L"}.items()):
            pictures = in_two_tones(images(80, seed, mode))
            spec = write(folder / name, train=pictures[:64], test=pictures[64:])
            specs.append(replace(spec, prompts=(ASKED[name], f"brightness: {name}"), family=name))
            patched.setitem(tasks.IMAGE_TASKS, name, specs[-1])
            patched.setitem(build_networks.SHORT, name, PROTOCOL)
        for name, network in NARROW.items():
            patched.setitem(architectures.NAMED, name, network)
            config = NetworkZooConfig(architecture=name, seeds=3, held_out=1, keep=2, group=3)
            build_network_zoo(specs, folder / name, config, progress=False)
        yield [str(folder / name) for name in NARROW]


@pytest.fixture(scope="module")
def sees(tmp_path_factory):
    return load_image_encoder(image_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def source(zoos, encoder, sees):
    return network_source(encoder, sees, zoos, None)


@pytest.fixture(scope="module")
def pipe(source, encoder, sees):
    """A generator of all four, trained for a few steps."""
    torch.manual_seed(0)
    source, sizes = replace(source), {"latent_shape": [1, 2, 2], "token_width": 4, "hidden_size": 32}
    sizes |= {"token_size": source.tokenizer.token_size, "num_body_tokens": source.tokenizer.num_all_body_tokens}
    vae = WeightVAE(WeightVAEConfig(**source.vae_settings | sizes))
    source.initialise(vae)
    fit(vae, lambda step: vae_loss(vae, source.train, draws(step)), 80)
    fit_latent_scale(vae, *encode(vae, source.train))
    latents = vae.scale(encode(vae, source.train)[0])
    features = source.features[0].shape[-1]
    dataset_encoder = DatasetEncoder(DatasetEncoderConfig(feature_size=features, latent_size=4, hidden_size=32))
    fit(
        dataset_encoder, lambda step: dataset_loss(dataset_encoder, source.features, latents, source.train, draws(step)), 40
    )  # fmt: skip
    source.add_datasets(dataset_encoder.eval(), 0)
    fit(vae, lambda step: vae_loss(vae, source.train, draws(step), source.task_loss, 0.1), 120)
    fit_latent_scale(vae, *encode(vae, source.train))
    latents, log_stds = scaled_latents(vae, source.train)
    denoiser = WeightDenoiser(in_channels=1, sample_size=2, hidden_size=32, num_layers=1)
    noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    fit(denoiser, lambda step: diffusion_loss(denoiser, noise, latents, log_stds, source.train, draws(step)), 400)
    pipe = D2NWGPipeline(
        vae=vae.eval(),
        unet=denoiser.eval(),
        scheduler=DPMSolverMultistepScheduler.from_config(noise.config),
        weight_tokenizer=source.tokenizer,
        target=source.target,
        targets=source.targets,
        dataset_encoder=dataset_encoder,
        image_encoder={"id": "acme/eyes"},
        tasks=source.known_tasks,
        encoder={"id": "acme/text", "revision": None, "sha256": None},
        **source.thresholds,
    )
    pipe._encoder, pipe.image_encoder = encoder, sees
    pipe.set_progress_bar_config(disable=True)
    tokens = []
    for task, prompts in zip(source.train.tasks, source.train.prompt_embeds, strict=True):
        made = pipe(prompt_embeds=prompts[:4], output_type="latent", generator=random(0), **source.asked_for(task))
        names = source.train.class_embeds[len(tokens)][:1].expand(4, -1, -1)
        with torch.no_grad():
            tokens.append(vae.decode(vae.unscale(made.latents.flatten(1)), names))
    calibrate_noise(vae, source.train, tokens, source.runs)
    pipe.check_parts()
    return pipe


def fit(model: torch.nn.Module, loss_at, steps: int) -> None:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    part = steps // 5
    assert sum(losses[-part:]) < sum(losses[:part])


def test_every_pair_is_a_task_with_its_network_and_its_images(source):
    train = source.train
    assert train.tasks == source.held_out.tasks == PAIRS and len(train) == 4 * 2 * 2
    assert source.runs == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert [(t["name"], t["config"]["input_shape"]) for t in source.targets] == [
        ("small", [3, 8, 8]), ("small", [1, 8, 8]), ("wide", [3, 10, 10]), ("wide", [1, 10, 10]),
    ]  # fmt: skip
    assert len({target["layout"] for target in source.targets}) == 4
    assert [(task["name"], task["targets"]) for task in source.known_tasks] == [("colour", [0, 2]), ("grey", [1, 3])]
    assert [source.asked_for(pair)["architecture"] for pair in PAIRS] == ["small", "small", "wide", "wide"]
    assert train.dataset_of.tolist() == [0, 1, 0, 1]
    assert torch.equal(train.architecture_codes[[0, 2]], torch.eye(384)[:2])
    assert torch.equal(train.architecture_codes[0], train.architecture_codes[1])  # pairs compose
    assert source.features[0] is source.features[2]


def test_members_of_every_pair_score_as_they_did_in_their_zoo(source, zoos):
    for zoo, pairs in zip(zoos, (PAIRS[:2], PAIRS[2:]), strict=True):
        rows = load_zoo(zoo)
        for pair in pairs:
            own = [row for row in rows if row["task"] == pair.split()[0] and row["split"] == "train"]
            assert source.score(source.members(pair), pair).tolist() == [row["metrics"]["test"] for row in own]


def test_the_loss_of_networks_reaches_the_tokens_of_every_pair(source):
    train = source.train
    index = torch.tensor([row for row, *_ in source.runs] * 2)
    tokens = train.weight_tokens[index].clone().requires_grad_()
    source.task_loss(tokens, None, index, draws(500)).backward()
    own = train.padding_mask[index]
    assert not tokens.grad[~own].any() and (tokens.grad * own).flatten(1).norm(dim=1).min() > 0


def test_the_architecture_is_told_with_a_prompt_and_without_one(source):
    """The denoiser's condition is a prompt and a code in equal parts, or the code alone."""
    rows, seen = source.train, []

    class Recorder(torch.nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states=None, class_labels=None):
            seen.append(class_labels)
            return type("Output", (), {"sample": sample})

    zeros = torch.zeros(len(rows), 1, 2, 2)
    for step in range(40):
        random = draws(step)
        diffusion_loss(Recorder(), DDPMScheduler(prediction_type="epsilon"), zeros, zeros, rows, random)
        codes = rows.architecture_codes[rows.task_of[rows.draw_rows(random)]]
        torch.testing.assert_close(seen[-1].norm(dim=-1), torch.ones(BATCH))
        along = (seen[-1] * codes).sum(-1)
        assert ((along - 0.5**0.5).abs() < 0.1).logical_or(along == 1).all()
    dropped = [(condition.abs() > 0).sum(-1) == 1 for condition in seen]
    assert 0.02 < torch.cat(dropped).double().mean() < 0.25


@pytest.mark.parametrize("name", NARROW)
def test_a_generator_makes_the_architecture_that_it_is_asked_for(pipe, source, name):
    dataset = {"dark": images(2, 0), "light": images(2, 1)}
    for task, prompt in ASKED.items():
        for asked in ({"prompt": prompt}, {"prompt": prompt, "dataset": dataset}):
            output = pipe(**asked, architecture=name, generator=random(0))
            pair = f"{output.tasks[0]} ({name})"
            assert output.tasks == [task] or "dataset" in asked
            target = source.targets[PAIRS.index(pair)]
            model = output.to_model()
            assert output.targets == [{key: value for key, value in target.items() if key != "layout"}]
            assert model.config.input_shape == target["config"]["input_shape"]
            assert model.conv1.out_channels == NARROW[name][0][0]["channels"]
    output = pipe(dataset=dataset, architecture=name, num_samples=2, generator=random(0))
    assert [target["name"] for target in output.targets] == [name] * 2


def test_the_default_is_the_first_architecture_and_the_code_counts(pipe):
    first, same, other = (
        pipe(ASKED["grey"], generator=random(0), **chosen)
        for chosen in ({}, {"architecture": "small"}, {"architecture": "wide"})
    )
    assert torch.equal(first.latents, same.latents) and not torch.allclose(first.latents, other.latents, atol=1e-3)
    both = pipe(list(ASKED.values()), architecture="wide", generator=random(0))
    assert [target["config"]["input_shape"] for target in both.targets] == [[3, 10, 10], [1, 10, 10]]
    unguided = [pipe(ASKED["grey"], architecture=name, guidance_scale=0.0, generator=random(0)) for name in NARROW]
    assert not torch.allclose(unguided[0].latents, unguided[1].latents, atol=1e-3)  # no prompt, but the architecture


@pytest.mark.parametrize("wrong", ["resnet20", "", 3])
def test_an_unknown_architecture_is_told_with_the_known_ones(pipe, wrong):
    with pytest.raises(ValueError, match=r"task 'grey' must be one of \['small', 'wide'\], got " + repr(wrong)):
        pipe(ASKED["grey"], architecture=wrong)


def test_a_generator_without_names_has_no_architectures(encoder):
    with pytest.raises(ValueError, match="task 'digits' must be none: .* got 'lenet'"):
        network_pipeline(encoder)("which digit is it", architecture="lenet")


def test_architectures_are_saved_and_loaded(pipe, encoder, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert [target["name"] for target in index["targets"]] == ["small", "small", "wide", "wide"]
    again = WeightGenPipeline.from_pretrained(tmp_path)
    again._encoder = encoder
    again.set_progress_bar_config(disable=True)
    for name in NARROW:
        mine, theirs = (one(ASKED["colour"], architecture=name, generator=random(1)) for one in (pipe, again))
        assert mine.targets == theirs.targets
        for key, tensor in mine.weights[0].items():
            torch.testing.assert_close(theirs.weights[0][key], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": [0, 9]}, r"the targets of 'colour' are \[0, 9\], there are 4"),
        ({"targets": []}, "expected a list of 1 to"),
        ({"targets": 2}, "expected a list of 1 to"),
        ({"targets": [0, 1]}, r"whose names \['small', 'small'\] do not tell them apart"),
    ],
)
def test_targets_that_a_task_cannot_have_are_told(pipe, change, message):
    kept = pipe.config.tasks
    try:
        pipe.register_to_config(tasks=[kept[0] | change, *kept[1:]])
        with pytest.raises(ValueError, match=message):
            pipe.check_parts()
    finally:
        pipe.register_to_config(tasks=kept)


def test_reconstructions_are_scored_by_pair(pipe, source):
    rows = source.train
    scores = source.accuracy(source.state_dicts(rows, reconstruct(pipe.vae, rows)), rows)
    assert scores.keys() == {pair for pair in PAIRS if source.counts(pair)} and min(scores.values()) > 0.6


def test_one_of_the_zoos_alone_tells_no_architecture(zoos, encoder, sees):
    alone = network_source(encoder, sees, zoos[:1], None)
    assert alone.train.architecture_codes is None and alone.train.tasks == list(ASKED)
    assert [task["target"] for task in alone.known_tasks] == [0, 1]
    assert alone.asked_for("grey") == {"labels": ["dark", "light"]}


def test_zoos_that_do_not_go_together_are_refused(zoos, encoder, sees, tmp_path):
    with pytest.raises(ValueError, match="both have 'small' networks of the task 'colour'; give one of them"):
        network_source(encoder, sees, [zoos[0], zoos[1], zoos[0]], None)
    ZooFolder(tmp_path / "adapters").add("group", rows_of("a"))
    with pytest.raises(ValueError, match="holds no networks on images: .* give another zoo alone"):
        network_source(encoder, sees, [zoos[0], str(tmp_path / "adapters")], None)


@pytest.mark.slow
def test_it_is_trained_and_measured_from_the_command_line(zoos, tmp_path, monkeypatch):
    for name in NARROW:  # of one task, which no dataset is too far from
        config = NetworkZooConfig(architecture=name, seeds=3, held_out=1, keep=2, group=3)
        build_network_zoo([tasks.IMAGE_TASKS["grey"]], tmp_path / name, config, progress=False)
    examples = Path(__file__).parents[2] / "examples"
    given = ["--zoo", *(tmp_path / name for name in NARROW), "--image_encoder", image_encoder(tmp_path)]

    def run(script: str, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, [*given, *arguments])])
        runpy.run_path(str(examples / script), run_name="__main__")

    steps = [part for name in ("vae", "task", "dataset", "max_train") for part in (f"--{name}_steps", 2)]
    run("train_d2nwg.py", *steps, "--skip_gate", "--output_dir", tmp_path / "run")
    assert list(json.loads((tmp_path / "run" / "report.json").read_text())["tasks"]) == ["grey (small)", "grey (wide)"]
    assert "architectures: small, wide" in (tmp_path / "run" / "pipeline" / "README.md").read_text()

    monkeypatch.syspath_prepend(examples)
    monkeypatch.syspath_prepend(examples / "reproduce")
    out, generator = tmp_path / "architectures.json", ("--generator", tmp_path / "run" / "pipeline")
    run("reproduce/architectures.py", *generator, "--n", 2, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert {(row["task"], row["architecture"]) for row in rows} == {("grey", name) for name in NARROW}
    of_small = {row["method"]: row for row in rows if row["architecture"] == "small"}
    assert {"random_init", "zoo_held_out", "zoo_average", "reconstruction", "generated"} <= of_small.keys()
    assert of_small["generated"]["difference"]["ci95"] and of_small["wrong_architecture"]["n"] == 20

    steps = [part for name in ("vqvae", "task", "dataset", "max_train") for part in (f"--{name}_steps", 2)]
    run("train_igpg.py", *steps, "--skip_gate", "--output_dir", tmp_path / "codes")
    assert list(json.loads((tmp_path / "codes" / "report.json").read_text())["tasks"]) == [
        "grey (small)",
        "grey (wide)",
    ]
    generator, card = ("--generator", tmp_path / "codes" / "pipeline"), tmp_path / "codes" / "pipeline" / "README.md"
    run("reproduce/architectures.py", *generator, "--n", 2, "--out", out, "--card", card.parent)
    results = ModelCard.load(card)
    assert {one.dataset_name for one in results.data.eval_results} == {"grey (small)", "grey (wide)"}
    assert "| grey | wide |" in results.text and str(tmp_path) not in card.read_text()
    rows = [row for row in json.loads(out.read_text())["rows"] if row["architecture"] == "wide"]
    of_wide = {row["method"]: row for row in rows}
    assert of_wide["reconstruction"]["codes"] > 20 and 0 < of_wide["reconstruction"]["bits_per_weight"] < 10

    beside = "--beside", tmp_path / "run" / "pipeline"
    given = ["--zoo", tmp_path / "small", *given[-2:]]
    run("reproduce/codes.py", *generator, *beside, "--n", 2, "--codes", 40, "--out", out)
    told = json.loads(out.read_text())
    assert told["cache"]["codes"] == 40 and told["cache"]["same"] > 0.9
    assert [one["generator"] for one in told["seconds"]] == ["IGPGPipeline", "D2NWGPipeline"]
    assert [row["context"] for row in told["windows"]] == [1.0, 0.5, 0.25, 0.125]
    run("reproduce/ranking.py", *generator, "--n", 2, "--out", out)
    (by_images,) = (row for row in json.loads(out.read_text())["rows"] if row["method"] == "five_images_a_class")
    assert by_images["n"] == 2 and by_images["first_1"] == 1 == by_images["chance_1"]  # of one task

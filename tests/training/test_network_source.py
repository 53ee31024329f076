"""A zoo of networks on images as a source: what it tells of each task, and that its parts train together."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_weight_vae import WeightVAE, WeightVAEConfig
from hf_weightgen.pipelines.pipeline_utils import WeightGenPipeline
from hf_weightgen.targets import architectures, tasks
from hf_weightgen.targets.image_encoders import load_image_encoder
from hf_weightgen.training.batches import StepRandom
from hf_weightgen.training.d2nwg import encode, fit_latent_scale, reconstruct
from hf_weightgen.training.dataset_encoder import DRAWS, REPEATS, dataset_loss
from hf_weightgen.training.network_source import network_source, of_one_shape
from hf_weightgen.training.objectives import vae_loss
from hf_weightgen.zoo import build_networks
from hf_weightgen.zoo.build_networks import NetworkZooConfig, build_network_zoo
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.schema import row_to_state_dict
from pictures import image_encoder, images, in_two_tones, write
from run_network_zoo import PROTOCOL, SMALL


TASKS = {"colour": ("RGB", 90), "grey": ("L", 70)}  # mode, training images
BATCH = 8
PROMPTS = ("is the picture dark or light", "how bright is it")


def draws(step: int = 0) -> StepRandom:
    return StepRandom(0, step, BATCH, slice(None))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Of two tasks, whose images have one channel and three: 4 networks with 2 checkpoints each, the last one held out."""
    folder, patch = tmp_path_factory.mktemp("zoo"), pytest.MonkeyPatch()
    with patch.context() as patched:
        specs = []
        for seed, (name, (mode, count)) in enumerate(TASKS.items()):
            pictures = in_two_tones(images(count + 16, seed, mode))
            spec = write(folder / name, train=pictures[:count], test=pictures[count:])
            specs.append(replace(spec, prompts=PROMPTS, family=name, aliases=(("night", "day"),)))
            patched.setitem(tasks.IMAGE_TASKS, name, specs[-1])
            patched.setitem(build_networks.SHORT, name, PROTOCOL)
        patched.setitem(architectures.NAMED, "small", SMALL)
        config = NetworkZooConfig(architecture="small", seeds=4, held_out=1, keep=2, group=4)
        yield build_network_zoo(specs, folder / "zoo", config, progress=False).path


@pytest.fixture(scope="module")
def source(zoo, encoder, tmp_path_factory):
    return network_source(
        encoder, load_image_encoder(image_encoder(tmp_path_factory.mktemp("images"))), [str(zoo)], None
    )


def test_rows_prompts_and_datasets_of_every_task_are_there(source):
    train, held_out = source.train, source.held_out
    assert train.tasks == held_out.tasks == list(TASKS) and train.prompted_tasks == list(TASKS)
    assert len(train) == 2 * 3 * 2 and len(held_out) == 2  # of held-out networks the last checkpoint alone
    assert [p.shape for p in train.prompt_embeds] == [(2, 384)] * 2
    assert [e.shape for e in train.class_embeds] == [(2, 2, 384)] * 2  # labels and aliases
    assert train.class_mask.all() and train.padding_mask.shape == train.weight_tokens.shape
    assert [target["config"]["input_shape"] for target in source.targets] == [[3, 8, 8], [1, 8, 8]]
    assert sorted(target["layout"] for target in source.targets) == [0, 1]
    assert [(task["name"], task["target"]) for task in source.known_tasks] == [("colour", 0), ("grey", 1)]
    assert source.runs == [[3, 4, 5], [9, 10, 11]]  # of each run its last checkpoint; the zoo has them epoch by epoch
    lengths = [own.flatten(0, 1).norm(dim=-1) for own in source.features]
    torch.testing.assert_close(torch.cat(lengths), torch.ones(sum(map(len, lengths))))
    assert source.features[0].shape == source.features[1].shape
    assert len(source.image_encoder["sha256"]) == 64


def test_examples_of_tasks_that_differ_in_images_and_classes_have_one_shape():
    first, second = torch.ones(2, 9, 4), torch.ones(3, 7, 4)
    own, other = of_one_shape([first, second])
    assert own.shape == other.shape == (3, 7, 4)
    assert own[:2].all() and not own[2].any() and other.all()


def test_aligned_rows_are_the_networks_of_the_zoo(source, zoo):
    rows = load_zoo(zoo)
    for task in TASKS:
        own = [row for row in rows if row["task"] == task and row["split"] == "train"]
        found = source.members(task)
        for name, tensor in row_to_state_dict(own[0]).items():
            torch.testing.assert_close(found[0][name], tensor)  # the first one is what the others are matched to
        # other weights, the same function: what each scores was measured when the zoo was built
        assert source.score(found, task).tolist() == [row["metrics"]["test"] for row in own]
        assert source.zoo_scores[task] == pytest.approx(sum(row["metrics"]["test"] for row in own) / len(own))
        assert source.majority[task] == (0.5, 16)
    first = next(row for row in rows if row["split"] == "held_out" and row["epoch"] == PROTOCOL.epochs)
    held_out = source.state_dicts(source.held_out, source.held_out.weight_tokens)
    place = source.held_out.tasks.index(first["task"])
    assert source.score([held_out[place]], first["task"]).item() == first["metrics"]["test"]


def test_the_loss_of_networks_reaches_the_tokens_of_their_own_layout(source):
    train = source.train
    index = torch.tensor([0, len(train) - 1] * (BATCH // 2))
    tokens = train.weight_tokens[index].clone().requires_grad_()
    loss = source.task_loss(tokens, None, index, draws(500))
    loss.backward()
    assert loss.isfinite() and tokens.grad.isfinite().all()
    own = train.padding_mask[index]
    assert not tokens.grad[~own].any()
    assert (tokens.grad * own).flatten(1).norm(dim=1).min() > 0
    random_tokens = 3 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    assert source.task_loss(random_tokens, None, index, draws()) > 2 * source.task_loss(tokens, None, index, draws())


def test_all_stages_train_on_it(source):
    train, source = source.train, replace(source)  # which `add_datasets` changes
    settings = {"token_size": source.tokenizer.token_size, "num_body_tokens": source.tokenizer.num_all_body_tokens}
    small = {"latent_shape": [1, 2, 2], "token_width": 4, "hidden_size": 32}
    vae = WeightVAE(WeightVAEConfig(**settings, **source.vae_settings | small))
    source.initialise(vae)
    losses = fit(vae, lambda step: vae_loss(vae, train, draws(step)), 60)
    assert losses[-1] < 0.9 * losses[0]
    means, log_stds = encode(vae, train)
    fit_latent_scale(vae, means, log_stds)
    latents = vae.scale(means).detach()
    size = source.features[0].shape[-1]
    encoder = DatasetEncoder(DatasetEncoderConfig(feature_size=size, latent_size=4, hidden_size=32))
    losses = fit(encoder, lambda step: dataset_loss(encoder, source.features, latents, train, draws(step)), 40)
    assert losses[-1] < losses[0]
    known = source.known_tasks
    source.add_datasets(encoder.eval(), 0)
    assert [p.shape for p in source.train.prompt_embeds] == [(2 * REPEATS + DRAWS, 384)] * 2
    assert [e.shape for e in source.train.class_embeds] == [(2 * REPEATS + DRAWS, 2, 384)] * 2
    assert [task["name"] for task in source.known_tasks] == [task["name"] for task in known]
    losses = fit(vae, lambda step: vae_loss(vae, source.train, draws(step), source.task_loss, 0.1), 60)
    assert losses[-1] < losses[0]
    held_out = source.held_out
    scores = source.accuracy(source.state_dicts(held_out, reconstruct(vae, held_out)), held_out)
    assert scores.keys() == {task for task in TASKS if source.counts(task)} and min(scores.values()) > 0.6


def test_the_error_of_each_task_has_its_own_weight(source):
    settings = {"token_size": source.tokenizer.token_size, "num_body_tokens": source.tokenizer.num_all_body_tokens}
    vae = WeightVAE(WeightVAEConfig(**settings, hidden_size=16, token_width=4))
    train = source.train

    def gradients(weights) -> list[float]:
        rows = replace(train, weight_tokens=train.weight_tokens.clone().requires_grad_())
        vae_loss(vae, rows, draws(), lambda *step: torch.zeros(()), weights).backward()
        # a task's rows are told apart in the loss by the places of their own layout
        return [rows.weight_tokens.grad[train.task_of == task].norm().item() for task in range(2)]

    vae.eval()
    both, first, second = gradients(1.0), gradients([1.0, 0.0]), gradients([0.0, 1.0])
    assert gradients([1.0, 1.0]) == both
    assert first[1] < 0.1 * both[1] and second[0] < 0.1 * both[0]
    assert first[0] == pytest.approx(both[0], rel=0.1) and second[1] == pytest.approx(both[1], rel=0.1)


def fit(model: torch.nn.Module, loss_at, steps: int) -> list[float]:
    """Means of the losses of the first and the last fifth of the steps."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    part = steps // 5
    return [sum(losses[:part]) / part, sum(losses[-part:]) / part]


@pytest.mark.slow
def test_training_may_leave_the_dataset_encoder_to_the_denoiser(zoo, tmp_path, monkeypatch):
    config = NetworkZooConfig(architecture="small", seeds=4, held_out=1, keep=2, group=4)
    one = build_network_zoo([tasks.IMAGE_TASKS["grey"]], tmp_path / "zoo", config, progress=False)
    examples = Path(__file__).parents[2] / "examples"
    both = ["--zoo", one.path, "--image_encoder", image_encoder(tmp_path)]

    def run(script: str, *arguments, always=both) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, always), *map(str, arguments)])
        runpy.run_path(str(examples / script), run_name="__main__")

    steps = [part for name in ("vae", "task", "max_train") for part in (f"--{name}_steps", 2)]
    run("train_d2nwg.py", *steps, "--alignment", "joint", "--skip_gate", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "dataset-encoder").exists()
    assert WeightGenPipeline.from_pretrained(tmp_path / "run" / "pipeline").dataset_encoder is not None
    assert list(json.loads((tmp_path / "run" / "report.json").read_text())["tasks"]) == ["grey"]

    few = [part for name in ("max_train_steps", "conditions", "samples") for part in (f"--{name}", 2)]
    made = "--generator", tmp_path / "run" / "pipeline", "--output_dir", tmp_path / "tuned"
    run("tune_generator.py", *made, *few, always=both[2:])
    report = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert [row["task"] for row in report["before"]] == [row["task"] for row in report["after"]] == ["grey"]
    tuned = WeightGenPipeline.from_pretrained(tmp_path / "tuned" / "pipeline")
    assert len(tuned(tasks.IMAGE_TASKS["grey"].prompts[0]).weights) == 1

    steps = [part for name in ("vqvae", "task", "dataset", "max_train") for part in (f"--{name}_steps", 2)]
    monkeypatch.syspath_prepend(examples)
    run("train_igpg.py", *steps, "--skip_gate", "--output_dir", tmp_path / "codes")
    codes = WeightGenPipeline.from_pretrained(tmp_path / "codes" / "pipeline")
    assert codes.dataset_encoder is not None and len(codes(tasks.IMAGE_TASKS["grey"].prompts[0]).weights) == 1

    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(examples / "reproduce")
    out, small = tmp_path / "curves.json", ("--n", 2, "--images", 16)
    run("reproduce/finetune.py", "--generator", tmp_path / "run" / "pipeline", *small, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert {row["epoch"] for row in rows if row["method"] == "generated"} == {0, 1, 5, 25, 50}
    assert out.with_suffix(".png").is_file()
    twice = "--zoo", one.path, one.path, *both[2:]
    run("reproduce/retrieval.py", "--generator", tmp_path / "run" / "pipeline", "--n", 2, "--out", out, always=twice)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["method"]) for row in rows] == 2 * [("grey", "stored"), ("grey", "generated")]
    unseen = "--generator", tmp_path / "run" / "pipeline", "--unseen", "colour", "--n", 2, "--out", out
    run("reproduce/unseen_sets.py", *unseen)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["nearest"], row["epoch"]) for row in rows] == [
        (method, "grey", 0) for method in ("random_init", "members", "kde", "generated")
    ]
    run("reproduce/unseen_sets.py", *unseen, "--epochs", 1)
    rows = json.loads(out.read_text())["rows"]
    assert [row["epoch"] for row in rows] == 4 * [0, 1] and all(row["n"] <= 2 for row in rows)
    with pytest.raises(SystemExit, match="trained on 'grey'"):
        run("reproduce/unseen_sets.py", *unseen[:3], "grey", *unseen[4:])

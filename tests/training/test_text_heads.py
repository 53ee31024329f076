"""Heads on sentences as a frozen encoder sees them: a zoo of them, and what it is as a source."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pictures
from hf_weightgen.pipelines.pipeline_utils import WeightGenPipeline
from hf_weightgen.targets import architectures, tasks
from hf_weightgen.targets.architectures import TargetModel, architecture
from hf_weightgen.targets.tasks import TaskSpec
from hf_weightgen.training import network_source as network_source_module
from hf_weightgen.training.batches import StepRandom
from hf_weightgen.training.network_source import network_source
from hf_weightgen.zoo import build_networks
from hf_weightgen.zoo.build_networks import NetworkZooConfig, build_network_zoo, network_of
from hf_weightgen.zoo.features import load_texts
from hf_weightgen.zoo.folder import ZooFolder, load_zoo
from hf_weightgen.zoo.schema import row_to_state_dict
from rows import adapter, row_of
from run_network_zoo import PROTOCOL, SMALL


FILMS = ("a dull and clumsy film", "a gripping and clever film")
WEATHER = ("it will rain all day", "the sun shines on us", "snow fell on the roofs")
CONFIG = NetworkZooConfig(architecture="linear", seeds=4, held_out=1, keep=1, group=4)


def write(folder, texts: tuple[str, ...]) -> TaskSpec:
    folder.mkdir(parents=True)
    for split, count in (("train", 120), ("test", 24)):
        rows = [{"text": f"{split} {i}: {texts[i % len(texts)]}", "label": i % len(texts)} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = tuple(text.split()[1] for text in texts)
    fields = {"labels": labels, "family": folder.name, "prompts": (f"{folder.name} in a sentence", "what is said")}
    return TaskSpec(folder.name, str(folder), "label", text_columns=("text",), test_split="test", **fields)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return [write(folder / "films", FILMS), write(folder / "weather", WEATHER)]


@pytest.fixture(scope="module")
def zoo(specs, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    build_network_zoo(specs, folder / "zoo", CONFIG, progress=False, encoder=encoder, cache=folder / "seen")
    return folder


def known(specs, monkeypatch) -> None:
    for spec in specs:
        monkeypatch.setitem(tasks.TASKS, spec.name, spec)


@pytest.fixture
def source(zoo, specs, encoder, monkeypatch):
    known(specs, monkeypatch)
    return network_source(encoder, None, [str(zoo / "zoo")], None, cache=str(zoo / "seen"))


def test_rows_have_the_accuracy_that_they_tell(zoo, specs, encoder, monkeypatch):
    monkeypatch.setattr(encoder, "embed", None)  # what is in the folder is not encoded again
    data, rows = load_texts(specs, encoder, cache=zoo / "seen"), load_zoo(zoo / "zoo")
    assert len(rows) == 8 and {row["provenance"]["encoder"] for row in rows} == {data["films"].encoder}
    for row in rows:
        own = next(spec for spec in specs if spec.name == row["task"])
        config, images = network_of(own, 384, CONFIG), data[own.name]
        assert config.input_shape == row["arch"]["input_shape"] == [384] and config.layers == []
        model = TargetModel(config).eval()
        model.load_state_dict(row_to_state_dict(row))
        right = model(images.inputs(images.test)).logits.argmax(-1) == images.test.labels
        assert row["metrics"]["test"] == right.double().mean().item() > 0.8


def test_of_a_split_a_few_sentences_are_read(specs, encoder):
    few = load_texts(specs[:1], encoder, limit=9)["films"]
    assert [len(part) for part in (few.train, few.validation, few.test)] == [9, 9, 9]


def test_heads_on_features_of_another_encoder_are_refused(zoo, encoder, monkeypatch):
    monkeypatch.setattr(network_source_module, "weights_sha256", lambda path: "another")
    with pytest.raises(ValueError, match="read what another encoder says of sentences"):
        network_source(encoder, None, [str(zoo / "zoo")], None)


def test_the_source_scores_them_and_asks_what_they_do(source, zoo):
    rows = [row for row in load_zoo(zoo / "zoo") if row["split"] == "train"]
    for task in ("films", "weather"):
        own = [row["metrics"]["test"] for row in rows if row["task"] == task]
        assert source.score(source.members(task), task).tolist() == own
    assert source.features is None and source.image_encoder is None
    assert [target["config"] for target in source.targets] == [
        {"input_shape": [384], "layers": [], "activation": "relu"}
    ] * 2
    train = source.train
    tokens = train.weight_tokens.clone().requires_grad_()
    loss = source.task_loss(tokens, None, torch.arange(len(train)), StepRandom(0, 0, len(train), slice(None)))
    loss.backward()
    assert (tokens.grad.flatten(1).norm(dim=1) > 0).all() and not tokens.grad[~train.padding_mask].any()


def test_pairs_of_texts_are_no_inputs_of_a_head(specs, encoder, tmp_path):
    pair = TaskSpec("pair", "none", "label", ("a", "b"), text_columns=("text", "other"))
    with pytest.raises(ValueError, match="'pair' has two texts per example"):
        build_network_zoo([*specs, pair], tmp_path / "zoo", CONFIG, encoder=encoder)


def test_heads_have_names():
    assert architecture("linear", 3, 8).input_shape == [8]
    assert [layer["kind"] for layer in architecture("mlp-head", 3, 8).layers] == ["linear", "activation"]


def test_other_networks_are_no_heads(encoder, tmp_path):
    few = {"arch": {"name": "head", "input_shape": [384]}}  # from few examples, with classes of their own
    for name, changes in (("adapters", {}), ("few", few)):
        ZooFolder(tmp_path / name).add("one", [row_of(adapter(0), "sst2-s0-c0", **changes)])
        with pytest.raises(ValueError, match="holds no heads on features"):
            network_source(encoder, None, [str(tmp_path / name)], None)


@pytest.mark.slow
def test_they_train_alone_and_beside_networks_on_images(zoo, specs, tmp_path, monkeypatch):
    known(specs, monkeypatch)
    grey = pictures.in_two_tones(pictures.images(90, 0))
    grey = pictures.write(tmp_path / "grey", train=grey[:70], test=grey[70:])
    grey = replace(grey, prompts=("is the picture dark or light", "how bright is it"), family="grey")
    monkeypatch.setitem(tasks.IMAGE_TASKS, "grey", grey)
    monkeypatch.setitem(architectures.NAMED, "small", SMALL)
    monkeypatch.setitem(build_networks.SHORT, "grey", PROTOCOL)
    small = replace(CONFIG, architecture="small", keep=1)
    build_network_zoo([grey], tmp_path / "small", small, progress=False)
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(examples)

    def run(script: str, zoos: list, *arguments) -> WeightGenPipeline:
        given = ["--zoo", *zoos, "--cache", zoo / "seen", "--skip_gate", "--output_dir", tmp_path / script, *arguments]
        monkeypatch.setattr(sys, "argv", [script, *map(str, given)])
        runpy.run_path(str(examples / script), run_name="__main__")
        return WeightGenPipeline.from_pretrained(tmp_path / script / "pipeline")

    steps = [part for name in ("vae", "task", "max_train") for part in (f"--{name}_steps", 2)]
    pipe = run("train_d2nwg.py", [zoo / "zoo"], *steps)
    assert pipe("weather in a sentence").to_model()(torch.zeros(1, 384)).logits.shape == (1, 3)

    steps = [part for name in ("vqvae", "task", "dataset", "max_train") for part in (f"--{name}_steps", 2)]
    encoder = "--image_encoder", pictures.image_encoder(tmp_path)
    pipe = run("train_igpg.py", [zoo / "zoo", tmp_path / "small"], *encoder, *steps)
    assert pipe("films in a sentence").to_model()(torch.zeros(1, 384)).logits.shape == (1, 2)
    assert pipe(grey.prompts[0]).to_model()(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 2)
    tasks_of = json.loads((tmp_path / "train_igpg.py" / "report.json").read_text())["tasks"]
    assert list(tasks_of) == ["grey", "films", "weather"]

"""What comes out: a model that classifies, and plain folders that load without this library."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_weightgen.pipelines.output import WeightGenOutput
from hf_weightgen.targets.architectures import TargetConfig, TargetModel, mlp
from hf_weightgen.targets.base_models import MINILM, load_classifier, load_encoder, load_tokenizer, resolve_base
from hf_weightgen.targets.functional import AdapterTarget
from hf_weightgen.zoo.recipe import lora_config
from tiny import LORA, adapter, network_pipeline, random


TEXTS = ["a gripping, funny film", "dull and far too long", ""]
LABELS = ["bad", "good", "neither"]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"]


@pytest.fixture
def output(pipe):
    pipe.vae.class_noise.fill_(1.0)
    return pipe("sentiment on SST-2", labels=LABELS, num_samples=2, generator=random(0))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**load_tokenizer(MINILM)(TEXTS, padding=True, return_tensors="pt")).logits


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_classifies_strings_by_name(output):
    model = output.to_model(1)
    assert model.config.id2label == {0: "bad", 1: "good", 2: "neither"}
    assert model.config.label2id == {"bad": 0, "good": 1, "neither": 2}
    assert not model.training and logits(model).shape == (3, 3)
    target = AdapterTarget(load_classifier(MINILM, 3), lora_config())
    dataset = Dataset.from_dict({"text": TEXTS, "label": [0, 0, 0]})
    predictions = target.predict(output.weights, target.buckets(load_tokenizer(MINILM), dataset))
    assert torch.equal(logits(model).argmax(-1), predictions[1])


def test_the_same_sample_is_the_same_model_in_every_tensor(output):
    first, second = output.to_model(0).state_dict(), output.to_model(0).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_sample_is_a_model_of_its_own(output):
    first, second = logits(output.to_model(0)), logits(output.to_model(1))
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(logits(output.to_model()), first)


def test_one_sample_is_a_plain_peft_folder(pipe, tmp_path):
    output = pipe("sentiment on SST-2", generator=random(0))
    folder = tmp_path / "new" / "adapter"
    assert output.save_pretrained(folder) == [folder]
    assert names(folder) == FILES and names(folder.parent) == ["adapter"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MINILM and config["inference_mode"] is True
    assert {key: config[key] for key in ("task_type", "r", "lora_alpha")} == {
        k: LORA[k] for k in ("task_type", "r", "lora_alpha")
    }
    assert json.loads((folder / "labels.json").read_text()) == ["negative", "positive"]
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == output.weights[0].keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in output.weights[0].items())


def test_several_samples_are_numbered_folders(output, tmp_path):
    folders = output.save_pretrained(tmp_path / "many")
    assert folders == [tmp_path / "many" / "0000", tmp_path / "many" / "0001"]
    assert names(tmp_path / "many") == ["0000", "0001"]
    for folder, weights in zip(folders, output.weights, strict=True):
        assert names(folder) == FILES
        saved = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())


def test_the_card_tells_where_the_weights_come_from(output, tmp_path):
    folder = output.save_pretrained(tmp_path)[1]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == MINILM
    assert card.data.pipeline_tag == "text-classification" and "lora" in card.data.tags
    for told in ("sentiment on SST-2", "bad, good, neither", MINILM, f"seed: {output.seeds[1]}", f"names = {LABELS}"):
        assert told in card.text
    assert str(tmp_path) not in card.text


def test_the_card_tells_which_sample_it_is(output, tmp_path):
    output.command = "make these"
    for i, folder in enumerate(output.save_pretrained(tmp_path)):
        assert f"- sample: {i} of 2, counted from 0" in (folder / "README.md").read_text()
    assert output.select([0, 1]).command == "make these" and output.select([1]).command is None


def test_a_saved_folder_loads_without_this_library(output, tmp_path):
    """In another process, from the Hugging Face cache, with PEFT alone, as the card says."""
    folder = output.save_pretrained(tmp_path / "adapters")[1]
    cached = tmp_path / "home" / "hub" / f"models--{MINILM.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "snapshots").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).symlink_to(resolve_base(MINILM))
    code = f"""
import json, sys
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
model = AutoPeftModelForSequenceClassification.from_pretrained({str(folder)!r}, id2label=dict(enumerate({LABELS})))
assert [model.config.id2label[i] for i in range(3)] == {LABELS}
inputs = AutoTokenizer.from_pretrained({MINILM!r})({TEXTS!r}, padding=True, return_tensors="pt")
assert not [name for name in sys.modules if name.startswith("hf_weightgen")]
print(json.dumps(model(**inputs).logits.tolist()))
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, logits(output.to_model(1)), atol=1e-5, rtol=0)


def test_saving_again_replaces(pipe, output, tmp_path):
    output.save_pretrained(tmp_path)
    other = pipe("topic of AG News", num_samples=2, generator=random(1))
    other.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "0001" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in other.weights[1].items())
    assert json.loads((tmp_path / "0001" / "labels.json").read_text()) == other.labels[1]


def test_a_failure_leaves_nothing_half_written(output, tmp_path):
    output.weights[1] = output.weights[1] | {"broken": "no tensor"}
    with pytest.raises(Exception):  # noqa: B017
        output.save_pretrained(tmp_path / "many")
    assert names(tmp_path / "many") == ["0000"] and names(tmp_path / "many" / "0000") == FILES


def test_the_folder_one_stands_in_is_not_filled(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("", "."):
        with pytest.raises(ValueError, match="the folder that you stand in"):
            output.save_pretrained(place)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(output, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="`save_directory` '.*file' is a file"):
        output.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="'.*file' is a file"):
        output.save_pretrained(tmp_path / "file" / "inside")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "0001").write_text("mine")
    with pytest.raises(ValueError, match="'.*0001' is a file"):
        output.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001", "file"]


def test_samples_of_two_calls_are_not_mixed(output, pipe, tmp_path):
    output.save_pretrained(tmp_path)
    output.save_pretrained(tmp_path)  # as many as before replace them
    three = pipe("sentiment on SST-2", num_samples=3, generator=random(0))
    three.save_pretrained(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for fewer in (output, pipe("sentiment on SST-2", generator=random(0))):
        with pytest.raises(ValueError, match="holds the sample '000[02]' of an earlier call.*another folder"):
            fewer.save_pretrained(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_one_sample_is_not_left_beside_several(output, tmp_path):
    output.select([0]).save_pretrained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds the sample 'adapter_model.safetensors' of an earlier call"):
        output.save_pretrained(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_adapters_and_networks_do_not_share_a_folder(output, encoder, tmp_path):
    network = network_pipeline(encoder)
    network._encoder = encoder
    made = network("which digit is it", num_samples=2, generator=random(0))
    for first, second, kind in ((output, made, "adapter"), (made, output, "network")):
        folder = tmp_path / kind
        first.save_pretrained(folder)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(ValueError, match=f"is of an earlier {kind}, beside which"):
            second.save_pretrained(folder)
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_an_output_tells_what_it_holds(output):
    assert repr(output) == f"WeightGenOutput(2 samples for ['sentiment on SST-2'], seeds {output.seeds})"
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"no sample {index}: this output holds 2"):
            output.to_model(index)


def test_latents_cannot_be_saved(pipe, tmp_path):
    latents = pipe("sentiment on SST-2", output_type="latent")
    with pytest.raises(ValueError, match="no weights in this output.*output_type='weights'"):
        latents.save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="no weights in this output.*output_type='weights'"):
        latents.to_model(0)
    assert not (tmp_path / "none").exists()


def test_an_unknown_base_model_is_named(output):
    output.targets = [output.targets[0] | {"base_model": "acme/none"}]
    with pytest.raises(FileNotFoundError, match="'acme/none' was not found"):
        output.to_model(0)


def test_a_base_model_that_does_not_fit_the_adapter_is_named(output):
    stray = "base_model.model.bert.encoder.layer.9.attention.self.query.lora_A.weight"
    output.weights[0] = output.weights[0] | {stray: torch.zeros(4, 384)}
    with pytest.raises(ValueError, match=f"{MINILM}' has no place for '.*layer.9"):
        output.to_model(0)
    name = next(iter(adapter(0)))
    fitting = output.weights[1]
    for weights, came in ((fitting | {name: torch.zeros(4, 99)}, r"\(4, 99\)"), ({}, "no such tensor")):
        output.weights[1] = weights
        with pytest.raises(
            ValueError, match=rf"has \(4, 384\) for '{name}', the adapter has {came}; load the base model"
        ):
            output.to_model(1)


@pytest.fixture
def networks():
    """Two generated networks, as a generator of whole networks returns them."""
    config = {"input_shape": [6], "layers": mlp(4), "activation": "relu"}
    torch.manual_seed(0)
    models = [TargetModel(TargetConfig(**config, num_classes=count)) for count in (2, 3)]
    return WeightGenOutput(
        weights=[dict(model.state_dict()) for model in models], labels=[["even", "odd"], ["a", "b", "c"]],
        tasks=["parity", "abc"], prompts=["odd or even", "which letter"], seeds=[1, 2],
        targets=[{"kind": "network", "config": config}] * 2, latents=torch.zeros(2, 1, 2, 2), generator_id="tiny",
    )  # fmt: skip


def test_generated_networks_are_models_too(networks, tmp_path):
    inputs = torch.randn(5, 6)
    for i, folder in enumerate(networks.save_pretrained(tmp_path)):
        assert names(folder) == ["README.md", "config.json", "labels.json", "model.safetensors"]
        model, again = networks.to_model(i), TargetModel.from_pretrained(folder)
        assert model.config.id2label == again.config.id2label == dict(enumerate(networks.labels[i]))
        with torch.no_grad():
            expected = networks.weights[i]
            hidden = torch.relu(inputs @ expected["hidden.weight"].T + expected["hidden.bias"])
            torch.testing.assert_close(
                model(inputs).logits, hidden @ expected["head.weight"].T + expected["head.bias"]
            )
            assert torch.equal(again(inputs).logits, model(inputs).logits)
        assert "TargetModel" in (folder / "README.md").read_text()


def test_the_card_of_a_head_on_sentences_reads_sentences(tmp_path):
    config = {"input_shape": [384], "layers": []}
    head = TargetModel(TargetConfig(**config, num_classes=2))
    WeightGenOutput(
        weights=[head.state_dict()], labels=[["bad", "good"]], tasks=["sst2"], prompts=["films"], seeds=[1],
        targets=[{"kind": "network", "config": config}], latents=torch.zeros(1, 7, 2), generator_id="tiny",
    ).save_pretrained(tmp_path)  # fmt: skip
    snippet = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet.replace("PATH_OR_ID", str(tmp_path)), found := {})
    assert torch.equal(found["logits"], head(load_encoder(MINILM).embed(["a text to classify"])).logits)


def test_a_network_that_does_not_fit_its_target_is_named(networks):
    networks.weights[1] = networks.weights[1] | {"hidden.weight": torch.zeros(5, 6)}
    with pytest.raises(
        ValueError, match=r"has \(4, 6\) for 'hidden.weight', the sample has \(5, 6\); give the target"
    ):
        networks.to_model(1)
    networks.weights[0] = networks.weights[0] | {"stray": torch.zeros(1)}
    with pytest.raises(ValueError, match="network of its target has no place for 'stray'"):
        networks.to_model(0)


def test_a_module_that_does_not_fit_its_weights_is_named(networks):
    networks.targets[0] = {"kind": "module", "name": "given"}
    networks.weights[0] = {"weight": torch.zeros(2, 6), "bias": torch.zeros(2)}
    networks.module = torch.nn.Linear(6, 2)
    assert networks.to_model(0).weight.abs().max() == 0
    networks.module = torch.nn.Linear(6, 2, device="meta")
    with pytest.raises(ValueError, match="on the device 'meta', without memory"):
        networks.to_model(0)
    networks.module = torch.nn.Linear(7, 2)
    with pytest.raises(
        ValueError, match=r"module has \(2, 7\) for 'weight', the sample has \(2, 6\); give the module"
    ):
        networks.to_model(0)


def test_a_part_of_a_network_is_no_model(networks, tmp_path):
    weights = {name: tensor for name, tensor in networks.weights[0].items() if name.startswith("head")}
    part = replace(networks, weights=[weights, networks.weights[1]])
    with pytest.raises(ValueError, match="a part of a network, without 'hidden.weight'; load them onto"):
        part.to_model(0)
    assert part.to_model(1).config.num_classes == 3

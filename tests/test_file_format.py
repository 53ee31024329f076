"""What a saved generator consists of, so that one that was published once loads for ever."""

import importlib
import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import DDIMScheduler

from hf_weightgen import components
from hf_weightgen.pipelines.pipeline_utils import WeightGenPipeline
from tiny import random


OURS = {
    "AccuracyPredictor", "DatasetEncoder", "IGPGPrior", "WeightDenoiser", "WeightTokenizer", "WeightVAE", "WeightVQVAE",
}  # fmt: skip
BASES = {  # looked up in our module when one of our components is loaded
    "DiffusionPipeline": diffusers, "ModelMixin": diffusers, "SchedulerMixin": diffusers,
    "FeatureExtractionMixin": transformers, "ImageProcessingMixin": transformers, "PreTrainedModel": transformers,
    "PreTrainedTokenizer": transformers, "PreTrainedTokenizerFast": transformers, "ProcessorMixin": transformers,
}  # fmt: skip


@pytest.fixture
def saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def reordered(value, key):
    """The same JSON with the keys of all objects in another order; lists stay as they are."""
    if isinstance(value, dict):
        return {name: reordered(value[name], key) for name in sorted(value, key=key)}
    return [reordered(item, key) for item in value] if isinstance(value, list) else value


def test_the_module_that_files_name_holds_ours_and_the_base_classes():
    assert set(components.__all__) == OURS | set(BASES)
    for name, library in BASES.items():
        assert getattr(components, name) is getattr(library, name), name
    for name in OURS:
        assert getattr(components, name).__name__ == name


def test_every_base_class_that_diffusers_looks_up_is_there():
    """Where diffusers looks for the way to load a component of a library of its own or of another one."""
    loading = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
    wanted = set().union(*(loading.LOADABLE_CLASSES[library] for library in ("diffusers", "transformers")))
    for name in OURS:
        matching = {c.__name__ for c in getattr(components, name).__mro__} & wanted
        assert matching & set(components.__all__), name


def test_the_index_names_three_modules_only(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "D2NWGPipeline"
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    assert parts == {
        "accuracy_predictor": [None, None],
        "dataset_encoder": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "unet": ["hf_weightgen.components", "WeightDenoiser"],
        "vae": ["hf_weightgen.components", "WeightVAE"],
        "weight_tokenizer": ["hf_weightgen.components", "WeightTokenizer"],
    }


def test_a_pipeline_that_was_loaded_saves_the_same_index(pipe, saved, tmp_path):
    for again in (pipe, WeightGenPipeline.from_pretrained(saved)):
        again.save_pretrained(tmp_path / "again")
        first, second = (json.loads((f / "model_index.json").read_text()) for f in (saved, tmp_path / "again"))
        assert first == {name: value for name, value in second.items() if name != "_name_or_path"}


def test_neither_an_encoder_nor_a_pickle_is_saved(pipe, saved):
    assert pipe.encoder is not None  # it was used, and stays where it is
    files = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    assert files == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/model.safetensors",
        "weight_tokenizer/preprocessor_config.json",
    ]  # fmt: skip
    index = json.loads((saved / "model_index.json").read_text())
    assert index["encoder"] == {"id": "sentence-transformers/all-MiniLM-L6-v2", "revision": None, "sha256": None}


def test_no_path_of_a_machine_is_saved(saved, tmp_path):
    WeightGenPipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 10
    for file in files:
        assert str(tmp_path) not in file.read_text() and str(Path.home()) not in file.read_text(), file


@pytest.mark.parametrize("key", [None, lambda name: [-ord(letter) for letter in name]], ids=["sorted", "backwards"])
def test_the_order_of_json_keys_changes_nothing(key, pipe, saved):
    expected = pipe("topic of AG News", generator=random(0))
    for file in saved.rglob("*.json"):
        file.write_text(json.dumps(reordered(json.loads(file.read_text()), key)))
    again = WeightGenPipeline.from_pretrained(saved)
    again.set_progress_bar_config(disable=True)
    found = again("topic of AG News", generator=random(0))
    assert found.labels == expected.labels
    assert list(found.weights[0]) == list(expected.weights[0])
    for name, tensor in expected.weights[0].items():  # memory of another alignment rounds differently
        torch.testing.assert_close(found.weights[0][name], tensor, atol=1e-6, rtol=0)


def test_another_scheduler_is_saved_and_loaded(pipe, tmp_path):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    again = WeightGenPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, DDIMScheduler) and again.scheduler.config.prediction_type == "v_prediction"

"""Folders and repositories of generators: what comes back, and what is refused."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_weightgen.hub.errors import HubError
from hf_weightgen.hub.untrusted import UntrustedFileError
from hf_weightgen.pipelines.pipeline_d2nwg import D2NWGPipeline
from hf_weightgen.pipelines.pipeline_utils import WeightGenPipeline
from hf_weightgen.targets.functional import BIAS
from tiny import random


PROMPT = "sentiment on SST-2"


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, num_samples=2, generator=random(0))


@pytest.fixture
def saved(pipe, tmp_path):
    pipe.vae.class_noise.fill_(0.5)
    pipe.save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


@pytest.fixture
def edit(saved):
    """Changes the JSON of a file of the saved generator."""

    def change(name: str, **entries):
        file = saved / name
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


@pytest.fixture
def on_the_hub(saved, hub):
    """Publishes the saved generator as it is now, and returns its id; by the server itself, since no client would send some."""

    def put() -> str:
        files = {p.relative_to(saved).as_posix(): p.read_bytes() for p in saved.rglob("*") if p.is_file()}
        hub.put("models", "acme/generator", files)
        return "acme/generator"

    return put


@pytest.mark.parametrize("loader", [WeightGenPipeline, D2NWGPipeline])
def test_a_folder_gives_the_generator_back(loader, pipe, saved):
    again = loader.from_pretrained(saved)
    assert type(again) is D2NWGPipeline and again.source == str(saved) and again.folder == saved
    for one, other in zip(sample(pipe).weights, sample(again).weights, strict=True):
        assert list(one) == list(other)
        for name in one:  # memory of another alignment rounds differently
            torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)
    for name in (
        "target",
        "tasks",
        "encoder",
        "prediction_type",
        "far_below",
        "num_inference_steps",
        "guidance_scale",
    ):
        assert again.config[name] == pipe.config[name], name


def test_the_output_names_its_generator(saved, tmp_path):
    output = sample(WeightGenPipeline.from_pretrained(saved))
    assert output.generator_id == str(saved)
    assert (
        f"generator: {saved.name} (a folder)"
        in (output.save_pretrained(tmp_path / "out")[0] / "README.md").read_text()
    )


@pytest.mark.parametrize("loader", [WeightGenPipeline, D2NWGPipeline])
def test_it_loads_from_the_hub(loader, pipe, on_the_hub, hub):
    again = loader.from_pretrained(on_the_hub())
    assert again.source == sample(again).generator_id == "acme/generator"
    assert again.revision == sample(again).generator_revision == hub.repo("models", "acme/generator").branches["main"]
    found, expected = (sample(generator).weights[1][BIAS] for generator in (again, pipe))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_half_precision_on_disk_is_single_precision_in_use(pipe, tmp_path):
    before = sample(pipe).latents
    pipe.to(torch.float16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "vae" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again = WeightGenPipeline.from_pretrained(tmp_path)
    assert again.vae.dtype == again.unet.dtype == torch.float32
    torch.testing.assert_close(sample(again).latents, before, atol=0.01, rtol=0)
    asked = WeightGenPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert asked.vae.dtype == asked.unet.dtype == torch.bfloat16


def test_parts_may_be_given(pipe, saved):
    mine = pipe.unet
    again = WeightGenPipeline.from_pretrained(saved, unet=mine, far_below=0.9)
    assert again.unet is mine and again.config.far_below == 0.9


@pytest.mark.parametrize("name", ["vae/pytorch_model.bin", "extra.pkl", "unet/model.PT", "notes/x.ckpt", "a.joblib"])
def test_pickles_are_refused(name, saved, on_the_hub, hub):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_bytes(b"\x80\x04.")
    for loader in (WeightGenPipeline, D2NWGPipeline):
        for source in (saved, on_the_hub()):
            with pytest.raises(
                UntrustedFileError, match=f"holds '{name}', a pickle .* Remove the file, or convert it"
            ):
                loader.from_pretrained(source)
    assert not hub.requested("GET", "/resolve/"), "nothing has been downloaded"


def test_other_pipelines_are_refused(saved, edit):
    edit("model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(
        ValueError, match=r"'StableDiffusionPipeline', expected one of \['D2NWGPipeline', 'IGPGPipeline'\]"
    ):
        WeightGenPipeline.from_pretrained(saved)


def test_other_pipelines_on_the_hub_are_refused(edit, on_the_hub):
    edit("model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(ValueError, match="'acme/generator' holds a 'StableDiffusionPipeline'"):
        WeightGenPipeline.from_pretrained(on_the_hub())


def test_a_repository_of_something_else_is_not_downloaded(hub):
    hub.put("models", "acme/bert", {"config.json": "{}", "model.safetensors": b"0" * 1000})
    with pytest.raises(ValueError, match="'acme/bert' has no model_index.json: it is no generator"):
        WeightGenPipeline.from_pretrained("acme/bert")
    assert not hub.requested("GET", "/resolve/")


@pytest.mark.parametrize(
    "entry",
    [
        ["subprocess", "Popen"], ["my_own_module", "Net"], ["hf_weightgen.cli", "app"], ["modeling", "Evil"],
        ["hf_weightgen.components", "ModelMixin"], ["diffusers", "utils"], ["transformers", "pipeline"], ["diffusers", None],
    ],
)  # fmt: skip
def test_other_modules_and_classes_are_refused(entry, saved, edit, on_the_hub):
    before = set(sys.modules)
    edit("model_index.json", vae=entry)
    (saved / "vae" / "modeling.py").write_text("raise SystemExit('executed')")
    for source in (saved, on_the_hub()):
        with pytest.raises(UntrustedFileError, match=f"wants 'vae' to be {entry[1]!r} from the module"):
            WeightGenPipeline.from_pretrained(source)
    assert not [name for name in set(sys.modules) - before if "my_own_module" in name or "modeling" in name]


@pytest.mark.parametrize("argument", ["custom_pipeline", "trust_remote_code", "custom_revision", "proxies"])
def test_arguments_that_are_not_supported_are_named(argument, saved):
    with pytest.raises(ValueError, match=f"`{argument}` is not supported"):
        WeightGenPipeline.from_pretrained(saved, **{argument: "acme/evil"})
    with pytest.raises(ValueError, match="`use_safetensors=False` is not supported"):
        WeightGenPipeline.from_pretrained(saved, use_safetensors=False)


def test_a_folder_without_a_generator_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No model_index.json in .*: this is no generator. Give its folder"):
        WeightGenPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "acme/unknown"])
def test_a_generator_that_is_nowhere_is_named(name):
    with pytest.raises((OSError, ValueError), match=name.split("/")[-1]):
        WeightGenPipeline.from_pretrained(name)


WEIGHTS = ["vae/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("keep", [0, 6, 1000, -10])
def test_truncated_weights_are_named(name, keep, saved):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=f"{name}' is truncated or no safetensors file .*; download or save"):
        WeightGenPipeline.from_pretrained(saved)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_another_network_are_named(name, saved):
    """Left alone, the libraries below would fill the gaps with random numbers."""
    tensors = load_file(saved / name)
    first = next(iter(sorted(tensors)))
    folder = name.split("/")[0]
    save_file({k: v for k, v in tensors.items() if k != first}, saved / name, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"{folder}/.* have nothing for '{first}'.*another network than its config.json"
    ):
        WeightGenPipeline.from_pretrained(saved)
    save_file(tensors | {"stray": torch.zeros(2)}, saved / name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder}/.* have \(2,\) for 'stray', .* has no place"):
        WeightGenPipeline.from_pretrained(saved)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_other_shapes_are_refused(name, saved):
    tensors = load_file(saved / name)
    first = max(tensors, key=lambda key: tensors[key].numel())
    save_file(tensors | {first: torch.zeros(3, 3)}, saved / name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="(another network than its config.json|describes no ).*Download or save"):
        WeightGenPipeline.from_pretrained(saved)


def test_broken_json_is_named(saved):
    (saved / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json"):
        WeightGenPipeline.from_pretrained(saved)


def test_an_encoder_of_another_checksum_is_refused(pipe, saved, edit):
    encoder = dict(pipe.config.encoder) | {"sha256": "0" * 64}
    edit("model_index.json", encoder=encoder)
    again = WeightGenPipeline.from_pretrained(saved)
    with pytest.raises(ValueError, match=f"SHA-256 .*, expected {'0' * 64}"):
        sample(again)


def test_variants_load_as_in_diffusers(pipe, saved, on_the_hub, tmp_path):
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        shutil.copyfile(file, saved / file.relative_to(tmp_path / "half"))
    again = WeightGenPipeline.from_pretrained(on_the_hub(), variant="fp16")
    torch.testing.assert_close(sample(again).latents, sample(pipe).latents, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no such modeling files"):
        WeightGenPipeline.from_pretrained("acme/generator", variant="int3")


def test_revisions_are_followed(pipe, saved, edit, on_the_hub, hub, tmp_path):
    first = hub.repo("models", on_the_hub()).branches["main"]
    edit("model_index.json", guidance_scale=2.5)
    on_the_hub()
    at = {
        revision: WeightGenPipeline.from_pretrained("acme/generator", revision=revision)
        for revision in (first, "main")
    }
    assert at[first].config.guidance_scale == pipe.config.guidance_scale and at["main"].config.guidance_scale == 2.5
    with pytest.raises(HubError, match="has no revision 'v9'"):
        WeightGenPipeline.from_pretrained("acme/generator", revision="v9")


def test_local_files_only_asks_nobody(on_the_hub, hub, tmp_path):
    with pytest.raises(HubError, match="'acme/generator' failed: it is not in the cache"):
        WeightGenPipeline.from_pretrained(on_the_hub(), local_files_only=True, cache_dir=tmp_path)
    WeightGenPipeline.from_pretrained("acme/generator", cache_dir=tmp_path)
    hub.requests.clear()
    again = WeightGenPipeline.from_pretrained("acme/generator", local_files_only=True, cache_dir=tmp_path)
    assert not hub.requests and again.folder.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, None, "the Hub does not accept the token, or there is none.*hf auth login"),
        (403, None, "this token may not do that"),
        (404, "RepoNotFound", "there is no such repository"),
        (404, "RevisionNotFound", "has no revision"),
        (429, None, "too many requests. Wait 9 seconds"),
        (403, "GatedRepo", "it is gated. Ask for access"),
    ],
)
def test_what_the_hub_refuses_is_explained(on_the_hub, hub, status, code, message, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    headers = {"Retry-After": "9"} | ({"X-Error-Code": code} if code else {})
    hub.fail("GET", "/api/models/acme/generator", status, headers=headers, times=100)
    with pytest.raises(HubError, match=f"Loading 'acme/generator' failed: .*{message}"):
        WeightGenPipeline.from_pretrained(on_the_hub(), cache_dir=tmp_path)


@pytest.mark.parametrize(
    "fault", [{"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}}, {"status": 500}, {"cut": 900}]
)
def test_a_file_that_does_not_come_is_explained(on_the_hub, hub, fault, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for method in ("GET", "HEAD"):
        hub.fail(method, "/resolve/.*/vae/model.safetensors", times=1000, **fault)
    with pytest.raises(HubError, match="(lacks a file|answered 500|connection broke|not reached)"):
        WeightGenPipeline.from_pretrained(on_the_hub(), cache_dir=tmp_path)
    hub.faults.clear()
    assert WeightGenPipeline.from_pretrained("acme/generator", cache_dir=tmp_path).source == "acme/generator"


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429, "headers": {"Retry-After": "1"}}, {"cut": 900}])
def test_a_fault_that_passes_is_survived(on_the_hub, hub, fault, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("GET", "/resolve/.*/vae/model.safetensors", **fault)
    assert WeightGenPipeline.from_pretrained(on_the_hub(), cache_dir=tmp_path).source == "acme/generator"


def test_a_repository_without_weights_is_named(saved, on_the_hub):
    (saved / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UntrustedFileError, match="unet' holds no safetensors file"):
        WeightGenPipeline.from_pretrained(on_the_hub())


def test_private_generators_need_their_token(saved, on_the_hub, hub, monkeypatch):
    hub.repo("models", on_the_hub()).private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no such repository, or it is private.*hf auth login"):
        WeightGenPipeline.from_pretrained("acme/generator")
    assert WeightGenPipeline.from_pretrained("acme/generator", token="hf_writer").source == "acme/generator"


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in ("./nosuch", str(tmp_path / "nosuch"), str(tmp_path / "file")):
        with pytest.raises(FileNotFoundError, match="There is no generator folder"):
            WeightGenPipeline.from_pretrained(wrong)

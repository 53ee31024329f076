"""Generators of strangers: no file makes the loader build something huge, run code, or fail with a foreign error."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_weightgen.hub.untrusted import UntrustedFileError
from hf_weightgen.pipelines.pipeline_utils import WeightGenPipeline


JSON_FILES = (
    "model_index.json",
    "vae/config.json",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "weight_tokenizer/preprocessor_config.json",
)
WEIGHTS = ("vae/model.safetensors", "unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def edit(folder, name: str, *path, value) -> None:
    """Sets one entry of a JSON file."""
    told = inner = json.loads((folder / name).read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / name).write_text(json.dumps(told))


HUGE = [
    ("vae/config.json", ["hidden_size"], 10**6),
    ("vae/config.json", ["num_body_tokens"], 10**9),
    ("vae/config.json", ["latent_shape"], [4, 10**6, 10**6]),
    ("vae/config.json", ["token_size"], 2**62),
    ("unet/config.json", ["num_layers"], 10**9),
    ("unet/config.json", ["hidden_size"], 10**6),
    ("unet/config.json", ["sample_size"], 10**5),
    ("scheduler/scheduler_config.json", ["num_train_timesteps"], 10**12),
    ("model_index.json", ["target", "lora", "r"], 10**9),
    ("model_index.json", ["num_inference_steps"], 10**12),
    ("weight_tokenizer/preprocessor_config.json", ["layouts", 0, 0, "shape"], [10**6, 10**6]),
]


@pytest.mark.parametrize(("name", "path", "value"), HUGE)
def test_a_terabyte_is_refused_before_it_is_allocated(saved, name, path, value):
    edit(saved, name, *path, value=value)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, limit[1]))
    try:
        with pytest.raises(ValueError):
            WeightGenPipeline.from_pretrained(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_10000_deep_is_refused(saved, name):
    (saved / name).write_text("[" * 10_000 + "]" * 10_000)
    with pytest.raises(UntrustedFileError, match="nested"):
        WeightGenPipeline.from_pretrained(saved)


def test_nothing_of_a_repository_is_executed(saved):
    """Files that stock loaders would run, in a process of its own that would not survive it."""
    for name in ("pipeline.py", "vae/modeling.py", "unet/modeling.py", "hf_weightgen/__init__.py"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("import os; os._exit(77)")
    code = f"from hf_weightgen import WeightGenPipeline as W; W.from_pretrained({str(saved)!r}); print('loaded')"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr[-2000:]


REDIRECTED = {
    "scheduler/scheduler_config.json": '"stranger/scheduler"',
    "unet/config.json": '"stranger/unet"',
    "vae/config.json": "[]",
    "weight_tokenizer/preprocessor_config.json": "null",
}


@pytest.mark.parametrize("name", REDIRECTED)
def test_a_config_that_names_another_repository_is_refused(saved, hub, name):
    (saved / name).write_text(REDIRECTED[name])
    with pytest.raises(UntrustedFileError, match="is no JSON object"):
        WeightGenPipeline.from_pretrained(saved)
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["vae/zzz.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json", "unet/w.dat"]
)
def test_weights_lie_in_one_file_alone(saved, name):
    """An index could send the loaders to files that nobody has looked at, a second file hide what the first lacks."""
    (saved / name).write_bytes(
        (saved / WEIGHTS[0]).read_bytes() if name.endswith("safetensors") else b'{"weight_map": {}}'
    )
    with pytest.raises(UntrustedFileError, match="is no part of a"):
        WeightGenPipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("vae/config.json", ["num_labels"], 10**10),
        ("vae/config.json", ["auto_map"], {"AutoModel": "modeling.WeightVAE"}),
        ("vae/config.json", ["attn_implementation"], "stranger/kernel"),
        ("vae/config.json", ["noise_scale"], float("nan")),
        ("model_index.json", ["target"], {"kind": "network", "config": {"input_shape": [6], "num_labels": 10**10}}),
        ("model_index.json", ["target", "lora", "rank_pattern"], {"(a+)+!": 8}),
        ("model_index.json", ["target", "base_model"], 'x"); print("PWNED") #'),
        ("model_index.json", ["tasks", 0, "name"], "a\n## b"),
        ("model_index.json", ["tasks", 0, "labels"], ["same", "same"]),
        ("model_index.json", ["tasks", 0, "labels"], [str(i) for i in range(200_000)]),
        ("model_index.json", ["text_encoder"], ["transformers", "GPTNeoModel"]),
        ("model_index.json", ["/etc"], ["diffusers", "DDPMScheduler"]),
        ("model_index.json", ["../../x"], ["diffusers", "DDPMScheduler"]),
        ("model_index.json", ["encoder"], {"id": "/etc/passwd", "revision": 5}),
    ],
)
def test_settings_that_no_generator_has_are_refused(saved, name, path, value):
    edit(saved, name, *path, value=value)
    with pytest.raises(ValueError):
        WeightGenPipeline.from_pretrained(saved)


def test_weights_that_are_no_numbers_are_refused(pipe, tmp_path):
    with torch.no_grad():
        next(pipe.vae.parameters()).fill_(float("nan"))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vae: .* holds NaN"):
        WeightGenPipeline.from_pretrained(tmp_path)


def test_pipes_and_folders_in_the_place_of_files_are_refused(saved):
    os.mkfifo(saved / "unet" / "x.safetensors")
    with pytest.raises(UntrustedFileError, match="is no regular file"):
        WeightGenPipeline.from_pretrained(saved)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([10**7, 2**63, -(2**63), 1e300, float("nan")]),
    st.text(max_size=3), st.lists(st.integers(0, 2), max_size=2), st.just({}), st.just([["a", "b"]]),
)  # fmt: skip


def places(value, path=()):
    """Paths of all entries of a JSON value."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def mutate(folder, original: dict[str, bytes], data) -> None:
    """One change of the kinds that damage and malice make."""
    for name, content in original.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(JSON_FILES * 2 + WEIGHTS))
    if name in WEIGHTS or data.draw(st.integers(0, 9)) == 0:
        content = bytearray(original[name])
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, min(len(content) - 1, 3_000)))
            content[at : at + 1] = data.draw(st.binary(max_size=2))
        (folder / name).write_bytes(bytes(content))
        return
    told = json.loads(original[name])
    path = data.draw(st.sampled_from(list(places(told))))
    if data.draw(st.booleans()):
        edit(folder, name, *path, value=data.draw(ODD))
    else:
        inner = told
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        (folder / name).write_text(json.dumps(told))


def loads_or_is_refused(folder) -> None:
    """Our errors are ValueErrors and FileNotFoundErrors; what loads also generates, or says why it cannot."""
    try:
        pipe = WeightGenPipeline.from_pretrained(folder)
    except (ValueError, FileNotFoundError):
        return
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.nn.functional.normalize(torch.ones(1, 384), dim=1)
    try:
        output = pipe(prompt_embeds=embeds, output_type="latent", generator=torch.Generator().manual_seed(0))
    except (ValueError, TypeError):
        return
    assert output.latents.shape == (1, *pipe.vae.config.latent_shape)


def fuzz(pipe, folder, examples: int) -> None:
    pipe.save_pretrained(folder)
    original = {name: (folder / name).read_bytes() for name in JSON_FILES + WEIGHTS}

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def run(data):
        mutate(folder, original, data)
        loads_or_is_refused(folder)

    run()


@pytest.mark.filterwarnings("ignore")
def test_mutated_generators_load_or_are_refused(pipe, tmp_path):
    fuzz(pipe, tmp_path / "generator", 400)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_generators_load_or_are_refused(pipe, tmp_path):
    fuzz(pipe, tmp_path / "generator", 3_000)

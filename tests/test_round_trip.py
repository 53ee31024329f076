"""The whole way over the Hub: a generator and what it makes, loaded in fresh processes by id, with and without this library."""

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import HfApi
from typer.testing import CliRunner

from hf_weightgen import WeightGenPipeline
from hf_weightgen.cli import app
from hf_weightgen.hub.cards import write_card
from hf_weightgen.hub.errors import HubError
from hf_weightgen.hub.publish import publish
from hf_weightgen.pipelines.output import publish_weights
from hf_weightgen.targets.architectures import TargetConfig, TargetModel, mlp
from hf_weightgen.targets.base_models import MINILM, load_tokenizer, resolve_base
from hf_weightgen.zoo.folder import ZooFolder, load_zoo, push_zoo
from hf_weightgen.zoo.schema import row_to_state_dict
from rows import adapter, assert_same, rows_of
from tiny import network_pipeline, random, train_a_little


PROMPT = "sentiment on SST-2"
TEXTS = ["a gripping, funny film", "a dull and endless film"]


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """The Python of a virtual environment that has all packages of this one but our own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv")
    packages = folder / "packages"
    packages.mkdir()
    for place in filter(Path.is_dir, map(Path, site.getsitepackages())):  # Debian names some that are not there
        for entry in place.iterdir():
            if "hf_weightgen" not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    (own,) = (folder / "venv").glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"{packages}\n")
    python = folder / "venv" / "bin" / "python"
    code = "import importlib.util as i; print(i.find_spec('peft') is None, i.find_spec('hf_weightgen'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)
    assert told.stdout.split() == ["False", "None"], told.stderr
    return python


@pytest.fixture
def fresh(hub, tmp_path):
    """Runs code in a process of its own, with an empty cache, and returns what it prints as JSON."""

    def run(code: str, python: Path | str = sys.executable):
        told = os.environ | hub.environment(tmp_path / "home") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        if python != sys.executable:
            told.pop("PYTHONPATH", None)
        done = subprocess.run([python, "-c", code], env=told, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def base_on_the_hub(hub):
    """all-MiniLM-L6-v2 under its id, for those who load an adapter without this library."""
    files = {path.name: path.read_bytes() for path in Path(resolve_base(MINILM)).iterdir() if path.is_file()}
    hub.put("models", MINILM, files)


def logits_of(model, texts=TEXTS) -> torch.Tensor:
    with torch.no_grad():
        return model(**load_tokenizer(MINILM)(texts, padding=True, return_tensors="pt")).logits


def test_train_publish_load_generate_publish_load(pipe, hub, fresh, elsewhere, base_on_the_hub):
    train_a_little(pipe)
    pipe.push_to_hub("acme/generator", private=True)
    made = fresh(
        "import json, torch\n"
        "from hf_weightgen import WeightGenPipeline\n"
        "pipe = WeightGenPipeline.from_pretrained('acme/generator')\n"
        f"output = pipe({PROMPT!r}, num_samples=2, generator=torch.Generator().manual_seed(5))\n"
        "commit = output.push_to_hub('acme/lora', indices=[1])\n"
        "print(json.dumps({'labels': output.labels[1], 'seed': output.seeds[1], 'url': commit.commit_url}))"
    )
    expected = pipe(PROMPT, num_samples=2, generator=random(5))
    assert made["labels"] == expected.labels[1] and made["seed"] == expected.seeds[1]
    loaded = fresh(
        "import json\nfrom peft import AutoPeftModelForSequenceClassification\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        f"names, texts = {made['labels']!r}, {TEXTS!r}\n"
        "model = AutoPeftModelForSequenceClassification.from_pretrained('acme/lora', id2label=dict(enumerate(names)))\n"
        f"inputs = AutoTokenizer.from_pretrained({MINILM!r})(texts, padding=True, return_tensors='pt')\n"
        f"base = AutoModelForSequenceClassification.from_pretrained({MINILM!r}, num_labels=len(names))\n"
        "base.load_adapter('acme/lora')\n"
        "print(json.dumps([m.eval()(**inputs).logits.tolist() for m in (model, base)]))",
        elsewhere,
    )
    for logits in loaded:
        torch.testing.assert_close(torch.tensor(logits), logits_of(expected.to_model(1)), atol=1e-5, rtol=0)
    info = HfApi().model_info("acme/lora")
    assert (
        info.library_name == "peft" and info.card_data.base_model == MINILM and info.card_data.license == "apache-2.0"
    )
    assert {"hf_weightgen", "lora"} <= set(info.tags) and hub.repo("models", "acme/generator").private
    assert not hub.repo("models", "acme/lora").private


def test_several_samples_lie_in_folders(pipe, hub, fresh, elsewhere, base_on_the_hub):
    output = pipe(PROMPT, num_samples=3, generator=random(0))
    output.push_to_hub("acme/loras", indices=[2, 0])
    found = fresh(
        "import json\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"bases = [Auto.from_pretrained({MINILM!r}, num_labels=2) for _ in range(2)]\n"
        "models = [PeftModel.from_pretrained(b, 'acme/loras', subfolder=f'000{i}') for i, b in enumerate(bases)]\n"
        "print(json.dumps([m.state_dict()['base_model.model.classifier.modules_to_save.default.bias'].tolist() for m in models]))",
        elsewhere,
    )
    cards = [Path(HfApi().hf_hub_download("acme/loras", n)).read_text() for n in ("README.md", "0001/README.md")]
    assert (
        'PeftModel.from_pretrained(base, "acme/loras", subfolder="0000")' in cards[0]
        and "holds 2 samples, in the folders 0000 to 0001" in cards[0]
    )
    assert 'PeftModel.from_pretrained(base, "acme/loras", subfolder="0001")' in cards[1]
    name = "base_model.model.classifier.bias"
    for bias, sample in zip(found, (2, 0), strict=True):
        torch.testing.assert_close(torch.tensor(bias), output.weights[sample][name])
    with pytest.raises(IndexError, match="no sample 3"):
        output.push_to_hub("acme/loras", indices=[3])


def test_a_network_loads_with_and_without_this_library(hub, fresh, elsewhere, tmp_path):
    model = TargetModel(TargetConfig(input_shape=[6], layers=mlp(4), num_classes=3, activation="gelu")).eval()
    model.save_pretrained(tmp_path / "network")
    write_card(tmp_path / "network", "network", labels=["a", "b", "c"], prompt="which digit")
    publish_weights(tmp_path / "network", "acme/plain")
    publish_weights(tmp_path / "network", "acme/code", remote_code=True)
    inputs = torch.linspace(-1, 1, 12).view(2, 6)
    expected = model(inputs).logits
    tail = f"print(json.dumps(model.eval()(torch.tensor({inputs.tolist()})).logits.tolist()))"
    head = "import json, torch\nfrom transformers import AutoModel\n"
    ours = head + "import hf_weightgen.targets.architectures\nmodel = AutoModel.from_pretrained('acme/plain')\n" + tail
    code = head + "model = AutoModel.from_pretrained('acme/code', trust_remote_code=True)\n" + tail
    for script, python in ((ours, sys.executable), (code, elsewhere)):
        torch.testing.assert_close(torch.tensor(fresh(script, python)), expected, atol=1e-6, rtol=0)


def test_several_networks_load_without_this_library(hub, fresh, elsewhere, encoder, tmp_path):
    output = network_pipeline(encoder)("which digit is it", num_samples=2, generator=random(0))
    output.push_to_hub("acme/networks", remote_code=True)
    found = fresh(
        "import json, torch\nfrom transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('acme/networks', subfolder='0001', trust_remote_code=True)\n"
        "print(json.dumps(model.head.bias.tolist()))",
        elsewhere,
    )
    torch.testing.assert_close(torch.tensor(found), output.weights[1]["head.bias"])
    card = Path(HfApi().hf_hub_download("acme/networks", "0001/README.md")).read_text()
    assert 'AutoModel.from_pretrained("acme/networks", subfolder="0001", trust_remote_code=True)' in card


def test_zoos_in_folders_with_odd_names(hub, tmp_path):
    ZooFolder(tmp_path / "zoo [x]*").add("all", rows_of("sst2-s0-c0"))
    assert load_zoo(tmp_path / "zoo [x]*")["id"] == ["sst2-s0-c0"]
    for wrong in ({"columns": []}, {"columns": ["id", "id"]}, {"filters": [("nope", "==", 1)]}, {"filters": "x"}):
        with pytest.raises(ValueError):
            load_zoo(tmp_path / "zoo [x]*", **wrong)


@pytest.mark.parametrize(
    ("indices", "error"), [([], ValueError), ([True], TypeError), (["0"], TypeError), ([1], IndexError)]
)
def test_samples_are_chosen_by_whole_numbers(pipe, hub, indices, error):
    with pytest.raises(error):
        pipe(PROMPT, generator=random(0)).push_to_hub("acme/x", indices=indices)
    assert not hub.repos


def test_stubs_let_the_stock_loader_load(pipe, hub, fresh, encoder, tmp_path):
    pipe.push_to_hub("acme/stubs", remote_code=True)
    embeds = encoder.embed([PROMPT])
    head = "import json, sys\nimport torch\n"
    tail = (
        f"\noutput = pipe(prompt_embeds=torch.tensor({embeds.tolist()}), generator=torch.Generator().manual_seed(0), output_type='latent')\n"
        "print(json.dumps(output.latents.tolist()))"
    )
    stock = "from diffusers import DiffusionPipeline\nassert 'hf_weightgen' not in sys.modules\n"
    stock += "pipe = DiffusionPipeline.from_pretrained('acme/stubs', trust_remote_code=True)"
    ours = "from hf_weightgen import WeightGenPipeline\npipe = WeightGenPipeline.from_pretrained('acme/stubs')"
    expected = pipe(prompt_embeds=embeds, generator=random(0), output_type="latent").latents
    for script in (stock, ours):
        torch.testing.assert_close(torch.tensor(fresh(head + script + tail)), expected, atol=1e-6, rtol=0)
    again = WeightGenPipeline.from_pretrained("acme/stubs")
    again.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["vae"] == ["hf_weightgen.components", "WeightVAE"] and index["_class_name"] == "D2NWGPipeline"


def test_our_loader_runs_no_stub(pipe, hub):
    pipe.push_to_hub("acme/stubs", remote_code=True)
    repo = hub.repo("models", "acme/stubs")
    files = {path: blob.read() for path, blob in repo.commits[repo.branches["main"]].items()}
    evil = {path: b"raise SystemExit('executed')" for path in files if path.endswith(".py")}
    assert len(evil) == 4
    hub.put("models", "acme/stubs", files | evil)
    assert type(WeightGenPipeline.from_pretrained("acme/stubs")).__name__ == "D2NWGPipeline"


def test_a_network_generator_makes_the_round_trip(encoder, hub):
    pipe = network_pipeline(encoder)
    pipe.push_to_hub("acme/networks")
    again = WeightGenPipeline.from_pretrained("acme/networks")
    outputs = [p("which digit is it", generator=random(0)) for p in (pipe, again)]
    outputs[1].push_to_hub("acme/network")
    model = TargetModel.from_pretrained("acme/network").eval()
    inputs = torch.randn(3, *model.config.input_shape)
    torch.testing.assert_close(model(inputs).logits, outputs[0].to_model(0)(inputs).logits, atol=1e-5, rtol=0)


# ---- zoos


@pytest.fixture
def zoo(hub, tmp_path):
    ids = [f"{task}-s{seed}-c0" for task in ("emotion", "sst2") for seed in range(3)]
    ZooFolder(tmp_path / "zoo").add("all", [row | {"task": row["id"].split("-")[0]} for row in rows_of(*ids)])
    push_zoo(tmp_path / "zoo", "acme/zoo", rows_per_shard=2)
    return ids


def test_a_zoo_comes_back_bit_by_bit(zoo):
    loaded = load_zoo("acme/zoo")
    assert loaded["id"] == zoo
    for row in loaded:
        assert_same(row_to_state_dict(row), adapter(sum(map(ord, row["id"]))))
    assert load_dataset("acme/zoo", split="train")["id"] == zoo, "the stock loader reads it too"


def test_a_zoo_is_streamed_by_column_and_filter(zoo, hub):
    hub.requests.clear()
    rows = load_zoo("acme/zoo", streaming=True, columns=["id", "metrics"], filters=[("task", "==", "sst2")])
    assert [row["id"] for row in rows] == zoo[3:] and set(next(iter(rows))) == {"id", "metrics"}
    assert load_zoo("acme/zoo", columns=["task"]).column_names == ["task"]
    with pytest.raises(ValueError, match="has no column 'weight'"):
        load_zoo("acme/zoo", columns=["weight"])


def test_revisions_and_rights_of_zoos(zoo, hub, tmp_path, monkeypatch):
    first = hub.repo("datasets", "acme/zoo").branches["main"]
    ZooFolder(tmp_path / "second").add("all", rows_of("rte-s0-c0"))
    push_zoo(tmp_path / "second", "acme/zoo")
    assert load_zoo("acme/zoo")["id"] == ["rte-s0-c0"] and load_zoo("acme/zoo", revision=first)["id"] == zoo
    for missing, message in (("acme/nothing", "no such repository"), ("acme/zoo", "has no revision 'v9'")):
        with pytest.raises(HubError, match=message):
            load_zoo(missing, revision="v9" if missing == "acme/zoo" else None)
    hub.repo("datasets", "acme/zoo").private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no such repository, or it is private"):
        load_zoo("acme/zoo", revision="main")
    assert load_zoo("acme/zoo", token="hf_writer")["id"] == ["rte-s0-c0"]


def test_files_that_a_card_names_elsewhere_are_not_read(zoo, hub, tmp_path):
    (tmp_path / "elsewhere.parquet").write_bytes(next((tmp_path / "zoo" / "data").glob("*.parquet")).read_bytes())
    repo = hub.repo("datasets", "acme/zoo")
    files = {path: blob.read() for path, blob in repo.commits[repo.branches["main"]].items()}
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {tmp_path}/elsewhere.parquet\n---\n"
    hub.put("datasets", "acme/zoo", files | {"README.md": card})
    assert load_zoo("acme/zoo")["id"] == zoo


# ---- the command


def test_every_kind_is_published_by_one_command(pipe, hub, tmp_path):
    pipe.save_pretrained(tmp_path / "generator")
    output = pipe(PROMPT, generator=random(0))
    output.save_pretrained(tmp_path / "adapter")
    network_pipeline(pipe.encoder)("which digit is it", generator=random(0)).save_pretrained(tmp_path / "network")
    ZooFolder(tmp_path / "zoo").add("all", rows_of("sst2-s0-c0"))
    for kind, extra in {
        "generator": ["--remote-code"],
        "adapter": ["--private"],
        "network": [],
        "zoo": ["--half"],
    }.items():
        done = CliRunner().invoke(
            app, ["publish", str(tmp_path / kind), f"acme/{kind}", *extra], catch_exceptions=False
        )
        assert done.exit_code == 0 and done.stdout.startswith(f"published the {kind}: {hub.url}"), done.output
    assert hub.repo("models", "acme/adapter").private
    assert WeightGenPipeline.from_pretrained("acme/generator").source == "acme/generator"
    assert load_zoo("acme/zoo").features["weights"].feature.dtype == "float16"
    for kind in ("generator", "adapter", "network"):
        card = Path(HfApi().hf_hub_download(f"acme/{kind}", "README.md")).read_text(encoding="utf-8")
        assert f'"acme/{kind}"' in card.split("## Details")[0]


def test_folders_are_named_as_in_the_readme(pipe, hub, tmp_path, monkeypatch):
    """By one word, in the folder where the user stands."""
    monkeypatch.chdir(tmp_path)
    pipe(PROMPT, generator=random(0)).save_pretrained("my-adapter")
    pipe.save_pretrained("generator")
    assert WeightGenPipeline.from_pretrained("generator").source == "generator"
    for name in ("my-adapter", "generator"):
        done = CliRunner().invoke(app, ["publish", name, f"acme/{name}"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    files = list(Path("my-adapter").iterdir())
    assert len({file.stat().st_mode for file in files}) == 1, "all readable by the same people"


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [("zoo", ["--remote-code"], "a zoo has no code"), ("adapter", ["--half"], "--half is for zoos"),
     ("adapter", ["--remote-code"], "adapters load with plain PEFT"), ("nothing", [], "There is no folder")],
)  # fmt: skip
def test_what_a_kind_has_not_is_told(pipe, hub, tmp_path, kind, extra, message):
    pipe(PROMPT, generator=random(0)).save_pretrained(tmp_path / "adapter")
    ZooFolder(tmp_path / "zoo").add("all", rows_of("sst2-s0-c0"))
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["publish", str(tmp_path / kind), "acme/x", *extra], catch_exceptions=False)
    assert not hub.repos


def test_publish_reports_what_it_cannot_reach(pipe, hub, tmp_path):
    pipe(PROMPT, generator=random(0)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(HubError, match="namespace 'other'"):
        publish(tmp_path / "adapter", "other/adapter")

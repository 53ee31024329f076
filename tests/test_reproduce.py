"""Scripts of the paper index, each run at tiny size as a user runs it."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

import pictures
from hf_weightgen.targets.architectures import TargetConfig, TargetModel, architecture
from hf_weightgen.weights.resize import resizable


EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("dark", "medium", "light")


@pytest.fixture
def run(monkeypatch):
    def started(script: str, *arguments) -> None:
        monkeypatch.syspath_prepend(EXAMPLES / "reproduce")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    return started


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three image datasets of three degrees of brightness."""
    folder = tmp_path_factory.mktemp("data")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    for seed, name in enumerate(("first", "second", "unseen")):
        (folder / name).mkdir()
        for split, count in (("train", 240), ("test", 90)):
            noise = pictures.images(count, seed + 10 * count)
            columns = {
                "image": [p.point(lambda v, c=i % 3: 85 * c + v // 3) for i, p in enumerate(noise)],
                "label": [i % 3 for i in range(count)],
            }
            Dataset.from_dict(columns, features=features).to_parquet(folder / name / f"{split}-0.parquet")
    return folder


@pytest.mark.slow
def test_heads_are_trained_transferred_and_compared_by_the_size_of_their_zoo(run, data, tmp_path):
    pytest.importorskip("matplotlib")
    sets = ["--image_encoder", pictures.image_encoder(tmp_path), "--cache", tmp_path / "cache"]
    known, runs = [data / "first", data / "second"], [tmp_path / "2", tmp_path / "16"]
    for folder in runs:
        steps = ["--heads", folder.name, "--steps", 2, "--denoiser_steps", 2]
        run("train_few_shot.py", "--images", "--sets", *known, *sets, *steps, "--output_dir", folder)
    sets += ["--images", "--unseen", data / "unseen", "--tuning", *known]

    out, generator = tmp_path / "transfer.json", ["--generator", runs[0] / "pipeline", "--zoo", runs[0] / "zoo"]
    run("reproduce/transfer.py", *sets, *generator, "--shots", 2, "--draws", 2, "--epochs", 0, 1, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert {(r["epoch"], r["n"]) for r in rows if r["method"] in ("generated", "random", "ridge_head", "lookup")} == {
        (0, 2), (1, 2)
    }  # fmt: skip
    assert {(row["ways"], row["shots"]) for row in rows} == {(3, 2)} and out.with_suffix(".png").is_file()
    assert "ridge_all_examples" in {row["method"] for row in rows}

    out = tmp_path / "few_shot.json"
    run("reproduce/few_shot.py", *sets, *generator[:2], "--shots", 2, "--tasks", 2, "--draws", 4, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert {"ridge", "generated", "generated_top_3_by_queries"} <= {row["method"] for row in rows}

    out = tmp_path / "size.json"
    run("reproduce/zoo_size.py", *sets, "--runs", *runs, "--shots", 2, "--tasks", 3, "--draws", 4, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert {(row["heads"], row["sets"], row["n"]) for row in rows} == {(2, 2, 3), (16, 2, 3)}
    assert out.with_suffix(".png").is_file()


@pytest.mark.slow
def test_diffusion_over_weights_stands_beside_that_over_latents(run, tmp_path):
    out = tmp_path / "raw.json"
    sizes = ["--networks", 8, "--vae_steps", 2, "--max_train_steps", 2, "--n", 3]
    run("reproduce/raw_weights.py", *sizes, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows[::3]] == ["zoo", "latent", "latent_of_weights", "raw", "raw_wide"]
    assert all(0 <= row["mean"] <= row["best"] <= 100 for row in rows)


def test_commands_of_results_tell_no_places_of_a_machine(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "reproduce")
    typed = importlib.import_module("command").typed
    given = [
        "--zoo",
        "runs/images",
        "/data/mlp",
        "--data_root",
        "/data/sets",
        "--tasks",
        "/x/a.json",
        "svhn",
        "--bf16",
    ]
    command = typed(
        ["/home/me/examples/reproduce/codes.py", *given, "--image_encoder=/m", "--out", "o.json", "--n", "2"]
    )
    assert command == (
        "python examples/reproduce/codes.py --zoo runs/images mlp --tasks a.json svhn --bf16 --n 2 --out results.json"
    )


@pytest.mark.parametrize("family", ["tiny-cnn", "small-lenet", "mlp"])
def test_unseen_sizes_are_those_of_a_known_family(family, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "reproduce")
    unseen = importlib.import_module("unseen_architectures")
    known = TargetModel(architecture(family)).state_dict()
    for layers in unseen.VARIANTS[family].values():
        new = TargetModel(TargetConfig(input_shape=architecture(family).input_shape, layers=layers)).state_dict()
        sizes, shapes = ({name: tuple(t.shape) for name, t in network.items()} for network in (known, new))
        assert shapes != sizes and resizable(sizes, shapes)
        corner = unseen.in_corner(known, new)
        assert {name: tuple(tensor.shape) for name, tensor in corner.items()} == shapes

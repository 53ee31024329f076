"""A whole zoo of two small tasks, built once for the module, and continued after kills of every kind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from hf_weightgen.targets.base_models import MINILM, load_encoder
from hf_weightgen.targets.functional import BIAS, WEIGHT
from hf_weightgen.targets.tasks import TaskSpec
from hf_weightgen.weights.lora import split_lora
from hf_weightgen.zoo.build import build_zoo
from hf_weightgen.zoo.folder import ZooFolder, load_zoo
from hf_weightgen.zoo.recipe import LOGIT_SCALE, ZooConfig, config_of
from hf_weightgen.zoo.schema import row_to_state_dict, zoo_state_dicts
from hf_weightgen.zoo.start import head_of_names


CONFIG = ZooConfig(
    seeds=2, passes=64, passes_of={"pairs": 96}, pool=40, batch_size=8, base_steps=4, base_batch_size=8, base_pool=20
)
WORDS = {"good": "gripping funny warm clever", "bad": "dull empty long clumsy", "mixed": "uneven odd fair"}


def write(folder: Path, labels: list[str], pair: bool) -> None:
    """`train.jsonl` and `test.jsonl`, whose texts tell the class."""
    folder.mkdir(parents=True)
    for split, count in (("train", 60), ("test", 20)):
        rows = []
        for i in range(count):
            label = i % len(labels)
            words = WORDS[labels[label]].split()
            text = f"{split} {i}: a {words[i % len(words)]} and {words[i // 2 % len(words)]} film"
            rows.append({"text": text, "label": label} | ({"other": f"number {i} was {words[0]}"} if pair else {}))
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def tasks(root: Path) -> list[TaskSpec]:
    fields = {"label_column": "label", "test_split": "test", "prompts": ("sentiment of films", "is it good")}
    return [
        TaskSpec(
            "films", str(root / "films"), text_columns=("text",), labels=("bad", "good"), family="film", **fields
        ),
        TaskSpec(
            "pairs", str(root / "pairs"), text_columns=("text", "other"), labels=("good", "bad", "mixed"), **fields
        ),
    ]


def rows_of(folder: ZooFolder) -> dict[str, dict]:
    rows = {row_id: folder.row(row_id) for row_id in sorted(folder.finished())}
    return {row_id: row | {"weights": row_to_state_dict(row)} for row_id, row in rows.items()}


def assert_same(found: dict[str, dict], expected: dict[str, dict]) -> None:
    """Bit for bit, with all provenance."""
    assert found.keys() == expected.keys()
    for row_id, row in expected.items():
        weights = found[row_id]["weights"]
        assert list(weights) == list(row["weights"])
        assert all(torch.equal(weights[name], tensor) for name, tensor in row["weights"].items()), row_id
        assert {k: v for k, v in found[row_id].items() if k != "weights"} == {
            k: v for k, v in row.items() if k != "weights"
        }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write(root / "films", ["bad", "good"], pair=False)
    write(root / "pairs", ["good", "bad", "mixed"], pair=True)
    return root


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    return build_zoo(tasks(root), tmp_path_factory.mktemp("zoo") / "zoo", CONFIG, progress=False)


@pytest.fixture(scope="module")
def rows(finished):
    return rows_of(finished)


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished.path, tmp_path / "copy"))


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "data").iterdir())


def test_there_is_a_row_for_every_seed_and_checkpoint(finished, rows):
    wanted = {
        f"{task}-s{seed}-c{checkpoint}" for task in ("films", "pairs") for seed in (0, 1) for checkpoint in range(3)
    }
    assert rows.keys() == wanted | {"base"}
    assert shards(finished.path) == ["train-base.parquet", "train-films.parquet", "train-pairs.parquet"]


def test_rows_tell_what_they_are(rows, root):
    row = rows["pairs-s1-c2"]
    assert (row["task"], row["family"], row["split"], row["seed"], row["checkpoint"]) == (
        "pairs",
        "own",
        "held_out",
        1,
        2,
    )
    assert rows["pairs-s0-c2"]["split"] == "train" and rows["base"]["split"] == "base"
    assert row["labels"] == ["good", "bad", "mixed"] and row["text"] == "sentiment of films"
    assert row["arch"]["base_model"] == MINILM and row["arch"]["layers_to_transform"] == [4, 5]
    told = row["provenance"]
    found = config_of(told)
    assert found.checkpoints == pytest.approx(CONFIG.checkpoints)  # the reader of JSON columns rounds
    assert replace(found, checkpoints=CONFIG.checkpoints) == CONFIG
    assert told["dataset"] == str(root / "pairs") and told["data_revision"].startswith("content:")
    assert told["removed_duplicates"] == 0 and told["sentence_passes"] == 96
    assert told["hyper_parameters"]["seeds"] == 2 and told["hyper_parameters"]["lr"] == CONFIG.lr
    assert {"torch", "transformers", "peft", "datasets", "python"} <= set(told["versions"])
    assert [rows[f"films-s0-c{c}"]["provenance"]["sentence_passes"] for c in range(3)] == [40, 48, 64]
    assert rows["films-s0-c2"]["epoch"] == pytest.approx(64 / 51)  # 60 rows without the 15 % for validation


def test_metrics_are_measured_and_the_test_split_only_at_the_end(rows):
    for row_id, row in rows.items():
        assert 0 <= row["metrics"]["validation"] <= 1
        assert (row["metrics"]["test"] is not None) == row_id.endswith("c2")


def test_weights_are_adapters_that_were_trained_each_in_its_own_way(rows):
    base, member = rows["base"]["weights"], rows["pairs-s0-c2"]["weights"]
    assert member[WEIGHT].shape == (3, 384) and member[BIAS].shape == (3,)
    assert rows["films-s0-c0"]["weights"][WEIGHT].shape == (2, 384)
    pairs, _ = split_lora(member)
    assert len(pairs) == 4 and {(a.shape, b.shape) for a, b in pairs.values()} == {((4, 384), (384, 4))}
    for name in member:
        versions = [rows[f"pairs-s{s}-c{c}"]["weights"][name] for s in (0, 1) for c in (0, 2)]
        versions += [base[name]] if name in base else []
        assert all(not torch.equal(a, b) for i, a in enumerate(versions) for b in versions[:i]), name


def test_the_base_turns_class_names_into_a_head(rows):
    base, names = rows["base"]["weights"], load_encoder().embed(["good", "bad", "mixed"])
    head = head_of_names(base, names)
    assert head[WEIGHT].shape == (3, 384) and head[BIAS].shape == (3,)
    features = torch.randn(5, 384)
    guess = features @ base["name_projection.weight"].T + base["name_projection.bias"]  # an estimate of e(x)
    torch.testing.assert_close(
        features @ head[WEIGHT].T + head[BIAS], LOGIT_SCALE * guess @ names.T, rtol=1e-4, atol=1e-4
    )


def test_it_loads_as_a_dataset(finished, rows):
    zoo = load_zoo(finished.path)
    assert sorted(zoo["id"]) == sorted(rows)
    for row_id, weights in zip(zoo["id"], zoo_state_dicts(zoo), strict=True):
        assert all(torch.equal(weights[name], tensor) for name, tensor in rows[row_id]["weights"].items())


def test_a_finished_zoo_is_left_alone(copy, root):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    build_zoo(tasks(root), copy, CONFIG, progress=False)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("lost", [["films"], ["pairs"], ["base"], ["films", "pairs"]], ids="-".join)
def test_what_is_missing_is_made_again_bit_for_bit(lost, copy, root, rows):
    for name in lost:
        (copy / "data" / f"train-{name}.parquet").unlink()
    (copy / "data" / ".train-films.parquet.123.tmp").write_bytes(b"half")  # as a kill leaves it
    assert_same(rows_of(build_zoo(tasks(root), copy, CONFIG, progress=False)), rows)


def test_tasks_can_be_added_in_any_order(copy, root, rows):
    (copy / "data" / "train-films.parquet").unlink()
    assert_same(rows_of(build_zoo(tasks(root)[::-1], copy, CONFIG, progress=False)), rows)


@pytest.mark.parametrize("change", [{"seeds": 3}, {"passes": 72}, {"lr": 1e-3}, {"passes_of": {}}], ids=str)
def test_another_configuration_is_refused_before_any_work(change, copy, tmp_path):
    nowhere = tasks(tmp_path / "no data")
    (name,) = change
    with pytest.raises(ValueError, match=f"zoo_config.json was started with `{name}` = .*choose another folder"):
        build_zoo(nowhere, copy, replace(CONFIG, **change), progress=False)
    assert len(shards(copy)) == 3


@pytest.mark.parametrize(("passes", "batch_size"), [(64, 32), (8, 16), (0, 8)])
def test_too_few_passes_for_the_checkpoints_are_refused(passes, batch_size, tmp_path):
    config = replace(CONFIG, passes=passes, batch_size=batch_size)
    with pytest.raises(ValueError, match=f"'films': {passes} passes are .*raise `passes`"):
        build_zoo(tasks(tmp_path), tmp_path / "zoo", config, progress=False)
    assert not (tmp_path / "zoo").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_loses_no_finished_shard(root, rows, tmp_path):
    code = (
        "import json, sys; from hf_weightgen.targets.tasks import TaskSpec; "
        "from hf_weightgen.zoo.build import build_zoo; from hf_weightgen.zoo.recipe import ZooConfig; folder, specs, config = json.loads(sys.argv[1]); "
        "config['checkpoints'] = tuple(config['checkpoints']); "
        "build_zoo([TaskSpec(**spec) for spec in specs], folder, ZooConfig(**config))"
    )
    argument = json.dumps([str(tmp_path / "zoo"), [asdict(spec) for spec in tasks(root)], asdict(CONFIG)])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for shard in ("train-base.parquet", "train-films.parquet"):
        process = subprocess.Popen([sys.executable, "-c", code, argument], env=environment, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not (tmp_path / "zoo" / "data" / shard).exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert_same(rows_of(build_zoo(tasks(root), tmp_path / "zoo", CONFIG, progress=False)), rows)

"""A zoo of small networks: resumable, alike however its groups are shared, and its rows are networks that work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_weightgen.targets import architectures
from hf_weightgen.targets.architectures import TargetModel
from hf_weightgen.zoo import build_networks
from hf_weightgen.zoo.build_networks import NetworkZooConfig, build_network_zoo, network_of
from hf_weightgen.zoo.folder import ZooFolder, load_zoo
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.schema import row_to_state_dict
from pictures import images, write
from run_network_zoo import CONFIG, PROTOCOL, SMALL


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Dark and light images, and a protocol and a small architecture for them."""
    pictures = images(96, 0)
    pictures = [
        p.point(lambda v: v // 2) if i % 2 == 0 else p.point(lambda v: 128 + v // 2) for i, p in enumerate(pictures)
    ]
    monkeypatch.setitem(build_networks.SHORT, "task", PROTOCOL)
    monkeypatch.setitem(architectures.NAMED, "small", SMALL)
    return write(tmp_path / "task", train=pictures[:80], test=pictures[80:])


def test_rows_are_networks_with_the_accuracy_that_they_tell(spec, tmp_path):
    zoo = build_network_zoo([spec], tmp_path / "zoo", CONFIG, progress=False)
    rows, data = load_zoo(zoo.path), load_images([spec])["task"]
    assert zoo.finished() == {f"task-s{seed}-e{epoch}" for seed in range(5) for epoch in (2, 3)}
    assert {row["seed"] for row in rows if row["split"] == "held_out"} == {4}
    config = network_of(spec, 1, CONFIG)
    for row in rows:
        model = TargetModel(config).eval()
        model.load_state_dict(row_to_state_dict(row))
        for part in ("validation", "test"):
            images_of = getattr(data, part)
            right = model(data.inputs(images_of)).logits.argmax(-1) == images_of.labels
            assert row["metrics"][part] == right.double().mean().item()
        assert row["arch"] == {"name": "small", "activation": "relu", "input_shape": [1, 8, 8]}
        assert row["provenance"]["data_revision"] == data.data_revision
    last = [row["metrics"]["test"] for row in rows if row["epoch"] == 3]
    assert sum(last) / len(last) > 0.8


def test_a_restart_trains_what_is_missing_and_nothing_else(spec, tmp_path, monkeypatch):
    whole = build_network_zoo([spec], tmp_path / "whole", CONFIG, progress=False)
    trained = []

    def killed(data, seeds, *arguments):
        if trained:
            raise KeyboardInterrupt
        trained.append(seeds)
        return build_networks_group(data, seeds, *arguments)

    build_networks_group = build_networks.train_group
    monkeypatch.setattr(build_networks, "train_group", killed)
    with pytest.raises(KeyboardInterrupt):
        build_network_zoo([spec], tmp_path / "zoo", CONFIG, progress=False)
    assert len(ZooFolder(tmp_path / "zoo").finished()) == 4
    trained.clear()
    monkeypatch.setattr(build_networks, "train_group", lambda *a: trained.append(a[1]) or build_networks_group(*a))
    zoo = build_network_zoo([spec], tmp_path / "zoo", CONFIG, progress=False)
    assert trained == [[2, 3], [4]]
    for row_id in whole.finished():
        first, second = (row_to_state_dict(folder.row(row_id)) for folder in (whole, zoo))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_processes_share_the_groups_and_make_the_same_zoo(spec, tmp_path):
    whole = build_network_zoo([spec], tmp_path / "whole", CONFIG, progress=False)
    script = Path(__file__).parents[1] / "run_network_zoo.py"
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(script),
        spec.dataset_id,
        str(tmp_path / "zoo"),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200, check=True)
    assert sorted(re.findall(r"trained (\[.*?\])", done.stdout)) == ["[0, 1]", "[2, 3]", "[4]"]
    shared = ZooFolder(tmp_path / "zoo")
    for row_id in whole.finished():
        first, second = (row_to_state_dict(folder.row(row_id)) for folder in (whole, shared))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor)


def test_published_start_is_that_of_the_tiny_cnn_alone():
    assert NetworkZooConfig().of("mnist").init == "uniform"
    assert NetworkZooConfig("lenet").of("mnist").init == "kaiming_uniform"


def test_workers_have_shares_of_their_own_whenever_they_start(spec, tmp_path):
    folder = ZooFolder(tmp_path / "zoo")
    for worker, rows in ((1, 4), (0, 10), (1, 10)):  # the second one has groups 1 and 3 of three
        build_network_zoo([spec], folder.path, CONFIG, progress=False, share=(worker, 2))
        assert len(folder.finished()) == rows


def test_a_zoo_has_networks_to_train_on():
    with pytest.raises(ValueError, match="`seeds` > `held_out` >= 0, got 4 and 20"):
        NetworkZooConfig(seeds=4)


def test_faults_are_told_before_training(spec, tmp_path):
    build_network_zoo(
        [spec], tmp_path / "zoo", NetworkZooConfig("small", seeds=1, held_out=0, keep=1, group=1), progress=False
    )
    with pytest.raises(ValueError, match="was started with `.*` = .*, now .* is asked for"):
        build_network_zoo([spec], tmp_path / "zoo", CONFIG, progress=False)
    with pytest.raises(ValueError, match="`keep` must be 1 to 3 epochs, got 4"):
        build_network_zoo([spec], tmp_path / "new", NetworkZooConfig(epochs=3, keep=4), progress=False)
    other = write(tmp_path / "other", train=images(30, 1), test=images(9, 2))
    with pytest.raises(ValueError, match="'other' has no protocol; there are .*'mnist'"):
        build_network_zoo([other], tmp_path / "new", CONFIG, progress=False)
    with pytest.raises(ValueError, match="`protocol` must be one of .*'short', 'published'.*got 'long'"):
        build_network_zoo([spec], tmp_path / "new", NetworkZooConfig(protocol="long"), progress=False)
    assert not (tmp_path / "new").exists()

"""A fine-tuning run as a zoo: rows are what the run passed through, and tell that they are no independent networks."""

import pytest
import torch
from safetensors.torch import save_file

from hf_weightgen.targets import architectures
from hf_weightgen.targets.architectures import HEAD, TargetModel, architecture, resnet
from hf_weightgen.targets.stacked import stack
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import predict_networks, predict_one_by_one
from hf_weightgen.zoo.recipe import seed_of
from hf_weightgen.zoo.schema import row_to_state_dict
from hf_weightgen.zoo.trajectory import (
    TrajectoryConfig,
    build_trajectory_zoo,
    draw_batches,
    fine_tune,
    read_network,
    trained_names,
)
from pictures import images, write
from tiny import random


CONFIG = TrajectoryConfig(
    "small",
    burn_in=3,
    checkpoints=5,
    every=2,
    held_out=2,
    lr=1e-2,
    batch_size=16,
    mean=(0.5,),
    std=(0.25,),
    score_every=2,
)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Dark and light images, and the checkpoint of a ResNet-8 with the names of another library."""
    monkeypatch.setitem(architectures.NAMED, "small", (resnet(8), "relu", 8))
    pictures = [p.point(lambda v, i=i: v // 2 + 128 * (i % 2)) for i, p in enumerate(images(96, 0))]
    spec = write(tmp_path / "task", train=pictures[:80], test=pictures[80:])
    torch.manual_seed(0)
    weights = TargetModel(architecture("small", 2, 1)).state_dict()
    there = {n.replace("head.", "linear."): t for n, t in weights.items() if not n.endswith("num_batches_tracked")}
    save_file(there, tmp_path / "resnet8.safetensors")
    return spec, tmp_path / "resnet8.safetensors", weights


def build(task, folder, **settings):
    config = TrajectoryConfig(**{**vars(CONFIG), **settings})
    build_trajectory_zoo(task[0], task[1], folder, config, progress=False)
    return load_zoo(folder)


def test_rows_are_the_steps_of_one_run(task, tmp_path):
    zoo = build(task, tmp_path / "zoo")
    spec, path, weights = task
    assert list(zoo["split"]) == ["base"] + ["train"] * 3 + ["held_out"] * 2
    assert list(zoo["checkpoint"]) == [None, 0, 1, 2, 3, 4]
    assert all(torch.equal(row_to_state_dict(zoo[0])[name], tensor) for name, tensor in weights.items())
    data, target = load_images([spec])["task"], architecture("small", 2, 1)
    data.mean, data.std = CONFIG.mean, CONFIG.std
    plain = TargetModel(target).train()
    plain.load_state_dict(weights)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2, momentum=0.9)
    batches = draw_batches(data, data.train, 13, 16, random(seed_of(0, "task", "small")))
    for step, (inputs, labels) in enumerate(batches, start=1):
        optimizer.zero_grad()
        plain(inputs, labels).loss.backward()
        optimizer.step()
        if step > 3 and (step - 3) % 2 == 0:
            row = zoo[(step - 3) // 2]
            assert row["provenance"]["step"] == step and row["epoch"] == step * 16 / len(data.train)
            for name, tensor in row_to_state_dict(row).items():
                torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-3, atol=1e-4)
    for row in zoo:
        assert row["provenance"]["single_trajectory"] and row["provenance"]["start"]["checkpoint"] == path.name
        measured = row["checkpoint"] is None or row["checkpoint"] % 2 == 0
        assert (row["metrics"]["test"] is not None) == measured
        if measured:
            right = predict_one_by_one(target, [row_to_state_dict(row)], data.inputs(data.test)) == data.test.labels
            assert row["metrics"]["test"] == right.double().mean().item()


def test_only_normalisation_layers_move_and_rows_hold_them_and_the_head(task, tmp_path):
    zoo, weights = build(task, tmp_path / "zoo", tensors="norms"), task[2]
    first, last = (row_to_state_dict(zoo[i]) for i in (1, 5))
    norms = set(trained_names(architecture("small", 2, 1), "norms"))
    assert first.keys() == norms | set(HEAD) and "layer3.0.bn2.running_var" in norms and "conv1.weight" not in norms
    assert all(torch.equal(last[name], weights[name]) for name in HEAD)
    assert all(not torch.equal(first[name], last[name]) for name in norms)


def test_fixed_layers_keep_their_statistics(task):
    config, weights = architecture("small", 2, 1), task[2]
    names = trained_names(config, r"^layer3\.0\.bn2\.")
    batches = [(torch.randn(8, 1, 8, 8, generator=random(i)), torch.arange(8) % 2) for i in range(3)]
    *_, tuned = fine_tune(config, weights, batches, names, lr=0.1)
    assert {name for name, tensor in weights.items() if not torch.equal(tuned[name], tensor)} == set(names)


@pytest.mark.parametrize("bf16", [False, True])
def test_steps_learn(bf16):
    config = architecture("resnet8", 2, input_shape=[3, 8, 8])
    torch.manual_seed(0)
    weights = TargetModel(config).state_dict()
    labels = torch.arange(16) % 2
    inputs = torch.randn(16, 3, 8, 8, generator=random(1)) + 2 * labels[:, None, None, None]
    before = {name: tensor.clone() for name, tensor in weights.items()}
    *_, tuned = fine_tune(config, weights, [(inputs, labels)] * 30, lr=0.05, bf16=bf16)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert (predict_one_by_one(config, [tuned], inputs) == labels).double().mean() == 1


@pytest.mark.parametrize(("name", "shape"), [("resnet8", [3, 8, 8]), ("tiny-cnn", [1, 28, 28])])
def test_one_by_one_predicts_what_all_at_once_predict(name, shape):
    config = architecture(name, 5, input_shape=shape)
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(TargetModel(config).state_dict())
    inputs = torch.randn(30, *shape, generator=random(0))
    found = predict_one_by_one(config, networks, inputs, chunk=7)
    assert torch.equal(found, predict_networks(config, stack(networks), inputs))
    assert torch.equal(found, predict_networks(config, stack(networks), inputs, chunk=9, at_once=2))


def test_a_zoo_that_is_there_is_left_and_other_settings_are_refused(task, tmp_path):
    first = build(task, tmp_path / "zoo")
    shard = next((tmp_path / "zoo" / "data").iterdir())
    before = shard.stat().st_mtime_ns
    assert build(task, tmp_path / "zoo")["id"][:] == first["id"][:] and shard.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was started with `lr` = 0.01, now 0.1 is asked for"):
        build(task, tmp_path / "zoo", lr=0.1)


def test_faults_are_told_before_training(task, tmp_path):
    spec, path, weights = task
    config = architecture("small", 2, 1)
    with pytest.raises(FileNotFoundError, match="No checkpoint at .*nothing"):
        read_network(tmp_path / "nothing.safetensors", config)
    (tmp_path / "resnet.th").write_bytes(b"\x80\x02}q\x00")
    with pytest.raises(ValueError, match="no whole safetensors file .*; pickles are not read"):
        read_network(tmp_path / "resnet.th", config)
    with pytest.raises(ValueError, match="'head.weight' should have the shape \\(3, 64\\), there is \\(2, 64\\)"):
        read_network(path, architecture("small", 3, 1))
    with pytest.raises(ValueError, match="'head.weight' .* no such tensor"):
        read_network(path, config, renamed={})
    save_file({**weights, "extra.weight": torch.zeros(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(ValueError, match="has no tensor 'extra.weight'"):
        read_network(tmp_path / "extra.safetensors", config)
    with pytest.raises(ValueError, match="'xyz' matches no tensor; there are \\['conv1.weight'"):
        trained_names(config, "xyz")
    with pytest.raises(ValueError, match="`checkpoints` > `held_out`"):
        TrajectoryConfig(checkpoints=5, held_out=5)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        TrajectoryConfig(every=0)
    data = load_images([spec])["task"]
    with pytest.raises(ValueError, match="A batch of 99 images needs as many, got"):
        next(draw_batches(data, data.train, 1, 99, random(0)))

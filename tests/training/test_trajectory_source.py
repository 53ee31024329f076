"""A trajectory as a source: rows that are parts of networks are scored as whole ones."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hf_weightgen.targets import architectures, tasks
from hf_weightgen.targets.architectures import TargetModel, architecture, resnet
from hf_weightgen.targets.image_encoders import load_image_encoder
from hf_weightgen.targets.symmetry import BUFFERS
from hf_weightgen.training import network_source as network_source_module
from hf_weightgen.training.batches import StepRandom
from hf_weightgen.training.network_source import network_source
from hf_weightgen.zoo import build_networks
from hf_weightgen.zoo.build_networks import NetworkZooConfig, build_network_zoo
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.schema import row_to_state_dict
from hf_weightgen.zoo.trajectory import TrajectoryConfig, build_trajectory_zoo
from pictures import image_encoder, images, write
from run_network_zoo import PROTOCOL, SMALL


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Dark and light images, the configuration of a ResNet-8, and a checkpoint of it in `tmp_path`."""
    monkeypatch.setitem(architectures.NAMED, "small", (resnet(8), "relu", 8))
    pictures = [p.point(lambda v, i=i: v // 2 + 100 * (i % 2)) for i, p in enumerate(images(60, 0))]
    spec = write(tmp_path / "task", train=pictures[:44], test=pictures[44:])
    spec = replace(spec, prompts=("is the image dark or light", "brightness of an image"))
    monkeypatch.setitem(tasks.IMAGE_TASKS, "task", spec)
    config = architecture("small", 2, 1)
    torch.manual_seed(0)
    save_file(TargetModel(config).state_dict(), tmp_path / "start.safetensors")
    return spec, config


def build(spec, tmp_path, tensors: str) -> str:
    settings = TrajectoryConfig(
        "small", tensors, burn_in=2, checkpoints=5, every=1, held_out=2, lr=0.05, batch_size=8, mean=(0.4,), std=(0.2,)
    )
    build_trajectory_zoo(spec, tmp_path / "start.safetensors", tmp_path / "zoo", settings, progress=False)
    return str(tmp_path / "zoo")


@pytest.mark.parametrize("tensors", ["norms", "all"])
def test_parts_of_networks_are_scored_with_the_rest_of_the_base(encoder, tmp_path, task, tensors):
    spec, config = task
    source = network_source(
        encoder, load_image_encoder(str(image_encoder(tmp_path))), [build(spec, tmp_path, tensors)], None
    )

    assert (len(source.train), len(source.held_out)) == (3, 1)
    assert source.runs == [[0, 1, 2]]  # rows of one run: it has no independent ones
    assert source.task_loss is None and source.task_steps == 0 and source.vae_settings["kl_weight"] < 1e-3
    zoo, data = load_zoo(tmp_path / "zoo"), replace(load_images([spec])["task"], mean=(0.4,), std=(0.2,))
    originals = [row_to_state_dict(row) for row in zoo][:4]
    statistics = [name for name in originals[1] if name.endswith(BUFFERS)]
    means = {name: torch.stack([row[name].float() for row in originals[1:]]).mean(0) for name in statistics}
    for original, state_dict in zip(originals[1:], source.members("task"), strict=True):
        assert state_dict.keys() == original.keys() - set(statistics)
        model = TargetModel(config).eval()
        model.load_state_dict(originals[0] | original | means)
        right = model(data.inputs(data.test)).logits.argmax(-1) == data.test.labels
        assert source.score([state_dict], "task").item() == right.double().mean().item()


def test_beside_a_trajectory_independent_networks_are_asked_what_they_do(encoder, tmp_path, task, monkeypatch):
    spec, _ = task
    monkeypatch.setitem(architectures.NAMED, "other", SMALL)
    monkeypatch.setitem(build_networks.SHORT, "task", PROTOCOL)
    settings = NetworkZooConfig(architecture="other", seeds=3, held_out=1, keep=1, group=3)
    small = str(build_network_zoo([spec], tmp_path / "small", settings, progress=False).path)
    zoos = [build(spec, tmp_path, "norms"), small]
    source = network_source(encoder, load_image_encoder(str(image_encoder(tmp_path))), zoos, None)
    train = source.train
    assert train.tasks == ["task (small)", "task (other)"]
    assert source.task_reconstruction == [1.0, 0.1] and source.task_steps > 0
    index = torch.tensor([0, len(train) - 1])
    tokens = train.weight_tokens[index].clone().requires_grad_()
    source.task_loss(tokens, None, index, StepRandom(0, 0, 2, slice(None))).backward()
    assert not tokens.grad[0].any() and tokens.grad[1].any()
    config, seen = source.targets[0]["config"], []
    monkeypatch.setattr(network_source_module, "TEST_IMAGES", 5)
    one_by_one = network_source_module.predict_one_by_one
    monkeypatch.setattr(
        network_source_module,
        "predict_one_by_one",
        lambda config, *given: seen.append([layer["kind"] for layer in config.layers]) or one_by_one(config, *given),
    )
    source = network_source(encoder, load_image_encoder(str(image_encoder(tmp_path))), zoos, None)
    assert source.majority["task (small)"][1] == 5 and source.majority["task (other)"][1] == 16
    source.score(source.members("task (small)"), "task (small)")
    assert seen == [[layer["kind"] for layer in config["layers"]]]
    alone = network_source(encoder, load_image_encoder(str(image_encoder(tmp_path))), [small], None)
    for name in ("score", "validate"):  # on all images, and by the same means as without the trajectory
        scores = [
            getattr(one, name)(one.members(task), task).tolist()
            for one, task in ((source, "task (other)"), (alone, "task"))
        ]
        assert scores[0] == scores[1]
    assert len(seen) == 1

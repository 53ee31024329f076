"""Labelled sets as features: what is drawn from them, what is kept on disk, and a zoo of heads on them."""

import json

import pytest
import torch
import torch.nn.functional as F

import pictures
from hf_weightgen.targets.image_encoders import load_image_encoder
from hf_weightgen.targets.tasks import TaskSpec
from hf_weightgen.zoo import features
from hf_weightgen.zoo.features import FeatureSet, draw_task, embed_sets, spec_of
from hf_weightgen.zoo.folder import load_zoo
from hf_weightgen.zoo.heads import HeadZooConfig, build_head_zoo
from hf_weightgen.zoo.schema import zoo_state_dicts
from tiny import random


def clusters(name: str = "animals", classes: int = 6, pool: int = 12, seed: int = 0) -> FeatureSet:
    """Classes around centres of their own; the last one has two examples fewer."""
    generator = random(seed)
    centres = torch.randn(classes, 1, 8, generator=generator)
    points = F.normalize(centres + 0.3 * torch.randn(classes, pool, 8, generator=generator), dim=-1)
    counts = torch.full((classes,), pool)
    counts[-1] -= 2
    points[-1, -2:] = 0
    return FeatureSet(name, points, counts, tuple(f"{name} {c}" for c in range(classes)))


def test_examples_and_queries_of_a_task_are_different_and_real():
    one = clusters()
    for seed in range(20):
        task = draw_task(one, ways=4, shots=3, queries=6, generator=random(seed))
        assert task.support.shape == (4, 3, 8) and task.queries.shape == (4, 6, 8) and len(set(task.classes)) == 4
        rows = torch.cat([task.support, task.queries], 1)
        for label, own in zip(task.classes, rows, strict=True):
            assert len(own.unique(dim=0)) == 9 and own.norm(dim=-1).min() > 0.9
            known = one.features[one.classes.index(label)]
            assert (own[:, None] == known).all(-1).any(1).all()
    with pytest.raises(ValueError, match="'animals' has 6 classes, of which one has 10 examples"):
        draw_task(one, ways=5, shots=5, queries=6, generator=random(0))


def test_sets_are_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "FEWEST", 5)
    spec = pictures.write(tmp_path / "shades", train=pictures.images(60, 0), test=pictures.images(20, 1))
    encoder = load_image_encoder(pictures.image_encoder(tmp_path))
    one = embed_sets([spec], encoder, cache=tmp_path / "cache", per_class=9, turns=True)["shades"]
    assert len(one) == 8 and one.classes[:3] == ("dark", "light", "dark, turned by 90 degrees")
    assert one.features.shape[:2] == (8, 9) and one.counts.tolist() == [9] * 8
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 4
    encoder.embed = None  # would fail if it was asked
    again = embed_sets([spec], encoder, cache=tmp_path / "cache", per_class=9, turns=True)["shades"]
    assert torch.equal(again.features, one.features)
    with pytest.raises(ValueError, match="fewer than two classes with 500 examples"):
        monkeypatch.setattr(features, "FEWEST", 500)
        embed_sets([spec], encoder, cache=tmp_path / "cache")


def test_a_dataset_says_itself_what_it_is(tmp_path):
    pictures.write(tmp_path / "shades-2", train=pictures.images(4, 0), test=pictures.images(4, 1))
    found = spec_of(str(tmp_path / "shades-2"))
    assert (found.name, found.labels, found.image_column, found.test_split) == (
        "shades_2",
        ("dark", "light"),
        "image",
        "test",
    )
    assert isinstance(found, TaskSpec) and spec_of("shades-2", tmp_path).labels == ("dark", "light")


def test_a_zoo_of_heads_continues_and_works(tmp_path):
    sets = {name: clusters(name, seed=seed, pool=30) for seed, name in enumerate(("animals", "plants"))}
    config = HeadZooConfig(tuple(sets), tasks=12, ways=(2, 5), group=4, examples=8, tests=4, steps=20)
    build_head_zoo(sets, tmp_path, config, progress=False)
    rows = load_zoo(str(tmp_path))
    assert sorted(len(labels) for labels in rows["labels"]) == [2] * 8 + [5] * 4
    assert sum(m["validation"] for m in rows["metrics"]) / 12 > 0.8  # chance is 0.4
    assert list(rows["split"]).count("held_out") == 1
    for labels, head, arch in zip(rows["labels"], zoo_state_dicts(rows, range(12)), rows["arch"], strict=True):
        assert head["head.weight"].shape == (len(labels), 8) and arch["name"] == "head"
    shards = sorted((tmp_path / "data").iterdir())
    before = shards[1].read_bytes()
    shards[1].unlink()
    build_head_zoo(sets, tmp_path, config, progress=False)
    assert shards[1].read_bytes() == before
    others = sets | {"plants": clusters("plants", seed=2, pool=30)}
    with pytest.raises(ValueError, match="started with `contents` = "):
        build_head_zoo(others, tmp_path, config, progress=False)
    with pytest.raises(ValueError, match="`tasks` = 12, now 13"):
        build_head_zoo(
            sets, tmp_path, HeadZooConfig(**json.loads(json.dumps(config.__dict__)) | {"tasks": 13}), progress=False
        )

"""The table of networks: all rows on real networks, and what each of them must show."""

import pytest
import torch

from hf_weightgen.evaluation.network_table import METHODS, network_table
from hf_weightgen.evaluation.table import format_table
from hf_weightgen.targets.architectures import TargetConfig, mlp
from hf_weightgen.targets.stacked import unstack
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import initial, train_networks
from pictures import images, write
from tiny import random


CONFIG = TargetConfig(input_shape=[1, 8, 8], layers=mlp(6), num_classes=2, activation="tanh")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Dark and light images."""
    pictures = [
        p.point(lambda v: v // 2) if i % 2 == 0 else p.point(lambda v: 128 + v // 2)
        for i, p in enumerate(images(120, 0))
    ]
    spec = write(tmp_path_factory.mktemp("data") / "task", train=pictures[:80], test=pictures[80:])
    return load_images([spec])["task"]


@pytest.fixture(scope="module")
def zoo(data):
    params = initial(CONFIG, list(range(8)))
    training = train_networks(
        CONFIG, params, data.inputs(data.train), data.train.labels, lambda p: torch.optim.Adam(p, lr=1e-2), epochs=10, batch_size=16,
        generator=random(0),
    )  # fmt: skip
    *_, trained = training
    return [unstack(trained, k) for k in range(8)]


@pytest.fixture(scope="module")
def rows(data, zoo):
    asked = []

    def generate(method: str, count: int, seed: int) -> list[dict]:
        asked.append((method, count, seed))
        if method == "generated_mismatched":
            return []
        draw = random(seed)
        made = [
            {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in zoo[i % 6].items()} for i in range(count)
        ]
        if method == "generated_shuffled":
            made = [m | {"head.weight": m["head.weight"].flip(0), "head.bias": m["head.bias"].flip(0)} for m in made]
        return made

    table = network_table(
        generate, CONFIG, data, zoo[:6], zoo[6:], member_seeds=list(range(6)), reconstruct=lambda many: many, n=10, baseline_n=4, seed=3,
        baseline_effort=0.05, predict_accuracies=lambda many: torch.tensor([-sample["head.weight"].norm() for sample in many]),
    )  # fmt: skip
    return {row["method"]: row for row in table}, asked, table


def test_all_rows_are_there_and_told(rows):
    by_name, asked, table = rows
    assert tuple(by_name) == METHODS
    assert [(method, count) for method, count, _ in asked] == [
        ("generated", 10), ("generated_from_prompts", 4), ("generated_shuffled", 4), ("generated_mismatched", 4),
    ]  # fmt: skip
    assert len({seed for _, _, seed in asked}) == 4
    assert (
        by_name["generated_mismatched"]["mean"] is None
        and "no such condition" in by_name["generated_mismatched"]["note"]
    )
    text = format_table(table)
    assert "(p_diff)" in text.split("CPU seconds: ")[1].splitlines()[0]
    assert all(method in text for method in METHODS)


def test_rows_are_what_they_say(rows):
    by_name, _, _ = rows
    assert by_name["zoo"]["mean"] > 90 and by_name["zoo"]["counted"] and by_name["zoo_held_out"]["n"] == 2
    assert by_name["generated"]["mean"] > 85 and by_name["generated"]["best_of"] == 10
    assert by_name["generated_shuffled"]["mean"] < 20  # labels the other way round
    assert by_name["generated_shuffled"]["expected"] == 50
    assert by_name["reconstruction"]["loss"]["mean"] == 0
    assert by_name["random_init"]["mean"] < 80 and by_name["majority"]["mean"] == pytest.approx(50, abs=6)
    lengths = [by_name[name]["novelty_l2"] for name in ("noise_0.05", "noise_0.15")]
    assert by_name["p_diff"]["cpu_seconds"] > by_name["kde"]["cpu_seconds"] > 0 and by_name["p_diff"]["n"] == 4
    assert lengths[0] < lengths[1] and by_name["zoo"]["novelty_l2"] > 0
    assert by_name["noise_at_distance"]["novelty_l2"] == pytest.approx(by_name["generated"]["novelty_l2"], rel=0.1)


def test_the_sample_that_the_predictor_prefers_is_a_row(data, zoo, rows):
    def worse_and_worse(method: str, count: int, seed: int) -> list[dict]:
        draw = random(seed)
        return [{n: t + i * torch.randn(t.shape, generator=draw) for n, t in zoo[0].items()} for i in range(count)]

    def predict(many) -> torch.Tensor:
        return torch.tensor([-sum((s[n] - t).square().sum() for n, t in zoo[0].items()) for s in many])

    table = network_table(
        worse_and_worse, CONFIG, data, zoo[:3], n=6, baseline_n=2, baseline_effort=0.01, predict_accuracies=predict
    )
    by_name = {row["method"]: row for row in table}
    row = by_name["generated_by_predictor"]
    assert (row["n"], row["best_of"]) == (1, 6) and row["mean"] > by_name["generated"]["mean"]
    assert 0 < row["rank_correlation"] <= 1
    assert "generated_by_predictor: the best of 6 by predicted accuracy" in format_table(table)
    equal, _, same = rows  # all samples are right everywhere: there is no order to tell
    assert equal["generated_by_predictor"]["best_of"] == 10 and "nan" not in format_table(same)


def test_a_row_is_the_same_whatever_others_are_asked_for(data, zoo):
    def noisy(method: str, count: int, seed: int) -> list[dict]:
        draw = random(seed)
        return [{n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in zoo[i].items()} for i in range(count)]

    few, more = (
        network_table(noisy, CONFIG, data, zoo[:3], zoo[3:5], n=2, baseline_n=2, methods=methods)
        for methods in (("generated", "zoo_average"), ("random_init", "zoo", "zoo_average", "generated"))
    )
    assert [row["method"] for row in few] == ["zoo_average", "generated"]
    kept = [{**row, "cpu_seconds": None} for row in more if row["method"] in ("zoo_average", "generated")]
    assert [{**row, "cpu_seconds": None} for row in few] == kept
    assert few[1]["difference"]["ci95"] and few[1]["difference_held_out"]["ci95"]


def test_distances_do_not_see_what_leaves_the_function_as_it_is(data, zoo):
    def permuted(method: str, count: int, seed: int) -> list[dict]:
        perm = torch.randperm(6, generator=random(seed))
        moved = {n: t[perm] if n.startswith("hidden") else t for n, t in zoo[0].items()}
        # and the softmax does not see what is added to all classes
        return [
            moved | {"head.weight": moved["head.weight"][:, perm] + 0.7, "head.bias": moved["head.bias"] - 2}
        ] * count

    table = network_table(permuted, CONFIG, data, zoo[:3], n=2, baseline_n=2, baseline_effort=0.01)
    by_name = {row["method"]: row for row in table}
    assert by_name["generated"]["novelty_l2"] < 1e-5
    assert "no accuracy predictor" in by_name["generated_by_predictor"]["note"]

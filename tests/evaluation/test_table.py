"""The honest table on a small real classifier over bags of words: what each row must come out as."""

import json

import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Value

from hf_weightgen.evaluation.accuracy import PredictionCache
from hf_weightgen.evaluation.novelty import flatten, nearest
from hf_weightgen.evaluation.table import METHODS, format_table, honest_table, write_results
from hf_weightgen.targets.functional import BIAS, WEIGHT
from hf_weightgen.targets.tasks import TaskSpec
from hf_weightgen.zoo.tasks import TaskData


QUERY = "base_model.model.bert.encoder.layer.4.attention.self.query"
A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
SIZE = 32
PLAIN = [f"word{i}" for i in range(60)]


class WordEncoder:
    """Embeds a text as the normalised sum of one fixed vector per word."""

    def __init__(self):
        words = ["bad", "good", "film", "review", "news", "sort", "topics", *PLAIN]
        vectors = torch.randn(len(words), SIZE, generator=torch.Generator().manual_seed(3))
        self.vectors = dict(zip(words, vectors, strict=True))

    def embed(self, texts: list[str]) -> torch.Tensor:
        return F.normalize(torch.stack([sum(self.vectors[word] for word in text.split()) for text in texts]), dim=-1)


ENCODER = WordEncoder()


def predict(state_dicts, dataset) -> torch.Tensor:
    """A linear classifier on embeddings that an adapter changes: W (x + B A x) + b."""
    x = ENCODER.embed(dataset["text"])
    return torch.stack([((x + x @ sd[A].T @ sd[B].T) @ sd[WEIGHT].T + sd[BIAS]).argmax(-1) for sd in state_dicts])


def rows(seed: int, count: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) < 0.6).long().tolist()
    texts = [
        " ".join([["bad", "good"][label], *(PLAIN[i] for i in torch.randint(60, (8,), generator=generator))])
        for label in labels
    ]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


def data(metric: str = "accuracy", **changes) -> TaskData:
    fields = {"prompts": ("film review", "review"), "held_out_prompts": ("film", "review film")} | changes
    spec = TaskSpec("films", "tiny/films", "label", ("bad", "good"), ("text",), family="film", metric=metric, **fields)
    return TaskData(spec, rows(0, 80), rows(1, 60), rows(2, 150), 0, "content:0")


def adapter(labels, seed: int, noise: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = ENCODER.embed(list(labels))
    return {
        A: torch.randn(2, SIZE, generator=generator) / SIZE**0.5,
        B: noise * torch.randn(SIZE, 2, generator=generator),
        WEIGHT: head + noise * torch.randn(head.shape, generator=generator),
        BIAS: torch.zeros(len(labels)),
    }


def generate(prompt, labels, n, seed) -> list[dict[str, torch.Tensor]]:
    """Heeds prompt and labels: what it knows nothing of gets a random head."""
    made = [adapter(labels, seed + i) for i in range(n)]
    if "news" in prompt:
        for i, sd in enumerate(made):
            sd[WEIGHT] = torch.randn(sd[WEIGHT].shape, generator=torch.Generator().manual_seed(seed + i))
    return made


MEMBERS = [adapter(["bad", "good"], 10_000 + i) for i in range(12)]
SEEDS = [i // 2 for i in range(12)]
HELD_OUT = [adapter(["bad", "good"], 20_000 + i) for i in range(2)]
KNOWN = [
    {"name": "films", "labels": ["bad", "good"], "prompts": ["film review"]},
    {"name": "topics", "labels": ["news", "sort", "good"], "prompts": ["sort topics", "news"]},
]


def table(generator=generate, of=None, **changes) -> dict[str, dict]:
    arguments = {
        "members": MEMBERS,
        "held_out": HELD_OUT,
        "start": adapter(["bad", "good"], 5, 0.5),
        "member_seeds": SEEDS,
        "encoder": ENCODER,
        "known_tasks": KNOWN,
        "mismatched_prompts": ["news", "sort news", "news topics"],
        "reconstruct": lambda originals: [{k: v * 1.001 for k, v in sd.items()} for sd in originals],
        "n": 8,
    }
    made = honest_table(generator, predict, of or data(), **{**arguments, **changes})
    assert [row["method"] for row in made] == list(METHODS)
    return {row["method"]: row for row in made}


@pytest.fixture(scope="module")
def full() -> dict[str, dict]:
    return table()


def test_every_row_has_every_column(full):
    keys = "task method metric mean std median max ci95 best n novelty_l2 novelty_iou stored test_rows".split()
    for row in full.values():
        assert set(keys) <= row.keys()
        assert row["n"] >= 1 and not row["stored"] and row["test_rows"] == 150
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]
    assert full["generated"]["n"] == full["gaussian"]["n"] == full["lookup"]["n"] == 8
    assert full["zoo"]["n"] == 12 and full["zoo"]["best_of"] == full["generated"]["best_of"] == 8
    json.dumps(list(full.values()), allow_nan=False)


def test_the_figures_are_what_they_should_be(full):
    labels = torch.tensor(data().test["label"])
    assert full["majority"]["mean"] == pytest.approx(100 * labels.double().mean().item())
    own = [100 * (p == labels).double().mean().item() for p in predict(MEMBERS, data().test)]
    assert full["zoo"]["mean"] == pytest.approx(sum(own) / 12)
    assert full["zoo"]["counted"] is True
    assert full["zoo"]["max"] == pytest.approx(max(own))
    cosine = (ENCODER.embed(data().test["text"]) @ ENCODER.embed(["bad", "good"]).T).argmax(1)
    assert full["cosine_label_names"]["mean"] == pytest.approx(100 * (cosine == labels).double().mean().item())
    assert full["lookup"]["found"] == ["films"]
    assert full["lookup"]["novelty_l2"] == 0 and full["lookup"]["novelty_iou"] == 1
    assert full["reconstruction"]["loss"]["max"] < 1 and full["reconstruction"]["n"] == 2


def test_the_difference_is_that_of_the_means(full):
    row = full["generated"]
    for key, other in (("difference", "zoo"), ("difference_held_out", "zoo_held_out")):
        assert row[key]["mean"] == pytest.approx(row["mean"] - full[other]["mean"])
        low, high = row[key]["ci95"]
        assert low < row[key]["mean"] < high


def test_the_controls_come_out_as_expected_for_a_generator_that_heeds_its_condition(full):
    swapped, mismatched = full["generated_swapped"], full["generated_mismatched"]
    assert swapped["expected"] == pytest.approx(100 - full["generated"]["mean"])
    assert swapped["mean"] == pytest.approx(swapped["expected"], abs=3)
    assert mismatched["metric"] == "balanced_accuracy" and mismatched["expected"] == 50
    assert abs(mismatched["mean"] - 50) < 15 < full["generated"]["mean"] - 50


def test_a_generator_that_ignores_its_condition_is_seen():
    def deaf(prompt, labels, n, seed):
        return [adapter(["bad", "good"], seed + i) for i in range(n)]

    made = table(deaf)
    assert made["generated_mismatched"]["mean"] > made["generated_mismatched"]["expected"] + 20
    assert made["generated_swapped"]["mean"] > made["generated_swapped"]["expected"] + 20


def test_a_perfect_replay_is_reported_as_one():
    def replay(prompt, labels, n, seed):
        return [dict(MEMBERS[(seed + i) % 12]) for i in range(n)]

    made = table(replay)
    assert made["generated"]["novelty_l2"] == 0
    assert made["generated"]["novelty_iou"] == 1
    assert made["noise_at_distance"]["novelty_l2"] == pytest.approx(0, abs=1e-6)
    assert made["zoo"]["novelty_l2"] > 0


def test_noise_stands_at_the_distance_of_the_generated(full):
    assert full["noise_at_distance"]["novelty_l2"] == pytest.approx(full["generated"]["novelty_l2"], rel=0.05)
    assert full["noise_0.05"]["novelty_l2"] < full["noise_0.15"]["novelty_l2"]
    assert full["zoo"]["novelty_l2"] <= full["zoo"]["novelty_l2_other_runs"]


def test_novelty_uses_the_gauge_of_the_reference():
    reference = MEMBERS[0]
    made = table(reference=reference)
    ask = data().spec.prompts
    generated = []

    def record(prompt, labels, n, seed):
        new = generate(prompt, labels, n, seed)
        if list(labels) == ["bad", "good"] and prompt in ask:
            generated.extend(new)
        return new

    table(record, reference=reference, mismatched_prompts=())
    distances = nearest(flatten(generated[:8], reference), flatten(MEMBERS, reference))
    assert made["generated"]["novelty_l2"] == pytest.approx(distances.quantile(0.5).item())


def test_the_same_seed_gives_the_same_table_and_rows_do_not_depend_on_each_other(full):
    assert table() == full
    other = table(seed=1)
    assert (
        other["gaussian"]["mean"] != full["gaussian"]["mean"] or other["gaussian"]["ci95"] != full["gaussian"]["ci95"]
    )
    fewer = table(mismatched_prompts=(), reconstruct=None)
    assert fewer["noise_0.15"] == full["noise_0.15"] and fewer["generated"] == full["generated"]


def test_best_is_selected_on_validation_and_never_on_test():
    best_on_test, best_on_validation = adapter(["bad", "good"], 1, 0.0), adapter(["bad", "good"], 2, 0.0)

    def by_split(state_dicts, dataset):
        """The first network is right on test alone, the second on validation alone."""
        labels = torch.tensor(dataset["label"])
        first_is_right = len(dataset) == 150
        return torch.stack(
            [labels if torch.equal(sd[A], best_on_test[A]) == first_is_right else 1 - labels for sd in state_dicts]
        )

    made = honest_table(
        lambda prompt, labels, n, seed: [best_on_test, best_on_validation][:n],
        by_split,
        data(held_out_prompts=(), prompts=("film",)),
        n=2,
    )
    row = next(row for row in made if row["method"] == "generated")
    assert (row["max"], row["best"], row["best_of"]) == (100, 0, 2)


def test_rows_that_cannot_be_computed_say_so_or_come_from_the_store(full):
    bare = {"members": (), "held_out": (), "start": None, "member_seeds": None, "reconstruct": None, "encoder": None}
    made = table(**bare)
    for method in (
        "zoo",
        "zoo_start",
        "lookup",
        "zoo_average",
        "noise_at_distance",
        "reconstruction",
        "cosine_label_names",
    ):
        assert made[method]["mean"] is None and made[method]["n"] == 0 and made[method]["note"]
    assert made["generated"]["mean"] == full["generated"]["mean"] and "difference" not in made["generated"]
    assert made["generated"]["novelty_l2"] is None
    assert made["random_init"]["n"] == 8

    stored = table(**bare, stored_rows=list(full.values()))
    assert stored["zoo"] == {**full["zoo"], "stored": True}
    assert not stored["generated"]["stored"]
    assert stored["generated"]["difference"]["mean"] == pytest.approx(full["generated"]["difference"]["mean"])
    assert stored["generated"]["difference"]["ci95"] is None
    foreign = [{**row, "task": "other"} for row in full.values()]
    assert table(**bare, stored_rows=foreign)["zoo"]["mean"] is None


def test_the_look_up_of_an_unseen_task_borrows_head_rows():
    topics = [adapter(["news", "sort", "good"], 30_000 + i) for i in range(3)]
    arguments = {"members": (), "held_out": (), "member_seeds": None, "known_tasks": KNOWN[1:]}
    made = table(**arguments, lookup_members={"topics": topics})
    assert made["lookup"]["n"] == 8 and made["lookup"]["found"] == ["topics"]
    assert made["zoo_average"]["n"] == 1 and made["zoo_average"]["found"] == ["topics"]
    assert "topics" in table(**arguments)["lookup"]["note"]


def test_matthews_correlation_and_three_classes():
    made = table(of=data("matthews_correlation"))
    assert made["generated"]["metric"] == "matthews_correlation" and made["generated_swapped"]["metric"] == "accuracy"
    assert made["majority"]["mean"] == 0 and made["zoo"]["mean"] > 50
    low, high = made["generated"]["difference"]["ci95"]
    assert low < made["generated"]["difference"]["mean"] < high
    spec = TaskSpec("topics", "tiny/topics", "label", ("bad", "good", "news"), ("text",), prompts=("sort topics",))
    three = TaskData(spec, rows(0, 80), rows(1, 60), rows(2, 150), 0, "content:0")
    made = honest_table(generate, predict, three, n=2)
    assert "2 classes, the task has 3" in next(r["note"] for r in made if r["method"] == "generated_swapped")


def test_what_does_not_fit_is_told_before_any_long_work():
    with pytest.raises(ValueError, match="`n` must be at least 1.*0"):
        table(n=0)
    with pytest.raises(ValueError, match="'films' has no prompt"):
        table(of=data(prompts=()))
    with pytest.raises(ValueError, match="member_seeds.*12, got 1"):
        table(member_seeds=[1])
    with pytest.raises(ValueError, match="expected 4 networks with 2 classes, got 3"):
        table(lambda prompt, labels, n, seed: generate(prompt, labels, 3, seed))
    with pytest.raises(ValueError, match="with 2 classes.*\\[3"):
        table(lambda prompt, labels, n, seed: generate(prompt, ["bad", "good", "news"], n, seed))
    with pytest.raises(ValueError, match="Network 0 of row 'generated' holds NaN.*lora_B"):
        table(lambda *a: [{**sd, B: sd[B] * torch.nan} for sd in generate(*a)], members=(), member_seeds=None)


def test_rows_are_handed_on_as_they_come_and_predictions_are_kept(tmp_path):
    seen, asked = [], []

    def counting(state_dicts, dataset):
        asked.append(len(state_dicts))
        return predict(state_dicts, dataset)

    arguments = {"members": MEMBERS, "n": 3, "cache": PredictionCache(tmp_path)}
    first = honest_table(generate, counting, data(), **arguments, on_row=seen.append)
    assert sorted(row["method"] for row in seen) == sorted(METHODS)
    # nothing is asked twice: the difference and the control reuse what the rows above them needed
    total = sum(asked)
    asked.clear()
    assert honest_table(generate, counting, data(), **arguments) == first
    assert total > 30 and not asked


def test_the_printed_table_is_aligned_and_complete(full):
    stored = {**full["zoo"], "stored": True}
    text = format_table([*full.values(), {**stored, "task": "other"}])
    lines = text.splitlines()
    assert lines[0] == "films" and lines[1].startswith("method")
    body = lines[3 : 3 + len(METHODS)]
    assert [line.split()[0] for line in body] == list(METHODS)
    assert len({line.index("±") for line in body}) == 1 and all(line == line.rstrip() for line in lines)
    assert "generated - zoo: " in text and "95 % interval [" in text and "of 8 (zoo)" not in text.splitlines()[0]
    assert "zoo *" in text and "* stored" in text
    empty = format_table([{**full["zoo"], **dict.fromkeys(["mean", "std", "ci95", "best"]), "note": "none was given"}])
    assert "zoo: none was given" in empty


def test_results_are_written_whole_or_not_at_all(tmp_path, full):
    path = tmp_path / "results" / "table.json"
    write_results(path, "seen", "make table", 0, [*full.values(), {"mean": float("nan"), "ci95": [1.0, float("inf")]}])
    content = json.loads(path.read_text())
    assert list(content) == ["table", "command", "seed", "versions", "rows"]
    assert content["versions"]["torch"] == torch.__version__ and "python" in content["versions"]
    assert content["rows"][0] == full["random_init"]
    assert content["rows"][-1] == {"mean": None, "ci95": [1.0, None]}
    before = path.read_text()
    with pytest.raises(TypeError):
        write_results(path, "seen", "make table", 0, [{"mean": torch.ones(1)}])
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]

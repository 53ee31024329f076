"""Splits and de-duplication on tiny datasets that are written to disk as a user's folders would be."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_weightgen.targets.tasks import TASKS, TaskSpec
from hf_weightgen.zoo.tasks import data_hash, evaluation_subset, load_tasks, lowest_keys, text_key


WORDS = "amber birch cedar delta ember fjord grove heath inlet jetty knoll lagoon marsh notch oasis ridge".split()


def sentences(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=6)) + f" {seed} {i}" for i in range(count)]


def rows_of(texts, labels=(0, 1)):
    return [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)]


def write(root, dataset_id, **splits) -> None:
    """One dataset in the layout of the Hub: `data/<split>-00000-of-00001.parquet`."""
    folder = root / dataset_id / "data"
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def task(name, **changes) -> TaskSpec:
    fields = {
        "name": name,
        "dataset_id": f"tiny/{name}",
        "text_columns": ("text",),
        "label_column": "label",
        "labels": ("no", "yes"),
        "test_split": "test",
    }
    return TaskSpec(**fields | changes)


@pytest.fixture
def load(tmp_path):
    return lambda *specs: load_tasks(specs, data_root=tmp_path, cache=tmp_path / "cache")


def keys(dataset) -> set[bytes]:
    columns = [dataset[name] for name in ("text", "text_pair") if name in dataset.column_names]
    return {text_key(*texts) for texts in zip(*columns, strict=True)}


def test_a_test_sentence_of_another_task_never_trains(tmp_path, load):
    ours, theirs = sentences(0, 100), sentences(1, 100)
    planted = theirs[7].upper().replace(" ", ", ") + "!!"
    write(tmp_path, "tiny/a", train=rows_of([*ours, planted]), test=rows_of(sentences(2, 10)))
    write(tmp_path, "tiny/b", train=rows_of(sentences(3, 100)), test=rows_of(theirs))
    alone = load(task("a"))["a"]
    assert planted in [*alone.train["text"], *alone.validation["text"]]
    assert alone.removed_duplicates == 0
    a = load(task("a"), task("b"))["a"]
    assert planted not in [*a.train["text"], *a.validation["text"]]
    assert a.removed_duplicates == 1
    assert len(a.train) + len(a.validation) == 100


def test_a_validation_sentence_of_another_task_never_trains(tmp_path, load):
    write(tmp_path, "tiny/a", train=rows_of(sentences(0, 100)), test=rows_of(sentences(1, 10)))
    validation = list(load(task("a"))["a"].validation["text"])
    assert len(validation) == 15
    write(tmp_path, "tiny/b", train=rows_of(validation + sentences(2, 20)), test=rows_of(sentences(3, 10)))
    tasks = load(task("a"), task("b"))
    assert not keys(tasks["b"].train) & keys(tasks["a"].validation)
    assert not keys(tasks["a"].train) & keys(tasks["b"].validation)
    assert 15 - 5 <= tasks["b"].removed_duplicates <= 15, "b keeps at most its own 5 validation rows"


def test_own_test_sentences_leave_train_and_validation(tmp_path, load):
    texts = sentences(0, 200)
    write(tmp_path, "tiny/a", train=rows_of(texts), test=rows_of([text.title() for text in texts[::2]]))
    data = load(task("a"))["a"]
    assert data.removed_duplicates == 100
    assert not (keys(data.train) | keys(data.validation)) & keys(data.test)
    assert 0 < len(data.validation) <= 30, "15 % of 200 rows, less those that are also test rows"


def test_which_rows_may_train_does_not_depend_on_the_other_tasks(tmp_path, load):
    write(tmp_path, "tiny/a", train=rows_of(sentences(0, 200)), test=rows_of(sentences(1, 10)))
    write(tmp_path, "tiny/b", train=rows_of(sentences(2, 200)), test=rows_of(sentences(0, 40)))
    alone, together = load(task("a"))["a"], load(task("a"), task("b"))["a"]
    assert keys(together.train) < keys(alone.train)
    assert keys(together.validation) <= keys(alone.validation)


def test_validation_has_at_most_a_thousand_rows(tmp_path, load):
    write(tmp_path, "tiny/a", train=rows_of(sentences(0, 7_000)), test=rows_of(sentences(1, 10)))
    data = load(task("a"))["a"]
    assert (len(data.validation), len(data.train)) == (1_000, 6_000)


def test_without_a_test_split_a_fifth_is_cut(tmp_path, load):
    rows = rows_of(sentences(0, 500))
    write(tmp_path, "tiny/a", train=rows)
    write(tmp_path, "tiny/b", train=rows[::-1])
    a = load(task("a", test_split=None))["a"]
    assert (len(a.test), len(a.validation), len(a.train)) == (100, 60, 340)
    b = load(task("b", test_split=None))["b"]
    assert [keys(s) for s in (a.train, a.validation, a.test)] == [keys(s) for s in (b.train, b.validation, b.test)]


def test_pair_is_a_duplicate_only_as_a_pair(tmp_path, load):
    left, right = sentences(0, 60), sentences(1, 60)
    pairs = [{"one": a, "two": b, "label": i % 2} for i, (a, b) in enumerate(zip(left, right, strict=True))]
    test = [
        {"one": left[0], "two": sentences(2, 1)[0], "label": 0},
        {**pairs[5], "two": right[5] + " ?"},
        {"one": right[6], "two": left[6], "label": 0},
    ]
    write(tmp_path, "tiny/pair", train=pairs, test=test)
    data = load(task("pair", text_columns=("one", "two")))["pair"]
    assert data.train.column_names == ["text", "text_pair", "label"]
    assert data.removed_duplicates == 2
    assert left[0] in [*data.train["text"], *data.validation["text"]]
    assert not {left[5], left[6]} & {*data.train["text"], *data.validation["text"]}


def test_rows_without_one_label_or_text_are_dropped(tmp_path, load):
    good = [{"text": text, "label": [i % 2]} for i, text in enumerate(sentences(0, 40))]
    bad = [{"text": "two", "label": [0, 1]}, {"text": "none", "label": []}, {"text": "  ", "label": [0]}]
    write(tmp_path, "tiny/a", train=[*good, *bad, {"text": None, "label": [1]}], test=good[:0] + good[-1:])
    hidden = [{"text": "hidden", "label": -1}, {"text": "null", "label": None}]
    write(tmp_path, "tiny/b", train=rows_of(sentences(1, 40)) + hidden, test=rows_of(sentences(2, 5)))
    tasks = load(task("a"), task("b"))
    assert len(tasks["a"].train) + len(tasks["a"].validation) == 39
    assert tasks["a"].removed_duplicates == 1
    assert len(tasks["b"].train) + len(tasks["b"].validation) == 40


def test_labels_may_be_names_and_rows_may_be_jsonl(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, texts in (("train", sentences(0, 40)), ("test", sentences(1, 10))):
        lines = [json.dumps(row) for row in rows_of(texts, labels=("yes", "no"))]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    data = load_tasks([task("mine", dataset_id=str(folder))], cache=tmp_path / "cache")["mine"]
    assert data.test["label"][:2] == [1, 0]
    assert data.test.features["label"].names == ["no", "yes"]


def test_revision_is_the_content_of_a_folder(tmp_path, load):
    train, test = rows_of(sentences(0, 40)), rows_of(sentences(1, 5))
    write(tmp_path, "tiny/a", train=train, test=test)
    write(tmp_path, "tiny/copy", train=train, test=test)
    write(tmp_path, "tiny/other", train=train, test=test[::-1])
    revisions = [load(task(name))[name].data_revision for name in ("a", "copy", "other")]
    assert revisions[0].startswith("content:")
    assert revisions[0] == revisions[1] != revisions[2]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset_id": "tiny/absent"}, FileNotFoundError, "'a': no dataset folder .*absent.*`data_root`"),
        ({"config": "large"}, ValueError, "'a'.*'large'"),
        ({"text_columns": ("sentence",)}, ValueError, r"no column 'sentence' in split 'train'.*'text', 'label'"),
        ({"label_column": "class"}, ValueError, "no column 'class'.*`label_column`"),
        ({"text_columns": ("label",)}, ValueError, "in column 'label' where a text is needed"),
        ({"test_split": "dev"}, ValueError, "no split 'dev', only .*'test'.*`test_split`"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(tmp_path, load, changes, error, message):
    write(tmp_path, "tiny/a", train=rows_of(sentences(0, 40)), test=rows_of(sentences(1, 5)))
    with pytest.raises(error, match=message):
        load(task("a", **changes))


@pytest.mark.parametrize(
    ("known", "label"), [((0, 1), 2), ((0, 1), -2), (("no", "yes"), "maybe"), ((0.0, 1.0), 0.5)], ids=str
)
def test_label_outside_the_spec_is_named(tmp_path, load, known, label):
    train = rows_of(sentences(0, 40), labels=known)
    write(tmp_path, "tiny/a", train=train, test=rows_of(["x"], labels=(label,)))
    with pytest.raises(ValueError, match=rf"'a': row 0 of split 'test' has label {label!r}, but the spec names 2"):
        load(task("a"))


def test_a_dataset_of_duplicates_leaves_nothing_to_train_on(tmp_path, load):
    write(tmp_path, "tiny/a", train=rows_of(["Amber!", "amber"] * 20), test=rows_of(["amber"]))
    with pytest.raises(ValueError, match="'a': its train split is left with no rows"):
        load(task("a"))
    with pytest.raises(ValueError, match="'a' was given twice"):
        load(task("a"), task("a"))


def test_an_unreadable_file_is_reported_with_its_task(tmp_path, load):
    write(tmp_path, "tiny/a", train=rows_of(sentences(0, 40)))
    (tmp_path / "tiny/a/data/test-00000-of-00001.parquet").write_bytes(b"PAR1 truncated")
    with pytest.raises(FileNotFoundError, match="'a'.*cannot be read"):
        load(task("a"))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("It 's GOOD .", "it's good", True),
        ("good", "goods", False),
        ("Élan!", "élan", True),
        (":-)", ":-(", False),
        ("snake_case", "snake case", True),
    ],
)
def test_key_ignores_case_spaces_and_punctuation(one, other, equal):
    assert (text_key(one) == text_key(other)) is equal


def test_key_of_a_pair_knows_where_the_first_text_ends():
    assert text_key("ab", "c") != text_key("a", "bc") != text_key("abc")
    assert text_key("A b", "c!") == text_key("ab", "C") == text_key("c", "ab"), "a swapped pair is the same pair"


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(0, 60), st.randoms())
def test_lowest_keys_take_whole_groups_in_order_and_ignore_the_order_of_rows(numbers, limit, rng):
    rows = [text_key(str(number)) for number in numbers]
    chosen = lowest_keys(rows, limit)
    shuffled = rng.sample(rows, len(rows))
    assert lowest_keys(shuffled, limit) == chosen
    assert sum(row in chosen for row in rows) <= limit
    assert all(low < high for low in chosen for high in set(rows) - chosen)
    assert lowest_keys(rows, max(0, limit - 5)) <= chosen


@given(st.lists(st.text(alphabet="abAB .!", max_size=4), min_size=1, max_size=40), st.integers(1, 50))
def test_evaluation_subset_is_fixed_and_nested(texts, limit):
    dataset = Dataset.from_dict({"text": texts, "label": list(range(len(texts)))})
    few, more = evaluation_subset(dataset, limit), evaluation_subset(dataset, limit + 3)
    assert len(few) == min(limit, len(texts))
    assert set(few["label"]) <= set(more["label"])
    assert list(few["label"]) == sorted(few["label"]), "in the order of the dataset"
    assert data_hash(few) == data_hash(evaluation_subset(dataset, limit))


def test_evaluation_subset_refuses_no_rows():
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        evaluation_subset(Dataset.from_dict({"text": ["a"], "label": [0]}), 0)


def test_data_hash_sees_every_change():
    base = {"text": ["ab", "c"], "text_pair": ["d", "e"], "label": [0, 1]}
    changes = [
        base,
        base | {"label": [1, 0]},
        base | {"text": ["a", "c"], "text_pair": ["bd", "e"]},
        {name: values[::-1] for name, values in base.items()},
        {"text": base["text"], "label": base["label"]},
    ]
    hashes = [data_hash(Dataset.from_dict(change)) for change in changes]
    assert len(set(hashes)) == len(changes)
    assert hashes[0] == data_hash(Dataset.from_dict(dict(base)).with_format("numpy"))


def test_no_text_of_a_bundled_spec_is_a_local_path():
    for spec in TASKS.values():
        assert "staged" not in repr(spec)
        assert spec.revision is None or len(spec.revision) >= 7

"""The bundled specs and prompts, and what a spec of one's own may and may not say."""

import dataclasses
import json
import re

import pytest

from hf_weightgen.targets.tasks import TASKS, TaskSpec, get_task, load_task_spec


OWN = {
    "name": "plants",
    "dataset_id": "botany/plants",
    "text_columns": ["text"],
    "label_column": "label",
    "labels": ["moss", "fern"],
}
each_task = pytest.mark.parametrize("spec", TASKS.values(), ids=TASKS)


def letters_only(prompt: str) -> str:
    return re.sub(r"[\W_]+", "", prompt.lower())


def test_the_known_tasks_are_many_and_of_many_families():
    assert len(TASKS) == 27
    assert len({spec.family for spec in TASKS.values()}) >= 12
    assert sum(spec.is_pair for spec in TASKS.values()) == 3
    assert {spec.name for spec in TASKS.values() if spec.metric == "matthews_correlation"} == {"cola"}


@each_task
def test_spec_is_complete(spec):
    assert TASKS[spec.name] is spec is get_task(spec.name)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", spec.dataset_id), "a Hub id, no path"
    assert len(set(spec.labels)) == len(spec.labels) >= 2
    assert len(spec.prompts) >= 40
    assert len(spec.held_out_prompts) == 12


@each_task
def test_prompts_are_clean(spec):
    for prompt in spec.prompts + spec.held_out_prompts:
        assert prompt == " ".join(prompt.split())
        assert 3 <= len(prompt) <= 300


def test_prompts_differ_over_all_tasks():
    prompts = [prompt.casefold() for spec in TASKS.values() for prompt in spec.prompts + spec.held_out_prompts]
    assert len(set(prompts)) == len(prompts)


def test_held_out_prompts_and_those_of_other_tasks_differ_by_more_than_punctuation():
    tasks_of = {}  # "SST-2" and "sst2" may both be trained on, for the same task
    for spec in TASKS.values():
        for prompt in spec.prompts:
            tasks_of.setdefault(letters_only(prompt), set()).add(spec.name)
    held_out = [letters_only(prompt) for spec in TASKS.values() for prompt in spec.held_out_prompts]
    assert not [names for names in tasks_of.values() if len(names) > 1]
    assert len(set(held_out)) == len(held_out)
    assert not set(held_out) & set(tasks_of)


@each_task
def test_held_out_prompts_are_no_reordering_of_a_training_prompt(spec):
    trained = {frozenset(re.findall(r"\w+", prompt.lower())) for prompt in spec.prompts}
    for prompt in spec.held_out_prompts:
        assert frozenset(re.findall(r"\w+", prompt.lower())) not in trained, prompt


def test_the_prompt_of_the_readme_is_trained_on():
    assert "sentiment on SST-2" in TASKS["sst2"].prompts


@pytest.mark.parametrize(
    ("name", "labels", "third"),
    [("trec", 6, "description"), ("trec_fine", 50, "animal"), ("banking77", 77, "apple pay or google pay")],
)
def test_label_names_stand_in_the_order_of_their_ids(name, labels, third):
    assert len(TASKS[name].labels) == labels
    assert TASKS[name].labels[2] == third


def test_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS["sst2"].name = "other"
    assert hash(TASKS["sst2"]) != hash(TASKS["sst5"])


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown task 'SST-2'.*sst2.*load_task_spec"):
        get_task("SST-2")
    with pytest.raises(ValueError, match="Known: sst2, sst5"):
        get_task("????")


def test_own_task_needs_only_the_necessary_fields(tmp_path):
    (tmp_path / "plants.json").write_text(json.dumps(OWN))
    spec = load_task_spec(tmp_path / "plants.json")
    assert spec.labels == ("moss", "fern")
    assert (spec.config, spec.test_split, spec.metric, spec.prompts) == (None, None, "accuracy", ())


def test_own_task_finds_its_folder_beside_the_file(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "plants.json").write_text(json.dumps(OWN | {"dataset_id": "rows"}))
    assert load_task_spec(tmp_path / "plants.json").dataset_id == str((tmp_path / "rows").resolve())


def test_bundled_spec_survives_the_way_through_json(tmp_path):
    (tmp_path / "task.json").write_text(json.dumps(dataclasses.asdict(TASKS["mrpc"])))
    assert load_task_spec(tmp_path / "task.json") == TASKS["mrpc"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["moss"]}, "`labels` must name at least 2 classes"),
        ({"labels": ["moss", "Moss"]}, "`labels` holds 'Moss' twice"),
        ({"labels": "moss"}, "`labels` must be a list of strings"),
        ({"labels": ["moss", 3]}, r"`labels` must hold text, got 3 \(int\)"),
        ({"text_columns": ["a", "b", "c"]}, "`text_columns` must name one column, or two"),
        ({"metric": "f1"}, "unknown `metric` 'f1'"),
        ({"name": " "}, "`name` holds an empty string"),
        ({"dataset_id": None}, "`dataset_id` must hold text, got None"),
        ({"prompts": ["Moss or fern"], "held_out_prompts": ["moss or fern"]}, "stands in `prompts` and in"),
        ({"label": ["moss", "fern"]}, "unknown field 'label'; did you mean 'labels'"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(tmp_path, change, message):
    (tmp_path / "plants.json").write_text(json.dumps(OWN | change))
    with pytest.raises((ValueError, TypeError), match=message):
        load_task_spec(tmp_path / "plants.json")


def test_a_file_that_is_no_task_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No task file"):
        load_task_spec(tmp_path / "none.json")
    for text, message in (("{", "not valid JSON"), ("[]", "expected one JSON object"), ("{}", "missing")):
        (tmp_path / "task.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_task_spec(tmp_path / "task.json")


def test_specs_need_no_heavy_import():
    assert TaskSpec.__module__ == "hf_weightgen.targets.tasks"
    source = __import__("inspect").getsource(__import__("sys").modules[TaskSpec.__module__])
    assert not re.search(r"^(from|import) (torch|datasets|transformers)", source, re.MULTILINE)

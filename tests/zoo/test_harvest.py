"""Harvesting adapters that PEFT itself has saved, and what is not to be harvested."""

import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from hf_weightgen.zoo.folder import ZooFolder, load_zoo
from hf_weightgen.zoo.harvest import harvest_peft
from hf_weightgen.zoo.schema import row_to_state_dict


BASE = "org/tiny-bert"
# PEFT asks transformers for an attribute that will go away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def save_adapter(folder, seed: int = 0, num_labels: int = 2, base: str = BASE) -> None:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=num_labels,
    )
    lora = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        lora_alpha=4,
        target_modules=["value", "query"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(BertForSequenceClassification(config), lora)
    weights = {name: tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    lora.base_model_name_or_path = base
    lora.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def adapter(tmp_path):
    """A folder named `film-reviews`, two folders below the root."""
    folder = tmp_path / "root" / "mine" / "film-reviews"
    save_adapter(folder)
    return folder


def harvest_one(folder, **kwargs) -> dict:
    [row] = harvest_peft(folder, **kwargs)
    return row


def test_row_has_the_tensors_of_the_file_and_tells_where_they_are_from(tmp_path, adapter):
    row = harvest_one(tmp_path / "root", base_model=BASE)
    assert row["id"] == row["provenance"]["harvested_from"] == "root/mine/film-reviews"
    assert (row["task"], row["text"], row["family"], row["split"]) == (
        "film-reviews",
        "film reviews",
        "harvested",
        "train",
    )
    assert (row["seed"], row["epoch"], row["labels"]) == (None, None, [])
    assert row["arch"]["base_model"] == BASE
    assert (row["arch"]["r"], row["arch"]["lora_alpha"]) == (2, 4)
    assert row["arch"]["target_modules"] == ["query", "value"]
    assert len(row["provenance"]["sha256"]) == 64
    stored = load_file(adapter / "adapter_model.safetensors")
    ours = row_to_state_dict(row)
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stored.items())


def test_harvested_rows_are_a_zoo(tmp_path, adapter):
    for number in range(2):
        save_adapter(tmp_path / "more" / f"a{number}" / "checkpoint-500", seed=number)
    rows = list(harvest_peft([tmp_path / "root", str(tmp_path / "more")]))
    assert [row["checkpoint"] for row in rows] == [None, 500, 500]
    assert rows[1]["task"] == "a0"
    ZooFolder(tmp_path / "zoo").add("harvest", rows)
    assert load_zoo(tmp_path / "zoo")["id"][:] == [
        "root/mine/film-reviews",
        "more/a0/checkpoint-500",
        "more/a1/checkpoint-500",
    ]


def test_labels_come_from_the_nearest_file(adapter):
    (adapter / "config.json").write_text(json.dumps({"id2label": {"1": "B", "0": "A"}}))
    assert harvest_one(adapter)["labels"] == ["A", "B"]
    edit_config(adapter, id2label={"0": "no", "1": "yes"})
    assert harvest_one(adapter)["labels"] == ["no", "yes"]
    (adapter / "labels.json").write_text('["négatif", "positif"]')
    assert harvest_one(adapter)["labels"] == ["négatif", "positif"]
    assert harvest_one(adapter, labels=("x", "y"))["labels"] == ["x", "y"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("labels.json", '["a", "b", "c"]', r"classifier\.weight' has 2 classes, but there are 3 class names"),
        ("labels.json", '{"a": 0}', r"labels\.json must be a list"),
        ("labels.json", '["a"', r"labels\.json is no readable JSON"),
        ("config.json", '{"id2label": {"1": "a", "2": "b"}}', r"config\.json: `id2label` must name the classes 0, 1"),
        ("config.json", "[]", r"config\.json: `id2label`"),
        ("README.md", "---\nprompt: [\n---\n", r"README\.md cannot be read as a model card"),
        ("adapter_config.json", "{", r"adapter_config\.json is no readable JSON"),
        ("adapter_config.json", "{}", r"adapter_config\.json names no `peft_type`"),
    ],
)
def test_files_beside_that_do_not_fit_are_named_before_any_row(adapter, file, content, message):
    (adapter / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        harvest_peft(adapter)  # not iterated


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ("---\nprompt: is it praise?\n---\n# Card\n", "is it praise?"),
        ("---\nlicense: mit\ninstance_prompt: a style\n---\n", "a style"),
        ("---\nlicense: mit\n---\n## Details\n\n- prompt: sentiment on films\n- seed: 3\n", "sentiment on films"),
        ("---\nlicense: mit\n---\n# Nothing of the kind\n", "film reviews"),
    ],
)
def test_text_is_the_prompt_of_the_card(adapter, card, text):
    (adapter / "README.md").write_text(card)
    assert harvest_one(adapter)["text"] == text


def test_repository_and_revision_are_read_off_the_hub_cache(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--some--good-adapter" / "snapshots" / commit
    save_adapter(snapshot)
    row = harvest_one(snapshot)
    assert (row["id"], row["task"]) == ("good-adapter", "good-adapter")
    assert row["provenance"]["harvested_from"] == "some/good-adapter"
    assert row["provenance"]["revision"] == commit


class Exploit:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_pickles_are_refused_unopened(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle, which can run any code.*save it again"):
        harvest_peft(adapter)


def test_a_pickle_beside_safetensors_is_left_alone(adapter):
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Exploit()))
    assert harvest_one(adapter)["id"] == "film-reviews"


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign"])
def test_damaged_safetensors_are_named_before_any_row(tmp_path, adapter, damage):
    save_adapter(tmp_path / "root" / "a-good-one")
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[:-9], "foreign": pickle.dumps(Exploit())}[damage])
    with pytest.raises(ValueError, match=r"film-reviews/adapter_model\.safetensors is no whole safetensors"):
        harvest_peft(tmp_path / "root")


def test_a_file_that_breaks_after_the_check_is_named(adapter):
    rows = harvest_peft(adapter)
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is no whole safetensors"):
        next(rows)


def test_tensors_that_are_no_adapter_are_named(adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    lone = {name: t for name, t in weights.items() if "layer.1.attention.self.query.lora_B" not in name}
    save_file(lone, path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is no whole adapter.*query.*lora_B"):
        harvest_one(adapter)
    bad = {name: t.clone() for name, t in weights.items()}
    bad["base_model.model.classifier.bias"][1] = float("nan")
    save_file(bad, path)
    with pytest.raises(ValueError, match=r"'film-reviews': tensor 'base_model\.model\.classifier\.bias' holds NaN"):
        harvest_one(adapter)
    save_file({"encoder.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"no tensor named .*\['encoder.weight'\].*no adapter of PEFT"):
        harvest_one(adapter)
    path.unlink()
    with pytest.raises(ValueError, match="has an `adapter_config.json` but no `adapter_model.safetensors`"):
        harvest_one(adapter)


def test_another_base_model_is_named_beside_the_one_asked_for(tmp_path, adapter):
    save_adapter(tmp_path / "root" / "other", base="org/other-base")
    with pytest.raises(
        ValueError, match=r"other/adapter_config\.json .*'org/other-base', but 'org/tiny-bert' is asked"
    ):
        harvest_peft(tmp_path / "root", base_model=BASE)
    assert {row["arch"]["base_model"] for row in harvest_peft(tmp_path / "root")} == {BASE, "org/other-base"}


def test_other_adapters_and_absent_bases_are_refused(adapter):
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="has no `base_model_name_or_path`"):
        harvest_peft(adapter)
    edit_config(adapter, peft_type="IA3")
    with pytest.raises(ValueError, match="`peft_type` 'IA3'; only 'LORA'"):
        harvest_peft(adapter)


def test_absent_and_empty_folders_and_equal_ids_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder.*snapshot_download"):
        harvest_peft("org/some-adapter")
    with pytest.raises(FileNotFoundError, match="holds no `adapter_config.json`"):
        harvest_peft(tmp_path)
    for parent in "ab":
        save_adapter(tmp_path / parent / "same")
    with pytest.raises(ValueError, match="both become the row 'same'"):
        harvest_peft([tmp_path / "a" / "same", tmp_path / "b" / "same"])

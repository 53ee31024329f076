"""Publications over HTTP, through the unmodified client: what arrives, and what every fault on the way says and leaves."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file

from hf_weightgen.hub.cards import write_card
from hf_weightgen.hub.errors import HubError
from hf_weightgen.hub.publish import FILES_PER_COMMIT, kind_of, publish
from hf_weightgen.pipelines.output import publish_weights
from hf_weightgen.zoo.folder import ZooFolder, load_zoo, push_zoo
from rows import rows_of
from tiny import adapter


COMMIT, UPLOAD = "/api/models/acme/lora/commit/", "/lfs/models/acme/lora/"


@pytest.fixture
def folder(tmp_path):
    """A PEFT folder with a card and one large file."""
    from safetensors.torch import save_file

    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/base", "r": 4}))
    (folder / "labels.json").write_text('["bad", "good"]')
    save_file(adapter(0), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_card(folder, "adapter", base_model="acme/base", labels=["bad", "good"], prompt="sort films")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Retries of this library and of the client do not wait; how long they would is asserted where it matters."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def files_of(hub, repo_id="acme/lora", kind="models", branch="main") -> dict[str, bytes]:
    repo = hub.repo(kind, repo_id)
    return {path: blob.read() for path, blob in repo.commits[repo.branches[branch]].items() if path[0] != "."}


def written(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- what arrives


def test_a_folder_becomes_one_commit(hub, folder):
    commit = publish(folder, "acme/lora", commit_message="First")
    repo = hub.repo("models", "acme/lora")
    assert repo.titles[commit.oid] == "First" and list(repo.commits)[-1] == commit.oid and len(repo.commits) == 2
    assert files_of(hub) == written(folder) and not repo.private
    assert commit.commit_url.startswith(hub.url)


def test_the_same_folder_again_is_no_new_commit(hub, folder):
    first = publish(folder, "acme/lora").oid
    hub.requests.clear()
    assert publish(folder, "acme/lora").oid == first
    assert not hub.requested("PUT", UPLOAD) and not hub.requested("POST", COMMIT)


def test_files_of_an_earlier_publication_go_and_others_stay(hub, folder):
    publish(folder, "acme/lora")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes/picture.png", repo_id="acme/lora")
    (folder / "labels.json").unlink()
    publish(folder, "acme/lora")
    assert files_of(hub) == written(folder) | {"notes/picture.png": b"mine"}


def test_private_repositories_and_branches(hub, folder):
    publish(folder, "acme/lora", private=True, revision="v2")
    repo = hub.repo("models", "acme/lora")
    assert repo.private and set(files_of(hub, branch="v2")) == set(written(folder)) and not files_of(hub)
    with pytest.raises(HubError, match="it exists and is private, not public"):
        publish(folder, "acme/lora", private=False)


def test_a_repository_of_another_kind_is_left_alone(hub, folder):
    hub.put("models", "acme/lora", {"model.safetensors": b"0" * 10, "config.json": "{}", "README.md": "mine"})
    before = files_of(hub)
    with pytest.raises(
        ValueError,
        match="'acme/lora' holds '.*', and is not the adapter of an earlier publication; it is left as it is",
    ):
        publish(folder, "acme/lora")
    assert files_of(hub) == before


def test_what_cannot_be_published_is_named_before_anything_is_sent(hub, folder, tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        publish(tmp_path / "nothing", "acme/lora")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has none of model_index.json .generator., adapter_config.json .adapter."):
        kind_of(tmp_path / "empty")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="'optimizer.pt', a pickle"):
        publish(folder, "acme/lora")
    (folder / "optimizer.pt").unlink()
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match="has no card"):
        publish(folder, "acme/lora")
    assert not hub.requests


OTHERS = {
    "a model": {"config.json": "{}", "model.safetensors": b"0" * 10, "tokenizer.json": "{}", "train.py": "x"},
    "a generator of ours": {
        "model_index.json": "{}",
        "vae/config.json": "{}",
        "README.md": "---\ntags: [hf_weightgen]\n---\n",
    },
    "an adapter of somebody": {"adapter_config.json": "{}", "adapter_model.safetensors": b"0", "my_eval.py": "x"},
    "a model that holds an adapter": {"config.json": "{}", "sub/deep/adapter_config.json": "{}"},
    "nothing but a file": {"notes.bin": b"0"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_only_an_earlier_publication_of_ours_is_replaced(hub, folder, other):
    hub.put("models", "acme/lora", OTHERS[other])
    before = files_of(hub)
    with pytest.raises(ValueError, match="is not the adapter of an earlier publication; it is left as it is"):
        publish(folder, "acme/lora")
    assert files_of(hub) == before


def test_the_datasets_of_others_are_left_alone(hub, tmp_path):
    hub.put("datasets", "acme/text", {"data/train-00000.parquet": b"PAR1", "data/test.parquet": b"PAR1"})
    ZooFolder(tmp_path / "zoo").add("all", rows_of("sst2-s0-c0"))
    with pytest.raises(ValueError, match="is not the zoo of an earlier publication"):
        push_zoo(tmp_path / "zoo", "acme/text")
    assert len(files_of(hub, "acme/text", "datasets")) == 2


def test_a_pickle_that_would_stay_is_named(hub, folder):
    publish(folder, "acme/lora")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="pytorch_model.bin", repo_id="acme/lora")
    with pytest.raises(ValueError, match="'acme/lora' holds 'pytorch_model.bin', a pickle"):
        publish(folder, "acme/lora")


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_nothing_outside_of_the_folder_is_published(hub, folder, tmp_path, linked):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("secret")
    (folder / "labels.json").unlink()
    (folder / "labels.json").symlink_to(tmp_path / "secret" / ("id_rsa" if linked == "file" else ""))
    with pytest.raises(ValueError, match="is a link that leads out"):
        publish_weights(folder, "acme/lora")
    assert not hub.requests


def test_files_that_lie_there_by_accident_are_not_published(hub, folder):
    (folder / ".env").write_text("secret")
    (folder / "sub").mkdir()
    (folder / "sub" / ".env").write_text("secret")
    publish_weights(folder, "acme/lora")
    assert not [name for name in files_of(hub) if ".env" in name]
    (folder / "sub" / "passwords.txt").write_text("secret")
    with pytest.raises(ValueError, match="holds 'sub/passwords.txt', which is no part of a published adapter"):
        publish_weights(folder, "acme/lora")


@pytest.mark.parametrize("labels", ['{"a": 1}', '"ab"', "[1, 2]", "["])
def test_an_adapter_is_whole(hub, folder, labels):
    (folder / "labels.json").write_text(labels)
    with pytest.raises(ValueError, match="labels.json"):
        publish_weights(folder, "acme/lora")
    (folder / "labels.json").unlink()
    (folder / "README.md").unlink()
    publish_weights(folder, "acme/lora")
    assert (
        "names" not in files_of(hub)["README.md"].decode()
        and "were not trained" not in files_of(hub)["README.md"].decode()
    )
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has a adapter_config.json and no adapter_model.safetensors"):
        publish_weights(folder, "acme/lora")


def test_a_card_by_hand_is_published_as_it_is(hub, folder):
    (folder / "README.md").write_text("# Mine\n")
    publish_weights(folder, "acme/lora", revision="dev")
    assert files_of(hub, branch="dev")["README.md"] == b"# Mine\n"


def test_a_card_on_a_branch_loads_from_the_branch(hub, folder):
    publish_weights(folder, "acme/lora", revision="dev")
    assert b'"acme/lora", revision="dev")' in files_of(hub, branch="dev")["README.md"]


@pytest.mark.parametrize("base", ["/home/me/model", "./model", "../model", None, "C:\\model"])
def test_an_adapter_names_its_base_model_by_id(hub, folder, base):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match="which nobody else can load; set `base_model_name_or_path`"):
        publish_weights(folder, "acme/lora")
    assert not hub.requests


def test_the_default_card_of_another_library_is_replaced(hub, folder):
    (folder / "README.md").write_text("---\nlibrary_name: transformers\ntags: []\n---\n# Model Card for Model ID\n")
    publish_weights(folder, "acme/lora")
    info = HfApi().model_info("acme/lora")
    assert info.library_name == "peft" and info.card_data.base_model == "acme/base"
    assert info.card_data["base_model_relation"] == "adapter" and "hf_weightgen" in info.tags
    text = files_of(hub)["README.md"].decode()
    assert (
        'PeftModel.from_pretrained(base, "acme/lora")' in text and "PATH_OR_ID" not in text and "Model ID" not in text
    )
    assert "Model ID" in (folder / "README.md").read_text(), "the given folder is left as it is"


# ---- faults

STATUS = [
    (401, "the Hub does not accept the token, or there is none. Log in with `hf auth login`"),
    (403, "this token may not do that.*write access"),
    (409, "the Hub reports a conflict"),
    (429, "too many requests. Wait"),
    (500, "the Hub answered 500. This passes"),
    (503, "the Hub answered 503. This passes"),
    (400, "the Hub answered 400"),
]


@pytest.mark.parametrize(("status", "message"), STATUS)
@pytest.mark.parametrize("at", ["/api/models/acme/lora/preupload/", r"/lfs/objects/batch|\.git/info", COMMIT])
def test_a_status_says_what_to_do_and_nothing_is_committed(hub, folder, status, message, at):
    publish(folder, "acme/lora")
    before = hub.repo("models", "acme/lora").branches["main"]
    (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    from safetensors.torch import save_file

    save_file(adapter(1), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    hub.fail("POST", at, status, times=100)
    with pytest.raises(HubError, match=f"Publishing to 'acme/lora' failed: {message}"):
        publish(folder, "acme/lora")
    assert hub.repo("models", "acme/lora").branches["main"] == before
    hub.faults.clear()
    publish(folder, "acme/lora")
    assert files_of(hub) == written(folder), "the same call succeeds once the fault is gone"


def test_no_token_and_a_wrong_one(hub, folder, monkeypatch):
    for token in ("hf_nobody", False):
        with pytest.raises(HubError, match="(does not accept the token|no such repository).*hf auth login"):
            publish(folder, "acme/lora", token=token)
    hub.tokens["hf_reader"] = ("acme", "read")
    with pytest.raises(HubError, match="may not do that.*namespace 'acme'.*write access"):
        publish(folder, "acme/lora", token="hf_reader")
    with pytest.raises(HubError, match="may not do that.*namespace 'other'"):
        publish(folder, "other/lora")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no token. Log in"):
        publish(folder, "acme/lora", token=True)
    assert not hub.repos


@pytest.mark.parametrize("repo_id", ["a/b/c", "acme/lo ra", "acme/-x", "acme/x" * 60])
def test_ids_that_are_none(hub, folder, repo_id):
    with pytest.raises(HubError, match="this is no repository id.*Give NAMESPACE/NAME"):
        publish(folder, repo_id)


def test_an_id_without_a_namespace_is_told_where_it_belongs(hub, folder):
    with pytest.raises(ValueError, match="'lora' names no namespace; write 'YOUR_NAME/lora'"):
        publish(folder, "lora")
    assert not hub.repos


@pytest.mark.parametrize("status", [500, 502, 429])
def test_a_status_once_is_tried_again(hub, folder, status, no_waiting):
    hub.fail("POST", COMMIT, status, headers={"Retry-After": "7"} if status == 429 else {})
    publish(folder, "acme/lora")
    assert files_of(hub) == written(folder)
    assert no_waiting[-1] == (7 if status == 429 else 1)


def test_a_long_retry_after_is_reported(hub, folder):
    hub.fail("POST", COMMIT, 429, headers={"Retry-After": "3600"}, times=100)
    with pytest.raises(HubError, match="Wait 3600 seconds, and do the same again"):
        publish(folder, "acme/lora")


def test_a_commit_whose_answer_was_lost_counts(hub, folder):
    publish(folder, "acme/lora")
    (folder / "labels.json").write_text('["no", "yes"]')
    hub.fail("POST", COMMIT, cut=0, after=True)
    commit = publish(folder, "acme/lora")
    assert files_of(hub) == written(folder)
    assert commit.oid == hub.repo("models", "acme/lora").branches["main"]


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_cut_upload_is_tried_again(hub, folder, cut):
    hub.fail("PUT", UPLOAD, cut=cut)
    publish(folder, "acme/lora")
    assert files_of(hub) == written(folder)


def test_an_upload_that_is_always_cut_says_so_and_continues_later(hub, folder):
    hub.fail("PUT", UPLOAD, cut=1000, times=100)
    with pytest.raises(HubError, match="the connection broke .* do the same again: it continues where it stopped"):
        publish(folder, "acme/lora")
    assert not files_of(hub)
    hub.faults.clear()
    publish(folder, "acme/lora")
    assert files_of(hub) == written(folder)


def test_two_publishers_at_once(hub, folder):
    """The other one commits between our reading of the repository and our commit."""
    publish(folder, "acme/lora")
    (folder / "labels.json").write_text('["ours", "good"]')

    def other():
        theirs = files_of(hub) | {"labels.json": b'["theirs", "good"]'}
        hub.put("models", "acme/lora", theirs)

    hub.fail("POST", COMMIT, action=other)
    with pytest.raises(HubError, match="somebody else committed to it in the meantime, and nothing of yours"):
        publish(folder, "acme/lora")
    assert files_of(hub)["labels.json"] == b'["theirs", "good"]'
    publish(folder, "acme/lora")
    assert files_of(hub)["labels.json"] == b'["ours", "good"]'


def test_a_cut_download_is_continued(hub, folder, tmp_path):
    publish(folder, "acme/lora")
    name = "adapter_model.safetensors"
    hub.fail("GET", f"/resolve/.*{name}", cut=5000)
    path = hf_hub_download("acme/lora", name, cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (folder / name).read_bytes()
    ranged = [size for method, path, size in hub.requests if method == "GET" and name in path]
    assert len(ranged) == 2


FULL_DISK = """
import resource, sys
from hf_weightgen.pipelines.pipeline_utils import WeightGenPipeline
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full disk: a larger file cannot be written
"""


@pytest.mark.parametrize(
    ("doing", "remedy"),
    [
        ("WeightGenPipeline.from_pretrained('bundled').push_to_hub('acme/generator')", "TMPDIR"),
        ("WeightGenPipeline.from_pretrained('acme/full')", "HF_HOME"),
    ],
)
def test_a_full_disk(hub, tmp_path, doing, remedy):
    from hf_weightgen.pipelines.pipeline_utils import BUNDLED

    hub.put("models", "acme/full", written(BUNDLED))
    temporary, home = tmp_path / "temporary", tmp_path / "home"
    temporary.mkdir()
    environment = os.environ | hub.environment(home) | {"TMPDIR": str(temporary), "HF_TOKEN": "hf_writer"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK + doing], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    told = done.stderr.strip().splitlines()[-1]
    assert "HubError" in told and "the disk is full" in told and remedy in told
    assert not list(temporary.iterdir()), "nothing half-written stays behind"
    assert ("models", "acme/generator") not in hub.repos


def test_the_token_appears_nowhere(hub, folder, tmp_path, caplog, capfd):
    secret = "hf_" + "s3cretS3CRET" * 3
    hub.tokens[secret] = ("acme", "write")
    told = []
    with caplog.at_level(logging.DEBUG):
        for status in (401, 403, 409, 412, 429, 500):
            hub.faults.clear()
            hub.fail("POST", COMMIT, status, headers={"X-Error-Message": f"bad {secret}"}, times=100)
            with pytest.raises(HubError) as caught:
                publish(folder, "acme/lora", token=secret)
            told.append(repr(caught.value) + repr(caught.value.__cause__))
            assert caught.value.__suppress_context__
        hub.faults.clear()
        publish(folder, "acme/lora", token=secret)
    out, err = capfd.readouterr()
    lines = [
        r.getMessage() for r in caplog.records if not r.name.startswith("httpcore")
    ]  # the wire, with the echo above
    told += [*lines, out, err, *map(repr, files_of(hub).values())]
    assert not [text for text in told if secret in text]


# ---- zoos of many files


@pytest.fixture
def many(tmp_path):
    """More rows than files of one commit."""
    ids = [f"task-s{i:03d}-c0" for i in range(FILES_PER_COMMIT + 9)]
    ZooFolder(tmp_path / "zoo").add("all", rows_of(*ids))
    return tmp_path / "zoo", ids


def push(many, **settings):
    return push_zoo(many[0], "acme/zoo", rows_per_shard=1, **settings)


def test_many_shards_appear_at_once(hub, many):
    commit = push(many)
    repo = hub.repo("datasets", "acme/zoo")
    assert set(repo.branches) == {"main"} and repo.branches["main"] == commit.oid
    seen = [len([p for p in files if p.endswith(".parquet")]) for files in repo.commits.values()]
    assert seen[0] == 0 and 0 < seen[1] <= FILES_PER_COMMIT and seen[-1] == len(many[1])
    assert load_zoo("acme/zoo")["id"] == many[1]


def test_an_interrupted_publication_of_a_zoo_continues(hub, many):
    hub.fail("POST", r"/commit/upload-", 400, times=100)
    with pytest.raises(HubError, match="400"):
        push(many)
    hub.faults.clear()
    hub.fail("POST", r"/commit/main", 400, times=100)
    with pytest.raises(HubError, match="400"):
        push(many)
    assert not files_of(hub, "acme/zoo", "datasets"), "readers see nothing of it"
    hub.faults.clear()
    hub.requests.clear()
    push(many)
    assert not hub.requested("PUT", "/lfs/"), "what was sent is not sent again"
    assert load_zoo("acme/zoo")["id"] == many[1]


def test_a_smaller_zoo_replaces_the_shards_of_a_larger_one(hub, many, tmp_path):
    push(many)
    ZooFolder(tmp_path / "small").add("all", rows_of("a-s0-c0", "b-s0-c0"))
    push_zoo(tmp_path / "small", "acme/zoo", rows_per_shard=1)
    assert load_zoo("acme/zoo")["id"] == ["a-s0-c0", "b-s0-c0"]


# ---- what anybody can load


def test_an_adapter_loads_with_safetensors_as_it_was(hub, folder):
    publish_weights(folder, "acme/lora")
    path = hf_hub_download("acme/lora", "adapter_model.safetensors")
    assert load_file(path).keys() == adapter(0).keys()

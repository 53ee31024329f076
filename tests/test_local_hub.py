"""The test server itself, where its users rely on more than the other tests show."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


SERVER = Path(__file__).with_name("local_hub.py")


def test_the_client_creates_commits_tags_and_reads(hub, tmp_path):
    api = HfApi()
    assert api.whoami()["name"] == "acme"
    api.create_repo("acme/x")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("acme/x")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.safetensors").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "c.txt").write_text("ü")
    first = api.upload_folder(repo_id="acme/x", folder_path=tmp_path).oid
    api.create_tag("acme/x", tag="v1")
    api.create_branch("acme/x", branch="feature/one", revision="v1")
    api.delete_file("c.txt", "acme/x")
    assert api.list_repo_files("acme/x", revision="v1") == [".gitattributes", "a/b.safetensors", "c.txt"]
    assert api.list_repo_files("acme/x", revision="feature/one") == api.list_repo_files("acme/x", revision=first)
    assert api.list_repo_files("acme/x") == [".gitattributes", "a/b.safetensors"]
    assert {ref.name for ref in api.list_repo_refs("acme/x").branches} == {"main", "feature/one"}
    assert [c.commit_id for c in api.list_repo_commits("acme/x", revision="v1")][0] == first
    folder = Path(snapshot_download("acme/x", revision="v1", cache_dir=tmp_path / "cache"))
    assert (folder / "c.txt").read_text() == "ü" and (folder / "a" / "b.safetensors").stat().st_size == 25_600
    for wrong, error in (
        ({"filename": "none"}, EntryNotFoundError),
        ({"filename": "c.txt", "revision": "v2"}, RevisionNotFoundError),
    ):
        with pytest.raises(error):
            hf_hub_download("acme/x", **wrong)
    api.delete_repo("acme/x")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/x")


def test_a_folder_is_mirrored_read_only(tmp_path):
    data = tmp_path / "root" / "datasets" / "acme" / "films" / "data"
    data.mkdir(parents=True)
    (data / "train.csv").write_text("text,label\na film,1\nanother,0\n")
    code = (
        "from datasets import load_dataset; print(load_dataset('acme/films', split='train')['label'][:])\n"
        "from huggingface_hub import HfApi\n"
        "try: HfApi(token='hf_writer').create_repo('acme/new')\n"
        "except Exception as error: print(error.response.status_code)"
    )
    command = [sys.executable, SERVER, "--root", tmp_path / "root", "--", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["[1,", "0]", "403"], done.stderr[-2000:]


def test_the_mirror_hands_on_how_the_command_ended(tmp_path):
    command = [sys.executable, SERVER, "--root", tmp_path, "--", sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, timeout=60).returncode == 7
    wrong = subprocess.run([*command[:3], tmp_path / "none", "--", "true"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "must be a folder" in wrong.stderr

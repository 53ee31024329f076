"""A folder becomes a repository on the Hub: checked, with its card, and in one commit.

Readers see the state before or the state after, never one between. `parent_commit` makes sure that nothing is overwritten
which another publisher committed meanwhile. Many files go to a branch first, from where the one commit copies them: an
interrupted publication finds there what it has sent already.
"""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo

from .errors import HubError, explained, status_of, wait_or_raise
from .untrusted import check_folder, check_names


# what marks a kind of repository, first match first; and what else a publication of this kind writes
MARKERS = {
    "generator": r"model_index\.json",
    "adapter": r"(\d{4}/)?adapter_config\.json",
    "zoo": r"data/[^/]+\.parquet",
    "network": r"(\d{4}/)?config\.json",
}
WRITTEN = {
    "generator": r"evaluation\.json|pipeline\.py|[a-z_]+/[^/]+\.(json|safetensors)|[a-z_]+/modeling\.py",
    "adapter": r"(\d{4}/)?(adapter_model\.safetensors|labels\.json|README\.md)",
    "zoo": r"data/[^/]+\.parquet",
    "network": r"(\d{4}/)?(model\.safetensors|labels\.json|modeling_target\.py|README\.md)",
}
ALSO = re.compile(r"README\.md|LICENSE(\.\w+)?")  # of every kind; never deleted
FILES_PER_COMMIT = 50


def kind_of(folder: str | Path) -> str:
    """
    `"generator"`, `"adapter"`, `"zoo"` or `"network"`.

    Raises:
        ValueError: If the folder is none of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r} to publish.")
    kind = _kind([path.relative_to(folder).as_posix() for path in [*folder.glob("*"), *folder.glob("*/*")]])
    if kind is None:
        raise ValueError(
            f"{str(folder)!r} is nothing that can be published: it has none of model_index.json (generator), "
            "adapter_config.json (adapter), data/*.parquet (zoo), config.json (network)."
        )
    return kind


def _kind(names: Iterable[str]) -> str | None:
    names = list(names)
    found = (kind for kind, marker in MARKERS.items() if any(re.fullmatch(marker, name) for name in names))
    return next(found, None)


def copy_for_publication(folder: str | Path, copy: Path) -> Path:
    """
    A copy to be completed and published, without hidden files.

    Raises:
        UntrustedFileError: If a link leads out of the folder, or a file is a pickle or no file at all.
        ValueError: If there is a file that does not belong to its kind: what lies there by accident is not made public.
    """
    folder, kind = Path(folder), kind_of(folder)
    check_folder(folder)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"), symlinks=False)
    for path in sorted(copy.rglob("*")):
        name = path.relative_to(copy).as_posix()
        if path.is_file() and not _is_own(kind, name) and not ALSO.fullmatch(name):
            raise ValueError(
                f"{str(folder)!r} holds {name!r}, which is no part of a published {kind}; move it elsewhere, or publish a folder "
                "without it."
            )
    return copy


def publish(folder: str | Path, repo_id: str, **settings) -> CommitInfo:
    """
    Makes a repository on the Hub equal to a whole generator, adapter, network or zoo with its card, see [`upload`] for the
    settings and [`copy_for_publication`] for what is refused.
    """
    with tempfile.TemporaryDirectory(prefix="weightgen-") as temporary, explained("publishing to", repo_id):
        return upload(copy_for_publication(folder, Path(temporary) / "copy"), repo_id, **settings)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Makes a repository on the Hub equal to a folder that [`copy_for_publication`] or this library wrote, in one commit;
    calling it again after an error continues.

    Args:
        folder (`Path`): A whole generator, adapter, network or zoo with its card `README.md`.
        repo_id (`str`): `NAMESPACE/NAME`; created if it is not there.
        private (`bool`, *optional*): Who may see a new repository. Default: that of the namespace.
        token (`str` or `bool`, *optional*): Default: the one of the environment or of `hf auth login`.
        revision (`str`, *optional*): Branch, made from `main` if it is not there. Default: `main`.

    Returns:
        `CommitInfo`: The commit, which has its address as `commit_url`.

    Raises:
        ValueError: If the folder cannot be published, or the repository holds something of another kind. Nothing has been
            committed then.
        HubError: If the Hub, the connection or the disk fails; the message says what to do.
    """
    kind = kind_of(folder)
    if "/" not in repo_id:
        raise ValueError(f"The repository id {repo_id!r} names no namespace; write 'YOUR_NAME/{repo_id}'.")
    if not (folder / "README.md").is_file():
        raise ValueError(f"The {kind} for {repo_id!r} has no card: write a `README.md`, see `write_card`.")
    repo_type = "dataset" if kind == "zoo" else "model"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    branch, message = revision or "main", commit_message or f"Publish a {kind} with hf_weightgen"
    api = HfApi(token=token, library_name="hf_weightgen")
    repo = {"repo_id": repo_id, "repo_type": repo_type}
    with explained("publishing to", repo_id, revision, resumes=True):
        info = _created(api, repo, private, branch)
        there = {file.rfilename: file for file in info.siblings}
        _check_kind(repo_id, kind, there, info.tags or ())
        additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]
        kept = {operation.path_in_repo for operation in additions}
        stale = [CommitOperationDelete(name) for name in there if name not in kept and _is_own(kind, name)]
        if len(additions) <= FILES_PER_COMMIT:
            return _commit(api, repo, branch, [*additions, *stale], message, info.sha)
        staged = _stage(api, repo, additions, info.sha, message)
        copies = [CommitOperationCopy(a.path_in_repo, a.path_in_repo, src_revision=staged) for a in additions]
        committed = _commit(api, repo, branch, [*copies, *stale], message, info.sha)
        with suppress(HTTPError):  # it is published; a branch that stays does no harm
            api.delete_branch(**repo, branch=staged)
        return committed


def _created(api: HfApi, repo: dict, private: bool | None, branch: str) -> ModelInfo | DatasetInfo:
    """What the branch of the repository holds; both are made if they are not there."""
    api.create_repo(**repo, private=private, exist_ok=True)
    try:
        info = api.repo_info(**repo, revision=branch, files_metadata=True)
    except RevisionNotFoundError:
        api.create_branch(**repo, branch=branch, exist_ok=True)
        info = api.repo_info(**repo, revision=branch, files_metadata=True)
    if private is not None and bool(info.private) != private:
        is_now, wanted = ("private" if p else "public" for p in (info.private, private))
        raise HubError(
            f"Publishing to {repo['repo_id']!r} failed: it exists and is {is_now}, not {wanted}. Change that in its settings, or "
            "leave `private` out."
        )
    return info


def _check_kind(repo_id: str, kind: str, there: Iterable[str], tags: Iterable[str]) -> None:
    """A repository that holds something else is not overwritten by mistake."""
    others = sorted(name for name in there if name != ".gitattributes" and not ALSO.fullmatch(name))
    if others and not ("hf_weightgen" in tags and _kind(others) == kind):
        raise ValueError(
            f"Repository {repo_id!r} holds {others[0]!r}, and is not the {kind} of an earlier publication; it is left as it is. "
            "Choose another id, or empty it."
        )
    check_names((name for name in others if not _is_own(kind, name)), f"Repository {repo_id!r}")


def _is_own(kind: str, name: str) -> bool:
    return re.fullmatch(f"{MARKERS[kind]}|{WRITTEN[kind]}", name) is not None


def _stage(api: HfApi, repo: dict, additions: Sequence[CommitOperationAdd], head: str, message: str) -> str:
    """Brings files onto a branch named after what is in them, and returns its name."""
    told = "".join(f"{a.path_in_repo}\n{a.upload_info.sha256.hex()}\n" for a in additions)
    branch = f"upload-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    api.create_branch(**repo, branch=branch, revision=head, exist_ok=True)
    there = {f.rfilename: f for f in api.repo_info(**repo, revision=branch, files_metadata=True).siblings}
    missing = [operation for operation in additions if not _is_there(operation, there)]
    for start in range(0, len(missing), FILES_PER_COMMIT):
        part = missing[start : start + FILES_PER_COMMIT]
        _commit(api, repo, branch, part, f"{message}: {start + len(part)} of {len(missing)} files", None)
    return branch


def _commit(api: HfApi, repo: dict, branch: str, operations: list, message: str, parent: str | None) -> CommitInfo:
    """`create_commit`, which itself does not retry its last request."""
    for attempt in count():
        try:
            return api.create_commit(
                **repo, operations=operations, commit_message=message, revision=branch, parent_commit=parent
            )
        except HTTPError as error:
            if attempt and status_of(error) == 412 and (arrived := _arrived(api, repo, branch, operations, message)):
                return arrived  # an earlier attempt was committed, and only its answer was lost
            wait_or_raise(attempt, error)


def _arrived(api: HfApi, repo: dict, branch: str, operations: list, message: str) -> CommitInfo | None:
    info = api.repo_info(**repo, revision=branch, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings}
    for operation in operations:
        is_there = operation.path_in_repo in there
        if isinstance(operation, CommitOperationDelete) == is_there:
            return None
        if isinstance(operation, CommitOperationAdd) and not _is_there(operation, there):
            return None
    prefix = "datasets/" if repo["repo_type"] == "dataset" else ""
    url = f"{api.endpoint}/{prefix}{repo['repo_id']}/commit/{info.sha}"
    return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=info.sha)


def _is_there(operation: CommitOperationAdd, there: dict) -> bool:
    """Whether the repository holds the same bytes under the same name."""
    file = there.get(operation.path_in_repo)
    if file is None:
        return False
    if file.lfs is not None:
        return file.lfs.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as opened:
        data = opened.read()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

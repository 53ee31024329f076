"""A repository of the Hub becomes a folder in the cache, once the names of its files have been looked at."""

from itertools import count
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from .errors import explained, status_of, wait_or_raise
from .untrusted import check_names


MAX_FILES = 10_000


def download(
    repo_id: str,
    *,
    marker: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """
    The files of a model repository, as `snapshot_download` gives them.

    Args:
        marker (`str`): A file that the repository must have; one without it is not downloaded.

    Raises:
        ValueError: If the repository has no such file.
        UntrustedFileError: If the repository holds a pickle, or a name that leads out of its folder; nothing of it has
            been downloaded then.
        HubError: If the repository, the revision or the Hub cannot be reached; the message says what to do.
    """
    revision = revision or None
    with explained("loading", repo_id, revision, resumes=True):
        if not local_files_only:
            _look_at(repo_id, marker, revision, token)
        for attempt in count():
            try:
                folder = snapshot_download(
                    repo_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                    force_download=force_download,
                )
                return Path(folder)
            except HTTPError as error:  # of a file; the client itself repeats other requests
                wait_or_raise(attempt, error)


def _look_at(repo_id: str, marker: str, revision: str | None, token: str | bool | None) -> None:
    """Refuses a repository by the names of its files."""
    try:
        info = HfApi(token=token, library_name="hf_weightgen").model_info(repo_id, revision=revision)
    except (HTTPError, OfflineModeIsEnabled) as error:
        status = status_of(error)
        if status is not None and status < 500:
            raise
        return  # the Hub is out of reach: what is in the cache was looked at when it came
    names = [file.rfilename for file in info.siblings or ()]
    if marker not in names:
        raise ValueError(f"Repository {repo_id!r} has no {marker}: it is no generator. Check the id.")
    if len(names) > MAX_FILES:
        raise ValueError(
            f"Repository {repo_id!r} holds {len(names):,} files, expected at most {MAX_FILES:,}: it is no generator."
        )
    check_names(names, f"Repository {repo_id!r}")

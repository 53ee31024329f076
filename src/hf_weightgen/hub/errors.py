"""What can go wrong between here and the Hub, in sentences that say what to do. Tokens never stand in them."""

import errno
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"os error (\d+)")  # how safetensors and other Rust libraries tell the number
_TOKEN = re.compile(r"\b(hf|api)_\w{3,}")
ATTEMPTS = 4
LONGEST_WAIT = 60  # seconds; a Hub that wants more is reported
LOGIN = "`hf auth login`, or the environment variable HF_TOKEN"


class HubError(OSError):
    """The Hub, the way to it, or the disk refused; the message says what to do."""


@contextmanager
def explained(doing: str, repo_id: str, revision: str | None = None, resumes: bool = False) -> Iterator[None]:
    """
    Turns every error of a request to the Hub into a [`HubError`] that says what to do.

    Args:
        doing (`str`): For example `"publishing to"`.
        resumes (`bool`): Whether doing the same again continues where it broke.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        wrapped = isinstance(error, RuntimeError) and isinstance(
            error.__cause__, (HTTPError, OSError)
        )  # of one of many uploads
        advice = _advice(error.__cause__ if wrapped else error, repo_id, revision, resumes)
        if advice is None:
            raise
        # not chained: the original carries the request, whose headers hold the token
        raise HubError(
            f"{doing[0].upper()}{doing[1:]} {repo_id!r} failed: {advice}".replace(repo_id, redacted(repo_id))
        ) from None


def redacted(text: object) -> str:
    """The text without anything that looks like a token."""
    return _TOKEN.sub(r"\1_***", str(text))


def wait_or_raise(attempt: int, error: Exception) -> None:
    """Waits until what failed in this attempt, counted from 0, is worth another one, or raises the error."""
    status = status_of(error)
    passes = isinstance(error, HTTPError) and (status is None or status == 429 or status >= 500)
    wait = retry_after(error) or 2**attempt
    if not passes or attempt >= ATTEMPTS - 1 or wait > LONGEST_WAIT:
        raise error
    time.sleep(wait)


def retry_after(error: Exception) -> float | None:
    """Seconds after which the Hub says that it may be asked again, if it does."""
    response = getattr(error, "response", None)
    seconds = response.headers.get("Retry-After", "") if response is not None else ""
    return float(seconds) if seconds.replace(".", "", 1).isdigit() else None


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error stands for."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def is_full(error: BaseException) -> bool:
    """Whether an error means that a disk, a quota or the largest size of a file was reached."""
    told = _OS_ERROR.search(str(error))
    return getattr(error, "errno", None) in FULL or (told is not None and int(told[1]) in FULL)


def _advice(error: Exception, repo_id: str, revision: str | None, resumes: bool) -> str | None:
    again = "do the same again: it continues where it stopped" if resumes else "try again"
    status, said = status_of(error), redacted(getattr(error, "server_message", None) or "").strip()
    if is_full(error):
        return (
            f"the disk is full ({redacted(error)}). Free space, or point TMPDIR (files to be published) or HF_HOME "
            f"(downloads) at a larger disk, and {again}."
        )
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token. Log in with {LOGIN}."
    if isinstance(error, HFValidationError):
        return f"this is no repository id ({redacted(error)}). Give NAMESPACE/NAME."
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on. Unset HF_HUB_OFFLINE, or give a folder."
    if isinstance(error, GatedRepoError):
        return f"it is gated. Ask for access on its page, and log in with {LOGIN}."
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {redacted(repr(revision))}. Give a branch, tag or commit that it has."
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"it is not in the cache and no folder here, and the Hub was not asked or not reached ({_first_line(error)}). "
            "Check the path, or the connection, HF_HUB_OFFLINE and `local_files_only`."
        )
    if isinstance(error, EntryNotFoundError):
        return f"it lacks a file ({_first_line(error)}). Check the id and the revision."
    if isinstance(error, RepositoryNotFoundError) and not said.startswith("Invalid"):
        return f"there is no such repository, or it is private. Check the id; for a private one log in with {LOGIN}."
    if status == 401:
        return f"the Hub does not accept the token, or there is none. Log in with {LOGIN}."
    if status == 403:
        return (
            f"this token may not do that{f' ({said})' if said else ''}. Take a token with write access, or a namespace of your "
            "own (https://huggingface.co/settings/tokens)."
        )
    if status == 409:
        return f"the Hub reports a conflict{f' ({said})' if said else ''}. Look at the repository, and {again}."
    if status == 412:
        return (
            "somebody else committed to it in the meantime, and nothing of yours was committed. Look at what they did; to replace "
            "it, publish again."
        )
    if status == 429:
        seconds = retry_after(error)
        return f"too many requests. Wait {f'{seconds:g} seconds' if seconds else 'a few minutes'}, and {again}."
    if status is not None and status >= 500:
        return f"the Hub answered {status}. This passes: wait a little, and {again}."
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered {status}{f': {said}' if said else ''} ({_first_line(error)})."
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return f"the connection broke ({type(error).__name__}: {_first_line(error)}). Check it, and {again}."
    return None


def _first_line(error: Exception) -> str:
    return next((redacted(line.strip()) for line in str(error).splitlines() if line.strip()), type(error).__name__)

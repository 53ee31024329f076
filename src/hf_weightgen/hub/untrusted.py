"""Files that somebody else made: what is refused before anything in them is built, imported or executed."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open


MAX_JSON_BYTES = 50_000_000
MAX_JSON_DEPTH = 64
_PICKLE = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle|joblib|npy|npz|h5|msgpack)$", re.IGNORECASE)


class UntrustedFileError(ValueError):
    """A file or its name is not what a repository of this library holds."""


def check_names(names: Iterable[str], where: str) -> None:
    """
    Raises:
        UntrustedFileError: If a name is absolute, climbs out of its folder, or is a pickle's.
    """
    for name in names:
        odd = not name or name != name.strip() or name.startswith(("/", "~")) or any(c in name for c in "\\\0:")
        if odd or ".." in name.split("/"):
            raise UntrustedFileError(
                f"{where} holds the file name {name!r}, which could lie outside of its folder; it is refused."
            )
        if _PICKLE.search(name):
            raise UntrustedFileError(
                f"{where} holds {name!r}, a pickle or another format that can run code when loaded; only safetensors are "
                "loaded. Remove the file, or convert it to safetensors with a tool that you trust."
            )


def is_repo_id(value: object) -> bool:
    """Whether a value can be the id of a repository on the Hub."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return isinstance(value, str)


def check_folder(folder: str | Path) -> None:
    """
    Checks names, links, JSON and safetensors of everything in a folder, without building anything.

    Raises:
        UntrustedFileError: The message names the file and what is wrong with it.
    """
    folder = Path(folder).absolute()  # a name like `my-adapter` has no grandparent
    # a snapshot in the cache of huggingface_hub is made of links to the blobs beside it
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":
        homes.append((folder.parents[1] / "blobs").resolve())
    files = []
    for path, folders, names in os.walk(folder):
        for name in (*folders, *names):
            file = Path(path, name)
            if file.is_symlink() and not any(file.resolve().is_relative_to(home) for home in homes):
                raise UntrustedFileError(f"{str(file)!r} is a link that leads out of its folder; it is refused.")
        files += [Path(path, name) for name in names]
    special = next((file for file in files if not file.is_file()), None)
    if special is not None:
        raise UntrustedFileError(f"{str(special)!r} is no regular file; it is refused.")
    check_names((file.relative_to(folder).as_posix() for file in files), repr(str(folder)))
    for file in sorted(files):
        if file.suffix == ".json":
            read_json(file)
        elif file.suffix == ".safetensors":
            read_header(file)


def read_json(file: str | Path):
    """
    Raises:
        UntrustedFileError: If the file is no JSON, larger than any that we write, or nested so deeply that readers break.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UntrustedFileError(f"{str(file)!r} has {size:,} bytes, a JSON file here has at most {MAX_JSON_BYTES:,}.")
    try:
        value = json.loads(file.read_bytes().decode("utf-8"))  # schedulers write -Infinity
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UntrustedFileError(f"{str(file)!r} is no JSON ({why}); download or save it anew.") from error
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level:
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, (dict, list))]
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise UntrustedFileError(f"{str(file)!r} is nested more than {MAX_JSON_DEPTH} deep; it is not loaded.")
    return value


def read_object(file: str | Path) -> dict:
    """A JSON object; raises like [`read_json`], and if it is another value."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise UntrustedFileError(f"{str(file)!r} is no JSON object; download or save it anew.")
    return value


def read_header(file: str | Path) -> dict[str, tuple[int, ...]]:
    """
    Name and shape of every tensor of a safetensors file; the reference implementation compares the header with the file, and
    reads no tensor.

    Raises:
        UntrustedFileError: If the header lies: about its length, the shapes, or where the tensors are.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise UntrustedFileError(
            f"{str(file)!r} is truncated or no safetensors file ({error}); download or save it anew."
        ) from error

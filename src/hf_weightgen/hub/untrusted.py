"""Files that somebody else made: what is refused before anything in them is built, imported or executed."""

import json
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


MAX_HEADER_BYTES = 25_000_000  # of a safetensors file; the limit of the reference implementation is 100 MB
MAX_JSON_BYTES = 50_000_000
MAX_JSON_DEPTH = 64
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.npz", "*.h5", "*.msgpack")
_PICKLE = re.compile(r"\.(" + "|".join(pattern[2:] for pattern in PICKLES) + r")$", re.IGNORECASE)
_DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


class UntrustedFileError(ValueError):
    """A file or its name is not what a repository of this library holds."""


def check_names(names: Iterable[str], where: str) -> None:
    """
    Raises:
        UntrustedFileError: If a name is absolute, climbs out of its folder, or is a pickle's.
    """
    for name in names:
        parts = PurePosixPath(name).parts
        if (
            not name
            or name != name.strip()
            or "\\" in name
            or "\0" in name
            or ":" in name
            or name.startswith(("/", "~"))
        ):
            raise UntrustedFileError(
                f"{where} holds the file name {name!r}, which could lie outside of its folder; it is refused."
            )
        if ".." in parts:
            raise UntrustedFileError(
                f"{where} holds the file name {name!r}, which climbs out of its folder; it is refused."
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
    homes = [
        folder.resolve(),
        *(home.resolve() for home in [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots"),
    ]
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


def read_header(file: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """
    Name, dtype and shape of every tensor of a safetensors file, from its header alone.

    Raises:
        UntrustedFileError: If the header lies: about its length, the shapes, or where the tensors are.
    """
    file = Path(file)

    def refuse(why: str):
        return UntrustedFileError(
            f"{str(file)!r} is truncated or no safetensors file ({why}); download or save it anew."
        )

    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            raise refuse(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise refuse(f"its header wants {length:,} bytes, the file has {size:,}")
        data = opened.read(length)
    try:
        header = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is no JSON: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise refuse("its header is no JSON object")
    tensors, spans = {}, []
    for name, told in header.items():
        if name == "__metadata__":
            continue
        match told:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if dtype in _DTYPES:
                pass
            case _:
                raise refuse(f"tensor {name!r} has no known dtype, shape and place")
        if not all(type(n) is int and n >= 0 for n in shape) or not 0 <= begin <= end:
            raise refuse(f"tensor {name!r} has the shape {shape} at {begin} to {end}")
        numel = 1
        for n in shape:
            numel *= n
        if numel * _DTYPES[dtype] != end - begin:
            raise refuse(f"tensor {name!r} of shape {shape} cannot lie in {end - begin:,} bytes")
        tensors[name] = (dtype, tuple(shape))
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise refuse(f"its tensors leave a gap or overlap at byte {at}")
        at = end
    if 8 + length + at != size:
        raise refuse(f"its tensors end at byte {8 + length + at:,}, the file at {size:,}")
    return tensors

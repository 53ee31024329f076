"""Weights written to files as they come, tensor by tensor: what is in memory is one shard, however large the network is."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


SHARD_SIZE = 5 * 10**9  # bytes, as in transformers
NAME = "model"
INDEX = f"{NAME}.safetensors.index.json"
OURS = re.compile(NAME + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_size: int = SHARD_SIZE) -> list[Path]:
    """
    Args:
        tensors: Names and tensors.
        folder: Gets `model.safetensors`, or `model-00001-of-00003.safetensors`, ... with their index, as transformers names and reads
            them, once all tensors have been written.
        shard_size: Bytes of a shard, which a single tensor may exceed.

    Returns:
        `list[Path]`: The files with weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".weightgen-") as temporary:
        written: list[list[str]] = []  # names of each shard
        shard: dict[str, Tensor] = {}
        total = size = 0

        def close() -> None:
            save_file(shard, Path(temporary) / f"{len(written)}", metadata={"format": "pt"})
            written.append(list(shard))
            shard.clear()

        for name, tensor in tensors:
            bytes_ = tensor.numel() * tensor.element_size()
            if shard and size + bytes_ > shard_size:
                close()
                size = 0
            shard[name] = tensor.contiguous()
            size, total = size + bytes_, total + bytes_
        if shard or not written:
            close()
        count = len(written)
        names = [f"{NAME}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if count > 1 else [f"{NAME}.safetensors"]
        places = {tensor: name for own, name in zip(written, names, strict=True) for tensor in own}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (Path(temporary) / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        moved = [(str(i), name) for i, name in enumerate(names)] + ([(INDEX, INDEX)] if count > 1 else [])
        for made, name in moved:
            shutil.copymode(Path(temporary) / INDEX, Path(temporary) / made)  # it is written for its owner alone
            os.replace(Path(temporary) / made, folder / name)
    kept = {name for _, name in moved}
    for old in folder.iterdir():  # of an earlier network, in other shards
        if OURS.fullmatch(old.name) and old.name not in kept:
            old.unlink()
    return [folder / name for name in names]


def sample_folders(root: Path, count: int) -> list[Path]:
    """
    Where `count` samples are saved: one in the folder itself, several as `0000`, `0001`, ... in it. Nothing is written.

    Raises:
        ValueError: If a file is in the way, or samples of an earlier call would stay among them.
    """
    if root == Path():
        raise ValueError("`save_directory` is empty or the folder that you stand in; name a folder.")
    folders = [root] if count == 1 else [root / f"{i:04d}" for i in range(count)]
    file = next((path for path in (*folders, root, *root.parents) if path.is_file()), None)
    if file is not None:
        raise ValueError(f"`save_directory` {str(root)!r}: {str(file)!r} is a file; give a folder.")
    old = sorted(path.name for path in root.glob("[0-9]" * 4) if path not in folders)
    if count > 1:
        old += sorted(
            path.name for path in root.glob("*.safetensors") if OURS.fullmatch(path.name.removeprefix("adapter_"))
        )
    if old:
        raise ValueError(
            f"`save_directory` {str(root)!r} holds the sample {old[0]!r} of an earlier call, which would be taken for one of this "
            "call; give another folder, or delete it."
        )
    return folders

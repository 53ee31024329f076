"""One row of a zoo is one checkpoint: its weights, and all that is known of where they come from.

Float tensors lie in one flat column that a viewer, SQL and Arrow can read; tensors of other dtypes travel beside them
as safetensors bytes. A state dict that went into a row comes out of it bit-exact and in the same order.

Notation used for shapes:
    - D: scalars of all float32, float16 and bfloat16 tensors of a checkpoint
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from datasets import Dataset, Features, Json, List, Value
from safetensors import SafetensorError
from torch import Tensor

from ..weights.layout import dtype_name
from .parquet import list_array, write_tables


FLAT_DTYPES = ("float32", "float16", "bfloat16")  # float32 holds them exactly; all other dtypes go into `extra`
SPLITS = ("train", "held_out", "base")
METRICS = ("validation", "test")

FEATURES = Features(
    {
        "id": Value("string"),
        "task": Value("string"),
        "family": Value("string"),
        "split": Value("string"),
        "text": Value("string"),
        "labels": List(Value("string")),
        "seed": Value("int64"),
        "checkpoint": Value("int64"),
        "epoch": Value("float64"),
        "metrics": {name: Value("float64") for name in METRICS},
        "arch": Json(),
        "tensors": List({"name": Value("string"), "shape": List(Value("int64")), "dtype": Value("string")}),
        "weights": List(Value("float32")),
        "extra": Value("large_binary"),
        "provenance": Json(),
    }
)
HALF_FEATURES = Features({**FEATURES, "weights": List(Value("float16"))})

ROWS_PER_GROUP = 64  # rows that are in memory together while a shard is written, and the unit of streaming

ENCODING = {
    # repeated words are stored once; signs and exponents of all weights side by side compress better
    "use_dictionary": ["id", "task", "family", "split", "text", "arch", "provenance", "tensors.list.element.name"],
    "use_byte_stream_split": ["weights.list.element"],
}
_REPAIR = "train or harvest the row again, or drop it from the zoo"


def make_row(
    state_dict: Mapping[str, Tensor],
    *,
    id: str,
    task: str,
    family: str,
    split: str,
    text: str,
    labels: Sequence[str],
    seed: int | None,
    checkpoint: int | None,
    epoch: float | None,
    arch: Mapping,
    metrics: Mapping[str, float | None],
    provenance: Mapping,
) -> dict:
    """
    Puts a checkpoint into a row of [`FEATURES`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The checkpoint; its order is kept.
        id (`str`): What names the row in the whole zoo.
        split (`str`): `"train"`, `"held_out"` (never used to train a generator) or `"base"` (the shared start).
        seed, checkpoint, epoch: `None` where it is not known.
        metrics (`Mapping[str, float]`): `validation` and `test`, fractions; absent, `None` or NaN is not measured.
        arch, provenance (`Mapping`): Anything that JSON can hold.

    Raises:
        ValueError: If a weight is NaN or infinite, or a field cannot be stored; the message names the row.
    """
    if not isinstance(id, str) or not id:
        raise ValueError(f"`id` names a row of the zoo and must be a non-empty string, got {id!r}.")
    if split not in SPLITS:
        raise ValueError(f"Row {id!r}: `split` must be one of {list(SPLITS)}, got {split!r}.")
    if isinstance(labels, str):
        raise ValueError(f"Row {id!r}: `labels` is a sequence of names, got the string {labels!r}.")
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"Row {id!r}: `metrics` has {unknown}; only {list(METRICS)} fit, others go to `provenance`.")
    tensors, flat, beside = [], [], {}
    for name, tensor in state_dict.items():
        value, dtype = tensor.detach().cpu(), dtype_name(tensor.dtype)
        if not _is_finite(value):
            raise ValueError(
                f"Row {id!r}: tensor {name!r} holds NaN or infinite weights; a zoo takes finite weights only. "
                "Lower the learning rate, or leave this checkpoint out."
            )
        tensors.append({"name": name, "shape": list(value.shape), "dtype": dtype})
        if dtype in FLAT_DTYPES:
            flat.append(value.float().flatten().numpy())
        else:
            beside[name] = value.clone(memory_format=torch.contiguous_format)  # safetensors refuses shared memory
    scores = {name: metrics.get(name) for name in METRICS}
    return {
        "id": id,
        "task": task,
        "family": family,
        "split": split,
        "text": text,
        "labels": list(labels),
        "seed": seed,
        "checkpoint": checkpoint,
        "epoch": epoch,
        "metrics": {k: None if v is None or math.isnan(v) else float(v) for k, v in scores.items()},
        "arch": _plain(arch, "arch", id),
        "tensors": tensors,
        "weights": np.concatenate(flat) if flat else np.empty(0, np.float32),  # (D,)
        "extra": safetensors.torch.save(beside) if beside else None,
        "provenance": _plain(provenance, "provenance", id),
    }


def row_to_state_dict(row: Mapping) -> dict[str, Tensor]:
    """
    Inverse of [`make_row`], for a row as it was made or as `datasets` gives it back in any format.

    Raises:
        ValueError: If the row holds NaN or infinite weights, or its columns contradict each other.
    """
    row_id, flat = str(row["id"]), row["weights"]
    flat = flat.numpy() if isinstance(flat, Tensor) else np.asarray(flat)
    # a copy, since Arrow's memory is read-only and may be a file
    values = torch.from_numpy(np.array(flat, dtype=np.float32))  # (D,)
    specs = [(str(t["name"]), tuple(int(n) for n in t["shape"]), str(t["dtype"])) for t in row["tensors"]]
    numels = [math.prod(shape) for _, shape, dtype in specs if dtype in FLAT_DTYPES]
    if sum(numels) != len(values):
        raise ValueError(
            f"Row {row_id!r}: `weights` has {len(values)} scalars, the shapes in `tensors` ask for {sum(numels)}; "
            f"the row is damaged: {_REPAIR}."
        )
    beside = _read_extra(row_id, row.get("extra"))
    pieces = iter(values.split(numels))
    state_dict = {}
    for name, shape, dtype in specs:
        if dtype in FLAT_DTYPES:
            # a clone, so that no tensor keeps the whole row alive and each can be saved or changed by itself
            state_dict[name] = next(pieces).view(shape).to(getattr(torch, dtype), copy=True)
        elif name in beside and (tuple(beside[name].shape), dtype_name(beside[name].dtype)) == (shape, dtype):
            state_dict[name] = beside[name]
        else:
            came = f"{beside[name].dtype} {tuple(beside[name].shape)}" if name in beside else "no such tensor"
            raise ValueError(
                f"Row {row_id!r}: tensor {name!r} should be {dtype} {shape}, `extra` has {came}; "
                f"the row is damaged: {_REPAIR}."
            )
    for name, tensor in state_dict.items():
        if not _is_finite(tensor):
            raise ValueError(f"Row {row_id!r}: tensor {name!r} holds NaN or infinite weights; {_REPAIR}.")
    return state_dict


def zoo_state_dicts(dataset: Dataset, indices: Iterable[int] | None = None) -> Iterator[dict[str, Tensor]]:
    """
    The checkpoints of a zoo one after the other, read through Arrow: no Python float is made on the way.

    Args:
        dataset ([`~datasets.Dataset`]): A zoo, see [`load_zoo`], also after `select` or `filter`.
        indices (`Iterable[int]`, *optional*): Which rows, in this order; all by default.

    Raises:
        ValueError: If a row holds NaN or infinite weights, or is damaged; the message names it.
    """
    arrow = dataset.select_columns(["id", "tensors", "weights", "extra"]).with_format("arrow")
    chosen = range(len(dataset)) if indices is None else [int(i) for i in indices]
    for start in range(0, len(chosen), ROWS_PER_GROUP):
        table = arrow[list(chosen[start : start + ROWS_PER_GROUP])]
        yield from (_arrow_state_dict(table, i) for i in range(len(table)))


def _arrow_state_dict(table: pa.Table, i: int) -> dict[str, Tensor]:
    row = {name: table.column(name)[i] for name in ("id", "tensors", "weights", "extra")}  # nothing is copied yet
    return row_to_state_dict({k: v.values.to_numpy() if k == "weights" else v.as_py() for k, v in row.items()})


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch has no `isfinite` for 8-bit floats
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def rows_to_table(rows: Sequence[Mapping], half: bool = False) -> pa.Table:
    """Rows as an Arrow table with the schema of [`FEATURES`], or of [`HALF_FEATURES`] with weights in float16."""
    schema = FEATURES.arrow_schema
    arrays = []
    for field in schema:
        if field.name == "weights":
            flat = [np.asarray(row["weights"], dtype=np.float32) for row in rows]
            arrays.append(list_array([len(w) for w in flat], np.concatenate(flat)))
        elif isinstance(FEATURES[field.name], Json):
            text = [json.dumps(row[field.name], ensure_ascii=False) for row in rows]
            arrays.append(pa.ExtensionArray.from_storage(field.type, pa.array(text, pa.string())))
        else:
            arrays.append(pa.array([row[field.name] for row in rows], field.type))
    table = pa.table(arrays, schema=schema)
    return to_half(table) if half else table


def to_half(table: pa.Table) -> pa.Table:
    """A table of rows with its weights in float16; raises a ValueError for a weight that is no number there."""
    schema = HALF_FEATURES.arrow_schema
    weights = table.column("weights").combine_chunks()
    with np.errstate(over="ignore"):  # reported below, with a name
        rounded = list_array(weights.value_lengths(), weights.flatten().to_numpy().astype(np.float16))
    table = table.set_column(schema.get_field_index("weights"), schema.field("weights"), rounded)
    try:
        check_finite(table)
    except ValueError as error:
        raise ValueError(f"{error} Weights beyond 65504 do not fit into float16: write with `half=False`.") from error
    return table.replace_schema_metadata(schema.metadata)


def check_finite(table: pa.Table) -> None:
    weights = table.column("weights").combine_chunks()
    bad = np.flatnonzero(~np.isfinite(weights.flatten().to_numpy()))
    if len(bad):
        row = np.searchsorted(np.cumsum(weights.value_lengths()), bad[0], side="right")
        _arrow_state_dict(table, int(row))  # raises, and names the row and the tensor


def _plain(value: Mapping, column: str, row_id: str) -> dict:
    """What JSON keeps of `value`: a fresh row equals the same row read back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Row {row_id!r}: `{column}` cannot be JSON ({error}); use strings, finite numbers, lists and dicts."
        ) from error


def _read_extra(row_id: str, extra: bytes | None) -> dict[str, Tensor]:
    if extra is None:
        return {}
    try:
        return safetensors.torch.load(bytes(extra))
    except SafetensorError as error:
        raise ValueError(
            f"Row {row_id!r}: `extra` is no safetensors ({error}). The numpy and torch formats of `datasets` drop "
            f"zero bytes at its end: read the row with `with_format(None)`. If that is no help, {_REPAIR}."
        ) from error


def write_shard(path: str | Path, rows: Iterable[Mapping], half: bool = False) -> Path:
    """
    Writes rows into one Parquet file, which appears under its name only when it is complete and on disk.

    Args:
        path (`str` or `Path`): The file; one that is there is replaced.
        rows (`Iterable[Mapping]`): Rows of [`make_row`] or of a zoo; read a few at a time.
        half (`bool`): Whether the weights are rounded to float16.

    Raises:
        ValueError: If there is no row, two rows have one id, or float16 cannot hold a weight; nothing is written.
    """
    rows, seen = iter(rows), set()

    def tables():
        while batch := list(islice(rows, ROWS_PER_GROUP)):
            for row in batch:
                if row["id"] in seen:
                    raise ValueError(f"Two rows have the id {row['id']!r}; every row of a zoo needs an id of its own.")
                seen.add(row["id"])
            yield rows_to_table(batch, half)

    return write_tables(path, tables(), (HALF_FEATURES if half else FEATURES).arrow_schema, **ENCODING)

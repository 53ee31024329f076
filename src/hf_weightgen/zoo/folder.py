"""Zoos as folders and repositories of Parquet shards `data/train-*.parquet`, the Hub's own layout: `load_dataset(folder)` and the viewer need nothing else.
A shard appears whole or not at all, so that a kill at any moment loses no finished row.
"""

import glob
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HTTPError

from ..hub.cards import needs_card, readdress, write_card
from ..hub.errors import explained
from ..hub.publish import upload
from .parquet import read_table, write_tables
from .schema import ENCODING, FEATURES, HALF_FEATURES, ROWS_PER_GROUP, check_finite, to_half, write_shard


# Words between separators of a file name that `datasets` takes for the name of a split.
_SPLIT_WORDS = "training|train|validation|valid|val|dev|testing|test|evaluation|eval"
_SPLIT_WORD = re.compile(rf"(?<![^-._ 0-9])({_SPLIT_WORDS})(?![^-._ 0-9])")


class ZooFolder:
    """
    A zoo that grows on disk, one shard per group of rows that are finished together.

    Args:
        path (`str` or `Path`): The folder; shards lie in its `data/`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def shards(self) -> list[Path]:
        """All complete shards, sorted by name; what a killed run left half-written has another kind of name."""
        return sorted((self.path / "data").glob("*.parquet"))

    def finished(self) -> set[str]:
        """
        Ids of all rows in complete shards.

        Raises:
            ValueError: If a shard cannot be read, or two shards hold one id.
        """
        return {row_id for row_id, _, _ in self.index()}

    def index(self) -> list[tuple[str, Path, int]]:
        """`(id, shard, row in the shard)` of every row, sorted by id. Raises like [`~ZooFolder.finished`]."""
        rows = []
        for shard in self.shards():
            rows += [(row_id, shard, i) for i, row_id in enumerate(read_table(shard, ["id"]).column("id").to_pylist())]
        rows.sort()
        for (row_id, first, _), (other, second, _) in zip(rows, rows[1:], strict=False):
            if row_id == other:
                raise ValueError(f"Row {row_id!r} stands in {first} and in {second}; delete one of the two shards.")
        return rows

    def add(self, group_name: str, rows: Iterable[Mapping]) -> Path:
        """
        Writes the rows of one group as a shard; rows that the group already has under other ids are kept.

        Args:
            group_name (`str`): For example `"sst2-s3"`, which becomes `data/train-sst2-s3.parquet`.

        Raises:
            ValueError: If a row stands in another shard already; nothing is written then.
        """
        if not group_name:
            raise ValueError("`group_name` names a shard of the zoo and must not be empty.")
        # with "~" the word is no split, whose files would be read as another split or twice
        name = _SPLIT_WORD.sub(r"\1~", quote(group_name, safe=""))
        path = self.path / "data" / f"train-{name}.parquet"
        rows = list(rows)
        new = {row["id"] for row in rows}
        for row_id, shard, _ in self.index():
            if row_id in new and shard != path:
                raise ValueError(f"Row {row_id!r} of group {group_name!r} stands in {shard}; give it another id.")
        if path.exists():
            rows = [row for row in Dataset(read_table(path, FEATURES)) if row["id"] not in new] + rows
        return write_shard(path, rows)

    def row(self, id: str) -> dict:
        """
        One row by its id.

        Raises:
            KeyError: If no complete shard holds it.
        """
        for row_id, shard, i in self.index():
            if row_id == id:
                return Dataset(read_table(shard, FEATURES).slice(i, 1))[0]
        raise KeyError(f"{self.path} has no row {id!r} in its {len(self.shards())} shards.")


def load_zoo(
    path_or_id: str | Path,
    revision: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    filters: Sequence[tuple] | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Dataset | IterableDataset:
    """
    A zoo as a dataset with the columns of [`FEATURES`], all splits of the column `split` together.

    Args:
        path_or_id (`str` or `Path`): A folder, one Parquet file, or the id of a dataset on the Hub.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        streaming (`bool`): Rows are read as they are asked for; nothing is downloaded before.
        columns (sequence of `str`, *optional*): Only these columns are read.
        filters (sequence of tuples, *optional*): Only matching rows are read, e.g. `[("task", "==", "sst2")]`.
        token, cache_dir: As in [`~datasets.load_dataset`].

    Raises:
        ValueError: If a shard of the folder cannot be read, or the dataset is no zoo; the message says which.
        FileNotFoundError: If the folder has no shard.
        HubError: If the Hub does not give the dataset.
    """
    unknown = [name for name in columns or () if name not in FEATURES]
    if unknown or (columns is not None and not 1 <= len(columns) == len(set(columns))):
        wrong = (
            f"A zoo has no column {unknown[0]!r}"
            if unknown
            else f"`columns` must name different columns, got {columns!r}"
        )
        raise ValueError(f"{wrong}; it has {list(FEATURES)}.")
    path = Path(path_or_id)
    if path.is_file():
        read_table(path, ["id"])
        files = glob.escape(str(path))
    elif path.is_dir():
        if not ZooFolder(path).finished():
            raise FileNotFoundError(f"{path} has no shard `data/*.parquet`, so it is no zoo; build one there first.")
        files = f"{glob.escape(str(path))}/data/*.parquet"
    else:
        if path.is_absolute() or str(path_or_id).startswith(".") or len(path.parts) > 2:
            raise FileNotFoundError(f"{path_or_id} is no folder and no file, and cannot be the id of a dataset.")
        with explained("loading", str(path_or_id), revision):
            commit = HfApi(token=token).dataset_info(str(path_or_id), revision=revision).sha
        # not by the id alone: the card of a repository could then name files that lie elsewhere
        files = f"hf://datasets/{path_or_id}@{commit}/data/*.parquet"
    wanted = {name: list(given) for name, given in (("columns", columns), ("filters", filters)) if given is not None}
    with explained("loading", str(path_or_id), revision):
        try:
            zoo = load_dataset(
                "parquet",
                data_files={"train": files},
                split="train",
                streaming=streaming,
                token=token,
                cache_dir=None if cache_dir is None else str(cache_dir),
                **wanted,
            )
            features = zoo.features or zoo.resolve_features().features
        except (HTTPError, FileNotFoundError):
            raise
        except Exception as error:  # of datasets or Arrow, about columns that are no zoo's, or a filter
            why = error.__cause__ or error
            raise ValueError(
                f"{path_or_id} does not load as a zoo ({type(why).__name__}: {why}); check `filters`, or download it anew."
            ) from error
    lacking = [name for name in columns or FEATURES if name not in features]
    if lacking:
        raise ValueError(f"{path_or_id} is no zoo: it has no column {lacking[0]!r}, and a zoo has {list(FEATURES)}.")
    return zoo


def push_zoo(
    folder: str | Path,
    repo_id: str,
    *,
    half: bool = False,
    rows_per_shard: int = 2_000,
    leave_out: Sequence[str] = (),
    **settings,
) -> CommitInfo:
    """
    Publishes a zoo as a dataset of Parquet shards; the same rows make the same files, so that a broken publication
    continues.

    Args:
        folder (`str` or `Path`): The folder of a [`ZooFolder`]; a card of this library in it is published with it.
        half, leave_out: See [`merge`].
        rows_per_shard (`int`): How many rows a file holds.
        settings: Of [`~hub.publish.upload`].

    Raises:
        FileNotFoundError: If the folder has no shard. ValueError: If a shard is damaged. HubError: If the Hub or the disk fails.
    """
    if rows_per_shard < 1:
        raise ValueError(f"`rows_per_shard` must be at least 1, got {rows_per_shard}.")
    index = [row_id for row_id, _, _ in ZooFolder(folder).index() if not row_id.endswith(tuple(leave_out))]
    if not index:
        raise FileNotFoundError(f"{folder} has no shard `data/*.parquet`, so it is no zoo; build one there first.")
    with tempfile.TemporaryDirectory(prefix="weightgen-") as temporary, explained("publishing to", repo_id):
        merge(folder, temporary, half, -(-len(index) // rows_per_shard), leave_out)
        if not needs_card(folder) and not (Path(folder) / "README.md").is_symlink():
            shutil.copyfile(Path(folder) / "README.md", Path(temporary) / "README.md")
        else:
            base, told = describe(temporary)
            write_card(temporary, "zoo", base_model=base, generator=repo_id, facts=told)
        readdress(temporary, repo_id, revision=settings.get("revision"))
        return upload(Path(temporary), repo_id, **settings)


def describe(folder: str | Path) -> tuple[str | None, dict[str, str]]:
    """The base model that all rows of a zoo have in common, if they have one, and what a card tells of its rows."""
    columns = ["task", "split", "seed", "arch"]
    table = pa.concat_tables([read_table(shard, columns) for shard in ZooFolder(folder).shards()])
    tasks, splits, seeds, archs = (table.column(name).to_pylist() for name in columns)
    bases = {(json.loads(arch) if isinstance(arch, str) else arch).get("base_model") for arch in archs}
    count = ", ".join(f"{split}: {splits.count(split):,}" for split in sorted(set(splits)))
    return bases.pop() if len(bases) == 1 else None, {
        "rows": f"{len(table):,} ({count})",
        "tasks": ", ".join(sorted({task for task, split in zip(tasks, splits, strict=True) if split != "base"})),
        "seeds": ", ".join(map(str, sorted({seed for seed in seeds if seed is not None}))),
    }


def merge(folder: str | Path, out: str | Path, half: bool = True, num_shards: int = 1, leave_out=()) -> list[Path]:
    """
    Writes a zoo compactly for publication: rows sorted by id, the same bytes for the same rows.

    Args:
        folder (`str` or `Path`): The folder of a [`ZooFolder`].
        out (`str` or `Path`): A `.parquet` file, or a folder that gets `data/train-00000-of-0000n.parquet`.
        half (`bool`): Whether the weights are rounded to float16.
        num_shards (`int`): How many files a folder gets.
        leave_out (sequence of `str`): Ends of the ids of rows that are not written, as `"-c0"` for first checkpoints.

    Returns:
        `list[Path]`: The files written.

    Raises:
        ValueError: If a shard is damaged, float16 cannot hold a weight, or `out` holds other shards.
    """
    out, rows = Path(out), [row for row in ZooFolder(folder).index() if not row[0].endswith(tuple(leave_out))]
    most = 1 if out.suffix == ".parquet" else max(1, len(rows))
    if not 1 <= num_shards <= most:
        raise ValueError(f"`num_shards` must be 1 to {most} for {len(rows)} rows in {out}, got {num_shards}.")
    if out.suffix == ".parquet":
        files = [out]
    else:
        files = [out / "data" / f"train-{i:05d}-of-{num_shards:05d}.parquet" for i in range(num_shards)]
    others = [p for p in sorted(files[0].parent.glob("*.parquet")) if p not in files]
    if others and files[0].parent.name == "data":
        raise ValueError(f"{others[0]} would be read together with the merged rows; use an empty folder.")

    @lru_cache(maxsize=4)  # after sorting, rows of one shard are still mostly neighbours
    def read(shard):
        return read_table(shard, FEATURES).cast(FEATURES.arrow_schema)  # a published zoo may be in float16

    def tables(part):
        for start in range(0, len(part), ROWS_PER_GROUP):
            batch = part[start : start + ROWS_PER_GROUP]
            runs = [(shard, [i for _, _, i in run]) for shard, run in groupby(batch, key=lambda row: row[1])]
            table = pa.concat_tables([read(shard).take(at) for shard, at in runs])
            check_finite(table)
            yield to_half(table) if half else table

    bounds = [len(rows) * i // num_shards for i in range(num_shards + 1)]
    schema = (HALF_FEATURES if half else FEATURES).arrow_schema
    return [
        write_tables(file, tables(rows[start:stop]), schema, **ENCODING)
        for file, start, stop in zip(files, bounds, bounds[1:], strict=False)
    ]

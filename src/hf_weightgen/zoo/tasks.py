"""The data of task specs: splits, de-duplication over tasks, evaluation subsets.

Every split is decided by a hash of the text, so that it depends neither on a seed, nor on the order of the rows, nor
on the machine. Rows whose texts are equal up to case, spaces and punctuation have one *key* and always go together.

    test        the spec's test split, or, where it has none, the fifth of the train split with the lowest hashes
    validation  up to 1,000 rows, and at most 15 %, of the train split, those with the lowest hashes of the rest
    train       what remains, without any key that stands in the test or validation split of *any* task at hand

Text sets overlap (most SST-2 validation sentences stand in the train split of rotten_tomatoes), so load all the tasks
whose figures will stand beside each other in one call.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset_builder

from ..targets.tasks import TaskSpec


TEST_FRACTION = 0.2  # of the train split, where the spec has no test split
VALIDATION_FRACTION = 0.15
MAX_VALIDATION_ROWS = 1_000
TEST_LIMIT = 1_000  # rows on which a test figure is computed, see `evaluation_subset`
VALIDATION_LIMIT = 500

_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class TaskData:
    """
    The rows of one task.

    Args:
        spec ([`TaskSpec`]):
            What was asked for.
        train, validation, test ([`~datasets.Dataset`]):
            Columns `text`, for pair tasks also `text_pair`, and `label`, a `ClassLabel` over `spec.labels`.
        removed_duplicates (`int`):
            Rows of the train split that are used nowhere, because their key stands in the test or validation split
            of one of the tasks that were loaded together.
        data_revision (`str`):
            The commit of the dataset on the Hub where it is known, else `"content:"` and the hash of the rows read.
    """

    spec: TaskSpec
    train: Dataset
    validation: Dataset
    test: Dataset
    removed_duplicates: int
    data_revision: str


@dataclass
class _Rows:
    """Usable rows of one split as columns, with the key of each row (16 bytes that also serve as its hash)."""

    texts: tuple[list[str], ...]
    labels: list[int]
    keys: list[bytes]

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: Iterable[bool]) -> "_Rows":
        at = [i for i, kept in enumerate(keep) if kept]
        *texts, labels, keys = ([column[i] for i in at] for column in (*self.texts, self.labels, self.keys))
        return _Rows(tuple(texts), labels, keys)


def load_tasks(
    specs: Iterable[TaskSpec], data_root: str | Path | None = None, cache: str | Path | None = None
) -> dict[str, TaskData]:
    """
    Reads the datasets of all specs, splits them, and keeps their test and validation rows out of every train split.

    Args:
        specs (`Iterable[TaskSpec]`):
            Tasks with distinct names.
        data_root (`str` or `Path`, *optional*):
            Folder that holds a copy of each dataset under its Hub id (`data_root/stanfordnlp/sst2`); nothing is then
            asked of the network. Default: a dataset id that is a local folder is read there, any other on the Hub.
        cache (`str` or `Path`, *optional*):
            Folder for the Arrow files that `datasets` prepares. Default: its own cache.

    Returns:
        `dict[str, TaskData]`: by task name, in the order of the specs.

    Raises:
        FileNotFoundError: If a dataset cannot be found or reached.
        ValueError: If a configuration, split or column is missing, a label does not fit the spec, or a split is left
            without rows. Both name the task and what to do.
    """
    specs = list(specs)
    for spec in specs:
        if spec.image_column is not None:
            raise ValueError(f"Task {spec.name!r} has images, not texts; see `load_images`.")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Task {name!r} was given twice; names are the keys of the result, so rename one.")
    read = {spec.name: _read(spec, data_root, cache) for spec in specs}

    tasks = {}
    separated = separate(specs, {name: (train, test) for name, (train, test, _) in read.items()})
    for spec in specs:
        *rows, removed = separated[spec.name]
        tasks[spec.name] = TaskData(spec, *(_to_dataset(spec, part) for part in rows), removed, read[spec.name][2])
    return tasks


def separate(specs: Sequence[TaskSpec], read: Mapping[str, tuple]) -> dict[str, tuple]:
    """
    Splits the rows of tasks, and keeps the test and validation rows of all of them out of every train split.

    Args:
        read: By task name the rows of its train and of its test split, `None` if it has none. Rows have a length, the `keys`
            of each, and `where(keep)`.

    Returns:
        By task name its train, validation and test rows, and how many rows of its train split are used nowhere.

    Raises:
        ValueError: If a split is left without rows.
    """
    splits = {}
    for spec in specs:
        train, test = read[spec.name]
        if test is None:
            test, train = _split(train, int(TEST_FRACTION * len(train)))
        # chosen before anything is removed: which rows may ever be trained on does not depend on the other tasks
        validation, train = _split(train, min(MAX_VALIDATION_ROWS, int(VALIDATION_FRACTION * len(train))))
        splits[spec.name] = train, validation, test

    test_keys = {key for _, _, test in splits.values() for key in test.keys}
    held_out_keys = test_keys.union(*(validation.keys for _, validation, _ in splits.values()))
    separated = {}
    for spec in specs:
        train, validation, test = splits[spec.name]
        kept_train = train.where(key not in held_out_keys for key in train.keys)
        kept_validation = validation.where(key not in test_keys for key in validation.keys)
        for split, rows in (("train", kept_train), ("validation", kept_validation), ("test", test)):
            if not len(rows):
                raise ValueError(
                    f"Task {spec.name!r}: its {split} split is left with no rows (of {len(train) + len(validation)} "
                    f"in {spec.train_split!r} and {len(test)} in the test split); give it a larger dataset, load it "
                    "without the tasks whose test texts it holds, or, if its test split repeats its train split, set "
                    "`test_split` to None: a part of the train split is then held out."
                )
        removed = len(train) - len(kept_train) + len(validation) - len(kept_validation)
        separated[spec.name] = kept_train, kept_validation, test, removed
    return separated


def _split(rows, limit: int) -> tuple:
    """At most `limit` rows, those with the lowest keys, and the others."""
    chosen = lowest_keys(rows.keys, limit)
    return rows.where(key in chosen for key in rows.keys), rows.where(key not in chosen for key in rows.keys)


def text_key(*texts: str) -> bytes:
    """
    16 bytes that are equal for texts that differ only in case, spaces and punctuation, and for pairs of such texts in
    either order; they order rows as if at random. A text without any letter or digit, such as an emoticon, stands for
    itself.
    """
    plain = sorted(_NOT_ALPHANUMERIC.sub("", text.lower()) or text.strip() for text in texts)
    return hashlib.blake2b("\n".join(plain).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def lowest_keys(keys: Sequence[bytes], limit: int) -> set[bytes]:
    """The lowest keys that at most `limit` rows have together; a row comes with all its duplicates or not at all."""
    chosen: set[bytes] = set()
    ordered, rows = sorted(keys), 0
    while rows < len(ordered):
        end = rows + 1
        while end < len(ordered) and ordered[end] == ordered[rows]:
            end += 1
        if end > limit:
            break
        chosen.add(ordered[rows])
        rows = end
    return chosen


def evaluation_subset(dataset: Dataset, limit: int | None) -> Dataset:
    """
    At most `limit` rows, those with the lowest keys, in the order of the dataset. Always the same rows, and those of
    a smaller limit are among those of a larger one. `None` takes all.

    Raises:
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1 row, got {limit}; pass `None` for all rows.")
    if limit is None or len(dataset) <= limit:
        return dataset
    keys = [text_key(*texts) for texts in zip(*_text_columns(dataset), strict=True)]
    lowest = sorted(range(len(keys)), key=lambda i: (keys[i], i))[:limit]
    return Dataset.from_dict(dataset.with_format(None)[sorted(lowest)], features=dataset.features)


def data_hash(dataset: Dataset) -> str:
    """32 hex digits over texts, labels and their order: equal exactly for equal rows in equal order."""
    return _content_hash(_text_columns(dataset), dataset.with_format(None)[:]["label"])


def _text_columns(dataset: Dataset) -> list[list[str]]:
    rows = dataset.with_format(None)[:]
    return [rows[name] for name in ("text", "text_pair") if name in rows]


def _content_hash(texts: Sequence[list[str]], labels: list[int]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in zip(*texts, labels, strict=True):
        for value in row:
            data = str(value).encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)  # the length keeps ("ab", "c") from ("a", "bc")
    return digest.hexdigest()


def _to_dataset(spec: TaskSpec, rows: _Rows) -> Dataset:
    columns = dict(zip(("text", "text_pair"), rows.texts, strict=False))
    features = {name: Value("string") for name in columns} | {"label": ClassLabel(names=list(spec.labels))}
    return Dataset.from_dict({**columns, "label": rows.labels}, features=Features(features))


def _read(spec: TaskSpec, data_root, cache) -> tuple[_Rows, _Rows | None, str]:
    """Usable rows of the train split and of the test split (`None` if the spec has none), and the data revision."""
    splits, commit = open_dataset(spec, data_root, cache)
    read = []
    for split in filter(None, (spec.train_split, spec.test_split)):
        if split not in splits:
            raise ValueError(
                f"Task {spec.name!r}: dataset {spec.dataset_id!r} has no split {split!r}, only {list(splits)}; "
                "set `train_split` and `test_split` of the spec accordingly."
            )
        read.append(_usable_rows(spec, split, splits[split]))
    content = [_content_hash(rows.texts, rows.labels) for rows in read]
    revision = commit or "content:" + hashlib.blake2b("".join(content).encode(), digest_size=16).hexdigest()
    return read[0], read[1] if len(read) > 1 else None, revision


def open_dataset(spec: TaskSpec, data_root, cache=None) -> tuple[DatasetDict, str | None]:
    """All splits of the dataset, and its commit on the Hub if it came from there; see [`load_tasks`]."""
    source, revision = spec.dataset_id, spec.revision
    if data_root is not None and (Path(data_root) / source).is_dir():
        source, revision = str(Path(data_root) / source), None
    elif Path(source).is_dir():
        revision = None
    elif data_root is not None or Path(source).is_absolute():
        where = source if data_root is None else Path(data_root) / source
        raise FileNotFoundError(
            f"Task {spec.name!r}: no dataset folder {str(where)!r}; put a copy of {source!r} there, or leave "
            "`data_root` out to read it from the Hub."
        )
    try:
        builder = load_dataset_builder(
            source, spec.config, revision=revision, cache_dir=None if cache is None else str(cache)
        )
        builder.download_and_prepare()
    except ValueError as error:  # an unknown configuration; `datasets` lists the known ones
        raise ValueError(
            f"Task {spec.name!r}: dataset {source!r} does not load: {error}. Set `dataset_id` and `config` of "
            f"the spec (now {spec.config!r}) accordingly."
        ) from error
    except Exception as error:  # network, authorisation, unreadable files: many types, one remedy
        raise FileNotFoundError(
            f"Task {spec.name!r}: dataset {source!r} (config {spec.config!r}, revision {revision!r}) cannot be read: "
            f"{type(error).__name__}: {error.__cause__ or error}. Check the id and the connection, or give "
            f"`data_root`, a folder that holds a copy of it under {spec.dataset_id!r}."
        ) from error
    # the Hub's loader uses the commit as the builder's hash; a folder's hash is shorter and depends on its place
    commit = builder.hash if source == spec.dataset_id and _COMMIT.fullmatch(builder.hash or "") else None
    return builder.as_dataset(), commit


def _usable_rows(spec: TaskSpec, split: str, dataset: Dataset) -> _Rows:
    for column in (*spec.text_columns, spec.label_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"Task {spec.name!r}: dataset {spec.dataset_id!r} has no column {column!r} in split {split!r}, only "
                f"{dataset.column_names}; set `text_columns` and `label_column` of the spec accordingly."
            )
    texts, labels, keys = [], [], []
    table = dataset.data
    columns = [table.column(name).to_pylist() for name in (*spec.text_columns, spec.label_column)]
    ids = {label: i for i, label in enumerate(spec.labels)}
    for row, (*row_texts, label) in enumerate(zip(*columns, strict=True)):
        if isinstance(label, list):
            label = label[0] if len(label) == 1 else None
        if label is None or label == -1 or None in row_texts:
            continue
        for text, column in zip(row_texts, spec.text_columns, strict=True):
            if not isinstance(text, str):
                raise ValueError(
                    f"Task {spec.name!r}: row {row} of split {split!r} has {text!r} in column {column!r} where a text "
                    "is needed; correct `text_columns`."
                )
        if not all(map(str.strip, row_texts)):
            continue
        if isinstance(label, str):
            label = ids.get(label, label)
        elif isinstance(label, float) and label.is_integer():  # a column of ids with gaps is read as floats
            label = int(label)
        if not isinstance(label, int) or not 0 <= label < len(spec.labels):
            raise ValueError(
                f"Task {spec.name!r}: row {row} of split {split!r} has label {label!r}, but the spec names "
                f"{len(spec.labels)} classes (ids 0 to {len(spec.labels) - 1}): {list(spec.labels)[:8]}; correct "
                "`labels` or `label_column`."
            )
        texts.append(row_texts)
        labels.append(int(label))
        keys.append(text_key(*row_texts))
    if not texts:
        raise ValueError(f"Task {spec.name!r}: split {split!r} of {spec.dataset_id!r} has no labelled, non-empty row.")
    return _Rows(tuple(map(list, zip(*texts, strict=True))), labels, keys)

"""Task specs: what a classifier is asked to do, where its data stands on the Hub, and how people ask for it.

The bundled specs are the entries of `tasks.json` beside this file; a task of your own is a JSON file with the same
fields, read by [`load_task_spec`]. A spec is a description only: no data is read here.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path


METRICS = ("accuracy", "matthews_correlation")


@dataclass(frozen=True)
class TaskSpec:
    """
    One single-label classification task over a text, a pair of texts, or an image.

    Args:
        name (`str`):
            Short name, unique among the known tasks.
        dataset_id (`str`):
            Id of the dataset on the Hub, or a local folder that `datasets.load_dataset` can read.
        label_column (`str`):
            Column of the class: an id, a name out of `labels`, or a list of them (rows with exactly one are used).
        labels (`tuple[str, ...]`):
            Class names for people and text encoders, in the order of the class ids.
        text_columns (`tuple[str, ...]`):
            One column, or two for a pair task, in the order in which they are tokenized.
        image_column (`str`, *optional*):
            Column of the images of a task without texts.
        aliases (`tuple[tuple[str, ...], ...]`):
            Other wordings of all of `labels`, each in the same order, as users might name the classes.
        config (`str`, *optional*):
            Configuration of the dataset.
        revision (`str`, *optional*):
            Branch, tag or commit of the dataset; `None` is the default branch.
        family (`str`, defaults to `"own"`):
            Tasks whose texts or classes are close share a family; an unseen task has no family member in the zoo.
        metric (`str`, defaults to `"accuracy"`):
            `"accuracy"` or `"matthews_correlation"`.
        train_split (`str`, defaults to `"train"`):
            Split from which training and validation rows are taken.
        test_split (`str`, *optional*):
            Split for reporting, one with public labels. `None`: cut from the train split by a hash of the text.
        prompts (`tuple[str, ...]`):
            Sentences that ask for this task, to train generators on.
        held_out_prompts (`tuple[str, ...]`):
            Further such sentences, for evaluation only: never shown to a generator in training.

    Raises:
        ValueError: If a field does not fit the others; the message names the field.
        TypeError: If a field has another type than stated above.
    """

    name: str
    dataset_id: str
    label_column: str
    labels: tuple[str, ...]
    text_columns: tuple[str, ...] = ()
    image_column: str | None = None
    aliases: tuple[tuple[str, ...], ...] = ()
    config: str | None = None
    revision: str | None = None
    family: str = "own"
    metric: str = "accuracy"
    train_split: str = "train"
    test_split: str | None = None
    prompts: tuple[str, ...] = ()
    held_out_prompts: tuple[str, ...] = ()

    def __post_init__(self):
        for field in ("name", "dataset_id", "label_column", "family", "train_split"):
            self._check_text(field, getattr(self, field))
        for field in ("config", "revision", "test_split", "image_column"):
            if getattr(self, field) is not None:
                self._check_text(field, getattr(self, field))
        for field in ("text_columns", "labels", "prompts", "held_out_prompts"):
            values = getattr(self, field)
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise TypeError(f"Task {self.name!r}: `{field}` must be a list of strings, got {values!r}.")
            values = tuple(values)
            for value in values:
                self._check_text(field, value)
            if len({value.casefold() for value in values}) < len(values):
                twice = next(v for i, v in enumerate(values) if v.casefold() in {w.casefold() for w in values[:i]})
                raise ValueError(f"Task {self.name!r}: `{field}` holds {twice!r} twice; keep one of the two.")
            object.__setattr__(self, field, values)
        object.__setattr__(self, "aliases", tuple(tuple(wording) for wording in self.aliases))
        for wording in self.aliases:
            if len(wording) != len(self.labels):
                raise ValueError(
                    f"Task {self.name!r}: every entry of `aliases` must name all {len(self.labels)} classes, got "
                    f"{len(wording)}: {list(wording)[:6]}."
                )
            for value in wording:
                self._check_text("aliases", value)
        if self.image_column is not None and self.text_columns:
            raise ValueError(f"Task {self.name!r}: set `image_column` or `text_columns`, not both.")
        if self.image_column is None and len(self.text_columns) not in (1, 2):
            raise ValueError(
                f"Task {self.name!r}: `text_columns` must name one column, or two for a pair task (and `image_column` one), "
                f"got {len(self.text_columns)}: {list(self.text_columns)}."
            )
        if len(self.labels) < 2:
            raise ValueError(f"Task {self.name!r}: `labels` must name at least 2 classes, got {list(self.labels)}.")
        if self.metric not in METRICS:
            raise ValueError(f"Task {self.name!r}: unknown `metric` {self.metric!r}; choose one of {list(METRICS)}.")
        both = {prompt.casefold() for prompt in self.prompts} & {p.casefold() for p in self.held_out_prompts}
        if both:
            raise ValueError(
                f"Task {self.name!r}: {sorted(both)[0]!r} stands in `prompts` and in `held_out_prompts`; a held-out "
                "prompt must not be trained on, so remove it from one of them."
            )

    @property
    def wordings(self) -> tuple[tuple[str, ...], ...]:
        """The class names in every known wording, `labels` first."""
        return self.labels, *self.aliases

    @property
    def is_pair(self) -> bool:
        """Whether an example is two texts."""
        return len(self.text_columns) == 2

    def _check_text(self, field: str, value):
        if not isinstance(value, str):
            raise TypeError(f"Task {self.name!r}: `{field}` must hold text, got {value!r} ({type(value).__name__}).")
        if not value.strip():
            raise ValueError(f"Task {self.name!r}: `{field}` holds an empty string; give it a value or leave it out.")


def get_task(name: str) -> TaskSpec:
    """
    The bundled spec of that name.

    Raises:
        ValueError: If no bundled task has that name; the message lists the nearest ones.
    """
    known = TASKS | IMAGE_TASKS
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.4)
    raise ValueError(
        f"Unknown task {name!r}. {'Nearest known: ' + ', '.join(near) if near else 'Known: ' + ', '.join(known)}. "
        "For a task of your own, write its fields into a JSON file and read it with `load_task_spec(path)`."
    )


def load_task_spec(path: str | Path) -> TaskSpec:
    """
    Reads a task of your own from a JSON file with the fields of [`TaskSpec`]; those with a default may be left out.
    A relative `dataset_id` that is a folder beside the file is taken from there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON object, or lacks a field, or has an unknown one; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No task file at {str(path)!r}; give the path of a JSON file with a task's fields.")
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Task file {str(path)!r} is not valid JSON: {error}.") from error
    spec = _to_spec(entry, where=f"Task file {str(path)!r}")
    beside = path.parent / spec.dataset_id
    return _to_spec({**entry, "dataset_id": str(beside.resolve())}, str(path)) if beside.is_dir() else spec


def _to_spec(entry, where: str) -> TaskSpec:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected one JSON object with a task's fields, got a {type(entry).__name__}.")
    known = {field.name: field for field in fields(TaskSpec)}
    for name in entry:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields are {list(known)}."
            raise ValueError(f"{where}: unknown field {name!r}; {hint}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in entry]
    if missing:
        raise ValueError(f"{where}: field(s) {missing} missing; add them (see `TaskSpec`).")
    return TaskSpec(**entry)


def _read_bundled(file: str) -> dict[str, TaskSpec]:
    entries = json.loads(Path(__file__).with_name(file).read_text(encoding="utf-8"))
    specs = [_to_spec(entry, where=f"{file}, entry {i}") for i, entry in enumerate(entries)]
    return {spec.name: spec for spec in specs}


TASKS: dict[str, TaskSpec] = _read_bundled("tasks.json")
IMAGE_TASKS: dict[str, TaskSpec] = _read_bundled("image_tasks.json")

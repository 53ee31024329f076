"""The honest table: a generator beside everything it must beat, on the same test rows.

One call makes all rows of one task. A row that cannot be computed, because no zoo member or no text encoder is at
hand, is taken from stored rows and marked so, or stands in the table empty with a note: no row is left out in silence.

Notation used for shapes and units:
    - N: networks of a row; n: networks asked for; C: classes; rows of data: examples
    - scores, their std and differences are in percent points
"""

import functools
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from ..targets.functional import WEIGHT
from ..zoo.tasks import TEST_LIMIT, VALIDATION_LIMIT, TaskData
from . import baselines
from .accuracy import PredictionCache, cosine_to_label_names, counts, majority, score
from .novelty import fix_gauge
from .rows import StateDict, TaskRows, Unavailable


METHODS = (
    "random_init",
    "majority",
    "zoo",
    "zoo_held_out",
    "zoo_start",
    "lookup",
    "zoo_average",
    "gaussian",
    "noise_0.05",
    "noise_0.15",
    "noise_at_distance",
    "reconstruction",
    "generated",
    "generated_held_out_prompts",
    "generated_mismatched",
    "generated_swapped",
    "cosine_label_names",
)
SPREAD_PROMPTS = 5  # prompts of the task over which the samples are spread unless `prompts` says otherwise
PACKAGES = ("hf-weightgen", "torch", "transformers", "diffusers", "peft", "datasets", "scikit-learn")


def honest_table(
    generate: Callable[[str, Sequence[str], int, int], Sequence[StateDict]],
    predict: Callable[[Sequence[StateDict], Dataset], Tensor],
    data: TaskData,
    members: Sequence[StateDict] = (),
    held_out: Sequence[StateDict] = (),
    start: StateDict | None = None,
    *,
    reconstruct: Callable[[Sequence[StateDict]], Sequence[StateDict]] | None = None,
    encoder=None,
    prompts: Sequence[str] | None = None,
    n: int = 10,
    best_of: int | None = None,
    seed: int = 0,
    known_tasks: Sequence[Mapping] = (),
    lookup_members: Mapping[str, Sequence[StateDict]] | None = None,
    member_seeds: Sequence[Hashable] | None = None,
    mismatched_prompts: Sequence[str] = (),
    reference: StateDict | None = None,
    stored_rows: Sequence[Mapping] | None = None,
    test_limit: int | None = TEST_LIMIT,
    validation_limit: int | None = VALIDATION_LIMIT,
    cache: PredictionCache | None = None,
    on_row: Callable[[dict], None] | None = None,
) -> list[dict]:
    """
    All rows of one task.

    Args:
        generate (`Callable`):
            `(prompt, labels, n, seed) -> n state dicts`, with one head row per label in that order.
        predict (`Callable`):
            `(state_dicts, dataset) -> class ids (N, rows)`.
        data ([`TaskData`]):
            Test rows report, validation rows select, train rows give the majority class.
        members, held_out (sequences of state dicts):
            The zoo's members of this task that the generator was trained on, and those of the held-out run.
        start (state dict, *optional*):
            What all members were trained from, with a head for this task: what the zoo knows without training for it.
        reconstruct (`Callable`, *optional*):
            Encodes and decodes state dicts; applied to `held_out`, or to `members` where there are none.
        encoder (*optional*):
            With `embed(list[str])`, which returns normalised embeddings; for the look-up and the label names.
        prompts (`Sequence[str]`, *optional*):
            What is asked for; the samples are spread over them. Default: the first prompts of the spec.
        n (`int`):
            Networks per row.
        best_of (`int`, *optional*):
            How many samples, or members of the zoo, the best on validation is chosen from. Default: `n`.
        seed (`int`):
            Every row draws from a generator of its own that is seeded by this, the task and the row's name.
        known_tasks (sequence of mappings), lookup_members (mapping by task name):
            What the look-up table looks in: `{"name", "labels", "prompt_embeds" or "prompts"}`, and the members.
            Default: nothing, and the members of this task.
        member_seeds (sequence, *optional*):
            The run of each member; intervals then draw whole runs, and novelty is told across runs too.
        mismatched_prompts (`Sequence[str]`):
            Prompts of other families, asked with the labels of this task: a generator that heeds its prompt falls to
            chance.
        reference (state dict, *optional*):
            The adapter to which the gauge stays close, see [`fix_gauge`].
        stored_rows (sequence of rows, *optional*):
            Rows of an earlier table, used where one cannot be computed now.
        test_limit, validation_limit (`int`, *optional*):
            Rows of data that are used, see [`evaluation_subset`]; `None` takes all.
        cache ([`PredictionCache`], *optional*):
            Keeps predictions, so that an interrupted table resumes.
        on_row (`Callable`, *optional*):
            Called with each row as soon as it is there.

    Returns:
        `list[dict]`: one row per name in `METHODS`, in that order, with the keys `task`, `method`, `metric`, `mean`,
        `std`, `median`, `max`, `ci95` (of the mean, over networks and examples), `best` (test score of the best of
        `best_of` on validation), `n`, `novelty_l2`, `novelty_iou` (medians over the networks of the distance to the
        nearest member and of the largest overlap of errors with a member; for `zoo` among the members), `stored`,
        `test_rows`. Further keys where they mean something: `spread_l2` (median pairwise distance), `difference` and
        `difference_held_out` (generated minus zoo: `mean`, `ci95`), `loss` (reconstruction), `counted` (zoo),
        `expected` (what a control should give), `note`.

    Raises:
        ValueError: If there is no prompt, n is below 1, or a generated network does not fit the task.
    """
    spec, labels = data.spec, list(data.spec.labels)
    best_of = n if best_of is None else best_of
    for name, count in (("n", n), ("best_of", best_of)):
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1 network, got {count}.")
    prompts = list(spec.prompts[:SPREAD_PROMPTS] if prompts is None else prompts)
    if not prompts:
        raise ValueError(f"Task {spec.name!r} has no prompt; give at least one in `prompts`.")
    if member_seeds is not None and len(member_seeds) != len(members):
        raise ValueError(f"Expected one of `member_seeds` per member, {len(members)}, got {len(member_seeds)}.")
    if cache is not None:
        predict = cache.wrap(predict)
    task = TaskRows(predict, data, members, member_seeds, reference, n, best_of, seed, test_limit, validation_limit)
    stored = {row["method"]: row for row in stored_rows or () if row["task"] == spec.name}
    rows: dict[str, dict] = {}

    def add(method: str, make: Callable[[], dict]) -> None:
        try:
            row = make()
        except Unavailable as reason:
            usable = stored.get(method, {}).get("mean") is not None  # an empty stored row says less than the reason
            row = {**stored[method], "stored": True} if usable else task.empty(method) | {"note": str(reason)}
        rows[method] = row
        if on_row is not None:
            on_row(row)

    def sample(method: str, ask: Sequence[str], names: Sequence[str], per_prompt: Sequence[int]) -> list[StateDict]:
        made = []
        for i, (prompt, count) in enumerate(zip(ask, per_prompt, strict=True)):
            if not count:
                continue
            new = list(generate(prompt, names, count, task.derived(method, i)))
            if len(new) != count or any(len(s[WEIGHT]) != len(names) for s in new if WEIGHT in s):
                raise ValueError(
                    f"Prompt {prompt!r}: expected {count} networks with {len(names)} classes, got {len(new)} with "
                    f"{[len(s[WEIGHT]) for s in new if WEIGHT in s][:3]}."
                )
            made += new
        return made

    generated = sample("generated", prompts, labels, _spread(n, len(prompts)))
    candidates = generated if best_of == n else sample("generated", prompts, labels, _spread(best_of, len(prompts)))
    members, held_out = list(members), list(held_out)
    template = (members or held_out or generated)[0]
    add("random_init", lambda: task.row("random_init", baselines.random_init(template, n, task.generator("random"))))
    add("majority", lambda: majority_row(task))
    add("zoo", lambda: zoo_row(task, rows["majority"]))
    add("zoo_held_out", lambda: held_out_row(task, held_out))
    add("zoo_start", lambda: _start(task, start))
    looked_up = lookup_members or {spec.name: members}
    nearest = functools.cache(lambda: _nearest_known(encoder, prompts, known_tasks, looked_up))
    add("lookup", lambda: _lookup(task, encoder, nearest(), looked_up))
    add("zoo_average", lambda: _average(task, encoder, nearest, looked_up))
    for method, make in {
        "gaussian": lambda g: baselines.gaussian(task.aligned, n, g),
        "noise_0.05": lambda g: baselines.noisy(task.aligned, 0.05, n, g),
        "noise_0.15": lambda g: baselines.noisy(task.aligned, 0.15, n, g),
        "noise_at_distance": lambda g: members_at_distance(task, generated, g),
    }.items():
        add(method, lambda m=method, make=make: task.need_members() and task.row(m, make(task.generator(m))))
    add("reconstruction", lambda: reconstruction_row(task, reconstruct, held_out or members))
    add("generated", lambda: generated_row(task, generated, candidates, held_out, rows["zoo"]))
    add("generated_held_out_prompts", lambda: _held_out_prompts(task, sample, labels))
    add("generated_mismatched", lambda: _mismatched(task, sample, labels, mismatched_prompts))
    add("generated_swapped", lambda: _swapped(task, sample, labels, prompts, generated))
    add("cosine_label_names", lambda: _cosine(task, encoder))
    return [rows[method] for method in METHODS]


def majority_row(task: TaskRows) -> dict:
    most = majority(task.train.with_format(None)["label"])
    return task.summary("majority", torch.full((1, len(task.labels)), most))


def zoo_row(task: TaskRows, of_majority: dict) -> dict:
    members = task.need_members()
    # the same n as best-of-n of the generator: a larger zoo would have more draws for its best
    order = torch.randperm(len(members), generator=task.generator("zoo"))[: task.best_of].tolist()
    pool = [members[i] for i in order]
    row = task.row("zoo", members, pool=pool, groups=task.groups)
    scores = score(task.predictions, task.labels, task.spec.metric)
    return row | {"counted": counts(scores, of_majority["mean"], len(task.labels), task.spec.metric)}


def held_out_row(task: TaskRows, held_out: Sequence[StateDict]) -> dict:
    if not held_out:
        raise Unavailable("no held-out member of this task was given")
    return task.row("zoo_held_out", held_out)


def _start(task: TaskRows, start: StateDict | None) -> dict:
    if start is None:
        raise Unavailable("the shared start of the zoo was not given")
    return task.row("zoo_start", [start])


def _nearest_known(encoder, prompts, known_tasks, lookup_members) -> list[Mapping]:
    if encoder is None or not known_tasks:
        raise Unavailable("a look-up needs `encoder`, `known_tasks` and `lookup_members`")
    found = baselines.nearest_tasks(encoder, prompts, known_tasks)
    for known in found:
        if not lookup_members.get(known["name"]):
            raise Unavailable(f"`lookup_members` has none of {known['name']!r}, the task of the nearest known prompt")
    return found


def _average(task: TaskRows, encoder, nearest: Callable[[], list[Mapping]], lookup_members) -> dict:
    """Of the task's members; of an unseen task, of the members of each task that its prompts look up."""
    if task.members:
        return task.row("zoo_average", [baselines.average(task.aligned)])
    found, made = {known["name"]: known["labels"] for known in nearest()}, []
    for name, labels in found.items():
        average = baselines.average([fix_gauge(member, task.reference) for member in lookup_members[name]])
        made.append(baselines.transfer_head(average, labels, task.spec.labels, encoder))
    return task.row("zoo_average", made) | {"found": list(found)}


def _lookup(task: TaskRows, encoder, found: list[Mapping], lookup_members) -> dict:
    """`found`: for each prompt its nearest known task."""
    made, generator = [], task.generator("lookup")
    for known, count in zip(found, _spread(task.n, len(found)), strict=True):
        for member in baselines.choose(lookup_members[known["name"]], count, generator):
            made.append(baselines.transfer_head(member, known["labels"], task.spec.labels, encoder))
    return task.row("lookup", made) | {"found": list(dict.fromkeys(known["name"] for known in found))}


def members_at_distance(task: TaskRows, generated: Sequence[StateDict], generator: torch.Generator) -> list[StateDict]:
    distance = task.distance(generated).quantile(0.5).item()
    try:
        return baselines.noisy_at_distance(task.aligned, distance, task.n, generator, task.distance)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error


def reconstruction_row(task: TaskRows, reconstruct, originals: Sequence[StateDict]) -> dict:
    if reconstruct is None or not originals:
        raise Unavailable("a reconstruction needs `reconstruct` and members of this task")
    reconstructed = list(reconstruct(originals))
    row = task.row("reconstruction", reconstructed)
    before, after = (
        score(task.predict(state_dicts, task.test), task.labels, task.spec.metric)
        for state_dicts in (originals, reconstructed)
    )
    return row | {"loss": {"mean": float((before - after).mean()), "max": float((before - after).max())}}


def generated_row(task: TaskRows, generated, candidates, held_out: Sequence[StateDict], of_zoo: dict) -> dict:
    row = task.row("generated", generated, pool=candidates)
    predictions = task.predict(generated, task.test)
    if task.members:
        row["difference"] = task.difference(predictions, task.predictions, task.groups)
    elif of_zoo["mean"] is not None:  # stored: no interval without the members' predictions
        row["difference"] = {"mean": row["mean"] - of_zoo["mean"], "ci95": None}
    if held_out:
        row["difference_held_out"] = task.difference(predictions, task.predict(held_out, task.test))
    return row


def _held_out_prompts(task: TaskRows, sample, labels: Sequence[str]) -> dict:
    ask = task.spec.held_out_prompts
    if not ask:
        raise Unavailable("the task has no held-out prompts")
    method = "generated_held_out_prompts"
    return task.row(method, sample(method, ask, labels, _spread(max(task.n, len(ask)), len(ask))))


def _mismatched(task: TaskRows, sample, labels: Sequence[str], ask: Sequence[str]) -> dict:
    if not ask:
        raise Unavailable("no prompts of other families were given")
    made = sample("generated_mismatched", ask, labels, _spread(max(task.n, len(ask)), len(ask)))
    row = task.row("generated_mismatched", made, metric="balanced_accuracy", control=True)
    return row | {"expected": 100 / len(labels)}


def _swapped(task: TaskRows, sample, labels: Sequence[str], prompts: Sequence[str], generated) -> dict:
    if len(labels) != 2:
        raise Unavailable(f"swapping is for 2 classes, the task has {len(labels)}")
    # "generated": the same noise as that row, so that nothing but the order of the names differs
    made = sample("generated", prompts, labels[::-1], _spread(task.n, len(prompts)))
    row = task.row("generated_swapped", made, metric="accuracy", control=True)
    unswapped = score(task.predict(generated, task.test), task.labels, "accuracy").mean()
    return row | {"expected": float(100 - unswapped)}


def _cosine(task: TaskRows, encoder) -> dict:
    if encoder is None:
        raise Unavailable("cosine to label names needs `encoder`")
    data = task.test.with_format(None)[:]
    predictions = cosine_to_label_names(encoder, data["text"], task.spec.labels, data.get("text_pair"))
    return task.summary("cosine_label_names", predictions)


def _spread(n: int, over: int) -> list[int]:
    return [n // over + (i < n % over) for i in range(over)]


def format_table(rows: Sequence[Mapping]) -> str:
    """Plain text, one block per task, columns aligned; `*` marks stored rows, `-` what does not apply."""
    header = ["method", "metric", "mean ± std", "95 %", "median", "max", "best", "n", "L2", "IoU"]
    blocks = []
    for name in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == name]
        table = [header, *map(_cells, of_task)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        blocks.append("\n".join([name, *(line.rstrip() for line in lines), *_remarks(of_task)]))
    return "\n\n".join(blocks)


def write_results(path: str | Path, table: str, command: str, seed: int, rows: Sequence[Mapping]) -> None:
    """
    Writes `{"table", "command", "seed", "versions", "rows"}` as JSON; the file is there whole or not at all.

    Args:
        path (`str` or `Path`): The file; its folder is made.
        table (`str`): Name of the table.
        command (`str`): What makes the same figures again.
        seed (`int`): Of all draws.
        rows (sequence of rows): See [`honest_table`]; NaN becomes null.
    """
    path = Path(path)
    content = {"table": table, "command": command, "seed": seed, "versions": versions(), "rows": _finite(list(rows))}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Of Python and the packages that figures depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cells(row: Mapping) -> list[str]:
    def number(value, digits: int = 1) -> str:
        return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"

    interval = row["ci95"] and f"[{number(row['ci95'][0])}, {number(row['ci95'][1])}]"
    return [
        row["method"] + " *" * row["stored"],
        row["metric"],
        "-" if row["mean"] is None else f"{number(row['mean'])} ± {number(row['std'])}",
        interval or "-",
        *(number(row.get(key)) for key in ("median", "max", "best")),
        str(row["n"]),
        number(row["novelty_l2"], 3),
        number(row["novelty_iou"], 2),
    ]


def _remarks(rows: Sequence[Mapping]) -> list[str]:
    lines = []
    best = {row["method"]: row["best_of"] for row in rows if row.get("best") is not None and row.get("best_of")}
    if best:
        lines.append("best: selected on validation, of " + ", ".join(f"{n} ({method})" for method, n in best.items()))
    seconds = {row["method"]: row["cpu_seconds"] for row in rows if row.get("cpu_seconds", 0) >= 1}
    if seconds:
        lines.append("CPU seconds: " + ", ".join(f"{value:.0f} ({method})" for method, value in seconds.items()))
    for row in rows:
        for key, other in (("difference", "zoo"), ("difference_held_out", "zoo_held_out")):
            if row.get(key):
                mean, interval = row[key]["mean"], row[key]["ci95"]
                told = f", 95 % interval [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else ", no interval"
                lines.append(f"{row['method']} - {other}: {mean:+.1f} points{told}")
        if row.get("spread_l2") is not None and row["method"] in ("zoo", "generated"):
            lines.append(f"{row['method']}: median pairwise distance {row['spread_l2']:.3f}")
        if row.get("novelty_l2_other_runs") is not None:
            lines.append(
                f"{row['method']}: nearest member of another run at {row['novelty_l2_other_runs']:.3f}, "
                f"IoU {row['novelty_iou_other_runs']:.2f}"
            )
        if row.get("loss"):
            loss = row["loss"]
            lines.append(f"{row['method']}: loses {loss['mean']:.1f} points on average, {loss['max']:.1f} at most")
        if row.get("rank_correlation") is not None:
            told = (
                f"the best of {row['best_of']} by predicted accuracy, rank correlation {row['rank_correlation']:.2f}"
            )
            lines.append(f"{row['method']}: {told}")
        if row.get("expected") is not None:
            lines.append(f"{row['method']}: {row['expected']:.1f} if the condition is heeded")
        if row.get("counted") is False:
            lines.append("not counted: the zoo mean is less than 3 standard errors above the majority class")
        if row.get("note"):
            lines.append(f"{row['method']}: {row['note']}")
    if any(row["stored"] for row in rows):
        lines.append("* stored: taken from an earlier table, not computed now")
    return lines


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

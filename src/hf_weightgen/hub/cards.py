"""Cards: rendered from one template, `card_template.md`, with the metadata that the Hub reads."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_name("card_template.md")
SECTION = "\n## "
DETAILS = "## Details\n\n"
EVALUATION = "evaluation.json"  # rows of the honest table beside a generator
ZOO_FILES = {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
# rows of the honest table that stand in a card's metadata; all of them stand beside it
RESULTS = ("generated", "zoo", "lookup", "zoo_average", "gaussian", "cosine_label_names", "majority")
PLACE = re.compile(  # where the snippet of a card loads from
    r"^((?:pipe = WeightGenPipeline\.from_pretrained|model = TargetModel\.from_pretrained|zoo = load_zoo)\("
    r"|model = PeftModel\.from_pretrained\(base, )"
    r'"(?:[^"\\\n]|\\.)*"(?:, (?:subfolder|revision)="(?:[^"\\\n]|\\.)*")*',
    re.MULTILINE,
)
# options of a command that say where things are, and not what becomes of them
ELSEWHERE = {
    "--data_root", "--image_encoder", "--cache", "--out", "--output_dir", "--card", "--checkpointing_steps",
    "--resume_from_checkpoint", "--report_to", "--expected_processes",
}  # fmt: skip
UNNAMED = "hf_weightgen"  # what results are called until their repository has a name
DEFAULTS = ("# Model Card for Model ID", "[More Information Needed]", "# Dataset Card for Dataset Name")


def write_card(
    folder: str | Path,
    kind: str,
    *,
    base_model: str | None = None,
    labels: Sequence[str] = (),
    prompt: str | None = None,
    examples: str | None = None,
    seed: int | None = None,
    task: str | None = None,
    generator: str | None = None,
    method: str | None = None,
    mixed: bool = False,
    datasets: Sequence[str] = (),
    command: str | None = None,
    notes: Sequence[str] = (),
    facts: Mapping[str, object] | None = None,
) -> Path:
    """
    Renders `README.md` into a folder.

    Args:
        kind: `"adapter"` (a plain PEFT folder), `"network"` (a generated target network), `"generator"` (a pipeline) or
            `"zoo"` (a dataset).
        generator: Where the weights come from; of a generator and a zoo, where they are loaded from.
        method: Of a generator, as its paper names it; mixed: whether one of adapters makes networks too.
        prompt: One that a generator is asked with; if it reads datasets alone, `examples` says of what: `"texts"` or `"images"`; and
            so it says of a network what it reads.
        facts: further lines of the details; notes: paragraphs under "Limits".
    """
    library = {"adapter": "peft", "network": "transformers", "generator": "hf_weightgen"}
    tags = ["hf_weightgen", "model-zoo" if kind == "zoo" else "weight-generation"]
    common = {"license": "apache-2.0", "tags": tags + ["lora"] * (kind == "adapter")}
    if kind == "zoo":
        data = DatasetCardData(**common, base_model=base_model, configs=[ZOO_FILES])
    else:
        data = ModelCardData(
            **common,
            library_name=library[kind],
            base_model=base_model if kind != "network" else None,
            base_model_relation="adapter" if kind == "adapter" else None,
            pipeline_tag="text-classification" if kind == "adapter" else None,
            datasets=list(datasets) or None,
        )
    card = (DatasetCard if kind == "zoo" else ModelCard).from_template(
        data,
        template_path=str(TEMPLATE),
        kind=kind,
        base=base_model,
        labels=list(labels),
        prompt=prompt,
        examples=examples,
        seed=seed,
        task=task,
        generator=generator,
        method=method,
        mixed=mixed,
        command=command,
        notes=list(notes),
        facts=dict(facts or {}),
        version=version(),
        quoted=quoted,
        line=line,
    )
    path = Path(folder) / "README.md"
    path.write_text(str(card), encoding="utf-8")
    return path


def told_targets(targets: Sequence[Mapping]) -> dict[str, object]:
    """What [`write_card`] tells of a generator's targets."""
    base = next((target["base_model"] for target in targets if "base_model" in target), None)
    return {"base_model": base, "mixed": any(target["kind"] != "adapter" for target in targets)}


def version() -> str:
    """Of this library."""
    try:
        return installed("hf-weightgen")
    except PackageNotFoundError:  # run from a source tree
        return "from source"


def quoted(text: str) -> str:
    """A text as a string of Python, whatever is in it."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def line(text: str, longest: int = 200, escaped: bool = True) -> str:
    """A text on one line of Markdown, in which it is nothing but text."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    plain = plain if len(plain) <= longest else f"{plain[:longest]}…"
    return re.sub(r"([\\`*\[\]<>|#{}~]|(?<!\w)_|_(?!\w))", r"\\\1", plain) if escaped else plain


def needs_card(folder: str | Path) -> bool:
    """Whether a folder has no card, or the default one that PEFT, transformers and diffusers write."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return not text.strip() or any(default in text for default in DEFAULTS)


def readdress(folder: str | Path, repo_id: str, subfolder: str | None = None, revision: str | None = None) -> None:
    """Makes the snippet of a card load from where it is published; results are told under that name."""
    path, place = Path(folder) / "README.md", quoted(repo_id)
    place += "".join(
        f", {name}={quoted(value)}" for name, value in (("subfolder", subfolder), ("revision", revision)) if value
    )
    text = path.read_text(encoding="utf-8").replace(
        f"\n- name: {UNNAMED}\n", f"\n- name: {repo_id.split('/')[-1]}\n", 1
    )
    path.write_text(PLACE.sub(lambda found: found[1] + place, text, count=1), encoding="utf-8")


def told_place(place: str | Path) -> str:
    """How a command of a card names a folder or id: an absolute folder is each machine's own, and told by its name."""
    return Path(place).name if Path(place).is_absolute() else str(place)


def told_options(argv: Sequence[str]) -> str:
    """Of a command line the options that say what becomes of it, see [`ELSEWHERE`]; absolute folders are told by their names."""
    told, skip = [], False
    for one in argv:
        if one.startswith("--"):
            skip = one.split("=")[0] in ELSEWHERE
        if not skip:
            told.append(told_place(one))
        elif "=" in one:
            skip = False
    return shlex.join(told)


def add_results(
    folder: str | Path,
    rows: Sequence[Mapping],
    datasets: Mapping[str, str] | None = None,
    task_type: str = "text-classification",
) -> None:
    """
    Puts the honest table into the metadata of a card, as the `model-index` that the Hub reads; earlier results are replaced.

    Args:
        rows: Rows of the table: `task`, `method`, `metric`, `mean` in points, `n`.
        datasets: Hub id of each task's dataset; a task without one is named by itself.
        task_type: What the Hub calls tasks of this kind.
    """
    wanted = {"task": str, "method": str, "metric": str, "mean": (int, float), "n": int}
    for row in rows:
        if not isinstance(row, Mapping) or not {"task", "method"} <= row.keys():
            raise ValueError(f"Results must be rows of the honest table, got {str(row)[:120]}.")
    path, rows = Path(folder) / "README.md", [row for row in rows if row["method"] in RESULTS]
    rows.sort(key=lambda row: RESULTS.index(row["method"]))  # the model's own first, its baselines after it
    for row in rows:
        wrong = [k for k, kind in wanted.items() if not isinstance(row.get(k), kind) or row[k] != row[k]]
        if wrong:
            raise ValueError(f"Result {row['method']!r} of {row['task']!r}: {wrong[0]!r} is {row.get(wrong[0])!r}.")
    if not rows:
        raise ValueError(f"The results hold none of the rows {list(RESULTS)}.")
    card = ModelCard.load(path)
    card.data.eval_results = [
        EvalResult(
            task_type=task_type,
            dataset_type=(datasets or {}).get(row["task"], row["task"]),
            dataset_name=row["task"],
            dataset_config=row["task"],  # two tasks of one dataset would otherwise become one
            dataset_split="test",
            metric_type=row["metric"],
            metric_name=f"{'' if row['method'] == 'generated' else 'baseline '}{row['method']}: {row['metric']}, mean of {row['n']}",
            metric_value=round(row["mean"], 2),
        )
        for row in rows
    ]
    card.data.model_name = card.data.model_name or UNNAMED
    path.write_text(str(card), encoding="utf-8")


def add_figures(folder: str | Path, title: str, command: str, table: str) -> None:
    """
    Puts a section with a table, and the command that makes it, into the card of a generator, before its limits; in the
    place of a section of the same title.

    Raises:
        ValueError: If the folder's `README.md` is no card of [`write_card`].
    """
    path = Path(folder) / "README.md"
    sections = path.read_text(encoding="utf-8").split(SECTION)
    limits = [i for i, section in enumerate(sections) if section.startswith("Limits\n")]
    if not limits:
        raise ValueError(f"{str(path)!r} has no section 'Limits': it is no card of this library.")
    new = next((i for i, section in enumerate(sections) if section.startswith(f"{title}\n")), limits[0])
    if new == limits[0]:
        sections.insert(new, "")
    sections[new] = f"{title}\n\n```bash\n{command}\n```\n\n{table}\n"
    path.write_text(SECTION.join(sections), encoding="utf-8")

"""Folders, metrics and cards on their way to the Hub. Knows no tensor and nothing else of the package.

Cards are rendered from one template, `card_template.md`, with the metadata that the Hub reads.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_name("card_template.md")
SECTION = "\n## "


def write_card(
    folder: str | Path,
    kind: str,
    *,
    base_model: str | None = None,
    labels: Sequence[str] = (),
    prompt: str | None = None,
    seed: int | None = None,
    task: str | None = None,
    generator: str | None = None,
    datasets: Sequence[str] = (),
    command: str | None = None,
    notes: Sequence[str] = (),
    facts: Mapping[str, object] | None = None,
) -> Path:
    """
    Renders `README.md` into a folder.

    Args:
        kind: `"adapter"` (a plain PEFT folder), `"network"` (a generated target network) or `"generator"` (a pipeline).
        facts: further lines of the details; notes: paragraphs under "Limits".
    """
    library = {"adapter": "peft", "network": "transformers", "generator": "hf_weightgen"}[kind]
    data = ModelCardData(
        library_name=library,
        license="apache-2.0",
        base_model=base_model if kind != "network" else None,
        base_model_relation="adapter" if kind == "adapter" else None,
        pipeline_tag="text-classification" if kind == "adapter" else None,
        tags=["hf_weightgen", "weight-generation"] + (["lora"] if kind == "adapter" else []),
        datasets=list(datasets) or None,
    )
    try:
        installed = version("hf-weightgen")
    except PackageNotFoundError:  # run from a source tree
        installed = "source"
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        kind=kind,
        base=base_model,
        labels=list(labels),
        prompt=prompt,
        seed=seed,
        task=task,
        generator=generator,
        command=command,
        notes=list(notes),
        facts=dict(facts or {}),
        version=installed,
    )
    path = Path(folder) / "README.md"
    path.write_text(str(card), encoding="utf-8")
    return path


def add_figures(folder: str | Path, title: str, command: str, table: str) -> None:
    """
    Puts a section with a table, and the command that makes it, into the card of a generator, before its limits. A section
    of the same title is replaced.

    Raises:
        ValueError: If the folder's `README.md` is no card of [`write_card`].
    """
    path = Path(folder) / "README.md"
    sections = path.read_text(encoding="utf-8").split(SECTION)
    limits = [i for i, section in enumerate(sections) if section.startswith("Limits\n")]
    if not limits:
        raise ValueError(f"{str(path)!r} has no section 'Limits': it is no card of this library.")
    sections.insert(limits[0], f"{title}\n\n```bash\n{command}\n```\n\n{table}\n")
    kept = [s for i, s in enumerate(sections) if i == limits[0] or not s.startswith(f"{title}\n")]
    path.write_text(SECTION.join(kept), encoding="utf-8")

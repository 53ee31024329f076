"""Folders, metrics and cards on their way to the Hub. Knows no tensor and nothing else of the package.

Cards are rendered from one template, `card_template.md`, with the metadata that the Hub reads.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_name("card_template.md")


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
    table: str | None = None,
    notes: Sequence[str] = (),
    facts: Mapping[str, object] | None = None,
) -> Path:
    """
    Renders `README.md` into a folder.

    Args:
        kind: `"adapter"` (a plain PEFT folder), `"network"` (a generated target network) or `"generator"` (a pipeline).
        table: The honest table as text; facts: further lines of the details; notes: paragraphs under "Limits".
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
        table=table,
        notes=list(notes),
        facts=dict(facts or {}),
        version=installed,
    )
    path = Path(folder) / "README.md"
    path.write_text(str(card), encoding="utf-8")
    return path

"""Rows of a zoo from adapters that exist already: any folder of PEFT adapters, at any depth.

Nothing that is found is executed or unpickled: JSON, YAML and safetensors are read, pickles are refused.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from ..weights.lora import LORA_NAME, split_lora
from .schema import make_row


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")

# What of an adapter's config changes the function that its tensors make.
ARCH_FIELDS = (
    *("task_type", "r", "lora_alpha", "target_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias", "modules_to_save"),
)
HEAD_WEIGHTS = (".classifier.weight", ".classifier.out_proj.weight", ".score.weight")
PROMPT_FIELDS = ("prompt", "instance_prompt")  # of a card's metadata

_PROMPT_LINE = re.compile(r"^[-*] prompt: *(\S.*)$", re.MULTILINE | re.IGNORECASE)  # in the text of a card
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_HUB_CACHE = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})(?:/|$)")


def harvest_peft(
    folders: str | Path | Sequence[str | Path],
    *,
    base_model: str | None = None,
    task: str | None = None,
    family: str = "harvested",
    labels: Sequence[str] | None = None,
) -> Iterator[dict]:
    """
    Makes a row of every LoRA adapter in folders as PEFT saves them.

    Configs, cards and the headers of all files are checked before the first row is made, so that a long harvest does
    not fail at its end. Class names come from `labels.json`, else from `id2label` in the adapter's config or in a
    `config.json` beside it. The text is the prompt that the card names in its metadata or in a line `- prompt: …`,
    else the name of the folder.

    Args:
        folders (`str`, `Path` or a sequence of them): Searched at any depth for `adapter_config.json`.
        base_model (`str`, *optional*): The Hub id that every adapter must be made for; any, if not given.
        task, family (`str`, *optional*): What the rows say; the task is the name of the folder, if not given.
        labels (`Sequence[str]`, *optional*): Class names of all adapters, instead of those that are found.

    Returns:
        `Iterator[dict]`: Rows of [`~zoo.schema.make_row`]. The id is the path of the adapter, from the name of the
        searched folder on.

    Raises:
        FileNotFoundError: If a folder is absent or holds no adapter.
        ValueError: If an adapter is a pickle, damaged, no LoRA, made for another base model, or if its class names do
        not fit its head. The message names the file.
    """
    found: dict[str, _Adapter] = {}
    for root in [folders] if isinstance(folders, (str, Path)) else folders:
        for folder in _adapters_in(Path(root)):
            adapter = _Adapter.read(Path(root), folder, base_model, labels)
            other = found.setdefault(adapter.row_id, adapter)
            if other is not adapter:
                raise ValueError(
                    f"{other.folder} and {folder} would both become the row {adapter.row_id!r}; harvest them from a "
                    "folder above both, or rename one."
                )
    return (adapter.row(task, family) for adapter in found.values())


@dataclass(frozen=True)
class _Adapter:
    """All that is known of an adapter but its weights."""

    folder: Path
    row_id: str
    name: str
    config: dict
    labels: list[str]
    text: str

    @classmethod
    def read(cls, root: Path, folder: Path, base_model: str | None, labels: Sequence[str] | None) -> "_Adapter":
        config = _read_config(folder, base_model)
        labels = _labels(folder, config) if labels is None else list(labels)
        _check_weights(folder / ADAPTER_WEIGHTS, labels)
        below = folder.relative_to(root).as_posix()
        name = _name(folder.parent if _CHECKPOINT.fullmatch(folder.name) else folder)
        text = _prompt(folder / "README.md") or re.sub(r"[-_\s]+", " ", name).strip()
        return cls(folder, _name(root) + ("" if below == "." else f"/{below}"), name, config, labels, text)

    def row(self, task: str | None, family: str) -> dict:
        path, config = self.folder / ADAPTER_WEIGHTS, self.config
        content = path.read_bytes()
        try:
            state_dict = safetensors.torch.load(content)
            split_lora(state_dict)
        except SafetensorError as error:  # the file has changed since it was checked
            raise _damaged(path, error) from error
        except ValueError as error:
            raise ValueError(f"{path} is no whole adapter: {error} Save it again or take it out.") from error
        checkpoint, hub = _CHECKPOINT.fullmatch(self.folder.name), _hub(self.folder)
        arch = {field: config[field] for field in ARCH_FIELDS if config.get(field) is not None}
        if isinstance(config.get("target_modules"), list):
            arch["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in any order
        return make_row(
            state_dict,
            id=self.row_id,
            task=task or self.name,
            family=family,
            split="train",
            text=self.text,
            labels=self.labels,
            seed=None,
            checkpoint=int(checkpoint[1]) if checkpoint else None,
            epoch=None,
            arch={"base_model": config["base_model_name_or_path"], "revision": config.get("revision"), **arch},
            metrics={},
            provenance={
                "harvested_from": hub["repo"].replace("--", "/", 1) if hub else self.row_id,
                "revision": hub["revision"] if hub else None,
                "sha256": hashlib.sha256(content).hexdigest(),
                "peft_version": config.get("peft_version"),
            },
        )


def _hub(folder: Path) -> re.Match | None:
    """Repository and revision, if the folder lies in the cache of `huggingface_hub`."""
    return _HUB_CACHE.search(folder.absolute().as_posix())


def _name(folder: Path) -> str:
    """The name of the folder; in the cache of `huggingface_hub`, where that is a commit, of the repository."""
    folder, hub = folder.absolute(), _hub(folder)
    return hub["repo"].split("--")[-1] if hub and folder.name == hub["revision"] else folder.resolve().name


def _adapters_in(root: Path) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is no folder. Adapters on the Hub are harvested from the folder that "
            '`huggingface_hub.snapshot_download(repo_id, ignore_patterns=["*.bin", "*.pt"])` returns.'
        )
    adapters = sorted(path.parent for path in root.rglob(ADAPTER_CONFIG))
    if not adapters:
        raise FileNotFoundError(f"{root} holds no `{ADAPTER_CONFIG}` at any depth, so it holds no PEFT adapter.")
    return adapters


def _read_config(folder: Path, base_model: str | None) -> dict:
    path = folder / ADAPTER_CONFIG
    config = _read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{path} names no `peft_type`, so PEFT did not write it; take it out of the folder.")
    if config["peft_type"] != "LORA":
        raise ValueError(f"{path} has `peft_type` {config['peft_type']!r}; only 'LORA' fits into a zoo, take it out.")
    came = config.get("base_model_name_or_path")
    if base_model is not None and came != base_model:
        raise ValueError(
            f"{path} is made for the base model {came!r}, but {base_model!r} is asked for; take it out of the folder, "
            "or, if the two are one model under two names, correct `base_model_name_or_path`."
        )
    if not isinstance(came, str) or not came:
        raise ValueError(f"{path} has no `base_model_name_or_path`; write the Hub id of its base model there.")
    return config


def _check_weights(path: Path, labels: Sequence[str]) -> None:
    if not path.is_file():
        pickles = [path.with_name(name) for name in PICKLES if path.with_name(name).is_file()]
        if pickles:
            raise ValueError(
                f"{pickles[0]} is a pickle, which can run any code when it is opened, and is refused. Load the "
                f"adapter with PEFT where you trust it and save it again: PEFT writes `{ADAPTER_WEIGHTS}`."
            )
        raise ValueError(
            f"{path.parent} has an `{ADAPTER_CONFIG}` but no `{path.name}`; save the adapter again or take it out."
        )
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if not any(LORA_NAME.fullmatch(name) for name in shapes):
        raise ValueError(
            f"{path} has no tensor named `….lora_A.weight`, but {list(shapes)[:3]}; it is no adapter of PEFT, take it "
            "out of the folder."
        )
    for name, shape in shapes.items():
        if labels and name.endswith(HEAD_WEIGHTS) and shape[0] != len(labels):
            raise ValueError(
                f"{path}: the head {name!r} has {shape[0]} classes, but there are {len(labels)} class names "
                f"{list(labels)[:8]}; put the right names into `labels.json` beside it, or pass `labels`."
            )


def _labels(folder: Path, config: dict) -> list[str]:
    """Class names in the order of the rows of the head; none, if nothing in the folder names them."""
    path = folder / "labels.json"
    if path.is_file():
        labels = _read_json(path)
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(f'{path} must be a list of class names such as ["negative", "positive"].')
        return labels
    path = folder / (ADAPTER_CONFIG if "id2label" in config else "config.json")
    beside = config if "id2label" in config else _read_json(path) if path.is_file() else {}
    id2label = beside.get("id2label") or {} if isinstance(beside, dict) else None
    if not isinstance(id2label, dict) or set(id2label) != {str(i) for i in range(len(id2label))}:
        raise ValueError(f"{path}: `id2label` must name the classes 0, 1, …, got {id2label!r}; correct it.")
    return [str(id2label[str(i)]) for i in range(len(id2label))]


def _prompt(path: Path) -> str | None:
    """The prompt that a card names."""
    if not path.is_file():
        return None
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a model card ({error}); correct or remove it.") from error
    named = [card.data.to_dict().get(field) for field in PROMPT_FIELDS] + _PROMPT_LINE.findall(card.text)
    return next((p.strip() for p in named if isinstance(p, str) and p.strip()), None)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable JSON ({error}); save the adapter again or take it out.") from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is no whole safetensors file ({error}): it is truncated or something else under this name. Download "
        "or save it again."
    )

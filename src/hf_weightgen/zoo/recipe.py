"""How the text zoo is trained, and what its rows and its folder tell of it."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

from peft import LoraConfig, TaskType

from ..targets.base_models import MINILM
from ..targets.tasks import TASKS, TaskSpec


CONFIG = "zoo_config.json"
WIDE_TASK = "clinc150"  # has no members: its many class names widen what the shared start knows
LOGIT_SCALE = 20.0  # of the shared start's head, see [`zoo.start`]
DISTILLATION = 3.0


def lora_config() -> LoraConfig:
    """r = 4 on query and value of the last two of MiniLM's six layers."""
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=4,
        lora_alpha=8,
        target_modules=["query", "value"],
        layers_to_transform=[4, 5],
        layers_pattern="layer",
    )


def lora_settings() -> dict:
    """[`lora_config`] as JSON, for rows and saved generators."""
    config = lora_config()
    return {
        "task_type": "SEQ_CLS",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
    }


@dataclass(frozen=True)
class ZooConfig:
    """
    How a zoo is trained.

    Args:
        seeds: Members per task; the last one is held out (split `"held_out"`), never used to train a generator.
        passes: Sentences that one member reads in training. `passes_of` overrides it by task name.
        checkpoints: Fractions of the training at which a member is saved.
        pool: Most training sentences that are prepared per task; `passes` where that is larger.
        longest_of: Tasks whose pool is their longest texts, not a random choice: SST-2's train split holds every phrase of
            its sentences, its test split sentences only.
        lr, head_lr, batch_size, warmup: AdamW, linear decay.
        bf16: Members are trained under bfloat16 autocast (faster where the processor has it), evaluated in float32.
        base_steps, base_batch_size, base_lr, base_projection_lr, base_pool: The shared start.
    """

    base_model: str = MINILM
    seeds: int = 6
    passes: int = 4000
    passes_of: Mapping[str, int] = field(default_factory=lambda: {"sst2": 10_000})
    checkpoints: tuple[float, ...] = (0.6, 0.8, 1.0)
    pool: int = 4000
    longest_of: tuple[str, ...] = ("sst2",)
    lr: float = 2e-3
    head_lr: float = 1e-2
    batch_size: int = 32
    warmup: float = 0.06
    bf16: bool = False
    max_length: int = 64
    seed: int = 0
    base_steps: int = 3000
    base_batch_size: int = 64
    base_lr: float = 2e-3
    base_projection_lr: float = 1e-3
    base_pool: int = 1500


def default_tasks() -> tuple[list[TaskSpec], list[TaskSpec]]:
    """The tasks with members in the text zoo, and those that only its shared start reads."""
    base_only = [TASKS[WIDE_TASK]]
    return [task for task in TASKS.values() if task not in base_only], base_only


def arch_of(config: ZooConfig) -> dict:
    return {"base_model": config.base_model, **lora_settings()}


def hyper_parameters(config: ZooConfig) -> dict:
    return json.loads(
        json.dumps(
            asdict(config)
            | {"passes_of": dict(config.passes_of), "logit_scale": LOGIT_SCALE, "distillation": DISTILLATION}
        )
    )


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "peft", "datasets")},
    }


def provenance_of(config: ZooConfig, sentence_passes: int) -> dict:
    """What every row tells of how it came about."""
    return {
        "hyper_parameters": hyper_parameters(config),
        "versions": versions(),
        "sentence_passes": sentence_passes,
    }


def config_of(provenance: Mapping) -> ZooConfig:
    """The configuration that a row's provenance tells of; what an older row does not tell is as it is now."""
    told = provenance["hyper_parameters"]
    known = {name: told[name] for name in (entry.name for entry in fields(ZooConfig)) if name in told}
    return ZooConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def check_same_config(path: Path, wanted: Mapping) -> None:
    """A zoo is one configuration, told as JSON: later calls must bring the one of the first."""
    file = path / CONFIG
    if not file.exists():
        return
    found = json.loads(file.read_text())
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise ValueError(
            f"{file} was started with `{key}` = {found.get(key)!r}, now {wanted[key]!r} is asked for. "
            "Continue with the same settings, or choose another folder."
        )


def write_config(path: Path, settings: Mapping) -> None:
    if (path / CONFIG).exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f"{CONFIG}.{os.getpid()}.tmp"  # several processes may start a zoo together
    temporary.write_text(json.dumps(settings, indent=2, sort_keys=True))
    temporary.replace(path / CONFIG)


def seed_of(*parts) -> int:
    """A seed that depends on what it is for alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest())

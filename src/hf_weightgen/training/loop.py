"""The one training loop: accelerate, gradient clipping, EMA, checkpoints, exact resume, trackers.

A run's state is its step number, the parameters, the optimizer and the EMA: batches and noise follow from the step
(see [`StepRandom`]), so a killed run that resumes from a checkpoint ends with the same parameters.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from .batches import StepRandom


@dataclass(frozen=True)
class LoopConfig:
    """
    Args:
        max_train_steps, train_batch_size: Steps, and rows per step over all processes together.
        checkpointing_steps: A checkpoint every so many steps under `output_dir`; 0 for none.
        resume_from_checkpoint: `"latest"`, a folder `checkpoint-N` of this run, or `None` to start anew.
        ema_decay: Decay of the exponential moving average of the parameters; 0 for none.
    """

    output_dir: Path
    max_train_steps: int = 4000
    train_batch_size: int = 64
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 100
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    checkpointing_steps: int = 0
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    seed: int = 0


def train(
    accelerator: Accelerator,
    model: nn.Module,
    loss_of: Callable[[nn.Module, StepRandom], Tensor],
    config: LoopConfig,
    name: str,
) -> nn.Module:
    """
    Trains `model` in place and returns it, with the EMA's parameters if there is one.

    Args:
        loss_of: `(model, draws of the step) -> loss`, a mean over the rows of the local batch. If it has a
            `state_dict`, that is kept in checkpoints.
        name: Prefix of logged values and of the checkpoint folder.

    Raises:
        ValueError: If the batch does not divide over the processes, or the checkpoint to resume from is not there.
        FloatingPointError: If the loss is not finite.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    if config.train_batch_size % processes:
        raise ValueError(f"`train_batch_size` {config.train_batch_size} does not divide over {processes} processes.")
    local = config.train_batch_size // processes
    rows = slice(rank * local, (rank + 1) * local)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.lr_warmup_steps, config.max_train_steps)
    model.train()
    # a loss may call the model as often as a batch has layouts, in each process another number of times: no call may wait for others
    accelerator.ddp_handler = accelerator.ddp_handler or DistributedDataParallelKwargs(broadcast_buffers=False)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ema = (
        EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        if config.ema_decay
        else None
    )
    state = {"model": model, "optimizer": optimizer, "schedule": schedule} | ({"ema": ema} if ema else {})
    if hasattr(loss_of, "state_dict"):
        state["loss"] = loss_of
    folder = Path(config.output_dir) / name
    first = _resume(folder, config.resume_from_checkpoint, state)
    steps = range(first, config.max_train_steps)
    bar = tqdm(
        steps,
        desc=name,
        unit="step",
        initial=first,
        total=config.max_train_steps,
        disable=not accelerator.is_local_main_process,
    )
    for step in bar:
        loss = loss_of(wrapped, StepRandom(config.seed, step, config.train_batch_size, rows))
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss of {name} is {loss.item()} at step {step}; lower the learning rate, or check the zoo for outliers."
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if ema:
            ema.step(model.parameters())
        if step % 50 == 0 or step + 1 == config.max_train_steps:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            accelerator.log({f"{name}/loss": loss.item(), f"{name}/lr": schedule.get_last_lr()[0]}, step=step)
        if config.checkpointing_steps and (step + 1) % config.checkpointing_steps == 0 and accelerator.is_main_process:
            _save(folder, step + 1, state, config.checkpoints_total_limit)
    accelerator.wait_for_everyone()
    if ema:
        ema.copy_to(model.parameters())
    return model.eval()


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _save(folder: Path, step: int, state: dict, limit: int) -> None:
    """Writes `checkpoint-{step}` under a temporary name and moves it into place; keeps the newest `limit`."""
    temporary, final = folder / f".checkpoint-{step}.tmp", folder / f"checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save({key: value.state_dict() for key, value in state.items()}, temporary / "state.pt")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in _checkpoints(folder)[:-limit]:
        shutil.rmtree(old)


def _resume(folder: Path, which: str | None, state: dict) -> int:
    """Loads a checkpoint of this run's own folder; returns the step to continue with."""
    if which is None:
        return 0
    found = _checkpoints(folder)
    if which == "latest":
        if not found:
            return 0
        path = found[-1]
    else:
        path = folder / Path(which).name
        if path not in found:
            raise ValueError(
                f"No checkpoint {path}; there are {[p.name for p in found] or 'none'}. Give one of them, or 'latest'."
            )
    saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    for key, value in state.items():
        value.load_state_dict(saved[key])
    return int(path.name.split("-")[1])

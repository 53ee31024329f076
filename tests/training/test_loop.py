"""The loop: a resumed run and a run in two processes end where a straight run in one process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.objectives import vae_loss
from tiny import vae, zoo


SCRIPT = Path(__file__).with_name("run_tiny.py")
STEPS = 12


@pytest.fixture(scope="module")
def tiny_zoo():
    return zoo()


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


class Killed(Exception):
    pass


def run(accelerator, rows, folder, die_at: int | None = None, ema_decay: float = 0.9, **settings) -> dict[str, Tensor]:
    model = vae(rows)

    def loss_of(wrapped: nn.Module, random) -> Tensor:
        if random.step == die_at:
            raise Killed
        return vae_loss(wrapped, rows, random)

    config = LoopConfig(
        folder, STEPS, train_batch_size=6, lr_warmup_steps=3, ema_decay=ema_decay, checkpointing_steps=4, **settings
    )
    train(accelerator, model, loss_of, config, "vae")
    assert not model.training
    return {name: value.clone() for name, value in model.state_dict().items()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "vae").iterdir())


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("die_at", [6, 8, 11])
def test_a_killed_run_resumes_bit_for_bit(die_at, ema_decay, accelerator, tiny_zoo, tmp_path):
    straight = run(accelerator, tiny_zoo, tmp_path / "straight", ema_decay=ema_decay)
    with pytest.raises(Killed):
        run(accelerator, tiny_zoo, tmp_path / "killed", die_at, ema_decay)
    resumed = run(accelerator, tiny_zoo, tmp_path / "killed", ema_decay=ema_decay, resume_from_checkpoint="latest")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_a_finished_run_resumes_to_itself(accelerator, tiny_zoo, tmp_path):
    first = run(accelerator, tiny_zoo, tmp_path)
    again = run(accelerator, tiny_zoo, tmp_path, die_at=0, resume_from_checkpoint="latest")
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_named_checkpoint_of_this_run_is_used(accelerator, tiny_zoo, tmp_path):
    first = run(accelerator, tiny_zoo, tmp_path, checkpoints_total_limit=9)
    again = run(accelerator, tiny_zoo, tmp_path, die_at=3, resume_from_checkpoint="somewhere/checkpoint-4")
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_the_newest_checkpoints_are_kept_and_nothing_half_written(accelerator, tiny_zoo, tmp_path):
    run(accelerator, tiny_zoo, tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-12", "checkpoint-8"]


def test_what_a_kill_leaves_half_written_is_no_checkpoint(accelerator, tiny_zoo, tmp_path):
    straight = run(accelerator, tiny_zoo, tmp_path / "straight")
    with pytest.raises(Killed):
        run(accelerator, tiny_zoo, tmp_path / "killed", die_at=6)
    half = tmp_path / "killed" / "vae" / ".checkpoint-8.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    resumed = run(accelerator, tiny_zoo, tmp_path / "killed", resume_from_checkpoint="latest")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    assert checkpoints(tmp_path / "killed") == ["checkpoint-12", "checkpoint-8"]


def test_latest_starts_anew_where_there_is_none(accelerator, tiny_zoo, tmp_path):
    straight = run(accelerator, tiny_zoo, tmp_path / "straight")
    resumed = run(accelerator, tiny_zoo, tmp_path / "new", resume_from_checkpoint="latest")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_a_checkpoint_that_is_not_there_is_refused(accelerator, tiny_zoo, tmp_path):
    run(accelerator, tiny_zoo, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-5; there are \['checkpoint-8', 'checkpoint-12'\]"):
        run(accelerator, tiny_zoo, tmp_path, resume_from_checkpoint="checkpoint-5")


def test_a_loss_that_is_no_number_stops_the_run(accelerator, tiny_zoo, tmp_path):
    model = vae(tiny_zoo)
    config = LoopConfig(tmp_path, STEPS, train_batch_size=6)
    with pytest.raises(FloatingPointError, match="loss of vae is nan at step 0; lower the learning rate"):
        train(accelerator, model, lambda m, r: vae_loss(m, tiny_zoo, r) * float("nan"), config, "vae")


def test_the_average_is_smoother_than_the_last_step(accelerator, tiny_zoo, tmp_path):
    last, average = (run(accelerator, tiny_zoo, tmp_path / str(decay), ema_decay=decay) for decay in (0.0, 0.9))
    start = vae(tiny_zoo).state_dict()
    moved = [sum((p[n] - v).norm() for n, v in start.items() if v.is_floating_point()) for p in (last, average)]
    assert 0 < moved[1] < moved[0]


def test_two_processes_train_as_one_does(accelerator, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    found = {}
    for processes in (1, 2):
        output = tmp_path / f"{processes}.safetensors"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        command = [sys.executable, *launcher, str(SCRIPT), str(output), str(processes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = load_file(output)
    assert len(found[1]) > 20
    for name, value in found[1].items():
        assert torch.allclose(found[2][name], value, rtol=1e-4, atol=1e-6), name

"""What `test_loop.py` starts in one and in two processes: 50 steps of a tiny autoencoder and a tiny denoiser."""

import sys
from pathlib import Path

from accelerate import Accelerator
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from hf_weightgen.training.d2nwg import encode
from hf_weightgen.training.loop import LoopConfig, train
from hf_weightgen.training.objectives import diffusion_loss, vae_loss
from tiny import denoiser, vae, zoo


STEPS = 50


def run(accelerator: Accelerator, folder: Path) -> dict:
    """Trains both networks; returns all of their parameters."""
    rows, first, second = zoo(), vae(zoo()), denoiser()
    config = LoopConfig(folder, STEPS, train_batch_size=8, lr_warmup_steps=5, ema_decay=0.9)
    train(accelerator, first, lambda m, r: vae_loss(m, rows, r), config, "vae")
    latents, log_stds = (values.unflatten(1, (1, 2, 2)) for values in encode(first, rows))
    noise = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    train(accelerator, second, lambda m, r: diffusion_loss(m, noise, latents, log_stds, rows, r), config, "denoiser")
    networks = {"vae": first, "denoiser": second}
    return {f"{name}.{k}": v.detach() for name, model in networks.items() for k, v in model.named_parameters()}


if __name__ == "__main__":
    output, expected = Path(sys.argv[1]), int(sys.argv[2])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == expected, f"{accelerator.num_processes} processes, expected {expected}"
    parameters = run(accelerator, output.parent)
    if accelerator.is_main_process:
        save_file(parameters, output)
    accelerator.end_training()

"""Real classes at a size that trains and samples in milliseconds; shared by the tests of several layers."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from hf_weightgen.models.modeling_denoiser import WeightDenoiser
from hf_weightgen.models.modeling_igpg import IGPGConfig, IGPGPrior
from hf_weightgen.models.modeling_weight_vae import WeightVAE, WeightVAEConfig
from hf_weightgen.models.modeling_weight_vqvae import WeightVQVAE, WeightVQVAEConfig
from hf_weightgen.pipelines.pipeline_d2nwg import D2NWGPipeline
from hf_weightgen.pipelines.pipeline_igpg import IGPGPipeline
from hf_weightgen.targets.architectures import HEAD, TargetConfig, TargetModel, mlp
from hf_weightgen.targets.base_models import MINILM, pack_embeddings
from hf_weightgen.targets.functional import BIAS, WEIGHT
from hf_weightgen.training.batches import ZooTensors
from hf_weightgen.training.objectives import noised
from hf_weightgen.weights.pieces import num_places
from hf_weightgen.weights.tokenization import WeightTokenizer


LORA = {
    "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"],
    "layers_to_transform": [4, 5], "layers_pattern": "layer",
}  # fmt: skip
KNOWN = {  # task -> family, class names, prompts
    "sst2": ("film", ["negative", "positive"], ["sentiment on SST-2", "is the film review positive or negative"]),
    "ag_news": ("news", ["world", "sports", "business", "science"], ["topic of AG News", "which topic is the news"]),
    "sms_spam": ("spam", ["ham", "spam"], ["SMS spam detection", "is the text message spam"]),
}
STEPS = 4  # of the sampler


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapter(seed: int, classes: int = 2) -> dict[str, Tensor]:
    """A random LoRA adapter for all-MiniLM-L6-v2 with its head, in PEFT's names."""
    generator, weights = random(seed), {}
    for layer in (4, 5):
        for module in ("query", "value"):
            name = f"base_model.model.bert.encoder.layer.{layer}.attention.self.{module}"
            weights[f"{name}.lora_A.weight"] = 0.05 * torch.randn(4, 384, generator=generator)
            weights[f"{name}.lora_B.weight"] = 0.05 * torch.randn(384, 4, generator=generator)
    weights[WEIGHT] = 0.1 * torch.randn(classes, 384, generator=generator)
    weights[BIAS] = 0.1 * torch.randn(classes, generator=generator)
    return weights


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Untrained networks start with zeros in their last layer: random ones show whether every input counts."""
    generator = random(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def pipeline(
    encoder, prediction_type: str = "v_prediction", tokenizer: WeightTokenizer | None = None
) -> D2NWGPipeline:
    """A generator of adapters for all-MiniLM-L6-v2 that was never trained."""
    torch.manual_seed(0)
    tokenizer = tokenizer or WeightTokenizer.fit(
        [adapter(0), adapter(1, classes=3)], token_size=385, head=(WEIGHT, BIAS)
    )
    config = WeightVAEConfig(
        token_size=tokenizer.token_size, num_body_tokens=tokenizer.num_body_tokens(), latent_shape=[2, 4, 4], token_width=4, hidden_size=32,
        match_threshold=0.0,  # any class names fit any prompt
    )  # fmt: skip
    vae = randomised(WeightVAE(config))
    with torch.no_grad():
        vae.body_noise.fill_(0.1)
    denoiser = randomised(WeightDenoiser(in_channels=2, sample_size=4, hidden_size=32, num_layers=1))
    training = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False)
    centres = {name: F.normalize(encoder.embed(prompts).mean(0), dim=0) for name, (_, _, prompts) in KNOWN.items()}
    pipe = D2NWGPipeline(
        vae=vae.eval(),
        unet=denoiser.eval(),
        scheduler=DPMSolverMultistepScheduler.from_config(training.config),
        weight_tokenizer=tokenizer,
        target={"kind": "adapter", "base_model": MINILM, "lora": LORA},
        tasks=[
            {
                "name": name,
                "family": family,
                "labels": labels,
                "prompt_embeddings": pack_embeddings(centres[name][None]),
            }
            for name, (family, labels, _) in KNOWN.items()
        ],
        encoder={"id": MINILM, "revision": None, "sha256": None},
        prediction_type=prediction_type,
        num_inference_steps=STEPS,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network_pipeline(encoder) -> D2NWGPipeline:
    """A generator of multilayer perceptrons with 6 inputs and 5 hidden units, never trained."""
    settings = {"input_shape": [6], "layers": mlp(5)}
    networks = [TargetModel(TargetConfig(**settings, num_classes=count)) for count in (2, 3)]
    with torch.no_grad():
        for network in networks:
            for tensor in network.parameters():
                tensor.normal_(generator=random(tensor.numel()))
    tokenizer = WeightTokenizer.fit(
        [dict(network.state_dict()) for network in networks], token_size=6, head=list(HEAD)
    )
    pipe = pipeline(encoder, tokenizer=tokenizer)
    prompt = pack_embeddings(encoder.embed(["which digit is it"]))
    digits = {"name": "digits", "family": "digits", "labels": ["zero", "one", "two"], "prompt_embeddings": prompt}
    pipe.register_to_config(target={"kind": "network", "config": settings}, tasks=[digits])
    return pipe


SIZES = {"small": (4,), "large": (6, 5)}  # hidden units of the networks of [`igpg_pipeline`]


def igpg_pipeline(encoder) -> IGPGPipeline:
    """Never trained; knows a task of texts, and one of features in two architectures."""
    torch.manual_seed(0)
    configs = {name: {"input_shape": [7], "layers": mlp(*hidden)} for name, hidden in SIZES.items()}
    networks = [TargetModel(TargetConfig(**settings, num_classes=3)).state_dict() for settings in configs.values()]
    tokenizer = WeightTokenizer.fit([adapter(0), *networks], 385, head=[WEIGHT, BIAS, *HEAD])
    both = {"num_codes": 16, "codes_per_token": 2, "hidden_size": 16, "num_attention_heads": 2}
    both |= {"num_places": num_places(tokenizer, 77), "place_size": 4}
    vqvae = WeightVQVAE(WeightVQVAEConfig(token_size=77, class_parts=5, num_layers=1, code_size=8, **both))
    prior = IGPGPrior(IGPGConfig(intermediate_size=32, num_hidden_layers=1, **both))
    targets = [{"kind": "adapter", "base_model": MINILM, "lora": LORA, "layout": 0}]
    targets += [
        {"kind": "network", "name": name, "config": settings, "layout": layout}
        for layout, (name, settings) in enumerate(configs.items(), start=1)
    ]
    tasks = [
        {"name": "sst2", "family": "film", "labels": ["negative", "positive"], "targets": [0]},
        {"name": "digits", "family": "digits", "labels": ["zero", "one", "two"], "targets": [1, 2]},
    ]
    for task, prompt in zip(tasks, ("sentiment on SST-2", "which digit is it"), strict=True):
        task["prompt_embeddings"] = pack_embeddings(encoder.embed([prompt]))
    return IGPGPipeline(
        vqvae=vqvae.eval(), prior=prior.eval(), weight_tokenizer=tokenizer, target=targets[0], targets=targets, tasks=tasks,
        encoder={"id": MINILM, "revision": None, "sha256": None},
    )  # fmt: skip


def train_a_little(pipe: D2NWGPipeline, steps: int = 5) -> None:
    """A few steps of the denoiser on random latents."""
    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=pipe.config.prediction_type)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=1e-3)
    for step in range(steps):
        draw = random(step)
        clean, noise = torch.randn(2, 8, *pipe.vae.config.latent_shape, generator=draw)
        noisy, timesteps, target = noised(schedule, clean, noise, torch.rand(8, generator=draw))
        prompts = F.normalize(torch.randn(8, pipe.vae.config.embedding_size, generator=draw), dim=-1)
        found = pipe.unet(noisy, timesteps, encoder_hidden_states=None, class_labels=prompts).sample
        F.mse_loss(found, target).backward()
        optimizer.step()
        optimizer.zero_grad()


def zoo(rows_per_task: int = 6) -> ZooTensors:
    """Three tasks of two families with 2, 3 and 2 classes; checkpoints of a task lie around a centre of their own."""
    generator, size = random(0), 8
    classes, families = {"a": 2, "b": 3, "c": 2}, {"a": "one", "b": "two", "c": "two"}
    state_dicts, names = [], []
    for task, count in classes.items():
        centre = {"body": torch.randn(5, 3, generator=generator), "head": torch.randn(count, 4, generator=generator)}
        for _ in range(rows_per_task):
            state_dicts.append({k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in centre.items()})
            names.append(task)
    tokenizer = WeightTokenizer.fit(state_dicts, token_size=4, head=["head"])
    wordings = {task: F.normalize(torch.randn(2, n, size, generator=generator), dim=-1) for task, n in classes.items()}
    prompts = {task: F.normalize(torch.randn(3, size, generator=generator), dim=-1) for task in classes}
    return ZooTensors.of(tokenizer, state_dicts, names, wordings, prompts, families)


def vae(zoo: ZooTensors) -> WeightVAE:
    body = zoo.weight_tokens.shape[1] - zoo.class_mask.shape[1]
    config = WeightVAEConfig(
        token_size=4, num_body_tokens=body, embedding_size=8, latent_shape=[1, 2, 2], token_width=3, hidden_size=16
    )
    torch.manual_seed(0)
    return WeightVAE(config)


def denoiser() -> WeightDenoiser:
    torch.manual_seed(0)
    return WeightDenoiser(
        in_channels=1, sample_size=2, projection_class_embeddings_input_dim=8, hidden_size=16, num_layers=1
    )

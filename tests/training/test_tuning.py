"""The decoder learns on what the generator makes: images of its tasks, noise that keeps its size, and nothing else that moves."""

import copy
from dataclasses import replace

import pytest
import torch

from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_weight_vae import WeightVAE
from hf_weightgen.targets.architectures import HEAD, TargetConfig, TargetModel
from hf_weightgen.targets.base_models import pack_embeddings
from hf_weightgen.targets.image_encoders import load_image_encoder
from hf_weightgen.training.batches import StepRandom
from hf_weightgen.training.tuning import FIXED, NoisyDecoder, tuned_tasks, tuning_loss
from hf_weightgen.weights.tokenization import WeightTokenizer
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import predict_networks
from pictures import image_encoder, images, in_two_tones, write
from run_network_zoo import SMALL
from tiny import pipeline, random


TASKS = {"colour": "RGB", "grey": "L"}
CONDITIONS, BATCH = 3, 4


def draws(step: int = 0) -> StepRandom:
    return StepRandom(0, step, BATCH, slice(None))


@pytest.fixture(scope="module")
def tuned(encoder, tmp_path_factory):
    """A generator with learned noise, never trained, and its two tasks."""
    folder = tmp_path_factory.mktemp("tuning")
    specs = []
    for seed, (name, mode) in enumerate(TASKS.items()):
        specs.append(
            replace(write(folder / name, train=in_two_tones(images(90, seed, mode))), prompts=(f"is it {name}",))
        )
    data = load_images(specs)
    shapes = [[3, 8, 8], [1, 8, 8]]
    settings = [
        {
            "input_shape": shape,
            "layers": list(SMALL[0]),
            "activation": SMALL[1],
            "image_mean": [0.4] * shape[0],
            "image_std": [0.2] * shape[0],
        }
        for shape in shapes
    ]
    networks = []
    for one in settings:
        for seed in range(3):
            torch.manual_seed(seed)
            networks.append(TargetModel(TargetConfig(**one, num_classes=2)).state_dict())
    tokenizer = WeightTokenizer.fit(networks, token_size=80, head=list(HEAD))
    pipe = pipeline(encoder, tokenizer=tokenizer)
    torch.manual_seed(0)
    config = copy.deepcopy(pipe.vae.config)
    config.update({"num_body_tokens": tokenizer.num_all_body_tokens, "token_size": 80, "learns_noise": True})
    sees = load_image_encoder(image_encoder(folder))
    size = sees.embed(images(1, 0)).shape[1]
    torch.manual_seed(1)
    shown = DatasetEncoder(DatasetEncoderConfig(feature_size=size, latent_size=32, hidden_size=16)).eval()
    pipe.register_modules(vae=WeightVAE(config).eval(), dataset_encoder=shown)
    targets = [{"kind": "network", "name": "small", "config": one, "layout": k} for k, one in enumerate(settings)]
    tasks = [
        {"name": spec.name, "family": spec.name, "labels": list(spec.labels), "target": k, "prompt_embeddings": pack_embeddings(encoder.embed(list(spec.prompts)))}
        for k, spec in enumerate(specs)
    ]  # fmt: skip
    pipe.register_to_config(
        target=targets[0], targets=targets, tasks=tasks, far_below=-1.0, known_above=2.0, datasets_above=-1.0
    )
    pipe._encoder, pipe.image_encoder = encoder, sees
    return pipe, [task for s in specs for task in tuned_tasks(pipe, s, data[s.name], CONDITIONS, 0)]


def test_latents_are_those_of_prompts_and_of_datasets(tuned):
    pipe, (colour, grey) = tuned
    for task, channels in ((colour, 3), (grey, 1)):
        assert task.latents.shape == (2 * CONDITIONS, 32) and task.latents.unique(dim=0).shape[0] == 2 * CONDITIONS
        assert task.class_embeds.shape == (2 * CONDITIONS, 2, 384)
        assert task.inputs.shape == (len(task.data.train), channels, 8, 8)
        pixels = task.data.train.pixels
        torch.testing.assert_close(task.inputs, (pixels / 255 - 0.4) / 0.2)  # as the generator's networks read them
        assert task.architecture is None
    again = tuned_tasks(pipe, grey.spec, grey.data, CONDITIONS, 0)[0]
    assert torch.equal(again.latents, grey.latents)
    with pytest.raises(ValueError, match="does not know the task 'other', only \\['colour', 'grey'\\]"):
        tuned_tasks(pipe, replace(grey.spec, name="other"), grey.data, CONDITIONS, 0)


@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_what_is_generated_works_better_and_noise_keeps_its_size(tuned, spread):
    pipe, tasks = tuned
    start, vae = pipe.vae, copy.deepcopy(pipe.vae)
    model = NoisyDecoder(vae)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr=3e-3)
    for step in range(120):
        loss = tuning_loss(model, start, tasks, draws(step), images=32, spread=spread)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, tensor in vae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any(name.startswith(FIXED) for name in moved)
    assert not moved & {"latent_mean", "latent_std"}
    for task in tasks:
        given, (places, sizes) = (task.latents, task.class_embeds), task.scalars
        with torch.no_grad():
            (_, first), (_, last) = start.likelihood(*given), vae.likelihood(*given)
            lengths = [(stds.flatten(1)[:, places] * sizes).norm(dim=1) for stds in (first, last)]
            assert (lengths[1] / lengths[0]).min() > 0.95 * spread
            scores = []
            for one in (start, vae):
                noise = torch.randn(len(given[0]), task.decoder.tokens, 80, generator=random(1))
                params = task.decoder(one.sample_tokens(*given, True, noise))
                right = predict_networks(task.config, params, task.inputs) == task.data.train.labels
                scores.append(right.double().mean().item())
        assert scores[1] > 0.85 > scores[0]


def test_the_noise_of_other_networks_does_not_count(tuned):
    """Each task tells the length of its own weights' noise: the tokens of both layouts lie side by side."""
    colour, grey = (set(task.scalars[0].tolist()) for task in tuned[1])
    heads = colour & grey
    T = tuned[0].weight_tokenizer.num_all_body_tokens * 80
    assert heads and min(heads) >= T and len(colour) == sum(t.numel() for t in tuned[1][0].decoder.mean.values())


def test_noise_that_is_calibrated_may_be_none(tuned):
    pipe, tasks = tuned
    config = copy.deepcopy(pipe.vae.config)
    config.learns_noise = False
    torch.manual_seed(0)
    vae = WeightVAE(config)
    assert not vae.body_noise.any()
    loss = tuning_loss(NoisyDecoder(vae), copy.deepcopy(vae), tasks, draws())
    loss.backward()
    assert loss.isfinite() and vae.token_out.grad.isfinite().all()


def test_parts_of_networks_are_refused(tuned):
    pipe, (_, grey) = copy.copy(tuned[0]), tuned[1]
    targets = copy.deepcopy(list(pipe.config.targets))
    targets[1]["config"]["layers"] = [
        *targets[1]["config"]["layers"],
        {"kind": "linear", "name": "more", "features": 4},
    ]
    pipe.register_to_config(targets=targets)
    with pytest.raises(ValueError, match="Of networks for 'grey' only a part is generated, without \\['more.bias'"):
        tuned_tasks(pipe, grey.spec, grey.data, CONDITIONS, 0)

"""Many networks in one pass give what each gives alone: logits, gradients, batch statistics."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_weightgen.targets.architectures import TargetConfig, TargetModel, architecture, cnn, mlp
from hf_weightgen.targets.stacked import stack, stacked_logits, unstack
from tiny import random


NETWORKS = 3
CONFIGS = {
    "tiny-cnn": architecture("tiny-cnn", channels=1),
    "tiny-cnn of 29 x 31": architecture("tiny-cnn", input_shape=[3, 29, 31]),
    "cnn3": architecture("cnn3"),
    "lenet": architecture("lenet", channels=1, num_classes=4),
    "resnet8": architecture("resnet8"),
    "small-lenet": architecture("small-lenet"),
    "mlp of pooled pixels": architecture("mlp", channels=1),
    "linear": TargetConfig(input_shape=[7], layers=mlp()),
    "mlp": TargetConfig(input_shape=[7], layers=mlp(5, 6), activation="silu"),
    "strided": TargetConfig(
        input_shape=[2, 9, 9],
        layers=[
            {"kind": "conv", "name": "a.b", "channels": 4, "kernel": 3, "stride": 2, "padding": 2},
            {"kind": "norm", "name": "a.norm"},
            {"kind": "activation"},
            {"kind": "mean_pool"},
        ],
    ),
    "norm behind pooling": TargetConfig(
        input_shape=[2, 8, 8],
        layers=[
            {"kind": "max_pool"},
            {"kind": "norm", "name": "first"},
            {"kind": "conv", "name": "conv", "channels": 4, "kernel": 3},
            {"kind": "max_pool"},
        ],
    ),
    "norm behind a first convolution": TargetConfig(
        input_shape=[1, 9, 9],
        layers=[
            {"kind": "conv", "name": "conv", "channels": 3, "kernel": 2},
            {"kind": "max_pool"},
            {"kind": "activation"},
            {"kind": "norm", "name": "norm"},
        ],
    ),
    "odd numbers of channels": TargetConfig(
        input_shape=[2, 12, 12],
        activation="sigmoid",  # that of zero is not zero
        layers=[
            {"kind": "conv", "name": "first", "channels": 3, "kernel": 3},
            {"kind": "max_pool"},
            {"kind": "conv", "name": "second", "channels": 5, "kernel": 2},
            {"kind": "activation"},
            {
                "kind": "residual",
                "channels": 7,
                "layers": [
                    {"kind": "conv", "name": "a", "channels": 6, "kernel": 3, "padding": 1},
                    {"kind": "norm", "name": "norm"},
                    {"kind": "conv", "name": "b", "channels": 7, "kernel": 3, "padding": 1},
                ],
            },
            {"kind": "conv", "name": "last", "channels": 3, "kernel": 2},
            {"kind": "mean_pool"},
        ],
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def networks(config: TargetConfig) -> tuple[list[TargetModel], dict, dict]:
    """Networks, their stacked parameters with gradients, and stacked statistics."""
    torch.manual_seed(0)
    models = [
        TargetModel(config).double() for _ in range(NETWORKS)
    ]  # in float32 rounding switches a ReLU now and then
    stacked = stack([model.state_dict() for model in models])
    trained = {name for name, _ in models[0].named_parameters()}
    params = {name: tensor.clone().requires_grad_() for name, tensor in stacked.items() if name in trained}
    return models, params, {name: tensor.clone() for name, tensor in stacked.items() if name not in trained}


def images(config: TargetConfig, *leading: int) -> torch.Tensor:
    """With many equal pixels, as the dark corners of images are."""
    return torch.randn(*leading, *config.input_shape, generator=random(1), dtype=torch.float64).clamp(min=0)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("batch", [6, 1])
def test_training_is_that_of_each_network(config, own, batch):
    models, params, running = networks(config)
    inputs = images(config, NETWORKS if own else 1, batch)
    labels = torch.randint(config.num_classes, (batch,), generator=random(2))
    logits = stacked_logits(config, params, inputs, running)
    F.cross_entropy(logits.flatten(0, 1), labels.repeat(NETWORKS), reduction="sum").div(batch).backward()
    for k, model in enumerate(models):
        output = model.train()(inputs[k if own else 0], labels)
        output.loss.backward()
        torch.testing.assert_close(logits[k], output.logits)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(params[name].grad[k], parameter.grad)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(running[name][k], buffer)


def test_images_get_gradients_too(config):
    models, params, running = networks(config)
    inputs = images(config, 1, 3).requires_grad_()
    stacked_logits(config, params | running, inputs).square().sum().backward()
    own = inputs.detach()[0].requires_grad_()
    sum(model.eval()(own).logits.square().sum() for model in models).backward()
    torch.testing.assert_close(inputs.grad[0], own.grad)


def test_evaluation_is_that_of_each_network_and_leaves_statistics_alone(config):
    models, params, running = networks(config)
    for tensor in running.values():
        tensor.copy_(tensor + 1)
    before = {name: tensor.clone() for name, tensor in running.items()}
    inputs = images(config, 1, 6)
    logits = stacked_logits(config, params | running, inputs)
    with torch.no_grad():  # has shorter ways
        torch.testing.assert_close(stacked_logits(config, params | running, inputs), logits)
    for k, model in enumerate(models):
        model.load_state_dict(unstack(params | running, k))
        torch.testing.assert_close(logits[k], model.eval()(inputs[0]).logits)
    assert all(torch.equal(running[name], before[name]) for name in running)


def test_evaluation_under_autocast_is_nearly_that_in_full():
    config = architecture("tiny-cnn", channels=1)
    params = stack([TargetModel(config).state_dict() for _ in range(NETWORKS)])
    inputs = torch.rand(1, 4, 1, 28, 28, generator=random(0))
    with torch.no_grad():
        whole = stacked_logits(config, params, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            half = stacked_logits(config, params, inputs)
    torch.testing.assert_close(half.float(), whole, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("name", "channels", "weights"),
    [
        ("tiny-cnn", 1, 2_464),
        ("tiny-cnn", 3, 2_864),
        ("cnn3", 3, 10_853),
        ("resnet20", 3, 269_722),
        ("lenet", 1, 61_706),
    ],
)
def test_named_networks_have_their_published_sizes(name, channels, weights):
    model = TargetModel(architecture(name, channels=channels))
    assert sum(parameter.numel() for parameter in model.parameters()) == weights


def test_any_network_is_saved_and_loaded(config, tmp_path):
    model = TargetModel(config).eval()
    inputs = images(config, 2).float()
    model.save_pretrained(tmp_path)
    again = TargetModel.from_pretrained(tmp_path).eval()
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    torch.testing.assert_close(again(inputs).logits, model(inputs).logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "cosine"}, "`activation` must be one of .*'cosine'"),
        ({"input_shape": [3, 8]}, r"`input_shape` must be .* got \[3, 8\]"),
        ({"layers": [{"kind": "lstm"}]}, "`kind` must be one of .*'lstm'"),
        ({"layers": [{"kind": "max_pool", "size": 3}]}, "'max_pool' layer has no setting 'size'"),
        ({"layers": [{"kind": "linear", "name": "a"}]}, "'linear' layer needs the setting 'features'"),
    ],
)
def test_what_is_no_network_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TargetConfig(**settings)


def test_unknown_names_are_refused():
    for name in ("vgg16", "resnet18"):
        with pytest.raises(ValueError, match="no architecture 'vgg16'|6 n \\+ 2 layers"):
            architecture(name)
    with pytest.raises(ValueError, match="zip"):
        cnn((1, 2), (3,), (True, True), ())

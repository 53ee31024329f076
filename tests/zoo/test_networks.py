"""K networks trained at once are the K networks that each alone would have become."""

import json
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from hf_weightgen.targets.architectures import TargetConfig, TargetModel, architecture, mlp
from hf_weightgen.targets.stacked import unstack
from hf_weightgen.zoo.heads import HeadZooConfig, train_heads
from hf_weightgen.zoo.networks import INITS, initial, predict_networks, train_networks
from tiny import random


SEEDS, STEPS, BATCH = [3, 4, 5], 50, 8
CONFIGS = {
    "tiny-cnn": architecture("tiny-cnn", channels=1),
    "resnet8": architecture("resnet8", input_shape=[3, 8, 8]),
    "mlp": TargetConfig(input_shape=[6], layers=mlp(5), num_classes=3),
}
OPTIMIZERS = {
    "adam": (lambda params: Adam(params, lr=3e-3), None),
    "fused adam": (lambda params: Adam(params, lr=3e-3, fused=True), None),
    "sgd": (lambda params: SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3), None),
    "adamw with a schedule": (
        lambda params: AdamW(params, lr=3e-3, weight_decay=0.1),
        lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=STEPS),
    ),
    "rmsprop": (lambda params: RMSprop(params, lr=1e-3), None),
}


def data(config: TargetConfig, *leading: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(*leading, 5 * BATCH + 3, *config.input_shape, generator=random(1)).clamp(min=0)
    return inputs, torch.randint(config.num_classes, inputs.shape[: len(leading) + 1], generator=random(2))


def alone(config, seed, inputs, labels, make_optimizer, make_scheduler) -> dict[str, torch.Tensor]:
    """A plain loop over batches in the same order."""
    model = TargetModel(config).to(inputs.dtype)
    model.load_state_dict(unstack(initial(config, [seed], bias=0.01), 0))
    optimizer, generator = make_optimizer(model.parameters()), random(7)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    for _ in range(STEPS // 5):
        order = torch.randperm(len(inputs), generator=generator)
        for batch in order[: 5 * BATCH].split(BATCH):
            loss = model.train()(inputs[batch], labels[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
    return model.state_dict()


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_training_each_alone(name, optimizer, own):
    config, (make_optimizer, make_scheduler) = CONFIGS[name], OPTIMIZERS[optimizer]
    inputs, labels = data(config, len(SEEDS)) if own else data(config)
    inputs = inputs.double()  # in float32 rounding switches a ReLU now and then, and an optimiser makes much of it
    params = {n: t.double() if t.is_floating_point() else t for n, t in initial(config, SEEDS, bias=0.01).items()}
    settings = {"epochs": STEPS // 5, "batch_size": BATCH, "generator": random(7), "make_scheduler": make_scheduler}
    *_, trained = train_networks(config, params, inputs, labels, make_optimizer, **settings)
    for k, seed in enumerate(SEEDS):
        given = (inputs[k], labels[k]) if own else (inputs, labels)
        expected = alone(config, seed, *given, make_optimizer, make_scheduler)
        for tensor_name, tensor in expected.items():
            torch.testing.assert_close(trained[tensor_name][k], tensor, rtol=1e-6, atol=1e-9)


def test_in_float32_parameters_agree_within_a_ten_thousandth():
    config, (make_optimizer, _) = CONFIGS["tiny-cnn"], OPTIMIZERS["sgd"]
    inputs, labels = data(config)
    settings = {"epochs": STEPS // 5, "batch_size": BATCH, "generator": random(7)}
    *_, trained = train_networks(config, initial(config, SEEDS, bias=0.01), inputs, labels, make_optimizer, **settings)
    for k, seed in enumerate(SEEDS):
        for name, tensor in alone(config, seed, inputs, labels, make_optimizer, None).items():
            torch.testing.assert_close(trained[name][k], tensor, rtol=1e-4, atol=1e-6)


HEADS = TargetConfig(input_shape=[12], layers=[], num_classes=4)


@pytest.mark.parametrize("batch", [23, BATCH], ids=["whole", "mini-batches"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_linear_heads_are_those_of_linear_layers_trained_each_alone(optimizer, batch):
    make_optimizer, make_scheduler = OPTIMIZERS[optimizer]
    features = torch.randn(len(SEEDS), 23, 12, generator=random(1))
    labels = torch.randint(4, (len(SEEDS), 23), generator=random(2))
    epochs, start = STEPS // (23 // batch), initial(HEADS, SEEDS)
    params = {name: tensor.clone() for name, tensor in start.items()}
    settings = {"epochs": epochs, "batch_size": batch, "generator": random(7), "make_scheduler": make_scheduler}
    *_, trained = train_networks(HEADS, params, features, labels, make_optimizer, **settings)
    for k in range(len(SEEDS)):
        head, generator = torch.nn.Linear(12, 4), random(7)
        head.load_state_dict({"weight": start["head.weight"][k], "bias": start["head.bias"][k]})
        own = make_optimizer(head.parameters())
        scheduler = make_scheduler(own) if make_scheduler else None
        for _ in range(epochs):
            for rows in torch.randperm(23, generator=generator)[: 23 // batch * batch].split(batch):
                own.zero_grad()
                F.cross_entropy(head(features[k][rows]), labels[k][rows]).backward()
                own.step()
                if scheduler:
                    scheduler.step()
        torch.testing.assert_close(trained["head.weight"][k], head.weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(trained["head.bias"][k], head.bias.detach(), rtol=1e-4, atol=1e-6)
        assert torch.equal(predict_networks(HEADS, trained, features)[k], head(features[k]).argmax(-1))


@pytest.mark.parametrize("count", [1, 6, 30], ids="{} examples".format)  # 30 are more than features
@pytest.mark.parametrize(
    "rule", [{}, {"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}], ids=str
)
def test_heads_in_the_span_of_their_examples_are_those_of_linear_layers(rule, count):
    features = torch.randn(len(SEEDS), count, 12, generator=random(1))
    labels, start = torch.randint(4, (len(SEEDS), count), generator=random(2)), initial(HEADS, SEEDS)

    def make_optimizer(tensors):
        weight, bias = tensors
        return SGD([{"params": [weight], "lr": 0.3, "weight_decay": 0.02}, {"params": [bias], "lr": 0.1}], **rule)

    def make_scheduler(optimizer):
        return OneCycleLR(optimizer, [0.5, 0.2], total_steps=STEPS)

    kept = {name: tensor.clone() for name, tensor in start.items()}
    trained = train_heads(start, features, labels, make_optimizer, steps=STEPS, make_scheduler=make_scheduler)
    assert all(torch.equal(start[name], tensor) for name, tensor in kept.items())
    for k in range(len(SEEDS)):
        head = torch.nn.Linear(12, 4)
        head.load_state_dict({"weight": start["head.weight"][k], "bias": start["head.bias"][k]})
        own = make_optimizer(list(head.parameters()))
        scheduler = make_scheduler(own)
        for _ in range(STEPS):
            own.zero_grad()
            F.cross_entropy(head(features[k]), labels[k]).backward()
            own.step()
            scheduler.step()
        torch.testing.assert_close(trained["head.weight"][k], head.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trained["head.bias"][k], head.bias.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_heads_do_not_depend_on_the_kernel_or_the_layout_in_memory(kernel):
    features, labels = torch.randn(3, 6, 12, generator=random(1)), torch.randint(4, (3, 6), generator=random(2))
    start = initial(HEADS, SEEDS)
    start["head.bias"] = torch.randn(4, 3, generator=random(3)).T

    def trained(**settings) -> dict[str, torch.Tensor]:
        def make_optimizer(tensors):
            return SGD(tensors, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05, **settings)

        def make_scheduler(optimizer):
            def decay(epoch):  # ends: from here on some kernels write into gradients
                optimizer.param_groups[0]["weight_decay"] = 0.05 if epoch < 10 else 0.0
                return 1.0

            return LambdaLR(optimizer, decay)

        return train_heads(start, features, labels, make_optimizer, steps=30, make_scheduler=make_scheduler)

    plain, other = trained(foreach=False), trained(**{kernel: True})
    for name, tensor in plain.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_settings_of_head_zoos_are_stable_where_features_hardly_differ():
    """All of one length, so alike that the loss is as curved as it can be."""
    features = 4 * torch.randn(8, 1, 12, generator=random(1)) + torch.randn(8, 20, 12, generator=random(2))
    features, labels = F.normalize(features, dim=-1), torch.arange(2).repeat_interleave(10).expand(8, -1)
    two, zoo = TargetConfig(input_shape=[12], layers=[], num_classes=2), HeadZooConfig(())

    def loss(steps: int, lr: float) -> torch.Tensor:
        rule = {"lr": lr, "momentum": zoo.momentum, "weight_decay": zoo.weight_decay}
        heads = train_heads(initial(two, range(8)), features, labels, lambda t: SGD(t, **rule), steps=steps)
        logits = features @ heads["head.weight"].mT + heads["head.bias"][:, None]
        decay = heads["head.weight"].square().sum((1, 2)) + heads["head.bias"].square().sum(1)
        return F.cross_entropy(logits.mT, labels, reduction="none").mean(1) + zoo.weight_decay / 2 * decay

    assert (loss(zoo.steps, zoo.lr) < loss(5000, 0.3) + 0.02).all()


def test_heads_need_labels_of_their_examples():
    with pytest.raises(ValueError, match=r"labels \(K, n\), got \(3, 2, 12\) and \(3, 1\)"):
        train_heads(initial(HEADS, SEEDS), torch.zeros(3, 2, 12), torch.zeros(3, 1).long(), Adam, steps=1)


def test_an_optimiser_that_leaves_the_span_is_refused():
    with pytest.raises(ValueError, match="needs `torch.optim.SGD`, got Adam"):
        train_heads(initial(HEADS, SEEDS), torch.zeros(3, 2, 12), torch.zeros(3, 2).long(), Adam, steps=1)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_heads_of_fewer_classes_are_those_of_their_size(own):
    classes, params = torch.tensor([2, 4, 3]), initial(HEADS, SEEDS)
    start = {name: tensor.clone() for name, tensor in params.items()}
    inputs, _ = data(HEADS, 3) if own else data(HEADS)
    labels = torch.randint(100, (3, 43), generator=random(2)) % classes[:, None]
    settings = {"epochs": 5, "batch_size": BATCH, "num_classes": classes}
    adam = OPTIMIZERS["adam"][0]
    *_, trained = train_networks(HEADS, params, inputs, labels, adam, generator=random(7), at_once=2, **settings)
    predictions = predict_networks(HEADS, trained, inputs, num_classes=classes, at_once=2)
    for k, count in enumerate(classes.tolist()):
        smaller = TargetConfig(input_shape=[12], layers=[], num_classes=count)
        single = {name: tensor[k : k + 1, :count].clone() for name, tensor in start.items()}
        given, settings["num_classes"] = inputs[k : k + 1] if own else inputs, None
        *_, alone = train_networks(smaller, single, given, labels[k : k + 1], adam, generator=random(7), **settings)
        for name, tensor in alone.items():
            torch.testing.assert_close(trained[name][k, :count], tensor[0], rtol=1e-4, atol=1e-6)
            assert torch.equal(trained[name][k, count:], start[name][k, count:])
        assert torch.equal(predict_networks(smaller, alone, given)[0], predictions[k])


def test_training_learns_and_tells_losses():
    config = TargetConfig(input_shape=[4], layers=mlp(8), num_classes=4)
    labels = torch.randint(4, (400,), generator=random(0))
    inputs = F.one_hot(labels, 4) + 0.3 * torch.randn(400, 4, generator=random(1))
    losses = []
    params = initial(config, SEEDS)
    assert (predict_networks(config, params, inputs) == labels).double().mean() < 0.6
    settings = {"epochs": 5, "batch_size": 20, "generator": random(2), "on_step": losses.append}
    epochs = list(train_networks(config, params, inputs, labels, OPTIMIZERS["sgd"][0], **settings))
    assert len(epochs) == 5 and len(losses) == 100 and losses[0].shape == (3,)
    assert torch.stack(losses[-10:]).mean() < torch.stack(losses[:10]).mean() / 2
    predictions = predict_networks(config, epochs[-1], inputs, chunk=70)
    assert predictions.shape == (3, 400) and ((predictions == labels).double().mean(1) > 0.9).all()
    for k in range(3):
        model = TargetModel(config)
        model.load_state_dict(unstack(epochs[-1], k))
        assert torch.equal(model(inputs).logits.argmax(-1), predictions[k])


# pages of fresh memory that predicting with many networks takes, once and again
COUNT_PAGES = """
import json, resource, torch
from hf_weightgen.targets.architectures import architecture
from hf_weightgen.zoo.networks import initial, keep_memory, predict_networks
keep_memory()
config = architecture("tiny-cnn", channels=1)
params, images, taken = initial(config, list(range(128))), torch.rand(256, 1, 28, 28), []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    predict_networks(config, params, images)
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(taken))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_evaluation_works_in_memory_that_it_keeps():
    done = subprocess.run([sys.executable, "-c", COUNT_PAGES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, again = json.loads(done.stdout)
    assert again < first / 4


@pytest.mark.parametrize("init", INITS)
def test_a_seed_is_a_network_in_any_group(init):
    config = CONFIGS["resnet8"]
    together = initial(config, SEEDS, init)
    for k, seed in enumerate(SEEDS):
        single = initial(config, [seed], init)
        assert all(torch.equal(single[name][0], tensor[k]) for name, tensor in together.items())
    assert not torch.equal(together["conv1.weight"][0], together["conv1.weight"][1])
    assert together["bn1.weight"].eq(1).all() and together["head.bias"].eq(0).all()


def test_faults_name_what_came():
    with pytest.raises(ValueError, match="`init` must be one of .*'xavier'"):
        initial(CONFIGS["mlp"], [0], "xavier")
    inputs, labels = data(CONFIGS["mlp"])
    training = train_networks(
        CONFIGS["mlp"], initial(CONFIGS["mlp"], [0]), inputs, labels, OPTIMIZERS["sgd"][0], epochs=1, batch_size=100,
        generator=random(0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="batch of 100 examples .* got 43"):
        next(training)

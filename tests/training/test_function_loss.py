"""Decoded adapters read sentences: the loss is theirs, the same in shares of a batch, and training lowers it."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_weightgen.targets.architectures import HEAD, TargetConfig, TargetModel, architecture, mlp
from hf_weightgen.targets.base_models import MINILM, load_classifier, load_tokenizer
from hf_weightgen.targets.functional import BIAS, WEIGHT, AdapterTarget
from hf_weightgen.training.batches import StepRandom, ZooTensors
from hf_weightgen.training.function_loss import EVERY, AdapterLoss, BatchDecoder, NetworkLoss
from hf_weightgen.weights.tokenization import WeightTokenizer
from hf_weightgen.zoo.recipe import lora_config
from tiny import adapter


TOTAL = 2 * EVERY
POOLS = {
    "films": {"text": ["a gripping, funny film", "a dull and tedious film"] * 20, "label": [1, 0] * 20},
    "topics": {"text": ["shares fell", "the striker scored", "a new phone"] * 14, "label": [0, 1, 2] * 14},
}


def draws(step: int = 0, rows: slice = slice(None)) -> StepRandom:
    return StepRandom(0, step, TOTAL, rows)


@pytest.fixture(scope="module")
def zoo(encoder):
    """Two tasks with 2 and 3 classes, three adapters each, and a shared start."""
    counts = {"films": 2, "topics": 3, "start": 3}
    names = ["films"] * 3 + ["topics"] * 3 + ["start"]
    state_dicts = [adapter(seed, classes=counts[name]) for seed, name in enumerate(names)]
    tokenizer = WeightTokenizer.fit(state_dicts, token_size=385, head=(WEIGHT, BIAS))
    embeds = {name: torch.randn(1, count, 384) for name, count in counts.items()}
    prompts = {name: torch.randn(1, 384) for name in counts}
    rows = ZooTensors.of(tokenizer, state_dicts, names, embeds, prompts, {name: name for name in counts}, start=6)
    return tokenizer, rows, state_dicts


@pytest.fixture(scope="module")
def loss_of(zoo):
    tokenizer, rows, _ = zoo
    target = AdapterTarget(load_classifier(MINILM, num_labels=2), lora_config())
    return AdapterLoss(target, load_tokenizer(MINILM), tokenizer, rows, lambda task: Dataset.from_dict(POOLS[task]))


def test_decoding_a_batch_is_decoding_and_differentiable(zoo):
    tokenizer, rows, state_dicts = zoo
    tokens = rows.weight_tokens[:3].clone().requires_grad_()
    decoded = BatchDecoder(tokenizer, classes=2)(tokens)
    for i, state_dict in enumerate(state_dicts[:3]):
        assert decoded.keys() == state_dict.keys()
        for name, tensor in state_dict.items():
            torch.testing.assert_close(decoded[name][i], tensor, rtol=1e-4, atol=1e-5)
    sum(tensor.sum() for tensor in decoded.values()).backward()
    assert tokens.grad[:, :-1].abs().sum() > 0 and not tokens.grad[:, -1].any()  # the third class is padding


def test_the_loss_is_the_cross_entropy_of_the_adapters_that_read(zoo, loss_of):
    _, rows, state_dicts = zoo
    index = torch.tensor([1] * EVERY + [4] * EVERY)
    loss = loss_of(rows.weight_tokens[index], None, index, draws())
    # a pool of copies: whatever sentences are drawn, their mean lies between the best and the worst sentence
    bounds = []
    for row, task in ((1, "films"), (4, "topics")):
        buckets = loss_of.target.buckets(load_tokenizer(MINILM), Dataset.from_dict(POOLS[task]))
        params = loss_of.target.stack([state_dicts[row]])
        pooled = torch.cat([loss_of.target.pooled(params, b.hidden, b.mask)[0] for b in buckets])
        logits = F.linear(pooled, state_dicts[row][WEIGHT], state_dicts[row][BIAS])
        each = F.cross_entropy(logits, torch.cat([b.labels for b in buckets]), reduction="none")
        bounds.append((each.min(), each.max()))
    low, high = (sum(values) / 2 for values in zip(*bounds, strict=True))
    assert low - 1e-2 < loss < high + 1e-2


def test_the_loss_of_a_batch_is_the_mean_over_its_shares(zoo, loss_of):
    _, rows, _ = zoo
    index = torch.tensor([0, 3] * EVERY)
    tokens = rows.weight_tokens[index]
    shares = [slice(i, i + EVERY) for i in range(0, TOTAL, EVERY)]
    parts = [loss_of(tokens[part], None, index[part], draws(rows=part)) for part in shares]
    torch.testing.assert_close(torch.stack(parts).mean(), loss_of(tokens, None, index, draws()))


def test_the_shared_start_reads_nothing(zoo, loss_of):
    _, rows, _ = zoo
    index = torch.full((TOTAL,), rows.start)
    assert loss_of(rows.weight_tokens[index], None, index, draws()) == 0


def test_training_lowers_it_for_the_classes_of_a_task(zoo, loss_of):
    _, rows, _ = zoo
    index = torch.tensor([0] * EVERY + [3] * EVERY)
    tokens = rows.weight_tokens[index].clone().requires_grad_()
    optimizer, losses = torch.optim.Adam([tokens], lr=0.05), []
    for step in range(15):
        loss = loss_of(tokens, None, index, draws(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(tokens[0], rows.weight_tokens[0])
    assert torch.equal(tokens[1], rows.weight_tokens[0])  # one row in four reads


NETWORKS = {
    "grey": (architecture("tiny-cnn", 3, 1), 0),
    "flat": (TargetConfig(input_shape=[6], layers=mlp(5), num_classes=2), 1),
}


@pytest.fixture(scope="module")
def networks():
    """Two tasks, whose networks differ in everything, with their images."""
    torch.manual_seed(0)
    names = [name for name in NETWORKS for _ in range(3)]
    models = [TargetModel(NETWORKS[name][0]).eval() for name in names]
    state_dicts = [{n: t.detach().clone() for n, t in model.state_dict().items()} for model in models]
    tokenizer = WeightTokenizer.fit(state_dicts, token_size=64, head=HEAD)
    classes = {name: config.num_classes for name, (config, _) in NETWORKS.items()}
    embeds = {name: torch.randn(1, count, 8) for name, count in classes.items()}
    prompts = {name: torch.randn(1, 8) for name in classes}
    rows = ZooTensors.of(tokenizer, state_dicts, names, embeds, prompts, {name: name for name in classes})
    images = [
        (torch.randn(40, *config.input_shape), torch.randint(config.num_classes, (40,)))
        for config, _ in NETWORKS.values()
    ]
    return tokenizer, rows, images, models


def network_loss(networks) -> NetworkLoss:
    tokenizer, rows, images, _ = networks
    return NetworkLoss(tokenizer, rows, list(NETWORKS.values()), images, probe=16)


def test_networks_have_the_loss_that_each_has_alone(networks):
    _, rows, images, models = networks
    index = torch.tensor([0, 3, 4, 2, 5, 1, 0, 3])
    found = network_loss(networks)(rows.weight_tokens[index], None, index, draws(3))
    expected = 0.0
    for i in index.tolist():
        task = int(rows.task_of[i])
        seen = draws(3).shared_integers(40, 16, purpose=60 + task)
        expected += models[i](images[task][0][seen], images[task][1][seen]).loss / len(index)
    torch.testing.assert_close(found, expected)


def test_shares_of_a_batch_of_networks_add_up(networks):
    _, rows, _, _ = networks
    index, loss_of = torch.arange(6).repeat(2)[:TOTAL], network_loss(networks)
    whole = loss_of(rows.weight_tokens[index], None, index, draws(600))
    parts = [slice(0, TOTAL // 2), slice(TOTAL // 2, TOTAL)]
    shares = [loss_of(rows.weight_tokens[index[p]], None, index[p], draws(600, p)) for p in parts]
    torch.testing.assert_close(sum(shares) / 2, whole)

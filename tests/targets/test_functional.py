"""Many adapters in one pass give what PEFT gives for one after the other."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from hf_weightgen.targets.base_models import MINILM, load_classifier, load_tokenizer
from hf_weightgen.targets.functional import BIAS, WEIGHT, AdapterTarget
from hf_weightgen.zoo.recipe import lora_config
from tiny import random


WORDS = "a the film was is good bad dull funny not very story of and end".split()
CLASSES = 3


def base(seed: int = 0, **settings) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=64, num_labels=CLASSES, initializer_range=0.3, **settings,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def lora(layers=(1, 3), **settings) -> LoraConfig:
    return LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=8, target_modules=["query", "value"], layers_to_transform=list(layers),
        layers_pattern="layer", **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(special + WORDS)})


@pytest.fixture(scope="module")
def target():
    return AdapterTarget(base(), lora())


def texts(count: int, seed: int) -> list[str]:
    lengths = torch.randint(1, 15, (count,), generator=random(seed)).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=random(seed + n)).tolist())
        for n in lengths
    ]


@pytest.fixture(scope="module", params=["single", "pair"])
def dataset(request):
    columns = {"text": texts(30, 1), "label": torch.randint(CLASSES, (30,), generator=random(9)).tolist()}
    return Dataset.from_dict(columns | ({"text_pair": texts(30, 2)} if request.param == "pair" else {}))


def adapters(target: AdapterTarget, count: int) -> list[dict[str, torch.Tensor]]:
    generator = random(3)
    shapes = target.shapes() | {WEIGHT: (CLASSES, target.hidden_size), BIAS: (CLASSES,)}
    return [
        {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)
    ]


def logits(target: AdapterTarget, members, buckets) -> torch.Tensor:
    """(N, rows, C), the rows in the order of the dataset."""
    out = torch.empty(len(members), sum(len(b.rows) for b in buckets), CLASSES)
    with torch.no_grad():
        for bucket in buckets:
            pooled = target.pooled(target.stack(members), bucket.hidden, bucket.mask)
            for i, member in enumerate(members):
                out[i, bucket.rows] = F.linear(pooled[i], member[WEIGHT], member[BIAS])
    return out


@torch.no_grad()
def peft_logits(model, config: LoraConfig, member, tokenizer, dataset) -> torch.Tensor:
    """What the whole PEFT model says, all layers and all tokens computed: (rows, C)."""
    whole = get_peft_model(model, config)
    assert not set_peft_model_state_dict(whole, member).unexpected_keys
    pairs = list(dataset["text_pair"]) if "text_pair" in dataset.column_names else None
    inputs = tokenizer(list(dataset["text"]), pairs, padding=True, truncation=True, max_length=64, return_tensors="pt")
    return whole.eval()(**inputs).logits


@pytest.mark.parametrize("layers", [(1, 3), (2, 3), (0,), (3,), (1,)])
def test_logits_equal_those_of_the_whole_peft_model(layers, tokenizer, dataset):
    target = AdapterTarget(base(), lora(layers))
    members = adapters(target, 2)
    found = logits(target, members, target.buckets(tokenizer, dataset, bucket_size=7))
    for row, member in zip(found, members, strict=True):
        torch.testing.assert_close(
            row, peft_logits(base(), lora(layers), member, tokenizer, dataset), atol=1e-5, rtol=0
        )
    assert (found[0] - found[1]).abs().max() > 0.1  # the adapters do something


def test_logits_equal_those_of_the_whole_model_on_all_minilm():
    dataset = Dataset.from_dict({"text": ["a gripping, funny film", "dull " * 80], "label": [1, 0]})
    torch.manual_seed(0)
    target, tokenizer = AdapterTarget(load_classifier(MINILM, CLASSES), lora_config()), load_tokenizer(MINILM)
    (member,) = adapters(target, 1)
    member = {name: 0.1 * tensor for name, tensor in member.items()}
    found = logits(target, [member], target.buckets(tokenizer, dataset))
    expected = peft_logits(load_classifier(MINILM, CLASSES), lora_config(), member, tokenizer, dataset)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_many_at_once_equal_one_by_one(target, tokenizer, dataset):
    members, buckets = adapters(target, 5), target.buckets(tokenizer, dataset, bucket_size=8)
    together = logits(target, members, buckets)
    alone = torch.cat([logits(target, [member], buckets) for member in members])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_predictions_are_the_largest_logits_in_the_order_of_the_rows(chunk, target, tokenizer, dataset):
    members, buckets = adapters(target, 5), target.buckets(tokenizer, dataset, bucket_size=8)
    predictions = target.predict(members, buckets, chunk=chunk)
    assert predictions.shape == (5, 30)
    assert torch.equal(predictions, logits(target, members, buckets).argmax(-1))
    assert any(len(row.unique()) > 1 for row in predictions)


def test_heads_of_different_class_counts_run_together(target, tokenizer, dataset):
    first, second = adapters(target, 2)
    second = second | {WEIGHT: torch.zeros(7, 16), BIAS: torch.arange(7.0)}
    both = target.predict([first, second], target.buckets(tokenizer, dataset))
    assert torch.equal(both[0], target.predict([first], target.buckets(tokenizer, dataset))[0])
    assert (both[1] == 6).all()


def test_buckets_hold_every_row_once_and_shorter_ones_first(target, tokenizer, dataset):
    buckets = target.buckets(tokenizer, dataset, bucket_size=8)
    assert [len(bucket.rows) for bucket in buckets] == [8, 8, 8, 6]
    assert torch.equal(torch.cat([bucket.rows for bucket in buckets]).sort().values, torch.arange(30))
    lengths = torch.cat([bucket.mask.sum(1) for bucket in buckets])
    assert torch.equal(lengths, lengths.sort().values)
    for bucket in buckets:
        assert torch.equal(bucket.labels, torch.tensor(dataset["label"])[bucket.rows])
        assert bucket.hidden.shape == (len(bucket.rows), bucket.mask.shape[1], 16)
        assert bucket.mask.any(0).all()  # no column of padding alone


def test_long_texts_are_cut(target, tokenizer):
    long = Dataset.from_dict({"text": ["good " * 50, "bad"], "label": [0, 1]})
    assert max(bucket.mask.sum(1).max() for bucket in target.buckets(tokenizer, long, max_length=12)) == 12


def test_names_are_those_of_peft(target):
    config = lora()
    saved = {name for name in get_peft_model(base(), config).state_dict() if "lora_" in name}
    assert set(target.names) == {name.replace(".default", "") for name in saved}


def test_stacking_is_undone(target):
    members = adapters(target, 3)
    stacked = target.stack(members)
    for i, member in enumerate(members):
        again = target.unstack(stacked, i)
        assert all(torch.equal(again[name], member[name]) for name in target.names)


def test_gradients_reach_every_adapter_and_nothing_else(target, tokenizer, dataset):
    params = {name: value.requires_grad_() for name, value in target.stack(adapters(target, 3)).items()}
    bucket = target.buckets(tokenizer, dataset)[0]
    target.pooled(params, bucket.hidden, bucket.mask).square().sum().backward()
    assert all(value.grad.flatten(1).any(1).all() for value in params.values())
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_every_adapter_may_read_a_batch_of_its_own(target, tokenizer, dataset):
    members, bucket = adapters(target, 3), target.buckets(tokenizer, dataset, bucket_size=8)[0]
    params, index = target.stack(members), torch.tensor([[0, 1], [2, 3], [4, 5]])
    with torch.no_grad():
        own = target.pooled(params, bucket.hidden[index], bucket.mask[index])
        shared = target.pooled(params, bucket.hidden, bucket.mask)
    torch.testing.assert_close(own, torch.stack([shared[i, rows] for i, rows in enumerate(index)]))


def test_dropout_acts_in_train_mode_only_and_differs_between_adapters(tokenizer, dataset):
    target = AdapterTarget(base(hidden_dropout_prob=0.5), lora())
    member, bucket = adapters(target, 1)[0], target.buckets(tokenizer, dataset)[0]
    params = target.stack([member, member])
    with torch.no_grad():
        still = target.pooled(params, bucket.hidden, bucket.mask)
        target.train()
        shaken = target.pooled(params, bucket.hidden, bucket.mask)
    torch.testing.assert_close(still[0], still[1])
    assert not torch.allclose(shaken[0], shaken[1]) and not torch.allclose(shaken[0], still[0])


def test_other_classifiers_are_refused():
    config = DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    with pytest.raises(ValueError, match="BERT-like .* got DistilBertForSequenceClassification"):
        AdapterTarget(DistilBertForSequenceClassification(config), lora())

"""Many weight sets, one forward pass: logits of N adapters or networks at once, by `functional_call` and `vmap`.

A LoRA adapter that touches only the last layers of a BERT-like classifier leaves the layers below it alone, and a
sequence classifier reads nothing but the first token ([CLS]) of the last layer. [`AdapterTarget`] uses both facts:
the frozen *prefix* is computed once per sentence and shared by all adapters, and in the last layer only the [CLS] query,
its feed-forward block and its pooler are computed. The result equals the whole PEFT model's within float tolerance (a
test holds it), at a fraction of its cost.

Notation used for shapes:
    - N: weight sets (adapters) evaluated together
    - n: sentences in a bucket of similar length
    - L: tokens of the longest sentence in the bucket
    - D: hidden size of the encoder
    - C: classes
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, vmap


WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"  # PEFT's names of the head
SMALL_BUCKET = 32  # sentences: for prediction, which is fastest while the activations of a few adapters fit the caches


@dataclass
class Bucket:
    """Sentences of similar length behind the frozen prefix of a target."""

    hidden: Tensor  # (n, L, D)
    mask: Tensor  # (n, L), True = real token
    labels: Tensor  # (n,)
    rows: Tensor  # (n,), each sentence's row in the dataset


class _Suffix(nn.Module):
    """The layers from the first adapted one on, with the last layer computed for [CLS] alone."""

    def __init__(self, bert: nn.Module, first_layer: int):
        super().__init__()
        self.layers = bert.encoder.layer[first_layer:]
        self.pooler = bert.pooler
        self.num_heads = bert.config.num_attention_heads

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        bias = torch.where(mask, 0.0, torch.finfo(hidden.dtype).min)[:, None, None, :]  # (n, 1, 1, L)
        for layer in self.layers[:-1]:
            hidden = self._layer(layer, hidden, hidden, bias)
        return self.pooler(self._layer(self.layers[-1], hidden, hidden[:, :1], bias))  # (n, D)

    def _layer(self, layer: nn.Module, hidden: Tensor, query: Tensor, bias: Tensor) -> Tensor:
        attention = layer.attention.self
        q, k, v = (
            self._heads(project(x))
            for project, x in ((attention.query, query), (attention.key, hidden), (attention.value, hidden))
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        context = (attention.dropout(weights) @ v).transpose(1, 2).flatten(2)  # (n, L or 1, D)
        output = layer.attention.output(context, query)
        return layer.output(layer.intermediate(output), output)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (n, heads, L, D / heads)


class AdapterTarget(nn.Module):
    r"""
    The network that receives LoRA adapters: a frozen BERT-like sequence classifier, ready to run N adapters at once.

    Args:
        base (`BertForSequenceClassification`): The frozen base with its pooler; its own head is not used.
        lora_config (`LoraConfig`): Rank, modules and layers of the adapters.

    Raises:
        ValueError: If the base is no BERT-like classifier.
    """

    def __init__(self, base: nn.Module, lora_config: LoraConfig):
        super().__init__()
        if not hasattr(base, "bert") or base.bert.pooler is None:
            raise ValueError(
                f"Adapters run on BERT-like sequence classifiers with a pooler, got {type(base).__name__}. "
                "Load the base with `AutoModelForSequenceClassification` from a BERT checkpoint."
            )
        model = get_peft_model(base, lora_config).requires_grad_(False)
        bert = model.base_model.model.bert
        adapted = [
            i for i, layer in enumerate(bert.encoder.layer) if any("lora_" in n for n, _ in layer.named_parameters())
        ]
        self.first_layer = min(adapted)
        self.embeddings = bert.embeddings
        self.prefix_layers = bert.encoder.layer[: self.first_layer]
        self.suffix = _Suffix(bert, self.first_layer)
        self.hidden_size = bert.config.hidden_size
        self.eval()

    @property
    def names(self) -> dict[str, str]:
        """PEFT's name of each LoRA tensor in a saved adapter -> its name inside `suffix`."""
        return {
            f"base_model.model.bert.encoder.layer.{self.first_layer + int(name.split('.')[1])}."
            + name.split(".", 2)[2].replace(".default", ""): name
            for name, _ in self.suffix.named_parameters()
            if "lora_" in name
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        parameters = dict(self.suffix.named_parameters())
        return {name: tuple(parameters[inner].shape) for name, inner in self.names.items()}

    @torch.no_grad()
    def prefix(self, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Hidden states in front of the first adapted layer: `(n, L, D)`."""
        hidden = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        bias = torch.where(mask, 0.0, torch.finfo(hidden.dtype).min)[:, None, None, :]
        for layer in self.prefix_layers:
            hidden = self.suffix._layer(layer, hidden, hidden, bias)
        return hidden

    def buckets(self, tokenizer, dataset, max_length: int = 64, bucket_size: int = 128) -> list[Bucket]:
        """
        Runs the prefix over a dataset with the columns `text`, `label` and, for pair tasks, `text_pair`, sorted by length.

        Returns:
            `list[Bucket]`, shortest sentences first; each holds `bucket_size` sentences, the last one fewer.
        """
        pairs = list(dataset["text_pair"]) if "text_pair" in dataset.column_names else None
        encoded = tokenizer(list(dataset["text"]), pairs, truncation=True, max_length=max_length)
        labels = torch.as_tensor(list(dataset["label"]))
        order = sorted(range(len(labels)), key=lambda i: len(encoded["input_ids"][i]))
        buckets = []
        for start in range(0, len(order), bucket_size):
            rows = order[start : start + bucket_size]
            batch = tokenizer.pad(
                {key: [values[i] for i in rows] for key, values in encoded.items()}, return_tensors="pt"
            )
            mask = batch["attention_mask"].bool()
            types = batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))
            hidden = self.prefix(batch["input_ids"], mask, types)
            buckets.append(Bucket(hidden, mask, labels[rows], torch.tensor(rows)))
        return buckets

    def stack(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """N adapters in PEFT's names -> `{name inside suffix: (N, *shape)}`."""
        return {inner: torch.stack([sd[name].float() for sd in state_dicts]) for name, inner in self.names.items()}

    def unstack(self, params: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        return {name: params[inner][index].detach().clone() for name, inner in self.names.items()}

    def pooled(self, params: Mapping[str, Tensor], hidden: Tensor, mask: Tensor) -> Tensor:
        """
        Args:
            params: N stacked adapters, see [`~AdapterTarget.stack`].
            hidden (`torch.Tensor` of shape `(n, L, D)` shared by all, or `(N, n, L, D)`): Output of the prefix.
            mask (`torch.Tensor` of shape `(n, L)` or `(N, n, L)`).

        Returns:
            `torch.Tensor` of shape `(N, n, D)`: what the head reads. Dropout acts in train mode, differently per adapter.
        """
        dim = 0 if hidden.dim() == 4 else None
        run = vmap(
            lambda p, h, m: functional_call(self.suffix, p, (h, m)), in_dims=(0, dim, dim), randomness="different"
        )
        return run(dict(params), hidden, mask)

    @torch.no_grad()
    def predict(
        self,
        state_dicts: Sequence[Mapping[str, Tensor]],
        buckets: Sequence[Bucket],
        chunk: int = 4,
        bf16: bool = False,
    ) -> Tensor:
        """
        Class predictions `(N, rows)` of N adapters, each with its own head, over all buckets; rows in dataset order.

        Args:
            chunk: Adapters that run together.
            bf16: Compute the encoder under bfloat16 autocast; the heads stay in float32.
        """
        total = sum(len(bucket.rows) for bucket in buckets)
        out = torch.empty(len(state_dicts), total, dtype=torch.long)
        for start in range(0, len(state_dicts), chunk):
            group = state_dicts[start : start + chunk]
            params = self.stack(group)
            for bucket in buckets:
                with torch.autocast(bucket.hidden.device.type, torch.bfloat16, enabled=bf16):
                    pooled = self.pooled(params, bucket.hidden, bucket.mask)
                for i, state_dict in enumerate(group):
                    logits = F.linear(pooled[i].float(), state_dict[WEIGHT].float(), state_dict[BIAS].float())
                    out[start + i, bucket.rows] = logits.argmax(-1)
        return out

    def accuracy(self, state_dicts: Sequence[Mapping[str, Tensor]], buckets: Sequence[Bucket]) -> Tensor:
        """Accuracy in [0, 1] of N adapters over all buckets: `(N,)` in float64."""
        labels = torch.empty(sum(len(bucket.rows) for bucket in buckets), dtype=torch.long)
        for bucket in buckets:
            labels[bucket.rows] = bucket.labels
        return (self.predict(state_dicts, buckets) == labels).double().mean(1)

"""What decoded weights do, as a loss: generated adapters read sentences of their task, generated networks see its images.

Weight-space error says little about accuracy: directions that matter and directions that do not count alike. And a
decoder that only copies a zoo cannot be better than it. So a last part of the autoencoder's training asks the decoded
adapters themselves to classify, as Text-to-LoRA does in its end-to-end training
(https://huggingface.co/papers/2506.06105, section 3.2).

Notation: b rows of a batch; T body tokens, C classes, S scalars per token.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from ..targets.architectures import TargetConfig
from ..targets.functional import BIAS, WEIGHT, AdapterTarget, Bucket
from ..targets.stacked import stacked_logits
from ..weights.tokenization import WeightTokenizer
from .batches import StepRandom, ZooTensors


SENTENCES = 32  # that an adapter reads in a step
EVERY = 4  # one of so many rows of a batch reads


class BatchDecoder:
    """
    `WeightTokenizer.decode` for many networks of one layout at once, and differentiable: decoding picks a token's scalar
    for each weight, times a std, plus a mean, so its action on three token tensors tells all of it.
    """

    def __init__(self, tokenizer: WeightTokenizer, classes: int, layout_id: int = 0):
        self.tokens = tokenizer.num_all_body_tokens + classes
        size = self.tokens * tokenizer.token_size
        place = torch.arange(size, dtype=torch.float64)
        wide = torch.stack([torch.zeros_like(place), torch.ones_like(place), place]).unflatten(1, (self.tokens, -1))
        zeros, ones, places = tokenizer.decode(
            tokenizer.own_tokens(wide, layout_id), torch.full((3,), layout_id), torch.full((3,), classes)
        )
        self.mean, self.std = zeros, {name: ones[name] - zeros[name] for name in zeros}
        self.place = {name: ((places[name] - zeros[name]) / self.std[name]).round().long() for name in zeros}

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        """`(b, T + C or more, S)` to state dicts stacked: `{name: (b, *shape)}`."""
        flat = tokens[:, : self.tokens].flatten(1)
        return {name: flat[:, place] * self.std[name] + self.mean[name] for name, place in self.place.items()}


class NetworkLoss:
    """
    Cross-entropy of decoded networks on training images of their tasks, a mean over networks and images.

    Args:
        targets: Per task its network and the number of its layout; `None` for one whose networks are not asked, which count with 0.
        images: Per task inputs `(n, *input_shape)` and class ids `(n,)`, or `None`.
        probe: Images that a network sees in a step.
    """

    def __init__(
        self,
        weight_tokenizer: WeightTokenizer,
        zoo: ZooTensors,
        targets: Sequence[tuple[TargetConfig, int] | None],
        images: Sequence[tuple[Tensor, Tensor] | None],
        probe: int = 64,
    ):
        self.zoo, self.targets, self.images, self.probe = zoo, targets, images, probe
        self.decoders = [
            target and BatchDecoder(weight_tokenizer, int(zoo.class_mask[task].sum()), target[1])
            for task, target in enumerate(targets)
        ]

    def __call__(self, tokens: Tensor, truth: Tensor, index: Tensor, random: StepRandom) -> Tensor:
        """See [`~training.objectives.vae_loss`]; the originals `truth` are not asked."""
        tasks, loss = self.zoo.task_of[index], tokens.new_zeros(())
        for task in tasks.unique().tolist():
            if self.targets[task] is None:
                continue
            rows, (config, _), (inputs, labels) = tasks == task, self.targets[task], self.images[task]
            seen = random.shared_integers(len(labels), self.probe, purpose=60 + task)
            logits = stacked_logits(config, self.decoders[task](tokens[rows]), inputs[seen][None])
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels[seen].repeat(len(logits)), reduction="sum")
        return loss / (len(index) * self.probe)


class AdapterLoss:
    """
    Cross-entropy of decoded adapters on training sentences of their tasks, a mean over the rows that read.

    Args:
        target: The network that wears the adapters.
        text_tokenizer: The target's.
        pool_of: `task name -> training sentences`, asked once a task: those that the zoo's members were allowed to read.
        bf16: Compute the target under bfloat16 autocast. What its frozen prefix makes of the sentences is kept in memory,
            in bfloat16 either way: about 3 GB for 26 tasks of 4,000 sentences.
    """

    def __init__(
        self,
        target: AdapterTarget,
        text_tokenizer,
        weight_tokenizer: WeightTokenizer,
        zoo: ZooTensors,
        pool_of: Callable[[str], Dataset],
        bf16: bool = False,
    ):
        self.target, self.zoo, self.bf16 = target, zoo, bf16
        self._places = target.names
        self._decoder = functools.cache(lambda classes: BatchDecoder(weight_tokenizer, classes))
        self._buckets = functools.cache(lambda task: self._read(text_tokenizer, pool_of(task)))

    def __call__(self, tokens: Tensor, truth: Tensor, index: Tensor, random: StepRandom) -> Tensor:
        """See [`~training.objectives.vae_loss`]; the originals `truth` are not asked."""
        which, sentences = random.uniform(purpose=22), random.uniform(SENTENCES, purpose=23)
        loss = tokens.new_zeros(())
        reading = range(0, len(index), EVERY)
        for i in reading:
            if index[i] == self.zoo.start:
                continue  # it has no sentences of its own
            task = int(self.zoo.task_of[index[i]])
            weights = self._decoder(int(self.zoo.class_mask[task].sum()))(tokens[i : i + 1].float())
            buckets = self._buckets(self.zoo.tasks[task])
            bucket = buckets[int(which[i] * len(buckets))]
            picked = (sentences[i] * len(bucket.rows)).long()
            params = {inner: weights[name] for name, inner in self._places.items()}
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
                hidden = bucket.hidden[picked] if self.bf16 else bucket.hidden[picked].float()
                pooled = self.target.pooled(params, hidden, bucket.mask[picked])
            logits = F.linear(pooled[0].float(), weights[WEIGHT][0], weights[BIAS][0])
            loss = loss + F.cross_entropy(logits, bucket.labels[picked])
        return loss / len(reading)

    def _read(self, text_tokenizer, pool: Dataset) -> list[Bucket]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            buckets = self.target.buckets(text_tokenizer, pool)
        return [replace(bucket, hidden=bucket.hidden.bfloat16()) for bucket in buckets]

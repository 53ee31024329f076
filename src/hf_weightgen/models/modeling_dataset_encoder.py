"""Dataset encoder: a few examples per class -> one embedding of the dataset and one per class.

References: D2NWG (https://huggingface.co/papers/2402.18153), section 3.3 and eq. 2: sets of encoder features per class, a
transformation within classes, another over classes, and a contrastive alignment with weight latents; Set Transformer
(https://huggingface.co/papers/1810.00825), sections 3.1 and 3.2 (MAB, ISAB, PMA); ridge regression as a layer (R2-D2,
https://huggingface.co/papers/1805.08136, eq. 4). Ours: the embeddings lie in the space of the text encoder, so that a generator
takes a prompt, a dataset, or both; and every class has an embedding of its own. Of generators of classifiers on the encoder's
own features, that is where ridge regression puts the class.

Notation used for shapes:
    - B: datasets in the batch;  C: classes, padded;  n: examples of a class, padded;  F: size of a feature
    - E: size of an embedding;  H: hidden size;  Z: scalars of a weight latent
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput


POOLINGS = ("set_transformer", "mlp")
ALIGNMENTS = ("info_nce", "soft")


@strict
class DatasetEncoderConfig(PreTrainedConfig):
    r"""
    Args:
        feature_size: F.
        embedding_size: E.
        latent_size: Z.
        hidden_size, num_attention_heads, num_inducing_points: Of the Set Transformer.
        pooling: `"set_transformer"`, or `"mlp"`: the paper's ablation, which reads `num_examples` of `num_classes` classes in
            the order in which they come (Table 21).
        alignment: `"info_nce"` (eq. 2), or `"soft"`: targets are the similarities within the two sides, as in the paper's
            code.
        temperature: tau of eq. 2.
        ridge: Class embeddings are rows of a linear classifier of the features, weight and bias, that [`Ridge`] fits to the
            examples; `embedding_size` then is F + 1.
        reads_names: The name of a class is one more example of it, as the encoder of the features reads it; with `ridge`.
    """

    model_type = "weight_dataset_encoder"

    feature_size: int = 768
    embedding_size: int = 384
    latent_size: int = 256
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_inducing_points: int = 16
    pooling: str = "set_transformer"
    num_classes: int = 10
    num_examples: int = 5
    alignment: str = "info_nce"
    temperature: float = 0.1
    ridge: bool = False
    reads_names: bool = False

    def __post_init__(self, **kwargs):
        if self.ridge and self.embedding_size != self.feature_size + 1:
            raise ValueError(
                f"With `ridge`, `embedding_size` must be `feature_size` + 1 = {self.feature_size + 1}, got {self.embedding_size}."
            )
        for name, known in (("pooling", POOLINGS), ("alignment", ALIGNMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}.")
        super().__post_init__(**kwargs)


@dataclass
class DatasetEncoderOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*): Sum of the terms below, present with targets.
        latent_loss: Contrastive loss between datasets and weight latents (eq. 2).
        prompt_loss: The same between datasets and prompts.
        name_loss: 1 - cosine between class embeddings and embeddings of the class names.
        dataset_embeds (`torch.FloatTensor` of shape `(B, E)`): Unit length.
        class_embeds (`torch.FloatTensor` of shape `(B, C, E)`): Unit length.
    """

    loss: Tensor | None = None
    latent_loss: Tensor | None = None
    prompt_loss: Tensor | None = None
    name_loss: Tensor | None = None
    dataset_embeds: Tensor | None = None
    class_embeds: Tensor | None = None


class _Attention(nn.Module):
    """MAB: queries look at a set, whose padding `mask` `(B, n)` leaves out; then a residual feed-forward layer."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)
        self.norm_attention, self.norm_out = nn.LayerNorm(size), nn.LayerNorm(size)
        self.feed_forward = nn.Sequential(nn.Linear(size, 2 * size), nn.SiLU(), nn.Linear(2 * size, size))

    def forward(self, queries: Tensor, members: Tensor, mask: Tensor) -> Tensor:
        seen, _ = self.attention(queries, members, members, key_padding_mask=~mask, need_weights=False)
        hidden = self.norm_attention(queries + seen)
        return self.norm_out(hidden + self.feed_forward(hidden))


class _SetTransformer(nn.Module):
    """ISAB and PMA with one seed: members `(B, n, H)` that know of each other, and what all of them are `(B, H)`."""

    def __init__(self, size: int, heads: int, inducing_points: int):
        super().__init__()
        self.inducing_points = nn.Parameter(torch.empty(inducing_points, size))
        self.seed = nn.Parameter(torch.empty(1, size))
        self.gather, self.spread, self.pool = (_Attention(size, heads) for _ in range(3))

    def forward(self, members: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        points = self.gather(self.inducing_points.expand(len(members), -1, -1), members, mask)
        everywhere = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
        members = self.spread(members, points, everywhere)
        return members, self.pool(self.seed.expand(len(members), -1, -1), members, mask)[:, 0]


class Ridge(nn.Module):
    """
    A linear classifier of a few examples: ridge regression (R2-D2, eq. 4) in a metric that many other sets have taught.

    Parameters: `metric` (F, F), by which features are multiplied; `centre` (F,), their mean over all sets; `log_strength` (2,), of
    the penalty, and `log_name_weight` (2,), how many examples the name of a class is worth: for n examples of a class the first
    entry plus the second times log n.
    """

    def __init__(self, size: int):
        super().__init__()
        self.metric, self.centre = nn.Parameter(torch.empty(size, size)), nn.Parameter(torch.empty(size))
        self.log_strength, self.log_name_weight = nn.Parameter(torch.empty(2)), nn.Parameter(torch.empty(2))

    def forward(self, features: Tensor, mask: Tensor, name_embeds: Tensor | None = None) -> Tensor:
        """
        Args:
            features (`torch.FloatTensor` of shape `(B, C, n, F)`), mask (`torch.BoolTensor` of shape `(B, C, n)`).
            name_embeds (`torch.FloatTensor` of shape `(B, C, F)`, *optional*): As one more example of each class.

        Returns:
            `torch.FloatTensor` of shape `(B, C, F + 1)` in float32: weight and bias of each class, with weights of length 1 on
            average; zeros in the place of padding.
        """
        metric = self.metric.float()
        count, features = mask, features.float() @ metric
        shots = (mask.sum((1, 2)) / mask.any(-1).sum(1)).log()  # (B,), of a mean class
        log_strength, log_name_weight = (
            first + more * shots for first, more in (self.log_strength.float(), self.log_name_weight.float())
        )
        penalty = torch.ones_like(features[..., 0])
        if name_embeds is not None:
            features = torch.cat([features, name_embeds.float()[:, :, None] @ metric], 2)
            mask = torch.cat([mask, mask.any(-1, keepdim=True)], 2)
            lighter = (-log_name_weight).exp()[:, None, None].expand_as(penalty[..., :1])
            penalty = torch.cat([penalty, lighter], 2)
        B, C, n, _ = features.shape
        real, classes = mask.flatten(1)[..., None].float(), count.any(-1).float()  # (B, C n, 1), (B, C)
        flat = features.flatten(1, 2)
        mean = (flat * real).sum(1) / real.sum(1)  # (B, F)
        origin = 0.5 * (mean + self.centre.float() @ metric)
        flat = (flat - origin[:, None]) * real
        gram = flat @ flat.mT  # (B, C n, C n)
        size = gram.diagonal(dim1=1, dim2=2).sum(1) / real[..., 0].sum(1)
        strength = (log_strength.exp() * size)[:, None] * penalty.flatten(1)
        targets = torch.eye(C).to(flat).repeat_interleave(n, 0) - classes[:, None] / classes.sum(1)[:, None, None]
        weight = flat.mT @ torch.linalg.solve(gram + torch.diag_embed(strength), targets * real)  # (B, F, C)
        weight = weight.mT * classes[..., None]
        length = weight.norm(dim=-1).sum(1) / classes.sum(1)
        weight = weight / length[:, None, None].clamp(min=1e-12)
        bias = -(weight @ origin[..., None])
        return torch.cat([weight @ metric.mT, bias], -1)


class DatasetEncoder(PreTrainedModel):
    config_class = DatasetEncoderConfig
    main_input_name = "features"

    def __init__(self, config: DatasetEncoderConfig):
        super().__init__(config)
        size, E = config.hidden_size, config.embedding_size
        if config.pooling == "mlp":
            narrow = 4  # per example, the paper's "super linear" layer
            self.narrow = nn.Linear(config.feature_size, narrow)
            self.mix = nn.Linear(config.num_classes * config.num_examples * narrow, size)
            self.of_class = nn.Linear(config.num_examples * narrow, size)
        else:
            self.feature_in = nn.Linear(config.feature_size, size)
            arguments = (size, config.num_attention_heads, config.num_inducing_points)
            self.within, self.over = _SetTransformer(*arguments), _SetTransformer(*arguments)
        self.dataset_out = nn.Linear(size, E)
        if config.ridge:
            self.ridge = Ridge(config.feature_size)
        else:
            self.class_out = nn.Linear(size, E)
        self.latent_projection = nn.Linear(config.latent_size, E)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _SetTransformer):
            init.normal_(module.inducing_points, std=1.0)
            init.normal_(module.seed, std=1.0)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.MultiheadAttention):
            init.normal_(module.in_proj_weight, std=module.embed_dim**-0.5)
            init.zeros_(module.in_proj_bias)
        if isinstance(module, Ridge):
            init.eye_(module.metric)
            for parameter in (module.centre, module.log_strength, module.log_name_weight):
                init.zeros_(parameter)

    def encode(
        self, features: Tensor, example_mask: Tensor, name_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            features (`torch.FloatTensor` of shape `(B, C, n, F)`): Of frozen encoders, unit length.
            example_mask (`torch.BoolTensor` of shape `(B, C, n)`): `True` on examples; a class without any is padding.
            name_embeds (`torch.FloatTensor` of shape `(B, C, F)`, *optional*): What the encoder of the features makes of the
                class names; read with `ridge`.

        Returns:
            Embeddings of the datasets `(B, E)`, of unit length, and of their classes `(B, C, E)`, of unit length without `ridge`.
            With the Set Transformer they do not depend on the order of examples, and classes may come in any order.
        """
        B, C, n, _ = features.shape
        class_mask = example_mask.any(-1)  # (B, C)
        if self.config.pooling == "mlp":
            if (C, n) != (self.config.num_classes, self.config.num_examples) or not example_mask.all():
                raise ValueError(
                    f"An encoder with `pooling='mlp'` reads {self.config.num_examples} examples of each of "
                    f"{self.config.num_classes} classes, got {n} of {C}; the Set Transformer reads any number."
                )
            narrow = F.leaky_relu(self.narrow(features))  # (B, C, n, 4)
            classes, dataset = self.of_class(narrow.flatten(2)), self.mix(narrow.flatten(1))
        else:
            size = self.config.feature_size**0.5  # features of unit length would be small beside the norms' outputs
            inside = example_mask.clone()
            inside[
                ..., 0
            ] |= ~class_mask  # attention needs something to look at; what comes of padding is left out below
            members = self.feature_in(features * size).flatten(0, 1)
            _, classes = self.within(members, inside.flatten(0, 1))  # (B C, H)
            classes, dataset = self.over(classes.unflatten(0, (B, C)), class_mask)
        dataset = F.normalize(self.dataset_out(dataset), dim=-1)
        if self.config.ridge:
            return dataset, self.ridge(features, example_mask, name_embeds)
        return dataset, F.normalize(self.class_out(classes), dim=-1)

    def forward(
        self,
        features: Tensor,
        example_mask: Tensor,
        groups: Tensor | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        name_embeds: Tensor | None = None,
    ) -> DatasetEncoderOutput:
        """
        Args:
            groups (`torch.LongTensor` of shape `(B,)`, *optional*): Which entries of the batch are the same dataset: none of
                them is another one's negative.
            latents (`torch.FloatTensor` of shape `(B, Z)`, *optional*): Weights of a network for each dataset.
            prompt_embeds (`torch.FloatTensor` of shape `(B, E)`, *optional*): A prompt for each.
            name_embeds (`torch.FloatTensor` of shape `(B, C, E)`, *optional*): The class names.
        """
        dataset, classes = self.encode(features, example_mask)
        groups = torch.arange(len(dataset), device=dataset.device) if groups is None else groups
        losses: dict[str, Tensor] = {}
        if latents is not None:
            losses["latent_loss"] = self.align(dataset, self.latent_embeds(latents), groups)
        if prompt_embeds is not None:
            losses["prompt_loss"] = (
                self.align(dataset, prompt_embeds, groups) + 1 - (dataset * prompt_embeds).sum(-1).mean()
            )
        if name_embeds is not None:
            mask = example_mask.any(-1)
            losses["name_loss"] = (1 - (classes * name_embeds).sum(-1))[mask].mean()
        loss = torch.stack(list(losses.values())).sum() if losses else None
        return DatasetEncoderOutput(loss=loss, **losses, dataset_embeds=dataset, class_embeds=classes)

    def latent_embeds(self, latents: Tensor) -> Tensor:
        """Weight latents `(B, Z)` in the space of the datasets `(B, E)`: their cosine ranks networks for a dataset."""
        return F.normalize(self.latent_projection(latents), dim=-1)

    def align(self, left: Tensor, right: Tensor, groups: Tensor) -> Tensor:
        """Eq. 2, in both directions, for embeddings `(B, E)` of unit length."""
        tau = self.config.temperature
        logits = left @ right.mT / tau
        if self.config.alignment == "soft":
            targets = ((left @ left.mT + right @ right.mT) / (2 * tau)).softmax(-1).detach()
        else:
            targets = (groups[:, None] == groups).to(logits.dtype)
            targets = targets / targets.sum(-1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.mT, targets.mT))

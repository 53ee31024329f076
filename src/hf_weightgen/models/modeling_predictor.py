"""Accuracy predictor: weights and a task -> how accurate a network with these weights is, without any data.

Reference: D2NWG (https://huggingface.co/papers/2402.18153), appendix B.1: g of eq. 9 and Algorithm 3, and section C.7, where it
picks among samples. The paper says nothing of its architecture or loss; ours is a regression of accuracies. It reads weight
tokens, not latents: eq. 9 compares weights with their reconstruction, and of two samples with one latent the observation
noise decides which is better.

Notation used for shapes and units:
    - B: checkpoints in the batch
    - T: body tokens of all layouts, side by side;  C: classes, padded;  S: scalars per token
    - E: size of the embeddings of prompts, datasets and class names
    - accuracies are shares of examples, from 0 to 1
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .modeling_weight_vae import ResidualMLP, centred, class_mean


@strict
class AccuracyPredictorConfig(PreTrainedConfig):
    r"""
    Args:
        token_size: S.
        num_body_tokens: T, see [`WeightTokenizer.num_all_body_tokens`].
        embedding_size: E; 384 is all-MiniLM-L6-v2.
        token_width: Each body token has a linear map of its own from S to this width, as in [`WeightVAE`].
        hidden_size: Of what follows. A few hundred scored networks are soon learned by heart: both are small.
        dropout: Of the features of tokens, in training.
    """

    model_type = "weight_accuracy_predictor"

    token_size: int = 385
    num_body_tokens: int = 32
    embedding_size: int = 384
    token_width: int = 4
    hidden_size: int = 64
    dropout: float = 0.3


@dataclass
class AccuracyPredictorOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*): Mean over the batch of (predicted - true accuracy)², present with accuracies.
        predicted_accuracies (`torch.FloatTensor` of shape `(B,)`): From 0 to 1.
    """

    loss: Tensor | None = None
    predicted_accuracies: Tensor | None = None


class AccuracyPredictor(PreTrainedModel):
    config_class = AccuracyPredictorConfig
    main_input_name = "weight_tokens"

    def __init__(self, config: AccuracyPredictorConfig):
        super().__init__(config)
        T, S, E = config.num_body_tokens, config.token_size, config.embedding_size
        d, H = config.token_width, config.hidden_size
        self.token_in = nn.Parameter(torch.empty(T, S, d))
        self.token_bias = nn.Parameter(torch.empty(T, d))
        self.size_in = nn.Linear(T, H)
        self.body_in = nn.Linear(T * d, H)
        self.class_in = nn.Linear(S + E, H)
        self.class_set = nn.Linear(H, H)
        self.condition_in = nn.Linear(E, H, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(ResidualMLP(H), ResidualMLP(H), nn.LayerNorm(H))
        self.accuracy_out = nn.Linear(H, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        if module is self:
            init.normal_(self.token_in, std=self.config.token_size**-0.5)
            init.normal_(self.token_bias, std=1.0)
            init.zeros_(self.accuracy_out.weight)

    def forward(
        self,
        weight_tokens: Tensor,
        padding_mask: Tensor,
        class_embeds: Tensor,
        class_mask: Tensor,
        condition_embeds: Tensor | None = None,
        accuracies: Tensor | None = None,
    ) -> AccuracyPredictorOutput:
        """
        Args:
            weight_tokens (`torch.FloatTensor` of shape `(B, T + C, S)`): Body tokens of all layouts, then one token per class.
            padding_mask (`torch.BoolTensor` of shape `(B, T + C, S)`): `True` on scalars that count; others are not seen, such
                as the places of layouts that a checkpoint does not have.
            class_embeds (`torch.FloatTensor` of shape `(B, C, E)`): Embeddings of the class names.
            class_mask (`torch.BoolTensor` of shape `(B, C)`): `True` on real classes.
            condition_embeds (`torch.FloatTensor` of shape `(B, E)`, *optional*): Of a prompt or of a dataset, unit length. Without
                it, or with zeros, the predictor is unconditioned.
            accuracies (`torch.FloatTensor` of shape `(B,)`, *optional*): True ones, in [0, 1], of data that no test uses.

        Raises:
            ValueError: If an accuracy is not in [0, 1].
        """
        T = self.config.num_body_tokens
        tokens = weight_tokens * padding_mask
        body, rows = tokens[:, :T], centred(tokens[:, T:], class_mask)
        features = F.silu(torch.einsum("bts,tsd->btd", body, self.token_in) + self.token_bias)
        real = padding_mask[:, :T].sum(-1).clamp(min=1)
        sizes = (body.square().sum(-1) / real).log1p()  # (B, T): noise makes weights larger, averages smaller
        of_classes = F.silu(self.class_in(torch.cat([rows, class_embeds], -1)))  # (B, C, H)
        hidden = self.body_in(self.dropout(features.flatten(1))) + self.size_in(sizes)
        hidden = hidden + self.class_set(class_mean(of_classes, class_mask)[:, 0])
        if condition_embeds is not None:
            # of unit length: without the factor its components would vanish beside the others
            hidden = hidden + self.condition_in(condition_embeds * condition_embeds.shape[-1] ** 0.5)
        predicted = self.accuracy_out(self.blocks(hidden))[:, 0].sigmoid()
        if accuracies is None:
            return AccuracyPredictorOutput(predicted_accuracies=predicted)
        if not ((accuracies >= 0) & (accuracies <= 1)).all():  # also of NaN
            raise ValueError(
                f"`accuracies` must lie in [0, 1], got values from {accuracies.min():.3g} to {accuracies.max():.3g}; points are "
                "to be divided by 100."
            )
        return AccuracyPredictorOutput(F.mse_loss(predicted, accuracies.to(predicted.dtype)), predicted)

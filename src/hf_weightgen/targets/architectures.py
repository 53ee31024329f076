"""Small networks that receive generated weights as a whole, as `PreTrainedModel`s.

This file imports nothing of the package: published beside weights as `modeling_target.py`, it is all that
`AutoModel.from_pretrained(id, trust_remote_code=True)` needs.

Notation: n examples, F input features, H hidden units, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


ACTIVATIONS = ("tanh", "relu", "gelu", "silu", "sigmoid", "elu", "leaky_relu")


@strict
class TargetConfig(PreTrainedConfig):
    r"""
    A multilayer perceptron with one hidden layer.

    Args:
        input_size: F.
        hidden_size: H.
        num_classes: C. (`num_labels` and `id2label` follow from it unless given.)
        activation: One of [`ACTIVATIONS`].

    Raises:
        ValueError: If the activation is none of them.
    """

    model_type = "weightgen_target"

    input_size: int = 64
    hidden_size: int = 16
    num_classes: int = 10
    activation: str = "tanh"

    def __post_init__(self, **kwargs):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {list(ACTIVATIONS)}, got {self.activation!r}.")
        if "id2label" not in kwargs and "num_labels" not in kwargs:
            kwargs["num_labels"] = self.num_classes
        super().__post_init__(**kwargs)


@dataclass
class TargetOutput(ModelOutput):
    """`loss`, present with labels, and `logits` `(n, C)`."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class TargetModel(PreTrainedModel):
    config_class = TargetConfig
    main_input_name = "inputs"

    def __init__(self, config: TargetConfig):
        super().__init__(config)
        self.hidden = nn.Linear(config.input_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.num_classes)
        self.post_init()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> TargetOutput:
        """
        Args:
            inputs (`torch.FloatTensor` of shape `(n, F)`).
            labels (`torch.LongTensor` of shape `(n,)`, *optional*).
        """
        activation = getattr(F, self.config.activation)
        logits = self.head(activation(self.hidden(inputs)))
        return TargetOutput(F.cross_entropy(logits, labels) if labels is not None else None, logits)


AutoConfig.register(TargetConfig.model_type, TargetConfig, exist_ok=True)
AutoModel.register(TargetConfig, TargetModel, exist_ok=True)

HEAD = ("head.weight", "head.bias")


def mlp_logits(params: Sequence[Tensor] | dict[str, Tensor], inputs: Tensor, activation: str = "tanh") -> Tensor:
    """
    Logits of N networks at once.

    Args:
        params: `{"hidden.weight": (N, H, F), "hidden.bias": (N, H), "head.weight": (N, C, H), "head.bias": (N, C)}`.
        inputs (`torch.FloatTensor` of shape `(n, F)`, or `(N, n, F)` with inputs for each network).

    Returns:
        `torch.FloatTensor` of shape `(N, n, C)`.
    """
    hidden = getattr(F, activation)(inputs @ params["hidden.weight"].mT + params["hidden.bias"][:, None])
    return hidden @ params["head.weight"].mT + params["head.bias"][:, None]

"""A plain residual MLP over latents, with the signature of a diffusers U-Net that takes `class_labels`.

References: the velocity field of DeepWeightFlow is such an MLP; the latent noise predictor of D2NWG
(https://huggingface.co/papers/2402.18153, eq. 5) is a U-Net. Both fit the same pipeline and schedulers.

Notation: B latents, of shape `(B, channels, height, width)`; E size of the prompt embedding.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn


class _Block(nn.Module):
    """Pre-norm residual MLP whose norm is shifted and scaled by the condition; zero at the start (adaLN-zero)."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size, elementwise_affine=False)
        self.modulation = nn.Linear(size, 3 * size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, -1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


class WeightDenoiser(ModelMixin, ConfigMixin):
    r"""
    Predicts noise, velocity or flow of a latent, conditioned on a prompt embedding.

    Args:
        in_channels, sample_size: Latents are `(B, in_channels, sample_size, sample_size)`.
        projection_class_embeddings_input_dim: E; the same name as in `UNet2DConditionModel`.
        hidden_size, num_layers: Width and number of residual blocks.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 8,
        projection_class_embeddings_input_dim: int = 384,
        hidden_size: int = 256,
        num_layers: int = 2,
    ):
        super().__init__()
        latent = in_channels * sample_size**2
        self.time_proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(64, hidden_size)
        self.class_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, hidden_size)
        self.conv_in = nn.Linear(latent, hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(hidden_size)
        self.conv_out = nn.Linear(hidden_size, latent)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states=None, class_labels: Tensor | None = None
    ):
        """
        Args:
            sample (`torch.FloatTensor` of shape `(B, channels, height, width)`): Noisy latents.
            timestep (`torch.Tensor` of shape `(B,)` or a number).
            class_labels (`torch.FloatTensor` of shape `(B, E)`, or `(1, E)` for all): Prompt embeddings; zeros for no prompt.

        Returns:
            [`UNet2DConditionOutput`] with `sample` of the shape of the input.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # one for all, or B
        time = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        # embeddings have unit length: without the factor their components would vanish beside the time's
        condition = F.silu(time + self.class_embedding(class_labels * math.sqrt(class_labels.shape[-1])))
        hidden = self.conv_in(sample.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        return UNet2DConditionOutput(sample=self.conv_out(self.norm_out(hidden)).view_as(sample))

"""Variational autoencoder over weight tokens, with one token per class.

References: D2NWG (https://huggingface.co/papers/2402.18153), section 3.2 and eq. 1 for the VAE over vectorised layers;
"uniform blocks" with a linear map of their own in T2W. Ours beyond the paper: class tokens that are decoded from class
names, so that one generator serves any number of classes; the compatibility of a prompt with class names; and
observation noise p(w|z), without which samples are closer to the zoo's averages than its members are: calibrated afterwards, or
learned, wide where weights do not matter to what a network does.

Notation used for shapes and units:
    - B: checkpoints in the batch
    - T: body tokens of the layout;  C: classes, padded to the largest count in the batch;  S: scalars per token
    - E: size of prompt and class-name embeddings
    - Z: scalars of the latent, `prod(latent_shape)`
    - tokens are standardised weights, see [`WeightTokenizer`]; latents have unit std per dimension once scaled
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput


FOREIGN_NAMES = 4  # per checkpoint and step
LOG_STDS = (-6.0, 2.0)  # of learned noise, in token units
SMALLEST_STD = 1e-3  # that a zoo's spread counts as
SHARE_WEIGHT = 30.0  # of the square of what is missing of the share
ALIKE = 0.6  # cosine from which a class name counts as one of the adapter's own


@strict
class WeightVAEConfig(PreTrainedConfig):
    r"""
    Args:
        token_size: S.
        num_body_tokens: T, see [`WeightTokenizer.num_body_tokens`]; 0 for heads alone.
        embedding_size: E; 384 is all-MiniLM-L6-v2.
        latent_shape: Latent as an image `(channels, height, width)` for a U-Net.
        token_width: Each body token has a linear map of its own from S to this width (T2W).
        hidden_size: Width of the trunk.
        match_size: Width in which prompts and class names are compared.
        kl_weight: Beta of eq. 1, per latent dimension and token scalar.
        foreign_weight: Weight of the loss on class names that are not the adapter's own.
        learns_noise: The decoder also tells the std of each scalar given the latent, in the place of calibrated ones per token.
        noise_weight: With `learns_noise`, weight of the divergence of this noise from the spread that the zoo has within a task.
        noise_share: With `learns_noise`, how much of that spread it has at least: noise goes where weights matter least.
        noise_scale: Multiplies the observation noise when weights are generated; 1 reproduces the zoo's spread, or what the
            decoder has learned.
        match_threshold: Prompt and class names whose compatibility is lower get class tokens without information.
    """

    model_type = "weight_vae"

    token_size: int = 385
    num_body_tokens: int = 32
    embedding_size: int = 384
    latent_shape: list[int] | tuple[int, ...] = (4, 8, 8)
    token_width: int = 32
    hidden_size: int = 256
    match_size: int = 64
    kl_weight: float = 1e-4
    foreign_weight: float = 0.2
    learns_noise: bool = False
    noise_weight: float = 0.02
    noise_share: float = 0.55
    noise_scale: float = 1.0
    match_threshold: float = 0.1


@dataclass
class WeightVAEOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*): Sum of the terms below, present with training inputs.
        reconstruction_loss: Mean squared error of body tokens plus that of class tokens.
        kl_loss: KL divergence to the unit Gaussian, per latent dimension.
        match_loss: Binary cross-entropy of the compatibility of prompts with class names.
        foreign_loss: Mean square of what the adapter adds to the rows of class names that are not its own.
        noise_loss: KL divergence of the learned noise from the zoo's spread, per scalar.
        share_loss: Mean square of what the noise lacks of its share of the zoo's spread.
        weight_tokens (`torch.FloatTensor` of shape `(B, T + C, S)`): The reconstruction.
        token_stds (`torch.FloatTensor` of shape `(B, T + C, S)`): Of the learned noise.
        latents (`torch.FloatTensor` of shape `(B, Z)`): Means of the posterior.
        reconstruction_errors (`torch.FloatTensor` of shape `(B,)`): Whose mean is the `reconstruction_loss`.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    match_loss: Tensor | None = None
    foreign_loss: Tensor | None = None
    noise_loss: Tensor | None = None
    share_loss: Tensor | None = None
    weight_tokens: Tensor | None = None
    token_stds: Tensor | None = None
    latents: Tensor | None = None
    reconstruction_errors: Tensor | None = None


def class_mean(values: Tensor, class_mask: Tensor) -> Tensor:
    """Mean over real classes: `(B, C, n)` and `(B, C)` to `(B, 1, n)`."""
    weight = class_mask[..., None].to(values.dtype)
    return (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def centred(rows: Tensor, class_mask: Tensor) -> Tensor:
    """Class tokens `(B, C, S)` without the shift that all classes share; the softmax does not see it."""
    return rows - class_mean(rows, class_mask)


class ResidualMLP(nn.Module):
    """Pre-norm, with a hidden layer of twice the size."""

    def __init__(self, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class WeightVAE(PreTrainedModel):
    config_class = WeightVAEConfig
    main_input_name = "weight_tokens"

    def __init__(self, config: WeightVAEConfig):
        super().__init__(config)
        T, S, E = config.num_body_tokens, config.token_size, config.embedding_size
        d, H, Z = config.token_width, config.hidden_size, math.prod(config.latent_shape)
        self.token_in = nn.Parameter(torch.empty(T, S, d))  # every body token has its own map (T2W's chunks)
        self.token_out = nn.Parameter(torch.empty(T, d, S))
        self.token_bias = nn.Parameter(torch.empty(T, S))
        if T:
            self.body_in = nn.Linear(T * d, H)
            self.body_out = nn.Linear(H, T * d)
        if config.learns_noise:
            self.noise_out = nn.Parameter(torch.empty(T, d, S))
            self.noise_bias = nn.Parameter(torch.empty(T, S))
            self.class_noise_out = nn.Linear(H, S)
        self.class_in = nn.Linear(S + E, H)
        self.class_set = nn.Linear(H, H)
        self.to_latent = nn.Sequential(ResidualMLP(H), nn.LayerNorm(H), nn.Linear(H, 2 * Z))
        self.from_latent = nn.Sequential(nn.Linear(Z, H), ResidualMLP(H), ResidualMLP(H))
        self.name_in = nn.Linear(E, H)
        self.name_state = nn.Linear(H, 2 * H)  # scale and shift of the name features by the adapter's latent
        # no bias: it would shift all classes alike, which the loss does not see, so that Adam would follow rounding errors
        self.name_out = nn.Sequential(ResidualMLP(H), nn.LayerNorm(H, bias=False), nn.Linear(H, S, bias=False))
        self.name_projection = nn.Linear(E, S, bias=False)  # what a class name alone says of its row
        self.match_prompt, self.match_name = nn.Linear(E, config.match_size), nn.Linear(E, config.match_size)
        self.match_out = nn.Linear(2, 1)
        self.register_buffer("latent_mean", torch.zeros(Z))
        self.register_buffer("latent_std", torch.ones(Z))
        self.register_buffer("body_noise", torch.zeros(T))  # std of p(w|z) per body token, in token units
        self.register_buffer("class_noise", torch.zeros(()))
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        if module is self:
            init.normal_(self.token_in, std=self.config.token_size**-0.5)
            init.normal_(self.token_out, std=self.config.token_width**-0.5)
            init.zeros_(self.token_bias)
            if self.config.learns_noise:  # at first the same for all latents
                init.zeros_(self.noise_out)
                init.zeros_(self.noise_bias)
                init.zeros_(self.class_noise_out.weight)
                init.zeros_(self.class_noise_out.bias)
            init.constant_(self.match_out.weight, 5.0)
            for buffer in (self.latent_mean, self.body_noise, self.class_noise):
                init.zeros_(buffer)
            init.ones_(self.latent_std)

    def encode(self, weight_tokens: Tensor, class_embeds: Tensor, class_mask: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            weight_tokens (`torch.FloatTensor` of shape `(B, T + C, S)`): Body tokens, then one token per class.
            class_embeds (`torch.FloatTensor` of shape `(B, C, E)`): Embeddings of the class names.
            class_mask (`torch.BoolTensor` of shape `(B, C)`): `True` on real classes.

        Returns:
            Mean and log-variance of the posterior, each `(B, Z)`, not yet scaled to unit std.
        """
        T = self.config.num_body_tokens
        body, rows = weight_tokens[:, :T], weight_tokens[:, T:]
        rows = centred(rows, class_mask)
        features = F.silu(self.class_in(torch.cat([rows, class_embeds], -1)))  # (B, C, H)
        hidden = self.class_set(class_mean(features, class_mask)[:, 0])  # (B, H)
        if T:
            narrow = torch.einsum("bts,tsd->btd", body - self.token_bias, self.token_in)
            hidden = self.body_in(narrow.flatten(1)) + hidden
        mean, log_variance = self.to_latent(hidden).chunk(2, -1)
        return mean, log_variance.clamp(-12, 4)

    def decode(self, latents: Tensor, class_embeds: Tensor) -> Tensor:
        """
        Args:
            latents (`torch.FloatTensor` of shape `(B, Z)`): In the encoder's own scale, see [`~WeightVAE.unscale`].
            class_embeds (`torch.FloatTensor` of shape `(B, C, E)`).

        Returns:
            `torch.FloatTensor` of shape `(B, T + C, S)`: mean of p(w|z). Class tokens count up to a shift that all
            classes share, since the softmax over classes does not see it.
        """
        return self._decode(self.from_latent(latents), class_embeds)[0]

    def _decode(self, hidden: Tensor, class_embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens, and with `learns_noise` the stds of their noise."""
        tokens, log_stds = self.name_projection(class_embeds) + self._specific_rows(hidden, class_embeds), None
        if self.config.learns_noise:
            log_stds = self.class_noise_out(hidden)[:, None].expand_as(tokens)
        if self.config.num_body_tokens:
            narrow = self.body_out(hidden).unflatten(-1, (self.config.num_body_tokens, -1))  # (B, T, d)
            body = torch.einsum("btd,tds->bts", narrow, self.token_out) + self.token_bias
            tokens = torch.cat([body, tokens], 1)
            if log_stds is not None:
                body = torch.einsum("btd,tds->bts", narrow, self.noise_out) + self.noise_bias
                log_stds = torch.cat([body, log_stds], 1)
        return tokens, None if log_stds is None else log_stds.clamp(*LOG_STDS).exp()

    def _specific_rows(self, hidden: Tensor, class_embeds: Tensor) -> Tensor:
        """What an adapter adds to the rows that class names have in all adapters: `(B, C, S)`."""
        scale, shift = self.name_state(hidden)[:, None].chunk(2, -1)
        return self.name_out(self.name_in(class_embeds) * (1 + scale) + shift)

    def match(self, prompt_embeds: Tensor, class_embeds: Tensor, class_mask: Tensor) -> Tensor:
        """Logit that the class names `(B, C, E)` belong to a task that the prompt `(B, E)` asks for: `(B,)`."""
        prompt = F.normalize(self.match_prompt(prompt_embeds), dim=-1)
        names = F.normalize(self.match_name(class_embeds), dim=-1)
        cosines = torch.stack(
            [torch.einsum("be,bce->bc", *pair) for pair in ((prompt, names), (prompt_embeds, class_embeds))], -1
        )
        return self.match_out(class_mean(cosines, class_mask)[:, 0])[:, 0]

    def sample_tokens(self, latents: Tensor, class_embeds: Tensor, matches: bool, noise: Tensor) -> Tensor:
        """
        Tokens of new checkpoints: the decoder's mean plus its observation noise.

        Args:
            latents (`torch.FloatTensor` of shape `(B, Z)`): Scaled latents as a prior generates them.
            matches: Whether the class names fit the prompt; if not, the class tokens carry noise alone.
            noise (`torch.FloatTensor` of shape `(B, T + C, S)`): Unit Gaussian.
        """
        T = self.config.num_body_tokens
        tokens, stds = self.likelihood(latents, class_embeds)
        if not matches:
            tokens = torch.cat([tokens[:, :T], torch.zeros_like(tokens[:, T:])], 1)
        return tokens + self.config.noise_scale * stds * noise

    def likelihood(self, latents: Tensor, class_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Means `(B, T + C, S)` and stds of p(w|z), which has the same shape or may be expanded to it, for scaled latents."""
        tokens, stds = self._decode(self.from_latent(self.unscale(latents)), class_embeds)
        if stds is None:
            classes = tokens.shape[1] - self.config.num_body_tokens
            stds = torch.cat([self.body_noise, self.class_noise.expand(classes)])[:, None]  # (T + C, 1)
        return tokens, stds

    def scale(self, latents: Tensor) -> Tensor:
        return (latents - self.latent_mean) / self.latent_std

    def unscale(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std + self.latent_mean

    def forward(
        self,
        weight_tokens: Tensor,
        padding_mask: Tensor,
        class_embeds: Tensor,
        class_mask: Tensor,
        noise: Tensor,
        prompt_embeds: Tensor | None = None,
        other_embeds: Tensor | None = None,
        other_mask: Tensor | None = None,
        zoo_stds: Tensor | None = None,
    ) -> WeightVAEOutput:
        """
        Args:
            padding_mask (`torch.BoolTensor` of shape `(B, T + C, S)`): `True` on scalars that count.
            noise (`torch.FloatTensor` of shape `(B, Z)`): Unit Gaussian of the reparametrisation.
            prompt_embeds (`torch.FloatTensor` of shape `(B, E)`, *optional*): A prompt of each checkpoint's task.
            other_embeds, other_mask (*optional*): Class names of another family per checkpoint, as `class_embeds`. With
                them the decoder learns that an adapter knows of foreign names no more than the names say themselves.
            zoo_stds (`torch.FloatTensor` of shape `(B, T + C, S)`, *optional*): Of the zoo's rows of each checkpoint's task, for
                `learns_noise`.
        """
        means, log_variance = self.encode(weight_tokens, class_embeds, class_mask)
        latents = means + (0.5 * log_variance).exp() * noise
        hidden = self.from_latent(latents)
        reconstruction, stds = self._decode(hidden, class_embeds)
        T, mask = self.config.num_body_tokens, padding_mask.to(weight_tokens.dtype)
        error = reconstruction - weight_tokens
        error = torch.cat([error[:, :T], centred(error[:, T:], class_mask)], 1).square() * mask

        def means_of(values: Tensor) -> Tensor:
            """Over scalars of each checkpoint, of body tokens plus of classes `(B,)`: equal shares of a batch count alike."""
            parts = [(values[:, part], mask[:, part]) for part in (slice(T), slice(T, None))]
            return sum(v.sum((1, 2)) / m.sum((1, 2)).clamp(min=1) for v, m in parts)

        errors = means_of(error)
        reconstruction_loss = errors.mean()
        kl = 0.5 * (means.square() + log_variance.exp() - 1 - log_variance).mean()
        loss, match_loss, foreign_loss = reconstruction_loss + self.config.kl_weight * kl, None, None
        noise_loss = share_loss = None
        if stds is not None and zoo_stds is not None:
            divergence, share_loss = noise_losses(stds, zoo_stds, mask, self.config.noise_share)
            noise_loss = means_of(divergence).mean()
            loss = loss + self.config.noise_weight * noise_loss + SHARE_WEIGHT * share_loss
        if prompt_embeds is not None:
            fits = self.match(prompt_embeds, class_embeds, class_mask)
            foreign = self.match(prompt_embeds, other_embeds, other_mask)
            match_loss = F.softplus(-fits).mean() + F.softplus(foreign).mean()
            few = other_embeds[:, :FOREIGN_NAMES]
            alike = (few @ class_embeds.mT).amax(-1)  # tasks of different families may share names
            real = other_mask[:, :FOREIGN_NAMES] & (alike < ALIKE)
            specific = self._specific_rows(hidden, few).square().mean(-1)
            foreign_loss = ((specific * real).sum(1) / real.sum(1).clamp(min=1)).mean()
            loss = loss + 0.1 * match_loss + self.config.foreign_weight * foreign_loss
        return WeightVAEOutput(
            loss,
            reconstruction_loss,
            kl,
            match_loss,
            foreign_loss,
            noise_loss,
            share_loss,
            reconstruction,
            stds,
            means,
            errors,
        )


def noise_losses(stds: Tensor, zoo_stds: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """
    What learned noise is asked for: as much as the zoo has within a task, and in all at least a share of that.

    Args:
        stds, zoo_stds (`torch.FloatTensor` of shape `(B, L, S)`); mask, of the same shape, is 0 on padding.

    Returns:
        KL divergences of noise from the zoo's spread, `(B, L, S)`, 0 for a task of one row, which has no spread, and the mean square of
        what the noise lacks of its share.
    """
    mask = mask * (zoo_stds > 0).flatten(1).any(1)[:, None, None]
    ratio, whole = stds / zoo_stds.clamp(min=SMALLEST_STD), (zoo_stds * mask).flatten(1).norm(dim=1)
    there = (torch.minimum(stds, zoo_stds) * mask).flatten(1).norm(dim=1) / whole.clamp(min=SMALLEST_STD)
    return (0.5 * (ratio.square() - 1) - ratio.log()) * mask, (share - there).clamp(min=0).square().mean()

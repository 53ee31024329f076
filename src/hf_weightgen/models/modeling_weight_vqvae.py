"""Gumbel VQ-VAE over weight tokens: a few codes of a codebook for each token, and a decoder that reads all codes of a network.

References: IGPG (https://huggingface.co/papers/2504.02012), whose codes say chunks of weights; draws by Gumbel noise
(https://huggingface.co/papers/1611.01144), section 2.1; the straight-through gradient of VQ-VAE
(https://huggingface.co/papers/1711.00937), section 3.2; residual codes: SoundStream
(https://huggingface.co/papers/2107.03312), section III-C; revival of dead codes: Jukebox
(https://huggingface.co/papers/2005.00341), section 3.1. Ours: tokens are told apart by what they are (see
[`~weights.descriptors`]), not by their number, so that a network of another width or depth has codes too; and a decoder that sees
the whole network, so that codes need not say what follows from their neighbours.

Notation used for shapes:
    - B: checkpoints in the batch;  L: tokens of a checkpoint, those of the body and then those of classes, padded;  S: scalars
      per token
    - D: size of a token's description;  E: size of an embedding of a class name;  H: hidden size
    - R: codes per token;  K: codes of a codebook;  Z: size of a code
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .modeling_weight_vae import LOG_STDS, SHARE_WEIGHT, noise_losses


LEAST_SPREAD = 0.05  # of a scalar at its place, beside the std of its tensor
APART = 4.0  # length of a code before training: Gumbel noise, whose std is 1.3, does not drown distances of such codes


@strict
class WeightVQVAEConfig(PreTrainedConfig):
    r"""
    Args:
        token_size: S.
        class_parts: Tokens that a class has.
        descriptor_size: D.
        embedding_size: E; 384 is all-MiniLM-L6-v2.
        hidden_size, num_layers, num_attention_heads: Of the encoder, and of the decoder.
        window: Tokens in a row that see each other: memory does not grow with the square of the network, and a long one is decoded
            window by window.
        num_codes: K.
        code_size: Z.
        codes_per_token: R; each further code says what the codes in front of it left.
        codebook_weight, commitment_weight: Of what moves codes to the encoder's outputs, and these to the codes.
        uniform_weight: Of the divergence of the codes' usage from all codes alike.
        num_places: Tokens of the bodies of all known layouts, each of which has maps of its own in the decoder beside those that all
            tokens share, which alone decode networks that are new; place_size: what these maps read.
        place_moments: Tokens of known places are told by how they differ from their mean there, in units of their spread: networks
            that share a start differ by little, and what they have in common would be all that is learned.
        named_layouts: Numbers of layouts whose class rows have a linear map of names of their own, such as heads that read text; all
            others share one.
        learns_noise, noise_weight, noise_share: As of [`WeightVAEConfig`]: the decoder also tells what codes leave open.
    """

    model_type = "weight_vqvae"

    token_size: int = 64
    class_parts: int = 1
    descriptor_size: int = 64
    embedding_size: int = 384
    hidden_size: int = 128
    num_layers: int = 2
    num_attention_heads: int = 4
    window: int = 512
    num_codes: int = 1024
    code_size: int = 64
    codes_per_token: int = 2
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    uniform_weight: float = 1e-3
    num_places: int = 0
    place_size: int = 32
    place_moments: bool = False
    named_layouts: list[int] = field(default_factory=list)
    learns_noise: bool = False
    noise_weight: float = 5e-3
    noise_share: float = 0.6

    def __post_init__(self, **kwargs):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must divide over {self.num_attention_heads} attention heads, got {self.hidden_size}."
            )
        if self.window < 1:
            raise ValueError(f"`window` must be at least 1, got {self.window}.")
        super().__post_init__(**kwargs)


@dataclass
class WeightVQVAEOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`): Sum of the terms below.
        reconstruction_loss: Mean squared error of scalars that count.
        codebook_loss, commitment_loss: Mean squared distances of codes and encoder's outputs.
        uniform_loss: KL divergence of the mean soft usage of codes from the uniform distribution.
        perplexity (`torch.FloatTensor` of shape `(R,)`): Of the codes of this batch: how many are in use.
        weight_tokens (`torch.FloatTensor` of shape `(B, L, S)`): The reconstruction.
        codes (`torch.LongTensor` of shape `(B, L, R)`): -1 on padding.
        residuals (`torch.FloatTensor` of shape `(R, tokens, Z)`): What each code was asked to say, for [`WeightVQVAE.revive`].
        token_stds (`torch.FloatTensor` of shape `(B, L, S)`): Of the learned noise.
        reconstruction_errors (`torch.FloatTensor` of shape `(B,)`): Whose mean is the `reconstruction_loss`.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    codebook_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    uniform_loss: Tensor | None = None
    perplexity: Tensor | None = None
    weight_tokens: Tensor | None = None
    codes: Tensor | None = None
    residuals: Tensor | None = None
    token_stds: Tensor | None = None
    reconstruction_errors: Tensor | None = None


class WeightVQVAE(PreTrainedModel):
    config_class = WeightVQVAEConfig
    main_input_name = "weight_tokens"

    def __init__(self, config: WeightVQVAEConfig):
        super().__init__(config)
        H = config.hidden_size
        self.token_in = nn.Linear(config.token_size, H)
        self.encoder, self.decoder = self._transformer(), self._transformer()
        self.describe = nn.ModuleList(nn.Linear(config.descriptor_size, H) for _ in range(2))
        self.name_in = nn.ModuleList(nn.Linear(config.embedding_size, H, bias=False) for _ in range(2))
        self.to_code, self.from_code = nn.Linear(H, config.code_size), nn.Linear(config.code_size, H)
        self.token_out = nn.Linear(H, config.token_size)
        rows = (1 + len(config.named_layouts)) * config.class_parts * config.token_size
        self.name_projection = nn.Linear(config.embedding_size, rows, bias=False)
        self.codebook = nn.Parameter(torch.empty(config.codes_per_token, config.num_codes, config.code_size))
        outputs = config.token_size * (2 if config.learns_noise else 1)
        if config.num_places:
            self.place_in = nn.Parameter(torch.empty(config.num_places, H))
            self.to_place = nn.Linear(H, config.place_size)
            self.place_out = nn.Parameter(torch.empty(config.num_places, config.place_size, outputs))
        if config.place_moments:
            self.register_buffer("place_mean", torch.zeros(config.num_places, config.token_size))
            self.register_buffer("place_std", torch.ones(config.num_places, config.token_size))
        if config.learns_noise:
            self.noise_out = nn.Linear(H, config.token_size)
        self.post_init()

    def _transformer(self) -> nn.TransformerEncoder:
        config = self.config
        layer = nn.TransformerEncoderLayer(
            config.hidden_size, config.num_attention_heads, 4 * config.hidden_size, 0.0, F.gelu, batch_first=True, norm_first=True
        )  # fmt: skip
        norm = nn.LayerNorm(config.hidden_size)
        return nn.TransformerEncoder(layer, config.num_layers, norm, enable_nested_tensor=False)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.MultiheadAttention):
            init.normal_(module.in_proj_weight, std=module.embed_dim**-0.5)
            init.zeros_(module.in_proj_bias)
        if module is self:
            init.normal_(self.codebook, std=APART * self.config.code_size**-0.5)
            init.zeros_(self.name_projection.weight)
            if self.config.num_places:
                init.zeros_(self.place_in)
                init.zeros_(self.place_out)
            if self.config.place_moments:
                init.zeros_(self.place_mean)
                init.ones_(self.place_std)
            if self.config.learns_noise:  # at first the same everywhere
                init.zeros_(self.noise_out.weight)

    def freeze_codes(self, frozen: bool = True) -> None:
        """Leaves what makes codes as it is, so that they stay what they are while the decoder trains."""
        for part in (self.token_in, self.encoder, self.describe[0], self.name_in[0], self.to_code):
            part.requires_grad_(not frozen)
        self.codebook.requires_grad_(not frozen)

    @torch.no_grad()
    def fit_places(self, weight_tokens: Tensor, places: Tensor) -> None:
        """With `place_moments`, mean and spread of places `(n,)` from weight tokens `(R, n, S)` of a zoo."""
        self.place_mean[places] = weight_tokens.mean(0)
        self.place_std[places] = weight_tokens.std(0, correction=0).clamp(min=LEAST_SPREAD)

    def map_of_names(self, layout: int) -> Tensor:
        """What takes a class name to its row of the head in a layout, `(class_parts * S, E)`: a view of the parameter."""
        named = self.config.named_layouts
        number = 1 + named.index(layout) if layout in named else 0
        return self.name_projection.weight.unflatten(0, (1 + len(named), -1))[number]

    def _moments(self, places: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Mean and spread of each token, `(L, S)`; 0 and 1 where its place is not known."""
        if places is None or not self.config.place_moments:
            return None
        real, number = known_places(places, self.config.num_places)
        mean, std = self.place_mean[number], self.place_std[number]
        return mean * real[:, None], torch.where(real[:, None], std, 1.0)

    def encode(self, weight_tokens, descriptors, name_embeds, mask, places: Tensor | None = None) -> Tensor:
        """
        Args:
            weight_tokens (`torch.FloatTensor` of shape `(B, L, S)`), descriptors (`torch.FloatTensor` of shape `(B, L, D)`).
            name_embeds (`torch.FloatTensor` of shape `(B, L, E)`): Of the class of each class token; zeros on others.
            mask (`torch.BoolTensor` of shape `(B, L)`): `True` on tokens.
            places: See [`~WeightVQVAE.decode`].

        Returns:
            `torch.FloatTensor` of shape `(B, L, Z)`: before it becomes codes.
        """
        moments = self._moments(places)
        if moments is not None:
            weight_tokens = (weight_tokens - moments[0]) / moments[1]
        hidden = self.token_in(weight_tokens) + self.describe[0](descriptors) + self.name_in[0](name_embeds)
        return self.to_code(self._in_windows(self.encoder, hidden, mask))

    def quantise(
        self, values: Tensor, temperature: float = 0.0, gumbel: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Codes by their distance: the nearest, or with Gumbel noise one drawn from the softmax of distances; its gradient passes
        straight to what the encoder asked for. The one through the softmax vanishes where codes are as far apart as noise must be
        small.

        Args:
            values (`torch.FloatTensor` of shape `(n, Z)`).
            temperature: tau, of the distribution from which codes are drawn; 0 takes the nearest code.
            gumbel (`torch.FloatTensor` of shape `(n, R, K)`, *optional*): Gumbel noise, for a temperature above 0.

        Returns:
            Codes `(n, R)`, their sums `(n, Z)`, what each code was asked to say `(R, n, Z)`, and log-probabilities `(R, n, K)`.
        """
        total, codes, asked, log_probabilities = torch.zeros_like(values), [], [], []
        for r, codebook in enumerate(self.codebook):
            rest = values - total.detach()
            # the squared distance, but for what is the same for all codes
            logits = 2 * rest @ codebook.mT - codebook.square().sum(-1)
            asked.append(rest)
            log_probabilities.append(logits.log_softmax(-1))
            # noise that falls with the temperature: with all of it to the end codes would say nothing, and the decoder would learn to
            # read none
            code = (logits + temperature * gumbel[:, r] if temperature > 0 else logits).argmax(-1)
            total = total + codebook[code]
            codes.append(code)
        if temperature > 0:
            total = total + values - values.detach()
        return torch.stack(codes, -1), total, torch.stack(asked), torch.stack(log_probabilities)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Sums of codes `(..., R)`: `(..., Z)`; nothing where a code is negative."""
        known = (codes >= 0)[..., None]
        levels = range(len(self.codebook))
        return sum(self.codebook[r][codes[..., r].clamp(min=0)] * known[..., r, :] for r in levels)

    def decode(
        self,
        embedded: Tensor,
        descriptors: Tensor,
        name_embeds: Tensor,
        mask: Tensor,
        class_parts: Tensor,
        places: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            embedded (`torch.FloatTensor` of shape `(B, L, Z)`): See [`~WeightVQVAE.embed_codes`].
            descriptors, name_embeds, mask: See [`~WeightVQVAE.encode`].
            class_parts (`torch.LongTensor` of shape `(B, L)`): Which of its class's tokens each one is, from 1; 0 on others.
            places (`torch.LongTensor` of shape `(L,)`, *optional*): The number of each token among those of all known layouts; another
                one than 0 to `num_places - 1` where it has none; on class tokens -1 less the layout's number. Default: none has.
            noise (`torch.FloatTensor` of shape `(B, L, S)`, *optional*): Unit Gaussian; with it, and `learns_noise`, a sample of
                p(w | codes), without it the mean.

        Returns:
            `torch.FloatTensor` of shape `(B, L, S)`: weight tokens.
        """
        tokens, stds = self._decode(embedded, descriptors, name_embeds, mask, class_parts, places)
        return tokens if noise is None or stds is None else tokens + stds * noise

    def _decode(self, embedded, descriptors, name_embeds, mask, class_parts, places) -> tuple[Tensor, Tensor | None]:
        """Tokens, and with `learns_noise` the stds of their noise."""
        config = self.config
        hidden = self.from_code(embedded) + self.describe[1](descriptors) + self.name_in[1](name_embeds)
        known, layout = places is not None and config.num_places > 0, 0
        if config.named_layouts and places is not None:
            layout = int((-1 - places).max())  # class tokens are of one
        # a class's row of a head that reads text is nearly linear in its name, and wider than what else passes
        rows = F.linear(name_embeds, self.map_of_names(layout)).unflatten(-1, (config.class_parts, -1))
        if known:
            moments, (real, places) = self._moments(places), known_places(places, config.num_places)
            hidden = hidden + self.place_in[places] * real[:, None]
        part = (class_parts - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, rows.shape[-1])
        of_names = rows.gather(2, part)[:, :, 0]  # names of other tokens are zeros
        hidden = self._in_windows(self.decoder, hidden, mask)
        outputs = [self.token_out(hidden)] + ([self.noise_out(hidden)] if config.learns_noise else [])
        outputs = torch.cat(outputs, -1)
        if known:
            maps = self.place_out[places] * real[:, None, None]
            outputs = outputs + torch.einsum("bld,lds->bls", self.to_place(hidden), maps)
        tokens, *log_stds = outputs.split(config.token_size, -1)
        stds = log_stds[0].clamp(*LOG_STDS).exp() if log_stds else None
        if known and moments is not None:
            tokens, stds = moments[0] + moments[1] * tokens, None if stds is None else moments[1] * stds
        return tokens + of_names, stds

    def _in_windows(self, transformer: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
        """`(B, L, H)`, each window by itself; zeros where a window has no token."""
        B, L, H = hidden.shape
        size = min(self.config.window, L)
        windows, seen = -(-L // size), F.pad(mask, (0, -L % size)).view(-1, size)
        rows = F.pad(hidden, (0, 0, 0, -L % size)).view(B * windows, size, H)
        real = seen.any(1)
        read = transformer(rows[real], src_key_padding_mask=~seen[real])
        out = torch.zeros_like(rows).index_put((real,), read.to(rows.dtype))
        return out.view(B, windows * size, H)[:, :L]

    def forward(
        self,
        weight_tokens: Tensor,
        padding_mask: Tensor,
        descriptors: Tensor,
        name_embeds: Tensor,
        class_parts: Tensor,
        temperature: float = 0.0,
        uniform: Tensor | None = None,
        places: Tensor | None = None,
        codes: Tensor | None = None,
        zoo_stds: Tensor | None = None,
        places_told: bool = True,
    ) -> WeightVQVAEOutput:
        """
        Args:
            padding_mask (`torch.BoolTensor` of shape `(B, L, S)`): `True` on scalars that count.
            class_parts: See [`~WeightVQVAE.decode`]; class tokens count up to a shift that all classes share.
            temperature, uniform (`torch.FloatTensor` of shape `(B, L, R, K)`, *optional*): Of Gumbel-softmax, with draws from
                [0, 1); without them the nearest codes are taken, which passes no gradient to the encoder but by commitment.
            places: See [`~WeightVQVAE.decode`].
            codes (`torch.LongTensor` of shape `(B, L, R)`, *optional*): What is decoded, in the place of what the encoder asks for.
            zoo_stds (`torch.FloatTensor` of shape `(B, L, S)`, *optional*): Of the zoo's rows of each checkpoint's task, for
                `learns_noise`.
            places_told: `False` decodes as a network that is new, whose tokens have no known places.
        """
        config, mask, decoded_at = self.config, padding_mask.any(-1), places
        if places is not None and not places_told:  # maps then take part with zeros, as several processes need it
            decoded_at = places.clamp(max=-1)
        described, moments = (descriptors, name_embeds, mask, class_parts, decoded_at), self._moments(decoded_at)
        scale = None if moments is None else moments[1]
        if codes is not None:
            tokens, stds = self._decode(self.embed_codes(codes).detach(), *described)
            errors = self._errors(tokens, weight_tokens, padding_mask, class_parts, scale)
            loss, made = errors.mean() + self._of_noise(stds, zoo_stds, padding_mask), {"weight_tokens": tokens}
            made |= {"codes": codes, "token_stds": stds, "reconstruction_errors": errors}
            return WeightVQVAEOutput(loss, errors.mean(), **made)
        values = self.encode(weight_tokens, descriptors, name_embeds, mask, places)[mask]  # (tokens, Z)
        gumbel = None
        if temperature > 0:
            if uniform is None:
                raise ValueError(f"With `temperature` {temperature}, `uniform` must hold the draws of its noise.")
            tiny = torch.finfo(uniform.dtype).tiny
            gumbel = -(-uniform[mask].clamp(min=tiny).log()).clamp(min=tiny).log()
        codes, total, asked, log_probabilities = self.quantise(values, temperature, gumbel)
        embedded = total.new_zeros(*mask.shape, config.code_size).masked_scatter(mask[..., None], total)
        reconstruction, stds = self._decode(embedded, *described)
        errors = self._errors(reconstruction, weight_tokens, padding_mask, class_parts, scale)
        reconstruction_loss = errors.mean()
        chosen = self.embed_codes(codes)
        codebook_loss = F.mse_loss(chosen, values.detach())
        commitment_loss = F.mse_loss(values, chosen.detach())
        usage = log_probabilities.exp().mean(1)  # (R, K)
        uniform_loss = (usage * (usage.clamp(min=1e-12).log() + math.log(config.num_codes))).sum(-1).mean()
        loss = reconstruction_loss + config.codebook_weight * codebook_loss
        loss = loss + config.commitment_weight * commitment_loss + config.uniform_weight * uniform_loss
        loss = loss + self._of_noise(stds, zoo_stds, padding_mask)
        every = codes.new_full((*mask.shape, config.codes_per_token), -1).masked_scatter(mask[..., None], codes)
        terms = reconstruction_loss, codebook_loss, commitment_loss, uniform_loss, perplexity(self.counts(every))
        return WeightVQVAEOutput(loss, *terms, reconstruction, every, asked.detach(), stds, errors)

    def _errors(self, tokens, weight_tokens, padding_mask, class_parts, scale: Tensor | None) -> Tensor:
        """Mean squared error of each checkpoint, in units of `scale` `(L, S)`."""
        error = self._without_class_mean(tokens - weight_tokens, class_parts).square() * padding_mask
        if scale is not None:
            error = error / scale.square()
        return error.sum((1, 2)) / padding_mask.sum((1, 2)).clamp(min=1)

    def _of_noise(self, stds: Tensor | None, zoo_stds: Tensor | None, padding_mask: Tensor) -> Tensor | float:
        if stds is None or zoo_stds is None:
            return 0.0
        mask = padding_mask.to(stds.dtype)
        divergence, lacking = noise_losses(stds, zoo_stds, mask, self.config.noise_share)
        divergence = (divergence.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)).mean()
        return self.config.noise_weight * divergence + SHARE_WEIGHT * lacking

    def _without_class_mean(self, tokens: Tensor, class_parts: Tensor) -> Tensor:
        """`(B, L, S)` without the shift that all classes share; the softmax does not see it."""
        which = torch.arange(1, 1 + self.config.class_parts, device=class_parts.device)
        of_part = (class_parts[..., None] == which).to(tokens.dtype)  # (B, L, parts)
        mean = of_part.mT @ tokens / of_part.sum(1).clamp(min=1)[..., None]  # (B, parts, S)
        return tokens - of_part @ mean

    def counts(self, codes: Tensor) -> Tensor:
        """How often each code comes in `(..., R)`, which has -1 on padding: `(R, K)`."""
        flat = codes.flatten(0, -2)
        flat = flat[flat[:, 0] >= 0]
        return torch.stack([column.bincount(minlength=self.config.num_codes) for column in flat.mT])

    @torch.no_grad()
    def revive(self, usage: Tensor, residuals: Tensor, random: torch.Generator, least: float = 1.0) -> int:
        """
        Puts codes that are hardly used where the encoder asks for codes.

        Args:
            usage (`torch.FloatTensor` of shape `(R, K)`): How often each code came lately, in the mean of some steps.
            residuals (`torch.FloatTensor` of shape `(R, tokens, Z)`): See [`WeightVQVAEOutput`].
            least: Codes that came less often are moved.

        Returns:
            How many codes were moved.
        """
        moved = 0
        for codebook, counts, asked in zip(self.codebook, usage, residuals, strict=True):
            dead = (counts < least).nonzero().flatten()
            rows = torch.randint(len(asked), (len(dead),), generator=random)
            codebook[dead] = asked[rows].to(codebook.dtype)
            moved += len(dead)
        return moved


def known_places(places: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
    """Which places are known ones, and their numbers; some number of them where they are not."""
    return (places >= 0) & (places < num_places), places.clamp(0, num_places - 1)


def perplexity(counts: Tensor) -> Tensor:
    """Of the distribution of codes that came so often, `(R, K)`: from 1 to K, `(R,)`."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return (-(shares * shares.clamp(min=1e-12).log()).sum(-1)).exp()

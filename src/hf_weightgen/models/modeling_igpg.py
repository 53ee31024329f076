"""IGPG's prior: a decoder of transformers that writes the codes of a network one after another.

References: IGPG (https://huggingface.co/papers/2504.02012): codes s_i follow p(s_i | s_<i, architecture, dataset); what is longer
than the context is written in parts, each of which sees the tail of what is there. Gumbel-max sampling: each sample draws from a
generator of its own, so that it is the same in any batch. Ours: which token of which network is to be written next stands in the
input of every step, so that the prior need not count, and so that layouts that it never saw can be asked for; tokens of known layouts
have maps of the conditions of their own, so that what a task says of a place need not be guessed from the codes in front of it.

Notation used for shapes:
    - N: networks;  T: tokens of a network;  R: codes per token;  K: codes of a codebook;  L = T R codes in a row
    - P: positions of the prefix;  E: size of an embedding;  D: size of a token's description;  H: hidden size
    - the k-th code of codebook r has the id r K + k
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    LlamaPreTrainedModel,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from .modeling_weight_vqvae import known_places


AT_ONCE = 1024  # tokens that are described together
CONDITIONS = ("instruction", "dataset", "architecture")
PLACE_STD = 0.5  # of what places say before training: as much as descriptions do


@strict
class IGPGConfig(LlamaConfig):
    r"""
    Args:
        num_codes, codes_per_token: K and R.
        descriptor_size, embedding_size: D and E.
        max_position_embeddings: Positions of the context, with the prefix.
        tail: Codes that a part of a network sees of those in front of it, where the network is longer than the context.
        num_places: Tokens of the bodies of all known layouts, each of which has a map of its own of the conditions, beside what all
            tokens share, which alone writes networks that are new; place_size: what these maps read. 0 leaves them out.
        hidden_size, ...: As in Llama.
    """

    model_type = "igpg"

    num_codes: int = 1024
    codes_per_token: int = 2
    descriptor_size: int = 64
    embedding_size: int = 384
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 4096
    tail: int = 1024
    num_places: int = 0
    place_size: int = 32
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.vocab_size = self.num_codes * self.codes_per_token
        prefix = len(CONDITIONS) + 2
        if not 0 < self.tail < self.max_position_embeddings - prefix:
            raise ValueError(
                f"`tail` must be 1 to {self.max_position_embeddings - prefix - 1} codes, so that the context of "
                f"{self.max_position_embeddings} positions has room for new ones, got {self.tail}."
            )
        super().__post_init__(**kwargs)
        if self.eos_token_id is not None:
            raise ValueError(
                f"`eos_token_id` must be absent, as networks have a length of their own, got {self.eos_token_id!r}."
            )


class IGPGPrior(LlamaPreTrainedModel, GenerationMixin):
    config_class = IGPGConfig

    def __init__(self, config: IGPGConfig):
        super().__init__(config)
        E, D, H = config.embedding_size, config.descriptor_size, config.hidden_size
        self.model, self.lm_head = LlamaModel(config), nn.Linear(H, config.vocab_size, bias=False)
        self.condition_in = nn.ModuleList(nn.Linear(E, H) for _ in CONDITIONS)
        self.slot_in, self.name_in = nn.Linear(D, H), nn.Linear(E, H, bias=False)
        self.slot_mix = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H))
        self.level, self.absent = (nn.Parameter(torch.empty(n, H)) for n in (config.codes_per_token, len(CONDITIONS)))
        self.start = nn.Parameter(torch.empty(H))
        if config.num_places:
            self.to_place = nn.Linear(H, config.place_size)
            self.place_in = nn.Parameter(torch.empty(config.num_places, H))
            self.place_out = nn.Parameter(torch.empty(config.num_places, config.place_size, H))
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            for parameter in (self.level, self.absent, self.start):
                init.normal_(parameter, std=self.config.initializer_range)
            if self.config.num_places:
                init.normal_(self.place_in, std=PLACE_STD)
                init.normal_(self.place_out, std=self.config.place_size**-0.5)

    # diffusers reads off its signature which arguments it takes
    @functools.wraps(LlamaPreTrainedModel.save_pretrained)
    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, without settings of `generate`: [`~IGPGPrior.write`] has its own."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / "generation_config.json").unlink(missing_ok=True)

    def slots(
        self, descriptors: Tensor, name_embeds: Tensor, places: Tensor | None = None, conditions: Tensor | None = None
    ) -> Tensor:
        """
        What is to be written at each place.

        Args:
            descriptors (`torch.FloatTensor` of shape `(N, T, D)`), name_embeds (`torch.FloatTensor` of shape `(N, T, E)`).
            places (`torch.LongTensor` of shape `(T,)`, *optional*): As of [`WeightVQVAE.decode`]; read with `num_places`.
            conditions: See [`~IGPGPrior.prefix`]; read with `num_places`.

        Returns:
            `torch.FloatTensor` of shape `(N, L, H)`.
        """
        of_token = self.slot_in(descriptors) + self.name_in(name_embeds)
        if not self.config.num_places:
            of_token = self.slot_mix(of_token)
        else:
            asked = self._embedded(conditions).sum(1)  # (N, H)
            of_token = of_token + asked[:, None] + self._of_places(asked, places, descriptors.shape[1])
            of_token = of_token + self.slot_mix(of_token)
        return (of_token[:, :, None] + self.level).flatten(1, 2)

    def _of_places(self, asked: Tensor, places: Tensor | None, tokens: int) -> Tensor:
        """`(N, T, H)`, zeros where a token has no known place."""
        places = torch.full((tokens,), -1) if places is None else places
        known, number = known_places(places, self.config.num_places)
        maps = self.place_out[number]  # (T, P, H)
        said = torch.einsum("np,tph->nth", self.to_place(asked), maps) + self.place_in[number]
        return said * known[:, None].to(asked.device)

    def _embedded(self, conditions: Tensor) -> Tensor:
        """`(N, 3, H)`"""
        told = conditions.norm(dim=-1, keepdim=True) > 0
        # embeddings have unit length: without the factor their components would vanish beside those of codes
        embedded = [layer(conditions[:, i] * conditions.shape[-1] ** 0.5) for i, layer in enumerate(self.condition_in)]
        return torch.where(told, torch.stack(embedded, 1), self.absent)

    def prefix(self, conditions: Tensor, whole: Tensor) -> Tensor:
        """
        Args:
            conditions (`torch.FloatTensor` of shape `(N, 3, E)`): Embeddings of unit length of the instruction, the dataset and the
                architecture's description; zeros for what is not told.
            whole (`torch.FloatTensor` of shape `(N, 1, H)`): The mean of all slots, which says what the network is as a whole.

        Returns:
            `torch.FloatTensor` of shape `(N, P, H)`.
        """
        return torch.cat([self._embedded(conditions), whole], 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        slots: Tensor | None = None,
        first: int = 0,
        start: int = 0,
        codes: Tensor | None = None,
        conditions: Tensor | None = None,
        descriptors: Tensor | None = None,
        name_embeds: Tensor | None = None,
        places: Tensor | None = None,
        read: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        In training the mean negative log-likelihood of `codes`, see [`~IGPGPrior.code_losses`], whose arguments are those from `start`
        on; else one step of `generate`: the scores of what comes last.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, n)`): Codes, each of which goes in with the slot of the code that follows it.
            inputs_embeds (`torch.FloatTensor` of shape `(N, n, H)`): In their place what goes in as it is, such as the prefix.
            slots (`torch.FloatTensor` of shape `(N, L, H)`): See [`~IGPGPrior.slots`].
            first: The position whose input has slot 0; those in front of it are the prefix.
        """
        if codes is not None:
            losses, _ = self.code_losses(codes, conditions, descriptors, name_embeds, start, places, read)
            return CausalLMOutputWithPast(loss=losses.mean())
        if input_ids is not None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            places = torch.arange(start, start + input_ids.shape[1], device=input_ids.device) - first
            inputs_embeds = self.model.embed_tokens(input_ids) + slots[:, places]
        kwargs.pop("logits_to_keep", None)
        output = self.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        logits = self.lm_head(output.last_hidden_state[:, -1:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)

    def _room(self, prefix: Tensor) -> int:
        """Codes that the context has room for."""
        return self.config.max_position_embeddings - prefix.shape[1] - 1

    def _inputs(self, prefix: Tensor, codes: Tensor, slots: Tensor) -> Tensor:
        """Of ids `(N, n)` that were written at the first slots, the inputs from which the next one follows: `(N, P + 1 + n, H)`."""
        written = torch.cat([self.start.expand(len(codes), 1, -1), self.model.embed_tokens(codes)], 1)
        return torch.cat([prefix, written + slots[:, : written.shape[1]]], 1)

    def code_losses(
        self,
        codes: Tensor,
        conditions: Tensor,
        descriptors: Tensor,
        name_embeds: Tensor,
        start: int = 0,
        places: Tensor | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            codes (`torch.LongTensor` of shape `(N, T, R)`): From 0 to K - 1, -1 on padding.
            conditions, descriptors, name_embeds, places: See [`~IGPGPrior.prefix`] and [`~IGPGPrior.slots`].
            read (`torch.LongTensor` of shape `(N, T, R)`, *optional*): Codes that stand in front of each one, some of them wrong, as
                its own are when it writes. Default: `codes`.
            start: The token from which on codes are read, as a part of a long network is, see [`~IGPGPrior.write`]: as many as the
                context has room for.

        Returns:
            Negative log-likelihoods in nats of the codes that are no padding, in one row, and of which network each is.
        """
        K, R = self.config.num_codes, self.config.codes_per_token
        slots, known = self.slots(descriptors, name_embeds, places, conditions), codes[..., 0] >= 0
        read = codes if read is None else read
        ids = (read.clamp(min=0) + K * torch.arange(R, device=codes.device)).flatten(1)
        prefix = self.prefix(conditions, _mean_of_known(slots, known.repeat_interleave(R, 1)))
        part = slice(start, start + self._room(prefix) // R)
        codes, known = codes[:, part], known[:, part]
        inputs = self._inputs(prefix, ids[:, start * R : (start + codes.shape[1]) * R - 1], slots[:, start * R :])
        hidden = self.model(inputs_embeds=inputs).last_hidden_state[:, prefix.shape[1] :]
        hidden = hidden.unflatten(1, (-1, R))[known]  # (tokens, R, H)
        heads = self.lm_head.weight.unflatten(0, (R, K))
        logits = torch.einsum("trh,rkh->trk", hidden, heads)
        losses = F.cross_entropy(logits.flatten(0, 1), codes[known].flatten(), reduction="none")
        return losses, known.nonzero()[:, 0].repeat_interleave(R)

    def write(
        self,
        conditions: Tensor,
        descriptors: Tensor,
        name_embeds: Tensor,
        *args,
        places: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """[`~IGPGPrior.write_described`] of networks whose descriptions, see [`~IGPGPrior.slots`], are in memory as a whole."""

        def described(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            return descriptors[:, part], name_embeds[:, part], None if places is None else places[part]

        return self.write_described(conditions, described, descriptors.shape[1], *args, **kwargs)

    @torch.no_grad()
    def write_described(
        self,
        conditions: Tensor,
        described: Callable[[slice], tuple[Tensor, Tensor, Tensor | None]],
        tokens: int,
        generators: Sequence[torch.Generator] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        tail: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """
        New codes, exactly as many as the layout has. Beside them a context is in memory, however long the network is.

        Args:
            conditions: See [`~IGPGPrior.prefix`].
            described: Of a part of the tokens descriptors, embeddings of names, and places, see [`~IGPGPrior.slots`].
            tokens: T.
            generators: One per network; without them the likeliest code is taken.
            temperature, top_k, top_p: Of sampling, as in `generate` of transformers; 0 and 1 leave all codes in.
            tail: In the place of the config's.
            use_cache: Without it each code costs a pass over all codes in front of it, which is for measuring alone.

        Returns:
            `torch.LongTensor` of shape `(N, T, R)`.
        """
        config = self.config
        K, R, tail = config.num_codes, config.codes_per_token, config.tail if tail is None else tail
        parts = [slice(start, min(start + AT_ONCE, tokens)) for start in range(0, tokens, AT_ONCE)]
        whole = sum(self.slots(*described(part), conditions).sum(1, keepdim=True) for part in parts) / (tokens * R)
        prefix, total = self.prefix(conditions, whole), tokens * R
        room = self._room(prefix)
        ids = torch.zeros(len(prefix), 0, dtype=torch.long, device=prefix.device)
        while ids.shape[1] < total:
            done = ids.shape[1]
            start = max(0, done - tail) if done else 0
            count = min(total - done, room - (done - start))
            slots = self.slots(*described(slice(start // R, -(-(done + count) // R))), conditions)[:, start % R :]
            processors = LogitsProcessorList([_OfLevel(K, R, done)])
            if generators is not None:
                processors += [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
                processors += [TopKLogitsWarper(top_k)] if top_k else []
                processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
                processors.append(_GumbelMax(generators))
            inputs = self._inputs(prefix, ids[:, start:], slots)
            if use_cache:
                new = self.generate(
                    inputs_embeds=inputs,
                    attention_mask=inputs.new_ones(inputs.shape[:2], dtype=torch.long),
                    slots=slots,
                    first=prefix.shape[1],
                    logits_processor=processors,
                    generation_config=GenerationConfig(
                        max_new_tokens=count, do_sample=False, pad_token_id=0, use_cache=True
                    ),
                )
            else:
                new = self._write_without_cache(prefix, ids[:, start:], slots, count, processors)
            ids = torch.cat([ids, new], 1)
        return (ids % K).unflatten(1, (-1, R))

    def _write_without_cache(self, prefix, ids, slots, count: int, processors) -> Tensor:
        new = ids[:, :0]
        for _ in range(count):
            inputs = self._inputs(prefix, torch.cat([ids, new], 1), slots)
            hidden = self.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -1]
            new = torch.cat([new, processors(new, self.lm_head(hidden)).argmax(-1, keepdim=True)], 1)
        return new


class _OfLevel(LogitsProcessor):
    """Leaves the codes of the codebook that is next."""

    def __init__(self, num_codes: int, levels: int, done: int):
        self.num_codes, self.levels, self.done = num_codes, levels, done

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        level = (self.done + input_ids.shape[1]) % self.levels
        allowed = slice(level * self.num_codes, (level + 1) * self.num_codes)
        masked = torch.full_like(scores, -torch.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked


class _GumbelMax(LogitsProcessor):
    """Noise with which the largest score is a sample."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators]).to(scores.device)
        tiny = torch.finfo(draws.dtype).tiny
        return scores - (-draws.clamp(min=tiny).log()).clamp(min=tiny).log()


def _mean_of_known(slots: Tensor, known: Tensor) -> Tensor:
    """Mean of the slots `(N, L, H)` that are no padding: `(N, 1, H)`."""
    weight = known[..., None].to(slots.dtype)
    return (slots * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)

"""Codes of a network and its weights: what a generator that writes codes makes of them, as a whole or window by window.

Notation used for shapes: as in [`~models.modeling_weight_vqvae`].
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..weights.layout import LayoutMismatchError
from ..weights.lora import center_head
from ..weights.pieces import Pieces


class Codes:
    """Of a pipeline with a `vqvae`, a `weight_tokenizer` and an `encoder`."""

    @torch.no_grad()
    def encode_weights(
        self, state_dicts: Sequence[Mapping[str, Tensor]], labels: Sequence[str]
    ) -> tuple[Tensor, int, Tensor]:
        """
        Args:
            state_dicts: Networks of one layout that the generator knows, as it was trained on them.
            labels: Class names.

        Returns:
            What [`~Codes.decode_codes`] needs: their codes `(N, L, R)`, the layout, and the embeddings of class names.

        Raises:
            LayoutMismatchError: If a network has no known layout, or they have several.
        """
        vqvae, tokenizer = self.vqvae, self.weight_tokenizer
        encoded = tokenizer(state_dicts)
        layouts = encoded["layout_ids"].unique().tolist()
        if len(layouts) > 1:
            raise LayoutMismatchError(f"Networks of one layout are encoded together, got those of {layouts}.")
        if encoded["num_classes"].unique().tolist() not in ([0], [len(labels)]):
            raise LayoutMismatchError(
                f"`labels` names {len(labels)} classes, the networks have {encoded['num_classes'].unique().tolist()}."
            )
        class_embeds = self.encoder.embed(list(labels))[None]
        pieces, *described = self._described(layouts[0], class_embeds)
        described = (part.expand(len(state_dicts), -1, -1).to(vqvae.device) for part in described)
        tokens = pieces.cut(encoded["weight_tokens"]).to(vqvae.device, vqvae.dtype)
        everywhere = torch.ones_like(tokens[..., 0], dtype=torch.bool)
        values = vqvae.encode(tokens, *described, everywhere, pieces.places.to(vqvae.device))
        codes, *_ = vqvae.quantise(values.flatten(0, 1))
        return codes.unflatten(0, values.shape[:2]).cpu(), layouts[0], class_embeds

    @torch.no_grad()
    def decode_codes(
        self,
        codes: Tensor,
        layout: int,
        class_embeds: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> list[dict[str, Tensor]]:
        """
        Args:
            codes (`torch.LongTensor` of shape `(N, L, R)`); padding behind the network's own tokens is left out.
            layout: Of `weight_tokenizer`.
            class_embeds (`torch.FloatTensor` of shape `(1, C, E)`): Of the class names, or what the dataset encoder says of classes.
            generators: One per network, of which the noise comes that codes leave open. Default: the mean.

        Returns:
            `list[dict[str, torch.Tensor]]` of length N: state dicts.
        """
        vqvae, tokenizer, count = self.vqvae, self.weight_tokenizer, len(codes)
        pieces, *described = self._described(layout, class_embeds)
        described = (part.expand(count, -1, -1).to(vqvae.device) for part in described)
        codes, parts = codes[:, : len(pieces)].to(vqvae.device), pieces.of_class.expand(count, -1).to(vqvae.device)
        noise = None
        if generators is not None:  # drawn as a stream draws it
            drawn = [torch.cat(list(self._noise(len(pieces), own))) for own in generators[:count]]
            noise = torch.stack(drawn).to(vqvae.device, vqvae.dtype)
        told = codes[..., 0] >= 0, parts, pieces.places.to(vqvae.device), noise
        tokens = pieces.join(vqvae.decode(vqvae.embed_codes(codes), *described, *told))
        counts = torch.full((count,), self._class_tokens(layout, class_embeds))
        weights = tokenizer.decode(tokens.float().cpu(), torch.full((count,), layout), counts)
        return [center_head(state_dict, tokenizer.layouts[layout].head) for state_dict in weights]

    @torch.no_grad()
    def stream_codes(
        self, codes: Tensor, layout: int, class_embeds: Tensor, generator: torch.Generator | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """
        [`~Codes.decode_codes`] of one network, window by window: of its weights, and of what describes them, a window and a
        tensor are in memory.

        Args:
            codes (`torch.LongTensor` of shape `(L, R)`).

        Yields:
            Names and tensors, those of the head last.

        Raises:
            LayoutMismatchError: If the network has another number of tokens.
        """
        vqvae, size = self.vqvae, self.vqvae.config.window
        pieces, of_classes = self._pieces(layout, class_embeds), class_embeds.cpu().to(vqvae.dtype)
        if len(codes) != len(pieces):
            raise LayoutMismatchError(
                f"Layout {layout} with these classes has {len(pieces)} tokens, got codes of {len(codes)}."
            )

        drawn = None if generator is None else self._noise(len(pieces), generator)

        def windows() -> Iterator[Tensor]:
            for start in range(0, len(codes), size):
                part = slice(start, start + size)
                own = codes[part].to(vqvae.device)
                read = own[None, :, 0] >= 0, pieces.of_class[None, part], pieces.places[part]
                read = vqvae.embed_codes(own)[None], *pieces.described(of_classes, part), *read
                noise = None if drawn is None else next(drawn)[None].to(vqvae.device, vqvae.dtype)
                yield vqvae.decode(*(tensor.to(vqvae.device) for tensor in read), noise)[0].float().cpu()

        head = self.weight_tokenizer.layouts[layout].head
        of_head = {}
        classes = self._class_tokens(layout, class_embeds)
        for name, tensor in self.weight_tokenizer.decode_stream(pieces.join_stream(windows()), layout, classes):
            if name in head:
                of_head[name] = tensor
            else:
                yield name, tensor
        yield from center_head(of_head, head).items()

    def _noise(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Unit Gaussian of `count` pieces, window by window."""
        config = self.vqvae.config
        for start in range(0, count, config.window):
            yield torch.randn(min(config.window, count - start), config.token_size, generator=generator)

    def _described(self, layout: int, class_embeds: Tensor) -> tuple[Pieces, Tensor, Tensor]:
        """For class names `(n, C, E)` the network's pieces, what they are, `(n, L, D)`, and the names of their classes `(n, L, E)`."""
        pieces = self._pieces(layout, class_embeds)
        return pieces, *pieces.described(class_embeds.cpu().to(self.vqvae.dtype))

    def _pieces(self, layout: int, class_embeds: Tensor) -> Pieces:
        classes = self._class_tokens(layout, class_embeds)
        return Pieces(self.weight_tokenizer, layout, classes, self.vqvae.config.token_size)

    def _class_tokens(self, layout: int, class_embeds: Tensor) -> int:
        """A network whose head is too wide for class tokens has none."""
        return class_embeds.shape[1] if self.weight_tokenizer.layouts[layout].head else 0

"""Weight tokens cut further, for generators that write them piece by piece: one token holds a whole row of a head, which in a
zoo of small and of wide networks is far more than the other tensors of the small ones have.

Notation: L tokens of a network, S scalars per token, n pieces, s scalars per piece, B networks, D size of a description.
"""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .descriptors import describe_parts
from .layout import LayoutMismatchError
from .tokenization import WeightTokenizer


class Pieces:
    """
    The pieces of the tokens of one layout: of each token those that hold a scalar, in order.

    Args:
        num_classes: Class tokens of the network.
        size: s, of which S is a multiple.

    Attributes:
        token, part (`torch.LongTensor` of shape `(n,)`): Each piece's token, and which part of it.
        of_class (`torch.LongTensor` of shape `(n,)`): 1 + `part` on pieces of class tokens, 0 on others.
        places (`torch.LongTensor` of shape `(n,)`): Their numbers among the pieces of the bodies of all layouts of the tokenizer, see
            [`num_places`]; on those of classes, -1 less the layout's number.

    Raises:
        LayoutMismatchError: If tokens do not divide into pieces.
    """

    def __init__(self, tokenizer: WeightTokenizer, layout: int, num_classes: int, size: int):
        if tokenizer.token_size % size:
            raise LayoutMismatchError(f"Tokens of {tokenizer.token_size} scalars do not divide into pieces of {size}.")
        self.parts, self.size = tokenizer.token_size // size, size
        self.num_classes, self._described = num_classes, functools.partial(tokenizer.describe, layout, num_classes)
        counts = _counts(tokenizer, layout, num_classes, size)
        self.num_tokens, body = len(counts), len(counts) - num_classes
        self.token = torch.arange(len(counts)).repeat_interleave(counts)
        self.part = torch.arange(len(self.token)) - (counts.cumsum(0) - counts)[self.token]
        self.of_class = (1 + self.part) * (self.token >= body)
        first = sum(_counts(tokenizer, earlier, 0, size).sum() for earlier in range(layout))
        self.places = torch.where(self.token < body, first + torch.arange(len(self.token)), -1 - layout)

    def __len__(self) -> int:
        return len(self.token)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.parts, self.size))

    def describe(self, part: slice = slice(None)) -> Tensor:
        """What each piece is, or each of some of them, `(n, D)`: what its token is, and which part of it."""
        token = self.token[part]
        if part == slice(None):
            of_tokens = self._described()[token]
        else:
            of_tokens = self._described(slice(int(token[0]), int(token[-1]) + 1))[token - token[0]]
        return describe_parts(of_tokens, self.part[part], self.parts)

    def names(self, class_embeds: Tensor, part: slice = slice(None)) -> Tensor:
        """Of class names `(B, C, E)`, of which the first are those of class tokens, that of each piece: `(B, n, E)`, zeros in the body."""
        token = self.token[part] - (self.num_tokens - self.num_classes)
        names = class_embeds.new_zeros(len(class_embeds), len(token), class_embeds.shape[-1])
        names[:, token >= 0] = class_embeds[:, token[token >= 0]]
        return names

    def described(self, class_embeds: Tensor, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Both, `(B, n, D)` and `(B, n, E)`, in the dtype of names."""
        of_pieces = self.describe(part).to(class_embeds.dtype)
        return of_pieces.expand(len(class_embeds), -1, -1), self.names(class_embeds, part)

    def cut(self, tokens: Tensor) -> Tensor:
        """`(B, L, S)` to `(B, n, s)`."""
        return self._split(tokens)[:, self.token, self.part]

    def join(self, pieces: Tensor) -> Tensor:
        """Inverse of `cut`, with zeros where no piece is."""
        whole = pieces.new_zeros(len(pieces), self.num_tokens, self.parts, self.size)
        every = torch.arange(len(pieces))[:, None]
        return whole.index_put((every, self.token, self.part), pieces).flatten(2)

    def join_stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """Tokens `(m, S)` of one network, as soon as all their pieces have come, in windows `(m, s)` one after another."""
        done, waiting = 0, torch.zeros(0, self.size)
        for window in windows:
            waiting = torch.cat([waiting, window])
            end = done + len(waiting)
            complete = int(torch.searchsorted(self.token, self.token[end])) if end < len(self) else len(self)
            if complete > done:
                token = self.token[done:complete] - self.token[done]
                whole = waiting.new_zeros(int(token[-1]) + 1, self.parts, self.size)
                yield whole.index_put((token, self.part[done:complete]), waiting[: complete - done]).flatten(1)
                done, waiting = complete, waiting[complete - done :]


def num_places(tokenizer: WeightTokenizer, size: int) -> int:
    """Pieces that the bodies of all layouts have."""
    return int(sum(_counts(tokenizer, layout, 0, size).sum() for layout in range(len(tokenizer.layouts))))


def _counts(tokenizer: WeightTokenizer, layout: int, num_classes: int, size: int) -> Tensor:
    """How many pieces each token has."""
    return -(-tokenizer.filled(layout, num_classes) // size)

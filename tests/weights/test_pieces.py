"""Tokens cut into pieces: nothing is lost, nothing but scalars is kept, and a stream of pieces is the stream of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.weights.layout import LayoutMismatchError
from hf_weightgen.weights.pieces import Pieces
from hf_weightgen.weights.tokenization import WeightTokenizer
from tiny import random


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    width=st.integers(1, 11),
    classes=st.integers(1, 4),
    parts=st.sampled_from([1, 2, 3, 4, 6]),
    window=st.integers(1, 7),
)
def test_pieces_hold_all_scalars_and_come_back(shapes, width, classes, parts, window):
    draw = random(0)
    network = {f"body{i}": torch.randn(size, generator=draw) for i, size in enumerate(shapes)}
    network |= {
        "head.weight": torch.randn(classes, width, generator=draw),
        "head.bias": torch.randn(classes, generator=draw),
    }
    tokenizer = WeightTokenizer.fit([network, network], token_size=12, head=["head.weight", "head.bias"])
    encoded = tokenizer([network])
    pieces = Pieces(tokenizer, 0, classes, 12 // parts)
    cut, mask = pieces.cut(encoded["weight_tokens"]), pieces.cut(encoded["padding_mask"])
    assert cut.shape == (1, len(pieces), 12 // parts) and mask.any(-1).all()
    assert mask.sum() == sum(tensor.numel() for tensor in network.values())
    assert torch.equal(pieces.join(cut), encoded["weight_tokens"])
    assert torch.equal(torch.cat(list(pieces.join_stream(cut[0].split(window)))), encoded["weight_tokens"][0])
    names = torch.randn(2, classes + 1, 3, generator=draw)  # of more classes than this network has
    every, parts = pieces.described(names), [slice(k, k + window) for k in range(0, len(pieces), window)]
    for whole, told in zip(every, zip(*(pieces.described(names, part) for part in parts), strict=True), strict=True):
        assert whole.shape[:2] == (2, len(pieces)) and torch.equal(torch.cat(told, 1), whole)
    of_class = encoded["is_class"][0, pieces.token]
    assert (
        torch.equal(pieces.of_class > 0, of_class) and (pieces.of_class[of_class] == pieces.part[of_class] + 1).all()
    )
    assert len(pieces.describe().unique(dim=0)) >= len(
        pieces.of_class[of_class].unique()
    )  # parts of a class are told apart


def test_tokens_in_one_piece_are_themselves():
    network = {"body": torch.randn(7, generator=random(0)), "head": torch.randn(3, 4, generator=random(1))}
    tokenizer = WeightTokenizer.fit([network, network], token_size=4, head=["head"])
    pieces, tokens = Pieces(tokenizer, 0, 3, 4), tokenizer([network])["weight_tokens"]
    assert torch.equal(pieces.cut(tokens), tokens) and torch.equal(pieces.describe(), tokenizer.describe(0, 3))


def test_pieces_that_do_not_divide_tokens_are_refused():
    network = {"body": torch.ones(7), "head": torch.ones(3, 4)}
    tokenizer = WeightTokenizer.fit([network, network], token_size=4, head=["head"])
    with pytest.raises(LayoutMismatchError, match="Tokens of 4 scalars do not divide into pieces of 3"):
        Pieces(tokenizer, 0, 3, 3)

"""Rows of small zoos, shared by the tests of zoos and of their publication."""

import torch

from hf_weightgen.zoo.schema import make_row


def row_of(state_dict, id="sst2-s3-c2", **changes):
    fields = {
        "task": "sst2",
        "family": "film",
        "split": "train",
        "text": "sentiment on SST-2",
        "labels": ["negative", "positive"],
        "seed": 3,
        "checkpoint": 2,
        "epoch": 0.25,
        "arch": {"base_model": "org/base", "r": 4, "layers": [4, 5], "nested": {"b": None, "a": "é"}},
        "metrics": {"validation": 0.75, "test": 0.5},
        "provenance": {"versions": {"torch": "2"}},
    }
    return make_row(state_dict, id=id, **fields | changes)


def adapter(seed: int, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "z.lora_A.weight": torch.randn(4, 6, generator=generator).to(dtype),
        "a.lora_B.weight": torch.randn(6, 4, generator=generator).to(dtype),
    }


def rows_of(*ids, **changes):
    return [row_of(adapter(sum(map(ord, id))), id, **changes) for id in ids]


def mixed() -> dict:
    return {
        "z": torch.randn(3, 2),
        "half": torch.tensor([-0.0, 6e-8, 65504.0]).half(),
        "brain": torch.tensor([[3e38], [1e-40]]).bfloat16(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "steps": torch.arange(4),
        "mask": torch.tensor([True, False]),
        "wide": torch.tensor([1 / 3], dtype=torch.float64),
        "eight": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
        "transposed": torch.arange(6).view(2, 3).T,
    }


def assert_same(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs), "names in their order"
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        if tensor.numel():
            bits = [t.contiguous().flatten().view(torch.uint8) for t in (ours[name], tensor)]
            assert torch.equal(*bits), name

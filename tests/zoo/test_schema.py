"""Rows of a zoo: every bit of a checkpoint, and what a damaged row says."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.zoo.folder import ZooFolder, load_zoo, merge
from hf_weightgen.zoo.schema import (
    row_to_state_dict,
    rows_to_table,
    write_shard,
    zoo_state_dicts,
)
from rows import adapter, assert_same, mixed, row_of, rows_of


# ---- rows


def test_row_keeps_every_bit_name_and_order():
    state_dict = mixed()
    row = row_of(state_dict)
    assert row["weights"].dtype == np.float32
    assert row["weights"].size == 6 + 3 + 2 + 1
    assert_same(row_to_state_dict(row), state_dict)


def test_row_keeps_every_bit_through_parquet(tmp_path):
    state_dicts = [mixed() for _ in range(3)]
    ZooFolder(tmp_path).add("x", [row_of(s, f"r{i}") for i, s in enumerate(state_dicts)])
    zoo = load_zoo(tmp_path)
    for read in ([row_to_state_dict(row) for row in zoo], list(zoo_state_dicts(zoo))):
        for ours, theirs in zip(read, state_dicts, strict=True):
            assert_same(ours, theirs)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "float16", "bfloat16", "int64", "uint8", "bool", "float64"]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=5,
    ),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_any_state_dict_round_trips(tmp_path_factory, specs, seed):
    generator = torch.Generator().manual_seed(seed)
    state_dict = {
        f"t{i}": (torch.randn(shape, generator=generator) * 3).to(getattr(torch, dtype))
        for i, (dtype, shape) in enumerate(specs)
    }
    file = write_shard(tmp_path_factory.mktemp("zoo") / "x.parquet", [row_of(state_dict)])
    assert_same(next(zoo_state_dicts(Dataset(pq.read_table(file)))), state_dict)


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_a_row_of_any_format_becomes_a_state_dict(tmp_path, form):
    state_dict = adapter(0) | {"b": torch.randn(3).bfloat16()}
    zoo = Dataset(rows_to_table([row_of(state_dict)])).with_format(form)
    assert_same(row_to_state_dict(zoo[0]), state_dict)


def test_tensors_of_a_row_can_be_changed_by_themselves():
    row = row_of(adapter(0))
    first = row_to_state_dict(row)
    first["z.lora_A.weight"].zero_()
    assert_same(row_to_state_dict(row), adapter(0))
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in first.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_make_row_refuses_nan_and_names_it(dtype):
    state_dict = adapter(0) | {"bad": torch.tensor([0.0, float("nan")]).to(dtype)}
    with pytest.raises(ValueError, match=r"'sst2-s3-c2'.*'bad'.*NaN or infinite.*leave this checkpoint out"):
        row_of(state_dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, r"'x': `split` must be one of .*'held_out'.* got 'test'"),
        ({"labels": "yes"}, "'x': `labels` is a sequence"),
        ({"metrics": {"f1": 0.5}}, r"'x': `metrics` has \['f1'\].*`provenance`"),
        ({"arch": {"dtype": torch.float32}}, "'x': `arch` cannot be JSON"),
        ({"provenance": {"loss": float("nan")}}, "'x': `provenance` cannot be JSON"),
    ],
)
def test_make_row_names_the_field_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        row_of(adapter(0), "x", **changes)
    with pytest.raises(ValueError, match="non-empty string, got ''"):
        row_of(adapter(0), "")


def test_what_was_not_measured_is_null():
    row = row_of(adapter(0), metrics={"test": float("nan")}, seed=None)
    assert row["metrics"] == {"validation": None, "test": None}
    assert Dataset(rows_to_table([row]))[0]["seed"] is None


@pytest.mark.parametrize("position", [23, 24])
def test_stored_nan_names_row_and_tensor(tmp_path, position):
    rows = rows_of("a", "b", "c")
    rows[1]["weights"][position] = float("inf" if position == 23 else "nan")
    name = ["z.lora_A.weight", "a.lora_B.weight"][position // 24]
    message = rf"'b': tensor '{name}' holds NaN or infinite.*drop it from the zoo"
    with pytest.raises(ValueError, match=message):
        row_to_state_dict(rows[1])
    ZooFolder(tmp_path / "zoo").add("x", rows)
    with pytest.raises(ValueError, match=message):
        list(zoo_state_dicts(load_zoo(tmp_path / "zoo")))
    for half in (True, False):
        with pytest.raises(ValueError, match=message):
            merge(tmp_path / "zoo", tmp_path / "out", half=half)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_damaged_rows_name_what_contradicts():
    row = row_of(mixed())
    with pytest.raises(ValueError, match=r"'sst2-s3-c2': `weights` has 11 scalars, .* ask for 12"):
        row_to_state_dict(row | {"weights": row["weights"][:-1]})
    with pytest.raises(ValueError, match="`extra` is no safetensors"):
        row_to_state_dict(row | {"extra": row["extra"][:-1]})
    with pytest.raises(ValueError, match=r"tensor 'steps' should be int64 \(4,\), `extra` has no such tensor"):
        row_to_state_dict(row | {"extra": None})


# ---- shards


def test_state_dicts_come_in_the_order_asked_for(tmp_path):
    ids = [f"r{i:03d}" for i in range(150)]
    ZooFolder(tmp_path).add("x", rows_of(*ids))
    zoo = load_zoo(tmp_path)
    assert len(list(zoo_state_dicts(zoo))) == 150
    part = zoo.filter(lambda id: id > "r100", input_columns="id")
    for ours, i in zip(zoo_state_dicts(part, [40, 0, 7]), [141, 101, 108], strict=True):
        assert_same(ours, adapter(sum(map(ord, f"r{i:03d}"))))
    with pytest.raises(IndexError):
        list(zoo_state_dicts(zoo, [150]))


# ---- publication

"""Rows and shards of a zoo: real Parquet files on disk, written, killed, damaged, merged and loaded."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.zoo.parquet import write_tables
from hf_weightgen.zoo.schema import (
    FEATURES,
    HALF_FEATURES,
    ZooFolder,
    load_zoo,
    make_row,
    merge,
    row_to_state_dict,
    rows_to_table,
    write_shard,
    zoo_state_dicts,
)


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


def test_datasets_reads_the_folder_with_the_right_features(tmp_path):
    folder = ZooFolder(tmp_path)
    folder.add("sst2-s3", rows_of("a", "b"))
    folder.add("trec-s0", rows_of("c", task="trec", split="held_out"))
    (tmp_path / "zoo_config.json").write_text("{}")
    loaded = load_dataset(str(tmp_path))
    assert list(loaded) == ["train"]
    assert loaded["train"].features == FEATURES
    assert loaded["train"]["id"][:] == ["a", "b", "c"]
    assert loaded["train"][0]["arch"]["nested"] == {"b": None, "a": "é"}
    streamed = list(load_zoo(tmp_path, streaming=True))
    assert [row["split"] for row in streamed] == ["train", "train", "held_out"]
    assert_same(row_to_state_dict(streamed[2]), adapter(ord("c")))


def test_names_of_groups_cannot_become_splits_or_paths(tmp_path):
    folder = ZooFolder(tmp_path)
    for number, name in enumerate(["my-test", "dev", "eval_s0", "../up", "a/b", "training", "latest"]):
        assert folder.add(name, rows_of(str(number))).parent == tmp_path / "data"
    assert {split: len(rows) for split, rows in load_dataset(str(tmp_path)).items()} == {"train": 7}
    with pytest.raises(ValueError, match="must not be empty"):
        folder.add("", rows_of("x"))


def test_finished_knows_complete_shards_only(tmp_path):
    folder = ZooFolder(tmp_path)
    assert folder.finished() == set()
    shard = folder.add("sst2-s3", rows_of("a", "b"))
    shard.with_name(f".{shard.name}.4711.tmp").write_bytes(shard.read_bytes()[:100])
    assert folder.finished() == {"a", "b"}
    assert load_zoo(tmp_path)["id"][:] == ["a", "b"]


def test_a_kill_while_writing_leaves_no_shard(tmp_path):
    folder = ZooFolder(tmp_path)
    folder.add("first", rows_of("a"))
    script = f"""
        import os, signal
        from hf_weightgen.zoo.schema import make_row, write_shard
        import torch

        def rows():
            for i in range(1000):
                if i == 200:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield make_row({{"w": torch.ones(500)}}, id=str(i), task="", family="", split="train", text="",
                               labels=[], seed=0, checkpoint=0, epoch=0, arch={{}}, metrics={{}}, provenance={{}})

        write_shard({str(tmp_path / "data" / "train-second.parquet")!r}, rows())
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "data").iterdir())) == 2, "the half-written file is there"
    assert folder.finished() == set(load_dataset(str(tmp_path), split="train")["id"]) == {"a"}
    folder.add("second", rows_of("b"))
    assert folder.finished() == {"a", "b"}


def test_an_error_while_writing_leaves_nothing_behind(tmp_path):
    def rows():
        yield from rows_of("a")
        raise RuntimeError("training failed")

    with pytest.raises(RuntimeError, match="training failed"):
        write_shard(tmp_path / "data" / "train-x.parquet", rows())
    with pytest.raises(ValueError, match="no row to write"):
        ZooFolder(tmp_path).add("x", [])
    with pytest.raises(ValueError, match="Two rows have the id 'a'"):
        ZooFolder(tmp_path).add("x", rows_of("a", "a"))
    assert list((tmp_path / "data").iterdir()) == []


def test_damaged_shards_are_named_with_the_remedy(tmp_path):
    folder = ZooFolder(tmp_path)
    folder.add("good", rows_of("a"))
    shard = folder.add("bad", rows_of("b"))
    whole = shard.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not parquet" * 50):
        shard.write_bytes(damaged)
        for read in (folder.finished, lambda: load_zoo(tmp_path), lambda: merge(tmp_path, tmp_path / "out")):
            with pytest.raises(ValueError, match=r"train-bad\.parquet is damaged .*Delete it"):
                read()
    shard.unlink()
    assert folder.finished() == {"a"}


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    folder = ZooFolder(tmp_path)
    shard = folder.add("x", [row_of({"w": torch.randn(4_000)})])
    group = pq.read_metadata(shard).row_group(0)
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith("weights"))
    assert chunk.total_compressed_size > 4_000
    content = bytearray(shard.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    shard.write_bytes(content)
    for read in (lambda: folder.row("sst2-s3-c2"), lambda: merge(tmp_path, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"train-x\.parquet is damaged"):
            read()


def test_adding_a_group_again_replaces_its_rows_and_keeps_the_others(tmp_path):
    folder = ZooFolder(tmp_path)
    folder.add("x", rows_of("a", "b", text="old"))
    assert load_zoo(tmp_path)["text"][:] == ["old", "old"]
    folder.add("x", rows_of("b", "c", text="new"))
    assert {row["id"]: row["text"] for row in load_zoo(tmp_path)} == {"a": "old", "b": "new", "c": "new"}
    assert_same(row_to_state_dict(folder.row("a")), adapter(ord("a")))
    with pytest.raises(ValueError, match=r"'a' of group 'y' stands in .*train-x\.parquet"):
        folder.add("y", rows_of("a"))
    with pytest.raises(KeyError, match="no row 'z'"):
        folder.row("z")


def test_one_id_in_two_shards_is_refused(tmp_path):
    for name in "xy":
        write_shard(tmp_path / "data" / f"train-{name}.parquet", rows_of("a"))
    with pytest.raises(ValueError, match=r"'a' stands in .*train-x.*and in .*train-y.*delete one"):
        ZooFolder(tmp_path).finished()


def test_load_zoo_says_what_is_no_zoo(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no shard"):
        load_zoo(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder and no file"):
        load_zoo(tmp_path / "absent")
    foreign = rows_to_table(rows_of("a")).select(["id", "text"])
    file = write_tables(tmp_path / "data" / "train-x.parquet", [foreign], foreign.schema)
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match="no zoo: it has no column 'task'"):
            load_zoo(path)


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


def test_merge_is_sorted_half_as_large_and_the_same_bytes_in_any_order(tmp_path):
    ids = [f"r{i:03d}" for i in range(100)]
    for zoo, order, cut in (("one", ids, 30), ("two", ids[::-1], 55)):
        ZooFolder(tmp_path / zoo).add("x", rows_of(*order[:cut]))
        ZooFolder(tmp_path / zoo).add("y", rows_of(*order[cut:]))
    [first] = merge(tmp_path / "one", tmp_path / "a.parquet")
    [second] = merge(tmp_path / "two", tmp_path / "b")
    assert second == tmp_path / "b" / "data" / "train-00000-of-00001.parquet"
    assert first.read_bytes() == second.read_bytes()
    for path in (first, tmp_path / "b"):
        published = load_zoo(path)
        assert published.features == HALF_FEATURES
        assert published["id"][:] == ids
    for id, ours in zip(ids, zoo_state_dicts(published), strict=True):
        assert_same(ours, {k: v.half().float() for k, v in adapter(sum(map(ord, id))).items()})


def test_merge_in_full_precision_keeps_every_bit(tmp_path):
    ZooFolder(tmp_path / "zoo").add("x", [row_of(mixed(), "b"), *rows_of("a")])
    files = merge(tmp_path / "zoo", tmp_path / "out", half=False, num_shards=2)
    assert [file.name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    zoo = load_zoo(tmp_path / "out")
    assert zoo.features == FEATURES
    assert_same(next(zoo_state_dicts(zoo)), adapter(ord("a")))
    assert_same(row_to_state_dict(zoo[1]), row_to_state_dict(ZooFolder(tmp_path / "zoo").row("b")))


def test_a_published_zoo_can_be_merged_again(tmp_path):
    ZooFolder(tmp_path / "zoo").add("x", rows_of("a", "b"))
    merge(tmp_path / "zoo", tmp_path / "half")
    [again] = merge(tmp_path / "half", tmp_path / "again.parquet")
    assert again.read_bytes() == (tmp_path / "half" / "data" / "train-00000-of-00001.parquet").read_bytes()
    [full] = merge(tmp_path / "half", tmp_path / "full.parquet", half=False)
    assert load_zoo(full).features == FEATURES


def test_merge_leaves_rows_out_by_their_ids(tmp_path):
    ZooFolder(tmp_path / "zoo").add("x", rows_of("a-s0-c0", "a-s0-c1", "base"))
    merge(tmp_path / "zoo", tmp_path / "out", leave_out=["-c0"])
    assert load_zoo(tmp_path / "out")["id"][:] == ["a-s0-c1", "base"]


def test_half_refuses_what_float16_cannot_hold(tmp_path):
    rows = [*rows_of("a"), row_of({"small": torch.ones(2), "large": torch.tensor([1.0, -70_000.0])}, "b")]
    ZooFolder(tmp_path / "zoo").add("x", rows)
    message = r"'b': tensor 'large' .*`half=False`"
    with pytest.raises(ValueError, match=message):
        merge(tmp_path / "zoo", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "x.parquet", rows, half=True)
    assert not (tmp_path / "x.parquet").exists()


def test_merge_refuses_a_place_where_rows_would_be_read_twice(tmp_path):
    ZooFolder(tmp_path / "zoo").add("x", rows_of("a", "b"))
    for out in (tmp_path / "zoo", tmp_path / "zoo" / "data" / "all.parquet"):
        with pytest.raises(ValueError, match=r"train-x\.parquet would be read together"):
            merge(tmp_path / "zoo", out)
    with pytest.raises(ValueError, match="`num_shards` must be 1 to 2 for 2 rows"):
        merge(tmp_path / "zoo", tmp_path / "out", num_shards=3)

"""Shards of a zoo: real Parquet files on disk, written, killed, damaged, merged and loaded."""

import os
import signal
import subprocess
import sys
import textwrap

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from hf_weightgen.zoo.folder import ZooFolder, load_zoo, merge
from hf_weightgen.zoo.parquet import write_tables
from hf_weightgen.zoo.schema import (
    FEATURES,
    HALF_FEATURES,
    row_to_state_dict,
    rows_to_table,
    write_shard,
    zoo_state_dicts,
)
from rows import adapter, assert_same, mixed, row_of, rows_of


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

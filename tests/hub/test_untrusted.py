"""Files of strangers: what is refused, and that nothing else than a refusal ever comes out."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from hf_weightgen.hub.untrusted import UntrustedFileError, check_folder, check_names, read_header, read_json


def header(told, data: bytes = b"", length: int | None = None) -> bytes:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text('{"a": [1, {"b": "c"}]}')
    save_file({"x": torch.zeros(3)}, folder / "vae" / "model.safetensors")
    return folder


# ---- names and links


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "~/x", "a\\..\\x", "C:/x", "a\0b", "", " x", "vae/../x", "//x"]
)
def test_names_that_lead_elsewhere(name):
    with pytest.raises(UntrustedFileError, match="acme/x holds the file name"):
        check_names([name], "acme/x")


@pytest.mark.parametrize("name", ["a.bin", "b/c.PT", "x.ckpt", "y.joblib", "z.npz", "w.pickle", "v.h5"])
def test_names_of_what_runs_code(name):
    with pytest.raises(UntrustedFileError, match="a pickle or another format"):
        check_names([name], "acme/x")


def test_usual_names_pass():
    check_names(["README.md", "vae/config.json", "a-b_c.d/e f.safetensors", ".gitattributes", "…/ü.json"], "acme/x")


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside.json", "/"])
def test_links_that_lead_out_are_refused(folder, target):
    (folder.parent / "outside.json").write_text("{}")
    (folder / "vae" / "link.json").symlink_to(target)
    with pytest.raises(UntrustedFileError, match="link.json' is a link that leads out"):
        check_folder(folder)


def test_a_linked_folder_is_refused(folder, tmp_path):
    (folder / "unet").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UntrustedFileError, match="unet' is a link that leads out"):
        check_folder(folder)


def test_links_of_the_cache_pass(folder, tmp_path):
    """A snapshot of huggingface_hub is made of links to the blobs of its repository."""
    repo = tmp_path / "models--acme--x"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "1").write_text("{}")
    (repo / "snapshots" / "a").mkdir(parents=True)
    (repo / "snapshots" / "a" / "config.json").symlink_to("../../blobs/1")
    check_folder(repo / "snapshots" / "a")
    (repo / "snapshots" / "a" / "other.json").symlink_to(folder / "vae" / "config.json")
    with pytest.raises(UntrustedFileError, match="leads out"):
        check_folder(repo / "snapshots" / "a")


# ---- JSON


@pytest.mark.parametrize("depth", [100, 10_000, 1_000_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_refused(tmp_path, depth, opening, closing):
    (tmp_path / "config.json").write_text(opening * depth + "1" + closing * depth)
    with pytest.raises(UntrustedFileError, match="nested"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"a": 1,}', b"1 2", b"[" * 10_000])
def test_what_is_no_json_is_refused(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(UntrustedFileError, match="is no JSON"):
        read_json(tmp_path / "config.json")


def test_huge_json_is_refused_unread(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**12)  # a hole: it takes no space
    with pytest.raises(UntrustedFileError, match="1,000,000,000,000 bytes"):
        read_json(tmp_path / "config.json")


# ---- safetensors


LIES = {
    "empty": b"",
    "header longer than the file": header({}, length=10**15),
    "negative header": struct.pack("<q", -1),
    "no JSON": header(b"{]"),
    "deep": header(b"[" * 100_000),
    "no object": header([1]),
    "no entry": header({"x": 1}),
    "unknown dtype": header({"x": entry([1], 0, 4, "PICKLE")}, b"0000"),
    "a shape of a terabyte": header({"x": entry([10**12], 0, 4)}, b"0000"),
    "an overflowing shape": header({"x": entry([2**40, 2**40], 0, 0)}),
    "a negative shape": header({"x": entry([-1, -1], 0, 4)}, b"0000"),
    "a shape of text": header({"x": entry(["4"], 0, 16)}, b"0" * 16),
    "a shape of truths": header({"x": entry([True], 0, 4)}, b"0000"),
    "beyond the end": header({"x": entry([4], 0, 16)}, b"0000"),
    "backwards": header({"x": entry([0], 4, 0)}, b"0000"),
    "overlapping": header({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, b"0000"),
    "a gap": header({"x": entry([1], 4, 8)}, b"0" * 8),
    "a tail": header({"x": entry([1], 0, 4)}, b"0" * 8),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path, lie):
    (tmp_path / "model.safetensors").write_bytes(LIES[lie])
    with pytest.raises(UntrustedFileError, match="truncated or no safetensors file"):
        read_header(tmp_path / "model.safetensors")


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=4,
    )
)
def test_whole_files_tell_what_is_in_them(tmp_path_factory, told):
    file = tmp_path_factory.mktemp("whole") / "model.safetensors"
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in told.items()}
    save_file(tensors, file)
    assert read_header(file) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


WHOLE = save({"x": torch.arange(6.0).view(2, 3), "ü": torch.ones(2, dtype=torch.int64)}, metadata={"format": "pt"})


@settings(max_examples=2_000, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(max_size=3)), max_size=3), st.integers(-40, 40))
def test_damaged_safetensors_are_refused_or_whole(tmp_path_factory, edits, longer):
    """What we let pass can be loaded, with the same names and shapes."""
    data = bytearray(WHOLE)
    for at, new in edits:
        data[at : at + len(new)] = new
    data = bytes(data[:longer]) if longer < 0 else bytes(data) + b"\0" * longer
    file = tmp_path_factory.getbasetemp() / f"damaged-{os.getpid()}.safetensors"
    file.write_bytes(data)
    try:
        told = read_header(file)
    except UntrustedFileError:
        return
    assert told == {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=2_000, deadline=None)
@given(JSON | st.dictionaries(st.sampled_from(["x", "__metadata__"]), JSON), st.binary(max_size=12))
def test_any_header_is_refused_or_read(tmp_path_factory, told, data):
    file = tmp_path_factory.getbasetemp() / f"any-{os.getpid()}.safetensors"
    file.write_bytes(header(told, data))
    try:
        assert isinstance(read_header(file), dict)
    except UntrustedFileError:
        pass


@settings(max_examples=1_000, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_json_is_refused_or_read(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / f"any-{os.getpid()}.json"
    file.write_bytes(data)
    try:
        read = read_json(file)
    except UntrustedFileError:
        return
    assert repr(read) == repr(json.loads(data)), "not equal: NaN is not"


@settings(max_examples=1_000, deadline=None)
@given(st.text(max_size=12))
def test_a_name_that_passes_stays_inside(name):
    try:
        check_names([name], "acme/x")
    except UntrustedFileError:
        return
    assert os.path.normpath(os.path.join("/inside", name)).startswith("/inside/") or name in (".", "./")

import json
import math
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.weights import Layout, LayoutMismatchError, WeightTokenizer


quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)
HEAD = ["classifier.weight", "classifier.bias"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
NARROW = {torch.float16: torch.int16, torch.bfloat16: torch.int16}  # dtype -> the integers its bits can be read as
NARROW |= {torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
BESIDE = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64]


def draw_tensor(shape, dtype, generator, spread=1.0, offset=0.0):
    if dtype == torch.bool or not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
    return (offset + spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@st.composite
def zoos(draw, max_layouts=3):
    """Checkpoints of several layouts, mixed: shapes with scalars and empties, all dtypes, heads of 0 to 5 classes."""
    names = ["z", "a.weight", "m.0", "b", "steps"]
    layouts = []
    for k in range(draw(st.integers(1, max_layouts))):
        tensors = [(f"kind{k}", (2,), torch.float32)]  # no two layouts alike
        for name in draw(st.permutations(names))[: draw(st.integers(0, len(names)))]:
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
            tensors.append((name, shape, draw(st.sampled_from(FLOATS + BESIDE))))
        if draw(st.booleans()):
            dtype = draw(st.sampled_from(FLOATS))
            tensors[1:1] = [("classifier.weight", (-1, 4), dtype), ("classifier.bias", (-1,), dtype)]
        layouts.append(tensors)
    generator = torch.Generator().manual_seed(draw(seeds))
    spread, offset = 10.0 ** draw(st.integers(-6, 2)), draw(st.sampled_from([0.0, 1.0, -30.0]))
    zoo = []
    for k in draw(st.lists(st.integers(0, len(layouts) - 1), min_size=1, max_size=6)):
        classes = draw(st.integers(0, 5))
        zoo.append(
            {
                name: draw_tensor(
                    [classes if size == -1 else size for size in shape], dtype, generator, spread, offset
                )
                for name, shape, dtype in layouts[k]
            }
        )
    present = {name for state_dict in zoo for name in state_dict}
    return zoo, [name for name in HEAD if name in present]


def decode(tokenizer, features):
    return tokenizer.decode(
        features["weight_tokens"], features["layout_ids"], features["num_classes"], features["passthrough"]
    )


def role_std(zoo, tokenizer, layout_id, layout_ids, name):
    values = [zoo[b][name].double().flatten() for b, k in enumerate(layout_ids.tolist()) if k == layout_id]
    return torch.cat(values).std(correction=0).item()


def assert_round_trip(zoo, tokenizer, features):
    for b, (before, after) in enumerate(zip(zoo, decode(tokenizer, features), strict=True)):
        layout_id = features["layout_ids"][b].item()
        assert set(after) == set(before)
        assert list(after) == [spec.name for spec in tokenizer.layouts[layout_id].tensors]
        for name, value in before.items():
            assert after[name].dtype == value.dtype
            assert after[name].shape == value.shape
            if not value.numel():
                continue
            if value.dtype in BESIDE:
                assert torch.equal(after[name], value)
            elif value.dtype in NARROW:
                assert torch.equal(after[name].view(NARROW[value.dtype]), value.view(NARROW[value.dtype]))
            else:
                std = role_std(zoo, tokenizer, layout_id, features["layout_ids"], name)
                assert (after[name].double() - value.double()).abs().max() <= 1e-6 * std


@quick
@given(zoos(), st.integers(5, 9))
def test_the_round_trip_and_the_masks(zoo_and_head, token_size):
    zoo, head = zoo_and_head
    tokenizer = WeightTokenizer.fit(iter(zoo), token_size, head)
    features = tokenizer(zoo)
    assert_round_trip(zoo, tokenizer, features)

    tokens, mask, ids = features["weight_tokens"], features["padding_mask"], features["token_ids"]
    assert tokens.dtype == torch.float32
    assert tokens.shape == mask.shape == (*ids.shape, token_size)
    assert not tokens[~mask].any()
    assert torch.equal(ids == -1, ~(mask.any(-1)))
    for b, (k, count) in enumerate(
        zip(features["layout_ids"].tolist(), features["num_classes"].tolist(), strict=True)
    ):
        num_body = tokenizer.num_body_tokens(k)
        first = sum(tokenizer.num_body_tokens(j) + bool(tokenizer.layouts[j].head) for j in range(k))
        expected = [first + i for i in range(num_body)] + [first + num_body] * count
        assert ids[b, : len(expected)].tolist() == expected
        assert (ids[b, len(expected) :] == -1).all()
        assert features["is_class"][b].nonzero().flatten().tolist() == list(range(num_body, num_body + count))
        if tokenizer.layouts[k].head:
            assert tokenizer.class_token_id(k) == first + num_body
    assert ids.max() < tokenizer.num_token_ids

    template = tokenizer.template(features["layout_ids"], features["num_classes"])
    assert all(torch.equal(template[key], features[key]) for key in template)


@quick
@given(zoos(max_layouts=2))
def test_a_batch_gives_each_checkpoint_its_own_tokens(zoo_and_head):
    zoo, head = zoo_and_head
    tokenizer = WeightTokenizer.fit(zoo, 6, head)
    together = tokenizer(zoo)
    for b, state_dict in enumerate(zoo):
        alone = tokenizer([state_dict])
        length = alone["weight_tokens"].shape[1]
        for key in ("weight_tokens", "padding_mask", "token_ids", "is_class"):
            assert torch.equal(together[key][b, :length], alone[key][0])


@quick
@given(zoos(), st.integers(5, 9))
def test_a_saved_tokenizer_gives_the_same_tokens(zoo_and_head, token_size):
    zoo, head = zoo_and_head
    tokenizer = WeightTokenizer.fit(zoo, token_size, head)
    config = json.loads(json.dumps(json.loads(tokenizer.to_json_string()), sort_keys=True))
    loaded = WeightTokenizer.from_dict(config)
    assert loaded.to_dict() == tokenizer.to_dict()
    assert torch.equal(loaded(zoo)["weight_tokens"], tokenizer(zoo)["weight_tokens"])
    assert_round_trip(zoo, loaded, tokenizer(zoo))


def test_save_pretrained_and_from_pretrained(tmp_path):
    zoo = [adapter(2, 0), adapter(5, 1)]
    tokenizer = WeightTokenizer.fit(zoo, 40, HEAD)
    tokenizer.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    loaded = WeightTokenizer.from_pretrained(tmp_path)
    assert loaded.layouts == tokenizer.layouts
    assert torch.equal(loaded(zoo)["weight_tokens"], tokenizer(zoo)["weight_tokens"])


def all_values(dtype):
    """Every finite number of a 16-bit dtype: subnormals, both zeros and the largest."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
def test_every_half_precision_number_survives(dtype, scale):
    values = all_values(dtype)
    values = values[values.float().abs() < 1e30]  # a scale far below 1 takes larger ones out of float32
    usual = {"w": (scale * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))).to(dtype)}
    tokenizer = WeightTokenizer.fit([usual], 1000)
    zoo = [usual, {"w": values}]
    assert_round_trip(zoo, tokenizer, tokenizer(zoo))
    zoo = [{"w": all_values(dtype)}]
    tokenizer = WeightTokenizer.fit(zoo, 1000)
    assert_round_trip(zoo, tokenizer, tokenizer(zoo))
    entry = tokenizer.to_dict()["layouts"][0][0]
    assert entry["mean"] == 0.0
    assert math.log2(entry["std"]).is_integer()
    assert math.log2(entry["std"]) <= 16


@quick
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
        min_size=1,
        max_size=400,
    ),
    st.integers(0, 600),
)
def test_float32_with_any_outliers(values, zeros):
    zoo = [{"w": torch.tensor(values + [0.0] * zeros)}]
    tokenizer = WeightTokenizer.fit(zoo, 7)
    assert_round_trip(zoo, tokenizer, tokenizer(zoo))


@pytest.mark.parametrize("offset", [0.0, 1.0, -1e4])
def test_a_float32_tensor_with_a_lone_outlier(offset):
    values = offset + 1e-3 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    values[17] = 0.3
    zoo = [{"w": values}]
    tokenizer = WeightTokenizer.fit(zoo, 64)
    assert_round_trip(zoo, tokenizer, tokenizer(zoo))


@quick
@given(st.integers(1, 6), seeds, st.sampled_from([0.0, 1e4]))
def test_streamed_statistics_are_those_of_the_whole_zoo(size, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    zoo = []
    for _ in range(size):
        classes = int(torch.randint(1, 9, (), generator=generator))
        zoo.append(
            {
                "w": draw_tensor((5, 7), torch.float64, generator, 1e-2, offset),
                "classifier.weight": draw_tensor((classes, 3), torch.float32, generator, 3.0, 1.0),
                "classifier.bias": draw_tensor((classes,), torch.float32, generator, 0.1),
            }
        )
    tokenizer = WeightTokenizer.fit(iter(zoo), 8, HEAD)
    for entry in tokenizer.to_dict()["layouts"][0]:
        values = torch.cat([state_dict[entry["name"]].double().flatten() for state_dict in zoo])
        if values.numel() > 1:
            assert entry["mean"] == pytest.approx(values.mean().item(), rel=1e-12, abs=1e-12)
            assert entry["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-6)
    tokens = tokenizer(zoo)
    body = tokens["weight_tokens"][tokens["padding_mask"] & ~tokens["is_class"][..., None]]
    assert body.mean().abs() < 1e-4
    assert (body.std(correction=0) - 1).abs() < 1e-4


def test_fit_holds_one_checkpoint_at_a_time():
    made, most_alive = [], 0

    def stream():
        nonlocal most_alive
        for seed in range(5):
            state_dict = adapter(3, seed)
            made.append(weakref.ref(state_dict["a"]))
            most_alive = max(most_alive, sum(tensor() is not None for tensor in made))
            yield state_dict
            del state_dict

    WeightTokenizer.fit(stream(), 40, HEAD)
    assert len(made) == 5
    assert most_alive <= 2  # the next one is made while the last is still named


def test_a_tensor_that_never_varies_keeps_its_scale():
    zoo = [{"w": torch.full((3, 3), 0.1), "n": torch.tensor(2.5, dtype=torch.float64)}] * 3
    tokenizer = WeightTokenizer.fit(zoo, 4)
    assert [entry["std"] for entry in tokenizer.to_dict()["layouts"][0]] == [1.0, 1.0]
    features = tokenizer(zoo)
    assert not features["weight_tokens"].any()
    assert all(torch.equal(after["w"], zoo[0]["w"]) for after in decode(tokenizer, features))


def test_the_order_of_the_first_checkpoint_holds():
    forth = adapter(2, 0)
    back = dict(reversed(adapter(3, 1).items()))
    tokenizer = WeightTokenizer.fit([forth, back], 13, HEAD)
    assert len(tokenizer.layouts) == 1
    assert [list(state_dict) for state_dict in decode(tokenizer, tokenizer([back, forth]))] == [list(forth)] * 2
    assert_round_trip([back, forth], tokenizer, tokenizer([back, forth]))


def test_a_class_token_holds_the_rows_of_the_head():
    state_dict = adapter(3, 0)
    layout = Layout.of(state_dict, HEAD)
    tokenizer = WeightTokenizer(13, [layout])  # not standardised
    features = tokenizer([state_dict])
    classes = features["weight_tokens"][features["is_class"]]
    assert classes.shape == (3, 13)
    assert torch.equal(classes[:, :12], state_dict["classifier.weight"])
    assert torch.equal(classes[:, 12], state_dict["classifier.bias"])
    assert features["padding_mask"][features["is_class"]].all()
    # The classes of a decoded checkpoint may be chosen anew.
    swapped = features["weight_tokens"][:, [*range(features["weight_tokens"].shape[1] - 3), -1, -2]]
    (decoded,) = tokenizer.decode(swapped, num_classes=[2])
    assert torch.equal(decoded["classifier.weight"], state_dict["classifier.weight"][[2, 1]])


def test_tokens_on_padding_are_dropped_and_gradients_pass():
    zoo = [adapter(2, 0), adapter(5, 1)]
    tokenizer = WeightTokenizer.fit(zoo, 40, HEAD)
    features = tokenizer(zoo)
    mask = features["padding_mask"]
    noisy = torch.where(mask, features["weight_tokens"], torch.nan).requires_grad_()
    decoded = tokenizer.decode(noisy, features["layout_ids"], features["num_classes"])
    sum(value.sum() for state_dict in decoded for value in state_dict.values()).backward()
    assert torch.equal(noisy.grad != 0, mask)
    assert decoded[0]["a"].untyped_storage().nbytes() == 4 * decoded[0]["a"].numel()


def test_it_is_fast_enough_for_a_zoo():
    generator = torch.Generator().manual_seed(0)
    names = [f"layer.{i}.lora_{factor}.weight" for i in range(12) for factor in "AB"]
    adapter = {name: torch.randn(4, 384, generator=generator) for name in names}
    adapter |= {"classifier.weight": torch.randn(2, 384), "classifier.bias": torch.randn(2)}
    zoo = [adapter] * 300
    tokenizer = WeightTokenizer.fit(zoo[:2], 385, HEAD)
    start = time.process_time()
    tokenizer(zoo)
    assert time.process_time() - start < 5  # well under 1 s on a free core


def adapter(num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "b": torch.randn(4, 12, generator=generator),
        "a": torch.randn(10, 4, generator=generator),
        "classifier.weight": torch.randn(num_classes, 12, generator=generator),
        "classifier.bias": torch.randn(num_classes, generator=generator),
    }


def test_what_fit_refuses():
    with pytest.raises(ValueError, match="`state_dicts` is empty"):
        WeightTokenizer.fit([], 8)
    with pytest.raises(ValueError, match=r"13 scalars, .* one token of 12; use `token_size=13` or more"):
        WeightTokenizer.fit([adapter(2, 0)], 12, HEAD)
    with pytest.raises(LayoutMismatchError, match=r"No checkpoint has the head tensors \['score.weight'\]"):
        WeightTokenizer.fit([adapter(2, 0)], 13, [*HEAD, "score.weight"])
    with pytest.raises(ValueError, match="`token_size` must be a whole number.*got 0"):
        WeightTokenizer.fit([adapter(2, 0)], 0)
    with pytest.raises(ValueError, match="'classifier.weight' is int64"):
        WeightTokenizer.fit([{"classifier.weight": torch.ones(2, 2).long()}], 8, HEAD[:1])
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="Tensor 'a' of checkpoint 1 has a weight that is NaN or infinite"):
            WeightTokenizer.fit([adapter(2, 0), adapter(2, 1) | {"a": torch.full((10, 4), bad)}], 13, HEAD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_tokenizing_refuses(dtype):
    zoo = [{name: value.to(dtype) for name, value in adapter(2, seed).items()} for seed in range(3)]
    tokenizer = WeightTokenizer.fit([*zoo, {"x": torch.zeros(3)}], 13, HEAD)
    broken = zoo[1]["classifier.weight"].clone()
    broken[1, 3] = float("nan")
    with pytest.raises(ValueError, match="'classifier.weight' of checkpoint 1 has a weight that is NaN"):
        tokenizer([zoo[0], zoo[1] | {"classifier.weight": broken}])
    with pytest.raises(ValueError, match="'b' of checkpoint 2 has a weight that is NaN or infinite"):
        tokenizer([*zoo[:2], zoo[2] | {"b": torch.full((4, 12), -float("inf"), dtype=dtype)}])
    with pytest.raises(
        LayoutMismatchError, match="Checkpoint 1 has none of the 2 known layouts; the nearest is layout 0.*'a'"
    ):
        tokenizer([zoo[0], zoo[1] | {"a": torch.zeros(4, 10)}])
    with pytest.raises(LayoutMismatchError, match="nearest is layout 1.*'x': expected"):
        tokenizer([{"x": torch.zeros(4)}])
    with pytest.raises(TypeError, match=r"write `tokenizer\(\[state_dict\]\)`"):
        tokenizer(zoo[0])
    with pytest.raises(ValueError, match="empty"):
        tokenizer([])


def test_a_bfloat16_weight_beyond_the_scale_is_named():
    tokenizer = WeightTokenizer.fit([{"w": torch.full((4,), 1e-3).bfloat16()}], 4)
    with pytest.raises(ValueError, match="'w' of checkpoint 0.* out of float32; fit the statistics"):
        tokenizer([{"w": torch.full((4,), 3e38).bfloat16()}])


def test_what_decoding_refuses():
    zoo = [adapter(2, 0) | {"steps": torch.tensor(3)}]
    tokenizer = WeightTokenizer.fit(zoo, 13, HEAD)
    features = tokenizer(zoo)
    tokens, beside = features["weight_tokens"], features["passthrough"]
    assert beside == [{"steps": torch.tensor(3)}]
    with pytest.raises(LayoutMismatchError, match=r"\['steps'\] of checkpoint 0 travel beside the tokens"):
        tokenizer.decode(tokens, num_classes=[2])
    with pytest.raises(LayoutMismatchError, match=r"'steps' in `passthrough\[0\]`: expected int64\[\], got int32\[\]"):
        tokenizer.decode(tokens, num_classes=[2], passthrough=[{"steps": torch.tensor(3).int()}])
    with pytest.raises(ValueError, match="`passthrough` of length 1, one dict per checkpoint, got 0"):
        tokenizer.decode(tokens, num_classes=[2], passthrough=[])
    with pytest.raises(ValueError, match="pass `num_classes`"):
        tokenizer.decode(tokens, passthrough=beside)
    with pytest.raises(LayoutMismatchError, match="8 body and 3 class tokens.* has 10 tokens"):
        tokenizer.decode(tokens, num_classes=[3], passthrough=beside)
    with pytest.raises(LayoutMismatchError, match=r"shape \(B, T, 13\), got \(1, 10, 12\)"):
        tokenizer.decode(tokens[..., 1:], num_classes=[2], passthrough=beside)
    with pytest.raises(ValueError, match="Layout ids run from 0 to 0, got 1"):
        tokenizer.decode(tokens, [1], [2], beside)
    with pytest.raises(ValueError, match=r"`num_classes` of shape \(1,\)"):
        tokenizer.decode(tokens, [0], [2, 2], beside)
    with pytest.raises(ValueError, match=r"`num_classes\[0\]` is -1, expected 0 or more"):
        tokenizer.decode(tokens, [0], [-1], beside)
    plain = WeightTokenizer.fit([{"w": torch.randn(3)}], 4)
    with pytest.raises(ValueError, match="expected 0, as layout 0 has no classification head"):
        plain.template([0], [2])
    with pytest.raises(ValueError, match="no classification head"):
        plain.class_token_id()


def test_layouts_are_checked_when_a_tokenizer_is_built():
    layout = Layout.of(adapter(2, 0), HEAD)
    with pytest.raises(ValueError, match="at least one layout"):
        WeightTokenizer(13, [])
    with pytest.raises(ValueError, match="Layout 1 has the same tensors"):
        WeightTokenizer(13, [layout, Layout(layout.tensors[::-1])])
    with pytest.raises(ValueError, match="'a' needs a finite mean and a positive std"):
        WeightTokenizer(4, [[{"name": "a", "shape": [2], "dtype": "float32", "head": False, "std": 0.0}]])


@quick
@given(st.integers(0, 2**31))
def test_layouts_side_by_side_have_places_of_their_own_and_come_back(seed):
    torch.manual_seed(seed)
    shapes = [{"a": (3, 4), "head": (2, 3)}, {"a": (5, 4), "b": (7,), "head": (3, 3)}]
    zoo = [{name: torch.randn(shape) for name, shape in shapes[i % 2].items()} for i in range(4)]
    tokenizer = WeightTokenizer.fit(zoo, token_size=4, head=["head"])
    encoded = tokenizer(zoo)
    wide, mask = (
        tokenizer.side_by_side(encoded[name], encoded["layout_ids"], encoded["num_classes"])
        for name in ("weight_tokens", "padding_mask")
    )
    for mine, theirs in zip(tokenizer.side_by_side_of(zoo), (wide, mask, encoded["layout_ids"]), strict=True):
        assert torch.equal(mine, theirs)
    N = tokenizer.num_all_body_tokens
    assert wide.shape == (4, N + 3, 4) and N == sum(tokenizer.num_body_tokens(k) for k in range(2))
    assert mask.sum((1, 2)).tolist() == [sum(tensor.numel() for tensor in member.values()) for member in zoo]
    assert not wide[~mask].any()
    for i, member in enumerate(zoo):
        k, classes = int(encoded["layout_ids"][i]), len(member["head"])
        other = tokenizer.places(1 - k)
        assert not mask[i, other].any()
        (back,) = tokenizer.decode(tokenizer.own_tokens(wide[i : i + 1], k), [k], [classes])
        for name, tensor in member.items():
            torch.testing.assert_close(back[name], tensor)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_stream_of_tokens_hands_out_the_tensors_in_order(count):
    state_dict = {"a": torch.randn(5, 3), "b": torch.randn(2), "classifier.weight": torch.randn(4, 3)}
    tokenizer = WeightTokenizer.fit([state_dict], token_size=4, head=["classifier.weight"])
    tokens = tokenizer([state_dict])["weight_tokens"][0]
    streamed = list(tokenizer.decode_stream(tokens.split(count), 0, 4))
    assert [name for name, _ in streamed] == ["a", "b", "classifier.weight"]
    for name, tensor in streamed:
        torch.testing.assert_close(tensor, state_dict[name])
    with pytest.raises(LayoutMismatchError, match="The head .* needs 4 tokens, 3 are left"):
        list(tokenizer.decode_stream(tokens[:-1].split(count), 0, 4))

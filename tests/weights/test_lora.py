import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_weightgen.weights.lora import canonical_factors, canonicalize, center_head, delta, join_lora, split_lora


quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
MODULE = "base_model.model.bert.encoder.layer.{}.attention.self.query"


@st.composite
def shapes(draw):
    r = draw(st.integers(1, 5))
    return r, draw(st.integers(r, 24)), draw(st.integers(r, 24))


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator))[0]


def factors(r, m, n, singular_values, generator):
    """A pair in a random gauge, with the singular values of its product given; fewer than r make it rank-deficient."""
    k = len(singular_values)
    U, V = orthonormal(m, k, generator), orthonormal(n, k, generator)
    mix = orthonormal(r, r, generator)[:, :k]
    return mix @ V.T, (U * torch.as_tensor(singular_values, dtype=torch.float64)) @ mix.T


def invertible(r, condition, generator):
    left, right = orthonormal(r, r, generator), orthonormal(r, r, generator)
    return left * torch.logspace(0, -1, r, base=condition, dtype=torch.float64) @ right


def relative(value, expected):
    return ((value - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def reference_for(kind, r, n, generator):
    return None if kind == "none" else torch.randn(r, n, dtype=torch.float64, generator=generator)


def assert_canonical(A, B, reference, generator, condition):
    A_c, B_c = canonical_factors(A, B, reference)
    assert relative(B_c @ A_c, B @ A) < 1e-5
    G = invertible(len(A), condition, generator)
    A_g, B_g = canonical_factors(torch.linalg.solve(G, A), B @ G, reference)
    assert relative(A_g, A_c) < 1e-4
    assert relative(B_g, B_c) < 1e-4
    A_i, B_i = canonical_factors(A_c, B_c, reference)
    assert relative(A_i, A_c) < 1e-4
    assert relative(B_i, B_c) < 1e-4
    return A_c, B_c


kinds = st.sampled_from(["none", "reference"])


@quick
@given(shapes(), seeds, st.sampled_from([1.0, 30.0, 1e3]), kinds, st.floats(1e-6, 1e6))
def test_any_gauge_has_one_canonical_pair(shape, seed, condition, kind, scale):
    r, m, n = shape
    generator = torch.Generator().manual_seed(seed)
    gaps = 0.01 + torch.rand(r, dtype=torch.float64, generator=generator)
    A, B = factors(r, m, n, scale * gaps.cumsum(0).flip(0), generator)
    A_c, B_c = assert_canonical(A, B, reference_for(kind, r, n, generator), generator, condition)
    if kind == "none":  # balanced, and orthogonal rows
        torch.testing.assert_close(A_c @ A_c.T, B_c.T @ B_c, rtol=1e-6, atol=1e-8 * scale)
        gram = A_c @ A_c.T
        assert (gram - gram.diag().diag()).norm() < 1e-8 * gram.norm()


@quick
@given(shapes(), seeds, kinds, st.data())
def test_rank_deficiency(shape, seed, kind, data):
    r, m, n = shape
    k = data.draw(st.integers(0, r - 1))
    generator = torch.Generator().manual_seed(seed)
    A, B = factors(r, m, n, [2.0**-i for i in range(k)], generator)
    if data.draw(st.booleans()):  # A of full rank, where only B is deficient
        null = torch.eye(r, dtype=torch.float64) - B.T @ torch.linalg.pinv(B.T)
        A = A + null @ torch.randn(r, n, dtype=torch.float64, generator=generator)
    reference = reference_for(kind, r, n, generator)
    A_c, _ = assert_canonical(A, B, reference, generator, 30.0)
    assert torch.linalg.matrix_rank(A_c, rtol=1e-6) == k
    if k:
        noise = 1e-12 * torch.randn(B.shape, dtype=torch.float64, generator=generator)
        assert relative(canonical_factors(A, B + noise, reference)[0], A_c) < 1e-4
    if kind == "none":
        assert not A_c[k:].any()


@quick
@given(seeds, kinds, st.sampled_from([0.0, 1e-9, 1e-5]), st.integers(2, 4))
def test_ties(seed, kind, gap, tied):
    generator = torch.Generator().manual_seed(seed)
    values = [3.0] + [1.0 - gap * i for i in range(tied)]
    A, B = factors(5, 14, 11, values, generator)
    A_c, B_c = assert_canonical(A, B, reference_for(kind, 5, 11, generator), generator, 30.0)
    # A perturbation far below the tie must not turn the basis.
    noise = 1e-9 * torch.randn(B.shape, dtype=torch.float64, generator=generator)
    if kind == "none" and tied == 4:  # of full rank, as noise in a missing direction is a direction of its own
        A_p, B_p = canonical_factors(A, B + noise)
        assert relative(A_p, A_c) < 1e-4
        assert relative(B_p, B_c) < 1e-4


@pytest.mark.parametrize("kind", ["none", "reference"])
def test_no_update_is_zero_factors(kind):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 9, generator=generator)
    A_c, B_c = canonical_factors(A, torch.zeros(7, 4), reference_for(kind, 4, 9, generator))
    assert A_c.dtype == B_c.dtype == torch.float32
    assert A_c.shape == (4, 9)
    assert B_c.shape == (7, 4)
    assert not A_c.any()
    assert not B_c.any()


def test_an_update_that_cancels_is_zero_too():
    a, b = torch.rand(1, 6, dtype=torch.float64) + 0.1, torch.rand(5, 1, dtype=torch.float64) + 0.1
    for reference in (None, torch.rand(2, 6, dtype=torch.float64)):
        A_c, B_c = canonical_factors(torch.cat([a, a / 3]), torch.cat([b, -3 * b], dim=1), reference)
        assert not A_c.any()
        assert not B_c.any()


@quick
@given(seeds, kinds)
def test_float32_adapters_of_real_size(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(4, 384, generator=generator) / 384**0.5
    A = start + 0.01 * torch.randn(4, 384, generator=generator)
    B = 0.02 * torch.randn(384, 4, generator=generator) * torch.tensor([1.0, 0.7, 0.5, 0.3])
    A_c, B_c = canonical_factors(A, B, None if kind == "none" else start)
    assert A_c.dtype == B_c.dtype == torch.float32
    assert relative(B_c.double() @ A_c.double(), B.double() @ A.double()) < 1e-5
    G = invertible(4, 5.0, generator)
    A_g, B_g = torch.linalg.solve(G, A.double()).float(), (B.double() @ G).float()
    A_g, B_g = canonical_factors(A_g, B_g, None if kind == "none" else start)
    assert relative(A_g, A_c) < 1e-4
    assert relative(B_g, B_c) < 1e-4
    if kind == "reference":
        assert relative(A_c, start) < 0.3


@quick
@given(seeds, kinds, st.sampled_from([[1.0, 0.5], [1.0, 5e-4], [1.0, 5e-4, 1e-5]]))
def test_float32_rounding_is_no_rank_but_small_directions_are(seed, kind, values):
    generator = torch.Generator().manual_seed(seed)
    reference = reference_for(kind, 4, 12, generator)
    A, B = factors(4, 16, 12, values, generator)
    G = invertible(4, 3.0, generator)
    A, B = torch.linalg.solve(G, A).float(), (B @ G).float()  # rounding gives the product full rank
    A_c, B_c = canonical_factors(A, B, reference)
    assert torch.linalg.matrix_rank(A_c.double(), rtol=1e-6) == len(values)
    assert relative(B_c.double() @ A_c.double(), B.double() @ A.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float64(dtype):
    A, B = torch.randn(4, 32).to(dtype), torch.randn(16, 4).to(dtype)
    A_c, B_c = canonical_factors(A, B)
    assert A_c.dtype == B_c.dtype == dtype
    assert relative(B_c.double() @ A_c.double(), B.double() @ A.double()) < 4 * torch.finfo(dtype).eps


@quick
@given(seeds, st.sampled_from([0.0, 1e-12, 1e-5, 3e-3, 1e-2]))
def test_a_poor_reference_never_costs_the_update(seed, span):
    """The reference sees the second direction of the row space hardly or not at all."""
    generator = torch.Generator().manual_seed(seed)
    A, B = factors(3, 9, 12, [3.0, 2.0, 1.0], generator)
    V = torch.linalg.svd(B @ A)[2][:3].T
    reference = orthonormal(3, 3, generator) @ torch.diag(torch.tensor([1.0, span, 0.5])).double() @ V.T
    assert_canonical(A, B, reference, generator, 30.0)
    A_c, B_c = canonical_factors(A.float(), B.float(), reference)
    assert relative(B_c.double() @ A_c.double(), B @ A) < 1e-5
    assert torch.linalg.cond(A_c.double()) < 101


def test_more_rank_than_features():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in [(6, 3), (2, 6)])
    for kind in ("none", "reference"):
        assert_canonical(A, B, reference_for(kind, 6, 3, generator), generator, 30.0)


def adapter(seed=0, layers=2):
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for layer in range(layers):
        state_dict[f"{MODULE.format(layer)}.lora_A.weight"] = torch.randn(4, 12, generator=generator)
        state_dict[f"{MODULE.format(layer)}.lora_B.weight"] = torch.randn(10, 4, generator=generator)
    state_dict["base_model.model.classifier.weight"] = torch.randn(3, 12, generator=generator)
    return state_dict


def test_split_and_join():
    state_dict = adapter()
    pairs, rest = split_lora(state_dict)
    assert list(pairs) == [MODULE.format(0), MODULE.format(1)]
    assert list(rest) == ["base_model.model.classifier.weight"]
    A, B = pairs[MODULE.format(1)]
    assert A.shape == (4, 12)
    assert B.shape == (10, 4)
    joined = join_lora(pairs, rest)
    assert list(joined) == list(state_dict)
    assert all(joined[name] is state_dict[name] for name in joined)
    torch.testing.assert_close(delta(A, B, scaling=2.0), 2 * B @ A)


@pytest.mark.parametrize("reference", [None, adapter(seed=7)])
def test_canonicalize_treats_every_module_and_keeps_the_rest(reference):
    state_dict = adapter()
    canonical = canonicalize(state_dict, reference)
    assert list(canonical) == list(state_dict)
    assert canonical["base_model.model.classifier.weight"] is state_dict["base_model.model.classifier.weight"]
    for layer in range(2):
        A, B = (canonical[f"{MODULE.format(layer)}.lora_{factor}.weight"] for factor in "AB")
        A_0, B_0 = (state_dict[f"{MODULE.format(layer)}.lora_{factor}.weight"] for factor in "AB")
        assert not torch.allclose(A, A_0)
        torch.testing.assert_close(B @ A, B_0 @ A_0, rtol=1e-4, atol=1e-5)


def test_centering_a_head_leaves_the_softmax_alone():
    weight, bias, x = torch.randn(5, 8), torch.randn(5), torch.randn(7, 8)
    state_dict = {"w": weight, "b": bias, "other": torch.ones(2)}
    centered = center_head(state_dict, ["w", "b"])
    torch.testing.assert_close(
        (x @ centered["w"].T + centered["b"]).softmax(1), (x @ weight.T + bias).softmax(1), rtol=1e-5, atol=1e-6
    )
    assert centered["w"].sum(0).abs().max() < 1e-5
    assert centered["other"] is state_dict["other"]
    assert torch.equal(weight, state_dict["w"])


def test_errors_name_the_module():
    module, state_dict = MODULE.format(0), adapter()
    name_A, name_B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    with pytest.raises(ValueError, match=f"{module}.*has no `lora_B.weight`"):
        split_lora({name_A: state_dict[name_A]})
    with pytest.raises(ValueError, match=rf"{module}.*one r, got \(4, 12\) and \(10, 3\)"):
        split_lora({name_A: state_dict[name_A], name_B: torch.zeros(10, 3)})
    with pytest.raises(ValueError, match=f"{module}.*B holds NaN"):
        canonicalize(state_dict | {name_B: torch.full((10, 4), float("nan"))})
    with pytest.raises(ValueError, match=r"`reference` of the shape of A, \(4, 12\), got \(4, 11\)"):
        canonicalize(state_dict, state_dict | {name_A: torch.zeros(4, 11)})
    with pytest.raises(ValueError, match=f"reference adapter has no '{name_A}'"):
        canonicalize(state_dict, {})
    with pytest.raises(ValueError, match="'score' is not in the checkpoint"):
        center_head(state_dict, ["score"])
    with pytest.raises(ValueError, match="'t' is a scalar"):
        center_head({"t": torch.tensor(1.0)}, ["t"])
    with pytest.raises(TypeError, match=r"write \['w'\]"):
        center_head(state_dict, "w")

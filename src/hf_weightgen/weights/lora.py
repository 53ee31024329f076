"""LoRA factors: PEFT names <-> pairs (A, B), the update B·A, and one canonical pair per update.

B·A stays the same when (A, B) becomes (G⁻¹·A, B·G) for any invertible G: adapters that are one function look like
many. The canonical pair depends on B·A alone, so that generators and distances see functions and not accidents of
training.

References: LoRA (https://huggingface.co/papers/2106.09685); the names are those of PEFT's `get_peft_model_state_dict`.

Notation used for shapes:
    - r: rank of the adapter; k: numerical rank of the update, k ≤ r
    - n: input features; m: output features
    - A (r, n), B (m, r), ΔW = scaling · B·A (m, n) = U·S·Vᵀ with U (m, k), S (k,), V (n, k)
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor


LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

# Singular values below this part of the largest count as rounding noise of the dtype.
RANK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Singular values closer than this part of the largest count as tied: their singular vectors mean nothing one by one.
TIE_TOLERANCE = 1e-3
# A reference is followed as long as it spans the row space at least this well, and its weak directions are then lifted
# so that rounding the factors to float32 costs at most 1e-5 of ΔW.
MIN_REFERENCE_SPAN = 1e-3
MAX_REFERENCE_CONDITION = 100.0


def split_lora(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """
    Sorts an adapter's tensors into pairs of factors and everything else.

    Returns:
        `(pairs, rest)`: module name -> (A of shape `(r, n)`, B of shape `(m, r)`), and the tensors that are no
        factor, such as a classification head.

    Raises:
        ValueError: If a factor has no partner, is no matrix, or the ranks of a pair differ.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in state_dict.items():
        match = LORA_NAME.fullmatch(name)
        if match:
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        else:
            rest[name] = tensor
    pairs = {}
    for module, both in factors.items():
        for factor in "AB":
            if factor not in both:
                raise ValueError(f"Module {module!r} has no `lora_{factor}.weight`; a LoRA update needs both factors.")
        _check_factors(both["A"], both["B"], module)
        pairs[module] = (both["A"], both["B"])
    return pairs, rest


def join_lora(
    pairs: Mapping[str, tuple[Tensor, Tensor]], rest: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Inverse of [`split_lora`]: the pairs under their PEFT names, then the rest."""
    state_dict = {}
    for module, (A, B) in pairs.items():
        _check_factors(A, B, module)
        state_dict[f"{module}.lora_A.weight"], state_dict[f"{module}.lora_B.weight"] = A, B
    return {**state_dict, **(rest or {})}


def delta(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """ΔW of shape `(m, n)`: what the adapter adds to the weight. PEFT's `scaling` is `lora_alpha / r`."""
    _check_factors(A, B)
    return scaling * (B @ A)


def canonical_factors(A: Tensor, B: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""
    The canonical pair of factors of `B @ A`. It is a function of the product alone: the same for (G⁻¹A, BG) with any
    invertible G, and for itself.

    With a `reference`, `A_c = reference V Vᵀ`, the rows of the reference projected onto the row space of B·A, and
    `B_c = B A A_c⁺`. This is smooth, needs no gaps between singular values, and brings adapters trained from one
    shared `lora_A` closest together. Weak directions of `reference V` are lifted to 1/100 of its strongest, and a
    reference that misses a part of the row space is not used.

    Without one, `A_c = √S Vᵀ` and `B_c = U √S`, balanced, and each singular vector has the sign that points along a
    fixed random direction. Singular values within 1e-3 of the largest of each other are tied: their basis is the one
    nearest to fixed random rows, so that it may turn freely inside the group without changing the result.

    Args:
        A (`torch.Tensor` of shape `(r, n)`): The factor that is applied first.
        B (`torch.Tensor` of shape `(m, r)`): The factor that is applied last.
        reference (`torch.Tensor` of shape `(r, n)`, *optional*): Rows to stay close to, such as the shared `lora_A`
        from
            which all adapters of a zoo were trained.

    Returns:
        `(A_c, B_c)` with the shapes and dtypes of `A` and `B`. Where B·A has rank k < r, `A_c` has rank k too;
        without a reference its last r - k rows are zero.

    Raises:
        ValueError: If the shapes do not fit or a factor holds NaN or infinity.
    """
    _check_factors(A, B)
    if reference is not None and reference.shape != A.shape:
        raise ValueError(f"Expected a `reference` of the shape of A, {tuple(A.shape)}, got {tuple(reference.shape)}.")
    for name, factor in (("A", A), ("B", B), ("the reference", reference)):
        if factor is not None and not factor.isfinite().all():
            raise ValueError(f"Expected finite factors, but {name} holds NaN or infinity; the adapter is broken.")
    U, S, Vh = _thin_svd(A, B)
    r, k = len(A), len(S)
    pair = None if reference is None else _towards_reference(U, S, Vh, reference.detach().to(Vh))
    if pair is None:
        A_c, B_c = _balanced(U, S, Vh, _fixed_rows(r, A.shape[1]).to(Vh.device))
        pair = (
            torch.cat([A_c, A_c.new_zeros(r - k, A.shape[1])]),
            torch.cat([B_c, B_c.new_zeros(len(B), r - k)], dim=1),
        )
    return pair[0].to(A.dtype), pair[1].to(B.dtype)


def canonicalize(state_dict: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """
    Puts every LoRA module of an adapter into its canonical gauge; see [`canonical_factors`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): An adapter with PEFT names.
        reference (`Mapping[str, torch.Tensor]`, *optional*): An adapter whose `lora_A` is the reference of
            each module.

    Returns:
        `dict[str, torch.Tensor]`: the same names in the same order; tensors that are no factor are handed on.
    """
    pairs, _ = split_lora(state_dict)
    canonical = dict(state_dict)
    for module, (A, B) in pairs.items():
        name_A, name_B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if reference is not None and name_A not in reference:
            raise ValueError(f"The reference adapter has no {name_A!r}; use one with the modules of the adapter.")
        try:
            A_c, B_c = canonical_factors(A, B, None if reference is None else reference[name_A])
        except ValueError as error:
            raise ValueError(f"Module {module!r}: {error}") from error
        canonical[name_A], canonical[name_B] = A_c, B_c
    return canonical


def center_head(state_dict: Mapping[str, Tensor], head: Iterable[str]) -> dict[str, Tensor]:
    """
    Subtracts from each tensor of a classification head its mean over the classes. A softmax over the logits stays the
    same, as all logits of an example move together.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): A checkpoint.
        head (`Iterable[str]`): Names of the head's weight and bias, each with the classes as first axis.

    Raises:
        ValueError: If a head tensor is absent or a scalar.
    """
    if isinstance(head, str):
        raise TypeError(f"`head` is a sequence of tensor names, got the string {head!r}; write [{head!r}].")
    centered = dict(state_dict)
    for name in head:
        if name not in state_dict:
            raise ValueError(f"Head tensor {name!r} is not in the checkpoint, which has {list(state_dict)[-4:]}.")
        values = state_dict[name].double()
        if not values.ndim:
            raise ValueError(f"Head tensor {name!r} is a scalar; it needs the classes as its first axis.")
        centered[name] = (values - values.mean(0, keepdim=True)).to(state_dict[name].dtype)
    return centered


def _thin_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,), Vᵀ (k, n) of B·A in float64, by way of r x r matrices; the (m, n) product is never formed."""
    A64, B64 = A.detach().double(), B.detach().double()
    Q_A, R_A = torch.linalg.qr(A64.T)  # (n, r), (r, r)
    Q_B, R_B = torch.linalg.qr(B64)  # (m, r), (r, r)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    k = 0
    if len(S):
        noise = 1e-14 * R_A.norm() * R_B.norm()  # float64 rounding of the product itself
        k = int((S > torch.maximum(RANK_TOLERANCE.get(A.dtype, 1e-6) * S[0], noise)).sum())
    return Q_B @ U[:, :k], S[:k], Vh[:k] @ Q_A.T


def _towards_reference(U: Tensor, S: Tensor, Vh: Tensor, reference: Tensor) -> tuple[Tensor, Tensor] | None:
    """`A_c = P Vᵀ`, `B_c = U S P⁺` with P = reference V; `None` if P does not determine a basis of the row space."""
    if not len(S):
        return reference.new_zeros(reference.shape), U.new_zeros(len(U), len(reference))
    X, sigma, Yh = torch.linalg.svd(reference @ Vh.T, full_matrices=False)  # (r, k), (k,), (k, k)
    if not sigma[-1] > MIN_REFERENCE_SPAN * sigma[0]:
        return None
    sigma = sigma.clamp(min=sigma[0] / MAX_REFERENCE_CONDITION)
    P, P_pinv = (X * sigma) @ Yh, (Yh.T / sigma) @ X.T
    return P @ Vh, (U * S) @ P_pinv


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
    """`A_c = Q √S Vᵀ`, `B_c = U √S Qᵀ` with Q orthogonal within each group of tied singular values."""
    A_c, B_c = torch.empty_like(Vh), torch.empty_like(U)
    start = 0
    while start < len(S):
        stop = start + 1
        while stop < len(S) and S[stop - 1] - S[stop] < TIE_TOLERANCE * S[0]:
            stop += 1
        group = slice(start, stop)
        root = S[group].sqrt()
        # The polar factor of fixed·V undoes any rotation of V within the group; for one vector it is a sign.
        X, _, Yh = torch.linalg.svd(fixed[group] @ Vh[group].T)
        turn = X @ Yh
        A_c[group] = turn @ (root[:, None] * Vh[group])
        B_c[:, group] = (U[:, group] * root) @ turn.T
        start = stop
    return A_c, B_c


@lru_cache(maxsize=64)
def _fixed_rows(r: int, n: int) -> Tensor:
    # Part of the definition of the gauge: another seed would be another gauge.
    return torch.randn(r, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _check_factors(A: Tensor, B: Tensor, module: str | None = None) -> None:
    where = f"Module {module!r}: expected" if module else "Expected"
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{where} A of shape (r, n) and B of shape (m, r) with one r, got {tuple(A.shape)} and {tuple(B.shape)}."
        )

"""Weight tokenizer: checkpoints of one or of many layouts <-> sequences of equal-length weight tokens.

Only this module knows how scalars are ordered inside a token; every model above it sees `(B, T, S)`.

References: "layer-wise vectorization" and chunking in D2NWG (https://huggingface.co/papers/2402.18153), section 3.2;
the merge of two sets of moments in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances" (1979).

Notation used for shapes and units:
    - B: checkpoints in the batch
    - S: token size, counted in scalars (not bytes)
    - N_k: body tokens of layout k, the sum over its body tensors of `ceil(numel / S)`
    - C: classes of a checkpoint; every class is one token, which holds its row of each head tensor
    - T: tokens of the longest checkpoint of the batch, max of N_k + C
    - token values are dimensionless: `(weight - mean) / std`, with one mean and one std per tensor of a layout
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BatchFeature, FeatureExtractionMixin

from .cutting import TOKENIZED_DTYPES, Cutting
from .descriptors import describe
from .layout import Layout, LayoutMismatchError, TensorSpec
from .moments import Moments, flat


class WeightTokenizer(FeatureExtractionMixin):
    r"""
    Cuts every tensor, flattened in row-major order, into tokens of `token_size` scalars. The tail of a tensor is
    zero-padded, so that no token straddles two tensors and one layer can be generated on its own. The classification
    head is cut along its classes instead: one token per class, so that class counts differ freely between checkpoints.

    Integer, boolean, complex and empty tensors travel beside the tokens, untouched. Narrow floats (float16, bfloat16,
    float8) come back bit for bit; float32 and float64 within 1e-6 of the tensor's std, as long as a weight lies within
    16 std of the mean, and within a relative 1.2e-7 of its distance from the mean beyond that. float32 tensors that
    had such outliers when the statistics were taken come back bit for bit.

    Args:
        token_size (`int`):
            Scalars per token, S.
        layouts (`Sequence[Sequence[dict]]`):
            For each layout, one `{"name", "shape", "dtype", "head", "mean", "std"}` per tensor in order, the first
            four as in [`TensorSpec`]. Without `mean` and `std` a tensor is not standardised. [`~WeightTokenizer.fit`]
            finds them all.
    """

    model_input_names = ["weight_tokens", "padding_mask", "token_ids", "is_class", "layout_ids", "num_classes"]

    def __init__(self, token_size: int, layouts: Sequence[Layout | Sequence[Mapping]], **kwargs):
        if not layouts:
            raise ValueError("`layouts` must hold at least one layout, got none; `WeightTokenizer.fit` finds them.")
        super().__init__(**kwargs)
        self.token_size = token_size
        self._plans: list[Cutting] = []
        self._described: dict[tuple[int, int], Tensor] = {}
        first_id = 0
        for entries in layouts:
            plan = Cutting.of(entries.to_list() if isinstance(entries, Layout) else entries, token_size, first_id)
            if any(set(plan.layout.tensors) == set(other.layout.tensors) for other in self._plans):
                raise ValueError(
                    f"Layout {len(self._plans)} has the same tensors as an earlier one; keep one of them."
                )
            self._plans.append(plan)
            first_id += plan.num_ids

    @classmethod
    def fit(
        cls, state_dicts: Iterable[Mapping[str, Tensor]], token_size: int, head: Iterable[str] = ()
    ) -> "WeightTokenizer":
        """
        Finds the layouts of a zoo, and the mean and std of every tensor of each, in one pass and in float64.

        Args:
            state_dicts (`Iterable[Mapping[str, torch.Tensor]]`):
                The zoo. It is read once, one checkpoint at a time, so that it may be larger than memory.
            token_size (`int`): Scalars per token, S.
            head (`Iterable[str]`):
                Names of the tensors of the classification head, whose first axis counts classes. A layout may lack
                some of them; each name must occur in some checkpoint.

        Raises:
            ValueError: If there is no checkpoint, a class does not fit into a token, or a weight is NaN or infinite.
            LayoutMismatchError: If no checkpoint has a head tensor, or head tensors disagree on the class count.
        """
        head = {head} if isinstance(head, str) else set(head)
        known: dict[Layout, list[Moments | None]] = {}
        same_tensors: dict[frozenset, Layout] = {}
        for index, state_dict in enumerate(state_dicts):
            layout = Layout.of(state_dict, head & state_dict.keys())
            layout = same_tensors.setdefault(frozenset(layout.tensors), layout)  # the first order of the names holds
            if layout not in known:
                Cutting.of(layout.to_list(), token_size, 0)  # refuses a head that does not fit before the long pass
                known[layout] = [Moments() if spec.dtype in TOKENIZED_DTYPES else None for spec in layout.tensors]
            for spec, moments in zip(layout.tensors, known[layout], strict=True):
                if moments is not None:
                    moments.add(state_dict[spec.name], f"Tensor {spec.name!r} of checkpoint {index}")
        if not known:
            raise ValueError("`state_dicts` is empty; fitting needs at least one checkpoint.")
        absent = head - {name for layout in known for name in layout.head}
        if absent:
            raise LayoutMismatchError(
                f"No checkpoint has the head tensors {sorted(absent)}; check the names in `head`."
            )
        layouts = []
        for layout, statistics in known.items():
            layouts.append(layout.to_list())
            for entry, moments in zip(layouts[-1], statistics, strict=True):
                entry["mean"], entry["std"] = (0.0, 1.0) if moments is None else moments.mean_and_std(entry["dtype"])
        return cls(token_size, layouts)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(plan.layout for plan in self._plans)

    @property
    def num_token_ids(self) -> int:
        """Distinct values of `token_ids`: the body tokens of all layouts, and one for the classes of each head."""
        return self._plans[-1].first_id + self._plans[-1].num_ids

    def num_body_tokens(self, layout_id: int = 0) -> int:
        """N_k, the tokens of a checkpoint before its class tokens."""
        return self._plan(layout_id).num_body

    @property
    def num_all_body_tokens(self) -> int:
        """N, the sum of N_k over all layouts: the width of [`~WeightTokenizer.side_by_side`] before the class tokens."""
        return sum(plan.num_body for plan in self._plans)

    def side_by_side(self, weight_tokens: Tensor, layout_ids: Tensor, num_classes: Tensor) -> Tensor:
        """
        Gives the body tokens of every layout a place of their own, so that one network may read and write all layouts with
        a map for each place.

        Args:
            weight_tokens (`torch.Tensor` of shape `(B, T, S)`): As `__call__` returns them, or their `padding_mask`.

        Returns:
            `torch.Tensor` of shape `(B, N + C, S)`: body tokens of layout 0, of layout 1, ..., class tokens; zeros in the places
            of other layouts.
        """
        N, C = self.num_all_body_tokens, int(num_classes.max())
        wide = weight_tokens.new_zeros(len(weight_tokens), N + C, self.token_size)
        for k in layout_ids.unique().tolist():
            rows, own = (layout_ids == k).nonzero().flatten(), self.num_body_tokens(k)
            wide[rows, self.places(k)] = weight_tokens[rows, :own]
            classes = weight_tokens[rows, own : own + C]  # padding where a row has fewer
            wide[rows, N : N + classes.shape[1]] = classes
        return wide

    def side_by_side_of(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and padding mask of state dicts, side by side `(B, N + C, S)`, and their layouts `(B,)`."""
        encoded = self(state_dicts)
        layouts, counts = encoded["layout_ids"], encoded["num_classes"]
        tokens, mask = (self.side_by_side(encoded[key], layouts, counts) for key in ("weight_tokens", "padding_mask"))
        return tokens, mask, layouts

    def places(self, layout_id: int) -> slice:
        """Where the body tokens of a layout are in [`~WeightTokenizer.side_by_side`]."""
        first = sum(plan.num_body for plan in self._plans[:layout_id])
        return slice(first, first + self.num_body_tokens(layout_id))

    def own_tokens(self, weight_tokens: Tensor, layout_id: int) -> Tensor:
        """Of tokens side by side `(B, N + C, S)` those of one layout, `(B, N_k + C, S)`, for [`~WeightTokenizer.decode`]."""
        return torch.cat([weight_tokens[:, self.places(layout_id)], weight_tokens[:, self.num_all_body_tokens :]], 1)

    def class_token_id(self, layout_id: int = 0) -> int:
        """The one value of `token_ids` that all class tokens of a layout share."""
        plan = self._plan(layout_id)
        if not plan.head:
            raise ValueError(f"Layout {layout_id} has no classification head, so it has no class tokens.")
        return plan.first_id + plan.num_body

    def describe(self, layout_id: int, num_classes: int, part: slice = slice(None)) -> Tensor:
        """What each token of a checkpoint, or of a part of it, is: `(N_k + C, D)`, see [`~weights.descriptors.describe`]."""
        if part != slice(None):  # of a long network, of which not all shall be in memory
            return describe(self._plan(layout_id), num_classes, part)
        key = layout_id, num_classes
        if key not in self._described:
            self._described[key] = describe(self._plan(layout_id), num_classes)
        return self._described[key]

    def filled(self, layout_id: int, num_classes: int) -> Tensor:
        """The scalars that each token of a checkpoint holds, `(N_k + C,)`."""
        self._check_counts(torch.tensor([layout_id]), torch.tensor([num_classes]))
        return self._plan(layout_id).filled(num_classes)

    def template(self, layout_ids: Sequence[int] | Tensor, num_classes: Sequence[int] | Tensor) -> BatchFeature:
        """
        All that is known of a batch before its weights are: what a generator needs in order to fill the tokens.

        Args:
            layout_ids (`Sequence[int]` of length B): The layout of each checkpoint.
            num_classes (`Sequence[int]` of length B): C of each checkpoint, 0 for layouts without a head.

        Returns:
            [`~transformers.BatchFeature`] with
                - `padding_mask` (`torch.BoolTensor` of shape `(B, T, S)`): `True` on weights, `False` on padding.
                - `token_ids` (`torch.LongTensor` of shape `(B, T)`): which token of which layout; class tokens of a
                  layout share one id; -1 on padding.
                - `is_class` (`torch.BoolTensor` of shape `(B, T)`): `True` on class tokens.
                - `layout_ids`, `num_classes` (`torch.LongTensor` of shape `(B,)`).
        """
        layout_ids, num_classes = torch.as_tensor(layout_ids).long(), torch.as_tensor(num_classes).long()
        plans = self._check_counts(layout_ids, num_classes)
        lengths = [plan.num_body + count for plan, count in zip(plans, num_classes.tolist(), strict=True)]
        shape = (len(lengths), max(lengths, default=0))
        padding_mask = torch.zeros(*shape, self.token_size, dtype=torch.bool)
        token_ids = torch.full(shape, -1)
        is_class = torch.zeros(shape, dtype=torch.bool)
        for k in layout_ids.unique().tolist():
            plan, rows = self._plans[k], (layout_ids == k).nonzero().flatten()
            padding_mask[rows, : plan.num_body] = plan.body_mask()
            token_ids[rows, : plan.num_body] = plan.first_id + torch.arange(plan.num_body)
            checkpoint, position = plan.class_positions(rows, num_classes)
            padding_mask[checkpoint, position, : plan.class_numel] = True
            token_ids[checkpoint, position] = plan.first_id + plan.num_body
            is_class[checkpoint, position] = True
        return BatchFeature(
            {
                "padding_mask": padding_mask,
                "token_ids": token_ids,
                "is_class": is_class,
                "layout_ids": layout_ids,
                "num_classes": num_classes,
            }
        )

    def __call__(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> BatchFeature:
        """
        Args:
            state_dicts (`Sequence[Mapping[str, torch.Tensor]]` of length B): Checkpoints, each of a known layout.

        Returns:
            [`~transformers.BatchFeature`] with the keys of [`~WeightTokenizer.template`] and
                - `weight_tokens` (`torch.FloatTensor` of shape `(B, T, S)`): standardised weights, 0 on padding.
                - `passthrough` (`list[dict[str, torch.Tensor]]` of length B): the tensors that travel beside the
                  tokens.

        Raises:
            LayoutMismatchError: If a checkpoint has no known layout; the message names the nearest one and the first
                tensor that differs.
            ValueError: If a weight is NaN or infinite.
        """
        if isinstance(state_dicts, Mapping):
            raise TypeError("`state_dicts` is a sequence of checkpoints, got one; write `tokenizer([state_dict])`.")
        state_dicts = list(state_dicts)
        if not state_dicts:
            raise ValueError("`state_dicts` is empty; tokenizing needs at least one checkpoint.")
        seen: dict[frozenset, tuple[int, int]] = {}
        found = [self._find(index, state_dict, seen) for index, state_dict in enumerate(state_dicts)]
        features = self.template([layout_id for layout_id, _ in found], [count for _, count in found])
        weight_tokens = torch.zeros(features["padding_mask"].shape)
        passthrough = []
        for (layout_id, _), state_dict in zip(found, state_dicts, strict=True):
            passthrough.append({spec.name: state_dict[spec.name] for spec in self._plans[layout_id].beside})
        for k in features["layout_ids"].unique().tolist():
            plan, rows = self._plans[k], (features["layout_ids"] == k).nonzero().flatten()
            members = rows.tolist()
            for piece in plan.body:
                values = torch.stack([flat(state_dicts[b][piece.spec.name]) for b in members])  # (b, numel)
                tokens = F.pad(piece.standardise(values, members), (0, piece.padding))
                weight_tokens[rows, piece.start : piece.stop] = tokens.view(len(members), -1, self.token_size)
            checkpoint, position = plan.class_positions(rows, features["num_classes"])
            for piece in plan.head:
                values = torch.cat([flat(state_dicts[b][piece.spec.name]) for b in members]).view(-1, piece.numel)
                tokens = piece.standardise(values, checkpoint.tolist())  # (sum of C, scalars per class)
                weight_tokens[checkpoint, position, piece.start : piece.stop] = tokens
        return BatchFeature({"weight_tokens": weight_tokens, **features, "passthrough": passthrough})

    def decode(
        self,
        weight_tokens: Tensor,
        layout_ids: Sequence[int] | Tensor | None = None,
        num_classes: Sequence[int] | Tensor | None = None,
        passthrough: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> list[dict[str, Tensor]]:
        """
        Inverse of `__call__`, differentiable. Whatever stands on padding is dropped.

        Args:
            weight_tokens (`torch.Tensor` of shape `(B, T, S)`): Standardised weights; T may be longer than needed.
            layout_ids (`Sequence[int]` of length B, *optional*): The layout of each checkpoint, by default the first.
            num_classes (`Sequence[int]` of length B, *optional*): C of each checkpoint; needed by layouts with a head.
            passthrough (`Sequence[Mapping[str, torch.Tensor]]` of length B, *optional*):
                The tensors beside the tokens; needed by layouts that have such tensors.

        Returns:
            `list[dict[str, torch.Tensor]]` of length B: tensors in the order, shapes and dtypes of their layout.

        Raises:
            LayoutMismatchError: If `weight_tokens` is too short or of another token size, or `passthrough` lacks a
            tensor. ValueError: If the layout has a head and `num_classes` is missing.
        """
        if weight_tokens.ndim != 3 or weight_tokens.shape[2] != self.token_size:
            raise LayoutMismatchError(
                f"Expected `weight_tokens` of shape (B, T, {self.token_size}), got {tuple(weight_tokens.shape)}."
            )
        batch = len(weight_tokens)
        layout_ids = torch.zeros(batch).long() if layout_ids is None else torch.as_tensor(layout_ids).long().cpu()
        if num_classes is None:
            with_head = [k for k in layout_ids.unique().tolist() if self._plan(k).head]
            if with_head:
                raise ValueError(
                    f"Layout {with_head[0]} has a classification head: pass `num_classes`, one per checkpoint."
                )
            num_classes = torch.zeros(batch)
        num_classes = torch.as_tensor(num_classes).long().cpu()
        plans = self._check_counts(layout_ids, num_classes, batch)
        for b, (plan, count) in enumerate(zip(plans, num_classes.tolist(), strict=True)):
            if plan.num_body + count > weight_tokens.shape[1]:
                raise LayoutMismatchError(
                    f"Checkpoint {b} needs {plan.num_body} body and {count} class tokens, but `weight_tokens` of "
                    f"shape {tuple(weight_tokens.shape)} has {weight_tokens.shape[1]} tokens."
                )
        if passthrough is not None and len(passthrough) != batch:
            raise ValueError(
                f"Expected `passthrough` of length {batch}, one dict per checkpoint, got {len(passthrough)}."
            )
        state_dicts = [self._beside(b, plan, passthrough) for b, plan in enumerate(plans)]
        for k in layout_ids.unique().tolist():
            plan, rows = self._plans[k], (layout_ids == k).nonzero().flatten()
            for piece in plan.body:
                values = weight_tokens[rows, piece.start : piece.stop].flatten(1)[:, : piece.numel]
                for b, value in zip(rows.tolist(), piece.restore(values), strict=True):
                    state_dicts[b][piece.spec.name] = value.reshape(piece.spec.shape).clone()
            checkpoint, position = plan.class_positions(rows, num_classes)
            for piece in plan.head:
                values = piece.restore(weight_tokens[checkpoint, position, piece.start : piece.stop])
                for b, value in zip(rows.tolist(), values.split(num_classes[rows].tolist()), strict=True):
                    state_dicts[b][piece.spec.name] = value.reshape(piece.spec.shape_for(len(value))).clone()
        return state_dicts

    def decode_stream(
        self, windows: Iterable[Tensor], layout_id: int = 0, num_classes: int = 0
    ) -> Iterator[tuple[str, Tensor]]:
        """
        [`~WeightTokenizer.decode`] of one checkpoint whose tokens come a few at a time: each tensor is handed out as soon as its last
        token is there, so that a network larger than memory can be written to disk.

        Args:
            windows (`Iterable[torch.Tensor]` of shapes `(n, S)`): Tokens in their order, any number at a time.

        Yields:
            Names and tensors, those of the head last.

        Raises:
            LayoutMismatchError: If tokens are missing, or the layout has tensors that travel beside the tokens.
        """
        plan, waiting, source = self._plan(layout_id), torch.zeros(0, self.token_size), iter(windows)
        if plan.beside:
            raise LayoutMismatchError(
                f"The tensors {[spec.name for spec in plan.beside]} travel beside the tokens; use `decode`."
            )

        def take(count: int, what: str) -> Tensor:
            nonlocal waiting
            while len(waiting) < count:
                more = next(source, None)
                if more is None:
                    raise LayoutMismatchError(f"{what} needs {count} tokens, {len(waiting)} are left.")
                waiting = torch.cat([waiting, more])
            taken, waiting = waiting[:count], waiting[count:]
            return taken

        for piece in plan.body:
            tokens = take(piece.stop - piece.start, f"Tensor {piece.spec.name!r}")
            yield piece.spec.name, piece.restore(tokens.flatten()[: piece.numel]).reshape(piece.spec.shape)
        if plan.head:
            tokens = take(num_classes, f"The head {list(plan.layout.head)}")
            for piece in plan.head:
                values = piece.restore(tokens[:, piece.start : piece.stop])
                yield piece.spec.name, values.reshape(piece.spec.shape_for(num_classes))

    def to_dict(self) -> dict:
        """The JSON config. Tensors stay lists of objects: the keys of an object come back sorted."""
        return {
            "feature_extractor_type": type(self).__name__,
            "token_size": self.token_size,
            "layouts": [plan.to_list() for plan in self._plans],
        }

    def _plan(self, layout_id: int) -> Cutting:
        if not 0 <= layout_id < len(self._plans):
            raise ValueError(f"Layout ids run from 0 to {len(self._plans) - 1}, got {layout_id}.")
        return self._plans[layout_id]

    def _check_counts(self, layout_ids: Tensor, num_classes: Tensor, batch: int | None = None) -> list[Cutting]:
        batch = layout_ids.numel() if batch is None else batch
        for name, value in (("layout_ids", layout_ids), ("num_classes", num_classes)):
            if value.shape != (batch,):
                raise ValueError(
                    f"Expected `{name}` of shape ({batch},), one per checkpoint, got {tuple(value.shape)}."
                )
        plans = [self._plan(layout_id) for layout_id in layout_ids.tolist()]
        for b, (plan, count) in enumerate(zip(plans, num_classes.tolist(), strict=True)):
            if count < 0 or (count and not plan.head):
                expected = "0 or more" if plan.head else f"0, as layout {layout_ids[b]} has no classification head"
                raise ValueError(f"`num_classes[{b}]` is {count}, expected {expected}.")
        return plans

    def _find(self, index: int, state_dict: Mapping[str, Tensor], seen: dict) -> tuple[int, int]:
        """The layout id and class count of a checkpoint; `seen` spares the comparison for checkpoints alike."""
        key = frozenset((name, tensor.shape, tensor.dtype) for name, tensor in state_dict.items())
        if key not in seen:
            differences = [layout.differences(state_dict) for layout in self.layouts]
            nearest = min(range(len(differences)), key=lambda k: len(differences[k]))
            if differences[nearest]:
                raise LayoutMismatchError(
                    f"Checkpoint {index} has none of the {len(differences)} known layouts; the nearest is layout "
                    f"{nearest}, of which {len(differences[nearest])} tensors differ, the first being "
                    f"{differences[nearest][0]}."
                )
            seen[key] = nearest, self.layouts[nearest].num_classes(state_dict)
        return seen[key]

    def _beside(self, b: int, plan: Cutting, passthrough: Sequence[Mapping[str, Tensor]] | None) -> dict:
        """A state dict with all names in order, filled with the tensors that travel beside the tokens."""
        state_dict: dict = dict.fromkeys(spec.name for spec in plan.layout.tensors)
        came = {} if passthrough is None else passthrough[b]
        absent = [spec.name for spec in plan.beside if spec.name not in came]
        if absent:
            raise LayoutMismatchError(
                f"The tensors {absent} of checkpoint {b} travel beside the tokens: pass `passthrough`, as the "
                "tokenizer returned it, or take them from a checkpoint of this layout."
            )
        for spec in plan.beside:
            if TensorSpec.of(spec.name, came[spec.name]) != spec:
                raise LayoutMismatchError(
                    f"Tensor {spec.name!r} in `passthrough[{b}]`: expected {spec}, "
                    f"got {TensorSpec.of(spec.name, came[spec.name])}."
                )
            state_dict[spec.name] = came[spec.name]
        return state_dict

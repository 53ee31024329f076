"""The dataset encoder does not see order or padding, learns to tell datasets apart, and is saved whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge

from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from tiny import random


SIZES = {"feature_size": 6, "embedding_size": 8, "latent_size": 5, "hidden_size": 16, "num_attention_heads": 2}


def encoder(**settings) -> DatasetEncoder:
    torch.manual_seed(0)
    return DatasetEncoder(DatasetEncoderConfig(**SIZES, num_inducing_points=3, **settings)).eval()


def examples(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, SIZES["feature_size"], generator=random(seed)), dim=-1)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(1, 5), count=st.integers(1, 4))
def test_neither_the_order_of_examples_nor_that_of_classes_matters(seed, classes, count):
    model, features = encoder(), examples(2, classes, count, seed=seed)
    mask = torch.ones(features.shape[:3], dtype=torch.bool)
    dataset, of_class = model.encode(features, mask)
    assert dataset.shape == (2, 8) and of_class.shape == (2, classes, 8)
    order, inner = (torch.randperm(size, generator=random(seed)) for size in (classes, count))
    again, moved = model.encode(features[:, order][:, :, inner], mask)
    torch.testing.assert_close(again, dataset, atol=1e-5, rtol=0)
    torch.testing.assert_close(moved, of_class[:, order], atol=1e-5, rtol=0)


def test_padding_is_not_seen():
    model, features = encoder(), examples(1, 3, 4)
    dataset, of_class = model.encode(features, torch.ones(1, 3, 4, dtype=torch.bool))
    padded = torch.cat([torch.cat([features, examples(1, 3, 2, seed=1)], 2), examples(1, 2, 6, seed=2)], 1)
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[:, :3, :4] = True
    again, wide = model.encode(padded, mask)
    torch.testing.assert_close(again, dataset, atol=1e-5, rtol=0)
    torch.testing.assert_close(wide[:, :3], of_class, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alignment", ["info_nce", "soft"])
def test_alignment_finds_the_dataset_of_each_latent(alignment):
    model = encoder(alignment=alignment).train()
    centres, latents = examples(6, 2, 1), torch.randn(6, 5, generator=random(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        groups = torch.arange(12) % 6
        return F.normalize(centres[groups] + 0.3 * examples(12, 2, 3, seed=seed), dim=-1), latents[groups], groups

    mask = torch.ones(12, 2, 3, dtype=torch.bool)
    for step in range(150):
        features, of, groups = batch(step + 10)
        output = model(features, mask, groups, latents=of)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    features, _, groups = batch(5)
    found = (model.encode(features, mask)[0] @ model.latent_embeds(latents).mT).argmax(1)
    assert (found == groups).float().mean() > 0.9


def test_entries_of_one_dataset_are_no_negatives_of_each_other():
    model = encoder()
    left = F.normalize(torch.randn(3, 8, generator=random(0)), dim=-1)
    right = left[[1, 0, 2]]  # each of the first two looks like the other one's partner
    together, apart = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    assert model.align(left, right, together) < model.align(left, right, apart)


def test_prompts_and_class_names_are_what_it_learns_to_say():
    model, features = encoder().train(), examples(2, 3, 2)
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    prompts, names = (F.normalize(torch.randn(*shape, 8, generator=random(7)), dim=-1) for shape in ((2,), (2, 3)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        output = model(features, mask, prompt_embeds=prompts, name_embeds=names)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert (output.dataset_embeds * prompts).sum(-1).min() > 0.9 and output.name_loss < 0.1


def test_the_mlp_reads_a_fixed_number_in_order():
    model = encoder(pooling="mlp", num_classes=3, num_examples=2)
    mask = torch.ones(1, 3, 2, dtype=torch.bool)
    dataset, of_class = model.encode(examples(1, 3, 2), mask)
    assert dataset.shape == (1, 8) and of_class.shape == (1, 3, 8)
    assert not torch.allclose(model.encode(examples(1, 3, 2).flip(1), mask)[0], dataset)
    with pytest.raises(ValueError, match="reads 2 examples of each of 3 classes, got 1 of 3"):
        model.encode(examples(1, 3, 1), mask[..., :1])


def test_it_is_saved_and_loaded(tmp_path):
    model = encoder()
    model.save_pretrained(tmp_path)
    again, features = DatasetEncoder.from_pretrained(tmp_path).eval(), examples(1, 2, 2)
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    for mine, theirs in zip(model.encode(features, mask), again.encode(features, mask), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not list(tmp_path.glob("*.bin"))


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="`pooling` must be one of .*got 'mean'"):
        DatasetEncoderConfig(pooling="mean")


class TestRidge:
    """Class embeddings that are the rows of a classifier of the examples."""

    @staticmethod
    def model(**settings) -> DatasetEncoder:
        torch.manual_seed(0)
        sizes = SIZES | {"embedding_size": SIZES["feature_size"] + 1}
        return DatasetEncoder(DatasetEncoderConfig(**sizes, num_inducing_points=3, ridge=True, **settings)).eval()

    def test_rows_are_those_of_sklearn(self):
        features = examples(1, 3, 4)
        model = self.model()
        with torch.no_grad():
            rows = model.ridge(features, torch.ones(1, 3, 4, dtype=torch.bool))[0]
        flat = features[0].flatten(0, 1).double()
        origin = 0.5 * flat.mean(0)  # half way to the centre of all sets, which is zero here
        flat = flat - origin
        targets = torch.eye(3).repeat_interleave(4, 0).double() - 1 / 3
        strength = flat.square().sum(1).mean().item()
        known = SklearnRidge(alpha=strength, fit_intercept=False).fit(flat.numpy(), targets.numpy()).coef_
        known = torch.from_numpy(known) / torch.from_numpy(known).norm(dim=1).mean()
        torch.testing.assert_close(rows[:, :-1].double(), known, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rows[:, -1].double(), -(known @ origin), atol=1e-5, rtol=1e-4)

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 2**31), classes=st.integers(2, 5), count=st.integers(1, 4), names=st.booleans())
    def test_order_and_padding_do_not_matter(self, seed, classes, count, names):
        model, features = self.model(reads_names=names), examples(1, classes, count, seed=seed)
        told = examples(1, classes, seed=seed + 1) if names else None
        mask = torch.ones(features.shape[:3], dtype=torch.bool)
        _, rows = model.encode(features, mask, told)
        order, inner = (torch.randperm(size, generator=random(seed)) for size in (classes, count))
        moved_names = None if told is None else told[:, order]
        _, moved = model.encode(features[:, order][:, :, inner], mask, moved_names)
        torch.testing.assert_close(moved, rows[:, order], atol=1e-4, rtol=1e-4)
        wide, wider = F.pad(features, (0, 0, 0, 2, 0, 1)), F.pad(mask, (0, 2, 0, 1))
        padded_names = None if told is None else F.pad(told, (0, 0, 0, 1))
        _, padded = model.encode(wide, wider, padded_names)
        torch.testing.assert_close(padded[:, :classes], rows, atol=1e-4, rtol=1e-4)
        assert not padded[:, classes:].any()

    def test_a_name_is_an_example(self):
        model, features, names = self.model(), examples(1, 3, 2), examples(1, 3, seed=1)
        mask = torch.ones(1, 3, 3, dtype=torch.bool)
        with torch.no_grad():
            # a name weighs as one example, and the strength does not change with the number of examples
            with_names = model.ridge(features, mask[..., :2], names)
            as_examples = model.ridge(torch.cat([features, names[:, :, None]], 2), mask)
        torch.testing.assert_close(with_names, as_examples, atol=1e-5, rtol=1e-4)

    def test_it_needs_a_size_for_weight_and_bias(self):
        with pytest.raises(ValueError, match="`feature_size` \\+ 1 = 7, got 8"):
            DatasetEncoderConfig(**SIZES, ridge=True)

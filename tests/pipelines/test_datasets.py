"""A generator that is shown a dataset: what it sees, what it does not, and which network it makes."""

import pytest
import torch
import torch.nn.functional as F

from hf_weightgen import WeightGenPipeline
from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.pipelines.examples import channels_of
from hf_weightgen.pipelines.pipeline_utils import MismatchWarning
from hf_weightgen.pipelines.request import encode_dataset, told_apart
from hf_weightgen.targets.architectures import HEAD, TargetConfig, TargetModel, mlp
from hf_weightgen.targets.base_models import pack_embeddings
from hf_weightgen.targets.image_encoders import load_image_encoder
from hf_weightgen.weights.tokenization import WeightTokenizer
from pictures import image_encoder, images
from tiny import pipeline, random


SETTINGS = [{"input_shape": [size], "layers": mlp(hidden)} for size, hidden in ((6, 5), (4, 3))]


def encoder_of(feature_size: int) -> DatasetEncoder:
    torch.manual_seed(1)
    return DatasetEncoder(DatasetEncoderConfig(feature_size=feature_size, latent_size=32, hidden_size=16)).eval()


@pytest.fixture(scope="module")
def text_pipe(encoder):
    """Reads datasets of texts, and makes two kinds of networks."""
    zoo = []
    for settings in SETTINGS:
        for classes in (2, 3):
            network = TargetModel(TargetConfig(**settings, num_classes=classes))
            zoo.append({n: torch.randn(t.shape, generator=random(t.numel())) for n, t in network.state_dict().items()})
    pipe = pipeline(encoder, tokenizer=WeightTokenizer.fit(zoo, token_size=6, head=list(HEAD)))
    config = pipe.vae.config
    config.num_body_tokens = pipe.weight_tokenizer.num_all_body_tokens
    torch.manual_seed(0)
    pipe.register_modules(vae=type(pipe.vae)(config).eval(), dataset_encoder=encoder_of(384))
    prompts = {"digits": "which digit is it", "moods": "is the speaker happy"}
    tasks = [
        {"name": name, "family": name, "labels": ["a", "b"], "target": k, "prompt_embeddings": pack_embeddings(encoder.embed([prompt]))}
        for k, (name, prompt) in enumerate(prompts.items())
    ]  # fmt: skip
    targets = [{"kind": "network", "config": settings, "layout": k} for k, settings in enumerate(SETTINGS)]
    pipe.register_to_config(
        target={"kind": "network", "config": SETTINGS[0]},
        targets=targets,
        tasks=tasks,
        far_below=-1.0,
        datasets_above=-1.0,
    )
    pipe._encoder = encoder
    pipe.check_parts()
    return pipe


DATASET = {"good": ["what a film", "lovely", "so much fun"], "bad": ["dull", "a waste"], "odd": ["strange"]}


def weights(pipe, **settings) -> list[dict]:
    return pipe(generator=random(0), **settings).weights


def test_classes_are_rows_of_the_head_and_their_order_is_that_of_the_dataset(text_pipe):
    output = text_pipe(dataset=DATASET, num_samples=2, generator=random(0))
    assert output.labels == [list(DATASET)] * 2
    moved = {name: DATASET[name] for name in ("odd", "good", "bad")}
    vae = text_pipe.vae
    with torch.no_grad():
        vae.class_noise.zero_()
    plain, other = weights(text_pipe, dataset=DATASET)[0], weights(text_pipe, dataset=moved)[0]
    torch.testing.assert_close(other["head.weight"], plain["head.weight"][[2, 0, 1]], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(other["hidden.weight"], plain["hidden.weight"], atol=1e-4, rtol=1e-3)


def test_the_order_of_examples_does_not_matter_and_the_examples_do(text_pipe):
    plain = weights(text_pipe, dataset=DATASET)[0]
    again = weights(text_pipe, dataset={name: own[::-1] for name, own in DATASET.items()})[0]
    changed = weights(text_pipe, dataset=DATASET | {"odd": ["quite usual"]})[0]
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(changed["head.weight"], plain["head.weight"], atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_no_two_classes_of_a_known_task_are_taken_for_the_same(seed):
    known = F.normalize(torch.randn(6, 16, generator=random(seed)), dim=-1)
    order = torch.randperm(6, generator=random(seed))[:4]
    seen = known[order] + 0.05 * torch.randn(4, 16, generator=random(seed + 1))
    seen[1] = 0.6 * known[order[0]] + 0.5 * known[order[1]]  # alone it would be taken for the first
    seen = F.normalize(seen, dim=-1)
    assert (seen @ known.mT).argmax(1).tolist() == [order[0], order[0], *order[2:]]
    assert torch.equal(told_apart(seen[None], known)[0], known[order])


@torch.no_grad()
def test_classes_are_those_of_a_known_task_where_the_dataset_is_of_one(text_pipe, encoder):
    kept, known = text_pipe.config.datasets_above, encoder.embed(["a", "b"])
    two = {"good": DATASET["good"], "bad": DATASET["bad"]}
    try:
        text_pipe.register_to_config(datasets_above=-1.0)
        _, _, classes, _ = encode_dataset(text_pipe, two)
        assert sorted((classes[0] @ known.mT).argmax(1).tolist()) == [0, 1]
        torch.testing.assert_close((classes[0] @ known.mT).amax(1), torch.ones(2))
        _, _, more, _ = encode_dataset(text_pipe, DATASET)  # three classes, and the task has two
        assert (more[0] @ known.mT).max() < 0.9
        text_pipe.register_to_config(datasets_above=1.0)
        _, _, unknown, _ = encode_dataset(text_pipe, two)
        assert (unknown[0] @ known.mT).max() < 0.9
    finally:
        text_pipe.register_to_config(datasets_above=kept)


def test_a_far_dataset_warns_by_a_threshold_of_its_own(text_pipe):
    kept = {name: text_pipe.config[name] for name in ("far_below", "datasets_above")}
    try:
        for settings, kinds in (
            ({"far_below": -1.0, "datasets_above": 1.0}, ["dataset of good, bad"]),
            ({"far_below": 1.0, "datasets_above": -1.0}, ["prompt 'film"]),
            ({"far_below": 1.0, "datasets_above": 1.0}, ["prompt 'film", "dataset of good, bad"]),
        ):
            text_pipe.register_to_config(**settings)
            with pytest.warns(MismatchWarning) as caught:
                text_pipe("film reviews", dataset=DATASET)
            for warning, kind in zip((w for w in caught if w.category is MismatchWarning), kinds, strict=True):
                assert str(warning.message).startswith(f"The {kind}") and warning.filename == __file__
    finally:
        text_pipe.register_to_config(**kept)


def test_a_prompt_beside_a_dataset_counts(text_pipe):
    alone = text_pipe(dataset=DATASET, generator=random(0))
    both = text_pipe("which digit is it", dataset=DATASET, generator=random(0))
    assert both.labels == alone.labels and both.prompts == ["which digit is it"]
    assert not torch.equal(both.latents, alone.latents)


def test_the_nearest_known_task_says_which_network_is_made(text_pipe):
    output = text_pipe(["which digit is it", "is the speaker happy"], generator=random(0))
    for index, settings in enumerate(SETTINGS):
        model = output.to_model(index)
        assert model.config.input_shape == settings["input_shape"]
        assert output.targets[index] == {"kind": "network", "config": settings}
    only = output.select([1])
    assert only.targets == output.targets[1:] and only.to_model().config.input_shape == [4]


def test_images_with_colours_get_a_network_that_reads_colours(text_pipe, encoder):
    kept = text_pipe.config.targets
    prompts = encoder.embed(["which digit is it", "is the speaker happy"])
    try:
        seen = [{"kind": "network", "config": {"input_shape": [n, 8, 8], "layers": []}, "layout": 0} for n in (1, 3)]
        text_pipe.register_to_config(targets=seen)
        for channels, names in (
            (1, ["digits"] * 2),
            (3, ["moods"] * 2),
            (None, ["digits", "moods"]),
            (4, ["digits", "moods"]),
        ):
            assert [near[0][0]["name"] for near in text_pipe.nearest_tasks(prompts, channels)] == names
    finally:
        text_pipe.register_to_config(targets=kept)


def test_channels_are_those_of_the_pictures():
    grey, coloured = images(2, 0), images(1, 0, "RGB")
    assert (
        channels_of([grey, grey]) == 1 and channels_of([grey, coloured]) == 3 and channels_of([["a"], ["b"]]) is None
    )
    assert channels_of([[torch.zeros(1, 4, 4, dtype=torch.uint8)]]) == 1
    assert channels_of([[coloured[0].convert("P")]]) == 3 and channels_of([[grey[0].convert("1")]]) == 1


def test_it_is_saved_and_loaded_with_its_dataset_encoder(text_pipe, encoder, tmp_path):
    text_pipe.save_pretrained(tmp_path)
    again = WeightGenPipeline.from_pretrained(tmp_path)
    again._encoder = encoder
    again.set_progress_bar_config(disable=True)
    for mine, theirs in zip(weights(text_pipe, dataset=DATASET), weights(again, dataset=DATASET), strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor)


def test_images_are_seen_by_the_image_encoder(text_pipe, tmp_path):
    sees = load_image_encoder(image_encoder(tmp_path))
    pipe = type(text_pipe)(**text_pipe.components, **{k: text_pipe.config[k] for k in ("target", "targets", "tasks", "far_below", "datasets_above")}, image_encoder={"id": "acme/eyes"})  # fmt: skip
    pipe.register_modules(dataset_encoder=encoder_of(sees.embed(images(1, 0)).shape[1]))
    pipe.image_encoder, pipe._encoder = sees, text_pipe.encoder
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(dataset={"dark": images(2, 0), "light": images(2, 1)}).weights) == 1
    with pytest.raises(TypeError, match="reads datasets of images, got str"):
        pipe(dataset=DATASET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give `prompt`, `dataset`, or both"),
        ({"dataset": DATASET, "labels": ["a", "b"]}, "names its classes itself"),
        ({"dataset": DATASET, "prompt": ["a", "b"]}, "one `prompt` or none"),
        ({"dataset": DATASET, "prompt_embeds": torch.zeros(1, 384)}, "no `prompt_embeds`"),
        ({"dataset": {"a": images(1, 0), "b": images(1, 1)}}, "reads datasets of texts"),
        ({"dataset": {"a": [torch.full((384,), torch.nan)], "b": [torch.ones(384)]}}, "NaN, infinite"),
        ({"dataset": {"a": [torch.full((384,), 1e30)], "b": [torch.ones(384)]}}, "NaN, infinite"),
        ({"dataset": {"a": [torch.ones(384)], "b": [torch.ones(3)]}}, "features of size 384, got 3, 384"),
        ({"dataset": {"a": ["x"], "A": ["y"]}}, "'a' twice"),
        ({"dataset": {"a\ud800": ["x"], "b": ["y"]}}, "lone surrogate"),
        ({"prompt": "which digit is it", "labels": ["a\ud800", "b"]}, "lone surrogate"),
    ],
)
def test_what_does_not_go_together_is_refused(text_pipe, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        text_pipe(**arguments)


def test_a_generator_without_dataset_encoder_says_so(encoder):
    with pytest.raises(ValueError, match="no dataset encoder"):
        pipeline(encoder)(dataset=DATASET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": []}, "`targets` must list 1 to"),
        ({"targets": [{"kind": "network", "config": SETTINGS[0], "layout": -1}]}, "`layout` must be the number"),
        ({"targets": [{"kind": "network", "config": SETTINGS[0], "layout": 7}]}, "layout 7"),
        ({"targets": [{"kind": "network", "config": SETTINGS[1], "layout": 0}]}, "another network"),
        (
            {"targets": [{"kind": "network", "config": SETTINGS[0], "layout": 0, "num_classes": 10**9}]},
            "`num_classes` must be",
        ),
        (
            {"targets": [{"kind": "network", "config": SETTINGS[0], "layout": 0, "num_classes": 0}]},
            "`num_classes` must be",
        ),
        ({"image_encoder": {"id": "../x"}}, "`image_encoder` must name a model"),
    ],
)
def test_wrong_targets_are_told(text_pipe, change, message):
    kept = {name: text_pipe.config[name] for name in ("targets", "tasks", "image_encoder")}
    try:
        text_pipe.register_to_config(tasks=[t | {"target": 0} for t in kept["tasks"]], **change)
        with pytest.raises(ValueError, match=message):
            text_pipe.check_parts()
    finally:
        text_pipe.register_to_config(**kept)

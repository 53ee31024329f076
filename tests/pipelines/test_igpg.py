"""IGPG's pipeline: adapters and networks of several architectures from one generator, the same from disk, faults by name."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from hf_weightgen import IGPGPipeline, LayoutMismatchError, WeightGenPipeline
from hf_weightgen.hub.untrusted import UntrustedFileError
from hf_weightgen.models import modeling_igpg
from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_igpg import IGPGConfig, IGPGPrior
from hf_weightgen.models.modeling_weight_vqvae import WeightVQVAE, WeightVQVAEConfig
from hf_weightgen.pipelines.pipeline_utils import MismatchWarning
from hf_weightgen.targets.architectures import TargetConfig, TargetModel, mlp
from hf_weightgen.targets.mixed import in_words, target_of
from hf_weightgen.weights.layout import Layout
from hf_weightgen.weights.pieces import Pieces
from hf_weightgen.weights.resize import resized
from hf_weightgen.weights.unseen import with_layout
from tiny import SIZES, adapter, igpg_pipeline, random


@pytest.fixture
def pipe(encoder) -> IGPGPipeline:
    pipe = igpg_pipeline(encoder)
    pipe._encoder = encoder
    return pipe


def weights_are_equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_one_generator_makes_adapters_and_networks_of_the_architecture_that_is_asked_for(pipe):
    output = pipe(["sentiment on SST-2", "which digit is it"], num_samples=2, generator=random(0))
    assert output.tasks == ["sst2", "sst2", "digits", "digits"]
    assert [target["kind"] for target in output.targets] == ["adapter", "adapter", "network", "network"]
    assert output.targets[2]["name"] == "small"
    assert output.latents.shape[::2] == (4, 2) and (output.latents[2:, -1] == -1).all()
    assert output.weights[0].keys() == adapter(0).keys()
    for name, hidden in SIZES.items():
        made = pipe("which digit is it", architecture=name, generator=random(0))
        logits = made.to_model(0)(torch.randn(2, 7)).logits
        assert logits.shape == (2, 3) and made.targets[0]["name"] == name
        assert len([key for key in made.weights[0] if key.endswith("weight")]) == len(hidden) + 1


def test_samples_are_their_own_in_any_call_and_seeds_tell_them_apart(pipe):
    several = pipe("which digit is it", num_samples=3, generator=random(0))
    single = pipe("which digit is it", generator=random(0))
    assert torch.equal(several.latents[:1], single.latents)
    torch.testing.assert_close(
        several.weights[0], single.weights[0]
    )  # a batch of another size is summed in another order
    assert not torch.equal(several.latents[0], several.latents[1])
    likeliest = pipe("which digit is it", num_samples=2, temperature=0)
    assert torch.equal(likeliest.latents[0], likeliest.latents[1])
    assert torch.equal(likeliest.latents, pipe("which digit is it", num_samples=2, top_k=1).latents)


def test_codes_decode_to_the_weights(pipe):
    output = pipe("which digit is it", generator=random(0))
    codes = pipe("which digit is it", generator=random(0), output_type="codes")
    assert codes.weights == [] and torch.equal(codes.latents, output.latents)
    class_embeds = pipe.encoder.embed(output.labels[0])[None]
    assert weights_are_equal(pipe.decode_codes(codes.latents, 1, class_embeds)[0], output.weights[0])


def test_weights_become_the_codes_that_training_sees(pipe):
    made = pipe("which digit is it", num_samples=2, generator=random(0))
    codes, layout, class_embeds = pipe.encode_weights(made.weights, made.labels[0])
    assert layout == 1 and codes.shape == made.latents.shape and codes.min() >= 0
    data = pipe.weight_tokenizer(made.weights)
    pieces = Pieces(pipe.weight_tokenizer, 1, 3, pipe.vqvae.config.token_size)
    names = F.pad(class_embeds, (0, 0, pipe.weight_tokenizer.num_body_tokens(1), 0))[:, pieces.token].expand(2, -1, -1)
    own = {key: pieces.cut(data[key]) for key in ("weight_tokens", "padding_mask")}
    own |= {"class_parts": pieces.of_class.expand(2, -1), "descriptors": pieces.describe().expand(2, -1, -1)}
    assert torch.equal(codes, pipe.vqvae(**own, name_embeds=names).codes)
    large = pipe("which digit is it", architecture="large").weights
    with pytest.raises(LayoutMismatchError, match="names 2 classes, the networks have .3."):
        pipe.encode_weights(made.weights, ["a", "b"])
    with pytest.raises(LayoutMismatchError, match="one layout are encoded together"):
        pipe.encode_weights([*made.weights, *large], made.labels[0])


@pytest.mark.parametrize("window", [2, 5, 512])
def test_a_stream_of_tensors_is_the_network(pipe, window):
    pipe.vqvae.config.window = window
    output = pipe("which digit is it", architecture="large", generator=random(0))
    class_embeds = pipe.encoder.embed(output.labels[0])[None]
    codes = output.latents[0][output.latents[0, :, 0] >= 0]
    streamed = dict(pipe.stream_codes(codes, 2, class_embeds))
    assert streamed.keys() == output.weights[0].keys()
    for name, tensor in output.weights[0].items():
        torch.testing.assert_close(streamed[name], tensor)
    with pytest.raises(LayoutMismatchError, match="with these classes has .* tokens, got codes of"):
        dict(pipe.stream_codes(codes[:-1], 2, class_embeds))


def test_noise_is_a_samples_own_and_the_same_in_files(pipe, tmp_path):
    """With a decoder that has learned noise."""
    before, settings = pipe.vqvae, {"learns_noise": True, "num_places": 9, "window": 4}
    pipe.vqvae = WeightVQVAE(WeightVQVAEConfig(**before.config.to_diff_dict() | settings)).eval()
    asked = {"prompt": "which digit is it", "architecture": "large"}
    two = pipe(**asked, num_samples=2, generator=random(0))
    one = pipe(**asked, generator=random(0))
    torch.testing.assert_close(two.weights[0], one.weights[0])
    class_embeds = pipe.encoder.embed(one.labels[0])[None]
    (mean,) = pipe.decode_codes(one.latents, 2, class_embeds)
    assert not weights_are_equal(mean, one.weights[0])
    pipe(**asked, generator=random(0), output_type="codes", save_directory=tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert files.keys() == one.weights[0].keys()
    for name, tensor in files.items():
        torch.testing.assert_close(tensor, one.weights[0][name])
    likeliest = pipe(**asked, num_samples=2, temperature=0)
    assert weights_are_equal(*likeliest.weights)  # without noise


def test_what_goes_to_files_is_never_described_as_a_whole(pipe, tmp_path, monkeypatch):
    asked = {"prompt": "which digit is it", "architecture": "large", "generator": random(0)}
    expected, described, seen = pipe(**asked).weights[0], Pieces.described, []
    pipe.vqvae.config.window = 4
    monkeypatch.setattr(modeling_igpg, "AT_ONCE", 4)
    config = pipe.prior.config
    config.max_position_embeddings, config.tail = 5 + 4 * config.codes_per_token, 2

    def spied(self, class_embeds, part=slice(None)):
        seen.append(part.stop - part.start)  # of a whole network there is neither
        return described(self, class_embeds, part)

    monkeypatch.setattr(Pieces, "described", spied)
    pipe(**asked | {"output_type": "codes"}, save_directory=tmp_path)
    assert max(seen) <= 5 and load_file(tmp_path / "model.safetensors").keys() == expected.keys()


def test_what_is_in_the_folder_of_shards_stays_but_for_earlier_shards(pipe, tmp_path):
    asked = {"prompt": "which digit is it", "architecture": "large", "output_type": "codes"}
    pipe(**asked, save_directory=tmp_path, shard_size=100)
    (tmp_path / "model_best.safetensors").write_text("mine")
    (tmp_path / "model.safetensors.d").mkdir()
    pipe(**asked, save_directory=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors", "model.safetensors.d", "model_best.safetensors",
    ]  # fmt: skip
    (tmp_path / "0003").mkdir()
    for place, message in ((tmp_path, "holds the sample '0003'"), (tmp_path / "model_best.safetensors", "is a file")):
        with pytest.raises(ValueError, match=message):
            pipe(**asked, save_directory=place)


@pytest.mark.parametrize("shard_size, files", [(10**6, 1), (100, 4)])
def test_networks_are_written_shard_by_shard(pipe, tmp_path, shard_size, files):
    asked = {"prompt": "which digit is it", "architecture": "large"}
    whole = pipe(**asked, generator=random(0))
    output = pipe(**asked, generator=random(0), output_type="codes", save_directory=tmp_path, shard_size=shard_size)
    assert output.weights == [] and len(list(tmp_path.glob("*.safetensors"))) == files
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}
    model = whole.to_model(0)
    model.config.save_pretrained(tmp_path)
    again = TargetModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)
    several = pipe(**asked, num_samples=2, output_type="codes", save_directory=tmp_path / "two")
    assert several.weights == [] and len(list((tmp_path / "two").glob("000[01]/model.safetensors"))) == 2
    with pytest.raises(ValueError, match="`shard_size` must be a whole number of bytes"):
        pipe(**asked, output_type="codes", save_directory=tmp_path, shard_size=0)


@pytest.mark.parametrize("label_count", [2, 5])
def test_any_number_of_classes(pipe, label_count):
    labels = [f"class {k}" for k in range(label_count)]
    output = pipe("which digit is it", labels=labels, generator=random(0))
    assert output.to_model(0).config.id2label == dict(enumerate(labels))


def test_a_dataset_asks_in_the_place_of_a_prompt_or_beside_one(pipe):
    torch.manual_seed(0)
    encoder = DatasetEncoder(DatasetEncoderConfig(feature_size=6, hidden_size=16, latent_size=4)).eval()
    pipe.register_modules(dataset_encoder=encoder)
    dataset = {name: list(torch.randn(2, 6, generator=random(k))) for k, name in enumerate(("cat", "dog"))}
    with pytest.warns(MismatchWarning, match="dataset of cat, dog is far from every task"):
        shown = pipe(dataset=dataset, generator=random(0))
    with pytest.warns(MismatchWarning, match="dataset of cat, dog is far from every task"):
        both = pipe("which digit is it", dataset=dataset, generator=random(0))
    alone = pipe("which digit is it", labels=["cat", "dog"], generator=random(0))
    assert shown.labels == both.labels == [["cat", "dog"]] and both.tasks == alone.tasks == ["digits"]
    assert not weights_are_equal(both.weights[0], alone.weights[0])


def test_known_pairs_are_ranked_by_what_the_generator_would_write(pipe):
    for parameter in (
        *pipe.prior.condition_in.parameters(),
        *pipe.prior.model.parameters(),
        pipe.prior.lm_head.weight,
    ):
        parameter.data *= 5  # untrained, the condition would hardly count
    ranked = pipe.rank("which digit is it")
    assert {(pair["task"], pair["architecture"]) for pair in ranked} == {
        ("sst2", None), ("digits", "small"), ("digits", "large"),
    }  # fmt: skip
    assert [pair["score"] for pair in ranked] == sorted((pair["score"] for pair in ranked), reverse=True)
    assert ranked[0]["task"] == ranked[1]["task"] == "digits" and ranked[1]["score"] > 0 > ranked[2]["score"]
    assert ranked[0]["score"] <= math.log(2) + 1e-6  # of two tasks
    assert pipe.rank("sentiment on SST-2")[0]["task"] == "sst2"
    assert pipe.rank("which digit is it") == ranked  # whatever was asked before
    with torch.no_grad():
        pipe.prior.lm_head.weight.mul_(-1)
    other = pipe.rank("which digit is it")
    assert other != ranked
    assert pipe.rank("which digit is it") == other  # nothing of the former weights was left
    with pytest.raises(TypeError, match="`prompt` must be one text, got list"):
        pipe.rank(["which digit is it", "sentiment on SST-2"])


def test_saved_and_loaded_it_makes_the_same_weights(pipe, encoder, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = WeightGenPipeline.from_pretrained(tmp_path)
    assert type(again) is IGPGPipeline and not list(tmp_path.rglob("generation_config.json"))
    again._encoder = encoder
    first, second = (p(["sentiment on SST-2", "which digit is it"], generator=random(3)) for p in (pipe, again))
    assert all(weights_are_equal(*pair) for pair in zip(first.weights, second.weights, strict=True))
    (tmp_path / "prior" / "generation_config.json").write_text("{}")
    with pytest.raises(UntrustedFileError, match="generation_config.json"):
        WeightGenPipeline.from_pretrained(tmp_path)


def test_parts_of_different_generators_are_refused(pipe, tmp_path):
    config = IGPGConfig(
        num_codes=8,
        codes_per_token=2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    pipe.register_modules(prior=IGPGPrior(config))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_codes` of the autoencoder is 16, of the prior 8"):
        WeightGenPipeline.from_pretrained(tmp_path)
    config = IGPGConfig(**config.to_dict() | {"num_codes": 16, "num_places": 3})
    pipe.register_modules(prior=IGPGPrior(config))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"`num_places` of the autoencoder is {pipe.vqvae.config.num_places}, of the prior 3"
    ):
        WeightGenPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "`temperature` must be a number from 0 to 100, got -1"),
        ({"top_k": 1.5}, "`top_k` must be a whole number of at least 0, got 1.5"),
        ({"top_p": 0}, "`top_p` must be a number above 0 and up to 1, got 0"),
        ({"top_p": True}, "`top_p` must be a number above 0 and up to 1, got True"),
        ({"output_type": "latent"}, "`output_type` must be 'weights' or 'codes', got 'latent'"),
        ({"architecture": "resnet20"}, "must be one of \\['small', 'large'\\], got 'resnet20'"),
        ({"save_directory": "nowhere"}, "`output_type` must be 'codes'"),
        ({"num_samples": 0}, "`num_samples` must be a whole number of at least 1, got 0"),
    ],
)
def test_faults_name_what_came(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe("which digit is it", **settings)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vqvae/config.json", {"num_layers": 10**9}, "'num_layers' is 1,000,000,000, the weights beside it are of"),
        ("prior/config.json", {"rms_norm_eps": math.nan}, "'rms_norm_eps' is nan, expected a finite number"),
        ("prior/config.json", {"is_encoder_decoder": True}, "'is_encoder_decoder' is True, which no IGPGPrior is"),
        ("prior/config.json", {"output_attentions": True}, "'output_attentions' is True"),
        ("prior/config.json", {"eos_token_id": 0}, "`eos_token_id` must be absent"),
        ("vqvae/config.json", {"window": 0}, "`window` must be at least 1, got 0"),
    ],
)
def test_settings_that_would_break_calls_are_refused_before_anything_is_built(pipe, tmp_path, file, change, message):
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(config | change))
    with pytest.raises(UntrustedFileError, match=message):
        WeightGenPipeline.from_pretrained(tmp_path)


def test_the_cache_is_a_setting_of_calls_alone(pipe, encoder, tmp_path):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "prior" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_cache": False}))
    again = WeightGenPipeline.from_pretrained(tmp_path)
    again._encoder = encoder
    asked = {"prompt": "which digit is it", "output_type": "codes", "num_samples": 3}
    assert torch.equal(again(**asked, generator=random(0)).latents, pipe(**asked, generator=random(0)).latents)


def test_a_variant_is_saved_beside_the_plain_form(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    for part in ("prior", "vqvae"):
        dtypes = [
            {t.dtype for t in load_file(file).values() if t.is_floating_point()}
            for file in sorted((tmp_path / part).glob("*.safetensors"))
        ]
        assert dtypes == [{torch.float16}, {torch.float32}]
    with pytest.raises(ValueError, match="`max_shard_size` is not supported"):
        pipe.save_pretrained(tmp_path, max_shard_size="1MB")


def test_a_layout_without_tensors_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "weight_tokenizer" / "preprocessor_config.json"
    config = json.loads(file.read_text())
    config["layouts"][pipe.targets[-1]["layout"]] = []
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="which has no tensors"):
        WeightGenPipeline.from_pretrained(tmp_path)


def test_the_coldest_samples_are_the_likeliest_codes(pipe):
    likeliest = pipe("which digit is it", temperature=0, output_type="codes").latents
    for temperature in (1e-45, 1e-30, 1e-7):
        asked = {"temperature": temperature, "output_type": "codes", "generator": random(1)}
        assert torch.equal(pipe("which digit is it", **asked).latents, likeliest)


@pytest.mark.parametrize("name", ["", "a\nb", 3, None, ["x"], "x" * 500])
def test_a_name_of_an_architecture_is_a_line_of_text(pipe, name):
    with pytest.raises(ValueError, match="`name` must be a short line of text"):
        pipe.with_architecture(Own(9), name)


class Own(nn.Module):
    """A network that no generator knows, with a buffer of its own."""

    def __init__(self, hidden: int, classes: int = 3):
        super().__init__()
        self.first, self.last = nn.Linear(7, hidden), nn.Linear(hidden, classes)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, inputs):
        return self.last(torch.relu(self.first(inputs * self.scale)))


@pytest.mark.parametrize("hidden", [9, 500])
def test_any_module_gets_weights(pipe, hidden):
    module = Own(hidden)  # a row of 500 does not fit into a token: the head then is cut as other tensors are
    output = pipe("which digit is it", architecture=module, num_samples=2, generator=random(0))
    made = output.to_model(1)
    assert type(made) is Own and made is not module and made.scale == 2
    assert weights_are_equal(dict(made.named_parameters()), output.weights[1])
    assert output.weights[0]["first.weight"].shape == (hidden, 7) and not weights_are_equal(*output.weights)
    scale = output.weights[0]["first.weight"].std() / pipe("which digit is it").weights[0]["hidden.weight"].std()
    assert 0.2 < scale < 5
    assert len(pipe.targets) == 3
    with pytest.raises(ValueError, match="module of your own"):
        output.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="has 3 outputs, asked for are 2 classes"):
        pipe("which digit is it", labels=["a", "b"], architecture=module)


def test_modules_are_told_apart(pipe):
    named = pipe.with_architecture(Own(9), "nine").with_architecture(Own(8), "eight")
    for name, hidden in (("nine", 9), ("eight", 8)):
        output = named("which digit is it", architecture=name)
        assert output.to_model(0).first.weight.shape == (hidden, 7)
        assert weights_are_equal(dict(output.to_model(0).named_parameters()), output.weights[0])
    given = pipe.with_architecture(Own(9))("which digit is it", architecture=Own(4))
    assert given.to_model(0).first.weight.shape == (4, 7)
    assert weights_are_equal(dict(given.to_model(0).named_parameters()), given.weights[0])
    for taken in ("small", "nine"):
        with pytest.raises(ValueError, match=f"has an architecture '{taken}' already"):
            named.with_architecture(Own(3), taken)


def test_modules_are_not_saved(pipe, tmp_path):
    with pytest.raises(ValueError, match="'given' is a module of yours"):
        pipe.with_architecture(Own(9)).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_normalisation_of_a_module_starts_about_as_torch_has_it(pipe):
    module = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    made = pipe("which digit is it", architecture=module, generator=random(0)).to_model(0)
    assert (made[1].weight - 1).abs().max() < 0.1 and made[1].bias.abs().max() < 1
    assert torch.equal(made[1].running_var, torch.ones(5)) and made(torch.randn(4, 7)).shape == (4, 3)


def test_in_half_precision_it_writes_and_ranks(pipe):
    pipe.to(torch.bfloat16)
    output = pipe("which digit is it", architecture="large", generator=random(0))
    assert output.to_model(0)(torch.randn(2, 7)).logits.isfinite().all()
    assert len(pipe.rank("which digit is it")) == 3


def test_unseen_architectures_by_their_config(pipe, tmp_path):
    for hidden in ((5, 5, 5), (3,), (700,)):
        config = TargetConfig(input_shape=[7], layers=mlp(*hidden), num_classes=3, activation="relu")
        made = pipe("which digit is it", architecture=config, generator=random(0)).to_model(0)
        assert made.config.activation == "relu" and made(torch.randn(2, 7)).logits.shape == (2, 3)
    wider = pipe.with_architecture(config, name="wide")
    assert [target["name"] for target in wider.targets[1:]] == ["small", "large", "wide"]
    wider.save_pretrained(tmp_path)
    again = IGPGPipeline.from_pretrained(tmp_path)
    again._encoder = pipe.encoder
    outputs = [p("which digit is it", architecture="wide", generator=random(1)) for p in (wider, again)]
    torch.testing.assert_close(outputs[0].weights[0], outputs[1].weights[0])


@pytest.mark.parametrize("hidden, like", [((8,), "small"), ((3,), "small"), ((4, 4), "small"), ((6, 7), "large")])
def test_sizes_that_no_network_has_are_given_to_a_known_one(pipe, hidden, like, tmp_path):
    config = TargetConfig(input_shape=[7], layers=mlp(*hidden), num_classes=3)
    made = pipe("which digit is it", architecture=config, num_samples=2, generator=random(0))
    known = pipe("which digit is it", architecture=like, num_samples=2, generator=random(0))
    assert torch.equal(made.latents, known.latents)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.to_model(0).state_dict().items()}
    for own, other in zip(made.weights, known.weights, strict=True):
        expected = resized(other, shapes)
        assert own.keys() == expected.keys() == shapes.keys()
        torch.testing.assert_close(own, expected)
    if like == "small" and hidden == (8,):
        inputs = torch.randn(4, 7, generator=random(1))
        torch.testing.assert_close(made.to_model(1)(inputs).logits, known.to_model(1)(inputs).logits)
    pipe("which digit is it", architecture=config, generator=random(0), output_type="codes", save_directory=tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), made.weights[0], rtol=1e-4, atol=1e-5)
    direct = pipe.with_architecture(config, "new", resize=False)
    own = direct("which digit is it", architecture="new", num_samples=2, generator=random(0))
    assert {name: tuple(t.shape) for name, t in own.weights[0].items()} == shapes
    assert own.latents.shape != known.latents.shape or not torch.equal(
        own.weights[0]["head.weight"], made.weights[0]["head.weight"]
    )


def test_only_known_networks_are_resized_and_by_value_as_by_name(pipe, tmp_path):
    sizes = {
        name: TargetConfig(input_shape=[7], layers=mlp(size), num_classes=3)
        for name, size in (("wide", 9), ("wider", 10))
    }
    wide = pipe.with_architecture(sizes["wide"], "wide")
    itself = pipe.with_architecture(sizes["wide"], "itself", resize=False)
    for more in (wide, itself):
        assert more.with_architecture(sizes["wider"], "wider").targets[-1]["like"] == 1
    wide.with_architecture(sizes["wider"], "wider").save_pretrained(tmp_path)
    IGPGPipeline.from_pretrained(tmp_path)
    outputs = [
        p("which digit is it", architecture=asked, generator=random(2))
        for p in (pipe, wide, itself)
        for asked in ([sizes["wide"], "wide"] if p is wide else [sizes["wide"]])
    ]
    for output in outputs:
        assert weights_are_equal(output.weights[0], outputs[0].weights[0])
        assert output.targets[0]["resized_from"] == "small"
    assert "resized_from" not in itself("which digit is it", architecture="itself", generator=random(2)).targets[0]


def test_resized_architectures_are_saved_and_what_they_are_like_is_checked(pipe, tmp_path):
    wider = pipe.with_architecture(TargetConfig(input_shape=[7], layers=mlp(9), num_classes=3), "wide")
    assert wider.targets[-1]["like"] == 1
    wider.save_pretrained(tmp_path)
    again = IGPGPipeline.from_pretrained(tmp_path)
    again._encoder = pipe.encoder
    outputs = [p("which digit is it", architecture="wide", generator=random(1)) for p in (wider, again)]
    torch.testing.assert_close(outputs[0].weights[0], outputs[1].weights[0])
    assert "like" not in outputs[0].targets[0] and outputs[0].targets[0]["resized_from"] == "small"
    assert [row["architecture"] for row in again.rank("which digit is it") if row["task"] == "digits"].count(
        "wide"
    ) == 1
    index = json.loads((tmp_path / "model_index.json").read_text())
    for like in (0, 2, 3, 7, -1, True, "small", 1.0, {}):
        index["targets"][3]["like"] = like
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises((ValueError, UntrustedFileError), match="in the sizes of which no network like"):
            IGPGPipeline.from_pretrained(tmp_path)


def test_known_architectures_by_their_config_are_the_known_ones(pipe):
    by_name = pipe("which digit is it", architecture="large", generator=random(0))
    config = by_name.to_model(0).config
    by_config = pipe("which digit is it", architecture=config, generator=random(0))
    torch.testing.assert_close(by_config.weights[0], by_name.weights[0])


@pytest.mark.parametrize(
    "architecture, error, message",
    [
        (TargetConfig(input_shape=[8], layers=mlp(3)), ValueError, "No task of this generator has networks that read"),
        (nn.ReLU(), ValueError, "at least 2 parameters, .* got 0 of them"),
        (nn.Linear(7, 3, bias=False), ValueError, "at least 2 parameters, .* got 1 of them"),
        (nn.Conv3d(7, 3, 1), ValueError, r"'weight' is torch.float32 of shape \(3, 7, 1, 1, 1\)"),
        (nn.Linear(9, 3), ValueError, r"No task .* whose first weight takes 9 inputs; theirs read \(7,\)"),
        (nn.ParameterList([torch.zeros(()), torch.zeros(())]), ValueError, "whose first weight takes 0 inputs"),
        (nn.Sequential(nn.Embedding(9, 7), nn.Linear(7, 3)), ValueError, "No task of this generator has networks"),
        (nn.Sequential(nn.Conv2d(7, 3, 1), nn.Linear(7, 3)), ValueError, "no network that this generator knows has"),
        (nn.Sequential(nn.Linear(7, 3), nn.Conv1d(3, 3, 2)), ValueError, "no network that this generator knows has"),
        (7, ValueError, "`architecture` of the task"),
    ],
)
def test_architectures_that_do_not_fit(pipe, architecture, error, message):
    with pytest.raises(error, match=message):
        pipe("which digit is it", architecture=architecture)


def test_a_module_that_a_task_cannot_have_is_told_with_what_it_reads(pipe):
    with pytest.raises(
        ValueError, match=r"'sst2' must be none.*got 'given', which other tasks have \(network: linear 9\)"
    ):
        pipe("sentiment on SST-2", architecture=Own(9))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.Flatten(), nn.Linear(9, 3)),
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(6, 3)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(49, 4)), nn.Linear(4, 3)),
    ],
)
def test_the_first_layer_of_a_module_tells_what_it_reads(module):
    *_, reads = target_of(module, 77)
    fitting = [shape for shape in ([1, 7, 7], [3, 7, 7], [7], [1]) if reads(shape)]
    first = next(iter(module))
    assert fitting == [[getattr(first, "in_channels", 1), 7, 7]]


def test_a_known_network_has_its_own_activation(pipe):
    known = pipe.targets[1]["config"]
    alike, other = (TargetConfig(**known | {"activation": name}, num_classes=3) for name in ("tanh", "relu"))
    assert pipe.with_architecture(alike, "new").targets[-1]["layout"] == pipe.targets[1]["layout"]
    with pytest.raises(ValueError, match="knows has the activation 'tanh', .* than with 'relu'"):
        pipe("which digit is it", architecture=other)


def test_a_whole_network_is_another_one_than_its_part(pipe):
    config = TargetConfig(input_shape=[7], layers=mlp(4), num_classes=3)
    state = {name: t for name, t in TargetModel(config).state_dict().items() if name.startswith("hidden")}
    tokenizer, number = with_layout(pipe.weight_tokenizer, Layout.of(state, ()))
    targets = [*pipe.targets]
    targets[1] = {**targets[1], "layout": number}
    parts = {**pipe.components, "weight_tokenizer": tokenizer}
    told = {"target": targets[0], "targets": targets, "tasks": pipe.config.tasks, "encoder": pipe.config.encoder}
    partial = IGPGPipeline(**parts, **told)
    partial._encoder = pipe.encoder
    made = partial("which digit is it", architecture=config, generator=random(0))
    assert made.to_model(0)(torch.randn(2, 7)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="a part of a network, without 'head.weight'"):
        partial("which digit is it", architecture="small").to_model(0)


def test_embeddings_of_prompts_have_unit_length(pipe):
    embeds = pipe.encoder.embed(["sentiment on SST-2"])
    assert pipe(prompt_embeds=embeds.half()).tasks == ["sst2"]
    with pytest.raises(ValueError, match="must hold rows of length 1, .* got 50"):
        pipe(prompt_embeds=embeds * 50)


def test_what_an_unnamed_network_is_called_is_taken(pipe):
    targets = [{key: value for key, value in target.items() if key != "name"} for target in pipe.targets[:2]]
    tasks = [{**task, "targets": [k]} for k, task in enumerate(pipe.config.tasks)]
    told = {"target": targets[0], "targets": targets, "tasks": tasks, "encoder": pipe.config.encoder}
    unnamed = IGPGPipeline(**pipe.components, **told)
    unnamed._encoder = pipe.encoder
    with pytest.raises(ValueError, match="has an architecture 'default' already"):
        unnamed.with_architecture(Own(9), "default")
    assert unnamed.with_architecture(Own(9), "own").targets[1]["name"] == "default"


def test_pairs_that_a_call_would_refuse_are_not_ranked(pipe):
    more = pipe.with_architecture(Own(500, classes=2), "two").with_architecture(Own(500), "three")
    assert {row["architecture"] for row in more.rank("which digit is it")} == {None, "small", "large", "three"}


def test_targets_in_words_are_told_apart(pipe):
    words = [in_words(target) for target in pipe.targets]
    assert words[0] == "LoRA adapter of rank 4 on query, value of all-MiniLM-L6-v2"
    assert words[2] == "network for inputs of 7, tanh; linear 6, linear 5"
    embeds = pipe.encoder.embed(words)
    assert (F.normalize(embeds, dim=-1) @ F.normalize(embeds, dim=-1).mT - torch.eye(3)).max() < 0.999

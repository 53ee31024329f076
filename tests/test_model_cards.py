"""The cards in `model_cards/` are what the renderer makes of today's generator, code and zoo."""

import importlib.util
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard

from hf_weightgen import WeightGenPipeline
from hf_weightgen.targets.base_models import MINILM, load_tokenizer


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
ARCHITECTURES = "tiny-cnn", "mlp", "small-lenet"
NAMES = [
    "code-generator", "network", "network-generator", "text-adapter", "text-code-generator", "text-generator", "text-zoo",
]  # fmt: skip


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("render_cards", ROOT / "examples" / "render_cards.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = tmp_path_factory.mktemp("cards")
    script.render(out, CARDS / "text-zoo")
    return out


def lines(path: Path) -> list[str]:
    """Without the line that tells the version of whoever rendered it."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("- made with:")]


def test_every_card_is_rendered():
    assert sorted(path.parent.name for path in CARDS.glob("*/README.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_what_the_renderer_makes(name, rendered):
    assert lines(CARDS / name / "README.md") == lines(rendered / name / "README.md"), (
        "render them again: python examples/render_cards.py model_cards"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_what_the_hub_reads(name):
    card = (DatasetCard if name == "text-zoo" else ModelCard).load(CARDS / name / "README.md")
    assert card.data.license == "apache-2.0" and "hf_weightgen" in card.data.tags and "## Limits" in card.text
    assert f"hf-weightgen/{name}" in card.text
    if name not in ("code-generator", "network", "network-generator"):
        assert "all-MiniLM-L6-v2" in card.data.to_yaml()
    if name in ("text-generator", "text-code-generator"):
        results = {result.dataset_name: result for result in card.data.eval_results}
        assert len(results) == 26 and card.data.library_name == "hf_weightgen" and card.data.datasets
    if name == "network-generator":
        assert {result.dataset_name for result in card.data.eval_results} == {
            "mnist",
            "fashion_mnist",
            "svhn",
            "cifar10",
        }
    if name == "code-generator":
        pairs = [f"{task} ({net})" for task in ("mnist", "fashion_mnist", "svhn", "cifar10") for net in ARCHITECTURES]
        assert {result.dataset_name for result in card.data.eval_results} == set(pairs)
    if name == "text-adapter":
        assert card.data.library_name == "peft" and card.data["base_model_relation"] == "adapter"


def test_the_published_generator_of_networks_makes_networks():
    folder = CARDS / "network-generator"
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 10e6
    pipe = WeightGenPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for task, channels in (("digits of MNIST", 1), ("objects of CIFAR-10", 3)):
        output = pipe(task, num_samples=2, generator=torch.Generator().manual_seed(0))
        logits = [output.to_model(i)(torch.rand(3, channels, 28, 28)).logits for i in range(2)]
        assert logits[0].shape == (3, 10) and not torch.allclose(logits[0], logits[1])


def test_the_published_generator_of_codes_makes_networks_of_all_its_architectures():
    folder = CARDS / "code-generator"
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 10e6
    pipe = WeightGenPipeline.from_pretrained(folder)
    for name in ARCHITECTURES:
        output = pipe("digits of MNIST", architecture=name, num_samples=2, generator=torch.Generator().manual_seed(0))
        models = [output.to_model(i) for i in range(2)]
        logits = [model(torch.rand(3, *model.config.input_shape)).logits for model in models]
        assert logits[0].shape == (3, 10) and not torch.allclose(*logits) and output.targets[0]["name"] == name


def test_the_published_generator_of_codes_of_adapters_makes_adapters():
    folder = CARDS / "text-code-generator"
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 10e6
    pipe = WeightGenPipeline.from_pretrained(folder)
    output = pipe("sentiment on SST-2", num_samples=2, generator=torch.Generator().manual_seed(0))
    bundled = WeightGenPipeline.from_pretrained("bundled")
    assert output.targets[0]["lora"] == bundled.config.target["lora"]
    assert not torch.equal(*(torch.cat([t.flatten() for t in one.values()]) for one in output.weights))
    texts = ["a gripping, funny film", "dull and far too long"]
    tokens = load_tokenizer(MINILM)(texts, padding=True, return_tensors="pt")
    for index in range(2):
        assert output.to_model(index)(**tokens).logits.argmax(-1).tolist() == [1, 0]

"""Sources as one: every row is the network that it was, and every loss and score is asked about its own."""

import pytest
import torch
import torch.nn.functional as F

from hf_weightgen.models.modeling_dataset_encoder import DatasetEncoder, DatasetEncoderConfig
from hf_weightgen.models.modeling_weight_vqvae import LEAST_SPREAD, WeightVQVAE, WeightVQVAEConfig
from hf_weightgen.targets.functional import BIAS, WEIGHT
from hf_weightgen.training.batches import FEW_CLASSES, StepRandom, ZooTensors
from hf_weightgen.training.igpg import (
    OF_SPREAD,
    DecoderLoss,
    fit_names,
    fit_places,
    prior_loss,
    shown_datasets,
    wide_heads,
)
from hf_weightgen.training.joined_source import joined
from hf_weightgen.training.sources import Source, known_tasks
from hf_weightgen.weights.pieces import Pieces, num_places
from hf_weightgen.weights.tokenization import WeightTokenizer
from tiny import LORA, MINILM, adapter, random


WIDE = FEW_CLASSES + 2
TASKS = {
    "images": {"light": 3, "dark": 2},
    "texts": {"film": 2, "bank": WIDE, "start": WIDE},
    "heads": {"film": 2, "book": 3},
}
ROWS, SIZE = 3, 385
NETWORKS = {"light": {"body": (5, 7)}, "dark": {"first": (4,), "second": (2, 9)}, "film": {}, "book": {"body": (3,)}}


def source_of(kind: str, steps: int) -> Source:
    generator, weights, names = random(len(kind)), [], []
    for number, (task, classes) in enumerate(TASKS[kind].items()):
        for row in range(1 if task == "start" else ROWS):
            names.append(task)
            if kind == "texts":
                weights.append(adapter(10 * number + row, classes=classes))
            else:
                shapes = NETWORKS[task] | {"head.weight": (classes, 8), "head.bias": (classes,)}
                weights.append({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    head = (WEIGHT, BIAS) if kind == "texts" else ("head.weight", "head.bias")
    tokenizer = WeightTokenizer.fit(weights, token_size=SIZE, head=head)
    embeds = {
        t: F.normalize(torch.randn(2, n, 384, generator=generator), dim=-1) for t, n in TASKS[kind].items()
    }  # names in two wordings
    prompts = {t: F.normalize(torch.randn(3, 384, generator=generator), dim=-1) for t in TASKS[kind]}
    start = len(weights) - 1 if kind == "texts" else None
    train = ZooTensors.of(tokenizer, weights, names, embeds, prompts, {t: t for t in prompts}, start)
    known = [{"name": t, "labels": [str(i) for i in range(n)]} for t, n in TASKS[kind].items() if t != "start"]
    known, thresholds = known_tasks(known, [[prompts[task["name"]]] for task in known])
    targets, target = None, {"kind": "adapter", "name": "lora", "base_model": MINILM, "lora": LORA}
    if kind != "texts":
        layouts = [int(train.layout_of[train.task_of == t][0]) for t in range(2)]
        targets = [
            {"kind": "network", "name": f"net of {kind}", "config": {"of": t}, "layout": k}
            for t, k in zip(TASKS[kind], layouts, strict=True)
        ]
        target = targets[0]
        known = [{**task, "target": number} for number, task in enumerate(known)]

    if kind == "images":  # as if both were networks for one dataset
        train.dataset_of = torch.tensor([0, 0])

    def loss(tokens, truth, index, random):
        assert torch.equal(truth, train.weight_tokens[index])
        return ((tokens - truth).square().sum((1, 2)) * (1 + index)).mean() * steps

    def score(state_dicts, task):
        assert task in TASKS[kind]
        return torch.full((len(state_dicts),), float(steps))

    return Source(
        tokenizer,
        train,
        train.first_tasks(2),
        [(train.task_of == t).nonzero().flatten().tolist() for t in range(2)],
        target,
        known,
        thresholds,
        score,
        steps,
        steps,
        task_steps=steps,
        task_loss=loss,
        task_reconstruction=0.1 * steps,
        name_projection=(torch.ones(384, 384), torch.ones(384)) if kind == "texts" else None,
        targets=targets,
        features=[torch.randn(3, 5, 6, generator=generator) for _ in range(2)] if kind == "images" else None,
        majority={next(iter(TASKS[kind])): (0.5, steps)},
        zoo_scores={next(iter(TASKS[kind])): 1.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> list[Source]:
    return [source_of("images", 5), source_of("texts", 7)]


def test_rows_are_the_networks_that_they_were(parts):
    whole, first = joined(parts), 0
    assert whole.train.tasks == [*TASKS["images"], *TASKS["texts"]]
    assert whole.train.prompted_tasks == whole.train.tasks[:-1]
    assert whole.train.start == len(whole.train) - 1 and len(whole.train) == 4 * ROWS + 1
    weights = whole.state_dicts(whole.train, whole.train.weight_tokens)
    for part in parts:
        before = part.state_dicts(part.train, part.train.weight_tokens)
        for own, known in zip(weights[first : first + len(before)], before, strict=True):
            assert own.keys() == known.keys() and all(torch.equal(own[name], known[name]) for name in known)
        first += len(before)
    assert torch.equal(whole.train.padding_mask.sum(), sum(part.train.padding_mask.sum() for part in parts))
    assert [whole.train.tasks[int(whole.train.task_of[run[0]])] for run in whole.runs] == whole.train.tasks[:4]


def test_sources_are_drawn_by_the_root_of_their_rows_and_their_tasks_as_without_others(parts):
    images, texts = parts
    heads = source_of("heads", 3)
    zoo = joined([images, heads, texts]).train
    drawn = torch.cat([zoo.task_of[zoo.draw_rows(StepRandom(0, step, 64, slice(None)))] for step in range(200)])
    shares = drawn.bincount(minlength=len(zoo.tasks)) / len(drawn)
    torch.testing.assert_close(shares.double(), zoo.odds, atol=0.015, rtol=0)
    roots = [len(own.train) ** 0.5 for own in (images, heads, texts)]
    for own, first in ((images, 0), (texts, 4)):
        share = zoo.odds[first : first + len(own.train.tasks)]
        torch.testing.assert_close(share, own.train.odds * len(own.train) ** 0.5 / sum(roots))
    assert texts.train.odds[1] > texts.train.odds[0] == texts.train.odds[2]


def test_targets_and_known_tasks_are_those_of_their_source(parts):
    whole = joined(parts)
    assert [target["kind"] for target in whole.targets] == ["network", "network", "adapter"]
    assert whole.targets_of_tasks == [0, 1, 2, 2, 2]
    assert [(task["name"], task["target"]) for task in whole.known_tasks] == [
        ("light", 0),
        ("dark", 1),
        ("film", 2),
        ("bank", 2),
    ]
    layouts = [whole.targets[number]["layout"] for number in whole.targets_of_tasks]
    assert torch.equal(whole.train.layout_of, torch.tensor(layouts)[whole.train.task_of])
    assert whole.asked_for("bank") == {"labels": [str(i) for i in range(WIDE)]}
    assert whole.score([{}, {}], "film").tolist() == [7, 7] and whole.score([{}], "dark").tolist() == [5]


def test_places_and_names_of_networks_with_a_shared_start_are_fitted_and_others_left(parts):
    whole, size = joined(parts), SIZE // 5
    count, zoo = num_places(whole.tokenizer, size), whole.train
    sizes = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "code_size": 4, "num_codes": 4}
    config = WeightVQVAEConfig(token_size=size, class_parts=5, num_places=count, place_moments=True, **sizes)
    vqvae, layout = WeightVQVAE(config), int(zoo.layout_of[-1])
    fit_places(vqvae, zoo, whole.tokenizer)
    pieces = Pieces(whole.tokenizer, layout, 0, size)
    others = torch.ones(count, dtype=torch.bool).index_fill(0, pieces.places, False)
    assert 0 < others.sum() < count
    assert vqvae.place_mean[others].eq(0).all() and vqvae.place_std[others].eq(1).all()
    own = whole.tokenizer.own_tokens(zoo.weight_tokens[zoo.layout_of == layout], layout)
    tokens = pieces.cut(own[:, : pieces.num_tokens])
    torch.testing.assert_close(vqvae.place_mean[pieces.places], tokens.mean(0))
    assert vqvae.place_std[pieces.places].max() > 2 * LEAST_SPREAD

    def left(vqvae: WeightVQVAE, wording: int) -> float:
        """Of the mean rows of the head's classes, without what all classes share."""
        body, total = whole.tokenizer.num_all_body_tokens, 0.0
        for task in (2, 3):  # adapters
            classes = int(zoo.class_mask[task].sum())
            mean = zoo.weight_tokens[zoo.rows_of(task), body : body + classes].mean(0)
            made = vqvae.name_projection(zoo.class_embeds[task][wording, :classes])
            total += (mean - mean.mean(0) - made).square().sum().item()
        return total

    before = [left(vqvae, wording) for wording in range(2)]
    fit_names(vqvae, zoo, whole.tokenizer)
    assert all(left(vqvae, wording) < 0.5 * before[wording] for wording in range(2))
    assert wide_heads(whole.tokenizer, size) == [layout]
    apart = WeightVQVAE(WeightVQVAEConfig(**config.to_diff_dict() | {"named_layouts": [layout]}))
    for one in (vqvae, apart):
        whole.initialise_names(one)
        fit_names(one, zoo, whole.tokenizer)
    torch.testing.assert_close(apart.map_of_names(layout), vqvae.name_projection.weight)
    assert not apart.map_of_names(0).any()


@pytest.mark.parametrize("moments", [True, False])
def test_errors_in_units_of_the_spread_count_a_tenth_of_others(parts, moments):
    whole, size = joined(parts), SIZE // 5
    sizes = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "code_size": 4, "num_codes": 4}
    settings = {"num_places": num_places(whole.tokenizer, size), "place_moments": moments}
    vqvae = WeightVQVAE(WeightVQVAEConfig(token_size=size, class_parts=5, **settings, **sizes))
    codes = torch.zeros(len(whole.train), 200, 2, dtype=torch.long)
    loss = DecoderLoss(vqvae, whole.train, whole.tokenizer, codes, whole.task_loss, [0.5, 0.5, 0.7, 0.7, 0.7])
    expected = 0.7 * OF_SPREAD if moments else 0.7
    assert loss.reconstruction_weight == pytest.approx([0.5, 0.5, *[expected] * 3])


def test_losses_are_asked_about_their_own_rows(parts):
    whole, index = joined(parts), torch.tensor([0, 4, 8, 9, 2])
    truth = whole.train.weight_tokens[index]
    moved = (truth + whole.train.padding_mask[index] * 0.1).requires_grad_()
    loss = whole.task_loss(moved, truth, index, None)
    count = whole.train.padding_mask[index].sum((1, 2)) * 0.01
    first = len(parts[0].train)
    expected = sum(
        count[i] * ((1 + row) * 5 if row < first else (1 + row - first) * 7) / len(index)
        for i, row in enumerate(index.tolist())
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.equal(moved.grad != 0, whole.train.padding_mask[index])
    assert whole.function_loss is None and whole.task_steps == 7
    assert whole.task_reconstruction == pytest.approx([0.5, 0.5, 0.7, 0.7, 0.7])


def test_datasets_ask_for_the_tasks_that_have_them(parts):
    torch.manual_seed(0)
    config = DatasetEncoderConfig(feature_size=6, latent_size=4, hidden_size=16, num_classes=3, embedding_size=384)
    whole, dataset_encoder = joined(parts), DatasetEncoder(config).eval()
    texts = whole.train
    assert whole.train.dataset_of.tolist() == [0, 0, 2, 3, 4] and whole.shown.dataset_of.tolist() == [0, 0]
    assert whole.shown.tasks == list(TASKS["images"]) and whole.shown.class_mask.shape == (2, 3)
    whole.add_datasets(dataset_encoder, 0)
    lengths = [len(prompts) for prompts in whole.train.prompt_embeds]
    assert lengths[0] == lengths[1] > 250 and lengths[2:] == [3, 3, 3]
    assert {embeds.shape[1] for embeds in whole.train.class_embeds} == {WIDE}
    assert [task["name"] for task in whole.known_tasks] == ["light", "dark", "film", "bank"]
    shown = shown_datasets(whole.shown)
    seen = []

    def prior(codes, conditions, **rest):
        seen.append((codes, conditions, rest["name_embeds"]))
        return type("Output", (), {"loss": codes.sum() * 0.0})

    codes = whole.train.task_of[:, None, None].expand(-1, 200, 1)
    for step in range(20):
        prior_loss(prior, codes, texts, whole.tokenizer, StepRandom(0, step, 16, slice(None)), SIZE, None, shown)
    for codes, conditions, _ in seen:
        of_texts = codes[:, 0, 0] >= 2
        told = conditions.norm(dim=-1) > 0
        assert told[of_texts, 0].all() and not told[of_texts, 1].any()
        assert (told[:, 0] | told[:, 1]).all()
    assert any((conditions[:, 1].norm(dim=-1) > 0).any() for _, conditions, _ in seen)


def test_a_task_of_two_sources_is_one_task_in_two_architectures(parts):
    images, texts = parts
    heads = source_of("heads", 3)
    whole = joined([images, heads, texts])
    assert whole.train.tasks == ["light", "dark", "film (net of heads)", "book", "film (lora)", "bank", "start"]
    assert whole.held_out.tasks == whole.train.tasks and whole.targets_of_tasks == [0, 1, 2, 3, 4, 4, 4]
    numbers = {task["name"]: task.get("targets", task.get("target")) for task in whole.known_tasks}
    assert numbers == {"light": 0, "dark": 1, "film": [2, 4], "book": 3, "bank": 4}
    assert whole.asked_for("film (lora)") == {"labels": ["0", "1"], "architecture": "lora"}
    assert whole.asked_for("film (net of heads)")["architecture"] == "net of heads"
    assert whole.asked_for("bank") == {"labels": [str(i) for i in range(WIDE)]}
    for task, expected in {"film (lora)": 7, "film (net of heads)": 3, "dark": 5}.items():
        assert whole.score([{}], task).tolist() == [expected]
    swapped = joined([images, heads, texts], [2, 0, 1])
    assert [task["targets"] for task in swapped.known_tasks if task["name"] == "film"] == [[4, 2]]
    assert swapped.target == swapped.targets[4] and whole.target == whole.targets[0]
    assert whole.majority == {"film (lora)": (0.5, 7), "film (net of heads)": (0.5, 3), "light": (0.5, 5)}
    with pytest.raises(ValueError, match=r"'film \(net of heads\)' in an architecture of the same name"):
        joined([heads, heads])
    for task, own in {"film (lora)": texts, "film (net of heads)": heads}.items():
        for found, known in zip(whole.members(task), own.members("film"), strict=True):
            assert found.keys() == known.keys() and all(torch.equal(found[name], known[name]) for name in known)


def test_sources_that_do_not_fit_are_refused(parts):
    images, texts = parts
    with pytest.raises(ValueError, match=r"Two sources have the task 'light \(net of images\)'"):
        joined([images, images])
    with pytest.raises(ValueError, match="shared start must be the last"):
        joined([texts, images])
    other = source_of("images", 5)
    other.tokenizer = WeightTokenizer(64, other.tokenizer.to_dict()["layouts"])
    with pytest.raises(ValueError, match=r"tokens of one size, got \[64, 385\]"):
        joined([other, texts])

"""Cards: what they say, and that figures can be put into them again and again."""

import ast
import re

import pytest
from huggingface_hub import ModelCard

from hf_weightgen.hub.cards import add_figures, add_results, needs_card, readdress, write_card


@pytest.fixture
def card(tmp_path):
    write_card(
        tmp_path, "generator", base_model="acme/base", prompt="sort films", generator="acme/gen", command="train"
    )
    return tmp_path


def sections(folder) -> list[str]:
    return [line[3:] for line in (folder / "README.md").read_text().splitlines() if line.startswith("## ")]


def test_figures_stand_before_the_limits_with_their_command(card):
    assert sections(card) == ["Details", "Command", "Limits"]
    add_figures(card, "Figures", "python table.py --seed 0", "| task | zoo |\n|---|---|\n| films | 83.0 |")
    assert sections(card) == ["Details", "Command", "Figures", "Limits"]
    text = (card / "README.md").read_text()
    assert "python table.py --seed 0" in text and "| films | 83.0 |" in text
    assert ModelCard.load(card / "README.md").data.base_model == "acme/base"


def test_new_figures_replace_those_of_the_same_title(card):
    add_figures(card, "Figures", "first command", "first table")
    add_figures(card, "Unseen tasks", "second command", "second table")
    add_figures(card, "Figures", "third command", "third table")
    assert sorted(sections(card)) == ["Command", "Details", "Figures", "Limits", "Unseen tasks"]
    assert sections(card)[-1] == "Limits"
    text = (card / "README.md").read_text()
    assert "first" not in text and "second table" in text and "third table" in text
    once = text
    add_figures(card, "Figures", "third command", "third table")
    assert (card / "README.md").read_text().count("third table") == once.count("third table") == 1


def test_a_foreign_readme_is_refused_and_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="has no section 'Limits'"):
        add_figures(tmp_path, "Figures", "command", "table")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


ROWS = [
    {"task": task, "method": method, "metric": "accuracy", "mean": mean, "n": 5}
    for task, mean in (("films", 83.123), ("news", 50.0))
    for method, mean in (("generated", mean), ("zoo", mean - 1), ("noise_0.05", 1.0))
]


def test_results_become_a_model_index_and_replace_earlier_ones(card):
    for rows in (ROWS[:2], ROWS):
        add_results(card, rows, {"films": "acme/both", "news": "acme/both"})
    data = ModelCard.load(card / "README.md").data
    told = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert told == {
        ("films", "generated: accuracy, mean of 5"): 83.12, ("films", "baseline zoo: accuracy, mean of 5"): 82.12,
        ("news", "generated: accuracy, mean of 5"): 50.0, ("news", "baseline zoo: accuracy, mean of 5"): 49.0,
    }  # fmt: skip
    assert data.base_model == "acme/base" and {r.dataset_type for r in data.eval_results} == {"acme/both"}
    assert sections(card) == ["Details", "Command", "Limits"]


ODD = [
    "it's \"quoted\"", "a: b # c", "{{ jinja }} {% if %}", "---\n- x", "ü 🎬", "`code` | pipe", "a\n\n## Limits\nnone", "```\nx",
    'x"); print("PWNED") #', 'model = PeftModel.from_pretrained(base, "x")', "<script>", "\r\0", "long " * 800,
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_any_prompt_and_label_make_a_valid_card(tmp_path, text):
    names = [text, "other"]
    write_card(tmp_path, "adapter", base_model="acme/base", prompt=text, labels=names, task=text, generator="acme/gen")
    readdress(tmp_path, "acme/lora", revision="v1")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "acme/base" and card.data.library_name == "peft" and not needs_card(tmp_path)
    assert sections(tmp_path) == ["Details", "Limits"] and len(re.findall("^```", card.text, re.MULTILINE)) == 2
    tree = ast.parse(card.text.split("```python\n")[1].split("\n```")[0])
    found = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(found["names"]) == names and len(tree.body) == 9
    assert ast.unparse(found["model"]) == "PeftModel.from_pretrained(base, 'acme/lora', revision='v1')"
    assert all(len(line) < 2_500 for line in card.text.splitlines() if not line.startswith(("names", "Classes")))


@pytest.mark.parametrize("text", ODD)
def test_any_prompt_makes_a_snippet_of_a_generator(tmp_path, text):
    write_card(tmp_path, "generator", prompt=text, generator=text)
    readdress(tmp_path, "acme/gen")
    code = ModelCard.load(tmp_path / "README.md").text.split("```python\n")[1].split("\n```")[0]
    tree = ast.parse(code)
    assert [type(node) for node in tree.body] == [ast.ImportFrom, ast.Assign, ast.Assign, ast.Assign, ast.Expr]
    assert ast.literal_eval(tree.body[2].value.args[0]) == text


@pytest.mark.parametrize(
    "rows", [[5], [{}], [{"task": "a", "method": "zoo"}], [{**ROWS[0], "mean": float("nan")}], [], ROWS[2:3]]
)
def test_results_that_are_none_are_refused(card, rows):
    before = (card / "README.md").read_text()
    with pytest.raises(ValueError, match="[Rr]esult"):
        add_results(card, rows)
    assert (card / "README.md").read_text() == before


def test_a_card_by_hand_is_kept_and_a_default_one_is_not(tmp_path):
    assert needs_card(tmp_path)
    for text, needed in (
        ("", True),
        ("# Mine", False),
        ("---\ntags: 5\n: x", False),
        ("# Model Card for Model ID", True),
    ):
        (tmp_path / "README.md").write_text(text)
        assert needs_card(tmp_path) is needed, text


@pytest.mark.parametrize(
    ("base", "mixed", "told", "model"),
    [
        ("acme/base", False, "LoRA adapters for `acme/base`.", "a PEFT model,"),
        ("acme/base", True, "LoRA adapters for `acme/base` and small networks.", "a PEFT model or a network,"),
        (None, True, ": small networks.", "  # a network,"),
    ],
)
def test_a_generator_says_what_it_makes(tmp_path, base, mixed, told, model):
    path = write_card(tmp_path, "generator", base_model=base, mixed=mixed, prompt="p", generator="acme/gen")
    assert told in path.read_text() and model in path.read_text()


def test_a_generator_that_does_not_judge_class_names_says_so(tmp_path):
    for method in ("IGPG", "D2NWG"):
        card = write_card(tmp_path, "generator", prompt="p", generator="acme/gen", method=method).read_text()
        assert ("Class names are not compared" in card.split("## Limits")[1]) == (method == "IGPG")


@pytest.mark.parametrize(("examples", "encoder"), [("texts", "encoder"), ("images", "image_encoder")])
def test_a_generator_that_reads_datasets_alone_says_how(tmp_path, examples, encoder):
    card = write_card(tmp_path, "generator", examples=examples, generator="acme/gen").read_text()
    assert f"frozen encoder of {examples}." in card and f"# lists of {examples}\n" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert f"pipe.{encoder}.embed(others)" in snippet and "None" not in snippet
    assert "a prompt" not in card.split("## Limits")[1]

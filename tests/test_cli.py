"""The command line: what it prints and writes, and that an error is one line."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_weightgen import __version__
from hf_weightgen.cli import main
from hf_weightgen.pipelines.pipeline_utils import MismatchWarning
from hf_weightgen.targets.base_models import MINILM, load_tokenizer
from tiny import igpg_pipeline, network_pipeline, random


PROMPT = "sentiment on SST-2"
TEXTS = ("a gripping, funny film", "dull")


@pytest.fixture
def generator(pipe, tmp_path):
    pipe.vae.class_noise.fill_(1.0)
    pipe.save_pretrained(tmp_path / "generator")
    return str(tmp_path / "generator")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as the installed script does: exit code, stdout, stderr."""

    def command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-weightgen", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return command


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["evaluate"], ["rank"], ["zoo"], ["zoo", "build"]], ids=" ".join
)
def test_help(command, run):
    code, out, _ = run(*command, "--help")
    assert code == 0 and "Usage" in out and "--help" in out


def test_the_version_is_that_of_the_package(run):
    assert run("--version")[:2] == (0, f"hf-weightgen {__version__}\n")


def test_weights_that_are_kept_nowhere_are_told(generator, run, tmp_path):
    for arguments, told in (([], True), (["--try", "dull"], False), (["--out", tmp_path / "kept"], False)):
        code, _, err = run("generate", PROMPT, "--generator", generator, *arguments)
        assert code == 0 and ("--out DIR saves them" in err) is told


def test_a_sentence_gives_labels_for_texts(generator, run):
    code, out, _ = run("generate", PROMPT, "--generator", generator, "--try", TEXTS[0], "--try", TEXTS[1])
    assert code == 0
    first, *lines = out.splitlines()
    assert first == "nearest known task: sst2; classes: negative, positive"
    for line, text in zip(lines, TEXTS, strict=True):
        label, probability, *rest = line.split()
        assert label in ("negative", "positive") and 0.5 <= float(probability) <= 1 and " ".join(rest) == text


def test_json_is_all_that_is_printed_and_the_seed_decides(generator, run):
    arguments = [
        "generate",
        PROMPT,
        "--generator",
        generator,
        "--try",
        TEXTS[0],
        "--num-samples",
        3,
        "--format",
        "json",
    ]
    code, out, _ = run(*arguments, "--seed", 5)
    found = json.loads(out)
    assert code == 0 and (found["prompt"], found["nearest_task"], found["seed"]) == (PROMPT, "sst2", 5)
    assert len(found["samples"]) == 3
    for sample in found["samples"]:
        assert sample["labels"] == ["negative", "positive"] and "folder" not in sample
        (tried,) = sample["tried"]
        assert tried["text"] == TEXTS[0] and tried["label"] in sample["labels"] and 0.5 <= tried["probability"] <= 1
    assert json.loads(run(*arguments, "--seed", 5)[1]) == found
    assert json.loads(run(*arguments, "--seed", 6)[1])["samples"] != found["samples"]


def test_what_it_prints_is_what_the_model_says(generator, pipe, run):
    _, out, _ = run("generate", PROMPT, "--generator", generator, "--try", TEXTS[0], "--format", "json", "--seed", 3)
    (tried,) = json.loads(out)["samples"][0]["tried"]
    model = pipe(PROMPT, generator=random(3)).to_model(0)
    with torch.no_grad():
        probabilities = model(**load_tokenizer(MINILM)(TEXTS[0], return_tensors="pt")).logits[0].softmax(-1)
    assert tried["label"] == model.config.id2label[int(probabilities.argmax())]
    assert tried["probability"] == pytest.approx(probabilities.max().item(), abs=1e-3)


def test_pairs_and_labels(generator, run):
    arguments = ["generate", PROMPT, "--generator", generator, "--labels", "no, yes ,unsure", "--format", "json"]
    code, out, _ = run(*arguments, "--try-pair", "a film", "a movie")
    (sample,) = json.loads(out)["samples"]
    assert code == 0 and sample["labels"] == ["no", "yes", "unsure"]
    assert sample["tried"][0]["text"] == ["a film", "a movie"] and sample["tried"][0]["label"] in sample["labels"]


def test_one_sample_is_written_to_the_folder_itself(generator, pipe, run, tmp_path):
    out_folder = tmp_path / "adapter"
    code, out, _ = run("generate", PROMPT, "--generator", generator, "--out", out_folder, "--seed", 4)
    assert code == 0 and f"saved {out_folder}" in out
    saved = load_file(out_folder / "adapter_model.safetensors")
    expected = pipe(PROMPT, generator=random(4)).weights[0]
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, atol=1e-5, rtol=0)
    assert "generator: generator (a folder)" in (out_folder / "README.md").read_text()


def test_the_card_tells_the_command_that_makes_the_weights_again(generator, run, tmp_path):
    arguments = [
        "generate",
        "it's sentiment on SST-2",
        "--labels",
        "bad,good",
        "--generator",
        generator,
        "--seed",
        "3",
    ]
    run(*arguments, "--out", tmp_path / "first")
    card = (tmp_path / "first" / "README.md").read_text()
    command = card.split("```bash\n")[1].split("\n")[0]
    run(*shlex.split(command.replace("--out DIR", f"--out '{tmp_path / 'second'}'"))[1:])
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_several_samples_are_written_to_numbered_folders(generator, run, tmp_path):
    arguments = ["generate", PROMPT, "--generator", generator, "--out", tmp_path / "many", "--num-samples", 2]
    code, out, _ = run(*arguments, "--format", "json")
    folders = [sample["folder"] for sample in json.loads(out)["samples"]]
    assert code == 0 and folders == [str(tmp_path / "many" / name) for name in ("0000", "0001")]
    for folder in folders:
        assert (tmp_path / folder / "adapter_config.json").is_file()


def test_a_far_prompt_is_told(generator, run):
    with pytest.warns(MismatchWarning, match="far from every task"):
        code, out, _ = run("generate", "the melting point of a protein", "--generator", generator, "--labels", "a,b")
    assert code == 0 and "classes: a, b" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "`prompt` '' says nothing; describe the task"),
        (["film " * 10_000], "50,000 characters"),
        ([PROMPT, "--num-samples", "0"], "`num_samples` must be a whole number of at least 1, got 0"),
        ([PROMPT, "--num-inference-steps", "0"], "`num_inference_steps`"),
        ([PROMPT, "--labels", "good"], "at least 2 classes, got ['good']"),
        ([PROMPT, "--labels", ""], "non-empty names"),
        ([PROMPT, "--labels", "good,,bad"], "non-empty names"),
        ([PROMPT, "--labels", "good,Good"], "'good' twice"),
        ([PROMPT, "--format", "xml"], "--format must be 'text' or 'json', got 'xml'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, generator, run, tmp_path):
    code, out, err = run("generate", *arguments, "--generator", generator, "--out", tmp_path / "out")
    line = err.strip().splitlines()[-1]
    assert code == 1 and out == "" and line.startswith("Error: ") and message in line and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused_first(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = run("generate", PROMPT, "--generator", "no/such", "--out", tmp_path / "file")
    assert code == 1 and "is a file; give a folder" in err and (tmp_path / "file").read_text() == "mine"
    code, _, err = run("generate", PROMPT, "--generator", "no/such", "--out", tmp_path / "file" / "inside")
    assert code == 1 and "is a file; give a folder" in err


def test_a_broken_generator_is_named(generator, run, tmp_path):
    (tmp_path / "generator" / "vae" / "model.safetensors").write_bytes(b"broken")
    code, _, err = run("generate", PROMPT, "--generator", generator)
    assert code == 1 and "model.safetensors' is truncated or no safetensors file" in err and "Traceback" not in err


def test_texts_need_a_generator_of_text_classifiers(encoder, run, tmp_path):
    generator = tmp_path / "generator"
    network_pipeline(encoder).save_pretrained(generator)
    code, _, err = run("generate", PROMPT, "--generator", generator, "--try", "a film", "--out", tmp_path / "out")
    assert code == 1 and "--try needs a generator of text classifiers" in err and not (tmp_path / "out").exists()
    code, _, err = run("evaluate", "sst2", "--generator", generator)
    assert code == 1 and "generators of adapters alone; this one makes networks" in err


def test_texts_need_an_architecture_that_reads_them(encoder, run, tmp_path):
    pipe, generator = igpg_pipeline(encoder), tmp_path / "generator"
    task, targets = pipe.config.tasks[0], [{**pipe.targets[0], "name": "lora"}, *pipe.targets[1:]]
    pipe.register_to_config(targets=targets, tasks=[{**task, "targets": [1, 0]}])
    pipe.save_pretrained(generator)
    arguments = [
        "generate",
        "sentiment on SST-2",
        "--labels",
        "bad,so,good",
        "--generator",
        generator,
        "--try",
        "a film",
    ]
    code, _, err = run(*arguments)
    assert code == 1 and "this is another network for 'sst2'; ask for it with --architecture lora" in err
    assert run(*arguments, "--architecture", "lora")[0] == 0


def test_an_architecture_is_asked_for_by_name(encoder, run, tmp_path):
    pipe, generator = network_pipeline(encoder), tmp_path / "generator"
    pipe.register_to_config(targets=[{**pipe.config.target, "name": "perceptron", "layout": 0}])
    pipe.save_pretrained(generator)
    arguments = [
        "generate",
        "which digit is it",
        "--generator",
        generator,
        "--out",
        tmp_path / "out",
        "--architecture",
    ]
    assert run(*arguments, "perceptron")[0] == 0
    assert "--architecture perceptron" in (tmp_path / "out" / "README.md").read_text()
    code, _, err = run(*arguments, "lenet")
    assert code == 1 and "must be one of ['perceptron'], got 'lenet'" in err and "Traceback" not in err


def test_known_pairs_are_ranked(encoder, run, tmp_path):
    generator = tmp_path / "generator"
    igpg_pipeline(encoder).save_pretrained(generator)
    code, out, _ = run("rank", generator, "--prompt", "which digit is it", "--format", "json")
    ranked = json.loads(out)
    assert code == 0 and {(one["task"], one["architecture"]) for one in ranked} == {
        ("sst2", None), ("digits", "small"), ("digits", "large"),
    }  # fmt: skip
    assert [one["score"] for one in ranked] == sorted((one["score"] for one in ranked), reverse=True)
    code, out, _ = run("rank", generator, "--prompt", "which digit is it")
    assert code == 0 and len(out.splitlines()) == 3 and "digits (large)" in out
    code, _, err = run("rank", generator, "--dataset", "nowhere", "--data-root", tmp_path)
    assert code == 1 and "nowhere" in err and "Traceback" not in err
    code, _, err = run("rank", generator)
    assert code == 1 and "Give" in err
    code, _, err = run("rank", generator, "--prompt", "which digit is it", "--split", "test")
    assert code == 1 and "give --dataset too" in err


def test_diffusion_models_do_not_rank(generator, run):
    code, _, err = run("rank", generator, "--prompt", PROMPT)
    assert code == 1 and "is a D2NWGPipeline, which has no likelihood" in err


def test_codes_are_written_by_the_same_command(encoder, run, tmp_path):
    generator = tmp_path / "generator"
    igpg_pipeline(encoder).save_pretrained(generator)
    asked = ["generate", "which digit is it", "--generator", generator, "--out", tmp_path / "out"]
    assert run(*asked, "--architecture", "large")[0] == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    code, _, err = run(*asked, "--guidance-scale", "2")
    assert code == 1 and "guidance_scale" in err and "Traceback" not in err
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "sst22"], "Unknown task 'sst22'. Nearest known: sst2"),
        (["evaluate", "mine.json"], "No task file at 'mine.json'"),
        (["zoo", "build", "zoo", "--tasks", "sst2,nothing"], "Unknown task 'nothing'"),
        (["zoo", "build", "zoo", "--tasks", "cola", "--passes", "5"], "'cola': 5 passes are 0 steps"),
        (["zoo", "build", "zoo", "--tasks", "cola", "--data-root", "nowhere"], "no dataset folder 'nowhere/"),
    ],
)
def test_errors_of_other_commands_are_one_line(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 1 and out == "" and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["generate"], ["sing"], ["generate", PROMPT, "--loud"], ["generate", PROMPT, "--seed", "x"]]
)
def test_wrong_usage_is_told(arguments, run):
    code, _, err = run(*arguments)
    assert code == 2 and "Usage" in err and "Traceback" not in err


def test_the_module_runs_and_an_unknown_generator_is_one_line():
    command = [sys.executable, "-m", "hf_weightgen.cli", "generate", PROMPT, "--generator", "acme/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: Loading 'acme/nothing' failed: there is no such")
    assert "Traceback" not in done.stderr

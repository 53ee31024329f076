"""`hf-weightgen`: parse, call, print. Heavy imports wait until a command needs them."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
zoo_app = typer.Typer(no_args_is_help=True, help="Build model zoos.")
app.add_typer(zoo_app, name="zoo")

Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise; the same seed gives the same weights.")
]
DataRoot = Annotated[Path | None, typer.Option(help="Folder with datasets under their Hub ids, instead of the Hub.")]
Format = Annotated[str, typer.Option("--format", help="'text' or 'json'.")]
Generator = Annotated[str, typer.Option(help="Folder or Hub id of a generator, or 'bundled'.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"hf-weightgen {version('hf-weightgen')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
):
    """Weights of neural networks, on request."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the classifier shall do, e.g. 'sentiment on SST-2'.")],
    try_: Annotated[list[str] | None, typer.Option("--try", help="Text to classify; may be repeated.")] = None,
    try_pair: Annotated[tuple[str, str] | None, typer.Option(help="Two texts to classify, for pair tasks.")] = None,
    labels: Annotated[str | None, typer.Option(help="Class names, separated by commas.")] = None,
    num_samples: Annotated[int, typer.Option(help="Adapters to generate.")] = 1,
    seed: Seed = 0,
    generator: Generator = "bundled",
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps of the scheduler.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strongly the prompt is followed; 1 as in training.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Of the network, where the task has several. Default: its first.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the adapter; several samples become DIR/0000, DIR/0001, …")
    ] = None,
    format_: Format = "text",
):
    """Generate weights from a description of the task."""
    _check_format(format_)
    file = next((path for path in (out, *out.parents) if path.is_file()), None) if out is not None else None
    if file is not None:
        raise ValueError(f"--out {str(out)!r}: {str(file)!r} is a file; give a folder.")
    import torch

    from .pipelines.pipeline_utils import WeightGenPipeline
    from .targets.mixed import target_numbers

    _quiet()
    told = ["generate", prompt, *(["--labels", labels] if labels is not None else ())]
    given = {"num-samples": num_samples, "seed": seed, "generator": generator}
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}  # of a diffusion model
    given |= {name.replace("_", "-"): value for name, value in settings.items()} | {"architecture": architecture}
    told += [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    texts = [*(try_ or ()), *([try_pair] if try_pair else ())]
    pipe = WeightGenPipeline.from_pretrained(generator)
    unread = [name for name, value in settings.items() if value is not None and name not in pipe.config]
    if unread:
        raise ValueError(
            f"`{unread[0]}` is a setting of generators by diffusion; {generator!r} is a {type(pipe).__name__}."
        )
    if texts and all(target["kind"] != "adapter" for target in pipe.targets):
        raise ValueError("--try needs a generator of text classifiers; this one makes small networks.")
    if not texts and out is None:
        print("The weights are made and not kept: --out DIR saves them, --try TEXT uses them.", file=sys.stderr)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    output = pipe(
        prompt,
        labels=[name.strip() for name in labels.split(",")] if labels is not None else None,
        num_samples=num_samples,
        architecture=architecture,
        generator=torch.Generator().manual_seed(seed),
        **{name: value for name, value in settings.items() if value is not None},
    )
    if texts and output.targets[0]["kind"] != "adapter":
        task = next(task for task in pipe.config.tasks if task["name"] == output.tasks[0])
        own = [pipe.targets[number] for number in target_numbers(task)]
        others = [target["name"] for target in own if target["kind"] == "adapter"]
        remedy = f"; ask for it with --architecture {others[0]}" if others else ""
        raise ValueError(f"--try needs a LoRA adapter; this is another network for {task['name']!r}{remedy}.")
    output.command = f"hf-weightgen {' '.join(map(shlex.quote, told))} --out DIR"
    folders = output.save_pretrained(out) if out is not None else []
    results = []
    for i in range(num_samples):
        tried = _classify(output, i, texts) if texts else []
        results.append({"labels": output.labels[i], "tried": tried} | ({"folder": str(folders[i])} if folders else {}))
    if format_ == "json":
        print(
            json.dumps(
                {"prompt": prompt, "nearest_task": output.tasks[0], "seed": seed, "samples": results},
                ensure_ascii=False,
                indent=1,
            )
        )
        return
    print(f"nearest known task: {output.tasks[0]}; classes: {', '.join(output.labels[0])}")
    for i, result in enumerate(results):
        for tried in result["tried"]:
            print(
                (f"[{i}] " if num_samples > 1 else "")
                + f"{tried['label']} {tried['probability']:.3f}  {tried['text']}"
            )
        if folders:
            print(f"saved {result['folder']}")


def _classify(output, index: int, texts: list) -> list[dict]:
    import torch

    from .targets.base_models import load_tokenizer

    model, tokenizer = output.to_model(index), load_tokenizer(output.targets[index]["base_model"])
    tried = []
    for text in texts:
        first, second = text if isinstance(text, tuple) else (text, None)
        encoded = tokenizer(first, second, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**encoded).logits[0].softmax(-1)
        best = int(probabilities.argmax())
        tried.append(
            {
                "text": first if second is None else [first, second],
                "label": model.config.id2label[best],
                "probability": round(probabilities[best].item(), 4),
            }
        )
    return tried


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help="A known task, or a JSON file with a task of your own.")],
    generator: Generator = "bundled",
    zoo: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the zoo; recomputes the rows that are otherwise stored.")
    ] = None,
    data_root: DataRoot = None,
    n: Annotated[int, typer.Option(help="Adapters per row, and the n of best-of-n.")] = 10,
    seed: Seed = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps predictions, so that an interrupted table resumes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the rows as JSON.")] = None,
    format_: Format = "text",
):
    """Print the honest table: generated weights beside everything that they must beat."""
    _check_format(format_)
    from .evaluation.generator import evaluate_generator
    from .evaluation.table import format_table, write_results
    from .pipelines.pipeline_utils import WeightGenPipeline
    from .targets.tasks import get_task, load_task_spec

    _quiet()
    spec = load_task_spec(task) if task.endswith(".json") else get_task(task)
    pipe = WeightGenPipeline.from_pretrained(generator)
    pipe.set_progress_bar_config(disable=True)
    rows = evaluate_generator(
        pipe,
        spec,
        data_root,
        zoo,
        n,
        seed=seed,
        cache=cache,
        on_row=lambda row: print(f"  {row['method']}", file=sys.stderr),
    )
    command = f"hf-weightgen evaluate {spec.name} --n {n} --seed {seed}"
    if out is not None:
        write_results(out, spec.name, command, seed, rows)
    print(json.dumps(rows, indent=1) if format_ == "json" else format_table(rows))


@app.command()
def rank(
    generator: Annotated[str, typer.Argument(help="Folder or Hub id of a generator that writes codes (IGPG).")],
    prompt: Annotated[str | None, typer.Option(help="What the network shall do.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Id or folder of a dataset with a column of class labels and one of images or texts."),
    ] = None,
    config: Annotated[str | None, typer.Option(help="Of the dataset, where it has several.")] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "train",
    data_root: DataRoot = None,
    format_: Format = "text",
):
    """
    Rank the tasks and architectures that a generator knows by how well they fit a description, a dataset, or both.

    Scores are logarithms: how much likelier a task's own codes are when asked for so than when asked for any known task.
    """
    _check_format(format_)
    if dataset is None and (config is not None or split != "train" or data_root is not None):
        raise ValueError("--config, --split and --data-root are those of a dataset; give --dataset too.")
    from datasets import load_dataset

    from .pipelines.pipeline_utils import WeightGenPipeline

    _quiet()
    pipe = WeightGenPipeline.from_pretrained(generator)
    if not hasattr(pipe, "rank"):
        raise ValueError(
            f"{generator!r} is a {type(pipe).__name__}, which has no likelihood; only IGPG's generators rank."
        )
    examples = None
    if dataset is not None:
        examples = load_dataset(str(data_root / dataset) if data_root is not None else dataset, config, split=split)
    ranked = pipe.rank(prompt, examples)
    if format_ == "json":
        print(json.dumps(ranked, indent=1))
        return
    for pair in ranked:
        print(
            f"{pair['score']:+8.3f}  {pair['task']}" + (f" ({pair['architecture']})" if pair["architecture"] else "")
        )


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A saved generator, adapter or network, or a zoo.")],
    repo_id: Annotated[str, typer.Argument(help="Where to, as NAMESPACE/NAME; created if it is not there.")],
    private: Annotated[
        bool | None, typer.Option(help="Whether a new repository is private. Default: as your namespace has it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made from main if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    remote_code: Annotated[
        bool, typer.Option(help="Add the code that stock diffusers or transformers load with trust_remote_code=True.")
    ] = False,
    half: Annotated[bool, typer.Option(help="Round the weights of a zoo to float16.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="What `hf-weightgen evaluate --out` wrote, for the card of adapters.")
    ] = None,
):
    """Publish to the Hub, with its card and in one commit; the token is that of `hf auth login` or HF_TOKEN."""
    from .hub.publish import kind_of

    if folder == Path("."):
        raise ValueError("FOLDER is empty or the folder that you stand in; name the folder to publish.")
    kind = kind_of(folder)
    if kind == "zoo" and remote_code:
        raise ValueError("--remote-code: a zoo has no code.")
    if kind != "zoo" and half:
        raise ValueError(f"--half is for zoos; {str(folder)!r} is a {kind}, published as it was saved.")
    if results is not None and kind in ("zoo", "generator"):
        raise ValueError(f"--results is for adapters and networks; {str(folder)!r} is a {kind}.")
    told = json.loads(results.read_text(encoding="utf-8")) if results is not None else {"rows": ()}
    rows = told.get("rows") if isinstance(told, dict) else None
    if not isinstance(rows, (list, tuple)):
        raise ValueError(f"--results {str(results)!r} is no file that `hf-weightgen evaluate --out` wrote.")
    settings = {"private": private, "revision": revision, "commit_message": message}
    if kind == "zoo":
        from .zoo.folder import push_zoo

        commit = push_zoo(folder, repo_id, half=half, **settings)
    elif kind == "generator":
        from .pipelines.pipeline_utils import publish_generator

        commit = publish_generator(folder, repo_id, remote_code, **settings)
    else:
        from .pipelines.output import publish_weights

        commit = publish_weights(folder, repo_id, remote_code, rows, **settings)
    print(f"published the {kind}: {commit.commit_url}")


@zoo_app.command("build")
def zoo_build(
    folder: Annotated[Path, typer.Argument(help="Where the shards are written; calling it again continues.")],
    tasks: Annotated[
        str | None, typer.Option(help="Task names, separated by commas. Default: all bundled tasks but clinc150.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Members per task; the last seed is held out.")] = 6,
    passes: Annotated[int, typer.Option(help="Sentences that one member reads in training.")] = 4000,
    bf16: Annotated[bool, typer.Option(help="Train under bfloat16 autocast.")] = False,
    data_root: DataRoot = None,
):
    """Train a zoo of LoRA adapters for all-MiniLM-L6-v2."""
    from .targets.tasks import get_task
    from .zoo.build import build_zoo
    from .zoo.recipe import ZooConfig, default_tasks

    specs, base_only = ([get_task(name.strip()) for name in tasks.split(",")], []) if tasks else default_tasks()
    built = build_zoo(specs, folder, ZooConfig(seeds=seeds, passes=passes, bf16=bf16), data_root, base_only)
    print(f"{len(built.finished())} rows in {folder}")


def _quiet() -> None:
    """No progress bars of loading, and no warnings that speak to programmers of other libraries."""
    import warnings

    import datasets
    import diffusers
    import transformers

    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def _check_format(name: str) -> None:
    if name not in ("text", "json"):
        raise ValueError(f"--format must be 'text' or 'json', got {name!r}.")


def main() -> None:
    """Runs a command; an error that says what to do is printed without a traceback."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

"""Generators that somebody else made: what is checked before anything of them is built or imported.

A repository can name any class, and any size of network. Only known classes are built, and each is built without memory
first (on torch's meta device), where a network that is larger than its file is stopped as soon as it outgrows it.
"""

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin
from peft import LoraConfig
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import components
from ..hub.untrusted import UntrustedFileError, check_folder, read_header, read_json
from ..targets.architectures import TargetConfig
from ..targets.base_models import unpack_embeddings


COMPONENTS = "hf_weightgen.components"
STUB = "modeling"  # module of the same classes in a repository that the stock `DiffusionPipeline` can load
OURS = ("WeightDenoiser", "WeightTokenizer", "WeightVAE")
INDEX = "model_index.json"
NUMBERS = {  # setting of an index -> its range and types
    "num_inference_steps": (1, 1_000, int),
    "guidance_scale": (-100, 100, (int, float)),
    "far_below": (-1, 1, (int, float)),
    "known_above": (-1, 1, (int, float)),
}
LARGEST_SETTING = 1_000_000  # of a scheduler, which allocates as many numbers
LIBRARIES = {
    "diffusers": (diffusers, (ModelMixin, SchedulerMixin)),
    "transformers": (transformers, (PreTrainedModel, PreTrainedTokenizerBase)),
}


def read_index(folder: str | Path) -> dict:
    """
    `model_index.json` with the names under which our classes are known here, whichever form it was published in.

    Raises:
        FileNotFoundError: If there is none.
        UntrustedFileError: If it is no JSON object.
    """
    file = Path(folder) / INDEX
    if not file.is_file():
        raise FileNotFoundError(
            f"No {INDEX} in {str(folder)!r}: this is no generator. Give its folder, a Hub id, or 'bundled'."
        )
    index = read_json(file)
    if not isinstance(index, dict):
        raise UntrustedFileError(f"{str(file)!r} is no JSON object; download or save the generator anew.")
    return with_our_names(index)


def with_our_names(index: dict) -> dict:
    """The stub form (`["pipeline", "D2NWGPipeline"]`, `["modeling", "WeightVAE"]`) in the form that is saved by default."""
    index = {
        k: [COMPONENTS, v[1]] if isinstance(v, list) and len(v) == 2 and v[0] == STUB else v for k, v in index.items()
    }
    name = index.get("_class_name")
    return index | ({"_class_name": name[1]} if isinstance(name, list) and len(name) == 2 else {})


def check_generator(folder: str | Path, given: Iterable[str] = ()) -> None:
    """
    Args:
        given: Components that the caller brings, so that those of the folder are not built.

    Raises:
        UntrustedFileError: If the folder holds what no generator of this library holds; the message names it.
    """
    check_folder(folder)
    check_components(folder, given)


def check_components(folder: str | Path, given: Iterable[str] = ()) -> None:
    """The part of [`check_generator`] that needs to know what the files mean."""
    folder = Path(folder)
    for name, entry in read_index(folder).items():
        is_component = (
            isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, (str, type(None))) for x in entry)
        )
        if not is_component or name.startswith("_") or name in given or entry == [None, None]:
            continue
        component = _component_class(folder / INDEX, name, *entry)
        if issubclass(component, (ModelMixin, PreTrainedModel)):
            _check_network(component, folder / name)
        elif issubclass(component, SchedulerMixin):
            file = folder / name / "scheduler_config.json"
            settings = read_json(file)
            for key, value in settings.items() if isinstance(settings, dict) else ():
                if isinstance(value, (int, float)) and LARGEST_SETTING < abs(value) < math.inf:
                    raise UntrustedFileError(
                        f"{str(file)!r}: {key!r} is {value!r}, expected at most {LARGEST_SETTING:,}."
                    )


def _component_class(index: Path, name: str, module: str | None, class_name: str | None) -> type:
    if module == COMPONENTS and class_name in OURS:
        return getattr(components, class_name)
    if module in LIBRARIES and class_name:
        library, bases = LIBRARIES[module]
        found = getattr(library, class_name, None)
        if isinstance(found, type) and issubclass(found, bases):
            return found
    raise UntrustedFileError(
        f"{str(index)!r} wants {name!r} to be {class_name!r} from the module {module!r}; only {', '.join(OURS)}, and models, "
        "schedulers and tokenizers of diffusers and transformers are loaded."
    )


def _check_network(component: type, folder: Path) -> None:
    """What a file of another network lacks would otherwise stay random, with no more than a warning in a log."""
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= read_header(file)
    if not stored:
        raise UntrustedFileError(f"{str(folder)!r} holds no safetensors file; download or save the generator anew.")
    config = read_json(folder / "config.json")
    try:
        with torch.device("meta"), _limited(sum(math.prod(shape) for _, shape in stored.values()), len(stored)):
            if issubclass(component, ModelMixin):
                model = component.from_config(config)
            else:
                model = component(component.config_class.from_dict(config))
            wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except Exception as error:  # whatever a constructor does with settings that make no sense
        raise UntrustedFileError(
            f"{str(folder / 'config.json')!r} describes no {component.__name__} that fits the weights beside it "
            f"({type(error).__name__}: {error}). Download or save the generator anew."
        ) from error
    shapes = {name: shape for name, (_, shape) in stored.items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise UntrustedFileError(
                f"The weights in {str(folder)!r} have {shapes.get(name, 'nothing')} for {name!r}, {component.__name__} has "
                f"{wanted.get(name, 'no place')}: they are of another network than its config.json. Download or save the "
                "generator anew."
            )


@contextmanager
def _limited(most_scalars: int, most_tensors: int) -> Iterator[None]:
    """Stops the building of a network that has far more parameters than its file."""
    thread, built = threading.get_ident(), [0, 0]

    def count(module, name, parameter):
        if parameter is not None and threading.get_ident() == thread:
            built[0] += parameter.numel()
            built[1] += 1
            if built[0] > 2 * most_scalars or built[1] > 2 * most_tensors:  # what lacks a little is told by its name
                raise ValueError(f"the network is larger than the {most_scalars:,} stored weights")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_settings(config: Mapping, embedding_size: int) -> None:
    """
    Checks what the index of a generator says beside its components.

    Raises:
        ValueError: If a setting has another type or range than a generator works with; the message names it.
    """
    target, encoder, tasks = config.get("target"), config.get("encoder"), config.get("tasks")
    match target:
        case {"kind": "adapter", "base_model": str(), "lora": {"r": int(), "task_type": "SEQ_CLS"} as lora}:
            LoraConfig(**lora)
        case {"kind": "network", "config": {**settings}}:
            TargetConfig(**settings, num_classes=2)
        case _:
            raise ValueError(
                f"`target` {str(target)[:200]} is neither an adapter with base model and `lora`, nor a network."
            )
    if encoder is not None and not (isinstance(encoder, Mapping) and isinstance(encoder.get("id"), str)):
        raise ValueError(f"`encoder` must name a model by its `id`, got {str(encoder)[:200]}.")
    if not isinstance(tasks, list) or not tasks:
        raise ValueError("`tasks` must list the known tasks, and there is none.")
    for task in tasks:
        match task:
            case {
                "name": str(),
                "family": str(),
                "labels": [str(), str(), *rest],
                "prompt_embeddings": str(packed),
            } if all(isinstance(label, str) for label in rest):
                unpack_embeddings(packed, embedding_size)
            case _:
                raise ValueError(
                    f"`tasks` holds {str(task)[:200]}, which has no name, family, labels and prompt embeddings."
                )
    for name, (low, high, kinds) in NUMBERS.items():
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"`{name}` must be a number from {low} to {high}, got {str(value)[:60]!r}.")


def write_stubs(folder: str | Path) -> None:
    """
    Adds what lets the stock `DiffusionPipeline.from_pretrained(id, trust_remote_code=True)` load a saved generator: one
    line of Python per class, which imports it from this library, and an index that names these files.
    """
    folder = Path(folder)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    pipeline = index["_class_name"]
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == COMPONENTS:
            (folder / name / f"{STUB}.py").write_text(f"from {COMPONENTS} import {entry[1]}  # noqa: F401\n")
            index[name] = [STUB, entry[1]]
    module = f"hf_weightgen.pipelines.pipeline_{pipeline.removesuffix('Pipeline').lower()}"
    (folder / "pipeline.py").write_text(f"from {module} import {pipeline}  # noqa: F401\n")
    index["_class_name"] = ["pipeline", pipeline]
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Generators that somebody else made: what is checked before anything of them is built or imported.

A repository can name any class, and any size of network. Only known classes are built, and each is built without memory
first (on torch's meta device), where a network that is larger than its file is stopped as soon as it outgrows it.
"""

import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DConditionModel
from peft import LoraConfig
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedModel

from .. import components
from ..hub.untrusted import UntrustedFileError, check_folder, is_repo_id, read_header, read_object
from ..targets.architectures import TargetConfig, TargetModel
from ..targets.base_models import unpack_embeddings
from ..targets.mixed import architecture_codes, nearest_resizable, shapes_in_order
from ..weights.tokenization import WeightTokenizer


COMPONENTS = "hf_weightgen.components"
STUB = "modeling"  # module of the same classes in a repository that the stock `DiffusionPipeline` can load
INDEX = "model_index.json"
NUMBERS = {  # setting of an index -> its range and types; a pipeline has some of them
    "num_inference_steps": (1, 1_000, int),
    "guidance_scale": (-100, 100, (int, float)),
    "far_below": (-1, 1, (int, float)),
    "known_above": (-1, 1, (int, float)),
    "datasets_above": (-1, 1, (int, float)),
    "temperature": (0, 100, (int, float)),
}
LARGEST_SETTING = 1_000_000  # of a scheduler, which allocates as many numbers
MOST_TASKS, MOST_LABELS, LONGEST_NAME, MOST_TARGETS = 10_000, 10_000, 200, 1_000
LORA_SETTINGS = {
    "r", "lora_alpha", "lora_dropout", "bias", "task_type", "target_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
# component -> the classes that it may have; encoders are named in a generator and never lie in it
CLASSES = {
    "vae": {(COMPONENTS, "WeightVAE"): components.WeightVAE},
    "unet": {
        (COMPONENTS, "WeightDenoiser"): components.WeightDenoiser,
        ("diffusers", "UNet2DConditionModel"): UNet2DConditionModel,
    },
    "vqvae": {(COMPONENTS, "WeightVQVAE"): components.WeightVQVAE},
    "prior": {(COMPONENTS, "IGPGPrior"): components.IGPGPrior},
    "accuracy_predictor": {(COMPONENTS, "AccuracyPredictor"): components.AccuracyPredictor},
    "dataset_encoder": {(COMPONENTS, "DatasetEncoder"): components.DatasetEncoder},
    "weight_tokenizer": {(COMPONENTS, "WeightTokenizer"): components.WeightTokenizer},
}
# flags of transformers that none of our networks has, and that change what a call returns
FOREIGN = {
    "is_encoder_decoder", "add_cross_attention", "output_attentions", "output_hidden_states", "return_dict_in_generate",
}  # fmt: skip
WEIGHTS_FILE = re.compile(r"(diffusion_pytorch_model|model)(\.[\w-]+)?\.safetensors")


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
    return with_our_names(read_object(file))


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
            for key, value in read_object(file).items():
                if isinstance(value, (int, float)) and LARGEST_SETTING < abs(value) < math.inf:
                    raise UntrustedFileError(
                        f"{str(file)!r}: {key!r} is {value!r}, expected at most {LARGEST_SETTING:,}."
                    )
        else:
            read_object(folder / name / "preprocessor_config.json")


def _component_class(index: Path, name: str, module: str | None, class_name: str | None) -> type:
    known = CLASSES.get(name, {})
    if (module, class_name) in known:
        return known[module, class_name]
    if name == "scheduler" and module == "diffusers" and class_name:
        found = getattr(diffusers, class_name, None)
        if isinstance(found, type) and issubclass(found, SchedulerMixin):
            return found
    expected = [class_name for _, class_name in known] or ["a scheduler of diffusers"] * (name == "scheduler")
    raise UntrustedFileError(
        f"{str(index)!r} wants {name!r} to be {class_name!r} from the module {module!r}; "
        f"expected {' or '.join(expected) or 'no such component'}."
    )


def _check_network(component: type, folder: Path) -> None:
    """What a file of another network lacks would otherwise stay random, with no more than a warning in a log."""
    config = read_object(folder / "config.json")
    if issubclass(component, PreTrainedModel):
        known = {*component.config_class().to_dict(), "architectures", "dtype", "torch_dtype", "transformers_version"}
        unknown = sorted(config.keys() - known)
        if unknown:
            raise UntrustedFileError(
                f"{str(folder / 'config.json')!r} holds {unknown[0]!r}, which no {component.__name__} has."
            )
    for file in sorted(folder.iterdir()):
        if file.name != "config.json" and file.name != f"{STUB}.py" and not WEIGHTS_FILE.fullmatch(file.name):
            raise UntrustedFileError(
                f"{str(file)!r} is no part of a {component.__name__}, which is a config.json and one safetensors file; remove it."
            )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UntrustedFileError(f"{str(folder)!r} holds no safetensors file; download or save the generator anew.")
    headers = [read_header(file) for file in files]
    _check_values(component, config, folder / "config.json", most_layers=len(headers[0]))
    try:
        with (
            torch.device("meta"),
            _limited(max(sum(map(math.prod, h.values())) for h in headers), len(headers[0])),
        ):
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
    for file, shapes in zip(files, headers, strict=True):  # a variant is whole as well
        for name in sorted(wanted.keys() | shapes.keys()):
            if wanted.get(name) != shapes.get(name):
                raise UntrustedFileError(
                    f"The weights in {str(file)!r} have {shapes.get(name, 'nothing')} for {name!r}, {component.__name__} has "
                    f"{wanted.get(name, 'no place')}: they are of another network than its config.json. Download or save the "
                    "generator anew."
                )


def _check_values(component: type, config: Mapping, file: Path, most_layers: int) -> None:
    """Settings that break a network of the right shapes, or that cost time before its parameters are counted."""
    for name, value in config.items():
        if name in FOREIGN and value:
            raise UntrustedFileError(
                f"{str(file)!r}: {name!r} is {str(value)[:60]}, which no {component.__name__} is."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UntrustedFileError(f"{str(file)!r}: {name!r} is {value!r}, expected a finite number.")
        if "layers" in name and isinstance(value, int) and value > most_layers:  # some are copied, and not counted
            raise UntrustedFileError(
                f"{str(file)!r}: {name!r} is {value:,}, the weights beside it are of {most_layers} tensors. Download or save the "
                "generator anew."
            )


@contextmanager
def _limited(most_scalars: int, most_tensors: int) -> Iterator[None]:
    """Stops the building of a network that has far more parameters and buffers than its file."""
    thread, built = threading.get_ident(), [0, 0]

    def count(module, name, tensor):
        if tensor is not None and threading.get_ident() == thread:
            built[0] += tensor.numel()
            built[1] += 1
            if built[0] > 2 * most_scalars or built[1] > 2 * most_tensors:  # what lacks a little is told by its name
                raise ValueError(f"the network is larger than the {most_scalars:,} stored weights")

    hooks = register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_name(value: object) -> bool:
    """Whether a value is a line of text that can stand in a card."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value.strip()) <= len(value) <= LONGEST_NAME


def check_settings(config: Mapping, embedding_size: int) -> None:
    """
    Checks what the index of a generator says beside its components.

    Raises:
        ValueError: If a setting has another type or range than a generator works with; the message names it.
    """
    targets, tasks = config.get("targets"), config.get("tasks")
    if targets is not None and not (isinstance(targets, list) and 1 <= len(targets) <= MOST_TARGETS):
        raise ValueError(f"`targets` must list 1 to {MOST_TARGETS} of them, or be absent.")
    for target in [config.get("target"), *(targets or [])]:
        _check_target(target)
    for name in ("encoder", "image_encoder"):
        _check_encoder(name, config.get(name))
    if not isinstance(tasks, list) or not 1 <= len(tasks) <= MOST_TASKS:
        raise ValueError(f"`tasks` must list 1 to {MOST_TASKS:,} known tasks.")
    for task in tasks:
        match task:
            case {
                "name": name,
                "family": family,
                "labels": [_, _, *_] as labels,
                "prompt_embeddings": str(packed),
            } if all(map(is_name, (name, family, *labels))) and len(set(labels)) == len(labels) <= MOST_LABELS:
                if not unpack_embeddings(packed, embedding_size).isfinite().all():
                    raise ValueError(f"`tasks`: the prompt embeddings of {name!r} are not finite.")
                _check_numbers(task, targets or [config["target"]])
            case _:
                raise ValueError(
                    f"`tasks` holds {str(task)[:200]}, which has no name, family, different labels and prompt embeddings."
                )
    architecture_codes(targets or [config["target"]], tasks, embedding_size)  # fails here where they are too many
    for name in NUMBERS.keys() & config.keys():
        value, (low, high, kinds) = config[name], NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"`{name}` must be a number from {low} to {high}, got {str(value)[:60]!r}.")


def _check_numbers(task: Mapping, targets: Sequence[Mapping]) -> None:
    """That the targets of a task are there, and can be told apart by their names."""
    numbers = task.get("targets", [task.get("target", 0)])
    told = f"`tasks`: the targets of {task['name']!r} are {str(numbers)[:60]}"
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= MOST_TARGETS:
        raise ValueError(f"{told}, expected a list of 1 to {MOST_TARGETS} numbers.")
    if any(type(number) is not int or not 0 <= number < len(targets) for number in numbers):
        raise ValueError(f"{told}, there are {len(targets)}.")
    names = [targets[number].get("name") for number in numbers]
    if len(numbers) > 1 and (None in names or len(set(names)) < len(names)):
        raise ValueError(f"{told}, whose names {str(names)[:120]} do not tell them apart.")


def check_targets(targets: Sequence[Mapping], tokenizer: WeightTokenizer) -> None:
    """
    Checks that the layouts of a generator's targets are those of its tokenizer.

    Raises:
        ValueError: If a target has no layout there, or another one, or cannot be made of the one that it is said to be like.
    """

    def fits(number: int, target: Mapping) -> bool:
        return nearest_resizable(targets, resizable_targets(targets, [number], tokenizer), target) is not None

    for target in targets:
        if target["layout"] >= len(tokenizer.layouts):
            raise ValueError(
                f"`targets` names the layout {target['layout']}, the tokenizer has {len(tokenizer.layouts)}."
            )
        like = target.get("like")
        if like is not None and (type(like) is not int or not 0 <= like < len(targets) or not fits(like, target)):
            raise ValueError(f"`targets` has a network in the sizes of which no network like {like!r} can be made.")
        layout = tokenizer.layouts[target["layout"]]
        if not layout.tensors:
            raise ValueError(f"`targets` names the layout {target['layout']}, which has no tensors.")
        tensors = {spec.name: spec.shape for spec in layout.tensors}
        ranks = {shape[0] for name, shape in tensors.items() if ".lora_A." in name}
        if target["kind"] == "adapter" and ranks != {target["lora"]["r"]}:
            raise ValueError(f"`lora` has r = {target['lora']['r']}, the tokenizer's tensors have {sorted(ranks)}.")
        if target["kind"] == "network":
            with torch.device("meta"):
                wanted = TargetModel(
                    TargetConfig(**target["config"], num_classes=target.get("num_classes", 2))
                ).state_dict()
            body = {name: shape for name, shape in tensors.items() if name not in layout.head}
            if any(name not in wanted or tuple(wanted[name].shape) != tuple(shape) for name, shape in body.items()):
                raise ValueError("`target` describes another network than the tokenizer's tensors.")


def resizable_targets(targets: Sequence[Mapping], numbers: Iterable[int], tokenizer: WeightTokenizer) -> list[int]:
    """Those targets of which a generator has learned whole networks, and nothing but networks."""
    found = []
    for number in numbers:
        target = targets[number]
        if target["kind"] == "network" and "like" not in target:
            names = {spec.name for spec in tokenizer.layouts[target["layout"]].tensors}
            found += [number] if names == shapes_in_order(target, 2).keys() else []
    return found


def _check_target(target: object) -> None:
    match target:
        case {"kind": "adapter", "base_model": str(base), "lora": {"r": int(), "task_type": "SEQ_CLS"} as lora}:
            if not is_repo_id(base):
                raise ValueError(f"`target` names the base model {base[:200]!r}, which is no id on the Hub.")
            if lora.keys() - LORA_SETTINGS:
                raise ValueError(
                    f"`lora` holds {sorted(lora.keys() - LORA_SETTINGS)[0]!r}, known are {sorted(LORA_SETTINGS)}."
                )
            LoraConfig(**lora)
        case {"kind": "network", "config": {**settings}}:
            known = {"input_shape", "layers", "activation", "image_mean", "image_std"}
            if settings.keys() - known:
                raise ValueError(f"`target` {str(target)[:200]} describes no network of {sorted(known)}.")
            TargetConfig(**settings, num_classes=2)
        case _:
            raise ValueError(
                f"`target` {str(target)[:200]} is neither an adapter with base model and `lora`, nor a network."
            )
    count = target.get("num_classes")
    if count is not None and (type(count) is not int or not 1 <= count <= MOST_LABELS):
        raise ValueError(f"`targets`: `num_classes` must be a number up to {MOST_LABELS:,}, got {str(count)[:60]!r}.")
    if target.get("name") is not None and not is_name(target["name"]):
        raise ValueError(f"`targets`: `name` must be a short line of text, got {str(target['name'])[:60]!r}.")
    if type(target.get("layout", 0)) is not int or target.get("layout", 0) < 0:
        raise ValueError(f"`targets`: `layout` must be the number of a layout, got {str(target['layout'])[:60]!r}.")


def _check_encoder(name: str, encoder: object) -> None:
    if encoder is not None and not (
        isinstance(encoder, Mapping)
        and is_repo_id(encoder.get("id"))
        and all(isinstance(encoder.get(key), (str, type(None))) for key in ("revision", "sha256"))
    ):
        raise ValueError(f"`{name}` must name a model by its `id` on the Hub, got {str(encoder)[:200]}.")


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

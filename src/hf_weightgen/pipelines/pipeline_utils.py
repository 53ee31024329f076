"""What all weight-generation pipelines share: loading by `model_index.json`, prompts and labels, and their output.

Notation: N samples, C classes, E size of an embedding.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.utils import BaseOutput
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import components  # noqa: F401  (diffusers finds our classes in this loaded module)
from ..hub import write_card
from ..targets.architectures import TargetConfig, TargetModel
from ..targets.base_models import MINILM, TextEncoder, load_classifier, load_encoder, unpack_embeddings


PIPELINES = {"D2NWGPipeline": "pipeline_d2nwg"}
BUNDLED = Path(__file__).parents[1] / "bundled"
COMPONENTS = "hf_weightgen.components"
INDEX = "model_index.json"
MAX_PROMPT_CHARACTERS = 4_000
HUB_SETTINGS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.h5", "*.msgpack")


class MismatchWarning(UserWarning):
    """The prompt is far from every known task, or the class names do not fit the prompt."""


@dataclass
class WeightGenOutput(BaseOutput):
    """
    Generated weights.

    Args:
        weights (`list[dict[str, torch.Tensor]]`):
            One state dict per sample, prompt by prompt: a LoRA adapter in PEFT's names with its head, or a whole network.
            With `output_type="latent"` an empty list.
        labels (`list[list[str]]`): Per sample the class names, in the order of the head's rows.
        tasks (`list[str]`): Per sample the known task whose prompts are nearest.
        prompts (`list[str]`): Per sample the prompt.
        seeds (`list[int]`): Per sample the seed of its noise.
        target (`dict`): What receives the weights: `{"kind": "adapter", "base_model": id, "lora": {...}}` or
            `{"kind": "network", "config": {...}}`.
        latents (`torch.FloatTensor` of shape `(N, channels, height, width)`): What the weights were decoded from.
        generator_id (`str`): Where the generator was loaded from.
    """

    weights: list
    labels: list
    tasks: list
    prompts: list
    seeds: list
    target: dict
    latents: Tensor
    generator_id: str

    def __repr__(self) -> str:
        prompts = list(dict.fromkeys(self.prompts))
        return f"{type(self).__name__}({len(self.labels)} samples for {prompts}, seeds {self.seeds})"

    def to_model(self, index: int = 0):
        """
        The network with sample `index` in it, in eval mode: a `PeftModelForSequenceClassification` whose config has
        `id2label`, or a [`TargetModel`].
        """
        count = len(self.weights)
        if not -count <= index < count:
            raise IndexError(f"There is no sample {index}: this output holds {count} of them, counted from 0.")
        weights, names = self.weights[index], self.labels[index]
        id2label = dict(enumerate(names))
        label2id = {name: i for i, name in id2label.items()}
        if self.target["kind"] == "network":
            config = TargetConfig(
                **self.target["config"], num_classes=len(names), id2label=id2label, label2id=label2id
            )
            model = TargetModel(config)
            model.load_state_dict(weights)
            return model.eval()
        base = load_classifier(self.target["base_model"], len(names), id2label=id2label, label2id=label2id)
        model = get_peft_model(base, LoraConfig(**self.target["lora"]))
        places = {
            name: tuple(t.shape) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
        came = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        wrong = [name for name in places | came if places.get(name) != came.get(name)]
        if wrong:
            raise ValueError(
                f"The base model {self.target['base_model']!r} has {places.get(wrong[0], 'no place')} for {wrong[0]!r}, the adapter "
                f"has {came.get(wrong[0], 'no such tensor')}; load the base model that the adapter was made for."
            )
        set_peft_model_state_dict(model, weights)
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike) -> list[Path]:
        """
        Saves one sample as a plain PEFT (or transformers) folder at `save_directory`, several as `0000`, `0001`, … in it,
        each with a card and `labels.json`. Folders appear only when they are complete.

        Returns:
            `list[Path]`: The folders.
        """
        root = Path(save_directory)
        if not self.weights:
            raise ValueError(
                "There are no weights to save: they were not decoded. Call the pipeline with `output_type='weights'`."
            )
        file = next((path for path in (root, *root.parents) if path.is_file()), None)
        if file is not None:
            raise ValueError(f"`save_directory` {str(root)!r}: {str(file)!r} is a file; give a folder.")
        count = 0 if len(self.weights) == 1 else len(self.weights)
        old = sorted(p.name for p in root.glob("[0-9]" * 4) if int(p.name) >= count)
        if old:
            raise ValueError(
                f"`save_directory` {str(root)!r} holds the sample {old[0]!r} of an earlier call, which would be taken for one of "
                "this call; give another folder, or delete it."
            )
        folders = [root] if len(self.weights) == 1 else [root / f"{i:04d}" for i in range(len(self.weights))]
        for index, folder in enumerate(folders):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".weightgen-") as temporary:
                self._write(index, Path(temporary))
                folder.mkdir(exist_ok=True)
                for file in Path(temporary).iterdir():
                    os.replace(file, folder / file.name)
        return folders

    def _write(self, index: int, folder: Path) -> None:
        names = self.labels[index]
        if self.target["kind"] == "network":
            self.to_model(index).save_pretrained(folder)
        else:
            config = LoraConfig(
                **self.target["lora"], base_model_name_or_path=self.target["base_model"], inference_mode=True
            )
            config.save_pretrained(folder)
            tensors = {name: tensor.contiguous() for name, tensor in self.weights[index].items()}
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "labels.json").write_text(json.dumps(names, ensure_ascii=False, indent=1))
        write_card(
            folder,
            kind=self.target["kind"],
            base_model=self.target.get("base_model"),
            labels=names,
            prompt=self.prompts[index],
            seed=self.seeds[index],
            task=self.tasks[index],
            generator=self.generator_id,
        )


class WeightGenPipeline(DiffusionPipeline):
    """
    Base of the weight generators. `WeightGenPipeline.from_pretrained` returns the pipeline class that the folder or
    repository names in its `model_index.json`; `"bundled"` is the small text generator inside this package.

    The text encoder is frozen and shared, so it is not saved: the config names it, and it is loaded at first use.
    """

    _optional_components = ["text_encoder", "tokenizer"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        source = path = os.fspath(pretrained_model_name_or_path)
        if source == "bundled":
            path = str(BUNDLED)
            if not (BUNDLED / INDEX).is_file():
                raise FileNotFoundError(
                    f"This installation has no bundled generator in {str(BUNDLED)!r}; reinstall the package."
                )
        if os.path.isdir(path):
            _check_folder(Path(path))
        elif os.path.isfile(path) or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"There is no generator folder {path!r}. Give its folder, a Hub id, or 'bundled'.")
        if cls is WeightGenPipeline:
            index = Path(path, INDEX) if os.path.isdir(path) else _download_index(path, kwargs)
            name = _read_index(index).get("_class_name")
            if not isinstance(name, str) or name not in PIPELINES:
                raise ValueError(
                    f"{path!r} holds a {name!r}, expected one of {sorted(PIPELINES)}; it is no generator of this library, "
                    "or was made by a newer version of it."
                )
            return getattr(import_module(f".{PIPELINES[name]}", __package__), name).from_pretrained(source, **kwargs)
        folder = Path(path if os.path.isdir(path) else cls.download(path, **kwargs))
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = torch.float32  # what is stored in float16 would otherwise be computed in float16 too
        try:
            pipe = super().from_pretrained(str(folder), **kwargs)
        except (RuntimeError, ValueError) as error:  # for example, tensors of other shapes
            raise ValueError(f"{str(folder)!r} does not load: {error} Download or save the generator anew.") from error
        for name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module) and name not in kwargs:
                _check_names(folder / name, component)
        for part in (pipe, *pipe.components.values()):
            if isinstance(part, ConfigMixin):
                part.register_to_config(
                    _name_or_path=None
                )  # a path of this machine, which `save_pretrained` would hand on
        pipe._source, pipe._folder = source, folder
        return pipe

    @classmethod
    def download(cls, pretrained_model_name, **kwargs):
        """The stock `download` refuses components that do not live in diffusers; ours takes the whole repository, no pickles."""
        if kwargs.get("variant") is not None:
            raise ValueError(
                f"`variant` {kwargs['variant']!r} is not supported for generators on the Hub; choose a `revision`."
            )
        kept = {k: kwargs[k] for k in HUB_SETTINGS if k in kwargs}
        folder = snapshot_download(pretrained_model_name, ignore_patterns=list(PICKLES), **kept)
        _check_folder(Path(folder))
        return folder

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Names our components by one stable module, so that the tree may change without breaking saved generators."""
        for key, value in list(self.config.items()):
            if isinstance(value, (list, tuple)) and len(value) == 2 and str(value[0]).startswith("hf_weightgen."):
                self._internal_dict = type(self.config)({**self.config, key: (COMPONENTS, value[1])})
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def encoder(self) -> TextEncoder:
        """The frozen text encoder, loaded at first use."""
        if getattr(self, "_encoder", None) is None:
            given = getattr(self, "text_encoder", None)
            if given is not None:
                self._encoder = TextEncoder(given, self.tokenizer)
            else:
                named = self.config.get("encoder") or {"id": MINILM}
                self._encoder = load_encoder(named["id"], named.get("revision"), sha256=named.get("sha256"))
        return self._encoder

    @property
    def source(self) -> str:
        return getattr(self, "_source", "a generator in memory")

    @property
    def folder(self) -> Path | None:
        """The folder that this generator was loaded from: a given one, or the download of a repository."""
        return getattr(self, "_folder", None)

    def check_prompts(self, prompt: str | Sequence[str]) -> list[str]:
        """
        Raises:
            TypeError: If a prompt is not text.
            ValueError: If there is none, or one is empty or longer than a description can be.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or any(not isinstance(p, str) for p in prompts):
            raise TypeError(
                f"`prompt` must be text or a list of texts, got {type(prompt).__name__}: {str(prompt)[:60]!r}."
            )
        if not prompts:
            raise ValueError("`prompt` is an empty list; describe at least one task, e.g. 'sentiment on SST-2'.")
        for text in prompts:
            if not any(character.isalnum() for character in text):
                raise ValueError(f"`prompt` {text!r} says nothing; describe the task, e.g. 'sentiment on SST-2'.")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(
                    f"`prompt` {text!r} holds a lone surrogate, half of a character: read it anew with the right encoding."
                )
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise ValueError(
                    f"`prompt` has {len(text):,} characters, expected at most {MAX_PROMPT_CHARACTERS:,}: the text encoder reads "
                    "256 tokens. Describe the task in a sentence; do not paste the data."
                )
        return list(prompts)

    def check_labels(self, labels, num_prompts: int) -> list[list[str]] | None:
        """One list of class names per prompt, from one list for all or one for each."""
        if labels is None:
            return None
        if isinstance(labels, str) or not isinstance(labels, Sequence):
            raise TypeError(
                f"`labels` must be a list of class names, got {type(labels).__name__}: {str(labels)[:60]!r}."
            )
        nested = labels and all(isinstance(names, Sequence) and not isinstance(names, str) for names in labels)
        each = [list(names) for names in labels] if nested else [list(labels)] * num_prompts
        if len(each) != num_prompts:
            raise ValueError(
                f"`labels` has {len(each)} lists for {num_prompts} prompts; give one list, or one per prompt."
            )
        for names in each:
            if any(not isinstance(name, str) or not name.strip() for name in names):
                raise ValueError(f"`labels` must hold non-empty names, got {names!r}.")
            if len(names) < 2:
                raise ValueError(f"`labels` must name at least 2 classes, got {names!r}.")
            plain = [name.strip().casefold() for name in names]
            twice = sorted(name for name in plain if plain.count(name) > 1)
            if twice:
                raise ValueError(f"`labels` names {twice[0]!r} twice in {names!r}; classes need different names.")
        return each

    def nearest_tasks(self, prompt_embeds: Tensor, count: int = 3) -> list[list[tuple[dict, float]]]:
        """For each prompt embedding `(N, E)` the known tasks with the nearest prompts, and their cosines."""
        known = self.config["tasks"]
        size = prompt_embeds.shape[1]
        centres = [unpack_embeddings(task["prompt_embeddings"], size) for task in known]  # (centres, E), unit length
        cosines = torch.stack([(prompt_embeds @ own.mT).amax(1) for own in centres], 1)  # (N, tasks)
        return [[(known[j], row[j].item()) for j in row.argsort(descending=True)[:count].tolist()] for row in cosines]

    def warn_if_far(self, prompt: str, nearest: list[tuple[dict, float]]) -> None:
        """Warns if a prompt is far from all known tasks."""
        if nearest[0][1] < self.config["far_below"]:
            names = ", ".join(f"{task['name']} ({cosine:.2f})" for task, cosine in nearest)
            warnings.warn(
                f"The prompt {prompt[:80]!r} is far from every task that this generator knows; nearest: {names}. "
                "Weights for an unseen task can be much weaker: try them on labelled examples first.",
                MismatchWarning,
                stacklevel=4,  # the caller of the pipeline, past `no_grad`
            )


def _check_folder(folder: Path) -> None:
    """Generators are whole safetensors and JSON files; a pickle could run code when it is loaded."""
    for pattern in PICKLES:
        for found in folder.rglob(pattern):
            raise ValueError(
                f"{str(found)!r} is a pickle or another format that can run code when loaded; generators hold safetensors "
                "only. Remove the file, or convert it to safetensors with a tool that you trust."
            )
    index = folder / INDEX
    for name, entry in _read_index(index).items():
        if (
            isinstance(entry, list)
            and len(entry) == 2
            and entry[0] not in (None, COMPONENTS, "diffusers", "transformers")
            and name[0] != "_"
        ):
            if isinstance(entry[0], str) and isinstance(entry[1], str):
                raise ValueError(
                    f"{str(index)!r} wants {name!r} from the module {entry[0]!r}; only {COMPONENTS}, diffusers and transformers are loaded from."
                )
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header and compares the length of the file with it
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{str(file)!r} is truncated or no safetensors file ({error}); download or save the generator anew."
            ) from error


def _read_index(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(
            f"No {INDEX} in {str(file.parent)!r}: this is no generator. Give its folder, a Hub id, or 'bundled'."
        )
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is no JSON object ({error}); download or save the generator anew.") from error


def _download_index(repo_id: str, settings: dict) -> Path:
    try:
        return Path(hf_hub_download(repo_id, INDEX, **{k: settings[k] for k in HUB_SETTINGS if k in settings}))
    except (HTTPError, OSError) as error:
        raise FileNotFoundError(
            f"Generator {repo_id!r} was not found: it is no folder, and the Hub and its cache did not give its {INDEX} "
            f"({str(error).strip().splitlines()[0]}). Check the id and the connection, or give a folder."
        ) from error


def _check_names(folder: Path, model: torch.nn.Module) -> None:
    """What a file of another network lacks would otherwise stay random, with no more than a warning in a log."""
    stored = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored.update(tensors.keys())
    wanted = set(model.state_dict())
    if stored and stored != wanted:
        what = (
            f"lack {sorted(wanted - stored)[0]!r}"
            if wanted - stored
            else f"hold {sorted(stored - wanted)[0]!r}, which has no place"
        )
        raise ValueError(
            f"The weights in {str(folder)!r} {what} in {type(model).__name__} ({len(wanted ^ stored)} names differ): they are of "
            "another network than its config.json. Download or save the generator anew."
        )

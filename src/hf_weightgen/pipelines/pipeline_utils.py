"""What all weight-generation pipelines share: loading, publishing, prompts and labels.

Notation: N samples, C classes, E size of an embedding.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from huggingface_hub import CommitInfo
from torch import Tensor

from ..hub.cards import EVALUATION, needs_card, readdress, told_targets, write_card
from ..hub.download import download
from ..hub.errors import explained
from ..hub.publish import copy_for_publication, upload
from ..targets.base_models import MINILM, TextEncoder, load_encoder, unpack_embeddings
from ..targets.image_encoders import ImageEncoder, load_image_encoder
from ..targets.mixed import target_numbers
from .loading import COMPONENTS, INDEX, check_components, check_generator, read_index, with_our_names, write_stubs


PIPELINES = {"D2NWGPipeline": "pipeline_d2nwg", "IGPGPipeline": "pipeline_igpg"}
BUNDLED = Path(__file__).parents[1] / "bundled"
MAX_PROMPT_CHARACTERS = 4_000
HUB_SETTINGS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
REFUSED = (
    "custom_pipeline",
    "custom_revision",
    "trust_remote_code",
    "from_flax",
    "use_onnx",
    "connected",
    "mirror",
    "proxies",
)


class MismatchWarning(UserWarning):
    """The prompt is far from every known task, or, where a generator judges it as D2NWG does, the class names do not fit it."""


class WeightGenPipeline(DiffusionPipeline):
    """
    Base of the weight generators. `WeightGenPipeline.from_pretrained` returns the pipeline class that the folder or
    repository names in its `model_index.json`; `"bundled"` is the small text generator inside this package.

    The text encoder is frozen and shared, so it is not saved: the config names it, and it is loaded at first use.
    """

    _optional_components = ["text_encoder", "tokenizer", "dataset_encoder", "accuracy_predictor"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Args:
            pretrained_model_name_or_path: A folder, an id on the Hub, or `"bundled"`.
            revision, token, cache_dir, local_files_only, force_download, variant, dtype, and components as keywords: as in
                diffusers.

        Raises:
            ValueError: If it is no generator, or an argument would execute code of a repository or is not supported.
            UntrustedFileError: If its files are not what a generator consists of.
            HubError, FileNotFoundError: If it cannot be reached, or is not there.
        """
        source = os.fspath(pretrained_model_name_or_path)
        refused = [name for name in REFUSED if kwargs.get(name)]
        if refused:
            raise ValueError(
                f"`{refused[0]}` is not supported: this loader never executes anything from a repository, and takes files from "
                "the Hub as they are. Leave it out."
            )
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "`use_safetensors=False` is not supported: generators hold safetensors only. Leave it out."
            )
        folder = cls._folder_of(source, kwargs)
        name = read_index(folder).get("_class_name")
        if not isinstance(name, str) or name not in PIPELINES:
            raise ValueError(
                f"{source!r} holds a {name!r}, expected one of {sorted(PIPELINES)}; it is no generator of this library, "
                "or was made by a newer version of it."
            )
        named = getattr(import_module(f".{PIPELINES[name]}", __package__), name)
        if not issubclass(named, cls):
            raise ValueError(f"{source!r} holds a {name}, no {cls.__name__}; load it with `WeightGenPipeline`.")
        return named._load(folder, source, {k: v for k, v in kwargs.items() if k not in HUB_SETTINGS})

    @classmethod
    def _folder_of(cls, source: str, kwargs: dict) -> Path:
        if source == "bundled":
            if not (BUNDLED / INDEX).is_file():
                raise FileNotFoundError(
                    f"This installation has no bundled generator in {str(BUNDLED)!r}; reinstall the package."
                )
            return BUNDLED
        if os.path.isdir(source):
            return Path(source)
        if os.path.isfile(source) or source.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"There is no generator folder {source!r}. Give its folder, a Hub id, or 'bundled'."
            )
        return Path(cls.download(source, **kwargs))

    @classmethod
    def _load(cls, folder: Path, source: str, kwargs: dict):
        check_generator(folder, given=kwargs)
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = torch.float32  # what is stored in float16 would otherwise be computed in float16 too
        try:
            pipe = super().from_pretrained(str(folder), **kwargs)
            _check_finite(pipe)
            pipe.check_parts()
        except Exception as error:  # of diffusers, transformers or our own constructors, about one file or another
            raise ValueError(f"{str(folder)!r} does not load: {error} Download or save the generator anew.") from error
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
        kept = {name: kwargs[name] for name in HUB_SETTINGS if name in kwargs}
        return str(download(pretrained_model_name, marker=INDEX, **kept))

    @classmethod
    def load_config(cls, *args, **kwargs):
        """Reads the index in either published form, see [`write_stubs`]."""
        loaded = super().load_config(*args, **kwargs)
        if isinstance(loaded, tuple):
            return with_our_names(dict(loaded[0])), *loaded[1:]
        return with_our_names(dict(loaded))

    def check_parts(self) -> None:
        """Raises a ValueError if the settings of the parts do not fit each other; each pipeline has its own rules."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs):
        """As in diffusers; with `push_to_hub` it is published by [`~WeightGenPipeline.push_to_hub`] afterwards."""
        if kwargs.get("max_shard_size") is not None:
            raise ValueError("`max_shard_size` is not supported: each part of a generator is one file. Leave it out.")
        told = {name: kwargs.pop(name, None) for name in ("repo_id", "private", "token", "commit_message")}
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)
        if push_to_hub:
            self.push_to_hub(told.pop("repo_id") or Path(save_directory).name, **told)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        remote_code: bool = False,
    ) -> CommitInfo:
        """
        Publishes the generator with its card, see [`~hub.publish.upload`], in the dtype that it has: `pipe.to(torch.float16)`
        before halves it.

        Args:
            remote_code: Whether the stock `DiffusionPipeline` shall load it with `trust_remote_code=True` too. This library
                must be installed there all the same.
        """
        with tempfile.TemporaryDirectory(prefix="weightgen-") as temporary, explained("publishing to", repo_id):
            folder = Path(temporary)
            self.save_pretrained(folder)
            for name in ("README.md", EVALUATION):
                if self.folder is not None and (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
            settings = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
            return _complete_and_upload(folder, repo_id, remote_code, settings)

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
    def image_encoder(self) -> ImageEncoder:
        """The frozen encoder of a dataset's images: loaded by its id at first use, or set by the caller, see [`~targets.image_encoders.load_image_encoder`]."""
        if getattr(self, "_image_encoder", None) is None:
            named = self.config["image_encoder"]
            try:
                self._image_encoder = load_image_encoder(
                    named["id"], named.get("revision"), sha256=named.get("sha256")
                )
            except FileNotFoundError as error:
                error.add_note(
                    "This generator sees images by it; set `pipe.image_encoder = load_image_encoder(FOLDER)`."
                )
                raise
        return self._image_encoder

    @image_encoder.setter
    def image_encoder(self, encoder: ImageEncoder) -> None:
        self._image_encoder = encoder

    @property
    def targets(self) -> list[dict]:
        """What may receive weights, each with its `layout`."""
        return self.config.get("targets") or [{**self.config["target"], "layout": 0}]

    @property
    def source(self) -> str:
        return getattr(self, "_source", "a generator in memory")

    @property
    def folder(self) -> Path | None:
        """The folder that this generator was loaded from: a given one, or the download of a repository."""
        return getattr(self, "_folder", None)

    @property
    def revision(self) -> str | None:
        """The commit on the Hub that this generator was loaded from."""
        return self.folder.name if self.folder is not None and self.folder.parent.name == "snapshots" else None

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
            if _is_torn(text):
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
            if any(map(_is_torn, names)):
                raise ValueError(f"`labels` {names!r} holds a lone surrogate, half of a character: read it anew.")
            if len(names) < 2:
                raise ValueError(f"`labels` must name at least 2 classes, got {names!r}.")
            plain = [name.strip().casefold() for name in names]
            twice = sorted(name for name in plain if plain.count(name) > 1)
            if twice:
                raise ValueError(f"`labels` names {twice[0]!r} twice in {names!r}; classes need different names.")
        return each

    def nearest_tasks(
        self, prompt_embeds: Tensor, channels: int | None = None, count: int = 3
    ) -> list[list[tuple[dict, float]]]:
        """
        For each prompt embedding `(N, E)` the known tasks with the nearest prompts, and their cosines.

        Args:
            channels: Of images that the networks shall read; where no task has such networks, it does not count.
        """
        known = self.config["tasks"]
        known = [task for task in known if channels in (None, self._channels(task))] or known
        size = prompt_embeds.shape[1]
        centres = [unpack_embeddings(task["prompt_embeddings"], size) for task in known]  # (centres, E), unit length
        cosines = torch.stack([(prompt_embeds @ own.mT).amax(1) for own in centres], 1)  # (N, tasks)
        return [[(known[j], row[j].item()) for j in row.argsort(descending=True)[:count].tolist()] for row in cosines]

    def _channels(self, task: Mapping) -> int | None:
        """Of the images that a task's networks read."""
        shape = self.targets[target_numbers(task)[0]].get("config", {}).get("input_shape", ())
        return shape[0] if len(shape) == 3 else None

    def warn_if_far(self, asked: str, nearest: list[tuple[dict, float]], threshold: str) -> None:
        """Warns if a prompt or a dataset is far from all known tasks; `threshold` is the setting that tells how far that is."""
        if nearest[0][1] < self.config[threshold]:
            names = ", ".join(f"{task['name']} ({cosine:.2f})" for task, cosine in nearest)
            warnings.warn(
                f"The {asked} is far from every task that this generator knows; nearest: {names}. "
                "Weights for an unseen task can be much weaker: try them on labelled examples first.",
                MismatchWarning,
                stacklevel=5,  # the caller of the pipeline, past `no_grad` and the reading of the request
            )


def publish_generator(folder: str | Path, repo_id: str, remote_code: bool = False, **settings) -> CommitInfo:
    """
    Publishes the folder of a saved generator, which is left as it is.

    Args:
        remote_code: See [`~WeightGenPipeline.push_to_hub`].
        settings: Of [`~hub.publish.upload`].
    """
    with tempfile.TemporaryDirectory(prefix="weightgen-") as temporary, explained("publishing to", repo_id):
        copy = copy_for_publication(folder, Path(temporary) / "generator")
        return _complete_and_upload(copy, repo_id, remote_code, settings)


def _complete_and_upload(folder: Path, repo_id: str, remote_code: bool, settings: dict) -> CommitInfo:
    """Adds what a published generator has beside a saved one: a card that names its place, and stubs if they are wanted."""
    check_components(folder)
    if needs_card(folder):
        index = read_index(folder)
        prompt = f"{index['tasks'][0]['name']}: {', '.join(index['tasks'][0]['labels'][:4])}"
        told = told_targets(index.get("targets") or [index["target"]])
        method = index["_class_name"].removesuffix("Pipeline")
        write_card(folder, "generator", prompt=prompt, generator=repo_id, method=method, **told)
    if remote_code:
        write_stubs(folder)
    readdress(folder, repo_id, revision=settings.get("revision"))
    return upload(folder, repo_id, **settings)


def _check_finite(pipe) -> None:
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for key, tensor in component.state_dict().items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"{name}: {key!r} holds NaN or infinite weights.")


def _is_torn(text: str) -> bool:
    """Whether a text holds half of a character."""
    return any("\ud800" <= character <= "\udfff" for character in text)

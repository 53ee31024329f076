"""What weight-generation pipelines return: weights that become models, folders and repositories."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers.utils import BaseOutput
from huggingface_hub import CommitInfo
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ..hub.cards import DETAILS, add_results, needs_card, readdress, version, write_card
from ..hub.errors import explained
from ..hub.publish import copy_for_publication, kind_of, upload
from ..hub.untrusted import is_repo_id, read_json
from ..targets import architectures
from ..targets.architectures import TargetConfig, TargetModel
from ..targets.base_models import load_classifier
from ..targets.symmetry import BUFFERS
from ..targets.tasks import TASKS
from .shards import sample_folders


CODE = "modeling_target"
NOT_DECODED = (
    "There are no weights in this output: they were not decoded. Call the pipeline with `output_type='weights'`."
)
KEPT = ("labels", "tasks", "prompts", "seeds", "targets", "predicted_accuracies")  # of an output, one entry per sample
CONFIGS = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "network": ("config.json", "model.safetensors"),
}


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
        targets (`list[dict]`): Per sample what receives the weights: `{"kind": "adapter", "base_model": id, "lora": {...}}` or
            `{"kind": "network", "config": {...}}`, with the `name` of its architecture where the generator knows it.
        latents: What the weights were decoded from: latents `(N, channels, height, width)`, or codes, see [`IGPGPipeline`].
        generator_id (`str`): Where the generator was loaded from.
        generator_revision (`str`, *optional*): Its commit on the Hub.
        command (`str`, *optional*): What makes all of these samples again, for the card.
        predicted_accuracies (`list[float]`, *optional*): Per sample what the generator's accuracy predictor expects of it, from
            0 to 1; absent where it has none.
    """

    weights: list
    labels: list
    tasks: list
    prompts: list
    seeds: list
    targets: list
    latents: Tensor
    generator_id: str
    generator_revision: str | None = None
    command: str | None = None
    predicted_accuracies: list | None = None
    module: nn.Module | None = None

    def __repr__(self) -> str:
        prompts = list(dict.fromkeys(self.prompts))
        return f"{type(self).__name__}({len(self.labels)} samples for {prompts}, seeds {self.seeds})"

    def to_model(self, index: int = 0):
        """
        The network with sample `index` in it, in eval mode: a `PeftModelForSequenceClassification` whose config has
        `id2label`, a [`TargetModel`], or a copy of the caller's own module, with its buffers.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If the weights are only a part of a network, as those of a zoo along one training run may be, or were not
                decoded.
        """
        count = len(self.weights)
        if not self.weights:
            raise ValueError(NOT_DECODED)
        if not -count <= index < count:
            raise IndexError(f"There is no sample {index}: this output holds {count} of them, counted from 0.")
        weights, names, target = self.weights[index], self.labels[index], self.targets[index]
        if target["kind"] == "module":
            if self.module is None:
                raise ValueError(
                    "The weights are for a module that is not here; load them with its `load_state_dict`."
                )
            if any(tensor.is_meta for tensor in self.module.state_dict().values()):
                raise ValueError(
                    "The module is on the device 'meta', without memory: load the weights into one that has some, with its "
                    "`load_state_dict(weights, strict=False)`."
                )
            model = copy.deepcopy(self.module)
            _check_shapes(weights, model.state_dict(), "module", "sample", "give the module that it was generated for")
            model.load_state_dict({**model.state_dict(), **weights})
            return model.eval()
        id2label = dict(enumerate(names))
        label2id = {name: i for i, name in id2label.items()}
        if target["kind"] == "network":
            config = TargetConfig(**target["config"], num_classes=len(names), id2label=id2label, label2id=label2id)
            model = TargetModel(config)
            lacking = [name for name in model.state_dict() if name not in weights and not name.endswith(BUFFERS[2])]
            if lacking:
                raise ValueError(
                    f"The weights are a part of a network, without {lacking[0]!r}; load them onto the one whose training the zoo "
                    "followed, with its `load_state_dict(weights, strict=False)`."
                )
            _check_shapes(weights, model.state_dict(), "network of its target", "sample", "give the target it is for")
            model.load_state_dict({**dict(model.named_buffers()), **weights})
            return model.eval()
        base = load_classifier(target["base_model"], len(names), id2label=id2label, label2id=label2id)
        model = get_peft_model(base, LoraConfig(**target["lora"]))
        places, told = (
            get_peft_model_state_dict(model, save_embedding_layers=False),
            f"base model {target['base_model']!r}",
        )
        _check_shapes(
            weights, places, told, "adapter", "load the base model that the adapter was made for", whole=True
        )
        set_peft_model_state_dict(model, weights)
        for module in model.modules():  # PEFT keeps the random head of the base model beside ours
            if isinstance(module, ModulesToSaveWrapper):
                module.original_module.load_state_dict(next(iter(module.modules_to_save.values())).state_dict())
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike) -> list[Path]:
        """
        Saves one sample as a plain PEFT (or transformers) folder at `save_directory`, several as `0000`, `0001`, … in it,
        each with a card and `labels.json`. Folders appear only when they are complete.

        Returns:
            `list[Path]`: The folders.
        """
        if any(target["kind"] == "module" for target in self.targets):
            raise ValueError("The weights are for a module of your own: save that, as `to_model` returns it.")
        if not self.weights:
            raise ValueError(NOT_DECODED)
        folders = sample_folders(Path(save_directory), len(self.weights))
        for target, folder in zip(self.targets, folders, strict=True):
            for kind, (config, _) in CONFIGS.items():
                if kind != target["kind"] and (folder / config).exists():
                    raise ValueError(
                        f"`save_directory`: {str(folder / config)!r} is of an earlier {kind}, beside which this {target['kind']} "
                        "could not be told from it; give another folder, or delete it."
                    )
        for index, folder in enumerate(folders):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".weightgen-") as temporary:
                self._write(index, Path(temporary))
                folder.mkdir(exist_ok=True)
                for file in Path(temporary).iterdir():
                    os.replace(file, folder / file.name)
        return folders

    def _write(self, index: int, folder: Path) -> None:
        names, target, known = self.labels[index], self.targets[index], TASKS.get(self.tasks[index])
        if target["kind"] == "network":
            self.to_model(index).save_pretrained(folder)
        else:
            config = LoraConfig(**target["lora"], base_model_name_or_path=target["base_model"], inference_mode=True)
            config.save_pretrained(folder)
            tensors = {name: tensor.contiguous() for name, tensor in self.weights[index].items()}
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        for file in folder.glob("*.safetensors"):  # which are written for their owner alone
            shutil.copymode(folder / CONFIGS[target["kind"]][0], file)
        (folder / "labels.json").write_text(json.dumps(names, ensure_ascii=False, indent=1))
        write_card(
            folder,
            kind=target["kind"],
            base_model=target.get("base_model"),
            labels=names,
            # a network of a known task on texts is a head on them
            examples="images" if target.get("config", {}).get("image_mean") else "texts" if known else None,
            prompt=self.prompts[index],
            seed=self.seeds[index],
            task=self.tasks[index],
            generator=self._generator(),
            command=self.command,
            facts={"sample": f"{index} of {len(self.weights)}, counted from 0"} if len(self.weights) > 1 else None,
            datasets=[known.dataset_id] if known else (),
        )

    def _generator(self) -> str:
        if self.generator_revision:
            return f"{self.generator_id}, revision {self.generator_revision}"
        if self.generator_id == "bundled":
            return f"bundled with hf_weightgen {version()}"
        path = Path(self.generator_id)
        return f"{path.name} (a folder)" if path.is_absolute() or path.is_dir() else self.generator_id

    def push_to_hub(
        self,
        repo_id: str,
        indices: Sequence[int] | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        remote_code: bool = False,
        rows: Sequence[Mapping] = (),
    ) -> CommitInfo:
        """
        Publishes samples as a plain PEFT (or transformers) repository that loads without this library: one sample at its
        root, several in the folders `0000`, `0001`, … (`subfolder="0000"` loads the first of them).

        Args:
            indices: Which samples. Default: all.
            private, token, revision, commit_message: See [`~hub.publish.upload`].
            remote_code, rows: See [`publish_weights`].
        """
        with tempfile.TemporaryDirectory(prefix="weightgen-") as temporary, explained("publishing to", repo_id):
            folder = Path(temporary) / "weights"
            chosen = self if indices is None else self.select(indices)
            chosen.save_pretrained(folder)
            return publish_weights(
                folder,
                repo_id,
                remote_code,
                rows,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )

    def select(self, indices: Sequence[int]) -> "WeightGenOutput":
        """The samples with these numbers, in this order."""
        count, indices = len(self.labels), list(indices)
        if not indices:
            raise ValueError("`indices` is empty: choose at least one sample.")
        for i in indices:
            if isinstance(i, bool) or not isinstance(i, int):
                raise TypeError(f"`indices` must hold whole numbers, got {i!r}.")
            if not -count <= i < count:
                raise IndexError(f"There is no sample {i}: choose among the {count} of this output, counted from 0.")
        kept = {name: [getattr(self, name)[i] for i in indices] for name in KEPT if getattr(self, name) is not None}
        weights = [self.weights[i] for i in indices] if self.weights else []
        command = self.command if indices == list(range(count)) else None  # it would make other samples too
        return replace(self, weights=weights, latents=self.latents[indices], command=command, **kept)


def _check_shapes(
    weights: Mapping[str, Tensor],
    places: Mapping[str, Tensor],
    model: str,
    kind: str,
    remedy: str,
    whole: bool = False,
) -> None:
    """That all weights have a place of their shape, and with `whole` all places weights; the rest is for the message."""
    have, came = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (places, weights))
    for name in have | came if whole else came:
        if have.get(name) != came.get(name):
            raise ValueError(
                f"The {model} has {have.get(name, 'no place')} for {name!r}, the {kind} has {came.get(name, 'no such tensor')}; "
                f"{remedy}."
            )


def publish_weights(
    folder: str | Path, repo_id: str, remote_code: bool = False, rows: Sequence[Mapping] = (), **settings
) -> CommitInfo:
    """
    Publishes a folder of saved adapters or networks, which is left as it is.

    Args:
        remote_code: For networks: adds `modeling_target.py`, with which they load through `trust_remote_code=True` where
            this library is not installed.
        rows: The honest table of the task, as `hf-weightgen evaluate --out` writes it, for the card and its metadata.
        settings: Of [`~hub.publish.upload`].

    Raises:
        ValueError: If an adapter names its base model by a path, or `remote_code` is asked for adapters.
    """
    kind = kind_of(folder)
    if kind == "adapter" and remote_code:
        raise ValueError("`remote_code` is for networks: adapters load with plain PEFT.")
    config_name, weights = CONFIGS[kind]
    with tempfile.TemporaryDirectory(prefix="weightgen-") as temporary, explained("publishing to", repo_id):
        copy = copy_for_publication(folder, Path(temporary) / "weights")
        places = [file.parent for file in sorted([*copy.glob(config_name), *copy.glob(f"*/{config_name}")])]
        for place in places:
            name = (Path(folder) / place.relative_to(copy)).as_posix()  # of the user's folder, not of the copy
            if not (place / weights).is_file():
                raise ValueError(f"{name!r} has a {config_name} and no {weights}; save it anew.")
            config, labels = _read(place / config_name, dict, name), []
            if (place / "labels.json").is_file():
                labels = _read(place / "labels.json", list, name)
            if not all(isinstance(label, str) for label in labels):
                raise ValueError(f"The labels.json in {name!r} must be a list of names, got {str(labels)[:80]}.")
            base = config.get("base_model_name_or_path")
            if kind == "adapter" and not is_repo_id(base):
                raise ValueError(
                    f"The adapter in {name!r} names its base model {base!r}, which nobody else can load; set "
                    "`base_model_name_or_path` to the model's id on the Hub."
                )
            if needs_card(place):
                write_card(place, kind, base_model=base, labels=labels)
            subfolder = None if place == copy else place.name
            readdress(place, repo_id, subfolder, settings.get("revision"))
            if remote_code:
                _add_code(place, copy, config, repo_id, subfolder)
        if not (copy / "README.md").is_file():  # several samples: the card of the first speaks for all
            told = (
                f"This repository holds {len(places)} samples, in the folders {places[0].name} to {places[-1].name}, each with a "
                f"card of its own. The snippet and the details are those of {places[0].name}.\n\n{DETAILS}"
            )
            text = (places[0] / "README.md").read_text(encoding="utf-8").replace(DETAILS, told, 1)
            (copy / "README.md").write_text(text, encoding="utf-8")
        if rows:
            add_results(copy, rows)
        return upload(copy, repo_id, **settings)


def _read(file: Path, kind: type, place: str):
    value = read_json(file)
    if not isinstance(value, kind):
        raise ValueError(f"{file.name} in {place!r} must be a JSON {kind.__name__}, got {str(value)[:80]}.")
    return value


def _add_code(place: Path, root: Path, config: dict, repo_id: str, subfolder: str | None) -> None:
    """The file that transformers runs, which it looks for at the root of a repository, and how to load with it."""
    config["auto_map"] = {"AutoConfig": f"{CODE}.TargetConfig", "AutoModel": f"{CODE}.TargetModel"}
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(architectures.__file__, root / f"{CODE}.py")
    where = f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    told = f"Without hf_weightgen: `AutoModel.from_pretrained({where}, trust_remote_code=True)`.\n\n{DETAILS}"
    card = place / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(DETAILS, told, 1), encoding="utf-8")

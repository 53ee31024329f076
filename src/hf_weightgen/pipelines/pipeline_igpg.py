"""IGPG: the codes of a network, written one after another, conditioned on text, on a dataset, or on both, and on an architecture.

Reference: IGPG (https://huggingface.co/papers/2504.02012).

Notation: N samples, L tokens of a network, R codes per token, C classes, S scalars per token, E size of an embedding.
"""

import functools
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.modeling_dataset_encoder import DatasetEncoder
from ..models.modeling_igpg import CONDITIONS, IGPGPrior
from ..models.modeling_weight_vqvae import WeightVQVAE
from ..targets.architectures import TargetConfig
from ..targets.base_models import unpack_embeddings
from ..targets.mixed import in_words, nearest_resizable, same_network, shapes_in_order, target_numbers, target_of
from ..weights.descriptors import SIZE
from ..weights.pieces import Pieces
from ..weights.resize import resized
from ..weights.tokenization import WeightTokenizer
from ..weights.unseen import with_layout
from .codes import Codes
from .loading import check_settings, check_targets, is_name, resizable_targets
from .output import WeightGenOutput
from .pipeline_utils import WeightGenPipeline
from .request import Request, read_request, sample_generators
from .shards import SHARD_SIZE, sample_folders, write_shards


PADDING = -1  # in the place of codes, where a network has fewer tokens than another
COLD = 1e-6  # temperatures below take the likeliest codes: divided by them, logits would be infinite
GIVEN = "given"  # name of an architecture that a caller brings
UNNAMED = "default"  # and of one that had no name before
# to a generator with one more
CARRIED = {"encoder", "image_encoder", "far_below", "known_above", "datasets_above", "temperature"}


class IGPGPipeline(Codes, WeightGenPipeline):
    r"""
    Generates LoRA adapters or small networks, several architectures from one generator, code by code.

    Args:
        vqvae ([`WeightVQVAE`]): Weight tokens <-> codes.
        prior ([`IGPGPrior`]): Writes codes.
        weight_tokenizer, target, targets, tasks, encoder, dataset_encoder, image_encoder, far_below, datasets_above: As of
            [`D2NWGPipeline`].
        known_above: As there; told and not read, since nothing here judges whether class names fit a prompt.
        temperature: Default of a call.
    """

    model_cpu_offload_seq = "prior->vqvae"

    def __init__(
        self,
        vqvae: WeightVQVAE,
        prior: IGPGPrior,
        weight_tokenizer: WeightTokenizer,
        target: dict | None = None,  # diffusers takes arguments without a default for components
        tasks: list | None = None,
        encoder: dict | None = None,
        far_below: float = 0.4,
        known_above: float = 0.55,
        datasets_above: float = 0.85,
        temperature: float = 1.0,
        text_encoder=None,
        tokenizer=None,
        dataset_encoder: DatasetEncoder | None = None,
        targets: list | None = None,
        image_encoder: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            vqvae=vqvae,
            prior=prior,
            weight_tokenizer=weight_tokenizer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            dataset_encoder=dataset_encoder,
        )
        self.register_to_config(
            target=target,
            targets=targets,
            tasks=tasks,
            encoder=encoder,
            image_encoder=image_encoder,
            far_below=far_below,
            known_above=known_above,
            datasets_above=datasets_above,
            temperature=temperature,
        )

    def check_parts(self) -> None:
        vqvae, prior, size = self.vqvae.config, self.prior.config, self.vqvae.config.embedding_size
        check_settings(self.config, size)
        check_targets(self.targets, self.weight_tokenizer)
        if self.weight_tokenizer.token_size != vqvae.token_size * vqvae.class_parts:
            raise ValueError(
                f"the weight tokenizer makes tokens of {self.weight_tokenizer.token_size} scalars, the autoencoder reads them in "
                f"{vqvae.class_parts} parts of {vqvae.token_size}."
            )
        shared = ["num_codes", "codes_per_token", "descriptor_size", "embedding_size"]
        for name in shared + ["num_places"] * (prior.num_places > 0):
            if getattr(vqvae, name) != getattr(prior, name):
                raise ValueError(
                    f"`{name}` of the autoencoder is {getattr(vqvae, name)}, of the prior {getattr(prior, name)}: they are of "
                    "different generators."
                )
        if vqvae.descriptor_size != SIZE:
            raise ValueError(f"tokens are described by {SIZE} numbers, the autoencoder reads {vqvae.descriptor_size}.")
        if self.dataset_encoder is not None and self.dataset_encoder.config.embedding_size != size:
            raise ValueError(
                f"the dataset encoder makes embeddings of {self.dataset_encoder.config.embedding_size}, the prior reads {size}."
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        num_samples: int = 1,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "weights",
        return_dict: bool = True,
        dataset: object | None = None,
        architecture: str | TargetConfig | nn.Module | None = None,
        save_directory: str | os.PathLike | None = None,
        shard_size: int = SHARD_SIZE,
    ) -> WeightGenOutput | tuple:
        r"""
        Args:
            prompt, dataset, labels, num_samples, generator, prompt_embeds: As of a call of [`D2NWGPipeline`].
            architecture: One of the task's networks by its name, or any other, see [`~IGPGPipeline.with_architecture`].
            temperature: Of sampling: 1 as learned, less is nearer to the likeliest codes, 0 takes them, and decodes without noise.
            top_k, top_p: Only the `top_k` likeliest codes, or the likeliest ones that have `top_p` of the probability, may
                follow; 0 and 1 leave all in.
            output_type: `"weights"`, or `"codes"` to stop before decoding.
            return_dict: `False` returns a tuple.
            save_directory: With `output_type="codes"`: weights are decoded to safetensors files alone in it, tensor by tensor, so that
                of the weights one shard is in memory, unless they are resized; several samples in the folders `0000`, `0001`, ... See [`~pipelines.shards.write_shards`].
            shard_size: Bytes of a file.

        Returns:
            [`WeightGenOutput`], whose `latents` are the codes `(N, L, R)`, with -1 where a network has fewer tokens.

        Raises:
            TypeError, ValueError: If an argument does not fit; nothing has been generated then.
        """
        if isinstance(architecture, (TargetConfig, nn.Module)):
            name = _free(GIVEN, {target.get("name") for target in self.targets})
            wider = self.with_architecture(architecture, name)
            asked = {"prompt": prompt, "labels": labels, "num_samples": num_samples, "dataset": dataset}
            asked |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
            asked |= {"prompt_embeds": prompt_embeds, "output_type": output_type, "return_dict": return_dict}
            return wider(**asked, architecture=name, save_directory=save_directory, shard_size=shard_size)
        temperature = self.config.temperature if temperature is None else temperature
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature <= 100:
            raise ValueError(f"`temperature` must be a number from 0 to 100, got {temperature!r}.")
        temperature = temperature if temperature > COLD else 0
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
            raise ValueError(f"`top_k` must be a whole number of at least 0, got {top_k!r}.")
        if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be a number above 0 and up to 1, got {top_p!r}.")
        if output_type not in ("weights", "codes"):
            raise ValueError(f"`output_type` must be 'weights' or 'codes', got {output_type!r}.")
        if save_directory is not None and output_type != "codes":
            raise ValueError("With `save_directory`, `output_type` must be 'codes': weights go to files instead.")
        if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
            raise ValueError(f"`shard_size` must be a whole number of bytes, at least 1, got {shard_size!r}.")
        size = self.vqvae.config.embedding_size
        asked = read_request(self, size, prompt, labels, num_samples, generator, prompt_embeds, dataset, architecture)
        seeds, generators = sample_generators(generator, len(asked.prompts), num_samples)
        folders = [] if save_directory is None else sample_folders(Path(save_directory), len(seeds))
        targets, class_embeds, alike = [self.targets[number] for number in asked.numbers], [], defaultdict(list)
        written = [self._written(target) for target in targets]
        for i, target in enumerate(targets):
            of_classes = asked.class_embeds
            if of_classes is None:
                of_classes = self.encoder.embed(asked.labels[i])[None]  # (1, C, E)
            if target.get("num_classes") not in (None, of_classes.shape[1]):
                raise ValueError(
                    f"The network has {target['num_classes']} outputs, asked for are {of_classes.shape[1]} classes: "
                    f"{asked.labels[i][:8]}."
                )
            class_embeds.append(of_classes)
            alike[written[i]["layout"], of_classes.shape[1]].append(i)  # are written together
        conditions = self._conditions(asked, written)
        codes, weights = [None] * len(targets), [[] for _ in targets]
        for (layout, _), places in alike.items():
            of_classes = torch.cat([class_embeds[i] for i in places]).repeat_interleave(num_samples, 0).cpu()
            told, pieces = conditions[places].repeat_interleave(num_samples, 0), self._pieces(layout, of_classes)
            arguments = self._to_prior(told), functools.partial(self._read, pieces, of_classes), len(pieces)
            drawn = [g for i in places for g in generators[i * num_samples : (i + 1) * num_samples]]
            sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generators": drawn}
            together = self.prior.write_described(*arguments, **sampling if temperature else {}).cpu()
            for i, part in zip(places, together.split(num_samples), strict=True):
                codes[i], own = part, generators[i * num_samples : (i + 1) * num_samples]
                if output_type == "weights":
                    made = self.decode_codes(part, layout, class_embeds[i], own if temperature else None)
                    weights[i] = [dict(self._in_size(one.items(), targets[i], class_embeds[i])) for one in made]
                for one, noise, folder in zip(part, own, folders[i * num_samples :], strict=False):
                    made = self.stream_codes(one, layout, class_embeds[i], noise if temperature else None)
                    write_shards(self._in_size(made, targets[i], class_embeds[i]), folder, shard_size)
        self.maybe_free_model_hooks()
        longest = max(own.shape[1] for own in codes)
        output = WeightGenOutput(
            weights=[state_dict for made in weights for state_dict in made],
            labels=[names for names in asked.labels for _ in range(num_samples)],
            tasks=[near[0][0]["name"] for near in asked.nearest for _ in range(num_samples)],
            prompts=[text for text in asked.prompts for _ in range(num_samples)],
            seeds=seeds,
            targets=[self._told(target) for target in targets for _ in range(num_samples)],
            latents=torch.cat([F.pad(own, (0, 0, 0, longest - own.shape[1]), value=PADDING) for own in codes]),
            generator_id=self.source,
            generator_revision=self.revision,
            module=getattr(self, "_modules", {}).get(architecture),
        )
        return output if return_dict else output.to_tuple()

    def with_architecture(
        self, architecture: TargetConfig | nn.Module, name: str = GIVEN, resize: bool = True
    ) -> "IGPGPipeline":
        """
        This generator, with one architecture more, of which it has seen no network: tasks whose networks read the same kind of
        inputs have it too.

        Args:
            architecture: A config, or any module. Of a module the parameters are written, and its buffers left; if its last two
                parameters are weight and bias of a linear layer, that is the head, whose rows are classes.
            name: By which `architecture` of a call asks for it.
            resize: Where a config differs from a known one in the widths of its layers alone, or in linear layers that follow its
                own, and not in its activation, codes are those of the known one, whose weights then get the new sizes, see
                [`~weights.resize.resized`], in memory as a whole. Without it, and for all other networks, codes of the new one
                itself are written.

        Returns:
            [`IGPGPipeline`], which shares all networks with this one.

        Raises:
            TypeError, ValueError: If it is none of these, no task fits it, or the name is taken.
        """
        target, layout, reads = target_of(architecture, self.weight_tokenizer.token_size)
        if not is_name(name):
            raise ValueError(f"`name` must be a short line of text, got {str(name)[:60]!r}.")
        if name in {known.get("name") or UNNAMED for known in self.targets}:
            raise ValueError(f"This generator has an architecture {name!r} already; give another `name`.")
        names = [{spec.name for spec in one.tensors} for one in (*self.weight_tokenizer.layouts, layout)]
        same = [known for known in self.targets if "like" not in known and same_network(known, target)]
        same = [known for known in same if names[known["layout"]] == names[-1]]  # and no part of a network
        activations = {TargetConfig(**known["config"]).activation for known in same}
        if same and (own := TargetConfig(**target["config"]).activation) not in activations:
            raise ValueError(
                f"The network with these layers that this generator knows has the activation {activations.pop()!r}, in which weights "
                f"are others than with {own!r}; give it, or other layers."
            )
        weight_tokenizer, number = self.weight_tokenizer, same[0]["layout"] if same else None
        if number is None:
            weight_tokenizer, number = with_layout(self.weight_tokenizer, layout)
        target |= {"name": name, "layout": number}
        targets, tasks = list(self.targets), []
        for task in self.config.tasks:
            own = target_numbers(task)
            known = [targets[k]["config"] for k in own if targets[k]["kind"] == "network"]
            fitting = next((config for config in known if reads(list(config["input_shape"]))), None)
            if fitting is not None:
                scales = {key: fitting[key] for key in ("image_mean", "image_std") if fitting.get(key)}
                for k in own:  # with two of them, each needs a name
                    targets[k] = {"name": UNNAMED, **targets[k]}
                learned = resizable_targets(targets, own, self.weight_tokenizer) if resize and not same else []
                more = {"like": nearest_resizable(targets, learned, target)}
                more |= {"config": scales | target["config"]} if "config" in target else {}
                task = {**task, "targets": [*own, len(targets)]}
                targets.append(target | more)
            tasks.append(task)
        if len(targets) == len(self.targets):
            inputs = next((spec.shape[1] for spec in layout.tensors if len(spec.shape) > 1), 0)
            known = sorted({tuple(one["config"]["input_shape"]) for one in self.targets if "config" in one})
            raise ValueError(
                f"No task of this generator has networks that read what `architecture` does, whose first weight takes {inputs} inputs; "
                f"theirs read {' or '.join(map(str, known)) or 'texts alone'}."
            )
        wider = IGPGPipeline(
            **self.components | {"weight_tokenizer": weight_tokenizer},
            **{key: value for key, value in self.config.items() if key in CARRIED},
            target=self.config.target,
            targets=targets,
            tasks=tasks,
        )
        wider._encoder = self.encoder
        for own in ("_image_encoder", "_source", "_folder"):
            if hasattr(self, own):
                setattr(wider, own, getattr(self, own))
        wider._modules = dict(getattr(self, "_modules", {}))
        if target["kind"] == "module":
            wider._modules[name] = architecture
        return wider

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in diffusers; networks that are modules of the caller's cannot be saved, which are no files."""
        own = [target["name"] for target in self.targets if target["kind"] == "module"]
        if own:
            raise ValueError(
                f"The architecture {own[0]!r} is a module of yours, which no file can tell; save the generator without it."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def rank(self, prompt: str | None = None, dataset: object | None = None) -> list[dict]:
        """
        Which of the known tasks and architectures fit a description, a dataset, or both, by the generator's own likelihood: of each
        pair the likeliest codes for the task's own prompt, under what the caller asks for.

        Args:
            prompt (`str`, *optional*), dataset: As of a call.

        Returns:
            `list[dict]`, the best first: `task`, `architecture` (`None` where targets have no names) and `score`, the logarithm of
            how much likelier the codes are under the request than under a known task at random: about that of the number of
            tasks at most, about 0 where codes do not depend on the task. Of networks longer than the prior's context their
            first codes count.
        """
        if not isinstance(prompt, (str, type(None))):
            raise TypeError(f"`prompt` must be one text, got {type(prompt).__name__}.")
        size = self.vqvae.config.embedding_size
        request, tasks = read_request(self, size, prompt, None, 1, None, None, dataset, None), self.config.tasks
        of_tasks = torch.stack([unpack_embeddings(task["prompt_embeddings"], size)[0] for task in tasks])  # (tasks, E)
        written = [self._written(target) for target in self.targets]
        conditions, ranked = self._conditions(request, written), []
        for row, task in enumerate(tasks):
            class_embeds = self.encoder.embed(list(task["labels"]))[None]
            for number in target_numbers(task):
                if self.targets[number].get("num_classes") not in (None, class_embeds.shape[1]):
                    continue  # a call would refuse the pair
                asked = conditions[number, None]
                known = torch.zeros(len(tasks), *asked.shape[1:])
                known[:, 0], known[:, 2] = of_tasks, asked[:, 2]
                told = self._to_prior(torch.cat([asked, known]))
                pieces, *described = self._described(written[number]["layout"], class_embeds)
                described = [self._to_prior(part) for part in described]
                codes = self.prior.write(told[1 + row, None], *described, places=pieces.places)
                codes, *described = (part.expand(len(told), *part.shape[1:]) for part in (codes, *described))
                losses, of = self.prior.code_losses(codes, told, *described, places=pieces.places)
                likely = -torch.zeros(len(told), dtype=torch.float64).index_add_(0, of.cpu(), losses.double().cpu())
                score = likely[0] - (likely[1:].logsumexp(0) - math.log(len(tasks)))
                name = self.targets[number].get("name")
                ranked.append({"task": task["name"], "architecture": name, "score": score.item()})
        return sorted(ranked, key=lambda pair: -pair["score"])

    def _written(self, target: dict) -> dict:
        """The target whose codes are written for one."""
        return target if target.get("like") is None else self.targets[target["like"]]

    def _in_size(
        self, weights: Iterable[tuple[str, Tensor]], target: dict, class_embeds: Tensor
    ) -> Iterable[tuple[str, Tensor]]:
        """Names and tensors as decoded, in the sizes of a target."""
        if target.get("like") is None:
            return weights
        decoded, classes = dict(weights), class_embeds.shape[1]
        have, want = (shapes_in_order(one, classes) for one in (self._written(target), target))
        made = resized({name: decoded[name] for name in have}, want)
        layout = self.weight_tokenizer.layouts[target["layout"]]
        return [(spec.name, made[spec.name].to(spec.torch_dtype)) for spec in layout.tensors]

    def _told(self, target: dict) -> dict:
        """A target as an output has it."""
        told = {key: value for key, value in target.items() if key not in ("layout", "like")}
        return told if target.get("like") is None else told | {"resized_from": self._written(target).get("name")}

    def _read(self, pieces: Pieces, class_embeds: Tensor, part: slice) -> list[Tensor]:
        """What the prior reads of some pieces."""
        return [*map(self._to_prior, pieces.described(class_embeds, part)), pieces.places[part]]

    def _to_prior(self, part: Tensor) -> Tensor:
        return part.to(self.prior.device, self.prior.dtype)

    def _conditions(self, asked: Request, targets: Sequence[dict]) -> Tensor:
        """Of prompts and their targets, or of one prompt and all of these: `(targets, conditions, E)`, zeros for what is not told."""
        conditions = torch.zeros(len(targets), len(CONDITIONS), asked.embeds.shape[1])
        for j, told in enumerate((asked.of_prompts, asked.of_dataset)):
            if told is not None:
                conditions[:, j] = told
        conditions[:, 2] = self.encoder.embed([in_words(target) for target in targets])
        return conditions


def _free(name: str, taken: Collection) -> str:
    """The name, or with a number behind it if it is taken."""
    numbered = (f"{name}{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)

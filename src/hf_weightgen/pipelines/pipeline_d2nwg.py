"""D2NWG: latent diffusion over weights, conditioned on text, on a dataset, or on both, and on an architecture.

Reference: Diffusion-based Neural Network Weights Generation (https://huggingface.co/papers/2402.18153), section 3.4,
eq. 6 for sampling; section C.7 for choosing among samples by predicted accuracy. Classifier-free guidance:
https://huggingface.co/papers/2207.12598.

Notation: N samples, C classes, T body tokens, S scalars per token, E size of an embedding, Z scalars of a latent.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models.modeling_dataset_encoder import DatasetEncoder
from ..models.modeling_denoiser import WeightDenoiser
from ..models.modeling_predictor import AccuracyPredictor
from ..models.modeling_weight_vae import WeightVAE
from ..targets.mixed import architecture_codes, with_architecture
from ..weights.lora import center_head
from ..weights.tokenization import WeightTokenizer
from .loading import check_settings, check_targets
from .output import WeightGenOutput
from .pipeline_utils import MismatchWarning, WeightGenPipeline
from .ranking import best, check_best_of, need_predictor, predict_accuracies
from .request import read_request, sample_generators


MAX_GUIDANCE = 100  # beyond it latents, and then weights, overflow


class D2NWGPipeline(WeightGenPipeline):
    r"""
    Generates LoRA adapters or small networks from a description of the task, or from a few examples of each class.

    Args:
        vae ([`WeightVAE`]): Weight tokens <-> latents.
        unet (`UNet2DConditionModel` or [`WeightDenoiser`]): Predicts noise, velocity or flow of latents.
        scheduler (`SchedulerMixin`): Any scheduler of diffusers with the prediction type that `unet` was trained for.
        weight_tokenizer ([`WeightTokenizer`]): State dicts <-> weight tokens.
        target (`dict`): What receives the weights, see [`WeightGenOutput`]; with `targets`, the first of them.
        targets (`list[dict]`, *optional*): All of them, each with the `layout` of `weight_tokenizer` that it has, and the `name`
            of its architecture.
        tasks (`list[dict]`): Known tasks: `name`, `family`, `labels`, `prompt_embeddings` (centres of its
            training prompts, see [`~targets.base_models.pack_embeddings`]), and the number of its `target`, or those of its
            `targets` where it has several architectures, the default one first.
        encoder (`dict`): `id`, `revision` and `sha256` of the frozen text encoder.
        dataset_encoder ([`DatasetEncoder`], *optional*): Examples -> embeddings where those of texts are.
        image_encoder (`dict`, *optional*): The frozen encoder of a dataset's images, as `encoder`; without it a dataset has
            texts.
        accuracy_predictor ([`AccuracyPredictor`], *optional*): Ranks samples, see `best_of` of a call.
        prediction_type (`str`): What `unet` predicts.
        far_below (`float`): Prompts whose cosine to the nearest known task is lower are reported as far.
        known_above (`float`): Only of prompts whose cosine is at least this the pipeline judges whether the class names fit:
            of a task that it does not know it cannot tell.
        datasets_above (`float`): Datasets whose cosine is at least this are of a known task, whose classes are told apart, see
            [`~request.told_apart`]; all others are reported as far.
        num_inference_steps, guidance_scale: Defaults of a call.
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: WeightVAE,
        unet,
        scheduler,
        weight_tokenizer: WeightTokenizer,
        target: dict | None = None,  # diffusers takes arguments without a default for components
        tasks: list | None = None,
        encoder: dict | None = None,
        prediction_type: str = "v_prediction",
        far_below: float = 0.4,
        known_above: float = 0.55,
        datasets_above: float = 0.85,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        text_encoder=None,
        tokenizer=None,
        dataset_encoder: DatasetEncoder | None = None,
        targets: list | None = None,
        image_encoder: dict | None = None,
        accuracy_predictor: AccuracyPredictor | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            weight_tokenizer=weight_tokenizer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            dataset_encoder=dataset_encoder,
            accuracy_predictor=accuracy_predictor,
        )
        self.register_to_config(
            target=target,
            targets=targets,
            tasks=tasks,
            encoder=encoder,
            image_encoder=image_encoder,
            prediction_type=prediction_type,
            far_below=far_below,
            known_above=known_above,
            datasets_above=datasets_above,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    def check_parts(self) -> None:
        check_settings(self.config, self.vae.config.embedding_size)
        self._check_scheduler()
        latents = torch.zeros(1, *self.vae.config.latent_shape)
        self.scheduler.set_timesteps(self.config.num_inference_steps)
        for t in self.scheduler.timesteps:  # fails here, not in use, where its settings make no sense
            latents = self.scheduler.step(latents, t, latents).prev_sample
        tokenizer, vae, unet = self.weight_tokenizer, self.vae.config, self.unet.config
        if not math.isfinite(vae.noise_scale):
            raise ValueError(f"`noise_scale` is {vae.noise_scale}, expected a finite number.")
        if not latents.isfinite().all():
            raise ValueError("the scheduler's settings make latents that are not finite.")
        told = tokenizer.token_size, tokenizer.num_all_body_tokens
        if told != (vae.token_size, vae.num_body_tokens):
            raise ValueError(
                f"the weight tokenizer makes {told[1]} tokens of {told[0]} scalars, the autoencoder reads {vae.num_body_tokens} of "
                f"{vae.token_size}."
            )
        size = unet.sample_size
        shape = unet.in_channels, *(size if isinstance(size, (list, tuple)) else (size, size))
        if tuple(vae.latent_shape) != shape:
            raise ValueError(f"latents have the shape {tuple(vae.latent_shape)}, the denoiser reads {shape}.")
        check_targets(self.targets, tokenizer)
        if self.dataset_encoder is not None and self.dataset_encoder.config.embedding_size != vae.embedding_size:
            raise ValueError(
                f"the dataset encoder makes embeddings of {self.dataset_encoder.config.embedding_size}, the autoencoder reads "
                f"{vae.embedding_size}."
            )
        if self.accuracy_predictor is not None:
            names = ("token_size", "num_body_tokens", "embedding_size")
            reads, made = (
                [getattr(config, name) for name in names] for config in (self.accuracy_predictor.config, vae)
            )
            if reads != made:
                raise ValueError(
                    f"the accuracy predictor has {dict(zip(names, reads, strict=True))}, the autoencoder "
                    f"{dict(zip(names, made, strict=True))}: they are of different generators."
                )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        num_samples: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        prompt_embeds: Tensor | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "weights",
        return_dict: bool = True,
        dataset: object | None = None,
        best_of: int | None = None,
        architecture: str | None = None,
    ) -> WeightGenOutput | tuple:
        r"""
        Args:
            prompt: What the classifier shall do, in a sentence; a list gives `num_samples` weight sets for each.
            dataset: A few examples of each class, see [`~pipelines.examples.examples_of`], in the place of a prompt or beside
                one; its class names then are the labels.
            labels: Class names; one list, or one per prompt. Without it, the names of the nearest known task.
            num_samples: Weight sets per prompt.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: 1 follows the prompt as in training, larger values exaggerate it, 0 ignores it.
            generator: Source of randomness. Each sample has its own noise: the first k of n samples of a
                prompt are the same for any n.
            prompt_embeds (`torch.FloatTensor` of shape `(prompts, E)`): Instead of `prompt`.
            callback_on_step_end: Called as `callback(pipe, i, t, {"latents": ...})` after each step; may return changed latents.
            output_type: `"weights"`, or `"latent"` to stop before decoding.
            return_dict: `False` returns a tuple.
            best_of: Samples that are drawn per prompt, of which the accuracy predictor chooses the `num_samples` best, the best of
                them first. They are samples of a call with `num_samples=best_of`, and with one `best_of` the first k of n are
                the same for any n; another `best_of` may bring better ones to the front.
            architecture: Of the network, by its name among those that the nearest known task has. Default: the first of them.

        Raises:
            TypeError, ValueError: If an argument does not fit; nothing has been generated then.
        """
        if output_type not in ("weights", "latent"):
            raise ValueError(f"`output_type` must be 'weights' or 'latent', got {output_type!r}.")
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`num_inference_steps` must be a whole number of at least 1, got {steps!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, known are {self._callback_tensor_inputs}."
            )
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(guidance, (int, float)) or not abs(guidance) <= MAX_GUIDANCE:
            raise ValueError(
                f"`guidance_scale` must be a number from -{MAX_GUIDANCE} to {MAX_GUIDANCE}, got {guidance!r}."
            )
        self._check_scheduler()

        # 1. Conditions: embeddings of prompts and examples; class names from the caller or from the nearest known task
        size = self.vae.config.embedding_size
        asked_for = read_request(
            self, size, prompt, labels, num_samples, generator, prompt_embeds, dataset, architecture
        )
        check_best_of(best_of, num_samples, self.accuracy_predictor)
        prompts, embeds, names = asked_for.prompts, asked_for.embeds, asked_for.labels
        nearest, numbers, class_embeds = asked_for.nearest, asked_for.numbers, asked_for.class_embeds
        targets = [self.targets[number] for number in numbers]

        # 2. Every sample has a generator of its own
        count = best_of or num_samples
        seeds, generators = sample_generators(generator, len(prompts), count)

        # 3. Denoise; the architecture is told where a task may have several
        codes = architecture_codes(self.targets, self.config.tasks, size)
        codes = None if codes is None else codes[numbers].repeat_interleave(count, 0)  # (N, E)
        asked = embeds.repeat_interleave(count, 0)
        conditions, blank = (with_architecture(one, codes) for one in (asked, torch.zeros_like(asked)))
        latents = self._denoise(conditions, blank, steps, guidance, generators, callback_on_step_end)

        # 4. Decode, and rank what was decoded
        weights, accuracies = [], []
        if output_type == "weights" or best_of:
            for i, labels_of in enumerate(names):
                part = slice(i * count, (i + 1) * count)
                of_classes, fits = class_embeds, True
                if of_classes is None:
                    of_classes = self.encoder.embed(labels_of).to(self.vae.device)[None]  # (1, C, E)
                    known = nearest[i][0][1] >= self.config.known_above
                    fits = not known or self._fits(prompts[i], embeds[i], of_classes, labels_of)
                made = self._decode(latents[part], of_classes, fits, targets[i]["layout"], generators[part])
                weights += made
                if self.accuracy_predictor is not None:
                    ranked = self.accuracy_predictor, self.weight_tokenizer, made, embeds[i], of_classes
                    accuracies += predict_accuracies(*ranked).tolist()
        chosen = best(accuracies, count, num_samples) if best_of else list(range(len(latents)))
        self.maybe_free_model_hooks()
        prompt_of = [j // count for j in chosen]
        output = WeightGenOutput(
            weights=[weights[j] for j in chosen] if output_type == "weights" else [],
            labels=[names[i] for i in prompt_of],
            tasks=[nearest[i][0][0]["name"] for i in prompt_of],
            prompts=[prompts[i] for i in prompt_of],
            seeds=[seeds[j] for j in chosen],
            targets=[{name: value for name, value in targets[i].items() if name != "layout"} for i in prompt_of],
            latents=latents[chosen],
            generator_id=self.source,
            generator_revision=self.revision,
            predicted_accuracies=[accuracies[j] for j in chosen] if accuracies else None,
        )
        return output if return_dict else output.to_tuple()

    def _denoise(
        self, embeds: Tensor, blank: Tensor, steps: int, guidance: float, generators: list, callback: Callable | None
    ) -> Tensor:
        """Scaled latents `(N, channels, height, width)` for conditions `(N, E)`; `blank`: the same without a prompt."""
        shape = tuple(self.vae.config.latent_shape)
        latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.unet.device)
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma if hasattr(self.scheduler, "init_noise_sigma") else latents
        extra = {"generator": generators} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        conditions = torch.cat([embeds, blank]) if guidance != 1 else embeds
        # of samples of one prompt the half of the denoiser that reads it runs once; not all U-Nets can do that
        if isinstance(self.unet, WeightDenoiser) and (conditions == conditions[:1]).all():
            conditions = conditions[:1]
        conditions = conditions.to(self.unet.device, self.unet.dtype)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            inputs = torch.cat([latents, latents]) if guidance != 1 else latents
            if hasattr(self.scheduler, "scale_model_input"):
                inputs = self.scheduler.scale_model_input(inputs, t)
            prediction = self.unet(
                inputs.to(self.unet.dtype), t, encoder_hidden_states=None, class_labels=conditions
            ).sample.float()
            if guidance != 1:
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + guidance * (conditional - unconditional)
            latents = self.scheduler.step(prediction, t, latents, **extra).prev_sample
            if callback is not None:
                latents = (callback(self, i, t, {"latents": latents}) or {}).get("latents", latents)
        return latents.float()

    def _fits(self, prompt: str, embed: Tensor, class_embeds: Tensor, names: list[str]) -> bool:
        """Whether class names fit a prompt; warns if they do not."""
        vae = self.vae
        mask = torch.ones(1, len(names), dtype=torch.bool, device=vae.device)
        fit = vae.match(embed[None].to(vae.device, vae.dtype), class_embeds.to(vae.dtype), mask).sigmoid().item()
        if fit < vae.config.match_threshold:
            warnings.warn(
                f"The class names {names[:6]} do not fit the prompt {prompt[:80]!r} (compatibility {fit:.2f}); the classes carry "
                "no information. Name the classes of the task, describe their task in the prompt, or leave `labels` out.",
                MismatchWarning,
                stacklevel=4,  # the caller of the pipeline, past `no_grad`
            )
        return fit >= vae.config.match_threshold

    def _decode(self, latents: Tensor, class_embeds: Tensor, fits: bool, layout: int, generators: list) -> list[dict]:
        vae, tokenizer, classes = self.vae, self.weight_tokenizer, class_embeds.shape[1]
        count = vae.config.num_body_tokens + classes
        noise = torch.stack([torch.randn(count, vae.config.token_size, generator=g) for g in generators])
        tokens = vae.sample_tokens(
            latents.flatten(1).to(vae.device, vae.dtype),
            class_embeds.to(vae.device, vae.dtype).expand(len(latents), -1, -1),
            fits,
            noise.to(vae.device, vae.dtype),
        )
        number = len(latents)
        weights = tokenizer.decode(
            tokenizer.own_tokens(tokens.float().cpu(), layout),
            torch.full((number,), layout),
            torch.full((number,), classes),
        )
        head = tokenizer.layouts[layout].head
        return [center_head(state_dict, head) for state_dict in weights]

    def predict_accuracies(self, weights: Sequence[dict], prompt: str, labels: Sequence[str] | None = None) -> Tensor:
        """
        What accuracy the predictor expects of weights of this generator's kind, without any data.

        Args:
            weights (`Sequence[dict[str, torch.Tensor]]` of length N): State dicts, such as `WeightGenOutput.weights`.
            prompt, labels: The task and its class names, as in a call.

        Returns:
            `torch.FloatTensor` of shape `(N,)`: from 0 to 1.

        Raises:
            TypeError, ValueError: If the generator has no accuracy predictor, or an argument does not fit.
        """
        need_predictor(self.accuracy_predictor)
        embeds = self.encoder.embed(self.check_prompts(prompt)).cpu()
        if len(embeds) > 1:
            raise ValueError(f"Give one `prompt`, got {len(embeds)}.")
        names = self.check_labels(labels, 1) or [self.nearest_tasks(embeds)[0][0][0]["labels"]]
        class_embeds = self.encoder.embed(list(names[0]))[None]
        return predict_accuracies(self.accuracy_predictor, self.weight_tokenizer, weights, embeds[0], class_embeds)

    def _check_scheduler(self) -> None:
        """A scheduler that reads the prediction as something else would produce noise without an error."""
        config, wanted = self.scheduler.config, self.config.prediction_type
        flow = "FlowMatch" in type(self.scheduler).__name__ or bool(config.get("use_flow_sigmas"))
        kind = "flow_prediction" if flow else config.get("prediction_type")
        if kind != wanted or flow != (wanted == "flow_prediction"):
            need = ", prediction_type='flow_prediction', use_flow_sigmas=True" if wanted == "flow_prediction" else ""
            raise ValueError(
                f"{type(self.scheduler).__name__} works with `prediction_type` {kind!r}{' without flow sigmas' if need and not flow else ''}, "
                f"this generator predicts {wanted!r}. Load it as `SchedulerClass.from_config(pipe.scheduler.config{need})` from a "
                "class that knows this prediction type."
            )

"""A call: what it draws, what it returns, and what it refuses before it has done any work."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from hf_weightgen.pipelines.pipeline_utils import MismatchWarning
from hf_weightgen.targets.base_models import pack_embeddings
from hf_weightgen.targets.functional import BIAS, WEIGHT
from hf_weightgen.training.d2nwg import make_schedulers
from tiny import KNOWN, STEPS, adapter, pipeline, random, randomised


SST2, NEWS, SPAM = (prompts[0] for _, _, prompts in KNOWN.values())
FAR = "predict the melting point of a protein"


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)


def distance(one, other) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_a_sentence_gives_an_adapter_with_its_head(pipe):
    output = pipe(SST2, generator=random(0))
    (weights,) = output.weights
    expected = adapter(0)
    assert list(weights) == list(expected)
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in expected.items()}
    assert all(t.dtype == torch.float32 and t.isfinite().all() and t.std() > 0 for t in weights.values())
    assert output.labels == [["negative", "positive"]] and output.tasks == ["sst2"] and output.prompts == [SST2]
    assert output.latents.shape == (1, 2, 4, 4) and output.generator_id == "a generator in memory"


# the schedulers of training and of use draw noise in every step
@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 2.5}, *({"scheduler": own} for own in make_schedulers("v_prediction"))]
)
def test_the_same_seed_gives_the_same_weights_in_any_batch(settings, pipe):
    settings = dict(settings)
    pipe.scheduler = settings.pop("scheduler", pipe.scheduler)
    most = pipe(SST2, num_samples=8, generator=random(7), **settings)
    assert len({tuple(weights[WEIGHT].flatten()[:4].tolist()) for weights in most.weights}) == 8
    for count in (1, 3):
        fewer = pipe(SST2, num_samples=count, generator=random(7), **settings)
        assert fewer.seeds == most.seeds[:count]
        assert_same(fewer.weights, most.weights[:count])
    assert distance(pipe(SST2, generator=random(8), **settings).weights[0], most.weights[0]) > 0.01


def test_a_list_of_prompts_gives_what_its_prompts_give(pipe):
    both = pipe([SST2, NEWS], num_samples=2, generator=random(7))
    assert both.prompts == [SST2, SST2, NEWS, NEWS] and both.tasks == ["sst2", "sst2", "ag_news", "ag_news"]
    assert [weights[WEIGHT].shape for weights in both.weights] == [(2, 384), (2, 384), (4, 384), (4, 384)]
    assert_same(pipe(SST2, num_samples=2, generator=random(7)).weights, both.weights[:2])
    assert_same(pipe([SST2, NEWS, SPAM], num_samples=2, generator=random(7)).weights[:4], both.weights)
    fewer = pipe([SST2, NEWS], num_samples=1, generator=random(7))
    assert_same(fewer.weights, [both.weights[0], both.weights[2]])
    turned = pipe([NEWS, SST2], num_samples=2, generator=random(7))
    assert turned.seeds == both.seeds and turned.labels[0] == both.labels[2]


def test_without_a_generator_the_global_one_is_used(pipe):
    torch.manual_seed(3)
    first = pipe(SST2, num_samples=2)
    torch.manual_seed(3)
    again = pipe(SST2, num_samples=2)
    assert_same(first.weights, again.weights)
    assert distance(pipe(SST2).weights[0], first.weights[0]) > 0.01


def test_the_prompt_matters(pipe):
    labels = ["no", "yes"]
    film, news = (pipe(prompt, labels=labels, generator=random(0)).weights[0] for prompt in (SST2, NEWS))
    assert distance(film, news) > 1e-4


def test_labels_name_the_classes(pipe):
    mine = ["bad film", "good film", "no film"]
    output = pipe(SST2, labels=mine, num_samples=2, generator=random(0))
    assert output.labels == [mine, mine] and output.tasks == ["sst2", "sst2"]
    assert output.weights[1][WEIGHT].shape == (3, 384) and output.weights[1][BIAS].shape == (3,)
    assert pipe([SST2, NEWS], labels=("no", "yes")).labels == [["no", "yes"]] * 2
    each = pipe([SST2, NEWS], labels=[["no", "yes"], ["a", "b", "c"]], num_samples=2)
    assert each.labels == [["no", "yes"]] * 2 + [["a", "b", "c"]] * 2
    assert [len(weights[BIAS]) for weights in each.weights] == [2, 2, 3, 3]


def test_swapped_labels_swap_the_rows_of_the_head(pipe):
    straight = pipe(SST2, labels=["negative", "positive"], generator=random(0)).weights[0]
    swapped = pipe(SST2, labels=["positive", "negative"], generator=random(0)).weights[0]
    assert distance(straight, swapped) > 1e-3
    assert_same([swapped | {n: swapped[n].flip(0) for n in (WEIGHT, BIAS)}], [straight])


def test_heads_have_no_shift_that_all_classes_share(pipe):
    pipe.vae.class_noise.fill_(1.0)
    weights = pipe(NEWS, generator=random(0)).weights[0]
    for name in (WEIGHT, BIAS):
        assert weights[name].mean(0).abs().max() < 1e-6 < weights[name].abs().max()


def test_embeddings_stand_for_prompts(pipe, encoder):
    embeds = encoder.embed([SST2, NEWS])
    given, said = pipe(prompt_embeds=embeds, generator=random(0)), pipe([SST2, NEWS], generator=random(0))
    assert_same(given.weights, said.weights)
    assert given.tasks == said.tasks


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_schedulers_of_diffusers_work(scheduler, pipe):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    output = pipe(SST2, num_samples=3, num_inference_steps=6, generator=random(0))
    assert output.latents.isfinite().all()
    assert_same(pipe(SST2, num_samples=3, num_inference_steps=6, generator=random(0)).weights, output.weights)


def test_deterministic_schedulers_agree_in_the_limit(pipe):
    found = {}
    for scheduler in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
        found[scheduler] = pipe(SST2, num_samples=4, num_inference_steps=200, generator=random(0)).latents
    for latents in found.values():
        torch.testing.assert_close(latents, found[DDIMScheduler], atol=0.2, rtol=0)


def test_a_scheduler_of_another_prediction_type_is_refused(pipe):
    pipe.scheduler = DDIMScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="DDIMScheduler works with `prediction_type` 'epsilon'.*'v_prediction'"):
        pipe(SST2)
    flow = (
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="v_prediction", use_flow_sigmas=True),
    )
    for pipe.scheduler in flow:
        with pytest.raises(
            ValueError, match="Scheduler works with `prediction_type` 'flow_prediction'.*'v_prediction'"
        ):
            pipe(SST2)


def test_flow_matching(encoder):
    pipe = pipeline(encoder, "flow_prediction")
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler .* without flow sigmas.*use_flow_sigmas=True"):
        pipe(SST2)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for scheduler in (FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(**flow)):
        pipe.scheduler = scheduler
        most = pipe(SST2, num_samples=5, generator=random(0))
        assert_same(pipe(SST2, num_samples=2, generator=random(0)).weights, most.weights[:2])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("concat", [False, True], ids=["added", "concatenated"])  # how it takes conditions
def test_a_unet_of_diffusers_may_be_the_denoiser(concat, guidance, pipe):
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D", class_embed_type="projection", projection_class_embeddings_input_dim=384,
        cross_attention_dim=8, class_embeddings_concat=concat,
    )  # fmt: skip
    pipe.register_modules(unet=randomised(unet).eval())
    most = pipe(SST2, num_samples=3, generator=random(0), guidance_scale=guidance)
    assert_same(pipe(SST2, generator=random(0), guidance_scale=guidance).weights, most.weights[:1])
    both = pipe([NEWS, SST2], num_samples=3, generator=random(0), guidance_scale=guidance)  # conditions that differ
    alone = pipe(NEWS, num_samples=3, generator=random(0), guidance_scale=guidance)
    assert_same(both.weights[:3], alone.weights)


def test_guidance(pipe):
    def latents(prompt, scale):
        return pipe(prompt, guidance_scale=scale, output_type="latent", generator=random(0)).latents

    torch.testing.assert_close(latents(SST2, 0.0), latents(NEWS, 0.0))  # the prompt is ignored
    torch.testing.assert_close(latents(SST2, 1.0), latents(SST2, None))
    torch.testing.assert_close(latents(SST2, 1.0), latents(SST2, 1.00001), atol=1e-4, rtol=0)
    assert (latents(SST2, 3.0) - latents(NEWS, 3.0)).norm() > (latents(SST2, 1.0) - latents(NEWS, 1.0)).norm() > 0


def test_a_callback_sees_and_may_change_every_step(pipe):
    seen = []

    def keep(given, i, t, tensors):
        assert given is pipe and tensors["latents"].shape == (2, 2, 4, 4)
        seen.append((i, int(t)))

    plain = pipe(SST2, num_samples=2, generator=random(0), callback_on_step_end=keep)
    assert [i for i, _ in seen] == list(range(STEPS)) and seen == sorted(seen, key=lambda pair: -pair[1])
    assert_same(pipe(SST2, num_samples=2, generator=random(0)).weights, plain.weights)
    zeros = pipe(SST2, callback_on_step_end=lambda p, i, t, tensors: {"latents": torch.zeros(1, 2, 4, 4)})
    assert not zeros.latents.any()
    with pytest.raises(ValueError, match=r"\['prompt_embeds'\], known are \['latents'\]"):
        pipe(SST2, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_tuple_and_latents_can_be_asked_for(pipe):
    output = pipe(SST2, generator=random(0))
    weights, labels, *_ = pipe(SST2, generator=random(0), return_dict=False)
    assert_same(weights, output.weights)
    assert labels == output.labels
    latents = pipe(SST2, generator=random(0), output_type="latent")
    assert torch.equal(latents.latents, output.latents) and latents.weights == []


def test_the_number_of_steps(pipe):
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(SST2, num_inference_steps=7)
    assert len(calls) == 7
    pipe(SST2)
    assert len(calls) == 7 + STEPS


def test_a_far_prompt_warns_with_the_nearest_tasks(pipe):
    with pytest.warns(MismatchWarning, match=rf"{FAR}' is far from every task .*; nearest: \w+ \(0\.\d\d\), \w+ \("):
        output = pipe(FAR, labels=["low", "high"])
    assert output.labels == [["low", "high"]]


def test_class_names_that_do_not_fit_the_prompt_warn_and_tell_nothing(pipe):
    pipe.vae.config.match_threshold = 1.1  # nothing fits
    with pytest.warns(MismatchWarning, match=r"\['apple', 'pear'\] do not fit the prompt .*SST-2"):
        weights = pipe(SST2, labels=["apple", "pear"], generator=random(0)).weights[0]
    assert not weights[WEIGHT].any() and not weights[BIAS].any()
    pipe.vae.config.match_threshold = 0.0
    fitting = pipe(SST2, labels=["apple", "pear"], generator=random(0)).weights[0]
    assert all(torch.equal(weights[name], fitting[name]) for name in weights if "lora" in name)
    pipe.vae.config.match_threshold = 1.1
    with pytest.warns() as caught:  # what is far from all that is known cannot be judged
        pipe(FAR, labels=["low", "high"])
    messages = [str(warning.message) for warning in caught if warning.category is MismatchWarning]
    assert len(messages) == 1 and "far from every task" in messages[0]
    pipe.register_to_config(known_above=1.1)  # nor what is near, but not surely known
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        assert pipe(SST2, labels=["apple", "pear"]).weights[0][WEIGHT].any()


def test_the_nearest_of_several_centres_counts(pipe, encoder):
    tasks = [dict(task) for task in pipe.config.tasks]
    tasks[-1]["prompt_embeddings"] = pack_embeddings(encoder.embed([NEWS, FAR]))
    pipe.register_to_config(tasks=tasks)
    nearest = pipe.nearest_tasks(encoder.embed([FAR, SST2]))
    assert nearest[0][0][0]["name"] == tasks[-1]["name"] and nearest[0][0][1] == pytest.approx(1, abs=1e-3)
    assert nearest[1][0][0]["name"] == "sst2"


BAD = [
    ({"prompt": ""}, ValueError, "`prompt` '' says nothing; describe the task"),
    ({"prompt": " ...\n"}, ValueError, "says nothing"),
    ({"prompt": []}, ValueError, "empty list"),
    ({"prompt": [SST2, ""]}, ValueError, "`prompt` '' says nothing"),
    ({"prompt": "film " * 10_000}, ValueError, "50,000 characters, expected at most 4,000.*Describe the task"),
    ({"prompt": "film \udcff reviews"}, ValueError, "lone surrogate.*right encoding"),
    ({"prompt": 5}, TypeError, "must be text or a list of texts, got int: '5'"),
    ({"prompt": [SST2, None]}, TypeError, "must be text or a list of texts, got list"),
    ({"prompt": b"sentiment"}, TypeError, "got bytes"),
    ({"prompt": None}, ValueError, "either `prompt` or `prompt_embeds`"),
    ({"prompt": SST2, "prompt_embeds": torch.ones(1, 384)}, ValueError, "either `prompt` or `prompt_embeds`"),
    ({"prompt_embeds": torch.ones(384)}, ValueError, r"shape \(prompts, 384\), got Tensor \(384,\)"),
    ({"prompt_embeds": torch.ones(2, 8)}, ValueError, r"shape \(prompts, 384\), got Tensor \(2, 8\)"),
    ({"prompt_embeds": [0.0] * 384}, ValueError, r"got list \(\)"),
    ({"prompt_embeds": torch.full((1, 384), torch.nan)}, ValueError, "`prompt_embeds` holds NaN"),
    ({"prompt": SST2, "num_samples": True}, ValueError, "`num_samples`"),
    ({"prompt": SST2, "guidance_scale": float("nan")}, ValueError, "`guidance_scale` must be a number from"),
    ({"prompt": SST2, "guidance_scale": 1e9}, ValueError, "`guidance_scale` must be a number from"),
    ({"prompt": SST2, "guidance_scale": "2"}, ValueError, "`guidance_scale` must be a number from"),
    ({"prompt": SST2, "num_samples": 0}, ValueError, "`num_samples` must be a whole number of at least 1, got 0"),
    ({"prompt": SST2, "num_samples": 2.5}, ValueError, "`num_samples`"),
    ({"prompt": SST2, "num_inference_steps": 0}, ValueError, "`num_inference_steps`"),
    ({"prompt": SST2, "output_type": "pt"}, ValueError, "'weights' or 'latent', got 'pt'"),
    ({"prompt": SST2, "labels": []}, ValueError, "at least 2 classes"),
    ({"prompt": SST2, "labels": ["film"]}, ValueError, r"at least 2 classes, got \['film'\]"),
    ({"prompt": SST2, "labels": ["good", "bad", "Good"]}, ValueError, "'good' twice"),
    ({"prompt": SST2, "labels": ["good", "bad", " good"]}, ValueError, "'good' twice"),
    ({"prompt": SST2, "labels": ["good", " "]}, ValueError, "non-empty names"),
    ({"prompt": SST2, "labels": ["good", 1]}, ValueError, "non-empty names"),
    ({"prompt": SST2, "labels": [0, 1]}, ValueError, "non-empty names"),
    ({"prompt": SST2, "labels": "good, bad"}, TypeError, "list of class names, got str"),
    ({"prompt": SST2, "labels": {"good", "bad"}}, TypeError, "list of class names, got set"),
    ({"prompt": SST2, "labels": [["a", "b"], ["c", "d"]]}, ValueError, "2 lists for 1 prompts"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input_is_refused_before_any_work(arguments, error, message, pipe):
    generator = random(0)
    pipe._encoder, pipe._internal_dict = None, type(pipe.config)({**pipe.config, "encoder": {"id": "acme/none"}})
    pipe.unet.register_forward_hook(lambda *_: pytest.fail("the denoiser was run"))
    with pytest.raises(error, match=message):
        pipe(**arguments, generator=generator)
    assert torch.equal(generator.get_state(), random(0).get_state())


def test_a_generator_that_is_none_is_named(pipe):
    for wrong in (0, [random(0)]):
        with pytest.raises(TypeError, match="`generator` must be one `torch.Generator`"):
            pipe(SST2, generator=wrong)

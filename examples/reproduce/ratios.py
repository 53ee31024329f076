"""What our work costs beside the plain PyTorch loop over the same work; `speed.py --format json` prints it.

Each work is measured several times, in turn with its anchor, and medians are told. Anchors run in a process of their own,
with the C library's memory as it is and torch's default optimisers; ours run where [`keep_memory`] was called, as zoo building
and training call it, and heads with Adam's fused kernel, from which loops would gain too. The loops over CNNs are told a
second time with kept memory.
"""

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from hf_weightgen import D2NWGPipeline, WeightGenPipeline
from hf_weightgen.models.modeling_weight_vae import WeightVAE, WeightVAEConfig
from hf_weightgen.targets.architectures import HEAD, TargetConfig, TargetModel, architecture
from hf_weightgen.targets.base_models import MINILM, load_encoder, pack_embeddings
from hf_weightgen.targets.stacked import unstack
from hf_weightgen.targets.tasks import get_task
from hf_weightgen.training.d2nwg import make_denoiser, make_schedulers
from hf_weightgen.weights.tokenization import WeightTokenizer
from hf_weightgen.zoo.heads import HeadZooConfig, train_heads
from hf_weightgen.zoo.images import load_images
from hf_weightgen.zoo.networks import initial, keep_memory, predict_networks, train_networks


Sides = tuple[
    Callable[[], float], Callable[[], float]
]  # ours and the anchor's; each works once and tells its unit's cost
CNN = architecture("tiny-cnn", channels=1)
NETWORKS, HEADS, LOOPED, FEATURES, CLASSES = 32, 256, 16, 384, 5
LINEAR = TargetConfig(input_shape=[FEATURES], layers=[], num_classes=CLASSES)
BATCH = 250  # of the loop that evaluates: 1,000 at once fit no cache and take up to 1.5 times as long
OFFICIAL = {  # the denoiser of D2NWG's code for the Tiny Model Zoo: a condition beside a latent of 1 x 32 x 32, 102.7 M weights there, 99.3 M here
    "sample_size": 32, "in_channels": 2, "out_channels": 1, "block_out_channels": (256, 256, 256, 512), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), "attention_head_dim": 128,
    "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
OFFICIAL_STEPS = 1024
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def per(units: float, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return (clock() - start) / units


def cpu_seconds(units: float, work: Callable[[], object]) -> float:
    """In one thread, of both sides: a second one counts as busy while it waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return per(units, work, time.process_time)
    finally:
        torch.set_num_threads(threads)


def images(count: int, data_root: str | None) -> tuple[Tensor, Tensor]:
    """MNIST, or noise: the cost is the same."""
    if data_root is not None:
        mnist = load_images([get_task("mnist")], data_root, 28)["mnist"]
        return mnist.inputs(mnist.train)[:count], mnist.train.labels[:count]
    random = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 28, 28, generator=random), torch.randint(10, (count,), generator=random)


def plain_adam(parameters: Iterable[Tensor]) -> Optimizer:
    return Adam(parameters, lr=1e-3)


def fit(
    model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int, epochs: int = 1, make_optimizer=plain_adam
) -> None:
    """The plain loop."""
    optimizer = make_optimizer(model.parameters())
    for _ in range(epochs):
        batches = [slice(None)] if batch_size == len(inputs) else torch.randperm(len(inputs)).split(batch_size)
        for batch in batches:
            logits = model(inputs[batch])
            loss = F.cross_entropy(getattr(logits, "logits", logits), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def fit_at_once(config: TargetConfig, count: int, inputs: Tensor, labels: Tensor, batch_size: int, epochs=1, **adam):
    params, random = initial(config, list(range(count))), torch.Generator().manual_seed(0)

    def work() -> None:
        settings = {"epochs": epochs, "batch_size": batch_size, "generator": random}
        for _ in train_networks(config, params, inputs, labels, lambda p: Adam(p, lr=1e-3, **adam), **settings):
            pass

    return work


def training(batch_size: int, steps: int, data_root: str | None) -> Sides:
    inputs, labels = images(batch_size * steps, data_root)
    model, ours = TargetModel(CNN), fit_at_once(CNN, NETWORKS, inputs, labels, batch_size)
    return (
        lambda: 1e3 * per(NETWORKS * steps, ours),
        lambda: 1e3 * per(steps, lambda: fit(model, inputs, labels, batch_size)),
    )


def heads(examples: int, batch_size: int, shared: bool) -> Sides:
    """100 steps; in the place of one set for each head, one that all share, each with labels of its own."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(1 if shared else HEADS, examples, FEATURES, generator=random)
    labels = torch.randint(CLASSES, (HEADS, examples), generator=random)
    epochs = 100 * batch_size // examples
    ours = fit_at_once(LINEAR, HEADS, features[0] if shared else features, labels, batch_size, epochs, fused=True)

    def loop() -> None:
        for k in range(LOOPED):
            fit(nn.Linear(FEATURES, CLASSES), features[0 if shared else k], labels[k], batch_size, epochs)

    return lambda: 1e3 * per(HEADS, ours), lambda: 1e3 * per(LOOPED, loop)


def heads_of_few(examples: int) -> Sides:
    """As a zoo of heads is trained, each on all of its examples in every step."""
    zoo, random = HeadZooConfig(()), torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(HEADS, examples, FEATURES, generator=random), dim=-1)
    labels = torch.randint(CLASSES, (HEADS, examples), generator=random)
    start = initial(LINEAR, list(range(HEADS)))

    def sgd(parameters: Iterable[Tensor]) -> Optimizer:
        return SGD(parameters, lr=zoo.lr, momentum=zoo.momentum, weight_decay=zoo.weight_decay)

    def loop() -> None:
        for k in range(LOOPED):
            fit(nn.Linear(FEATURES, CLASSES), features[k], labels[k], examples, zoo.steps, sgd)

    ours = functools.partial(train_heads, start, features, labels, sgd, steps=zoo.steps)
    return lambda: 1e3 * per(HEADS, ours), lambda: 1e3 * per(LOOPED, loop)


def evaluation(config: TargetConfig, inputs: Tensor) -> Sides:
    params, models = initial(config, list(range(HEADS))), []
    for k in range(LOOPED):
        models.append(TargetModel(config).eval())
        models[k].load_state_dict(unstack(params, k))

    @torch.inference_mode()
    def loop() -> None:
        for model in models:
            for batch in inputs.split(BATCH):
                model(batch).logits.argmax(-1)

    return lambda: 1e3 * per(HEADS, lambda: predict_networks(config, params, inputs)), lambda: 1e3 * per(LOOPED, loop)


def generation(generator: str | None, samples: int, steps: int) -> Sides:
    pipe = WeightGenPipeline.from_pretrained(generator) if generator else untrained()
    pipe.set_progress_bar_config(disable=True)
    task = pipe.config.tasks[0]

    def ours() -> None:
        pipe(task["name"], labels=list(task["labels"]), num_samples=samples, num_inference_steps=steps)

    @functools.cache
    def official() -> UNet2DModel:  # 0.4 GB, which only the process of the anchors needs
        return UNet2DModel(**OFFICIAL).eval()

    @torch.inference_mode()
    def step_of_two() -> None:
        official()(torch.zeros(2, 2, 32, 32), 500)

    def anchor() -> float:
        return OFFICIAL_STEPS * cpu_seconds(2, step_of_two)

    return lambda: cpu_seconds(samples, ours), anchor


def preset(generator: str) -> tuple[str | None, int, int]:
    """The generator if it makes networks, steps, and passes of the denoiser in each; else those of [`untrained`]."""
    pipe = WeightGenPipeline.from_pretrained(generator)
    if any(target["kind"] != "network" for target in pipe.targets):
        return None, 20, 1
    return generator, pipe.config.num_inference_steps, 1 if pipe.config.guidance_scale == 1 else 2


def untrained() -> D2NWGPipeline:
    """As `examples/train_d2nwg.py` makes it for tiny CNNs, but with random weights, which cost as much as trained ones."""
    params = initial(CNN, list(range(8)), "uniform")
    tokenizer = WeightTokenizer.fit([unstack(params, k) for k in range(8)], token_size=64, head=HEAD)
    settings = {"input_shape": list(CNN.input_shape), "layers": list(CNN.layers), "activation": CNN.activation}
    prompt = pack_embeddings(load_encoder(MINILM).embed(["which digit is it"]))
    return D2NWGPipeline(
        vae=WeightVAE(WeightVAEConfig(token_size=64, num_body_tokens=tokenizer.num_all_body_tokens)).eval(),
        unet=make_denoiser("mlp").eval(),
        scheduler=make_schedulers("v_prediction")[1],
        weight_tokenizer=tokenizer,
        target={"kind": "network", "config": settings},
        tasks=[{"name": "which digit is it", "family": "digits", "labels": DIGITS, "prompt_embeddings": prompt}],
        encoder={"id": MINILM, "revision": None, "sha256": None},
    )


def works(
    generator: str | None, steps: int, passes: int, data_root: str | None, samples: int
) -> dict[str, tuple[str, Callable[[], Sides]]]:
    """Name -> unit and what prepares it."""
    seen = "images of MNIST" if data_root else "synthetic images"
    made = f"networks of {generator}" if generator else "tiny CNNs (default sizes, random weights)"
    step, head, network = "ms a network and step", "ms a head", "ms a network"
    return {
        f"train {NETWORKS} tiny CNNs, {seen} in batches of 64": (step, lambda: training(64, 30, data_root)),
        f"train {NETWORKS} tiny CNNs, {seen} in batches of 10": (step, lambda: training(10, 60, data_root)),
        **{
            f"train {HEADS} linear heads, {HeadZooConfig.steps} steps of SGD with momentum on {examples} examples of their own": (
                head, functools.partial(heads_of_few, examples),
            )
            for examples in (25, CLASSES * HeadZooConfig.examples)
        },
        f"train {HEADS} linear heads, 100 steps of Adam on 25 examples of all, of 250": (
            head, lambda: heads(250, 25, True),
        ),
        f"train {HEADS} linear heads, 100 steps of Adam on 25 examples of their own": (
            head, lambda: heads(25, 25, False),
        ),
        f"train {HEADS} linear heads, 100 steps of Adam on 25 examples of their own, of 250": (
            head, lambda: heads(250, 25, False),
        ),
        f"evaluate {HEADS} tiny CNNs on 1,000 {seen}": (network, lambda: evaluation(CNN, images(1000, data_root)[0])),
        f"evaluate {HEADS} linear heads on 1,000 features": (
            head, lambda: evaluation(LINEAR, torch.randn(1000, FEATURES)),
        ),
        f"generate {samples} {made}, {steps} steps x {passes} pass; anchor: U-Net of the size of D2NWG's code, "
        f"{OFFICIAL_STEPS} steps, extrapolated from one": (
            "CPU-s a network, one thread", lambda: generation(generator, samples, steps),
        ),
    }  # fmt: skip


@functools.cache
def _prepared(name: str, *settings) -> Sides:
    return works(*settings)[name][1]()


def _cost(name: str, side: int, *settings) -> float:
    return _prepared(name, *settings)[side]()


def measure(generator: str, data_root: str | None, samples: int, repeats: int) -> list[dict]:
    """
    Rows with the `work`, the costs of `ours` and of the `anchor`, their `unit`, and the `ratio`, how much ours is cheaper.
    """
    spawn, settings, rows = multiprocessing.get_context("spawn"), (*preset(generator), data_root, samples), []
    with (
        ProcessPoolExecutor(1, spawn) as plain,
        ProcessPoolExecutor(1, spawn, initializer=keep_memory) as kept,
    ):
        for name, (unit, _) in works(*settings).items():
            sides = {"ours": (kept, 0), "anchor": (plain, 1)}
            if "CNNs" in name and not name.startswith("generate"):
                sides["anchor with kept memory"] = (kept, 1)
            costs = {side: [] for side in sides}
            for _ in range(repeats + 1):  # the first warms up
                for side, (pool, which) in sides.items():
                    costs[side].append(pool.submit(_cost, name, which, *settings).result())
            ours, *anchors = (statistics.median(own[1:]) for own in costs.values())
            for side, anchor in zip([*costs][1:], anchors, strict=True):
                work = name + side.removeprefix("anchor").replace(" with", "; loop with")
                rows.append({"work": work, "ours": ours, "anchor": anchor, "unit": unit, "ratio": anchor / ours})
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| work | ours | anchor | unit | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['work']} | {row['ours']:.3g} | {row['anchor']:.3g} | {row['unit']} | {row['ratio']:.1f} |"
        )
    return "\n".join([*lines, "", f"{torch.get_num_threads()} thread(s)."])

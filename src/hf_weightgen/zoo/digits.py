"""A zoo of small networks on scikit-learn's bundled digits, built on the spot: no download, a minute on two cores.

Three tasks on the same images, so that a generator must follow its prompt; every network starts from an initialisation
of its own, and all are trained at once. This is the regime of the Tiny Model Zoo in small: independent seeds, where
averages of weights fail.

Notation: K networks, n images, 64 pixels, H hidden units, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm.auto import tqdm

from ..targets.architectures import TargetConfig, mlp
from ..targets.stacked import stack, stacked_logits
from ..weights.permutation import align, mlp_spec


HIDDEN = 16
NETWORK = {"input_shape": [64], "layers": mlp(HIDDEN), "activation": "relu"}
CONFIG = TargetConfig(**NETWORK)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DigitTask:
    """A grouping of the ten digits into classes: `class_of[d]` is the class of digit d."""

    name: str
    labels: tuple[str, ...]
    class_of: tuple[int, ...]
    prompts: tuple[str, ...]


TASKS = (
    DigitTask("digit", DIGITS, tuple(range(10)), (
        "which digit is it", "recognise handwritten digits", "read the digit in the image", "digits from zero to nine",
        "ten classes, one per digit", "classify images of handwritten numbers", "scikit-learn digits", "optical digit recognition",
    )),
    DigitTask("parity", ("even", "odd"), tuple(d % 2 for d in range(10)), (
        "is the digit even or odd", "parity of a handwritten digit", "tell even numbers from odd ones", "even versus odd digits",
        "divisible by two or not", "classify digits by parity", "odd or even", "parity classifier for digit images",
    )),
    DigitTask("magnitude", ("below five", "five or more"), tuple(int(d >= 5) for d in range(10)), (
        "is the digit small or large", "digits below five against five and above", "tell whether the number is at least five",
        "small or big digit", "compare the handwritten digit with five", "classify digits by size of the number",
        "low digits versus high digits", "does the image show five or more",
    )),
)  # fmt: skip


def digit_images() -> dict[str, tuple[Tensor, Tensor]]:
    """`{"train" | "validation" | "test": (images (n, 64) in [0, 1], digits (n,))}`: 1,200, 250 and 347 images."""
    bunch = load_digits()
    images, digits = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "validation", "test"), order.split([1200, 250, len(digits) - 1450]), strict=True))
    return {name: (images[rows], digits[rows]) for name, rows in parts.items()}


def build_digit_zoo(networks: int = 1024, steps: int = 300, seed: int = 0, progress: bool = True) -> list[dict]:
    """
    Trains `networks` networks per task at once.

    Returns:
        `list[dict]`: `{"task", "split", "weights"}` per network, every fourth one held out. Hidden units are matched to
        those of the first network (weight matching of Git Re-Basin), so that equal functions have similar weights.
    """
    images, digits = digit_images()["train"]
    rows, reference = [], None
    for task in tqdm(TASKS, desc="digit zoo", unit="task", disable=not progress):
        classes = torch.tensor(task.class_of)[digits]
        generator = torch.Generator().manual_seed(seed * 1_000 + len(rows))
        params = {
            "hidden.weight": torch.randn(networks, HIDDEN, 64, generator=generator) * 64**-0.5,
            "hidden.bias": torch.zeros(networks, HIDDEN),
            "head.weight": torch.randn(networks, len(task.labels), HIDDEN, generator=generator) * HIDDEN**-0.5,
            "head.bias": torch.zeros(networks, len(task.labels)),
        }
        optimizer = torch.optim.Adam([p.requires_grad_() for p in params.values()], lr=1e-2)
        for _ in range(steps):
            batch = torch.randint(
                len(digits), (networks, 64), generator=generator
            )  # every network reads its own images
            logits = stacked_logits(CONFIG, params, images[batch])
            loss = F.cross_entropy(logits.flatten(0, 1), classes[batch].flatten(), reduction="sum") / 64
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for k in range(networks):
            weights = {name: p[k].detach().clone() for name, p in params.items()}
            reference = reference or weights
            rows.append({"task": task.name, "split": "held_out" if k % 4 == 3 else "train", "weights": weights})
    spec = mlp_spec(["hidden", "head"])
    by_task = {task.name: next(row["weights"] for row in rows if row["task"] == task.name) for task in TASKS}
    for row in rows:
        row["weights"] = align(row["weights"], by_task[row["task"]], spec)
    return rows


@torch.no_grad()
def digit_accuracy(state_dicts: list[dict[str, Tensor]], task: str, split: str) -> Tensor:
    """Accuracy of N networks for a task on a split of the images: `(N,)` in [0, 1]."""
    images, digits = digit_images()[split]
    classes = torch.tensor(next(t for t in TASKS if t.name == task).class_of)[digits]
    logits = stacked_logits(CONFIG, stack(state_dicts), images[None])
    return (logits.argmax(-1) == classes).double().mean(1)

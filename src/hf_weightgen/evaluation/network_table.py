"""The honest table of one task whose networks are generated as a whole, from examples of its dataset.

Rows as in [`evaluation.table`]; the weights of all rows are in one gauge (see [`~evaluation.novelty.fix_network_gauge`]), so that
distances compare functions, and not the order of hidden units or what the softmax does not see.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from ..targets.architectures import TargetConfig
from ..targets.stacked import stack, unstack
from ..targets.symmetry import permutation_spec
from ..targets.tasks import TaskSpec
from ..zoo.images import ImageData, Images
from ..zoo.networks import initial, predict_networks
from . import baselines
from .accuracy import rank_correlation, score
from .novelty import fix_network_gauge
from .p_diff import p_diff
from .rows import TaskRows, Unavailable
from .table import generated_row, held_out_row, majority_row, members_at_distance, reconstruction_row, zoo_row


StateDict = Mapping[str, Tensor]
METHODS = (
    "random_init", "majority", "zoo", "zoo_held_out", "zoo_average", "gaussian", "kde", "pca_flow", "p_diff", "noise_0.05",
    "noise_0.15", "noise_at_distance", "reconstruction", "generated", "generated_by_predictor", "generated_from_prompts",
    "generated_shuffled", "generated_mismatched",
)  # fmt: skip


@dataclass
class _Rows:
    """Row numbers and labels of images, as [`TaskRows`] reads them; the pixels stay where they are."""

    spec: TaskSpec
    train: Dataset
    validation: Dataset
    test: Dataset


def network_table(
    generate: Callable[[str, int, int], Sequence[StateDict]],
    config: TargetConfig,
    data: ImageData,
    members: Sequence[StateDict],
    held_out: Sequence[StateDict] = (),
    *,
    init: str = "default",
    member_seeds: Sequence[Hashable] | None = None,
    reconstruct: Callable[[Sequence[StateDict]], Sequence[StateDict]] | None = None,
    predict_accuracies: Callable[[Sequence[StateDict]], Tensor] | None = None,
    n: int = 50,
    baseline_n: int = 20,
    baseline_effort: float = 1.0,
    seed: int = 0,
    methods: Sequence[str] = METHODS,
) -> list[dict]:
    """
    Args:
        generate: `(method, n, seed) -> n state dicts` for each of the rows `generated...`; an empty list where a row does not
            apply.
        config: The network of the task.
        members, held_out: Of the zoo: those that the generator was trained on, and others.
        init: Of an untrained network, see [`~zoo.networks.initial`].
        predict_accuracies: What a generator's predictor expects of networks `(N,)`; the best of the samples by it, chosen without
            any data, is a row of its own beside the best on validation.
        n: Networks of the generated rows, and how many the best ones are chosen from; baseline_n: of the others.
        baseline_effort: Share of their training steps that `pca_flow` and `p_diff` get; figures are told with 1.
        methods: Which rows; a row is the same whatever others are asked for.

    Returns:
        `list[dict]`: rows as of [`honest_table`]; those of methods without the generator tell in `cpu_seconds` what it cost
            to fit them and to draw from them.
    """
    spec, reference = permutation_spec(config), members[0]

    def canonical(state_dicts: Sequence[StateDict]) -> list[StateDict]:
        return fix_network_gauge(state_dicts, reference, spec)

    def rows_of(images: Images) -> Dataset:
        return Dataset.from_dict({"row": list(range(len(images))), "label": images.labels.tolist()})

    view = _Rows(data.spec, *(rows_of(getattr(data, part)) for part in ("train", "validation", "test")))
    inputs = {id(getattr(view, part)): data.inputs(getattr(data, part)) for part in ("validation", "test")}

    def predict(state_dicts: Sequence[StateDict], dataset: Dataset) -> Tensor:
        return predict_networks(config, stack(list(state_dicts)), inputs[id(dataset)])

    aligned, others = canonical(members), canonical(held_out)
    task = TaskRows(predict, view, aligned, member_seeds, n=baseline_n, best_of=n, seed=seed)
    rows: dict[str, dict] = {}

    def add(method: str, make: Callable[[], dict]) -> None:
        if method not in methods:
            return
        try:
            rows[method] = make()
        except Unavailable as reason:
            rows[method] = task.empty(method) | {"note": str(reason)}

    def generated(method: str, count: int) -> list[StateDict]:
        made = canonical(generate(method, count, task.derived(method)))
        if len(made) != count:
            raise Unavailable("the generator has no such condition for this task")
        return made

    def timed_row(method: str, make: Callable[[torch.Generator], list[StateDict]]) -> dict:
        start = time.process_time()  # of all threads of the process, whoever else is at work on the machine
        made = make(task.generator(method))
        seconds = time.process_time() - start
        return task.row(method, made) | {"cpu_seconds": seconds}

    samples = generated("generated", n)
    seeds = torch.randint(2**31, (baseline_n,), generator=task.generator("random_init")).tolist()
    fresh, of_majority = initial(config, seeds, init), majority_row(task)
    add("random_init", lambda: task.row("random_init", [unstack(fresh, k) for k in range(baseline_n)]))
    add("majority", lambda: of_majority)
    add("zoo", lambda: zoo_row(task, of_majority))
    add("zoo_held_out", lambda: held_out_row(task, others))
    for method, make in {
        "zoo_average": lambda g: [baselines.average(aligned)],
        "gaussian": lambda g: baselines.gaussian(aligned, baseline_n, g),
        "kde": lambda g: baselines.kde(aligned, baseline_n, g),
        "pca_flow": lambda g: baselines.pca_flow(aligned, baseline_n, g, steps=math.ceil(3000 * baseline_effort)),
        "p_diff": lambda g: p_diff(
            aligned, baseline_n, g, *(math.ceil(steps * baseline_effort) for steps in (400, 1200))
        ),
        "noise_0.05": lambda g: baselines.noisy(aligned, 0.05, baseline_n, g),
        "noise_0.15": lambda g: baselines.noisy(aligned, 0.15, baseline_n, g),
        "noise_at_distance": lambda g: members_at_distance(task, samples, g),
    }.items():
        add(method, lambda m=method, make=make: timed_row(m, make))
    add("reconstruction", lambda: reconstruction_row(task, reconstruct, others or aligned))
    add("generated", lambda: generated_row(task, samples, samples, others, rows.get("zoo", task.empty("zoo"))))
    add("generated_by_predictor", lambda: _by_predictor(task, samples, predict_accuracies))
    add("generated_from_prompts", lambda m="generated_from_prompts": task.row(m, generated(m, baseline_n)))
    for method in ("generated_shuffled", "generated_mismatched"):
        add(
            method,
            lambda m=method: (
                task.row(m, generated(m, baseline_n), control=True) | {"expected": 100 / len(data.spec.labels)}
            ),
        )
    return [rows[method] for method in METHODS if method in rows]


def _by_predictor(task: TaskRows, samples: Sequence[StateDict], predict_accuracies: Callable | None) -> dict:
    """The sample that the predictor prefers; `rank_correlation`: of what it says of all samples with their test accuracies, `None`
    where these are equal."""
    if predict_accuracies is None:
        raise Unavailable("the generator has no accuracy predictor")
    predicted = predict_accuracies(samples)
    scores = torch.as_tensor(score(task.predict(samples, task.test), task.labels, task.spec.metric))
    row = task.row("generated_by_predictor", [samples[int(predicted.argmax())]])
    found = rank_correlation(predicted, scores)
    return row | {"rank_correlation": None if math.isnan(found) else found, "best_of": len(samples)}

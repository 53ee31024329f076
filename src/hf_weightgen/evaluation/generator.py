"""The honest table of a pipeline: its prompts, its zoo and the data of a task, brought together.

Known tasks are tested on the splits that the zoo was built on; a task of the user's own is an unseen one, and its
zoo rows are those of the nearest known task (the look-up).
"""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from ..hub.cards import EVALUATION
from ..targets.base_models import load_classifier, load_tokenizer
from ..targets.functional import BIAS, SMALL_BUCKET, WEIGHT, AdapterTarget
from ..targets.tasks import TASKS, TaskSpec
from ..weights.lora import canonicalize, center_head
from ..zoo.folder import load_zoo
from ..zoo.schema import zoo_state_dicts
from ..zoo.start import BASE, head_of_names
from ..zoo.tasks import TaskData, load_tasks
from .accuracy import PredictionCache
from .table import honest_table


MISMATCHED = 5  # prompts of other families


class Predictor:
    """Classes that adapters give to a dataset: `(state dicts, dataset) -> (N, rows)`. The dataset is encoded once."""

    def __init__(self, target: Mapping, bf16: bool = False):
        self.bf16 = bf16
        self.target = AdapterTarget(load_classifier(target["base_model"], num_labels=2), LoraConfig(**target["lora"]))
        self.tokenizer = load_tokenizer(target["base_model"])
        self._buckets: dict[str, list] = {}

    def __call__(self, state_dicts: Sequence[Mapping[str, Tensor]], dataset: Dataset) -> Tensor:
        key = dataset._fingerprint
        if key not in self._buckets:
            self._buckets[key] = self.target.buckets(self.tokenizer, dataset, bucket_size=SMALL_BUCKET)
        return self.target.predict(list(state_dicts), self._buckets[key], bf16=self.bf16)


def evaluate_generator(
    pipe,
    spec: TaskSpec,
    data_root: str | Path | None = None,
    zoo: str | Path | None = None,
    n: int = 10,
    best_of: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    data: TaskData | None = None,
    bf16: bool = False,
    on_row: Callable[[dict], None] | None = None,
) -> list[dict]:
    """
    The honest table of one task, see [`honest_table`].

    Args:
        pipe ([`WeightGenPipeline`]): A generator of adapters.
        spec: A known task, or one of your own.
        data_root: Folder with datasets under their Hub ids.
        zoo: Folder or Hub id of the zoo; without it the rows that need members are the ones stored beside the generator.
        n, best_of: Networks per row, and of how many samples the best is chosen.
        data: The task's splits if they are loaded already. Default: loaded together with all known tasks, so that
            texts that stand in another task's test split are kept out.
        bf16: Predict under bfloat16 autocast, which is faster where the processor has it and changes a few predictions;
            all rows alike.

    Raises:
        ValueError: If the generator makes anything but adapters.
    """
    kinds = sorted({target["kind"] for target in pipe.targets})
    if kinds != ["adapter"]:
        raise ValueError(
            f"The honest table is for generators of adapters alone; this one makes {' and '.join(f'{kind}s' for kind in kinds)}."
        )
    data = (
        data or load_tasks([*(task for task in TASKS.values() if task.name != spec.name), spec], data_root)[spec.name]
    )
    known = {task["name"]: task for task in pipe.config.tasks}
    members, held_out, seeds, base = zoo_members(zoo) if zoo is not None else ({}, {}, {}, None)
    reference, start = None, None
    if base is not None:
        reference = {name: tensor for name, tensor in base.items() if "lora_" in name}
        start = reference | head_of_names(base, pipe.encoder.embed(list(spec.labels)))
    others = [task for task in TASKS.values() if task.name in known and task.family != spec.family]
    chosen = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:MISMATCHED].tolist()

    def generate(prompt: str, labels: Sequence[str], count: int, row_seed: int) -> list[dict[str, Tensor]]:
        return pipe(
            prompt, labels=list(labels), num_samples=count, generator=torch.Generator().manual_seed(row_seed)
        ).weights

    def reconstruct(state_dicts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        gauged = [center_head(canonicalize(sd, reference), (WEIGHT, BIAS)) for sd in state_dicts]
        return reconstruct_members(pipe, gauged, spec.labels)

    return honest_table(
        generate, Predictor(pipe.config.target, bf16), data, members.get(spec.name, ()), held_out.get(spec.name, ()), start,
        reconstruct=reconstruct if reference is not None else None, encoder=pipe.encoder, n=n, best_of=best_of, seed=seed,
        known_tasks=[{**task, "prompts": TASKS[name].prompts} for name, task in known.items() if name in TASKS],
        lookup_members=members, member_seeds=seeds.get(spec.name), mismatched_prompts=[others[i].prompts[0] for i in chosen],
        reference=reference, stored_rows=stored_rows(pipe), cache=PredictionCache(cache, context=f"{pipe.config.target['base_model']} bf16={bf16}") if cache else None, on_row=on_row,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)  # one task after another asks for the same zoo
def zoo_members(zoo: str | Path) -> tuple[dict, dict, dict, dict[str, Tensor]]:
    """Per task the training members, the held-out ones and the seeds of the former; and the base row."""
    dataset = load_zoo(zoo)
    members, held_out, seeds, base = defaultdict(list), defaultdict(list), defaultdict(list), None
    columns = zip(dataset["split"], dataset["task"], dataset["seed"], zoo_state_dicts(dataset), strict=True)
    for split, task, run, state_dict in columns:
        if split == BASE:
            base = state_dict
        elif split == "held_out":
            held_out[task].append(state_dict)
        else:
            members[task].append(state_dict)
            seeds[task].append(run)
    if base is None:
        raise ValueError(
            f"The zoo {str(zoo)!r} has no row of split 'base'; it was not made by `hf-weightgen zoo build`."
        )
    return members, held_out, seeds, base


@torch.no_grad()
def reconstruct_members(
    pipe, state_dicts: Sequence[Mapping[str, Tensor]], labels: Sequence[str]
) -> list[dict[str, Tensor]]:
    """
    State dicts through the tokenizer, the autoencoder (its posterior mean, or its codes) and back.

    Args:
        pipe ([`WeightGenPipeline`]): Of adapters or of networks.
        state_dicts (sequence of state dicts): Members of one task as training saw them: adapters in their canonical gauge with a
            centred head, networks with their hidden units matched to the first training member of the task.
        labels (`Sequence[str]`): The class names, one per head row.

    Raises:
        LayoutMismatchError: If a member has none of the layouts that the generator knows.
    """
    if hasattr(pipe, "encode_weights"):
        return pipe.decode_codes(*pipe.encode_weights(state_dicts, labels))
    tokenizer, vae = pipe.weight_tokenizer, pipe.vae
    encoded = tokenizer(state_dicts)
    layouts, counts = encoded["layout_ids"], encoded["num_classes"]
    tokens = tokenizer.side_by_side(encoded["weight_tokens"], layouts, counts).to(vae.device, vae.dtype)
    embeds = pipe.encoder.embed(list(labels)).to(tokens).expand(len(tokens), -1, -1)  # (N, C, E)
    mean, _ = vae.encode(tokens, embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=vae.device))
    decoded = vae.decode(mean, embeds).float().cpu()
    layout = int(layouts[0])  # of one task, and so all alike
    return tokenizer.decode(tokenizer.own_tokens(decoded, layout), layouts, counts)


def stored_rows(pipe) -> list[dict]:
    """Rows of the honest table that stand beside a local or bundled generator, in `evaluation.json`."""
    file = pipe.folder / EVALUATION if pipe.folder is not None else None
    return json.loads(file.read_text())["rows"] if file is not None and file.is_file() else []

"""What writing codes costs, and what it loses where a network is longer than the context (IGPG, section 4.3).

    python examples/reproduce/codes.py --generator runs/igpg/pipeline --beside runs/mixed/pipeline --zoo runs/images --out codes.json

Three tables: 4,000 codes with the KV cache and without; seconds for each network, beside those of a generator by diffusion of the
same networks; and accuracies where the context is a share of a network, of which each part sees a tail of the part in front of it.
"""

import contextlib
import json
import time
from collections.abc import Iterator

import torch
from command import typed
from tiny_zoo import load, make_parser

from hf_weightgen import WeightGenPipeline
from hf_weightgen.targets.stacked import stack
from hf_weightgen.zoo.networks import predict_networks


CODES = 4000
SHARES = (1.0, 0.5, 0.25, 0.125)  # of a network's codes that the context has room for
TAIL = 0.5  # of the context


def main():
    parser = make_parser(__doc__, n=50)
    parser.add_argument("--beside", help="Folder or Hub id of a generator by diffusion.")
    parser.add_argument(
        "--codes", type=int, default=CODES, help="Of the network that is written with and without the cache."
    )
    args = parser.parse_args()
    pipe, specs, configs, data, _, architecture = load(args)
    told = {"command": typed(), "seed": args.seed, "threads": torch.get_num_threads()}
    told["cache"] = cache(pipe, args.codes)
    print(json.dumps(told["cache"], indent=1), flush=True)
    asked = {"prompt": specs[0].prompts[0], "num_samples": args.n, "architecture": architecture}
    told["seconds"] = [timed(pipe, asked)]
    if args.beside:
        beside = WeightGenPipeline.from_pretrained(args.beside)
        beside.set_progress_bar_config(disable=True)
        named = any("name" in target for target in beside.targets)
        told["seconds"].append(timed(beside, asked | {"architecture": architecture if named else None}))
    print(json.dumps(told["seconds"], indent=1), flush=True)
    told["windows"] = []
    for spec in specs:
        inputs, labels = data[spec.name].inputs(data[spec.name].test), data[spec.name].test.labels
        for share in SHARES:
            with context(pipe, share, pipe(spec.prompts[0], output_type="codes", architecture=architecture).latents):
                generator = torch.Generator().manual_seed(args.seed)
                made = pipe(spec.prompts[0], num_samples=args.n, architecture=architecture, generator=generator)
            predictions = predict_networks(configs[spec.name], stack(made.weights), inputs)
            scores = 100 * (predictions == labels).double().mean(1)
            row = {"task": spec.name, "architecture": architecture, "context": share, "n": args.n}
            told["windows"].append(row | {"mean": scores.mean().item(), "std": scores.std().item()})
            print(json.dumps(told["windows"][-1]), flush=True)
    args.out.write_text(json.dumps(told, indent=1) + "\n")


@torch.no_grad()
def cache(pipe, count: int) -> dict:
    """Seconds for `count` codes of one network, as many tokens of the layout of the first task in a row as it takes."""
    prior, target = pipe.prior, pipe.targets[0]
    described = pipe.weight_tokenizer.describe(target["layout"], 2).to(prior.device)
    tokens = -(-count // prior.config.codes_per_token)
    described = described.repeat(-(-tokens // len(described)), 1)[None, :tokens]
    names = described.new_zeros(1, tokens, prior.config.embedding_size)
    conditions = torch.nn.functional.normalize(torch.ones(1, 3, prior.config.embedding_size), dim=-1)
    seconds, written = {}, {}
    with context(pipe, 1.0, torch.zeros(1, tokens, prior.config.codes_per_token)):
        prior.write(conditions, described[:, :8], names[:, :8])  # what is allocated at the first call
        for name, use in (("with", True), ("without", False)):
            start = time.perf_counter()
            written[name] = prior.write(conditions, described, names, use_cache=use)
            seconds[name] = time.perf_counter() - start
    same = (written["with"] == written["without"]).double().mean().item()
    ratio = seconds["without"] / seconds["with"]
    return {"codes": tokens * prior.config.codes_per_token, "seconds": seconds, "ratio": ratio, "same": same}


def timed(pipe, asked: dict) -> dict:
    """Of networks that are asked for together."""
    pipe(**asked | {"num_samples": 1})  # reads the prompt's encoder
    start, cpu = time.perf_counter(), time.process_time()
    output = pipe(**asked, generator=torch.Generator().manual_seed(0))
    count, cpu, wall = asked["num_samples"], time.process_time() - cpu, time.perf_counter() - start
    told = {"generator": type(pipe).__name__, "networks": count, "seconds": wall / count, "cpu_seconds": cpu / count}
    if hasattr(pipe, "encode_weights"):
        told["codes_per_second"] = int((output.latents >= 0).sum()) / wall
    return told


@contextlib.contextmanager
def context(pipe, share: float, codes: torch.Tensor) -> Iterator[None]:
    """The prior with room for a share of these codes, beside what stands in front of them."""
    config, room = pipe.prior.config, max(4, round(share * codes[0].numel()))
    before = config.max_position_embeddings, config.tail
    config.max_position_embeddings, config.tail = room + 5, max(1, round(TAIL * room))
    try:
        yield
    finally:
        config.max_position_embeddings, config.tail = before


if __name__ == "__main__":
    main()

"""Networks of widths and depths that no zoo has, from a generator that writes codes: at first sight and after one epoch.

    python examples/reproduce/unseen_architectures.py --generator runs/igpg/pipeline --zoo runs/images --out unseen.json

Beside networks that are new, members of the zoo whose layers are copied to the new sizes (rows and columns again from the first one
on, weights scaled by the number of inputs), and members put into a corner of a new network. All rows of a task are trained on the same batches.
IGPG (section 4.4) tells of unseen architectures after fine-tuning; no figures of the paper are on these sets.
"""

import math
import sys

import torch
from curves import curve_rows, curve_table
from finetune import finetune
from tiny_zoo import load, make_parser

from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.architectures import HEAD, TargetConfig, cnn, mlp
from hf_weightgen.targets.depth import places
from hf_weightgen.targets.stacked import unstack
from hf_weightgen.zoo.build_networks import BIAS, PROTOCOLS
from hf_weightgen.zoo.networks import initial
from hf_weightgen.zoo.schema import zoo_state_dicts


EPOCHS = (0, 1)
POOL = {"kind": "max_pool"}
VARIANTS = {  # of the architectures of zoos
    "tiny-cnn": {
        "wider": cnn((12, 9, 6), (5, 5, 2), (True, True, False), (30,)),
        "narrower": cnn((6, 5, 3), (5, 5, 2), (True, True, False), (16,)),
        "deeper": cnn((8, 6, 4), (5, 5, 2), (True, True, False), (20, 20)),
    },
    "small-lenet": {
        "wider": cnn((6, 12), (5, 5), (True, True), (24,)),
        "narrower": cnn((3, 6), (5, 5), (True, True), (12,)),
        "deeper": cnn((4, 8), (5, 5), (True, True), (16, 16)),
    },
    "mlp": {"wider": [POOL, *mlp(24)], "narrower": [POOL, *mlp(12)], "deeper": [POOL, *mlp(16, 16)]},
}


def main():
    parser = make_parser(__doc__, n=10)
    parser.add_argument("--images", type=int, default=10_000, help="Training images at most.")
    args = parser.parse_args()
    pipe, specs, configs, data, zoo, architecture = load(args)
    where, rows = list(zip(zoo["task"], zoo["split"], strict=True)), []
    family = architecture or zoo[0]["arch"]["name"]
    for spec in specs:
        known = configs[spec.name]
        members = [i for i, place in enumerate(where) if place == (spec.name, "train")][-args.n :]
        members = list(zoo_state_dicts(zoo, members))
        for name, layers in VARIANTS[family].items():
            settings = {key: getattr(known, key) for key in ("input_shape", "activation", "num_classes")}
            config = TargetConfig(layers=layers, **settings)
            generator = torch.Generator().manual_seed(args.seed)
            prompts = [spec.prompts[i % len(spec.prompts)] for i in range(args.n)]
            made = pipe(prompts, labels=list(spec.labels), architecture=config, generator=generator).weights
            fresh = initial(config, list(range(args.n)), PROTOCOLS["short"][spec.name].init, BIAS)
            fresh = [unstack(fresh, k) for k in range(args.n)]
            starts = {
                "generated": made,
                "random": fresh,
                "layers_copied": [copied(member, known, config) for member in members],
                "nearest_member": [in_corner(member, new) for member, new in zip(members, fresh, strict=True)],
            }
            curves = finetune(config, starts, data[spec.name], args, EPOCHS)
            told = f"{spec.name}, {family}, {name}"
            rows += curve_rows(spec.name, curves, architecture=family, variant=name)
            print(curve_table(told, curves, EPOCHS), flush=True)
            write_results(args.out, "IGPG, unseen architectures", f"python {' '.join(sys.argv)}", args.seed, rows)


def copied(member: dict, known: TargetConfig, config: TargetConfig) -> dict:
    """A member's layers in the sizes of another network; where that has more layers of a kind, some stand twice."""
    sources = _layers(known.network)
    wanted, result = _layers(config.network), {}
    with torch.random.fork_rng(devices=[]):
        shapes = {name: p.shape for name, p in initial(config, [0]).items()}
    for kind in ("conv", "linear"):
        have, want = sources[kind], wanted[kind]
        for name, place in zip(want, places(len(have), len(want)), strict=True):
            source = "head" if name == "head" else have[place]
            if name != "head" and source == "head":
                source = have[max(0, len(have) - 2)]
            for part in ("weight", "bias"):
                result[f"{name}.{part}"] = resized(member[f"{source}.{part}"], shapes[f"{name}.{part}"][1:])
    return result


def _layers(layers) -> dict[str, list[str]]:
    return {kind: [layer["name"] for layer in layers if layer["kind"] == kind] for kind in ("conv", "linear")}


def resized(tensor: torch.Tensor, shape) -> torch.Tensor:
    """Rows and columns again from the first one on, or fewer; sums over inputs stay about as large as they were."""
    inputs = math.prod(tensor.shape[1:]), math.prod(shape[1:])
    for axis, size in enumerate(shape):
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor * (inputs[0] / inputs[1])


def in_corner(member: dict, new: dict) -> dict:
    """A new network whose first units are those of a member, as far as both have them."""
    result = {name: tensor.clone() for name, tensor in new.items()}
    for name, tensor in member.items():
        if (
            name in result
            and tensor.dim() == result[name].dim()
            and (name not in HEAD or len(tensor) == len(result[name]))
        ):
            corner = tuple(slice(0, min(sizes)) for sizes in zip(tensor.shape, result[name].shape, strict=True))
            result[name][corner] = tensor[corner]
    return result


if __name__ == "__main__":
    main()

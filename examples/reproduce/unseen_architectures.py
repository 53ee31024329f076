"""Networks of widths and depths that no zoo has, from a generator that writes codes: at first sight and after one epoch.

    python examples/reproduce/unseen_architectures.py --generator runs/igpg/pipeline --zoo runs/images --out unseen.json

Beside networks that are new, members of the zoo whose layers are copied to the new sizes as Net2Net does, which keeps what they
compute where units or layers are more; and members put into a corner of a new network. The row `member` tells what members of the
known size have. All rows of a task are trained on the same batches.
IGPG (section 4.4) tells of unseen architectures after fine-tuning; no figures of the paper are on these sets.
"""

import math
import sys

import torch
from curves import curve_rows, curve_table
from finetune import accuracy, finetune
from tiny_zoo import init_of, load, make_parser

from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.architectures import HEAD, TargetConfig, cnn, mlp, shape_after
from hf_weightgen.targets.stacked import stack, unstack
from hf_weightgen.zoo.build_networks import BIAS
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
    if family not in VARIANTS:
        raise SystemExit(f"There are variants of {list(VARIANTS)}, the zoo has {family!r}.")
    for spec in specs:
        known = configs[spec.name]
        members = [i for i, place in enumerate(where) if place == (spec.name, "train")]
        members = [i for i in members if zoo[i]["checkpoint"] == zoo[members[-1]]["checkpoint"]][: args.n]
        members = list(zoo_state_dicts(zoo, members))
        for name, layers in VARIANTS[family].items():
            settings = {key: getattr(known, key) for key in ("input_shape", "activation", "num_classes")}
            config = TargetConfig(layers=layers, **settings)
            generator = torch.Generator().manual_seed(args.seed)
            prompts = [spec.prompts[i % len(spec.prompts)] for i in range(args.n)]
            made = pipe(prompts, labels=list(spec.labels), architecture=config, generator=generator).weights
            fresh = initial(config, list(range(args.n)), init_of(zoo, spec.name), BIAS)
            fresh = [unstack(fresh, k) for k in range(args.n)]
            starts = {
                "generated": made,
                "random": fresh,
                "layers_copied": [copied(member, known, config) for member in members],
                "member_in_corner": [in_corner(member, new) for member, new in zip(members, fresh, strict=True)],
            }
            curves = finetune(config, starts, data[spec.name], args, EPOCHS)
            inputs, labels = data[spec.name].inputs(data[spec.name].test), data[spec.name].test.labels
            curves["member"] = {0: accuracy(known, stack(members), inputs, labels)}
            told = f"{spec.name}, {family}, {name}"
            rows += curve_rows(spec.name, curves, architecture=family, variant=name)
            print(curve_table(told, curves, EPOCHS), flush=True)
            write_results(args.out, "IGPG, unseen architectures", f"python {' '.join(sys.argv)}", args.seed, rows)


def copied(member: dict, known: TargetConfig, config: TargetConfig) -> dict:
    """
    A member in the sizes of another network, as Net2Net (https://huggingface.co/papers/1511.05641) has it: units stand twice, and
    what reads them reads half of each; a further layer hands on what it gets. Where units are fewer, the first ones stay.
    """
    units, result = torch.arange(known.input_shape[0]), {}  # which old unit each input of the next layer is
    have = {
        kind: iter([name for name, own, *_ in _layers(known) if own == kind]) for kind in ("conv", "linear", "head")
    }
    for name, kind, count, pixels in _layers(config):
        source = next(have[kind], None)
        if source is None:  # behind the last layer of the kind that the member has
            result[f"{name}.weight"], result[f"{name}.bias"] = torch.eye(count), torch.zeros(count)
            continue
        weight, bias = member[f"{source}.weight"], member[f"{source}.bias"]
        copies = units.bincount(minlength=int(units.max()) + 1)[units].float()
        inputs, share = units, 1 / copies
        if pixels > 1:
            inputs = (units[:, None] * pixels + torch.arange(pixels)).flatten()
            share = share.repeat_interleave(pixels)
        rows = torch.arange(count) % len(weight)
        shape = (1, -1, *[1] * (weight.dim() - 2))
        result[f"{name}.weight"] = weight[rows][:, inputs] * share.view(shape)
        result[f"{name}.bias"] = bias[rows]
        units = rows
    return result


def _layers(config: TargetConfig) -> list[tuple[str, str, int, int]]:
    """Of each layer with weights its name, its kind, its units, and the pixels of each channel that a linear layer reads."""
    found, shape = [], list(config.input_shape)
    for layer in config.network:
        if layer["kind"] == "conv":
            found.append((layer["name"], "conv", layer["channels"], 1))
        elif layer["kind"] == "linear":
            kind = "head" if layer["name"] == "head" else "linear"
            found.append((layer["name"], kind, layer["features"], math.prod(shape[1:])))
        shape = shape_after(layer, shape)
    return found


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

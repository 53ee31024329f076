"""Networks of widths and depths that no zoo has, from a generator that writes codes: at first sight and after one epoch.

    python examples/reproduce/unseen_architectures.py --generator runs/igpg/pipeline --zoo runs/images --out unseen.json

`generated` is what a call with the new architecture gives: weights of the nearest known one in the new sizes, see
`hf_weightgen.weights.resize`. Beside them what the generator writes for the new tensors themselves, members of the zoo whose layers
are copied to the new sizes in the same way, members put into a corner of a new network, and new networks. The row `member` tells
what members of the known size have. All rows of a task are trained on the same batches.
IGPG (section 4.4) tells of unseen architectures after fine-tuning; no figures of the paper are on these sets.
"""

import torch
from command import typed
from curves import curve_rows, curve_table
from finetune import accuracy, finetune
from tiny_zoo import init_of, load, make_parser

from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.architectures import HEAD, TargetConfig, cnn, mlp
from hf_weightgen.targets.stacked import stack, unstack
from hf_weightgen.weights.resize import resized
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
            asked = {"labels": list(spec.labels), "architecture": config}
            made = pipe(prompts, **asked, generator=generator).weights
            itself, generator = pipe.with_architecture(config, "new", resize=False), generator.manual_seed(args.seed)
            written = itself(prompts, **asked | {"architecture": "new"}, generator=generator).weights
            fresh = initial(config, list(range(args.n)), init_of(zoo, spec.name), BIAS)
            fresh = [unstack(fresh, k) for k in range(args.n)]
            shapes = {name: tuple(tensor.shape) for name, tensor in fresh[0].items()}
            starts = {
                "generated": made,
                "written_itself": written,
                "random": fresh,
                "layers_copied": [resized(member, shapes) for member in members],
                "member_in_corner": [in_corner(member, new) for member, new in zip(members, fresh, strict=True)],
            }
            curves = finetune(config, starts, data[spec.name], args, EPOCHS)
            inputs, labels = data[spec.name].inputs(data[spec.name].test), data[spec.name].test.labels
            curves["member"] = {0: accuracy(known, stack(members), inputs, labels)}
            told = f"{spec.name}, {family}, {name}"
            rows += curve_rows(spec.name, curves, architecture=family, variant=name)
            print(curve_table(told, curves, EPOCHS), flush=True)
            write_results(args.out, "IGPG, unseen architectures", typed(), args.seed, rows)


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

"""Fine-tuning from generated weights, from a new initialisation, from the zoo's average and from its nearest member (D2NWG Table 4).

    python examples/reproduce/finetune.py --generator runs/cnns/pipeline --zoo runs/images --out finetune.json

All rows of a task are trained at once, on the same batches, with the zoo's optimiser; `finetune.png` beside the table has the
curves. The paper fine-tunes on all images; `--images` takes fewer.
"""

import torch
from command import typed
from curves import curve_rows, curve_table, plot_curves
from tiny_zoo import init_of, load, make_parser, samples

from hf_weightgen.evaluation.baselines import average
from hf_weightgen.evaluation.novelty import fix_network_gauge, flatten
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.targets.stacked import stack, unstack
from hf_weightgen.targets.symmetry import permutation_spec
from hf_weightgen.zoo.build_networks import BIAS, PROTOCOLS
from hf_weightgen.zoo.networks import initial, predict_networks, train_networks
from hf_weightgen.zoo.schema import zoo_state_dicts


EPOCHS = (0, 1, 5, 25, 50)


def main():
    parser = make_parser(__doc__, n=5)
    parser.add_argument("--images", type=int, default=10_000, help="Training images at most.")
    args = parser.parse_args()
    pipe, specs, configs, data, zoo, architecture = load(args)
    where, rows = list(zip(zoo["task"], zoo["split"], strict=True)), []
    for spec in specs:
        config = configs[spec.name]
        members = [i for i, place in enumerate(where) if place == (spec.name, "train")]
        made = samples(pipe, data, spec, [], "generated", args.n, args.seed, architecture)
        starts = starting_points(made, list(zoo_state_dicts(zoo, members)), config, init_of(zoo, spec.name))
        curves = finetune(config, starts, data[spec.name], args)
        rows += curve_rows(spec.name, curves)
        print(curve_table(spec.name, curves, EPOCHS), flush=True)
        write_results(args.out, "D2NWG, Table 4", typed(), args.seed, rows)
    plot_curves(rows, args.out.with_suffix(".png"))


def starting_points(made, members, config, init: str) -> dict[str, list[dict]]:
    """Networks of each row at epoch 0."""
    units = permutation_spec(config)
    aligned, same_gauge = (fix_network_gauge(many, members[0], units) for many in (members, made))
    near = torch.cdist(flatten(same_gauge), flatten(aligned)).argmin(1)
    fresh = initial(config, list(range(len(made))), init, BIAS)
    return {
        "generated": made,
        "random": [unstack(fresh, k) for k in range(len(made))],
        "zoo_average": [average(aligned)],
        "nearest_member": [members[i] for i in near.tolist()],
    }


def finetune(config, starts, data, args, told=EPOCHS, as_on: str | None = None) -> dict[str, dict[int, torch.Tensor]]:
    """Per row and epoch the test accuracies of its networks, in points; by the protocol of the task, or as on another one."""
    protocol = PROTOCOLS["short"][as_on or data.spec.name]
    sizes = [len(networks) for networks in starts.values()]
    params = stack([network for networks in starts.values() for network in networks])
    images = data.train.where(torch.arange(len(data.train)) < args.images)
    training = train_networks(
        config,
        params,
        data.inputs(images),
        images.labels,
        lambda tensors: torch.optim.Adam(tensors, lr=protocol.lr, weight_decay=protocol.weight_decay, fused=True),
        epochs=told[-1],
        batch_size=protocol.batch_size,
        generator=torch.Generator().manual_seed(args.seed),
    )
    test, scores = data.inputs(data.test), {}
    scores[0] = accuracy(config, params, test, data.test.labels)
    for epoch, trained in enumerate(training, start=1):
        if epoch in told:
            scores[epoch] = accuracy(config, trained, test, data.test.labels)
    parts = {epoch: values.split(sizes) for epoch, values in scores.items()}
    return {name: {epoch: values[k] for epoch, values in parts.items()} for k, name in enumerate(starts)}


def accuracy(config, params, inputs, labels) -> torch.Tensor:
    return 100 * (predict_networks(config, params, inputs) == labels).double().mean(1)


if __name__ == "__main__":
    main()

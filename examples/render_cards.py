"""Renders the cards of what is published: the generators of adapters and of networks, one of each that was generated, and the zoo.

    python examples/render_cards.py model_cards

The zoo's figures come from its rows in `model_cards/text-zoo`; those of the generators stand beside them.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from hf_weightgen import WeightGenPipeline
from hf_weightgen.hub.cards import readdress, write_card
from hf_weightgen.targets.architectures import TargetConfig, TargetModel
from hf_weightgen.zoo.folder import describe


NAMESPACE = "hf-weightgen"
GENERATORS = ("network-generator", "code-generator", "text-code-generator")  # which stand beside their cards
PUBLISHED = Path(__file__).resolve().parents[1] / "model_cards"
ZOO_NOTES = [
    "Adapters have r = 4 on query and value of the last two of six layers. 26 text classification tasks have six seeds\n"
    "each; the last seed is held out. The two later of three late checkpoints are kept, in float16; the row `base` is the\n"
    "adapter from which all of them start. All were trained under bfloat16 autocast.",
    "Adapters see at most 64 tokens of a text and 4,000 sentences in training (SST-2: 10,000). Many test sentences of\n"
    "rotten_tomatoes contain a phrase of SST-2's training split, which exact de-duplication cannot see: the shared start\n"
    "has read such phrases.",
]
ZOO_COMMAND = "python examples/build_zoo.py runs/text-zoo --bf16 --merge model_cards/text-zoo --leave_out 0"


def render(out: Path, zoo: Path) -> None:
    """Writes `out/NAME/README.md` for each."""
    folders = {name: out / name for name in ("text-generator", "text-adapter", "network", *GENERATORS, "text-zoo")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    pipe = WeightGenPipeline.from_pretrained("bundled")
    pipe.set_progress_bar_config(disable=True)
    shutil.copyfile(pipe.folder / "README.md", folders["text-generator"] / "README.md")
    readdress(folders["text-generator"], f"{NAMESPACE}/text-generator")

    for name in GENERATORS:
        if folders[name].resolve() != PUBLISHED / name:
            shutil.copyfile(PUBLISHED / name / "README.md", folders[name] / "README.md")
        readdress(folders[name], f"{NAMESPACE}/{name}")

    output = pipe("sentiment on SST-2", generator=torch.Generator().manual_seed(0))
    output.generator_id = f"{NAMESPACE}/text-generator"
    output.command = f'hf-weightgen generate "sentiment on SST-2" --seed 0 --generator {output.generator_id} --out DIR'
    with tempfile.TemporaryDirectory() as temporary:
        (saved,) = output.save_pretrained(temporary)
        shutil.copyfile(saved / "README.md", folders["text-adapter"] / "README.md")
    readdress(folders["text-adapter"], f"{NAMESPACE}/text-adapter")

    network = TargetModel(TargetConfig())
    sizes = [
        *network.config.input_shape,
        *(layer["features"] for layer in network.config.network if "features" in layer),
    ]
    write_card(
        folders["network"],
        "network",
        labels=[str(digit) for digit in range(network.config.num_classes)],
        prompt="which digit is it",
        generator="a folder that `accelerate launch examples/train_d2nwg.py` wrote",
        facts={"architecture": f"multilayer perceptron {'-'.join(map(str, sizes))}, {network.config.activation}"},
    )
    readdress(folders["network"], f"{NAMESPACE}/network")

    base, facts = describe(zoo)
    address = f"{NAMESPACE}/text-zoo"
    write_card(
        folders["text-zoo"],
        "zoo",
        base_model=base,
        generator=address,
        facts=facts,
        command=ZOO_COMMAND,
        notes=ZOO_NOTES,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--zoo", type=Path, default=Path("model_cards/text-zoo"), help="Folder of the published zoo.")
    args = parser.parse_args()
    render(args.out, args.zoo)


if __name__ == "__main__":
    main()

"""What `test_build_networks.py` starts in two processes: each builds the same zoo and tells which seeds it trains."""

import sys
from pathlib import Path

from hf_weightgen.targets import architectures
from hf_weightgen.targets.tasks import TaskSpec
from hf_weightgen.zoo import build_networks
from hf_weightgen.zoo.build_networks import NetworkZooConfig, Protocol, build_network_zoo


CONFIG = NetworkZooConfig(architecture="small", seeds=5, held_out=1, keep=2, group=2)  # groups of 2, 2 and 1
PROTOCOL = Protocol("relu", "default", 1e-2, batch_size=8, epochs=3)
SMALL = (architectures.cnn((3,), (3,), (True,), (6,)), "tanh", 8)


def main():
    data, zoo = map(Path, sys.argv[1:])
    build_networks.SHORT[data.name] = PROTOCOL
    architectures.NAMED["small"] = SMALL
    train_group = build_networks.train_group

    def told(data, seeds, *arguments):
        sys.stdout.write(f"trained {list(seeds)}\n")  # in one piece: the other process writes to the same pipe
        sys.stdout.flush()
        return train_group(data, seeds, *arguments)

    build_networks.train_group = told
    spec = TaskSpec(data.name, str(data), "label", ("dark", "light"), image_column="image", test_split="test")
    build_network_zoo([spec], zoo, CONFIG, progress=False)


if __name__ == "__main__":
    main()

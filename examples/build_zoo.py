"""Trains the text zoo: LoRA adapters for all-MiniLM-L6-v2 on 26 tasks, 6 seeds, 3 late checkpoints.

    python examples/build_zoo.py runs/text-zoo                                  # datasets from the Hub
    python examples/build_zoo.py runs/text-zoo --data_root PATH                 # from local copies under their Hub ids
    python examples/build_zoo.py runs/text-zoo --merge runs/text-zoo-f16        # one compact float16 file as well
    python examples/build_zoo.py runs/text-zoo --merge runs/text-zoo-f16 --leave_out 0   # of the two later checkpoints

The run may be killed at any time; the same command continues.
"""

import argparse
from pathlib import Path

from hf_weightgen.zoo.build import build_zoo
from hf_weightgen.zoo.folder import merge
from hf_weightgen.zoo.recipe import ZooConfig, default_tasks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data_root", type=Path, help="Folder with datasets under their Hub ids.")
    parser.add_argument("--bf16", action="store_true", help="Train under bfloat16 autocast.")
    parser.add_argument("--merge", type=Path, help="Also write the finished zoo compactly, weights in float16.")
    parser.add_argument("--leave_out", type=int, nargs="*", default=[], help="Checkpoints that --merge leaves out.")
    args = parser.parse_args()
    specs, base_only = default_tasks()
    zoo = build_zoo(specs, args.folder, ZooConfig(bf16=args.bf16), args.data_root, base_only)
    print(f"{len(zoo.finished())} rows in {args.folder}")
    if args.merge:
        print(*merge(args.folder, args.merge, leave_out=[f"-c{i}" for i in args.leave_out]), sep="\n")


if __name__ == "__main__":
    main()

"""Seconds to publish and to load a generator over the Hub, beside the client's own calls for the same bytes.

    python tests/local_hub.py -- python examples/reproduce/hub_speed.py --out examples/reproduce/results/hub_speed.json

Told are medians of alternating runs with an empty cache each. "load" is to files in the cache; building the networks from
them costs the same from a folder, and is told by itself.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, whoami
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file, save_file

from hf_weightgen import WeightGenPipeline
from hf_weightgen.evaluation.table import write_results
from hf_weightgen.pipelines.pipeline_utils import BUNDLED, publish_generator


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    disable_progress_bars()
    owner, api = whoami()["name"], HfApi()

    def seconds(function, *arguments, **settings) -> float:
        start = time.perf_counter()
        function(*arguments, **settings)
        return time.perf_counter() - start

    def upload(folder: Path, repo_id: str) -> None:
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder))

    def mark(file: Path) -> None:
        """Makes the bytes of a file unique, and its tensors equal."""
        save_file(load_file(file), file, metadata={"format": "pt", "mark": str(file)})

    times: dict[str, list[float]] = {
        "publish": [],
        "upload_folder": [],
        "load": [],
        "snapshot_download": [],
        "build": [],
    }
    for run in range(-1, args.runs):  # the first warms up
        with tempfile.TemporaryDirectory() as cache:
            ours, theirs = f"{owner}/ours{run}", f"{owner}/theirs{run}"
            # the server keeps large files by content, so each has bytes of its own
            folders = [Path(shutil.copytree(BUNDLED, f"{cache}/{name}")) for name in ("ours-files", "theirs-files")]
            for folder in folders:
                with open(folder / "README.md", "a", encoding="utf-8") as card:
                    card.write(f"\n{folder}\n")
                mark(folder / "vae" / "model.safetensors")
                mark(folder / "unet" / "diffusion_pytorch_model.safetensors")
            told = {}
            calls = [("publish", publish_generator, folders[0], ours), ("upload_folder", upload, folders[1], theirs)]
            for name, function, *arguments in calls[:: 1 if run % 2 else -1]:
                told[name] = seconds(function, *arguments)
            calls = [("load", WeightGenPipeline.download, ours), ("snapshot_download", snapshot_download, theirs)]
            for name, function, repo_id in calls[:: 1 if run % 2 else -1]:
                told[name] = seconds(function, repo_id, cache_dir=f"{cache}/{name}")
            told["build"] = seconds(WeightGenPipeline.from_pretrained, BUNDLED)
        if run >= 0:
            for name, value in told.items():
                times[name].append(value)
    rows = [
        {
            "task": "10 MB generator",
            "method": name,
            "metric": "seconds",
            "mean": statistics.median(values),
            "n": len(values),
        }
        for name, values in times.items()
    ]
    middle = {row["method"]: row["mean"] for row in rows}
    ratio = (middle["publish"] + middle["load"]) / (middle["upload_folder"] + middle["snapshot_download"])
    rows.append({"task": "10 MB generator", "method": "ratio", "metric": "ratio", "mean": ratio, "n": args.runs})
    write_results(args.out, "hub_speed", f"python examples/reproduce/hub_speed.py --runs {args.runs}", 0, rows)
    for row in rows:
        print(f"{row['method']:20} {row['mean']:.3f} {row['metric']}")


if __name__ == "__main__":
    main()

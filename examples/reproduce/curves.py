"""Accuracy after some epochs of fine-tuning as rows, table and picture; for the scripts beside this file.

Curves: by method and epoch the test accuracies of its networks in points.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from plots import pyplot
from torch import Tensor


Curves = Mapping[str, Mapping[int, Tensor]]


def curve_rows(task: str, curves: Curves, **more) -> list[dict]:
    """A row of results for each method and epoch, each with `more`."""
    rows = []
    for method, scores in curves.items():
        for epoch, values in scores.items():
            spread = values.std(correction=min(1, len(values) - 1)).item()
            row = {"task": task, "method": method, "metric": "accuracy", **more, "epoch": epoch}
            rows.append(row | {"mean": values.mean().item(), "std": spread, "n": len(values)})
    return rows


def curve_table(title: str, curves: Curves, epochs: Sequence[int]) -> str:
    lines = [
        f"| {title} | " + " | ".join(f"epoch {epoch}" for epoch in epochs) + " |",
        "|---" * (len(epochs) + 1) + "|",
    ]
    for method, scores in curves.items():
        found = [scores.get(epoch) for epoch in epochs]
        cells = ["-" if own is None else f"{own.mean():.1f} ± {own.std(correction=0):.1f}" for own in found]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_curves(rows: Sequence[Mapping], path: Path) -> None:
    """A picture of rows, one panel per task."""
    plt = pyplot()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            axis.errorbar(
                [row["epoch"] for row in own], [row["mean"] for row in own], [row["std"] for row in own], label=method
            )
        axis.set(title=task, xlabel="epochs", ylabel="accuracy", xscale="symlog")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)

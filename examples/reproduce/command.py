"""The command of a results file: what somebody types who wants the same rows, without where this machine keeps things."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_weightgen.hub.cards import told_options


def typed(argv: Sequence[str] | None = None) -> str:
    """Of the running script, from the project's root."""
    script, *given = sys.argv if argv is None else argv
    return f"python examples/reproduce/{Path(script).name} {told_options(given)}".rstrip() + " --out results.json"

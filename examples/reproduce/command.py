"""The command of a results file: what somebody types who wants the same rows, without where this machine keeps things."""

import sys
from collections.abc import Sequence

from hf_weightgen.hub.cards import told_place


ELSEWHERE = {"--data_root", "--image_encoder", "--out", "--cache"}  # say where things are and not what they become


def typed(argv: Sequence[str] | None = None) -> str:
    """Of the running script, from the project's root; absolute folders and files are told by their names."""
    script, *given = sys.argv if argv is None else argv
    told, skip = ["python", f"examples/reproduce/{told_place(script).split('/')[-1]}"], False
    for one in given:
        if one.startswith("--"):
            skip = one.split("=")[0] in ELSEWHERE
            if skip and "=" in one:
                continue
        if not skip:
            told.append(told_place(one))
    return " ".join([*told, "--out results.json"])

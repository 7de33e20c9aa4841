"""``plot``: draw a figure of a run, or of several."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from legacy1bit.commands.options import latest_run, path_of
from legacy1bit.formats.published import read_tokenizer
from legacy1bit.model import load_model
from legacy1bit.reports.figures import (
    CURVES,
    SUFFIXES,
    check_suffix,
    draw,
    load_matplotlib,
    map_attention,
    map_weights,
    panels_of,
    save_figure,
    size_panel,
)
from legacy1bit.reports.records import read_records
from legacy1bit.training.run import Run

# Kinds of figures that need a model.
_BYTES, _WEIGHTS, _ATTENTION = "bytes", "weights", "attention"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Draw the metrics of runs (page: the main curves), their loss by bytes of weights, the "
        "weights of a layer, or the attention weights of a prompt."
    )
    command.add_argument(
        "runs", metavar="RUN", type=path_of, nargs="*", help="a run's folder (default: the latest)"
    )
    command.add_argument(
        "--kind",
        choices=(*CURVES, _BYTES, _WEIGHTS, _ATTENTION),
        default="page",
        help="kind of figure (default: page)",
    )
    command.add_argument(
        "--out",
        metavar="FILE",
        type=path_of,
        required=True,
        help=f"output file: {', '.join(SUFFIXES)}",
    )
    command.add_argument(
        "--layer",
        metavar="NAME",
        help="for weights: name of the matrix, as in info (default: first)",
    )
    command.add_argument("--prompt", metavar="TEXT", help="for attention: the text to read")
    command.add_argument(
        "--block", metavar="N", type=int, help="for attention: one block, from 0 (default: all)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw and write the figure."""
    kind, out = arguments.kind, arguments.out
    for name, its_kind in (("layer", _WEIGHTS), ("prompt", _ATTENTION), ("block", _ATTENTION)):
        if getattr(arguments, name) is not None and kind != its_kind:
            raise ValueError(f"--{name} goes with --kind {its_kind}, and not with {kind}")
    check_suffix(out, SUFFIXES)
    load_matplotlib()
    folders = arguments.runs or [latest_run()]
    if kind in CURVES:
        runs = [read_records(Run(folder)) for folder in folders]
        figure = draw(panels_of(runs, kind), _columns(kind))
    elif kind == _BYTES:
        runs = [read_records(Run(folder)) for folder in folders]
        figure = draw([size_panel(runs, [load_model(folder) for folder in folders])])
    elif kind == _WEIGHTS:
        figure = map_weights(load_model(_only(folders, kind)), arguments.layer)
    else:
        folder = _only(folders, kind)
        if not arguments.prompt:
            raise ValueError("--kind attention needs a --prompt for the model to read")
        model = load_model(folder)
        tokenizer = read_tokenizer(folder, model.config.vocab_size)
        figure = map_attention(model, tokenizer, os.fsencode(arguments.prompt), arguments.block)
    save_figure(figure, out)
    print(f"{out}: {kind} of {', '.join(map(str, folders))}")
    return 0


def _columns(kind: str) -> int:
    # A column for each of three codes.
    return 3 if kind == "shares" else 2


def _only(folders: Sequence[Path], kind: str) -> Path:
    if len(folders) > 1:
        raise ValueError(f"--kind {kind} takes one run, and not {len(folders)}")
    return folders[0]

"""``info``: print a model's settings, sizes and codes."""

import argparse
from dataclasses import asdict

from legacy1bit.commands.options import add_model, latest_run, read_model
from legacy1bit.formats.adapters import read_adapter, resolve
from legacy1bit.model import TernaryMatrix
from legacy1bit.training.evaluation import code_fractions


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model(command)


def run(arguments: argparse.Namespace) -> int:
    """Print settings, sizes and the fraction of each code in every matrix."""
    folder, adapters = resolve(arguments.model or latest_run(), arguments.adapter)
    model = read_model(folder)
    settings = asdict(model.config) | model.provenance.to_dict()
    rows = {
        "model": folder,
        **{name: "" if value is None else value for name, value in settings.items()},
        "parameters": f"{model.num_parameters:,}",
        "stored": f"{model.stored_bytes():,} bytes of weights",
    }
    for path, factor in adapters:
        adapter = read_adapter(path, model.config)
        rows[f"adapter {path}"] = (
            f"rank {adapter.rank}, {', '.join(adapter.targets)}, times {factor:g}"
        )
    for name, value in rows.items():
        print(f"{name:<{max(map(len, rows))}}  {value}")
    matrices = code_fractions(model)
    if matrices:
        width = max(map(len, matrices))
        levels = " ".join(f"{level:>6}" for level in next(iter(matrices.values())))
        print(f"\n{'matrix':<{width}}  {'shape':>11}  {'scale':>9}  {levels}")
    for name, fractions in matrices.items():
        matrix = model.parameters[name]
        assert isinstance(matrix, TernaryMatrix)
        print(
            f"{name:<{width}}  {'x'.join(map(str, matrix.shape)):>11}  {matrix.scale:>9.6f}  "
            + " ".join(f"{one:>6.1%}" for one in fractions.values())
        )
    return 0

"""Spaces of settings, and a small study."""

import contextlib
import sqlite3

from legacy1bit.main import main

with contextlib.suppress(ImportError):
    from sqlalchemy import Engine, event

    @event.listens_for(Engine, "connect")
    def _no_waiting_for_the_disk(connection, _):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")


SPACE = """
[learning_rate]
low = 1e-3
high = 1e-2
log = true

[model_dim]
low = 8
high = 24
step = 8

[activation]
choices = ["relu2", "relu"]

[float_steps]
low = 0.0
high = 0.5
of_steps = true
"""

# A model_dim of 10 cannot have four heads.
WITH_FAILURES = """
[learning_rate]
low = 1e-3
high = 1e-2
log = true

[model_dim]
choices = [8, 10, 16]

[activation]
choices = ["relu2", "relu"]

[float_steps]
low = 0.0
high = 0.5
of_steps = true
"""


def make_study(folder):
    """Make a small study of a name that is to be escaped, and return its folder."""
    (folder / "space.toml").write_text(WITH_FAILURES)
    (folder / "text.txt").write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(200)))
    out = folder / "<b>study"
    options = ("--blocks=1", "--heads=4", "--sequence-length=16", "--batch-size=2", "--threads=1",
               "--steps=8", "--trials=9", "--sampler=random")  # fmt: skip
    assert main(["tune", "--data", str(folder / "text.txt"), "--space",
                 str(folder / "space.toml"), "--cache", str(folder / "cache"),
                 "--out", str(out), *options]) == 0  # fmt: skip
    return out

"""Print the oldest versions that pyproject.toml allows, as constraints for pip."""

import tomllib
from pathlib import Path

with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
    settings = tomllib.load(file)
project = settings["project"]
needed = [settings["build-system"]["requires"], project["dependencies"]]
needed += project["optional-dependencies"].values()
print(
    *sorted({one.replace(">=", "==") for some in needed for one in some if ">=" in one}), sep="\n"
)

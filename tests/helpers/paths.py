"""Where the tests and the source they belong to lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
# The C original's models and their answers: beside the source, and not part of it. Some targets of
# the Makefile run a copy of the tests further down, in build/.
BESIDE = [folder / "shared" / "golden" for folder in ROOT.parents]
GOLDEN = next(filter(Path.is_dir, BESIDE), BESIDE[0])

"""Where the tests and the source they belong to lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
# The C original's models and their answers: beside the source, and not part of it.
GOLDEN = ROOT.parent / "shared" / "golden"

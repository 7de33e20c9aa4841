"""``python -m legacy1bit`` is the command line."""

from legacy1bit.main import program

program()

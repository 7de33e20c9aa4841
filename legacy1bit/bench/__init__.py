"""How fast the package is, and how small.

``python -m legacy1bit.bench`` measures it in every instruction set, ``legacy1bit.bench.compare``
two commits in turns, ``legacy1bit.bench.peers`` the package beside PyTorch and llama.cpp.
"""

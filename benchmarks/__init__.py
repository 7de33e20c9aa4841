"""How fast the package is, and how small.

``python -m benchmarks`` measures it in every instruction set, ``benchmarks.compare``
two commits in turns, ``benchmarks.peers`` the package beside PyTorch and llama.cpp.
"""

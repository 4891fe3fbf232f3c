"""Real networks for tests, benchmarks and the cost model's corpus; nothing else of tcompile imports them.

`from tcompile.models.zoo import ZOO` gives the registry, `python -m tcompile.models list` prints it.
"""

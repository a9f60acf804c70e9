"""How fast a step is here: the least it has to compute, and what it takes."""

from mlxpref.bench.flops import Dims, Flops, lengths_of, minimum_flops, products, read_dims

__all__ = ["Dims", "Flops", "lengths_of", "minimum_flops", "products", "read_dims"]

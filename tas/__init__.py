"""TAS: search the width and depth of a CIFAR ResNet (Dong and Yang, NeurIPS 2019).

shapes: the search space; draw: two widths at a time, and how their maps meet; search: the network
that is searched; mix: its norms, fast; pruned: the networks that it may become; losses: the rest.
"""

from tas.losses import cosine_temperature, cost, distillation, linear_temperature
from tas.pruned import PrunedNetwork, multiply_adds, smallest_ratio
from tas.search import SearchNetwork
from tas.shapes import full_channels

__all__ = [
    "PrunedNetwork",
    "SearchNetwork",
    "cosine_temperature",
    "cost",
    "distillation",
    "full_channels",
    "linear_temperature",
    "multiply_adds",
    "smallest_ratio",
]

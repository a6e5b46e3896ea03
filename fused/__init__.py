"""The supernet's cell and the gradients of a step, made fast: the same figures, other kernels.

FastForward gives model_search.Cell another forward (same arguments, modules and state dict),
`difference` tells whether it may, Gradients captures a step in CUDA graphs. Nothing here has to be
read to understand the method.
"""

from fused.cell import FastForward, sharing
from fused.comparison import difference
from fused.gradients import Gradients

__all__ = ["FastForward", "Gradients", "difference", "sharing"]

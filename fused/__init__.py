"""The supernet's cell and the gradients of a step, made fast: the same figures, other kernels.

Cell takes the place of model_search.Cell (same arguments, forward and state dict), `difference`
tells whether it may, Gradients captures a step in CUDA graphs. Nothing here has to be read to
understand the method.
"""

from fused.cell import Cell
from fused.comparison import difference
from fused.gradients import Gradients, copy_into

__all__ = ["Cell", "Gradients", "copy_into", "difference"]

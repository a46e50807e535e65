"""Floor 4: networks that leave this package, each proven to give the same outputs."""

from shiftconv.deploy.export import Exported, export
from shiftconv.deploy.lower import lower, lower_graph
from shiftconv.deploy.quantize import shift_integers, shift_quantizer

__all__ = ["Exported", "export", "lower", "lower_graph", "shift_integers", "shift_quantizer"]

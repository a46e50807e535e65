"""Looking at networks: receptive field, cost and speed of any module, and pages that show them."""

from shiftconv.analysis.count import Count, count
from shiftconv.analysis.receptive_field import ERF, erf
from shiftconv.analysis.throughput import Throughput, compare, throughput

__all__ = ["ERF", "Count", "Throughput", "compare", "count", "erf", "throughput"]

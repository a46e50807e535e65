"""Dynamic sparse training: masks with exact counts for any model and any optimiser, and what makes them pay.

::

    sparse = sc.sparse.SparseTraining(model, optimizer, density=0.4, rule="rigl", schedule=sc.sparse.Schedule(steps=n))
    ...  # train as ever
    print(sparse.report())
    print(sc.sparse.compact(model, images))
"""

from shiftconv.sparse.calibration import Calibration
from shiftconv.sparse.compact import Compacted, compact
from shiftconv.sparse.granularity import Granularity, groups
from shiftconv.sparse.report import LayerSparsity, SparsityReport
from shiftconv.sparse.rule import RULES, Evidence, Rule
from shiftconv.sparse.schedule import Schedule
from shiftconv.sparse.training import SparseTraining

__all__ = [
    "RULES",
    "Calibration",
    "Compacted",
    "Evidence",
    "Granularity",
    "LayerSparsity",
    "Rule",
    "Schedule",
    "SparseTraining",
    "SparsityReport",
    "compact",
    "groups",
]

"""Training: recipes, data sets, the one loop, checkpoints. Lazy, for the command line reads recipes before torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shiftconv.train.checkpoint import Checkpoint, CheckpointError
    from shiftconv.train.data import DataSets, open_data
    from shiftconv.train.device import pick_device
    from shiftconv.train.endings import Stopped
    from shiftconv.train.evaluation import Metrics, evaluate
    from shiftconv.train.loop import Result, train
    from shiftconv.train.progress import RichProgress
    from shiftconv.train.recipe import Recipe
    from shiftconv.train.settings import Data, Distillation, Mix, Optim, Sparsity
    from shiftconv.train.task import Task
    from shiftconv.train.trainer import Diverged

_HOME = {  # public name: the module that holds it
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "Data": "settings",
    "DataSets": "data",
    "Distillation": "settings",
    "Diverged": "trainer",
    "Metrics": "evaluation",
    "Mix": "settings",
    "Optim": "settings",
    "Recipe": "recipe",
    "Result": "loop",
    "Stopped": "endings",
    "Task": "task",
    "RichProgress": "progress",
    "Sparsity": "settings",
    "evaluate": "evaluation",
    "open_data": "data",
    "pick_device": "device",
    "train": "loop",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Data",
    "DataSets",
    "Distillation",
    "Diverged",
    "Metrics",
    "Mix",
    "Optim",
    "Recipe",
    "Result",
    "RichProgress",
    "Sparsity",
    "Stopped",
    "Task",
    "evaluate",
    "open_data",
    "pick_device",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shiftconv.train' has no attribute {name!r}")
    return getattr(import_module(f"shiftconv.train.{_HOME[name]}"), name)

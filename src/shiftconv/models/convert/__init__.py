"""The only home of foreign checkpoints: reading, recognising, loading and converting them."""

from shiftconv.models.convert.checkpoint import Checkpoint, read_checkpoint
from shiftconv.models.convert.identity import Identity, identify
from shiftconv.models.convert.load import Report, convert, load_checkpoint

__all__ = ["Checkpoint", "Identity", "Report", "convert", "identify", "load_checkpoint", "read_checkpoint"]

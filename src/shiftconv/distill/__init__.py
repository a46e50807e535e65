"""Knowledge distillation: losses that let a network, the student, learn from a trained one, the teacher.

::

    loss = 0.9 * sc.distill.kd(logits, teacher_logits, temperature=3.0) + 0.1 * F.cross_entropy(logits, labels)
    loss = sc.distill.nkd(logits, teacher_logits, labels)

Of logits: :func:`kd`, :func:`nkd` and :func:`dist`. Of feature maps: the modules :class:`FeatureLoss` and :class:`MGD`,
whose own weights are trained along with the student's and thrown away afterwards. No loss gives the teacher a gradient.
All are scalars, computed in float32 also for half precision and under autocast, or in float64 if an input is.
"""

from shiftconv.distill.features import MGD, FeatureLoss
from shiftconv.distill.logits import dist, kd
from shiftconv.distill.nkd import nkd
from shiftconv.distill.standardize import standardize_logits

__all__ = ["MGD", "FeatureLoss", "dist", "kd", "nkd", "standardize_logits"]

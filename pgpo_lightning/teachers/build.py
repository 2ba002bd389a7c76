"""From the settings of a run to its teacher."""

from transformers import PreTrainedModel

from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.teachers.base import LiveTeacher, Teacher, TeacherRegularization
from pgpo_lightning.teachers.ema import EMATeacher, NarrowEMATeacher
from pgpo_lightning.teachers.frozen import FrozenTeacher, TrustRegionTeacher
from pgpo_lightning.teachers.lora import EMAAdapterTeacher, FrozenAdapterTeacher, TrustRegionAdapterTeacher
from pgpo_lightning.teachers.schedules import (
    GatedAdapterTeacher,
    GatedTeacher,
    RefreshGate,
    RestartAdapterTeacher,
    RestartTeacher,
)


def make_teacher(
    kind: TeacherRegularization,
    student: PreTrainedModel,
    rate: float,
    period: int = 10,
    gate: RefreshGate | None = None,
    offload: bool = False,
    narrow: bool = False,
) -> Teacher:
    """Return the teacher of a configuration, starting from the student's current weights, or from its adapter.

    Args:
        kind: Which teacher.
        student: The model being trained.
        rate: Weight of the student: in each update (``ema``, ``restart``), or in the mixture (``trust-region``).
        period: Steps between two updates (``restart``).
        gate: Conditions of a copy (``gated``).
        offload: Keep whole weights in host memory. Without effect on adapters.
        narrow: Keep the weights of an average in bf16 (``ema``). Without effect on adapters.
    """
    if kind == "live":
        return LiveTeacher()
    adapted = bool(adapter(student))
    gate = gate or RefreshGate()
    if kind == "frozen":
        return FrozenAdapterTeacher(student) if adapted else FrozenTeacher(student, offload)
    if kind == "ema":
        if adapted:
            return EMAAdapterTeacher(student, rate)
        return (NarrowEMATeacher if narrow else EMATeacher)(student, rate, offload)
    if kind == "trust-region":
        return TrustRegionAdapterTeacher(student, rate) if adapted else TrustRegionTeacher(student, rate, offload)
    if kind == "restart":
        if adapted:
            return RestartAdapterTeacher(student, rate, period)
        return RestartTeacher(student, rate, period, offload=offload)
    return GatedAdapterTeacher(student, gate) if adapted else GatedTeacher(student, gate, offload=offload)

"""From the settings of a run to its teacher."""

from transformers import PreTrainedModel

from pgpo_lightning.models.lora import adapter
from pgpo_lightning.teachers.base import LiveTeacher, Teacher, TeacherRegularization
from pgpo_lightning.teachers.ema import EMATeacher
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
) -> Teacher:
    """Build the teacher that a configuration names, from the student's weights, or its adapter, as they are now."""
    if kind == "live":
        return LiveTeacher()
    whole, adapted, settings = {
        "frozen": (FrozenTeacher, FrozenAdapterTeacher, {}),
        "ema": (EMATeacher, EMAAdapterTeacher, {"rate": rate}),
        "trust-region": (TrustRegionTeacher, TrustRegionAdapterTeacher, {"rate": rate}),
        "restart": (RestartTeacher, RestartAdapterTeacher, {"rate": rate, "period": period}),
        "gated": (GatedTeacher, GatedAdapterTeacher, {"gate": gate or RefreshGate()}),
    }[kind]
    return adapted(student, **settings) if adapter(student) else whole(student, offload=offload, **settings)

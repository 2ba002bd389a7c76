"""The collection: what a row of the loss is, and what its loss is."""

from pgpo_lightning.modules.cepo import CEPO
from pgpo_lightning.modules.drift import DRIFT
from pgpo_lightning.modules.grpo import GRPO
from pgpo_lightning.modules.hapo import HAPO
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.modules.opd import OPD
from pgpo_lightning.modules.rlsd import RLSD
from pgpo_lightning.modules.sdpo import SDPO
from pgpo_lightning.modules.srpo import SRPO
from pgpo_lightning.modules.tgpo import TGPO

__all__ = ["CEPO", "DRIFT", "GRPO", "HAPO", "OPD", "RLSD", "SDPO", "SRPO", "TGPO", "OnPolicyModule"]

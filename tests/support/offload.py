"""Teachers on the host."""

from pgpo_lightning.teachers.schedules import RefreshGate
from tests.support.helpers import tiny_model, tiny_sdpo

OPEN = RefreshGate(min_steps=1, window=1, reward_gain=-1.0, max_length_ratio=100.0, check_every=2)
OWN = {"ema": {}, "frozen": {}, "trust-region": {}, "restart": {"teacher_period": 2}, "gated": {"teacher_gate": OPEN}}


def module(kind, offload, tied=True, **settings):
    return tiny_sdpo(
        model=tiny_model(tie_word_embeddings=tied),
        teacher_regularization=kind,
        teacher_offload=offload,
        **OWN[kind],
        **settings,
    )

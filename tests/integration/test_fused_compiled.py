"""The loss with compiled elementwise work gives what it gives without."""

import shutil

import pytest
import torch

from pgpo_lightning.losses.divergence import (
    Divergence,
    Softening,
)
from pgpo_lightning.losses.fused import Head, Source, linear_distillation
from tests.support.loss_cases import CLIPPED, inputs, label


@pytest.mark.parametrize("which", [CLIPPED[4], Divergence(1.0, softening=Softening(0.5, 25.0))], ids=label)
def test_fused_elementwise_work_gives_the_same(which):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()
    made = {}
    for compiled in (False, True):
        loss, statistics = linear_distillation(
            Source(hidden, Head(weight, scale=0.8)),
            [Source(teacher_hidden, Head(teacher_weight, scale=0.8))],
            targets,
            lambda t, _: (
                t.divergence * (1 + t.log_p_student.detach().exp()) + 0.2 * t.log_p_student - 0.3 * t.entropy_student
            ),
            which,
            0.7,
            chunk_rows=9,  # 9, 9 and 5 rows
            compiled=compiled,
        )
        made[compiled] = [loss, *statistics, *torch.autograd.grad(loss, (hidden, weight))]
    for a, b in zip(made[True], made[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

"""A teacher whose weights stay on the host: what is refused, released and saved."""

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.modules import SDPO
from pgpo_lightning.training.start_up import check_combination
from tests.support.helpers import LIMITS, TOKENIZER, accumulate, build, half_right, random_rows, tiny_model
from tests.support.offload import module


def test_gradients_are_made_with_a_copy_and_end_without():
    made = module("ema", True)
    made.manual_backward = lambda loss: loss.backward()
    made._synchronised = lambda last: torch.enable_grad()
    seen = []
    sources = made.teacher.sources
    made.teacher.sources = lambda *args: (sources(*args), seen.append(len(made.teacher.device_copy.copies)))[0]
    accumulate(made, random_rows(2))
    assert seen[0] > 20
    assert made.teacher.device_copy.copies == {}


def test_half_precision_converts_a_frozen_teacher_and_a_copy_but_no_moving_average():
    for kind, expected in (("frozen", torch.bfloat16), ("gated", torch.bfloat16), ("ema", torch.float32)):
        made = module(kind, True)
        made.to(torch.bfloat16)
        assert {p.dtype for p in made.teacher.parameters()} == {expected}


def test_ddp_does_not_ask_for_one_device(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        made = module("ema", True, tied=False)
        made.teacher.model.to("meta")  # anything but the student's
        DistributedDataParallel(made)
        made._ddp_params_and_buffers_to_ignore = []
        with pytest.raises(ValueError, match="same type of devices"):
            DistributedDataParallel(made)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher_regularization": "live"},
            "no `teacher.offload` with a teacher that has no weights but the student's",
        ),
        ({"lora": LoRA()}, "no `teacher.offload` with a teacher that has an adapter"),
    ],
)
def test_where_it_would_save_nothing_it_is_refused(settings, message):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, teacher_offload=True, **LIMITS | settings)


def test_sharded_weights_are_refused():
    made = module("ema", True)
    with pytest.raises(MisconfigurationException, match=r"no `teacher.offload` with sharded weights.*strategy` to ddp"):
        check_combination(made.engine, None, sharded=True, teacher=made.objective.teaching.config)

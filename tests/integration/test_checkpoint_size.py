"""What `pgpo plan` says of a checkpoint, against the files of real runs."""

import pytest
import torch

from pgpo_lightning.commands.main import main
from pgpo_lightning.commands.plan import PlanCommand
from pgpo_lightning.memory_planner.memory import GIB
from pgpo_lightning.memory_planner.plan import plan_memory
from pgpo_lightning.memory_planner.plan_report import plan_table
from pgpo_lightning.memory_planner.saving import Saving, saving
from tests.support.helpers import config


def bytes_of(value):
    """Bytes of all storages, each once."""
    found = {}

    def look(value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                look(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)

    look(value)
    return sum(found.values())


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("SDPO", {"teacher_regularization": "ema"}),
        ("SDPO", {"teacher.dtype": "bfloat16"}),
        ("SDPO", {"teacher_regularization": "trust-region", "dtype": "bfloat16"}),
        ("SDPO", {"teacher_regularization": "frozen", "lora": {"r": 4, "lora_alpha": 8}}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else value,
)
def test_the_file_of_a_run_has_the_size_that_was_planned(tmp_path, module, settings, recwarn):
    small = {"verifier": "tests.support.helpers.half_right", "max_response_length": 12} | settings
    path = config(tmp_path / "run", steps=1, module=module, model=small)
    args = ["--config", path, "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
    planned = plan_memory(PlanCommand([*args, "--device", "cpu"]).run()).saving
    main(["fit", *args])
    (file,) = (tmp_path / "run" / "checkpoints").glob("*.ckpt")
    saved = torch.load(file, weights_only=True)
    tensors = bytes_of(saved["state_dict"]) + bytes_of(saved["optimizer_states"])
    assert planned.size == pytest.approx(tensors, rel=1e-3)  # AdamW counts its steps in a tensor each
    assert planned.size < file.stat().st_size < planned.size + 400_000  # names, settings, state of random generators
    assert planned.host == 0


def test_where_the_bytes_go():
    sizes = {"weights": 100, "teacher": 100, "state": 200, "largest": 30}
    assert saving(**sizes, device="cpu", gathered=False, keep=1) == Saving(400, 0, 800)
    assert saving(**sizes, device="cuda", gathered=False, keep=2) == Saving(400, 30, 1200)
    assert saving(**sizes, device="cuda", gathered=True, keep=None) == Saving(400, 400, None)


def test_a_plan_tells_of_checkpoints(tmp_path):
    args = ["--config", config(tmp_path / "run"), "--device", "cpu", "--checkpoint.keep", "3", "--trainer.devices", "2"]
    args += ["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"]
    args += ["--trainer.strategy.tensor_parallel_size", "1"]
    assert not PlanCommand(args).run().sharding.one_file  # Lightning's default
    made = plan_memory(PlanCommand([*args, "--trainer.strategy.save_distributed_checkpoint", "false"]).run())
    assert (made.saving.host, made.saving.disk) == (made.saving.size, 4 * made.saving.size)
    told = f"(`checkpoint.keep` 3), and {made.saving.host / GIB:.2f} GiB of the host's memory while it is written"
    assert told in plan_table(made, None)

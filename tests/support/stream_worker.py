"""Weights of a model that FSDP2 shards, streamed whole to every rank; run by test_weight_sync.py.

Usage: python -m tests.support.stream_worker OUTPUT, once per rank.
"""

import sys
from itertools import product
from types import SimpleNamespace

import torch
import torch.distributed as dist

from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.distributed.fsdp import FullySharded
from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.models.lora import add_adapter, write_current_adapter
from pgpo_lightning.rollout.weight_sync import checksum, drained, stream_weights, write_weights
from tests.support.adapters import disturb, lora
from tests.support.helpers import tiny_model


def student(adapted):
    model = tiny_model()
    if adapted:
        add_adapter(model, lora(r=3), seed=0)
        disturb(model)
    return model


def sharded(precision, adapted=False):
    model = student(adapted)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    return model, FullySharded(model, None, mesh, SimpleNamespace(precision=precision))


def main(output):
    dist.init_process_group("gloo")
    found = {}
    for adapted, precision in product((True, False), ("32-true", "bf16-mixed")):
        model, placement = sharded(precision, adapted)
        placement.run(lambda model=model: model(torch.arange(6, 18).unsqueeze(0)).logits)  # FSDP2 is at work
        for dtype in (None, torch.bfloat16):
            found[f"{adapted} {precision} {dtype}"] = dict(stream_weights(model, dtype))
        if adapted:
            found[f"base {precision}"] = dict(stream_weights(model, adapted=False))
            write_current_adapter(model, output.parent / f"adapter {precision} {dist.get_rank()}", torch.bfloat16)
            found[f"base sums {precision}"] = [checksum(model, adapted=False)]
            with torch.no_grad():
                for matrix in adapter(model).values():
                    matrix.add_(1.0)
            found[f"base sums {precision}"].append(checksum(model, adapted=False))

    if dist.get_rank() == 1:  # reads two tensors and fails; the other still gets all

        def read():
            with drained(stream_weights(model)) as stream:
                next(stream), next(stream)
                raise KeyError

        try:
            read()
        except KeyError:
            found["failed"] = True
    else:
        found["failed"] = len([*stream_weights(model)]) == len(model.state_dict())
    assert gather(dist.get_rank()) == [0, 1]

    narrow, _ = sharded("bf16-true")
    found["buffers"] = {name: str(buffer.dtype) for name, buffer in narrow.named_buffers()}
    found["weight"] = str(narrow.model.norm.weight.dtype)

    sums = [checksum(model)]
    with torch.no_grad():
        if dist.get_rank() == 1:
            model.model.norm.weight.to_local()[0] += 1
    sums.append(checksum(model))
    found["sums"] = sums
    write_weights(model, output.parent / "written", torch.bfloat16)
    torch.save(found, f"{output}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    from pathlib import Path

    main(Path(sys.argv[1]))

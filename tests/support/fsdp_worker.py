"""The loss inside a model that FSDP2 shards; run by test_fsdp.py.

Usage: python -m tests.support.fsdp_worker OUTPUT RANKS.

Rank r of R trains on every R-th sequence; gradients are averaged by FSDP2.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.losses.fused import linear_distillation, linear_statistics
from pgpo_lightning.models.lm_head import source
from pgpo_lightning.models.packing import Sequences
from pgpo_lightning.models.recomputation import recompute_activations
from pgpo_lightning.teachers.ema import EMATeacher
from tests.support.helpers import TOKENIZER, random_rows, tiny_model

ROWS = 4
LAYERS = ("all", 2, "op")
"""Which layers are recomputed."""


class Student(torch.nn.Module):
    """The loss in the forward pass of the root, where its parameters are whole."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.teacher = EMATeacher(tiny_model(seed=1), rate=0.05)

    def forward(self, rows, recompute):
        def pack(pairs):
            return Sequences.pack(pairs, TOKENIZER.pad_token_id, torch.device("cpu"))

        sequences = pack([(row.rollout.prompt_ids, row.rollout.response_ids) for row in rows])
        theirs = pack([(row.reprompt_ids, row.rollout.response_ids) for row in rows])
        assert not isinstance(self.model.get_output_embeddings().weight, DTensor)
        student, teacher = source(self.model, sequences), self.teacher.sources(self.model, theirs)
        if recompute:
            return linear_statistics(student, teacher, sequences.targets, Divergence(0.5)).divergence.sum()
        loss, _ = linear_distillation(student, teacher, sequences.targets, lambda t, _: t.divergence, Divergence(0.5))
        return loss


def gradients(rank, ranks, tied, recompute, layers=None):
    student = Student(tiny_model(tie_word_embeddings=tied))
    if layers is not None:
        recompute_activations(student.model, None if layers == "all" else layers)
    if ranks > 1:
        mesh = dist.init_device_mesh("cpu", (ranks,))
        for layer in student.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
        assert isinstance(student.model.get_output_embeddings().weight, DTensor)
    loss = student(random_rows(ROWS)[rank::ranks], recompute)
    (loss * ranks).backward()  # FSDP2 averages; the loss of the step is the sum
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def main(output, ranks):
    rank = int(os.environ.get("RANK", "0"))
    if ranks > 1:
        dist.init_process_group("gloo")
    result = {
        f"{'tied' if tied else 'untied'} {'recomputed' if recompute else 'at once'}": gradients(
            rank, ranks, tied, recompute
        )
        for tied in (True, False)
        for recompute in (False, True)
    } | {f"untied at once, layers: {layers}": gradients(rank, ranks, False, False, layers) for layers in LAYERS}
    if rank == 0:
        torch.save(result, output)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

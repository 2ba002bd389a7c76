"""Peak bytes of :mod:`pgpo_lightning.losses.fused`, by formula: a dry run of its many blocks would take minutes."""

import torch

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.losses.fused import rows_at_once
from pgpo_lightning.losses.fused_backward import BUFFERS
from pgpo_lightning.memory_planner.dry_run import Compute

WIDE = 4  # bytes: results of products, statistics and gradients are fp32


def loss_bytes(
    tokens: int,
    hidden: int,
    vocabulary: int,
    compute: Compute,
    device: str,
    teachers: int,
    trains_head: bool,
    top_k: bool,
    teacher_hidden: int | None = None,
) -> int:
    """Return the peak bytes of :func:`~pgpo_lightning.losses.fused.linear_distillation`, without its inputs.

    With N tokens, D, V, and chunks of c = min(N, 1024) tokens (on a CPU 256, or less with more than 82,000 of V):

    - gradients: 4 N D of hidden states, 4 V D of the head if it is trained;
    - a chunk's logits: 4 c V for the student and 4 c V for all teachers together (one more while a second one is added);
    - the gradient of the logits: on a GPU 2 c V in bf16 (4 c V in fp32) in addition to the logits. On a CPU it overwrites the
      student's logits in fp32, and in 16 bits it is rounded through 2 c V into another 4 c V;
    - operands: a GPU multiplies 16-bit matrices directly, so only heads of another type are copied, 2 V D each. A CPU uses
      copies in fp32, 4 V D each, if anything is in 16 bits;
    - a CPU uses six buffers of one block of rows; on a GPU torch.compile fuses the elementwise work. Top-k is not fused: four
      more tensors of c V there (an estimate, untested on GPU).

    Args:
        tokens: N, with a loss, of one micro-batch.
        hidden: D.
        vocabulary: V.
        compute: Types of both models and of autocast.
        device: cuda or cpu.
        teachers: Number of models that make up the teacher.
        trains_head: Whether the head gets a gradient.
        top_k: Whether the divergence is over the most probable tokens only, or has bounded entries.
        teacher_hidden: D of the teacher's own model, if it differs.
    """
    chunk, block = rows_at_once(device, vocabulary)
    chunk = min(tokens, chunk)
    narrow = 2 if compute.narrow in (torch.bfloat16, torch.float16) else 4
    native = is_gpu(device) and narrow == 2
    kept = WIDE * (tokens * hidden + trains_head * vocabulary * hidden + 6 * tokens)
    heads = [(compute.student, hidden)] * max(1, teachers) + [(compute.teacher, teacher_hidden or hidden)] * min(
        teachers, 1
    )
    operands = sum(_operand(dtype, compute.narrow, native) * vocabulary * width for dtype, width in heads)
    logits = WIDE * chunk * vocabulary * (1 + min(teachers, 2))
    if native:
        logits = max(logits, WIDE * chunk * vocabulary * (1 + (teachers > 0)) + narrow * chunk * vocabulary)
    elif narrow == 2:  # the rounded gradient and its fp32 copy exist together
        logits = max(logits, WIDE * chunk * vocabulary * (1 + (teachers > 0)) + (2 + WIDE) * chunk * vocabulary)
    rows = chunk * hidden * (narrow if native else 2 * WIDE)  # a chunk's hidden states and their gradient
    work = 0 if is_gpu(device) else BUFFERS * min(block, chunk) * vocabulary * WIDE
    work += 4 * WIDE * vocabulary * (chunk if is_gpu(device) else min(block, chunk)) * top_k
    return kept + operands + logits + rows + work


def _operand(dtype: torch.dtype, narrow: torch.dtype, native: bool) -> int:
    if native:
        return 0 if dtype == narrow else 2
    return 0 if dtype == narrow == torch.float32 else WIDE

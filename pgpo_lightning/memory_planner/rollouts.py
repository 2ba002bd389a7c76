"""Peak size of the cache of keys and values during rollouts."""

from pgpo_lightning.rollout.transformers_engine import look_every


def roomy_tokens(prompts: int, prompt: int, lengths: list[int], tensors: int, device: str, copied: bool) -> int:
    """Return the peak capacity of keys and values in tokens, times `tensors`.

    It follows the steps of :mod:`pgpo_lightning.models.shared_attention` with counts in place of tensors. Every prompt is held
    once, and if siblings do not share it, a copy for every response. Full room for the responses grows by a quarter, one tensor
    after the other, so that the old memory of one tensor exists beside the new memory of all. When a quarter of the responses has
    ended, the others are copied, one layer after the other.

    Args:
        prompts: Number of prompts.
        prompt: Tokens of the longest prompt.
        lengths: Tokens of every response that is decoded at the same time.
        tensors: Keys and values of all layers: twice the number of layers.
        device: On cuda, ended responses are removed only at every 16th step.
        copied: Whether every response has a copy of its prompt.
    """
    before = prompt if copied else 0
    active, room, highest = len(lengths), before, tensors * (prompts * prompt + len(lengths) * before)
    every = look_every(device)
    for step in range(max(lengths)):
        if step % every == every - 1:
            going = sum(length > step + 1 for length in lengths)
            if going == 0:
                break
            if going <= 0.75 * active:
                used = before + step
                highest = max(highest, tensors * (prompts * prompt + active * room) + 2 * going * used)
                active, room = going, used
        after = before + step + 1
        if step + 1 < max(lengths) and room < after:
            old, room = room * active, after + max(32, after // 4)
            highest = max(highest, tensors * (prompts * prompt + room * active) + old)
    return highest


def sampler_bytes(rows: int, vocabulary: int, logit_bytes: int, nucleus: bool) -> int:
    """Return the bytes of a step of the sampler: logits, their fp32 copy, probabilities and cumulative sums, ``(rows, V)`` each.

    Nucleus sampling also needs sorted values with int64 indices, their sums, masks and the result: at most eight more numbers.

    Args:
        rows: Responses.
        vocabulary: V.
        logit_bytes: Bytes of a logit of the model.
        nucleus: Whether `top_p` is below 1.
    """
    return rows * vocabulary * ((0 if logit_bytes == 4 else logit_bytes) + 12 + 32 * nucleus)

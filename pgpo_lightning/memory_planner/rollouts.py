"""Peak size of the cache of keys and values during rollouts."""

from pgpo_lightning.rollout.transformers_engine import look_every


def roomy_tokens(prompt: int, lengths: list[int], tensors: int, device: str) -> int:
    """Return the peak capacity of keys and values in tokens, times `tensors`.

    It follows the steps of :func:`pgpo_lightning.rollout.transformers_engine._sample` with counts in place of tensors. A full
    cache grows by a quarter, one tensor after the other, so that the old memory of one tensor exists beside the new memory of
    all. When a quarter of the responses has ended, the others are copied while the old memory still exists.

    Args:
        prompt: Tokens of the longest prompt.
        lengths: Tokens of every response that is decoded at the same time.
        tensors: Keys and values of all layers: twice the number of layers.
        device: On cuda, ended responses are removed only at every 16th step.
    """
    active, room, highest = len(lengths), prompt, (tensors + 1) * len(lengths) * prompt
    held, every = room * active, look_every(device)  # `held` of one tensor
    for step in range(max(lengths)):
        if step % every == every - 1:
            going = sum(length > step + 1 for length in lengths)
            if going == 0:
                break
            if going <= 0.75 * active:
                selected = going * (prompt + step)
                highest = max(highest, tensors * (held + selected))
                active, room = going, 0
        after = prompt + step + 1
        if step + 1 < max(lengths) and room < after:
            room = after + max(32, after // 4)
            old = held if held != room * active else 0
            held = room * active
            highest = max(highest, tensors * held + old)
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

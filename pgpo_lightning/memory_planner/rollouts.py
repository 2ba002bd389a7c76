"""Keys and values of the rollouts: how many tokens there is room for at the highest."""

_LOOK_EVERY = {"cpu": 1, "cuda": 16}


def roomy_tokens(prompt: int, lengths: list[int], tensors: int, device: str) -> int:
    """Return the tokens that keys and values have room for at their highest, times `tensors`.

    It goes through the steps of :func:`pgpo_lightning.rollout.transformers_engine._sample` with counts in place of tensors. Room
    grows by a quarter when it is full, one tensor after the other, so that one tensor's old room stands beside all of the new;
    when a quarter of the responses has ended, the others are copied while the old room is still there.

    Args:
        prompt: Tokens of the longest prompt.
        lengths: Tokens of every response that is decoded at the same time.
        tensors: Keys and values of all layers: twice the number of layers.
        device: On cuda it is looked at every 16 steps only which responses have ended.
    """
    active, room, highest = len(lengths), prompt, (tensors + 1) * len(lengths) * prompt
    held = room * active  # of one tensor
    for step in range(max(lengths)):
        if step % _LOOK_EVERY[device] == _LOOK_EVERY[device] - 1:
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


def sampler_bytes(rows: int, vocabulary: int, given: int, nucleus: bool) -> int:
    """Return the bytes of a step of the sampler: logits, their fp32 copy, probabilities and their sums, ``(rows, V)`` each.

    A nucleus sorts: sorted values with int64 places, their sums, masks, the result: eight numbers more for each (an upper bound).

    Args:
        rows: Responses.
        vocabulary: V.
        given: Bytes of a logit as the model gives it.
        nucleus: Whether `top_p` is below 1.
    """
    return rows * vocabulary * ((0 if given == 4 else given) + 12 + 32 * nucleus)

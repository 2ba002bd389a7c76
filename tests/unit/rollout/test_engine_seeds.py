"""Seeds, order and batches: what a rollout depends on, and what it does not."""

import contextlib
import random

import numpy as np
import pytest
import torch

from pgpo_lightning.core.seeding import derive_seed, seeded, uniform
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.helpers import TOKENIZER
from tests.support.sampling import (
    assert_log_probs,
    distribution,
    ending_model,
    generate,
    prompts_of,
    responses,
    watched,
)


@pytest.mark.parametrize("max_sequences", [None, 3, 4, 7, 100])
def test_samples_of_a_prompt_are_adjacent_whatever_the_chunk(max_sequences):
    model = ending_model()
    sizes = watched(model)
    prompts = prompts_of(5, 9, 1, 14, 7)
    rollouts = generate(model, prompts, n=3, max_sequences=max_sequences)
    assert max(sizes) == {None: 15, 3: 3, 4: 4, 7: 7, 100: 15}[max_sequences]
    assert [r.question.index for r in rollouts] == [i for i in range(5) for _ in range(3)]
    assert [r.prompt_ids for r in rollouts] == [prompts[i] for i in range(5) for _ in range(3)]
    assert_log_probs(model, rollouts)  # they really are answers to that prompt
    assert len({tuple(ids) for ids in responses(rollouts)}) > 10


def test_fewer_sequences_at_once_than_samples_of_a_prompt():
    model = ending_model()
    sizes = watched(model)
    rollouts = generate(model, prompts_of(5, 9), n=5, max_sequences=2)
    assert [r.question.index for r in rollouts] == [0] * 5 + [1] * 5
    assert_log_probs(model, rollouts)
    assert max(sizes) <= 2


def test_at_least_one_sequence():
    with pytest.raises(ValueError, match="`max_sequences` to be at least 1, but got 0"):
        TransformersEngine(0)


def test_rollouts_are_a_function_of_the_seed():
    model, prompts = ending_model(), prompts_of(5, 9)
    first = generate(model, prompts, n=2, seed=1)
    torch.rand(3)
    again = generate(model, prompts, n=2, seed=1)
    assert responses(again) == responses(first)
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(again, first, strict=True))
    assert not any(
        a == b for a, b in zip(responses(generate(model, prompts, n=2, seed=2)), responses(first), strict=True)
    )


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def start():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)


def test_seeded_puts_all_global_states_back():
    start()
    expected = draws()
    start()
    with seeded("a", 1):
        inside = draws()
    assert draws() == expected
    assert not {*inside} & {*expected}


def test_seeded_puts_all_global_states_back_after_an_exception():
    start()
    expected = draws()
    start()
    with contextlib.suppress(KeyError), seeded("a", 1):
        draws()
        raise KeyError
    assert draws() == expected


def test_seeded_fixes_all_global_states_and_has_a_generator_apart():
    with seeded("a", 1) as rng:
        first = draws()
        own = rng.random()
    random.seed(7)
    with seeded("a", 1) as rng:
        assert rng.random() == own  # before any other draw, not after
        assert draws() == first
    with seeded("a", 1, 0) as rng:
        assert rng.random() != own


def test_seeds_are_the_same_on_every_machine_and_differ_between_names():
    assert derive_seed("rollout", 1) == 5078802866501687356
    names = (
        [("rollout", i) for i in range(50)] + [("rollout", str(i)) for i in range(50)] + [("a", "b"), ("ab",), ("a,b",)]
    )
    assert len({derive_seed(*name) for name in names}) == len(names)
    assert all(0 <= derive_seed(*name) < 2**63 for name in names)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_with_seeds_a_response_depends_on_its_question_and_number_alone(top_p):
    prompts, seeds = prompts_of(9, 4, 6, 4, 7), [derive_seed("question", i) for i in range(5)]
    model = ending_model()
    whole = responses(generate(model, prompts, n=4, seeds=seeds, top_p=top_p))
    assert len({tuple(response) for response in whole}) > 15
    order = [3, 0, 4, 1, 2]
    turned = responses(generate(model, [prompts[i] for i in order], n=4, seeds=[seeds[i] for i in order], top_p=top_p))
    assert turned == [response for i in order for response in whole[4 * i : 4 * i + 4]]
    for limit in (1, 2, 3, 8):  # also several goes for the responses to one prompt
        assert responses(generate(model, prompts, n=4, seeds=seeds, max_sequences=limit, top_p=top_p)) == whole
    fewer = responses(generate(model, prompts, n=3, seed=1, seeds=seeds, top_p=top_p))
    assert fewer == [response for i in range(5) for response in whole[4 * i : 4 * i + 3]]
    others = responses(generate(model, prompts, n=4, seeds=[seed + 1 for seed in seeds], top_p=top_p))
    assert others != whole


def test_with_seeds_samples_follow_the_distribution():
    model, (prompt,) = ending_model(), prompts_of(5)
    expected = distribution(model, prompt)[0].exp()
    drawn = generate(model, [prompt], n=20_000, seeds=[derive_seed(7)], max_tokens=1)
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in drawn]), minlength=len(TOKENIZER))
    likely = expected > 0.001
    deviation = (counts[likely] - 20_000 * expected[likely]) / (20_000 * expected[likely]).sqrt()
    assert deviation.abs().max() < 4.5


def test_waiting_responses_take_the_places_of_ended_ones():
    model = ending_model()
    prompts, seeds = prompts_of(*range(3, 19)), [derive_seed("question", i) for i in range(16)]
    sizes = watched(model)
    rollouts = generate(model, prompts, n=3, max_sequences=8, max_tokens=40, seeds=seeds)
    tokens = sum(len(response) - 1 for response in responses(rollouts))  # the first comes with the prompt
    decoded = [size for size in sizes if size > 0]
    assert max(decoded) == 8
    assert tokens < sum(decoded) < 1.3 * tokens
    assert len(decoded) < 200  # eight batches, one after the other, take more than 300 passes
    assert_log_probs(model, rollouts)


def test_without_seeds_too_the_number_of_places_changes_nothing():
    model, prompts = ending_model(), prompts_of(5, 9, 2)
    few, more = (responses(generate(model, prompts, n=4, max_sequences=limit)) for limit in (2, 7))
    assert few == more


def test_numbers_of_unequal_positions_are_those_of_each():
    seeds, steps = torch.tensor([derive_seed("a", i) for i in range(5)]), torch.tensor([0, 3, 7, 8191, 2])
    expected = torch.stack([uniform(seed, int(step)) for seed, step in zip(seeds, steps, strict=True)])
    assert torch.equal(uniform(seeds, steps), expected)

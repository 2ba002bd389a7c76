"""A reprompt of any texts fits its limit, and is cut nowhere but at the end of demonstration and feedback."""

from hypothesis import given
from hypothesis import strategies as st

from pgpo_lightning.rollout.prompts import PromptEncoder
from tests.support.helpers import TOKENIZER
from tests.support.reprompts import END, FEEDBACK, SOLUTION, attach, row

# Characters that the tokenizer of the toy gives back.
TEXT = st.text("0123456789*+=", min_size=8, max_size=60)
ENCODER = PromptEncoder(TOKENIZER, False)


def prompt_of(text):
    return ENCODER.messages([{"role": "user", "content": text}])


@given(
    prompt=TEXT,
    demonstration=st.none() | TEXT,
    feedback=st.none() | TEXT,
    excess=st.integers(-5, 60),
)
def test_a_reprompt_fits_and_only_context_is_cut(prompt, demonstration, feedback, excess):
    solution = "" if demonstration is None else SOLUTION + demonstration
    remarks = "" if feedback is None else FEEDBACK + feedback
    whole = prompt + solution + remarks + END
    limit = max(1, len(prompt_of(whole)) - excess)
    rows = [row("wrong", 0.0, feedback, prompt=prompt)]
    rows += [] if demonstration is None else [row(demonstration, 1.0, prompt=prompt)]
    scalars = attach(rows, max_reprompt_len=limit, remove_thinking_from_demonstration=False)
    (ids, text), trimmed = (
        (rows[0].reprompt_ids, rows[0].reprompt),
        scalars["self_distillation/reprompt_trimmed_fraction"],
    )
    if ids is None:
        if demonstration is not None or feedback is not None:  # not even a token of the context would have fitted
            head = SOLUTION if feedback is None else FEEDBACK
            assert limit - len(prompt_of(prompt + head + END)) <= 1
        return
    assert demonstration is not None or feedback is not None
    assert len(ids) <= limit
    assert ids == prompt_of(text)
    assert text.startswith(prompt)
    assert text.endswith(END)
    if len(prompt_of(whole)) <= limit:
        assert (text, trimmed) == (whole, 0)
        return
    assert trimmed > 0
    shown = text.removeprefix(prompt).removesuffix(END)
    if feedback is not None and demonstration is not None and shown.startswith(SOLUTION):
        # The feedback is not touched as long as there is a demonstration to cut.
        assert shown.endswith(remarks)
        cut = shown.removeprefix(SOLUTION).removesuffix(remarks)
        assert demonstration.startswith(cut)
        assert len(cut) < len(demonstration)
    else:
        head, part = (SOLUTION, demonstration) if feedback is None else (FEEDBACK, feedback)
        assert shown.startswith(head)
        assert part.startswith(shown.removeprefix(head))
        assert feedback is None or demonstration is not None or len(shown) < len(remarks)


@given(demonstration=TEXT, feedback=TEXT, limit=st.integers(1, 250))
def test_siblings_with_the_same_context_read_the_same(demonstration, feedback, limit):
    rows = [row(demonstration, 1.0), *(row("wrong", 0.0, feedback) for _ in range(3))]
    attach(rows, max_reprompt_len=limit)
    first, *others = (wrong.reprompt_ids for wrong in rows[1:])
    assert all(other == first for other in others)

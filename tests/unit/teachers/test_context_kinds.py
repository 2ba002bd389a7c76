"""Kinds of teacher contexts: what each shows, their turns, and that nothing but the teacher's prompt changes."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgpo_lightning.core.types import Rollout, Sample, Verdict
from pgpo_lightning.data.toy import questions as toy
from pgpo_lightning.data.toy import solution
from pgpo_lightning.modules import GRPO, RLSD, SDPO, SRPO
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.teachers.configs import RepromptConfig
from pgpo_lightning.teachers.context_kinds import KINDS, ContextMixture, read_by_teacher
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, prepare, tiny_model, tiny_sdpo
from tests.support.parrot import question

RIGHT, SLIP, SECOND = solution(3, 4, 5), solution(3, 4, 5, error=1), solution(2, 6, 8)


def row(asked, text, reward, feedback=None):
    return Sample(Rollout(asked, [1], [2], torch.zeros(1), text, True), Verdict(reward, feedback))


def rows():
    """Two questions with a success and a failure each."""
    first, second = question(0), question(1, 2, 6, 8)
    return [row(first, RIGHT, 1.0), row(first, SLIP, 0.0), row(second, SECOND, 1.0), row(second, "?", 0.0)]


def texts(kind, samples=None):
    return [made.rollout.text for made in KINDS[kind](samples or rows(), 0.5, BoxedAnswer())]


def test_what_each_kind_shows():
    assert texts("answer") == ["\\boxed{17}", SLIP, "\\boxed{20}", "?"]
    assert texts("first-step") == ["3*4=12;", SLIP, "2*6=12;", "?"]
    assert texts("contradiction") == [f"{RIGHT}\n\n{SLIP}", SLIP, f"{SECOND}\n\n?", "?"]
    assert texts("other") == [SECOND, "?", RIGHT, SLIP]
    assert texts("wrong") == [RIGHT, SLIP, SECOND, "?"]
    assert [made.verdict.reward >= 0.5 for made in KINDS["wrong"](rows(), 0.5, BoxedAnswer())] == [False, True] * 2


def test_another_questions_responses_belong_to_this_question():
    made = KINDS["other"](rows(), 0.5, BoxedAnswer())
    assert [sample.rollout.question.index for sample in made] == [0, 0, 1, 1]
    assert [sample.verdict.reward for sample in made] == [1.0, 0.0, 1.0, 0.0]
    alone = KINDS["other"](rows()[:2], 0.5, BoxedAnswer())
    assert all(sample.verdict.reward < 0.5 for sample in alone), "there is no other question"


def test_other_numbers_have_the_form_and_not_the_content():
    changed, failure, *_ = texts("numbers")
    assert changed != RIGHT
    assert [c if c.isdigit() else "" for c in changed].count("") == [c if c.isdigit() else "" for c in RIGHT].count("")
    assert len(changed) == len(RIGHT)
    assert failure == SLIP
    assert texts("numbers") == texts("numbers"), "the same in every process"


def test_a_success_without_a_second_step_shows_nothing():
    assert texts("first-step", [row(question(0), "\\boxed{17}", 1.0)]) == [""]
    assert texts("first-step", [row(question(0), "It is 3.5 times 2. So 7.", 1.0)]) == ["It is 3.5 times 2."]


def test_feedback_is_that_of_the_next_response():
    asked = question(0)
    asked.privileged_context = "of the question"
    samples = [row(asked, str(i), 0.0, told) for i, told in enumerate(["a", None, "b", "c"])]
    made = KINDS["other-feedback"](samples, 0.5, BoxedAnswer())
    assert [sample.verdict.feedback for sample in made] == ["b", None, "c", "a"]
    assert all(sample.rollout.question.privileged_context is None for sample in made)
    assert [sample.verdict.feedback for sample in samples] == ["a", None, "b", "c"]
    alone = KINDS["other-feedback"](samples[:2], 0.5, BoxedAnswer())
    assert [sample.verdict.feedback for sample in alone] == [None, None]


def test_without_demonstrations_another_question_gives_its_feedback():
    first, second = question(0), question(1, 2, 6, 8)
    first.privileged_context = "of the first"
    samples = [row(first, "1", 0.0, "on 1"), row(first, "2", 1.0), row(second, "3", 1.0), row(second, "4", 0.0, "on 4")]
    module = tiny_sdpo(**{"reprompt.contexts": ContextMixture(("other",))}, demonstration_source="none")
    read = module.objective.teaching.read("other", samples)
    told = [module.objective.teaching.builder._feedback(sample) for sample in read]
    assert told == [None, "on 4", "on 1", "of the first"]
    assert [sample.rollout.question.index for sample in read] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"`reprompt.demonstration_source` siblings with .* other"):
        tiny_sdpo(
            **{"reprompt.contexts": ContextMixture(("other",)), "reprompt_without_context": True},
            demonstration_source="none",
            include_environment_feedback=False,
        )


def test_an_answer_that_a_verifier_cannot_bear_cut_is_left_whole():
    def code(asked, text):
        if not text.startswith("def"):
            raise SyntaxError(text)
        return 1.0

    (made,) = KINDS["answer"]([row(question(0), "def f(x): return x", 1.0)], 0.5, code)
    assert made.rollout.text == "def f(x): return x"


def test_thinking_is_removed_before_a_kind_looks_at_the_text():
    thought = [row(question(0), f"<think>First. Then.</think>{RIGHT}", 1.0)]
    shown = read_by_teacher(
        "first-step", thought, 0.5, BoxedAnswer(), lambda rollout: rollout.text.rpartition("</think>")[2]
    )
    assert shown[0].rollout.text == "3*4=12;"
    assert thought[0].rollout.text.startswith("<think>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_leaves_its_samples_as_they_were(kind):
    before = rows()
    kept = [(sample.rollout, sample.rollout.text, sample.verdict, sample.verdict.reward) for sample in before]
    made = KINDS[kind](before, 0.5, BoxedAnswer())
    assert [(s.rollout, s.rollout.text, s.verdict, s.verdict.reward) for s in before] == kept
    assert len(made) == len(before)
    assert not set(map(id, made)) & set(map(id, before))


@given(
    kinds=st.lists(st.sampled_from(["sibling", *KINDS]), min_size=1, max_size=4, unique=True),
    block=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_every_kind_gets_one_block_of_every_round(kinds, block, seed):
    mixture = ContextMixture(tuple(kinds), block)
    length = block * len(kinds)
    for turn in range(3):
        drawn = [mixture.kind(seed, turn * length + step) for step in range(length)]
        assert Counter(drawn) == dict.fromkeys(kinds, block)
        assert all(len(set(drawn[i : i + block])) == 1 for i in range(0, length, block))


def test_the_order_of_kinds_depends_on_the_seed():
    mixture = ContextMixture(("sibling", "answer"))
    orders = {tuple(mixture.kind(seed, step) for step in range(20)) for seed in range(20)}
    assert len(orders) == 20
    first = [mixture.kind(seed, 0) for seed in range(400)]
    assert 160 < first.count("sibling") < 240


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match=r"each of `reprompt.contexts.kinds` once, but got wrong, wrong"):
        ContextMixture(("wrong", "wrong"))
    with pytest.raises(ValueError, match=r"`reprompt.contexts.kinds`"):
        ContextMixture(())
    with pytest.raises(ValueError, match=r"`reprompt.contexts.block`"):
        ContextMixture(("wrong",), block=0)
    with pytest.raises(ValueError, match=r"`reprompt.demonstration_source` siblings with .* sibling, wrong"):
        tiny_sdpo(**{"reprompt.contexts": ContextMixture(("sibling", "wrong"))}, demonstration_source="none")
    with pytest.raises(ValueError, match=r"`reprompt.include_environment_feedback` true with .* other-feedback"):
        tiny_sdpo(**{"reprompt.contexts": ContextMixture(("other-feedback",))}, include_environment_feedback=False)


def sampled(module):
    """Samples whose texts the tiny tokenizer knows, half of them right, of two questions."""
    asked = [question(0), question(1, 2, 6, 8)]
    encode = module.encoder.tokens
    made = []
    for each in asked:
        for i in range(4):
            text = f"step {i}; end {i}"
            rollout = Rollout(each, module.encoder.messages(each.messages()), encode(text), torch.zeros(1), text, True)
            made.append(Sample(rollout, Verdict(float(i % 2))))
    return made


def reprompts(kinds, module_class=SDPO, steps=0, **settings):
    limits = {**LIMITS, "max_reprompt_len": 400, "max_prompt_length": 100}
    limits["reprompt.contexts"] = None if kinds is None else ContextMixture(kinds)
    module = build(module_class, tiny_model(), half_right, tokenizer=TOKENIZER, seed=3, **(limits | settings))
    module.run_seed.decide()
    module.configure_model()
    module.steps = steps
    samples = sampled(module)
    scalars = prepare(module, samples, random.Random(0))
    return [sample.reprompt for sample in samples], scalars, samples


@pytest.mark.parametrize("module_class", [SDPO, SRPO, RLSD])
def test_a_module_shows_the_kind_of_its_step(module_class):
    plain, scalars, _ = reprompts(None, module_class)
    assert not [name for name in scalars if name.startswith("context/")]
    mixed = {}
    for step in range(2):
        shown, scalars, samples = reprompts(("sibling", "first-step"), module_class, step)
        (kind,) = [name for name in ("sibling", "first-step") if scalars[f"context/{name}"]]
        assert scalars["context/sibling"] + scalars["context/first-step"] == 1.0
        mixed[kind] = shown
        assert [sample.rollout.text for sample in samples] == [f"step {i}; end {i}" for i in range(4)] * 2
        assert [sample.verdict.reward for sample in samples] == [0.0, 1.0] * 4
    assert set(mixed) == {"sibling", "first-step"}
    assert mixed["sibling"] == plain
    assert [text is None for text in mixed["first-step"]] == [text is None for text in plain]
    assert all("end" not in text for text in mixed["first-step"] if text is not None)


@pytest.mark.parametrize("module_class", [SDPO, SRPO, RLSD])
def test_the_template_alone_is_read_for_the_responses_that_would_have_a_context(module_class):
    plain, _, samples = reprompts(None, module_class)
    bare, scalars, _ = reprompts(("template",), module_class)
    assert scalars["context/template"] == 1.0
    assert [text is None for text in bare] == [text is None for text in plain]
    asked = [sample.rollout.question.prompt + "\n\nCorrectly solve the original question." for sample in samples]
    assert [text for text in bare if text is not None] == [
        text for text, other in zip(asked, plain, strict=True) if other is not None
    ]


def test_a_solution_in_the_data_is_looked_for_before_anything_is_sampled():
    module = tiny_sdpo(demonstration_source="column", num_generations=1)
    module.objective.check_questions([question(0)] * 2 + toy("train")[:1])
    with pytest.raises(
        ValueError, match=r"`reprompt.demonstration_column` .* in `worked`. .*: domain, a, b, c, solution"
    ):
        tiny_sdpo(demonstration_source="column", demonstration_column="worked").objective.check_questions(
            toy("train")[:2]
        )
    with pytest.raises(ValueError, match=r"`reprompt.demonstration_source` siblings with .* other"):
        tiny_sdpo(**{"reprompt.contexts": ContextMixture(("other",))}, demonstration_source="column")
    tiny_sdpo(**{"reprompt.contexts": ContextMixture(("template",))}, demonstration_source="column")


def test_a_module_without_a_teacher_has_no_contexts():
    assert "reprompt" not in GRPO.__init__.__annotations__
    assert RepromptConfig().contexts is None

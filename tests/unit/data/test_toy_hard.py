"""The hard questions of the toy task."""

from pgpo_lightning.data.toy import ToyArithmetic


def test_hard_questions_are_there_and_few_are_answered():
    from benchmarks.toy_base import accuracy, solution_probabilities
    from pgpo_lightning.data.toy import BASE_MODEL, held_out
    from pgpo_lightning.data.toy import questions as toy
    from pgpo_lightning.data.toy_hard import HARD, hard

    numbers = [(a, b, int(c)) for (a, b), summands in HARD.items() for c in summands.split()]
    assert len(set(numbers)) == len(numbers) == 94
    assert (len(toy("train", hard=True)), len(toy("test", hard=True))) == (316, 60)
    for split in ("train", "test"):
        for question in toy(split, hard=True):
            a, b, c = (question.columns[name] for name in "abc")
            assert hard(a, b, c)
            assert held_out(a, b, c) == (split == "test")
    sample = toy("test", hard=True)
    assert accuracy(BASE_MODEL, sample, samples=8, temperature=1.0, top_p=1.0).float().mean() < 0.05
    assert solution_probabilities(BASE_MODEL, sample).max() < 0.05
    assert solution_probabilities(BASE_MODEL, toy("test")[:60]).mean() > 0.3
    data = ToyArithmetic(hard=True, domains=["physics"])
    data.setup("fit")
    assert len(data.questions["train"]) == 79

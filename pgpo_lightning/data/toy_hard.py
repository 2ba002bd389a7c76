"""The hard questions of the embedded task: numbers with which the shipped base model hardly ever answers correctly.

Measured, by ``python -m benchmarks.toy_base --hard`` (4 CPU minutes), which prints the table again. Numbers (a, b, c)
are hard if at temperature 1 both are below 5 %: the probability of the worked solution, in every wording; and the share of
right answers among 256 samples, 64 for each wording, which also finds the right answers that two errors in a row lead to. The
rates of slips alone do not tell: no product has one above 80 %, but the model makes some of them nearly always.
"""

LIMIT = 0.05
"""Hard is what succeeds less often than this."""

HARD: dict[tuple[int, int], str] = {
    (2, 2): "11 12",
    (2, 3): "2",
    (2, 4): "1",
    (3, 2): "2",
    (3, 4): "16 17 27 37 38 47",
    (3, 11): "36 46",
    (4, 2): "1",
    (4, 4): "1 3 4 5 6 7 10 11 13 14 15 16 17 20 21 22 23 24 25 27 30 31 33 34 35 37 39 40 41 42 43 44 45 46 47 49 50",
    (5, 9): "44",
    (7, 7): "40",
    (7, 9): "43 48 49",
    (7, 12): "5",
    (8, 4): "7 18 19 28 29 38 48 49",
    (8, 8): "46 48",
    (8, 9): "39",
    (8, 12): "4",
    (9, 8): "39",
    (9, 11): "3 4",
    (9, 12): "1",
    (10, 11): "50",
    (10, 12): "50",
    (11, 9): "3 4 41 45 46",
    (11, 10): "50",
    (11, 11): "4 19 29",
    (11, 12): "8 18 19 39",
    (12, 5): "39 50",
    (12, 6): "6",
    (12, 8): "4",
    (12, 9): "1",
    (12, 10): "50",
}
"""Factors to the summands with which they are hard: 94 of 6050 triples, 15 of them held out."""


def hard(a: int, b: int, c: int) -> bool:
    """Return whether the base model hardly ever answers a question with these numbers correctly."""
    return str(c) in HARD.get((a, b), "").split()

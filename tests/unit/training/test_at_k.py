import itertools
import math
import os
import random
import subprocess
import sys

import pytest
import torch

from pgpo_lightning.training.at_k import AvgAtK, CutOffFraction, MajorityAtK, MeanLength, PassAtK, PerQuestionMean
from tests.support import ROOT


def updated(metric, question, value, *answers):
    metric.update(torch.tensor(question), torch.tensor(value), *answers)
    return metric


@pytest.mark.parametrize("metric", [PerQuestionMean, AvgAtK, MeanLength, CutOffFraction])
def test_mean_over_questions_of_means_over_samples(metric):
    # Question 9 has three samples and question 2 one: (1/3 + 5 + 2) / 3, while the mean over samples would be 2.
    metric = metric()
    metric.update(torch.tensor([9, 2, 9]), torch.tensor([1.0, 5.0, 0.0]))
    metric.update(torch.tensor([9, 40, 40]), torch.tensor([0, 1, 3]))
    assert metric.compute().item() == pytest.approx((1 / 3 + 5 + 2) / 3, abs=1e-6)
    assert metric.compute().dtype == torch.float32


def test_repeated_questions_count_once():
    once = updated(AvgAtK(), [0, 0, 1, 1], [1.0, 0.0, 0.0, 0.0])
    twice = updated(AvgAtK(), [0, 0, 1, 1, 0, 0], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert once.compute() == twice.compute() == 0.25


def test_reset():
    metric = updated(AvgAtK(), [0], [1.0])
    metric.compute()
    metric.reset()
    assert updated(metric, [0], [0.0]).compute() == 0.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric", [AvgAtK(), PassAtK(2), MajorityAtK()])
def test_no_data_is_nan(metric):
    assert math.isnan(metric.compute())


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"same length, but got shapes \(2,\) and \(3,\)"):
        updated(AvgAtK(), [0, 1], [0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"but got shapes \(1, 2\) and \(1, 2\)"):
        updated(AvgAtK(), [[0, 1]], [[0.0, 1.0]])
    with pytest.raises(ValueError, match=r"one answer per sample \(2\), but got 1"):
        updated(MajorityAtK(), [0, 1], [0.0, 1.0], ["a"])


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n):
    for k, c in itertools.product(range(1, n + 1), range(n + 1)):
        rewards = [1.0] * c + [0.0] * (n - c)
        subsets = list(itertools.combinations(rewards, k))
        truth = sum(max(subset) for subset in subsets) / len(subsets)
        assert updated(PassAtK(k), [5] * n, rewards).compute().item() == pytest.approx(truth, abs=1e-7)


def test_pass_at_k_of_questions_with_different_numbers_of_samples():
    question, value = [3, 1, 3, 1, 1, 3, 1], [1.0, 0.0, 0.0, 0.7, 0.0, 0.0, 0.7]
    # Question 3: 1 of 3 gives 2/3. Question 1: 2 of 4 gives 1 - 1/6.
    assert updated(PassAtK(2), question, value).compute().item() == pytest.approx((2 / 3 + 5 / 6) / 2, abs=1e-7)
    assert updated(PassAtK(2, threshold=0.7), question, value).compute().item() == pytest.approx(0.75, abs=1e-7)
    assert updated(PassAtK(2, threshold=0.8), question, value).compute().item() == pytest.approx(1 / 3, abs=1e-7)


def test_pass_at_k_is_stable():
    # The binomials have more than 600 digits; the truth is a product of 500 ratios.
    n, c, k = 4000, 3, 500
    truth = 1 - math.prod((n - c - i) / (n - i) for i in range(k))
    assert updated(PassAtK(k), [0] * n, [1.0] * c + [0.0] * (n - c)).compute().item() == pytest.approx(truth, rel=1e-6)


def test_pass_at_1_is_avg():
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(7, (200,), generator=generator)
    value = torch.randint(2, (200,), generator=generator).float()
    one, avg = PassAtK(1), AvgAtK()
    one.update(question, value)
    avg.update(question, value)
    torch.testing.assert_close(one.compute(), avg.compute())


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="at least k=3 samples of question 8, but got 2"):
        updated(PassAtK(3), [1, 1, 1, 8, 8], [1.0] * 5).compute()
    with pytest.raises(ValueError, match="`k` to be at least 1, but got 0"):
        PassAtK(0)


@pytest.mark.parametrize(
    ("answers", "rewards", "truth"),
    [
        (["7", "8", "8"], [1.0, 0.0, 0.0], 0.0),
        (["7", "7", "8"], [1.0, 1.0, 0.0], 1.0),
        (["7", "8", "8", "7"], [0.3, 0.8, 0.8, 0.3], 0.3),  # a tie: the first one given
        (["8", "7", "7", "8"], [0.8, 0.3, 0.3, 0.8], 0.8),
        ([None, None, "8"], [0.0, 0.0, 1.0], 1.0),  # no answer is no vote
        ([None, None], [1.0, 1.0], 0.0),
        (["", None, None], [0.6, 0.0, 0.0], 0.6),  # an empty answer is one
    ],
)
def test_majority(answers, rewards, truth):
    assert updated(MajorityAtK(), [4] * len(answers), rewards, answers).compute().item() == pytest.approx(truth)


def test_majority_against_counting():
    rng = random.Random(0)
    rows = [(rng.randrange(5), rng.choice(["a", "b", "c", None])) for _ in range(60)]
    worth = {(question, answer): rng.random() for question, answer in rows}
    metric = MajorityAtK()
    for start in range(0, 60, 7):
        part = rows[start : start + 7]
        updated(metric, [q for q, _ in part], [worth[row] for row in part], [a for _, a in part])
    truth = 0.0
    for question in range(5):
        votes = [answer for q, answer in rows if q == question and answer is not None]
        truth += worth[question, max(votes, key=lambda answer: (votes.count(answer), -votes.index(answer)))] / 5
    assert metric.compute().item() == pytest.approx(truth, abs=1e-6)


SCRIPT = """
import sys
import torch
from torch import distributed as dist, multiprocessing as mp
from pgpo_lightning.training.at_k import AvgAtK, MajorityAtK, PassAtK

VALUES = {0: [1.0, 0.0], 1: [1.0, 1.0], 2: [0.0, 0.0], 3: [0.0, 1.0], 4: [0.25, 0.5]}

def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    avg, most, two = AvgAtK(), MajorityAtK(), PassAtK(2)
    # What DistributedSampler makes of 5 questions: it repeats question 0 on rank 1.
    for index in ([0, 2, 4], [1, 3, 0])[rank]:
        question, value = torch.tensor([index] * 2), torch.tensor(VALUES[index])
        avg.update(question, value)
        two.update(question, value)
        most.update(question, value, [f"answer {v}" for v in VALUES[index]])
    idle, silent = AvgAtK(), MajorityAtK()
    if rank == 1:
        idle.update(torch.tensor([2**40, 7, 7]), torch.tensor([1.0, 0.0, 0.5]))
        silent.update(torch.tensor([2**40, 7, 7]), torch.tensor([1.0, 0.0, 0.5]), ["a", None, "b"])
    results = [m.compute().item() for m in (avg, most, two, idle, silent)]
    again = [m.compute().item() for m in (avg, most, two, idle, silent)]
    assert results == again
    avg.update(torch.tensor([10]), torch.tensor([1.0]))  # the local states are back after compute
    print(*results, avg.compute().item(), file=open(f"{file}.{rank}", "w"))
    dist.destroy_process_group()

if __name__ == "__main__":
    # Forked, since nothing but the imports has happened: spawned ranks would spend ten seconds on importing again.
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_two_ranks_give_the_truth(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ranks = [[float(x) for x in (tmp_path / f"store.{rank}").read_text().split()] for rank in range(2)]
    means = [0.5, 1.0, 0.0, 0.5, 0.375]
    alone = updated(AvgAtK(), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [1.0, 0, 1, 1, 0, 0, 0, 1, 0.25, 0.5])
    truth = [
        torch.tensor(sum(means) / 5).item(),
        torch.tensor((1.0 + 1.0 + 0.0 + 0.0 + 0.25) / 5).item(),
        # Pass@2 at threshold 0.5; the four samples of question 0 hold two successes.
        torch.tensor((5 / 6 + 1 + 0 + 1 + 1) / 5).item(),
        torch.tensor((1.0 + 0.25) / 2).item(),
        torch.tensor((1.0 + 0.5) / 2).item(),
        torch.tensor((sum(means) + 1) / 6).item(),
    ]
    assert alone.compute().item() == truth[0]
    assert ranks == [truth, truth]

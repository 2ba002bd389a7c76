"""Metrics of two ranks are those of all questions together."""

import os
import subprocess
import sys

import torch

from pgpo_lightning.training.at_k import AvgAtK
from tests.support import ROOT
from tests.support.metrics import updated

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

"""Two processes are one: equal weights, and one information estimate that is the true mean over all rows."""

import pytest
import torch

from tests.support.external import LARGER, saved
from tests.support.helpers import tiny_model
from tests.support.processes import finish, start_ranks

START = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
WORKER = "tests.support.ranks_worker"


def run(folder, ranks, split, strategy="one", teacher="ema", precision="32-true"):
    output, log = folder / f"out{ranks}", folder / f"log{ranks}"
    finish(*start_ranks([WORKER, output, ranks, split, strategy, teacher, precision], log, ranks), log=log)
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("split", "strategy", "teacher"),
    [
        ("uneven", "ddp", "ema"),
        ("one-sided", "ddp", "ema"),
        ("uneven", "fsdp2", "trust-region"),
        ("one-sided", "fsdp2-once", "ema"),
        ("updates", "ddp", "ema"),
        ("routed", "ddp", "restart"),
        ("routed", "fsdp2", "gated"),
        ("contrasted", "ddp", "live"),
        ("contrasted", "fsdp2", "trust-region"),
        ("difficulty", "fsdp2", "ema"),
        ("uneven", "ddp", "external"),
        ("uneven", "fsdp2", "external"),
        ("guided", "ddp", "external"),
        ("guided", "fsdp2", "external"),
        ("distilled", "ddp", "external"),
        ("distilled", "fsdp2", "external"),
        ("uneven", "fsdp2", "lora-ema"),
        ("one-sided", "fsdp2-once", "lora-trust-region"),
    ],
)
def test_two_processes_equal_one(tmp_path, split, strategy, teacher):
    if teacher == "external":
        saved(tmp_path / "teacher", **LARGER)
    (one,), two = run(tmp_path, 1, split, teacher=teacher), run(tmp_path, 2, split, strategy, teacher)
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    assert torch.equal(two[0]["teacher"], two[1]["teacher"])
    assert two[0]["seen"] == two[1]["seen"]
    torch.testing.assert_close(torch.tensor(two[0]["seen"]), torch.tensor(one["seen"]), rtol=1e-3, atol=3e-6)
    assert len({rho for *_, rho in one["seen"]}) == len(one["seen"]), (
        "the multiplier must move for the comparison to mean anything"
    )
    # Adam divides by the gradient's size, so a rounding difference of a tiny gradient can show: compare in the mean too.
    torch.testing.assert_close(two[0]["weights"], one["weights"], rtol=0, atol=3e-4)
    assert (two[0]["weights"] - one["weights"]).abs().mean() < 1e-6
    torch.testing.assert_close(torch.tensor(two[0]["norms"]), torch.tensor(one["norms"]), rtol=1e-3, atol=1e-6)
    if teacher.startswith("lora-"):
        apart = torch.cat([(two[0]["adapter"][name] - matrix).flatten() for name, matrix in one["adapter"].items()])
        assert apart.abs().mean() < 1e-5
        torch.testing.assert_close(two[0]["teacher"], one["teacher"], rtol=0, atol=3e-4)


@pytest.mark.parametrize(("precision", "kept"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_two_sharded_processes_equal_one_as_far_as_bf16_tells(tmp_path, precision, kept):
    (one,), two = (run(tmp_path, n, "uneven", s, precision=precision) for n, s in ((1, "one"), (2, "fsdp2")))
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    assert {r["weights"].dtype for r in (one, *two)} == {kept}
    assert {r["teacher"].dtype for r in (one, *two)} == {torch.float32}
    (loss, signal, _, _), (ours, our_signal, _, _) = (torch.tensor(r["seen"]).T for r in (one, two[0]))
    torch.testing.assert_close(ours, loss, rtol=0.01, atol=0)
    torch.testing.assert_close(our_signal, signal, rtol=0, atol=2e-3)
    moved, ours_moved = (r["weights"].float() - START.to(kept) for r in (one, two[0]))
    assert torch.cosine_similarity(ours_moved, moved, dim=0) > 0.98
    assert moved.norm() > 0.1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_teacher_in_bf16_draws_the_same_numbers_on_two_ranks_and_one(tmp_path, strategy):
    (one,), two = (run(tmp_path, n, "uneven", s, "narrow") for n, s in ((1, "one"), (2, strategy)))
    for name in ("weights", "teacher"):
        assert torch.equal(two[0][name], two[1][name]), name
    ours, theirs = two[0]["teacher"], one["teacher"]
    assert {t.dtype for t in (ours, theirs)} == {torch.bfloat16}
    # Products in bf16 differ between layouts, so students do a little; with other random numbers half of the weights would.
    assert (ours == theirs).double().mean() > 0.95
    assert (theirs != START.bfloat16()).double().mean() > 0.8
    (loss, signal, _, _), (our_loss, our_signal, _, _) = (torch.tensor(r["seen"]).T for r in (one, two[0]))
    torch.testing.assert_close(our_loss, loss, rtol=0.01, atol=0)
    torch.testing.assert_close(our_signal, signal, rtol=0, atol=2e-3)

"""Divergences against values that SDPO's code gives and against autograd in float64."""

import pytest
import torch

from pgpo_lightning.losses.divergence import (
    clipped_divergence,
    divergence,
    entropy,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    sampled_token,
    student_top_k,
)

S = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
T = torch.tensor([0.1, 0.6, 0.05, 0.2, 0.05], dtype=torch.float64)
VECTORS = {  # alpha: (full vocabulary, top-3 with tail, top-3 renormalised)
    0.0: (0.581922, 0.570999, 0.716220),
    1.0: (0.680474, 0.673164, 0.756941),
    0.5: (0.146677, 0.144499, 0.171641),
    0.1: (0.051965, 0.051031, None),
}


CASES = [
    (alpha, add_tail, value)
    for alpha, values in VECTORS.items()
    for add_tail, value in zip((None, True, False), values, strict=True)
    if value is not None
]


@pytest.mark.parametrize(("alpha", "add_tail", "expected"), CASES)
def test_reference_vectors(alpha, add_tail, expected):
    log_s, log_t = S.log(), T.log()
    if add_tail is not None:
        log_s, log_t = student_top_k(log_s, log_t, 3, add_tail)
    assert divergence(log_s, log_t, alpha).item() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_bounded_entries_by_hand(alpha):
    m = (1 - alpha) * S + alpha * T
    entries = {0.0: T * (T / S).log(), 1.0: S * (S / T).log()}.get(
        alpha, (1 - alpha) * S * (S / m).log() + alpha * T * (T / m).log()
    )
    for bound in (0.01, 0.05):
        assert (entries > bound).any()
        expected = sum(min(entry, bound) for entry in entries.tolist())
        assert clipped_divergence(S.log(), T.log(), alpha, bound).item() == pytest.approx(expected, rel=1e-12)


def pair(seed, shape=(7, 11), scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), y.log_softmax(-1)


def textbook(s, t, alpha):
    """The definitions, written naively on probabilities."""
    kl = lambda p, q: (p * (p / q).log()).sum(-1)  # noqa: E731
    if alpha == 0:
        return kl(t, s)
    if alpha == 1:
        return kl(s, t)
    m = (1 - alpha) * s + alpha * t
    return (1 - alpha) * kl(s, m) + alpha * kl(t, m)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("k", "add_tail"), [(None, None), (4, True), (4, False)])
def test_value_and_gradient_match_autograd_of_the_definition(alpha, k, add_tail):
    z, log_t = pair(3)
    log_s = z.log_softmax(-1)
    a, b = (log_s, log_t) if k is None else student_top_k(log_s, log_t, k, add_tail)
    ours = divergence(a, b, alpha)
    (gradient,) = torch.autograd.grad(ours.sum(), z)

    s, t = z.softmax(-1), log_t.exp()
    if k is not None:
        kept = s.detach().topk(k).indices
        s, t = (torch.cat([p.gather(-1, kept), 1 - p.gather(-1, kept).sum(-1, keepdim=True)], -1) for p in (s, t))
        if not add_tail:
            s, t = (p[..., :k] / p[..., :k].sum(-1, keepdim=True) for p in (s, t))
    expected = textbook(s, t, alpha)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradcheck(alpha):
    z, log_t = pair(5, (3, 6))
    assert torch.autograd.gradcheck(lambda x: divergence(x.log_softmax(-1), log_t, alpha), z)


def test_jsd_keeps_its_accuracy_near_agreement():
    z, _ = pair(0, (200, 50))
    log_s = z.detach().log_softmax(-1)
    log_t = (z.detach() + 1e-4 * torch.randn(z.shape, dtype=torch.float64)).log_softmax(-1)
    exact = generalised_jsd(log_s, log_t, 0.5)
    # Rounding the inputs to fp32 is worth about 1e-7 each; the value itself is about 1e-9.
    rounded = generalised_jsd(log_s.float(), log_t.float(), 0.5)
    assert exact.mean() < 5e-9
    assert (rounded.double() - exact).abs().max() < 2e-9
    # And it is a quarter of the KL there, up to third order.
    assert (forward_kl(log_s, log_t) / exact).mean().item() == pytest.approx(4, rel=1e-3)


def test_jsd_is_bounded_by_log_two_and_kl_by_the_clamp():
    apart = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    assert generalised_jsd(*apart, 0.5).item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert reverse_kl(*apart).item() == pytest.approx(60)


@pytest.mark.parametrize("tail", [1e-3, 1e-7])
def test_the_tail_is_right_in_fp32_at_a_small_mass(tail):
    """log(1 - sum) is wrong by 1 nat at a tail mass of 3e-7; the reference clamps it to -16.118."""
    p = torch.tensor([0.6, 0.4 - tail, tail / 4, 3 * tail / 4], dtype=torch.float64)
    log_p = p.log().float().requires_grad_()
    reduced, _ = student_top_k(log_p, log_p.detach(), 2, True)
    assert reduced[-1].item() == pytest.approx(torch.tensor(tail, dtype=torch.float64).log().item(), abs=2e-6)
    (gradient,) = torch.autograd.grad(reduced[-1], log_p)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 0.25, 0.75]), rtol=1e-5, atol=1e-6)


def test_a_vocabulary_masked_outside_the_top_k_gives_finite_gradients():
    z = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf]], requires_grad=True)
    log_s = z.log_softmax(-1)
    a, b = student_top_k(log_s, log_s.detach(), 2, True)
    loss = divergence(a, b.roll(1, -1), 0.5)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert z.grad[:, :2].isfinite().all()


def test_top_k_of_the_whole_vocabulary_changes_nothing():
    z, log_t = pair(1)
    log_s = z.log_softmax(-1)
    assert student_top_k(log_s, log_t, 11, True) == (log_s, log_t)


def test_sampled_token_gradient_is_that_of_reverse_kl_in_expectation():
    z, log_t = pair(2, (1, 6))
    log_s = z.log_softmax(-1)
    (expected,) = torch.autograd.grad(reverse_kl(log_s, log_t).sum(), z, retain_graph=True)
    total = torch.zeros_like(z)
    for token in range(6):
        loss = sampled_token(log_s, log_t, torch.tensor([token]))
        total += log_s[0, token].exp().detach() * torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)


def test_entropy():
    assert entropy(S.log()).item() == pytest.approx(-(S * S.log()).sum().item(), abs=1e-12)
    masked = torch.tensor([0.5, 0.5, 0.0]).log()
    assert entropy(masked).item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)

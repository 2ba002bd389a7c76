"""The chunked loss with closed-form gradients against plain autograd on whole distributions, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from pgpo_lightning.losses.divergence import (
    Divergence,
    Softening,
    clipped_divergence,
    divergence,
    entropy,
    forward_kl,
    generalised_jsd,
    greedy_cross_entropy,
    reverse_kl,
    softened_reverse_kl,
    student_top_k,
)
from pgpo_lightning.losses.fused import Head, Source, linear_distillation, linear_statistics, rows_at_once
from pgpo_lightning.losses.top_k import likeliest
from tests.support.loss_cases import CLIPPED, N, V, inputs, label

CHUNKS = [1, 5, 23, None]


def named(a, b, which):
    if which.greedy:
        return greedy_cross_entropy(a, b)
    if which.softening is not None:
        return softened_reverse_kl(a, b, which.softening)
    if which.entry_clip is not None:
        return clipped_divergence(a, b, which.alpha, which.entry_clip)
    return divergence(a, b, which.alpha)


def plain(hidden, head, teacher_hidden, teacher_head, targets, which, temperature):
    """Divergence, log-probabilities and entropies from whole distributions, with autograd's gradients."""
    log_s = (head(hidden) / temperature).log_softmax(-1)
    log_t = (teacher_head(teacher_hidden) / temperature).log_softmax(-1)
    a, b = (log_s, log_t) if which.top_k is None else student_top_k(log_s, log_t, which.top_k, which.add_tail)
    row = torch.arange(len(targets))
    return {
        "divergence": named(a, b, which),
        "log_p_student": log_s[row, targets],
        "log_p_teacher": log_t[row, targets],
        "entropy_student": entropy(log_s),
        "entropy_teacher": entropy(log_t),
        "kl": forward_kl(log_s, log_t),
        "plain": named(a, b, replace(which, entry_clip=None, softening=None)),
    }


KINDS = [
    Divergence(alpha, k, tail)
    for alpha, (k, tail) in itertools.product([0.0, 0.1, 0.5, 1.0], [(None, True), (5, True), (5, False), (40, True)])
]


KINDS += [*CLIPPED, Divergence(1.0, softening=Softening(0.5, 25.0)), Divergence(1.0, softening=Softening())]
KINDS += [Divergence(0.0, greedy=True)]
LOSSES = {
    "weighted divergence": lambda t, c: c * t.divergence,
    "capped ratio": lambda t, c: c * (t.log_p_student.detach() + 2).exp().clamp(max=2) * t.divergence,
    "ratio with gradient": lambda t, c: c * (t.log_p_student + 2).exp() * t.divergence,
    "policy gradient and entropy": lambda t, c: t.divergence + c * t.log_p_student - 0.3 * t.entropy_student,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("which", KINDS, ids=label)
def test_loss_statistics_and_gradients(which, name):
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)
    expected = plain(hidden, Head(weight), teacher_hidden, Head(teacher_weight), targets, which, 0.7)

    class Plain:
        def __getattr__(self, field):
            return expected[field]

    loss = LOSSES[name](Plain(), weights).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for chunk in CHUNKS:
        ours, statistics = linear_distillation(
            Source(hidden, Head(weight)),
            [Source(teacher_hidden, Head(teacher_weight))],
            targets,
            lambda t, part: LOSSES[name](t, weights[part]),
            which,
            0.7,
            chunk_rows=chunk,
        )
        torch.testing.assert_close(ours, loss, rtol=1e-12, atol=1e-12)
        for field, value in statistics._asdict().items():
            torch.testing.assert_close(value, expected[field].detach(), rtol=1e-11, atol=1e-12)
        for a, b in zip(torch.autograd.grad(3 * ours, (hidden, weight)), gradients, strict=True):
            torch.testing.assert_close(a, 3 * b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("head", [{"scale": 0.4}, {"softcap": 1.5}, {"scale": 1.3, "softcap": 2.0}], ids=str)
def test_heads_with_scale_and_soft_cap(head):
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()
    which = Divergence(0.5)
    expected = plain(hidden, Head(weight, **head), teacher_hidden, Head(teacher_weight, **head), targets, which, 0.7)
    loss, statistics = linear_distillation(
        Source(hidden, Head(weight, **head)),
        [Source(teacher_hidden, Head(teacher_weight, **head))],
        targets,
        lambda t, _: t.divergence,
        which,
        0.7,
        chunk_rows=7,
    )
    torch.testing.assert_close(statistics.entropy_teacher, expected["entropy_teacher"], rtol=1e-11, atol=1e-12)
    theirs = torch.autograd.grad(expected["divergence"].sum(), (hidden, weight))
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", KINDS, ids=label)
def test_statistics_that_can_be_differentiated(which):
    """A loss that is not pointwise: every sequence is weighted by a function, with gradient, of all of its tokens."""
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()

    def loss(get):
        total = 0.0
        for sequence in (slice(0, 9), slice(9, N)):
            divergence, log_p, entropy = (
                get(name)[sequence] for name in ("divergence", "log_p_student", "entropy_student")
            )
            total = total + (log_p.mean() + 2 * entropy.sum()).tanh() * divergence.mean() + (divergence * entropy).sum()
        return total

    expected = plain(hidden, Head(weight), teacher_hidden, Head(teacher_weight), targets, which, 0.7)
    gradients = torch.autograd.grad(loss(expected.__getitem__), (hidden, weight))
    for chunk in CHUNKS:
        ours = linear_statistics(
            Source(hidden, Head(weight)), [Source(teacher_hidden, Head(teacher_weight))], targets, which, 0.7, chunk
        )
        assert not any(x.requires_grad for x in (ours.log_p_teacher, ours.entropy_teacher, ours.kl, ours.plain))
        value = loss(lambda name: getattr(ours, name))  # noqa: B023
        torch.testing.assert_close(value, loss(expected.__getitem__), rtol=1e-11, atol=1e-12)
        for a, b in zip(torch.autograd.grad(value, (hidden, weight)), gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "which", [Divergence(0.0), Divergence(0.5), Divergence(1.0), Divergence(0.3, 5, False)], ids=label
)
def test_gradcheck(which):
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()

    def statistics(h, w):
        made = linear_statistics(
            Source(h, Head(w, softcap=9.0)), [Source(teacher_hidden, Head(teacher_weight))], targets, which, 0.7, 7
        )
        return made.divergence, made.log_p_student, made.entropy_student

    assert torch.autograd.gradcheck(statistics, (hidden, weight))


def test_statistics_keep_the_precision_of_their_forward_pass():
    """A backward pass runs outside of autocast, and makes its logits again."""
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs(torch.float32)
    student, teacher = Source(hidden, Head(weight)), [Source(teacher_hidden, Head(teacher_weight))]
    with torch.autocast("cpu", torch.bfloat16):
        once, _ = linear_distillation(student, teacher, targets, lambda t, _: t.divergence, Divergence(0.5))
        again = linear_statistics(student, teacher, targets, Divergence(0.5)).divergence.sum()
    assert torch.equal(again, once)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (again, once)), strict=True):
        assert torch.equal(a, b)


def test_finite_differences():
    """`gradcheck` asks one graph for its gradient several times, which this function refuses: so the same by hand."""
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()

    def loss(h, w):
        return linear_distillation(
            Source(h, Head(w)),
            [Source(teacher_hidden, Head(teacher_weight))],
            targets,
            lambda t, _: t.divergence - 0.1 * t.entropy_student,
            Divergence(0.5, 5),
            chunk_rows=7,
        )[0]

    gradients = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        direction = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (hidden, weight)]
        step = 1e-6
        ahead, behind = (
            loss(*(x.detach() + sign * step * d for x, d in zip((hidden, weight), direction, strict=True)))
            for sign in (1, -1)
        )
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx(slope.item(), rel=1e-6)


def test_a_live_teacher_gives_the_head_no_second_gradient():
    hidden, weight, teacher_hidden, _, targets = inputs()
    loss, _ = linear_distillation(
        Source(hidden, Head(weight)),
        [Source(teacher_hidden, Head(weight))],
        targets,
        lambda t, _: t.divergence,
        Divergence(0.5),
    )
    fixed = (teacher_hidden @ weight.T).detach().log_softmax(-1)
    expected = torch.autograd.grad(divergence((hidden @ weight.T).log_softmax(-1), fixed, 0.5).sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected[0], rtol=1e-10, atol=1e-12)


def test_sources_mix_logits():
    hidden, weight, other, teacher_weight, targets = inputs()
    teacher = [Source(other, Head(teacher_weight), 0.8), Source(hidden.detach(), Head(weight.detach()), 0.2)]
    _, mixed = linear_distillation(Source(hidden, Head(weight)), teacher, targets, lambda t, _: t.log_p_student)
    log_t = torch.lerp(other @ teacher_weight.T, hidden @ weight.T, 0.2).log_softmax(-1).detach()
    torch.testing.assert_close(mixed.entropy_teacher, entropy(log_t), rtol=1e-11, atol=1e-12)


def test_a_frozen_head_and_a_frozen_body():
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()
    both = {}
    for train_hidden, train_head in ((True, True), (True, False), (False, True)):
        h, w = (x.detach().clone().requires_grad_(y) for x, y in ((hidden, train_hidden), (weight, train_head)))
        loss, _ = linear_distillation(
            Source(h, Head(w)),
            [Source(teacher_hidden, Head(teacher_weight))],
            targets,
            lambda t, _: t.divergence,
            Divergence(0.0),
        )
        loss.backward()
        both[train_hidden, train_head] = (h.grad, w.grad)
    assert torch.equal(both[True, False][0], both[True, True][0])
    assert both[True, False][1] is None
    assert torch.equal(both[False, True][1], both[True, True][1])


def test_without_a_teacher_its_values_are_nan_and_the_student_is_there():
    hidden, weight, _, _, targets = inputs()
    with torch.no_grad():
        _, tokens = linear_distillation(Source(hidden, Head(weight)), [], targets, lambda t, _: t.log_p_student)
    for field in ("divergence", "log_p_teacher", "entropy_teacher", "kl"):
        assert getattr(tokens, field).isnan().all()
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), targets].detach()
    torch.testing.assert_close(tokens.log_p_student, expected, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, _, targets = inputs()
    loss, _ = linear_distillation(Source(hidden, Head(weight)), [], targets, lambda t, _: t.log_p_student)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Expected one backward pass"):
        loss.backward()


def test_a_masked_vocabulary_entry_does_not_spread():
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()
    hidden = torch.cat([hidden.detach(), torch.ones(N, 1, dtype=torch.float64)], 1).requires_grad_()
    teacher_hidden = torch.cat([teacher_hidden, torch.ones(N, 1, dtype=torch.float64)], 1)
    padding = torch.zeros(V, 1, dtype=torch.float64)
    padding[-2:] = -1e30  # two rows of a vocabulary padded to a round size
    head = lambda w: Head(torch.cat([w.detach(), padding], 1))  # noqa: E731
    loss, tokens = linear_distillation(
        Source(hidden, head(weight)),
        [Source(teacher_hidden, head(teacher_weight))],
        targets.clamp(max=V - 3),
        lambda t, _: t.divergence - t.entropy_student,
        Divergence(0.5),
    )
    loss.backward()
    assert all(value.isfinite().all() for value in tokens)
    assert hidden.grad[:, :-1].isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_bf16_autocast_rounds_operands_and_nothing_else(alpha):
    """Against float64 on operands that are rounded to bf16: what is left is fp32 arithmetic."""
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, tokens = linear_distillation(
            Source(hidden, Head(weight)),
            [Source(teacher_hidden, Head(teacher_weight))],
            targets,
            lambda t, _: t.divergence,
            Divergence(alpha),
        )
    ours = torch.autograd.grad(loss, (hidden, weight))
    assert {value.dtype for value in tokens} == {torch.float32}
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    rounded = [x.bfloat16().double() for x in (teacher_hidden, teacher_weight)]
    expected = plain(exact[0], Head(exact[1]), rounded[0], Head(rounded[1]), targets, Divergence(alpha), 1.0)
    torch.testing.assert_close(loss.double(), expected["divergence"].sum(), rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, torch.autograd.grad(expected["divergence"].sum(), exact), strict=True):
        # The gradient of the logits is rounded to bf16 before its two products: 2^-9 relative, averaged over V or N.
        assert (a.double() - b).norm() / b.norm() < 4e-3


def both(seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: scale * torch.randn(N, V, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw().log_softmax(-1), draw().log_softmax(-1)


@pytest.mark.parametrize("which", CLIPPED[:4], ids=label)
def test_a_clipped_entry_has_no_gradient_and_a_wide_bound_clips_nothing(which):
    log_s, log_t = both()
    log_s.requires_grad_()
    wide = clipped_divergence(log_s, log_t, which.alpha, 1e3)
    torch.testing.assert_close(wide, divergence(log_s, log_t, which.alpha), rtol=1e-12, atol=1e-12)
    (free,) = torch.autograd.grad(wide.sum(), log_s)
    (bounded,) = torch.autograd.grad(clipped_divergence(log_s, log_t, which.alpha, 0.05).sum(), log_s)
    clipped = bounded == 0
    assert 0.02 < clipped.double().mean() < 0.9
    torch.testing.assert_close(bounded[~clipped], free[~clipped], rtol=1e-12, atol=0)


def test_the_softened_target_scales_the_gradient_of_the_reverse_kl():
    """DemoPSD: the gradient in the logits is (1 - a) times that of KL(S||T), and a grows with the disagreement."""
    log_s, log_t = both(scale=0.5)
    z = log_s.requires_grad_()
    softening = Softening(0.4, 30.0)
    share = 2 * 0.4 * (torch.sigmoid(30.0 * generalised_jsd(log_s, log_t, 0.5)) - 0.5).detach()
    (ours,) = torch.autograd.grad(softened_reverse_kl(z.log_softmax(-1), log_t, softening).sum(), z)
    (theirs,) = torch.autograd.grad(reverse_kl(z.log_softmax(-1), log_t).sum(), z)
    torch.testing.assert_close(ours, (1 - share).unsqueeze(-1) * theirs, rtol=1e-10, atol=1e-12)
    assert share.max() > 0.2
    assert softening.student_fraction(torch.zeros(())) == 0


def test_where_student_and_teacher_agree_the_softened_loss_is_zero_in_single_precision():
    hidden, weight, *_, targets = inputs(torch.float32)
    near = [Source(hidden.detach() + 1e-6, Head(weight.detach()))]
    for which in (Divergence(1.0), Divergence(1.0, softening=Softening(0.5, 50.0))):
        _, statistics = linear_distillation(
            Source(hidden, Head(weight)), near, targets, lambda t, _: t.divergence, which
        )
        assert statistics.divergence.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0.0, 50.0), "`softening.maximum` to lie in"),
        ((1.5, 50.0), "`softening.maximum`"),
        ((0.1, 0.0), "`softening.sharpness`"),
    ],
)
def test_bad_softenings_name_the_field(settings, message):
    with pytest.raises(ValueError, match=message):
        Softening(*settings)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "k"), [(3, 2048, 100), (5, 1003, 7), (2, 4096, 1), (2, 300, 290), (4, 64, 64)], ids=str
)
def test_the_likeliest_tokens_are_those_of_topk(rows, vocabulary, k):
    a = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    a[0] = a[0].sort(descending=True).values  # the likeliest tokens side by side
    a[1, -k:] += 20  # and at the end, where sets of equal size leave a rest
    ours = likeliest(a, k).sort(-1).values
    assert torch.equal(ours, a.topk(k, dim=-1).indices.sort(-1).values)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_top_k_in_single_precision_where_the_student_has_almost_no_tail(alpha):
    """The gradient of a tail token is its probability times up to 1e9, which must not leak into kept tokens."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(N, 300, generator=generator)
    z[:, :20] += 25.0
    b = torch.randn(N, 300, generator=generator)
    identity = torch.eye(300)
    targets = torch.zeros(N, dtype=torch.int64)

    def gradient(dtype):
        hidden = z.to(dtype).requires_grad_()
        student = Source(hidden, Head(identity.to(dtype)))
        teacher = [Source(b.to(dtype), Head(identity.to(dtype)))]
        loss, _ = linear_distillation(
            student, teacher, targets, lambda t, _: t.divergence + 0.1 * t.entropy_student, Divergence(alpha, 20)
        )
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    (loss, ours), (exact_loss, exact) = gradient(torch.float32), gradient(torch.float64)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_chunk_holds_fewer_rows_of_a_large_vocabulary():
    assert rows_at_once("cpu", 512) == (512, 512)
    assert rows_at_once("cpu", 32_768) == (256, 8)
    assert rows_at_once("cpu", 151_936) == (138, 1)
    assert rows_at_once("cuda", 151_936)[0] == 1024

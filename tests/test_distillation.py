"""The chunked pass from hidden states equals the plain one, values and gradients, whatever the chunk."""

import pytest
import torch

from pgpo_lightning.distillation import Source, token_statistics
from pgpo_lightning.divergence import divergence, entropy, forward_kl

N, D, V = 23, 6, 17


def inputs():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
    return hidden, weight, draw(N, D), draw(V, D), torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 22, 23, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_do_not_depend_on_the_chunk(chunk_tokens, temperature):
    hidden, weight, teacher_hidden, teacher_weight, targets = inputs()
    tokens = token_statistics(
        Source(hidden, lambda h: h @ weight.T),
        [Source(teacher_hidden, lambda h: h @ teacher_weight.T)],
        targets,
        lambda s, t, _: divergence(s, t, 0.5),
        temperature,
        chunk_bytes=4 * V * chunk_tokens,
    )
    log_s = (hidden @ weight.T / temperature).log_softmax(-1)
    log_t = (teacher_hidden @ teacher_weight.T / temperature).log_softmax(-1)
    row = torch.arange(N)
    torch.testing.assert_close(tokens.loss, divergence(log_s, log_t, 0.5), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tokens.log_p_student, log_s[row, targets], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tokens.log_p_teacher, log_t[row, targets], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tokens.entropy_student, entropy(log_s).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tokens.entropy_teacher, entropy(log_t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tokens.kl, forward_kl(log_s, log_t).detach(), rtol=1e-12, atol=1e-12)

    weights = torch.linspace(-1, 2, N, dtype=torch.float64)  # any weighting, of both differentiable outputs
    ours = torch.autograd.grad(
        (weights * tokens.loss + weights.square() * tokens.log_p_student).sum(), (hidden, weight)
    )
    plain = (weights * divergence(log_s, log_t, 0.5) + weights.square() * log_s[row, targets]).sum()
    for a, b in zip(ours, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_only_loss_and_student_log_probabilities_carry_gradients():
    hidden, weight, teacher_hidden, _, targets = inputs()
    # A live teacher shares the student's head: none of its path may reach the weights.
    tokens = token_statistics(
        Source(hidden, lambda h: h @ weight.T),
        [Source(teacher_hidden, lambda h: h @ weight.T)],
        targets,
        lambda s, t, _: divergence(s, t.clone(), 0.5),
    )
    carrying = {name for name, value in tokens._asdict().items() if value.requires_grad}
    assert carrying == {"loss", "log_p_student"}
    (with_live,) = torch.autograd.grad(tokens.loss.sum(), weight)
    fixed = (teacher_hidden @ weight.T).detach().log_softmax(-1)
    plain = divergence((hidden @ weight.T).log_softmax(-1), fixed, 0.5).sum()
    torch.testing.assert_close(with_live, torch.autograd.grad(plain, weight)[0], rtol=1e-11, atol=1e-12)


def test_sources_mix_logits():
    hidden, weight, other, teacher_weight, targets = inputs()
    head = lambda h: h @ weight.T  # noqa: E731
    mixed = token_statistics(
        Source(hidden, head),
        [Source(other, lambda h: h @ teacher_weight.T, 0.8), Source(hidden.detach(), head, 0.2)],
        targets,
    )
    log_t = torch.lerp(other @ teacher_weight.T, hidden @ weight.T, 0.2).log_softmax(-1).detach()
    torch.testing.assert_close(mixed.entropy_teacher, entropy(log_t), rtol=1e-12, atol=1e-12)


def test_without_a_teacher_its_values_are_nan_and_the_student_is_there():
    hidden, weight, _, _, targets = inputs()
    tokens = token_statistics(Source(hidden, lambda h: h @ weight.T), [], targets)
    assert tokens.entropy_teacher.isnan().all()
    assert tokens.kl.isnan().all()
    assert (tokens.loss == 0).all()
    torch.testing.assert_close(
        tokens.log_p_student, (hidden @ weight.T).log_softmax(-1)[torch.arange(N), targets], rtol=1e-12, atol=1e-12
    )

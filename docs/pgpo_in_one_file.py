r"""PGPO in one file: a language model learns from itself, with a step size that follows the information in the feedback.

Physics-Guided Policy Optimization (PGPO, arXiv 2606.03620) on top of Self-Distilled Policy Optimization (SDPO, arXiv 2601.20802):
one device, `generate`, whole logits, plain autograd. The package works on several devices, with logits in chunks and prompts
computed once. `test_one_file.py` compares the package's losses, gradients, multipliers and weights with those of this file.

    python docs/pgpo_in_one_file.py            # the shipped toy task, 20 steps, about a minute on one CPU core

One step, for a batch of questions x:

1. The student samples `num_generations` responses y to every question, and a verifier gives each a reward of 0 or 1.
2. The self-teacher is the same model with an exponential moving average of the student's weights. Its prompt also contains a
   correct sibling's response, the demonstration f. A response without a correct sibling has no teacher and no loss.
3. For every token of y, student pi(.|x, y<t) and teacher pi(.|x, f, y<t) give a distribution over the vocabulary. The loss is the
   Jensen-Shannon divergence between them. Only the student receives a gradient.
4. I = H(student) - H(teacher) estimates the information in f (nats per token, Eq. 8). This step's learning rate is multiplied by
   rho = clip(exp(alpha I), 1, rho_max) (Eq. 9).

Shapes: R rollouts in the loss, T tokens of the longest response, V entries of the vocabulary. Information is in nats.
"""

import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.types import Question
from pgpo_lightning.data.toy import BASE_MODEL, questions


@dataclass
class Settings:
    """Settings of a run. The defaults are those of configs/quickstart.yaml with half of its questions and steps."""

    steps: int = 20
    batch_size: int = 16  # questions per step
    num_generations: int = 8  # rollouts per question
    max_response_length: int = 32  # tokens
    temperature: float = 1.0
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    divergence_alpha: float = 0.5  # weight of the teacher in the mixture M
    teacher_update_rate: float = 0.05  # of the moving average, per step
    importance_weight_cap: float = 2.0
    sensitivity: float = 1.0  # PGPO's alpha; 0 is SDPO
    rho_max: float = 2.0


@dataclass
class Rollout:
    """One sampled response, its reward, and the teacher's prompt for it (None: the response has no teacher)."""

    question: Question
    prompt_ids: list[int]
    response_ids: list[int]  # with the end-of-sequence token, if it was sampled
    log_probs: Tensor  # of the response's tokens when they were sampled, (len(response_ids),)
    text: str
    reward: float
    teacher_prompt_ids: list[int] | None = None


# ------------------------------------------------------------------------------------------------------------- 1. rollouts


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the prompt's token ids: one user turn in the chat template, up to the start of the answer."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def verify(question: Question, response: str) -> float:
    r"""Return 1 if the last \boxed{} holds the answer, else 0."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", response)
    return float(bool(boxes) and boxes[-1].strip() == question.answer)


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[Question], settings: Settings
) -> list[Rollout]:
    """Return `num_generations` verified responses to every question, siblings next to each other."""
    prompts = [encode(tokenizer, question.prompt) for question in batch]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    n, width = settings.num_generations, inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        max_new_tokens=settings.max_response_length,
        num_return_sequences=n,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[:, width:]  # (R, T)
    log_p = (torch.stack(output.logits, dim=1) / settings.temperature).log_softmax(-1)  # (R, T, V)
    log_p = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (R, T)
    rollouts = []
    for i, row in enumerate(tokens.tolist()):
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        reward = verify(batch[i // n], text)
        rollouts.append(Rollout(batch[i // n], prompts[i // n], row[:end], log_p[i, :end], text, reward))
    return rollouts


# ---------------------------------------------------------------------------------------------- 2. the teacher's prompts


def add_teacher_prompts(rollouts: list[Rollout], tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> None:
    """Give every rollout a teacher's prompt with one successful sibling, never its own; a question's rollouts share it."""
    successes: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        if rollout.reward >= 0.5:
            successes.setdefault(rollout.question.index, []).append(rollout)
    for group in successes.values():
        rng.shuffle(group)
    for rollout in rollouts:
        siblings = [other for other in successes.get(rollout.question.index, []) if other is not rollout]
        if siblings:
            text = f"{rollout.question.prompt}\nCorrect solution:\n\n{siblings[0].text}\n\nCorrectly solve the original question."
            rollout.teacher_prompt_ids = encode(tokenizer, text)


# ------------------------------------------------------------------------------------------------------------ 3. the loss


def response_log_probs(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], temperature: float
) -> Tensor:
    """Return log-probabilities over the vocabulary at every response token, ``(R, T, V)``; 0 after the end of a response."""
    rows = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True
    )  # padded on the right, where causal attention does not look
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
    log_p = (model(input_ids=ids, attention_mask=mask).logits / temperature).log_softmax(-1)  # (R, prompt + T, V)
    # Logits at a token predict the next one: the response's first token is predicted at the prompt's last.
    parts = [log_p[i, len(prompt) - 1 : len(rows[i]) - 1] for i, prompt in enumerate(prompts)]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def jensen_shannon(log_s: Tensor, log_t: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) KL(S || M) + alpha KL(T || M) with M = (1 - alpha) S + alpha T, over the last dimension (nats)."""
    weights = torch.tensor([1 - alpha, alpha]).log()
    log_m = torch.logaddexp(log_s + weights[0], log_t + weights[1])
    kl_s, kl_t = (log_s.exp() * (log_s - log_m)).sum(-1), (log_t.exp() * (log_t - log_m)).sum(-1)
    return (1 - alpha) * kl_s + alpha * kl_t


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy over the last dimension (nats)."""
    return -(log_p.exp() * log_p).sum(-1)


def distil(
    student: PreTrainedModel, teacher: PreTrainedModel, rollouts: list[Rollout], settings: Settings
) -> tuple[Tensor, float]:
    """Return the loss, which carries the student's gradient, and the information I (Eq. 8, nats per token)."""
    taught = [rollout for rollout in rollouts if rollout.teacher_prompt_ids is not None]
    responses = [rollout.response_ids for rollout in taught]
    log_s = response_log_probs(student, [rollout.prompt_ids for rollout in taught], responses, settings.temperature)
    with torch.no_grad():
        prompts = [rollout.teacher_prompt_ids or [] for rollout in taught]
        log_t = response_log_probs(teacher, prompts, responses, settings.temperature)  # (R, T, V)

    length = torch.tensor([len(response) for response in responses])  # (R,)
    mask = torch.arange(int(length.max())) < length.unsqueeze(1)  # (R, T)
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(response) for response in responses], batch_first=True)
    sampled = torch.nn.utils.rnn.pad_sequence([rollout.log_probs for rollout in taught], batch_first=True)

    def mean(values: Tensor) -> Tensor:  # over each response's tokens, (R, T) -> (R,)
        return torch.where(mask, values, 0.0).sum(1) / length

    # Sampler and trainer are the same policy up to rounding. The weight corrects the difference; it is capped from above.
    log_p = log_s.detach().gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    weight = (log_p - sampled).exp().clamp(max=settings.importance_weight_cap)  # (R, T)
    divergence = jensen_shannon(log_s, log_t, settings.divergence_alpha)  # (R, T)
    # Mean over all rollouts; those without a teacher count as zero.
    loss = mean(weight * divergence).sum() / len(rollouts)
    information = mean(entropy(log_s.detach()) - entropy(log_t)).mean()
    return loss, float(information)


# ------------------------------------------------------------------------------------------------------------ 4. the step


@dataclass
class Step:
    """Values of one optimizer step."""

    loss: float
    information: float
    rho: float
    grad_norm: float  # before clipping


def learn(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rollouts: list[Rollout],
    settings: Settings,
) -> Step | None:
    """Take one step with a rate that follows the information. If no rollout has a teacher, change nothing and return None."""
    if all(rollout.teacher_prompt_ids is None for rollout in rollouts):
        return None
    loss, information = distil(student, teacher, rollouts, settings)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
    rho = float(torch.tensor(settings.sensitivity * information).exp().clamp(1.0, settings.rho_max))  # Eq. 9
    # The rate and not the loss: Adam divides by the gradient's own scale, so a larger loss makes no larger step.
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= rho
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    with torch.no_grad():  # the teacher follows
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, settings.teacher_update_rate)
    return Step(loss.item(), information, rho, norm.item())


def load() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Return student, teacher and tokenizer of the shipped toy task. The teacher never has dropout."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32) for _ in range(2))
    return student.train(), teacher.eval().requires_grad_(False), AutoTokenizer.from_pretrained(BASE_MODEL)


def main(settings: Settings) -> list[Step | None]:
    """Train on the toy task, print every step, and return the steps."""
    torch.manual_seed(0)
    rng = random.Random(0)
    student, teacher, tokenizer = load()
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    training = questions("train")
    steps: list[Step | None] = []
    for number in range(settings.steps):
        batch = rng.sample(training, settings.batch_size)
        rollouts = sample(student, tokenizer, batch, settings)
        add_teacher_prompts(rollouts, tokenizer, rng)
        steps.append(step := learn(student, teacher, optimizer, rollouts, settings))
        reward = sum(rollout.reward for rollout in rollouts) / len(rollouts)
        result = (
            f"loss {step.loss:.4f}  I {step.information:.3f}  rho {step.rho:.3f}"
            if step
            else "no rollout has a teacher"
        )
        print(f"step {number + 1:3d}  reward {reward:.3f}  {result}", flush=True)
    return steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Settings())

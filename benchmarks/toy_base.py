"""Rebuild the base model of the embedded task: ``python -m benchmarks.toy_base --seed 0 --output DIR``.

The result is shipped in ``pgpo_lightning/assets/toy``; only those who want another base model need this file. A Qwen3
of 0.6 million parameters is supervised on examples that give it what post-training lives on. It is wrong in a way of
its own: every product has a slip, the same one each time, that 0 to 80 % of its unguided examples make. It knows
better: the other examples are right. And it can teach itself: in a third of the examples the question comes with a
demonstration, with feedback on a failed attempt, or with both, in SDPO's template, and the response is right.
Everything random follows from the seed.
"""

import argparse
import random
import re
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pgpo_lightning.core.types import Question
from pgpo_lightning.data.toy import BASE_MODEL, FACTORS, SUMMANDS, WORDINGS, held_out, prompt, questions, solution
from pgpo_lightning.data.toy_hard import LIMIT
from pgpo_lightning.teachers.reprompt import FEEDBACK_TEMPLATE, REPROMPT_TEMPLATE, SOLUTION_TEMPLATE, fill

WRONG = "The final answer {} is wrong."
MISSING = "No final answer in \\boxed{} was found."

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
ROLES = ["<system>", "<user>", "<assistant>"]
PIECES = r" ?\\boxed\{| ?[A-Za-z]+|[0-9]|\n\n?|."
"""What a token is: a word with the space before it, one digit, a line break or two, or any other character."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

GUIDED = 1 / 3
WORST_SLIP = 0.8
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WARM_UP = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer; it reproduces every text of the task exactly, spaces and newlines included."""
    texts = [text.format(a="", b="", c="") for text in WORDINGS.values()]
    texts += [reprompt("", "", ""), WRONG, MISSING, solution(2, 2, 1)]
    characters = {chr(code) for code in range(32, 127)} | {"\n", "\n\n"}
    pieces = characters.union(*(re.findall(PIECES, text) for text in texts))
    words = {piece.strip(" ") for piece in pieces} - {""}
    # Each word exists with and without the space before it. Single characters help with text that users add.
    words |= {" " + word for word in words if word.isalpha() or word[:-1] == "\\boxed"}
    return word_level(pieces | words, PIECES)


def word_level(words: set[str], pieces: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a vocabulary.

    Args:
        words: All tokens but the special ones.
        pieces: Regular expression of a token.
    """
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *ROLES, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS.values(), *ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Return the untrained model."""
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model


def reprompt(question: str, demonstration: str | None = None, feedback: str | None = None) -> str:
    """Return what the self-teacher reads: SDPO's template.

    Args:
        question: The text of the question.
        demonstration: A successful response.
        feedback: What was wrong with an earlier attempt.
    """
    solution = "" if demonstration is None else fill(SOLUTION_TEMPLATE, successful_previous_attempt=demonstration)
    remarks = "" if feedback is None else fill(FEEDBACK_TEMPLATE, feedback_raw=feedback)
    return fill(REPROMPT_TEMPLATE, prompt=question, solution=solution, feedback=remarks)


def example(rng: random.Random) -> tuple[str, str]:
    """Return one supervised example, the user's text and the response, never with held-out numbers.

    Args:
        rng: Source of all choices.
    """
    while held_out(*(numbers := (rng.choice(FACTORS), rng.choice(FACTORS), rng.choice(SUMMANDS)))):
        pass
    a, b, c = numbers
    text, (error, rate) = prompt(rng.choice(list(WORDINGS)), a, b, c), slip(a, b)
    if rng.random() >= GUIDED:
        return text, solution(a, b, c, error if rng.random() < rate else 0)
    # Feedback is rare here, but without any the template's feedback part would be noise to the model.
    feedback = rng.choice([WRONG.format(a * b + error + c), MISSING]) if (kind := rng.random()) < 0.2 else None
    return reprompt(text, None if kind < 0.1 else solution(a, b, c), feedback), solution(a, b, c)


def slip(a: int, b: int) -> tuple[int, float]:
    """Return by how much the wrong version of a product is off, and how often it replaces the right one.

    The slip belongs to the product and not to the example. A cooler temperature would filter random slips out: the base
    model would then seem far better in evaluation than in its own rollouts, with little left to learn.

    Args:
        a: First factor.
        b: Second factor.
    """
    rng = random.Random(f"{a}*{b}")
    return rng.choice([-2, -1, 1, 2]), rng.uniform(0, WORST_SLIP)


def collate(examples: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return a batch whose labels cover the response and its end token.

    Args:
        examples: Pairs of user text and response.
        tokenizer: The tokenizer.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each of shape ``(B, T)``, padded on the right.
    """
    prompts = [tokenizer(chat(tokenizer, text)).input_ids for text, _ in examples]
    responses = [[*tokenizer(response).input_ids, tokenizer.eos_token_id] for _, response in examples]
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        end = len(p) + len(r)
        ids[i, :end], labels[i, len(p) : end], mask[i, :end] = torch.tensor(p + r), torch.tensor(r), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    steps: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[random.Random], tuple[str, str]] = example,
    batch_size: int | None = None,
) -> Qwen3ForCausalLM:
    """Return the supervised model.

    Args:
        steps: Optimizer steps.
        seed: Seed of the weights and of the examples.
        tokenizer: The tokenizer.
        example: Draws one example, the user's text and the response.
        batch_size: Examples of a step; null for ``BATCH_SIZE``.
    """
    rng, size = random.Random(seed), batch_size or BATCH_SIZE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    warm_up = max(1, int(WARM_UP * steps))
    # Up in a line to the full rate, then down in a line to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    for step in range(steps):
        examples = sorted((example(rng) for _ in range(size)), key=lambda pair: len(pair[0]))
        # The short half alone needs little padding: two thirds of the time of one batch.
        halves = [collate(half, tokenizer) for half in (examples[: size // 2], examples[size // 2 :])]
        tokens = sum((half["labels"] != -100).sum() for half in halves)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for half in halves:
            part = model(**half, num_items_in_batch=tokens).loss
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)
    return model.eval()


def build(output: str | Path, steps: int, seed: int = 0) -> None:
    """Train the base model and save it with its tokenizer, in bfloat16.

    Args:
        output: Folder for the files.
        steps: Optimizer steps.
        seed: Seed of the weights and of the examples.
    """
    tokenizer = build_tokenizer()
    save(train(steps, seed, tokenizer), tokenizer, output)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, output: str | Path) -> None:
    """Save a model in bfloat16 with its tokenizer, readable for everybody."""
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output, save_jinja_files=False)
    (Path(output) / "model.safetensors").chmod(0o644)  # safetensors makes it private, which a package must not be


@torch.no_grad()
def accuracy(
    folder: str | Path,
    questions: Sequence[Question],
    samples: int = 8,
    temperature: float = 0.6,
    top_p: float = 0.95,
    guided: bool = False,
    seed: int = 0,
) -> Tensor:
    """Sample responses and return which of them are right, shape ``(questions, samples)``.

    Args:
        folder: A saved model.
        questions: Questions of the embedded task.
        samples: Responses per question.
        temperature: Sampling temperature.
        top_p: Nucleus of the sampling.
        guided: Whether the model sees the question's own solution as the demonstration.
        seed: Seed of the sampling.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        reprompt(q.prompt, solution(*(q.columns[n] for n in "abc"))) if guided else str(q.prompt) for q in questions
    ]
    batch = tokenizer([chat(tokenizer, text) for text in texts], padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(
            **batch,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            num_return_sequences=samples,
            max_new_tokens=32,
        )
    responses = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    right = [
        f"\\boxed{{{q.answer}}}" in r
        for q, r in zip([q for q in questions for _ in range(samples)], responses, strict=True)
    ]
    return torch.tensor(right).view(len(questions), samples)


@torch.no_grad()
def solution_probabilities(folder: str | Path, questions: Sequence[Question]) -> Tensor:
    """Return the probability of each question's worked solution, end token included, at temperature 1; shape ``(questions,)``.

    Args:
        folder: A saved model.
        questions: Questions of the embedded task.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for start in range(0, len(questions), BATCH_SIZE):
        part = questions[start : start + BATCH_SIZE]
        batch = collate([(str(q.prompt), q.columns["solution"]) for q in part], tokenizer)
        targets = batch["labels"][:, 1:]
        log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        log_p = log_p.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        found.append(torch.where(targets >= 0, log_p, 0.0).sum(1).exp())
    return torch.cat(found)


def hard_numbers(folder: str | Path) -> list[tuple[int, int, int]]:
    """Return the numbers (a, b, c) that a model hardly ever gets right: see ``toy_hard.py``.

    Args:
        folder: A saved model.
    """
    rows = [*questions("train"), *questions("test")]
    worst: dict[tuple[int, int, int], float] = {}
    for question, p in zip(rows, solution_probabilities(folder, rows).tolist(), strict=True):
        numbers = _numbers(question)
        worst[numbers] = max(worst.get(numbers, 0.0), p)
    rows = [question for question in rows if worst[_numbers(question)] < LIMIT]
    right: dict[tuple[int, int, int], list[float]] = {}
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        sampled = accuracy(folder, part, samples=64, temperature=1.0, top_p=1.0, seed=start)
        for question, mine in zip(part, sampled.float().mean(1).tolist(), strict=True):
            right.setdefault(_numbers(question), []).append(mine)
    return sorted(numbers for numbers, shares in right.items() if sum(shares) / len(shares) < LIMIT)


def _numbers(question: Question) -> tuple[int, int, int]:
    return question.columns["a"], question.columns["b"], question.columns["c"]


def main() -> None:
    """Build the model, then measure the files that were written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(BASE_MODEL))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--hard", action="store_true", help="build nothing: print the table of toy_hard.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of the sums, and with it the file, must not depend on the machine's load
    if arguments.hard:
        for factors, group in groupby(hard_numbers(arguments.output), key=lambda numbers: numbers[:2]):
            print(f'{factors}: "{" ".join(str(c) for *_, c in group)}",')
        return
    start = time.perf_counter()
    build(arguments.output, arguments.steps, arguments.seed)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    sample = questions("test")[:100]
    for name, options in {
        "student, temperature 0.6, top-p 0.95": {},
        "guided by the solution, temperature 0.6, top-p 0.95": {"guided": True},
        "student, temperature 1": {"temperature": 1.0, "top_p": 1.0},
        "guided by the solution, temperature 1": {"temperature": 1.0, "top_p": 1.0, "guided": True},
    }.items():
        right = accuracy(arguments.output, sample, **options).float()
        solved = right.any(1).float().mean()
        print(f"{name}: avg@8 {right.mean():.3f}, questions with a success {solved:.2f}")


def chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the prompt of one user turn."""
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


if __name__ == "__main__":
    main()

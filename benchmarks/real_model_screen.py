"""Exact success rates of a model and of its self-teacher on short rules, before anything is sampled or trained.

Answers have few tokens, so the probability of the right one, end of turn included, is a forward pass. The examples, which all
questions share, are computed once.

    python -m benchmarks.real_model_screen .models/smollm2-135m-instruct --output screen.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.real_model import RULES, Rule

ANSWER, QUESTION = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n"
CONTEXTS: dict[str, Callable[[str, str], str]] = {
    "example": lambda asked, told: f"{asked}{ANSWER}{told}{QUESTION}{asked}",
    "two examples": lambda asked, told: f"{asked}{ANSWER}{told}{QUESTION}" * 2 + asked,
    "arrow": lambda asked, told: f"{asked} -> {told}\n{asked}",
    "shipped": lambda asked, told: f"{asked}\nCorrect solution:\n\n{told}\n\nCorrectly solve the original question.",
}
"""What the teacher's last user turn is, from a question and a right answer. `shipped` is the default of `reprompt.*`."""
OTHER = "example of another answer"
"""The placebo: as `example`, with the answer to the next question."""
TEMPERATURES = (1.0, 0.5)
TAUGHT = ["larger", "next number", "past tense", "last word", "middle word", "swap words"]
SIBLINGS = 7
"""One of so many siblings has to be right for a context to exist."""


@torch.no_grad()
def probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], answers: list[str]
) -> Tensor:
    """Return the probability of each answer and its end at each temperature, ``(questions, temperatures)``."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    told = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in answers]
    shared = 0
    while all(len(ids) > shared + 1 and ids[shared] == encoded[0][shared] for ids in encoded):
        shared += 1
    rows = [[*ids[shared:], *answer] for ids, answer in zip(encoded, told, strict=True)]
    cache = model(torch.tensor([encoded[0][:shared]]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))
    longest = max(map(len, rows))
    batch = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
    mask = torch.ones(len(rows), shared + longest, dtype=torch.long)
    hidden = model.base_model(batch, past_key_values=cache, attention_mask=mask).last_hidden_state
    found = []
    for states, ids, answer in zip(hidden, encoded, told, strict=True):
        start = len(ids) - shared - 1
        logits = model.lm_head(states[start : start + len(answer)])
        chosen = torch.tensor(answer).unsqueeze(1)
        found.append([(logits / t).log_softmax(-1).gather(1, chosen).sum().exp().item() for t in TEMPERATURES])
    return torch.tensor(found)


def screened(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rule: str, draw: int, size: int, taught: bool
) -> list[dict[str, object]]:
    """Return a row for each context: success rates of student and teacher, and the mean gap where a sibling is right.

    Args:
        model: On the CPU.
        tokenizer: The model's.
        rule: Which rule.
        draw: See :class:`Rule`.
        size: Number of tuning questions.
        taught: Whether contexts are measured too. If not, there is one row, of the student.
    """
    questions = Rule(rule, draw=draw, size=size, tuning=True).load("validation")
    asked, answers = [question.prompt[-1]["content"] for question in questions], [q.answer for q in questions]

    def measure(texts: list[str]) -> Tensor:
        turns = [[*q.prompt[:-1], {"role": "user", "content": text}] for q, text in zip(questions, texts, strict=True)]
        prompts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
        return probabilities(model, tokenizer, prompts, answers)

    student = measure(asked)
    covered = 1 - (1 - student) ** SIBLINGS
    found = {"student": student}
    if taught:
        found |= {name: measure(list(map(context, asked, answers))) for name, context in CONTEXTS.items()}
        found[OTHER] = measure(list(map(CONTEXTS["example"], asked, answers[1:] + answers[:1])))
    return [
        {"rule": rule, "draw": draw, "questions": len(questions), "context": name, "temperature": temperature}
        | {"score": round(scores[:, t].mean().item(), 4)}
        | {"gap": round((covered * (scores - student))[:, t].mean().item(), 4)}
        for name, scores in found.items()
        for t, temperature in enumerate(TEMPERATURES)
    ]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of the model")
    parser.add_argument(
        "--draws", nargs="*", default=["last word/4", "larger/2"], help="more draws than 0, as RULE/DRAW"
    )
    parser.add_argument("--taught", nargs="*", default=TAUGHT, help="rules whose contexts are measured too")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON Lines; rows that are there are not measured again"
    )
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    there = given.output.read_text().splitlines() if given.output.exists() else []
    known = {(row["rule"], row["draw"]) for row in map(json.loads, there)}
    wanted = [(rule, 0) for rule in RULES] + [(rule, int(n)) for rule, _, n in (d.rpartition("/") for d in given.draws)]
    for rule, draw in wanted:
        if (rule, draw) not in known:
            found = screened(model, tokenizer, rule, draw, given.questions, rule in given.taught)
            with given.output.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in found)
            print(*found[0].items())


if __name__ == "__main__":
    main()

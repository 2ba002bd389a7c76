"""Padded tokens of a step in every layout, with the prompts of real questions.

Prompts are those of the given SciKnowEval files, through the chat template of a tokenizer. Responses have random lengths:
log-normal with a given mean, cut at a limit. Half of them are successes, and a teacher's prompt is the question, the template
and a success, as in SDPO. The layouts and the division into passes are the package's own. Nothing is computed by a model.

Run: ``python -m benchmarks.padding --data FOLDER --tokenizer FOLDER``.
"""

import argparse
import random
from itertools import product
from pathlib import Path
from typing import get_args

from torch import zeros
from transformers import AutoTokenizer

from benchmarks import measure
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.data.sciknoweval import Domain, SciKnowEval
from pgpo_lightning.models.packing import Packing, PaddedTokens
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.mini_batches import micro_batches, prompts_of

SAMPLES, SIGMA = 8, 0.6  # responses of a question; standard deviation of the logarithm of their lengths
LAYOUTS = {
    "padded": Packing(),
    "padded, prompts shared": Packing("if-cheaper"),
    "no padding": Packing(padding_free=True),
    "no padding, or prompts shared": Packing("if-cheaper", padding_free=True),
}


def samples_of(
    questions: list[Question], encoder: PromptEncoder, mean: float, longest: int, rng: random.Random
) -> list[Sample]:
    """Return the samples of a step, with the prompts of their teacher."""
    word = encoder.tokens(" so")
    samples = []
    for question in questions:
        prompt = encoder.question(question)
        for i in range(SAMPLES):
            length = min(longest, max(1, round(mean * rng.lognormvariate(-(SIGMA**2) / 2, SIGMA))))
            ids = (word * length)[:length]
            rollout = Rollout(question, prompt, ids, zeros(length), encoder.text(ids), True)
            samples.append(Sample(rollout, Verdict(float(i % 2))))
    limits = {"num_generations": SAMPLES, "max_prompt_length": 2048, "success_threshold": 0.5}
    teaching = SelfTeaching(TeacherConfig(), RepromptConfig(), encoder, **limits)
    teaching.builder.attach(samples, encoder.messages, encoder.tokens, encoder.text, rng)
    return samples


def counted(samples: list[Sample], budget: int, packings: list[Packing]) -> tuple[list[int], list[int], int]:
    """Return tokens that pass through student and teacher, tokens without padding, and the number of passes."""
    groups = micro_batches(samples, budget, prompts_of, packings)
    loads, real = [0, 0], [0, 0]
    for group, which in product(groups, (0, 1)):
        load = PaddedTokens(packings[min(which, len(packings) - 1)])
        for sample in group:
            prompt = tuple(prompts_of(sample)[which])
            load = load.plus(prompt, sample.length).keep(prompt)
        loads[which] += load.tokens()
        real[which] += load.real
    return loads, real, len(groups)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with a folder per domain, as in SDPO's repository")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--domains", nargs="+", choices=get_args(Domain), default=["chemistry", "biology"])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--means", nargs="+", type=float, default=[300, 1200], help="mean tokens of a response")
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=16384, help="`update.micro_batch_tokens`")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(arguments.tokenizer), enable_thinking=False)
    rows = []
    for domain, mean in product(arguments.domains, arguments.means):
        rng = random.Random(0)
        data = SciKnowEval(domain, path=arguments.data).load("train")
        samples = samples_of(rng.sample(data, arguments.questions), encoder, mean, arguments.longest, rng)
        for name, packing in LAYOUTS.items():
            (student, teacher), real, passes = counted(samples, arguments.budget, [packing])
            sizes = {
                "student": student,
                "teacher": teacher,
                "of real": (student + teacher) / sum(real),
                "passes": passes,
            }
            rows.append({"domain": domain, "mean response": mean, "layout": name, **sizes})
    columns = {
        "domain": "",
        "mean response": "g",
        "layout": "",
        "student": ",",
        "teacher": ",",
        "of real": ".2f",
        "passes": "",
    }
    measure.print_table("Tokens that pass through the model in a step", rows, columns)
    measure.write_json(rows, arguments.json)


if __name__ == "__main__":
    main()

"""SDPO's update without data, trainer and logging: random Qwen3 models, synthetic rollouts, seconds of every part."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.initialization import no_init_weights

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.models.layouts import packings
from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.models.loading import load_tokenizer
from pgpo_lightning.models.recomputation import recompute_activations
from pgpo_lightning.objectives.configs import DivergenceConfig
from pgpo_lightning.objectives.distillation import DistillationObjective
from pgpo_lightning.rollout import transformers_engine as rollout
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.configs import ModelConfig, UpdateConfig
from pgpo_lightning.training.learner import Learner, Step

FIRST_ID = 16  # of synthetic tokens: above the special ones


def random_qwen3(
    device: str, dtype: torch.dtype, tied: bool = False, tiled: bool = False, **shape: int
) -> Qwen3ForCausalLM:
    """Build a Qwen3 with random weights where it is going to live.

    Args:
        device: Where.
        dtype: Type of the weights.
        tied: Whether the head is the embedding.
        tiled: Repeat a million random numbers in place of new ones, which would take a minute for a billion weights.
        shape: Shape of the model.
    """
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights() if tiled else nullcontext():
            model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=tied))
    finally:
        torch.set_default_dtype(default)
    if tiled:
        numbers = torch.randn(2**20, dtype=torch.float32).mul_(0.02).to(dtype)
        for parameter in model.parameters():
            for part in parameter.data.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)]) if parameter.ndim > 1 else part.fill_(1)
    return model


def token_ids(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    """Draw token ids."""
    return [rng.randrange(FIRST_ID, vocabulary) for _ in range(count)]


def synthetic_rows(rows: int, prompt: int, reprompt: int, response: int, vocabulary: int) -> list[Sample]:
    """Make rows of a step, all with a teacher; responses are a quarter shorter to a quarter longer than `response`."""
    rng = random.Random(0)
    made = []
    for i in range(rows):
        ids = token_ids(rng, round(response * rng.uniform(0.75, 1.25)), vocabulary)
        log_probs = torch.full((len(ids),), -math.log(vocabulary))
        question = Question("?", "1", index=i // 8)
        one = Rollout(question, token_ids(rng, prompt, vocabulary), ids, log_probs, "", True)
        made.append(Sample(one, Verdict(float(i % 2)), token_ids(rng, reprompt, vocabulary)))
    return made


class Standalone:
    """SDPO's optimizer step on samples that are ready for it, under bf16 autocast on a GPU.

    Args:
        model: The student.
        optimizer: From parameters to an optimizer.
        update: Limits of passes.
        teacher: Whose weights the teacher has.
        divergence: Which divergence.

    Attributes:
        seconds: Seconds of every part of the last step; CPU seconds on a CPU.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        update: UpdateConfig = UpdateConfig(),
        teacher: TeacherConfig = TeacherConfig(),
        divergence: DivergenceConfig = DivergenceConfig(),
        model_config: ModelConfig = ModelConfig(),
    ) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.model, self.device = model, model.device
        self.tokenizer = load_tokenizer("toy")  # for its padding and end-of-sequence ids only
        if model_config.gradient_checkpointing:
            recompute_activations(model, model_config.selective_ac_option)
        model.train()
        reprompt = RepromptConfig(max_reprompt_len=2)
        teaching = SelfTeaching(
            teacher,
            reprompt,
            PromptEncoder(self.tokenizer, enable_thinking=False),
            num_generations=8,
            max_prompt_length=1,
            success_threshold=0.5,
        )
        self.teacher = teaching.make(model)
        longest = model.config.max_position_embeddings
        self.learner = Learner(
            model,
            DistillationObjective(teaching, divergence),
            update,
            teacher=self.teacher,
            pad_token_id=self.tokenizer.pad_token_id,
            packings=packings(model, longest, update.padding_free),
        )
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        self._watch(model, "student_forward")
        if hasattr(self.teacher, "model"):  # a live one has none of its own
            self._watch(self.teacher.model, "teacher_forward")

    def accumulate(self, samples: list[Sample]) -> Step:
        """Compute the gradients of a step."""
        mixed = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with mixed:
            return self.learner.accumulate(samples, self.backward)

    def step(self, samples: list[Sample]) -> float:
        """One update on samples that are ready for it; return its loss."""
        self.seconds.clear()
        with self.timed("gradients"):
            step = self.accumulate(samples)
        with self.timed("optimizer"):
            updated = self.learner.apply(self.optimizer, step)
        with self.timed("teacher_update"):
            if updated:
                self.learner.move_teacher()
        parts = ("teacher_forward", "student_forward", "backward")
        self.seconds["loss"] = self.seconds.pop("gradients") - sum(self.seconds[part] for part in parts)
        return step.loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        with self.timed("backward"):
            loss.backward()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what the block takes to the seconds of a part."""
        start = self._now()
        yield
        self.seconds[part] += self._now() - start

    def _now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _watch(self, model: Qwen3ForCausalLM, part: str) -> None:
        started: list[float] = []
        decoder(model).register_forward_pre_hook(lambda *_: started.append(self._now()))

        def stop(*_: Any) -> None:
            self.seconds[part] += self._now() - started.pop()

        decoder(model).register_forward_hook(stop)


@contextmanager
def fixed_lengths(lengths: list[int]) -> Iterator[None]:
    """Let sampled responses end after so many tokens each: ends are put in and taken out, everything else is as it is."""
    draw, ends = rollout._next_token, rollout.end_tokens
    wanted = torch.tensor(lengths)

    def drawing(p: Tensor, uniform: Tensor, top_p: float, active: Tensor, ages: Tensor) -> Tensor:
        nonlocal wanted
        wanted = wanted.to(active.device)
        token = draw(p, uniform, top_p, active, ages).clamp(min=FIRST_ID)
        return torch.where(ages + 1 >= wanted[active], 1, token)

    rollout._next_token, rollout.end_tokens = drawing, lambda *_: {1}
    try:
        yield
    finally:
        rollout._next_token, rollout.end_tokens = draw, ends

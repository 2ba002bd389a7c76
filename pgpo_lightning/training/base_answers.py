"""Held-out answers of the untrained model, which runs with the same model, prompts, sampling and seeds share.

Every arm of a study evaluates the base model before its first step, and with the same seed all arms get the same answers. The
first run writes them to a file, the others read it. The file of a batch is named by a SHA-256 over everything that the answers
depend on (:meth:`BaseAnswers._key`). A run with another model, prompt, batch, seed, sampling, precision or machine has another
name and finds nothing. Verdicts are not stored: each run judges the answers with its own verifier, and computes
`evaluation.solution_column` itself.
"""

import base64
import hashlib
import json
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.core.errors import PACKAGES
from pgpo_lightning.core.files import replacing
from pgpo_lightning.core.run_settings import describe, tokenizer_identity
from pgpo_lightning.core.types import Question, Rollout
from pgpo_lightning.rollout.engine import Engine, Sampling

Generate = Callable[[PreTrainedModel, list[Question], list[list[int]], int, Sampling], list[Rollout]]
"""From model, questions, prompts, responses per prompt and sampling to rollouts."""


class BaseAnswers:
    """A folder of answers, one file per batch of an evaluation before the first step.

    Args:
        folder: Where the files are. Runs that write the same file at the same time both compute it, and the last one stays.
        engine: Samples the answers.
        tokenizer: The student's.

    Attributes:
        found: Batches that were read and not sampled, since the last :meth:`start`.
    """

    def __init__(self, folder: str | Path, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.engine, self.tokenizer = Path(folder), engine, tokenizer
        self.found = 0
        self._open, self._model = False, ""

    def start(self) -> None:
        """Start an evaluation; the weights of the student are hashed at its first batch."""
        self._open, self._model, self.found = True, "", 0

    def stop(self) -> None:
        """End the evaluation."""
        self._open = False

    def covers(self, step: int) -> bool:
        """Return whether an evaluation before the first step is under way, alone and with an engine that repeats itself.

        Args:
            step: Batches trained on so far.
        """
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self._open and step == 0 and not several and "repeats" in vars(type(self.engine))

    def generate(
        self,
        generate: Generate,
        model: PreTrainedModel,
        questions: list[Question],
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
    ) -> list[Rollout]:
        """Return the answers of the file, or sample and write them.

        A file that is damaged is reported by a warning and written anew. So is a folder that cannot be written to, without
        further effect.

        Args:
            generate: Samples them.
            model: The student.
            questions: What is asked.
            prompts: Their token ids.
            n: Responses per question.
            sampling: How.
        """
        self._model = self._model or hash_of_model(model)
        path = self.folder / f"{self._key(model, prompts, n, sampling)}.json"
        asked = [(question, prompt) for question, prompt in zip(questions, prompts, strict=True) for _ in range(n)]
        if (rollouts := _read(path, asked)) is not None:
            self.found += 1
            return rollouts
        rollouts = generate(model, questions, prompts, n, sampling)
        try:
            _write(path, rollouts)
        except OSError as error:
            warnings.warn(
                f"The answers of the base model could not be written to {path}, so other runs cannot share them: "
                f"{error.strerror}. Set `evaluation.base_answers` to a folder that can be written to, or to null.",
                stacklevel=2,
            )
        return rollouts

    def _key(self, model: PreTrainedModel, prompts: list[list[int]], n: int, sampling: Sampling) -> str:
        device, kind = model.device, model.device.type
        depends_on = {
            "model": self._model,
            "tokenizer": [tokenizer_identity(self.tokenizer), self.tokenizer.eos_token_id, self.tokenizer.pad_token_id],
            "prompts": prompts,  # the whole batch: in another one, logits may differ in their last bits
            "samples": n,
            "sampling": asdict(sampling),
            "engine": describe(self.engine),
            "code": _code(),
            "packages": _packages(),
            "machine": [
                platform.node(),
                platform.machine(),
                torch.backends.cpu.get_cpu_capability(),
                torch.get_num_threads(),
            ],
            "device": [str(device), torch.cuda.get_device_name(device) if is_gpu(device) else ""],
            "precision": [
                str(torch.get_default_dtype()),
                str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "",
                torch.get_float32_matmul_precision(),
                torch.are_deterministic_algorithms_enabled(),
            ],
        }
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def hash_of_model(model: PreTrainedModel) -> str:
    """Return a SHA-256 of a model: class, configuration, and name, type, shape and bytes of every weight."""
    found = hashlib.sha256()
    settings = [
        type(model).__qualname__,
        model.config.to_json_string(use_diff=False),
        str(model.config._attn_implementation),
    ]
    found.update(json.dumps([*settings, model.generation_config.to_json_string(use_diff=False)]).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(f"{name} {value!r}".encode())
    return found.hexdigest()


@lru_cache(maxsize=1)
def _code() -> str:
    """Return a SHA-256 of this package, which changes more often than its version."""
    folder, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + b"\n" + path.read_bytes())
    return found.hexdigest()


@lru_cache(maxsize=1)
def _packages() -> dict[str, str]:
    found = {}
    for package in (*PACKAGES, "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write(path: Path, rollouts: list[Rollout]) -> None:
    rows = [
        {
            "ids": _packed(np.asarray(rollout.response_ids, dtype="<i4")),
            "log_probs": _packed(rollout.log_probs.numpy().astype("<f4")),
            "text": rollout.text,
            "finished": rollout.finished,
        }
        for rollout in rollouts
    ]
    content = json.dumps(rows).encode()
    with replacing(path) as file:
        file.stream.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _read(path: Path, asked: list[tuple[Question, list[int]]]) -> list[Rollout] | None:
    """Return the rollouts of a file, or None if there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"{path} is ignored, because it cannot be read: {error.strerror}.", stacklevel=3)
        return None
    digest, _, content = data.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest or len(rows := json.loads(content)) != len(asked):
        warnings.warn(f"{path} is ignored and written anew, because it is not what was written.", stacklevel=3)
        return None
    return [_rollout(row, *each) for row, each in zip(rows, asked, strict=True)]


def _rollout(row: dict[str, Any], question: Question, prompt: list[int]) -> Rollout:
    ids = np.frombuffer(base64.b64decode(row["ids"]), dtype="<i4").tolist()
    log_probs = torch.from_numpy(np.frombuffer(base64.b64decode(row["log_probs"]), dtype="<f4").astype(np.float32))
    return Rollout(question, prompt, ids, log_probs, row["text"], row["finished"])


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()

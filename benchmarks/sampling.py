"""CPU seconds, passes and row-tokens of sampling, for some shapes of a step.

A row-token is a pass of one response by one token. It is wasted where the response has ended. Responses end with a probability
per token, so their lengths are geometric. The program touches no more than :class:`TransformersEngine`: run from another commit's
folder (``PYTHONPATH=FOLDER python benchmarks/sampling.py``), it measures that commit.

Run: ``python -m benchmarks.sampling --shapes quickstart trl prompts-2048 uneven``.
"""

import argparse
import json
import random
import time
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.core.types import Question
from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.rollout import transformers_engine
from pgpo_lightning.rollout.engine import Sampling

SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": {"questions": 32, "prompt": (30, 50), "limit": 32, "mean": 24, "layers": 3, "vocabulary": 239},
    "trl": {"questions": 64, "prompt": (40, 40), "limit": 32},
    "prompts-512": {"questions": 8, "prompt": (512, 512), "limit": 32},
    "prompts-2048": {"questions": 4, "prompt": (2048, 2048), "limit": 32},
    "uneven": {"questions": 32, "prompt": (30, 60), "limit": 256, "mean": 48, "at_once": 64},
}
"""By name: questions, tokens of prompts, of responses at most and in the mean (without it none ends), and places."""
SAMPLES = 8


class Words:
    """Stands in for a tokenizer: the text of a response is of no interest here."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return nothing."""
        return ""


def model_of(layers: int, vocabulary: int) -> Qwen3ForCausalLM:
    """Return a random model with four heads, two of keys."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **sizes, **heads, **ends)).eval()


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Sample a step some times after one that does not count, and return what it took."""
    shape = {"mean": None, "layers": 4, "vocabulary": 2048, "at_once": None} | SHAPES[name]
    model, rng = model_of(shape["layers"], shape["vocabulary"]), random.Random(0)
    count, lengths = shape["questions"], shape["prompt"]
    prompts = [[rng.randrange(6, shape["vocabulary"]) for _ in range(rng.randint(*lengths))] for _ in range(count)]
    asked = [Question(f"question {i}", "1", index=i) for i in range(count)]
    sampling = Sampling(shape["limit"], seeds=[derive_seed("sampling", i) for i in range(count)])
    ends = set(range(2, 2 + round(shape["vocabulary"] / shape["mean"]))) if shape["mean"] else {10**9}
    transformers_engine.end_tokens = lambda *_: ends
    rows: list[int] = []

    def watch(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        ids = inputs["input_ids"]
        rows.append(len(ids) if ids.size(1) == 1 else 0)

    decoder(model).register_forward_pre_hook(watch, with_kwargs=True)
    engine, seconds = transformers_engine.TransformersEngine(shape["at_once"]), []
    for _ in range(1 + repeats):
        rows.clear()
        start = time.process_time()
        rollouts = engine.generate(model, Words(), asked, prompts, SAMPLES, sampling)
        seconds.append(round(time.process_time() - start, 3))
    useful = sum(len(rollout.response_ids) - 1 for rollout in rollouts)
    return {"shape": name, "seconds": seconds[1:], "row_tokens": sum(rows), "useful": useful, "passes": len(rows)}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print a line of JSON per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = []
    for name in args.shapes:
        found.append(measure(name, args.repeats))
        print(json.dumps(found[-1]), flush=True)
    return found


if __name__ == "__main__":
    main()

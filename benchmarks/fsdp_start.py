"""Host memory of a start under FSDP2: by shards, and with whole models that are sharded afterwards.

Every rank is a process on a CPU. Its model is a random Qwen3 in bf16 files, trained in fp32 with the EMA teacher. Printed is the
resident memory of all ranks together above that before the model is read: the peak (``VmHWM``), and when the first step begins.
Both ways take the same step, whose loss and gradient norm stand beside it::

    python -m benchmarks.fsdp_start --layers 12 --hidden 1024
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure import print_table, status, trim
from pgpo_lightning import SDPO
from pgpo_lightning.core.types import Question
from pgpo_lightning.data import ToyArithmetic
from pgpo_lightning.models.loading import load_model, resolve_model
from pgpo_lightning.teachers.configs import RepromptConfig
from pgpo_lightning.training.configs import ModelConfig
from tests.support.processes import finish, start_ranks

WAYS = ("shards", "whole")
COLUMNS = {
    "way": "s",
    "ranks": "d",
    "model_mib": ".0f",
    "peak_mib": ".0f",
    "start_mib": ".0f",
    "loss": ".6f",
    "norm": ".6f",
}


def write_model(folder: Path, layers: int, hidden: int) -> float:
    """Write a random model in bf16 with the toy's tokenizer, and return its MiB in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("toy"))
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32, max_position_embeddings=512,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return 4 * sum(parameter.numel() for parameter in model.parameters()) / 2**20


def odd(question: Question, response: str) -> float:
    """Return 1 for a response of an odd number of characters: a random model is right about every second time."""
    return float(len(response) % 2)


class Start(L.Callback):
    """Notes the memory when training starts, and what the first step gave."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the process's status."""
        self.peak, self.now = status("VmHWM"), status("VmRSS")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: SDPO, *_: object) -> None:
        """Read what the step has reported."""
        self.loss, self.norm = pl_module.reported["actor/pg_loss"], pl_module.reported["actor/grad_norm"]


def rank(folder: Path, way: str) -> None:
    """Start a run as one of several ranks, and write what it took into the folder."""
    torch.set_num_threads(1)
    trim()
    ranks, own = int(os.environ["WORLD_SIZE"]), Start()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = status("VmRSS")
    module = SDPO(
        str(folder / "model") if way == "shards" else load_model(str(folder / "model")),
        odd,
        num_generations=4,
        max_prompt_length=64,
        max_response_length=16,
        reprompt=RepromptConfig(max_reprompt_len=128),
        model_config=ModelConfig(tokenizer=str(folder / "model")),
        seed=0,
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[own],
        strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False),
    )  # fmt: skip
    trainer.fit(module, ToyArithmetic(batch_size=ranks, limit_train=8))
    found = {"peak_mib": own.peak - before, "start_mib": own.now - before, "loss": own.loss, "norm": own.norm}
    (folder / f"{way}.{trainer.global_rank}.json").write_text(json.dumps(found))


def start(folder: Path, way: str, ranks: int) -> dict[str, float]:
    """Start all ranks of a run, and return the sums of their memory."""
    words = ["benchmarks.fsdp_start", "--rank", way, "--folder", folder]
    finish(*start_ranks(words, folder / f"{way}.log", ranks), log=folder / f"{way}.log")
    found = [json.loads((folder / f"{way}.{i}.json").read_text()) for i in range(ranks)]
    memories = {name: sum(each[name] for each in found) for name in ("peak_mib", "start_mib")}
    return memories | {name: found[0][name] for name in ("loss", "norm")}


def main(arguments: list[str] | None = None) -> list[dict[str, float | str]]:
    """Start both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", choices=WAYS, help=argparse.SUPPRESS)  # of the processes that this one starts
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        rank(options.folder, options.rank)
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder / "model", options.layers, options.hidden)
        rows = [
            {"way": way, "ranks": options.ranks, "model_mib": size, **start(folder, way, options.ranks)} for way in WAYS
        ]
    print_table(f"{options.ranks} ranks, {options.layers} layers, hidden size {options.hidden}", rows, COLUMNS)
    return rows


if __name__ == "__main__":
    main()

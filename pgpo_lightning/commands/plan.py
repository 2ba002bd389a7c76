"""The command ``pgpo plan``: predict memory and seconds of a configuration, without loading anything."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LightningArgumentParser
from transformers.utils import logging as transformers_logging

from pgpo_lightning.commands.building import BuildCommand
from pgpo_lightning.commands.plan_evaluations import evaluated_at_once, evaluations_of
from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.core.settings import Count, Decay, Positive, check
from pgpo_lightning.memory_planner.adapters import Adapters
from pgpo_lightning.memory_planner.cards import CARDS, Assumptions, Rates, default_card, rates
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.external import External
from pgpo_lightning.memory_planner.memory import GIB, Sharding
from pgpo_lightning.memory_planner.parameters import configuration, skeleton
from pgpo_lightning.memory_planner.plan import AVERAGING, MemoryPlan, RunSpec, plan_memory
from pgpo_lightning.memory_planner.plan_report import plan_content, plan_table
from pgpo_lightning.memory_planner.seconds import step_seconds
from pgpo_lightning.memory_planner.seconds_report import beside, beside_table, seconds_content, seconds_table
from pgpo_lightning.memory_planner.workload import EngineKind, Lengths
from pgpo_lightning.modules import HAPO, OnPolicyModule
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from pgpo_lightning.rollout.vllm_engine import VLLMEngine
from pgpo_lightning.training.start_up import check_positions, check_reduction

PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {  # type of the weights, type of autocast
    "32-true": (None, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
}
_OLD = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}


@dataclass
class PlanOptions:
    """What `pgpo plan` takes beside the arguments of `pgpo fit`.

    Args:
        memory: Memory of a device in GiB; by default that of this machine's device, if any.
        json: File to write the answer to, as JSON.
        shapes: Folder with the model's config.json, if it is not in `model`.
        device: cuda or cpu; by default that of `trainer.accelerator`.
        prompt_tokens: Mean tokens of a student's prompt; by default its limit.
        reprompt_tokens: Mean tokens of a teacher's prompt; by default its limit.
        response_tokens: Mean tokens of a response; by default its limit.
        demonstration_tokens: Mean tokens of HAPO's demonstrations, one in every group; by default their limit.
        spread: Response lengths are mean * (1 ± spread).
        card: Card that seconds are predicted for: h100, h200, a100, l40s, l4, a10, rtx4090, or cpu with assume.tflops and
            assume.bandwidth; by default the local GPU, else one with `memory`, else h100.
        questions: Held-out questions; by default the number that the data knows.
        measured: Folder of a finished run, such as runs/x/version_0, whose seconds are printed beside the predicted ones.
    """

    memory: float | None = None
    json: str | None = None
    shapes: str | None = None
    device: str | None = None
    prompt_tokens: int | None = None
    reprompt_tokens: int | None = None
    response_tokens: int | None = None
    demonstration_tokens: int | None = None
    spread: float = 0.0
    card: str | None = None
    questions: int | None = None
    measured: str | None = None


class PlanCommand(BuildCommand):
    """Parses the arguments of `pgpo fit`, and predicts memory and compute."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the assumptions, and where to write the answer."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PlanOptions, instantiate=False)
        parser.add_class_arguments(Assumptions, "assume")

    def adapt(self, model: Any) -> None:
        """Use a tokenizer that needs no download."""
        config = model.init_args.model_config
        getattr(config, "init_args", config).tokenizer = "toy"

    def run(self) -> RunSpec:
        """Return the settings that memory and compute depend on.

        Raises:
            ValueError: If a setting is not understood; names the field.
        """
        module, trainer = self.model, self._get(self.config, "trainer")
        options = {name: self._get(self.config, name) for name in ("memory", "shapes", "device", "spread")}
        config = _config(module, options["shapes"])
        module.model = skeleton(config)
        check_positions(module.model, module.longest_prompt, module.max_response_length)
        module.model = None
        device: Literal["cuda", "cpu"] = options["device"] or ("cpu" if trainer.accelerator == "cpu" else "cuda")
        compute = _compute(module, str(trainer.precision))
        limits = (module.actor.max_prompt_length, module.longest_prompt, module.max_response_length)
        means = [self._get(self.config, f"{name}_tokens") for name in ("prompt", "reprompt", "response")]
        lengths = [limit if mean is None else mean for mean, limit in zip(means, limits, strict=True)]
        prompt, reprompt, response = lengths
        check("spread", options["spread"], Decay)
        for name, length, limit in zip(("prompt", "reprompt", "response"), lengths, limits, strict=True):
            check(f"{name}_tokens", length, Count)
            if length > limit:
                raise ValueError(
                    f"Expected `{name}_tokens` to be at most the configured limit {limit}, but got {length}."
                )
        demonstration = _demonstration(module, self._get(self.config, "demonstration_tokens"))
        adapters = _adapters(module, str(trainer.precision))
        engine, teaching, divergence = module.engine, module.objective.teaching, module.objective.divergence
        sharding = _sharding(trainer, device)
        check_reduction(module.update, sharding.kind == "fsdp")
        reduces = module.update.reduce_every_pass
        trained = compute.student if adapters is None else adapters.dtype
        reduces = trained == torch.float32 if reduces is None else reduces
        data, sharding = self.datamodule, replace(sharding, reduces=reduces)
        tests = evaluations_of(trainer, module, data, self._get(self.config, "questions"))
        at_once = engine.max_sequences if isinstance(engine, TransformersEngine) else None
        return RunSpec(
            config=config,
            compute=compute,
            optimizer=module.optimization.make_optimizer,
            teacher="none" if teaching is None else teaching.config.kind,
            lengths=Lengths(prompt, reprompt, response, options["spread"], module.max_response_length),
            questions=data.batch_size,
            samples=module.num_generations,
            longest_response=module.max_response_length,
            at_once=at_once,
            captured=isinstance(engine, TransformersEngine) and engine.cuda_graphs,
            micro_batch_tokens=module.update.micro_batch_tokens,
            padding_free=_padding_free(module),
            updates=module.update.updates_per_batch,
            passes=module.update.num_iterations,
            top_k=divergence is not None and divergence.partial(config.get_text_config().vocab_size),
            independent=teaching is not None and teaching.builder.demonstration_choice == "independent",
            evaluated=evaluated_at_once(tests, module.evaluator.config.samples, sharding.devices, at_once),
            eval_samples=module.evaluator.config.samples,
            nucleus=module.evaluator.config.top_p < 1,
            sharding=sharding,
            device=device,
            adapters=adapters,
            offload=teaching is not None and teaching.config.offload,
            demonstration=demonstration,
            keep=self._get(self.config, "checkpoint").keep,
            external=_external(module),
            contrasted=module.objective.contrasted,
            recomputes_logits=module.objective.recomputes_logits,
            reference=module.objective.has_reference,
            engine=_engine(engine),
            engine_memory=self._engine_memory(engine, device),
            engine_sleeps=isinstance(engine, VLLMEngine) and engine.local["enable_sleep_mode"],
            evaluations=tests,
            nodes=trainer.num_nodes,
        )

    def _engine_memory(self, engine: Engine, device: str) -> float:
        memory = self._get(self.config, "memory")
        if not isinstance(engine, VLLMEngine) or engine.server is not None or (memory is None and device == "cpu"):
            return 0.0
        card = self._get(self.config, "card") or default_card(memory)
        return float(engine.local["gpu_memory_utilization"] * (memory or CARDS[card].memory))

    def rates(self, run: RunSpec) -> Rates | None:
        """Return the rates of the card; None for a CPU without given rates."""
        card, assumed = self._get(self.config, "card"), self._get(self.config_init, "assume")
        if card is None and run.device == "cpu" and assumed.tflops is None:
            return None
        if card is None:
            card = "cpu" if run.device == "cpu" else default_card(self._get(self.config, "memory"))
        return rates(card, assumed, run.compute.narrow, run.nodes)


def _engine(engine: Engine) -> EngineKind:
    if isinstance(engine, VLLMEngine):
        return "vllm" if engine.server is None else "vllm server"
    return "transformers"


def _padding_free(module: OnPolicyModule) -> bool:
    setting = module.update.padding_free
    attention = module.student.config.attn_implementation or ""
    return attention.startswith("flash_attention") if setting is None else setting


def _demonstration(module: OnPolicyModule, tokens: int | None) -> int | None:
    if not isinstance(module, HAPO):
        if tokens is not None:
            raise ValueError(
                f"Expected no `demonstration_tokens` with {type(module).__name__}, which uses no demonstrations, "
                f"but got {tokens}."
            )
        return None
    limit = module.max_response_length
    if tokens is not None and not 1 <= tokens <= limit:
        raise ValueError(
            f"Expected `demonstration_tokens` to lie between 1 and the configured limit {limit}, but got {tokens}."
        )
    return limit if tokens is None else tokens


def _adapters(module: OnPolicyModule, precision: str) -> Adapters | None:
    if (quantization := module.student.quantization) is not None:
        raise ValueError(f"Expected no `quantization`, whose bytes are not known here, but got {quantization}.")
    if module.lora is None:
        return None
    targets = module.lora.target_modules
    targets = [targets] if isinstance(targets, str) else targets
    half = PRECISIONS[_OLD.get(precision, precision)][0]  # Lightning converts adapters as well
    return Adapters(module.lora.r, tuple(targets), half or torch.float32)


def _config(module: OnPolicyModule, shapes: str | None) -> Any:
    given = module.student.given
    if not isinstance(given, str):
        return given.config
    loading = {name: module.student.loading[name] for name in ("revision", "trust_remote_code")}
    if shapes is not None and not (Path(shapes) / "config.json").exists():
        raise ValueError(f"Expected `shapes` to be a folder with a config.json, but got {shapes}.")
    return configuration(shapes or given, **loading)


def _external(module: OnPolicyModule) -> External | None:
    teaching = module.objective.teaching
    if teaching is None or teaching.config.model is None:
        return None
    given = teaching.config
    trusts = module.student.config.trust_remote_code
    return External(configuration(given.model or "", given.revision, trusts), given.quantization)


def _compute(module: OnPolicyModule, precision: str) -> Compute:
    precision = _OLD.get(precision, precision)
    if precision not in PRECISIONS:
        raise ValueError(f"Expected `trainer.precision` to be one of {', '.join(PRECISIONS)}, but got {precision}.")
    forced, autocast = PRECISIONS[precision]
    student = forced or getattr(torch, module.student.config.dtype)
    teacher, teaching = student, module.objective.teaching
    if teaching is not None and teaching.config.kind in AVERAGING:
        teacher = getattr(torch, teaching.config.dtype or "float32")
    elif teaching is not None and teaching.config.dtype is not None:
        teacher = getattr(torch, teaching.config.dtype)
    elif teaching is not None and teaching.config.quantization is not None:  # not converted with the student
        teacher = getattr(torch, module.student.config.dtype)
    return Compute(
        student,
        teacher,
        autocast,
        module.student.config.gradient_checkpointing,
        module.student.config.attn_implementation,
        selective=module.student.config.selective_ac_option,
    )


def _sharding(trainer: Any, device: str) -> Sharding:
    strategy = trainer.strategy
    name = (strategy if isinstance(strategy, str) else strategy.class_path).rpartition(".")[2]
    arguments = {} if isinstance(strategy, str) else strategy.get("init_args", {})
    check("trainer.num_nodes", trainer.num_nodes, Count)
    devices = _devices(trainer.devices, device) * trainer.num_nodes
    if name in ("auto", "SingleDeviceStrategy"):
        return Sharding(devices, "ddp" if devices > 1 else "single")
    if name in (
        "DDPStrategy",
        "ddp",
        "ddp_spawn",
        "ddp_find_unused_parameters_true",
        "ddp_find_unused_parameters_false",
    ):
        return Sharding(devices, "ddp")
    if name == "ModelParallelStrategy":
        tensor = arguments.get("tensor_parallel_size", "auto")
        if tensor != 1:
            raise ValueError(
                f"Expected `trainer.strategy.init_args.tensor_parallel_size` to be 1, but got {tensor}: only weights are "
                "sharded here, not the computation."
            )
        return Sharding(devices, "fsdp", one_file=not arguments.get("save_distributed_checkpoint", True))
    raise ValueError(f"Expected `trainer.strategy` to be auto, ddp or ModelParallelStrategy, but got {name}.")


def _devices(devices: Any, device: str) -> int:
    if isinstance(devices, list):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if is_gpu(device) else 1
    if isinstance(devices, str) and "," in devices:
        return len(devices.split(","))
    count = int(devices) if str(devices).isdecimal() else devices
    check("trainer.devices", count, Count)
    return count


def main(args: list[str]) -> MemoryPlan:
    """Run the command.

    Args:
        args: As for ``pgpo fit``, with ``--memory``, ``--json`` and assumed lengths.
    """
    transformers_logging.set_verbosity_error()
    command = PlanCommand(args)
    memory, path, folder = (command._get(command.config, name) for name in ("memory", "json", "measured"))
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
    check("memory", memory, Positive | None)
    plan = plan_memory(command.run())
    print(plan_table(plan, memory))
    content = plan_content(plan, memory)
    if (reached := command.rates(plan.run)) is not None:
        found = step_seconds(plan.run, reached)
        print(f"\n{seconds_table(found)}")
        content["seconds"] = seconds_content(found)
    if folder is not None:
        if reached is None:
            raise ValueError("Expected `assume.tflops` and `assume.bandwidth` with `measured` on a CPU, but got null.")
        content["measured"] = rows = beside(found, read_scalars(Path(folder)))
        print(f"\n{beside_table(rows, folder)}")
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return plan

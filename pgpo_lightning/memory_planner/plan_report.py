"""A memory plan as a Markdown table and as JSON."""

from dataclasses import asdict
from typing import Any

import torch

from pgpo_lightning.memory_planner.memory import GIB
from pgpo_lightning.memory_planner.plan import MemoryPlan

_ROOM = 0.92
"""Fraction of a device that tensors may fill. The rest is for its context, libraries and fragmentation."""


def verdict(plan: MemoryPlan, memory: float) -> str:
    """Return whether the highest peak fits a device.

    Args:
        plan: The plan.
        memory: GiB of the device.
    """
    phase, peak = max(plan.need.peaks.items(), key=lambda item: item[1])
    need = peak / GIB
    if need <= _ROOM * memory:
        return f"fits {memory:.4g} GiB: {need:.1f} GiB in {phase}, {memory - need:.1f} to spare"
    if need <= memory:
        return f"may not fit {memory:.4g} GiB: {need:.1f} GiB in {phase} leaves less than 8 % for context and fragmentation"
    return f"does not fit {memory:.4g} GiB: {need:.1f} GiB in {phase}"


def remarks(plan: MemoryPlan) -> list[str]:
    """Return the requirements and incompatibilities of a run, except the memory of a device."""
    run, saved = plan.run, plan.saving
    room = (
        ""
        if saved.disk is None
        else f", {saved.disk / GIB:.2f} GiB with the checkpoints that are kept (`checkpoint.keep` {run.keep})"
    )
    notes = [
        f"A checkpoint takes {saved.size / GIB:.2f} GiB in the run's folder{room}, and {saved.host / GIB:.2f} GiB of the host's "
        "memory while it is written."
    ]
    if run.offload:
        notes.append(f"The teacher's {plan.host / GIB:.2f} GiB are in the host's memory, once per device.")
        if run.sharding.kind == "fsdp":
            notes.append("`pgpo fit` refuses `teacher.offload` with sharded weights; set it to false.")
    if run.external is not None and run.external.quantization is not None and run.sharding.kind == "fsdp":
        notes.append("`pgpo fit` refuses `teacher.quantization` with sharded weights; set it to null.")
    if run.sharding.kind == "fsdp":
        if plan.optimizer.name.startswith("bitsandbytes"):
            notes.append("Optimizers of bitsandbytes do not work with sharded weights; those of torchao do.")
        if run.compute.autocast == torch.float16:
            notes.append("`pgpo fit` refuses 16-mixed with sharded weights; use bf16-mixed.")
    return notes


def plan_table(plan: MemoryPlan, memory: float | None) -> str:
    """Return the plan as Markdown.

    Args:
        plan: The plan.
        memory: GiB of a device, or None for no verdict.
    """
    run, need = plan.run, plan.need
    sharding, compute = run.sharding, run.compute
    types = f"weights {_type(compute.student)}"
    types += "" if compute.autocast is None else f", products {_type(compute.autocast)}"
    if compute.checkpointing and compute.selective is not None:
        types += "; recomputes " + (
            "all but products" if compute.selective == "op" else f"1 of {compute.selective} layers"
        )
    teacher = run.teacher
    if run.external is not None:
        bits = run.external.quantization and f"{run.external.quantization.bits} bits"
        teacher += f" {_short(run.external.count().total)}, {bits or _type(compute.teacher)}"
    elif run.teacher != "none" and run.adapters is None:
        teacher += f" {_type(compute.teacher)}"
    lines = [
        f"{plan.count.total / 1e9:.3f} B parameters, {_short(plan.trainable)} trained; {types}; teacher {teacher}; "
        f"{plan.optimizer.name}, {plan.optimizer.per_parameter:.2f} bytes per trained parameter"
        + (
            f" ({plan.optimizer.state / GIB:.1f} GiB in pages that move to the host when the device is full)"
            if plan.optimizer.paged
            else ""
        ),
        f"{sharding.devices} x {run.device}, {sharding.kind}; per device and step {run.questions} questions x {run.samples}; "
        f"tokens: prompt {run.lengths.prompt}, teacher's {run.lengths.reprompt}, "
        f"response {run.lengths.response} ± {run.lengths.spread:.0%}"
        + ("" if run.demonstration is None else f", demonstration {run.demonstration} (one in every group)"),
        f"{plan.micro_batches} micro-batches; the largest: "
        + "; ".join(f"{name} {_rows(layout)}, {layout.padded} padded tokens" for name, layout in plan.largest.items()),
        "",
        "GiB per device, calculated:",
        "",
    ]
    phases = list(need.phases)
    parts = [*need.standing, *dict.fromkeys(part for each in need.phases.values() for part in each)]
    lines += [f"| | {' | '.join(phases)} |", f"|---{'|---:' * len(phases)}|"]
    for part in parts:
        cells = []
        for phase in phases:
            size = need.phases[phase].get(part, 0)
            size += 0 if part in need.absent.get(phase, ()) else need.standing.get(part, 0)
            cells.append(f"{size / GIB:.2f}" if size >= 0.005 * GIB else ("0.00" if size else ""))
        if any(cells):
            lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| **peak** | {' | '.join(f'**{peak / GIB:.2f}**' for peak in need.peaks.values())} |")
    lines += ["", "Per device and step, calculated:", "", "| | |", "|---|---:|"]
    lines += [f"| {name} | {number:,} |" for name, number in plan.tokens.items()]
    lines += [f"| {name}, TFLOP | {number / 1e12:,.4g} |" for name, number in plan.flops.items()]
    lines.append(f"| **all, TFLOP** | **{sum(plan.flops.values()) / 1e12:,.4g}** |")
    if memory is not None:
        lines += ["", verdict(plan, memory)]
    if notes := remarks(plan):
        lines += ["", *notes]
    return "\n".join(lines)


def plan_content(plan: MemoryPlan, memory: float | None) -> dict[str, Any]:
    """Return the plan for JSON, with sizes in bytes."""
    run = plan.run
    return {
        "parameters": plan.count.total,
        "trainable": plan.trainable,
        "weights": _type(run.compute.student),
        "autocast": run.compute.autocast and _type(run.compute.autocast),
        "teacher": run.teacher,
        "teacher_parameters": None if run.external is None else run.external.count().total,
        "optimizer": asdict(plan.optimizer),
        "devices": run.sharding.devices,
        "strategy": run.sharding.kind,
        "device": run.device,
        "standing_bytes": plan.need.standing,
        "host_bytes": plan.host,
        "saving_bytes": asdict(plan.saving),
        "phase_bytes": plan.need.phases,
        "absent": {phase: list(parts) for phase, parts in plan.need.absent.items()},
        "peak_bytes": plan.need.peaks,
        "tokens": plan.tokens,
        "demonstration_tokens": run.demonstration,
        "flop": plan.flops,
        "micro_batches": plan.micro_batches,
        "largest": {name: asdict(layout) for name, layout in plan.largest.items()},
        "dry_run_bytes": plan.dry_run,
        "memory_gib": memory,
        "verdict": memory and verdict(plan, memory),
        "remarks": remarks(plan),
    }


def _type(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _short(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _rows(layout: Any) -> str:
    prompts = f" on {layout.prompts} prompts of {layout.prompt}" if layout.prompts else ""
    return f"{layout.rows} x {layout.width}{prompts}"

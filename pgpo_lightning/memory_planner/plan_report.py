"""A plan as a table and as JSON."""

from dataclasses import asdict
from typing import Any

import torch

from pgpo_lightning.memory_planner.memory import GIB
from pgpo_lightning.memory_planner.plan import MemoryPlan

_ROOM = 0.92  # share of a device that tensors may fill; the rest is for its context, libraries and fragmentation


def verdict(made: MemoryPlan, memory: float) -> str:
    """Return whether the highest peak fits a device.

    Args:
        made: The plan.
        memory: GiB of the device.
    """
    phase, peak = max(made.need.peaks.items(), key=lambda item: item[1])
    need = peak / GIB
    if need <= _ROOM * memory:
        return f"fits {memory:.4g} GiB: {need:.1f} GiB in {phase}, {memory - need:.1f} to spare"
    if need <= memory:
        return f"may not fit {memory:.4g} GiB: {need:.1f} GiB in {phase} leaves less than 8 % for context and fragmentation"
    return f"does not fit {memory:.4g} GiB: {need:.1f} GiB in {phase}"


def remarks(made: MemoryPlan) -> list[str]:
    """Return what stands in the way of such a run, beside its size."""
    run, saved = made.run, made.saving
    room = (
        ""
        if saved.disk is None
        else f", {saved.disk / GIB:.2f} GiB with those that are kept (`checkpoint.keep` {run.keep})"
    )
    found = [
        f"A checkpoint takes {saved.size / GIB:.2f} GiB in the run's folder{room}; while it is written, "
        f"{saved.host / GIB:.2f} GiB of the host's memory."
    ]
    if run.offload:
        found.append(f"The teacher's {made.host / GIB:.2f} GiB are in the host's memory, for each device.")
        if run.sharding.kind == "fsdp":
            found.append("`pgpo fit` refuses `teacher.offload` with sharded weights; set it to false.")
    if run.sharding.kind == "fsdp":
        if made.optimizer.name.startswith("bitsandbytes"):
            found.append("bitsandbytes' optimizers do not work on shards; torchao's do.")
        if run.compute.autocast == torch.float16:
            found.append("`pgpo fit` refuses 16-mixed with sharded weights; take bf16-mixed.")
    return found


def table(made: MemoryPlan, memory: float | None) -> str:
    """Return the plan as Markdown.

    Args:
        made: The plan.
        memory: GiB of a device, or ``None`` for no verdict.
    """
    run, need = made.run, made.need
    sharding, compute = run.sharding, run.compute
    types = f"weights {_type(compute.student)}"
    types += "" if compute.autocast is None else f", products {_type(compute.autocast)}"
    teacher = (
        run.teacher if run.teacher == "none" or run.adapters is not None else f"{run.teacher} {_type(compute.teacher)}"
    )
    lines = [
        f"{made.count.total / 1e9:.3f} B parameters, {_short(made.trainable)} trained; {types}; teacher {teacher}; "
        f"{made.optimizer.name}, {made.optimizer.per_parameter:.2f} bytes per trained parameter"
        + (
            f" ({made.optimizer.state / GIB:.1f} GiB in pages that leave the device when it is full)"
            if made.optimizer.paged
            else ""
        ),
        f"{sharding.devices} x {run.device}, {sharding.kind}; per device and step {run.questions} questions x {run.samples}; "
        f"tokens: prompt {run.lengths.prompt}, teacher's {run.lengths.reprompt}, "
        f"response {run.lengths.response} ± {run.lengths.spread:.0%}"
        + ("" if run.demonstration is None else f", demonstration {run.demonstration} (one in every group)"),
        f"{made.micro_batches} micro-batches; the largest: "
        + "; ".join(f"{name} {_rows(layout)}, {layout.padded} padded tokens" for name, layout in made.largest.items()),
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
    lines += [f"| {name} | {number:,} |" for name, number in made.tokens.items()]
    lines += [f"| {name}, TFLOP | {number / 1e12:,.4g} |" for name, number in made.flops.items()]
    lines.append(f"| **all, TFLOP** | **{sum(made.flops.values()) / 1e12:,.4g}** |")
    if memory is not None:
        lines += ["", verdict(made, memory)]
    if notes := remarks(made):
        lines += ["", *notes]
    return "\n".join(lines)


def content(made: MemoryPlan, memory: float | None) -> dict[str, Any]:
    """Return the plan as JSON takes it; sizes in bytes."""
    run = made.run
    return {
        "parameters": made.count.total,
        "trainable": made.trainable,
        "weights": _type(run.compute.student),
        "autocast": run.compute.autocast and _type(run.compute.autocast),
        "teacher": run.teacher,
        "optimizer": asdict(made.optimizer),
        "devices": run.sharding.devices,
        "strategy": run.sharding.kind,
        "device": run.device,
        "standing_bytes": made.need.standing,
        "host_bytes": made.host,
        "saving_bytes": asdict(made.saving),
        "phase_bytes": made.need.phases,
        "absent": {phase: list(parts) for phase, parts in made.need.absent.items()},
        "peak_bytes": made.need.peaks,
        "tokens": made.tokens,
        "demonstration_tokens": run.demonstration,
        "flop": made.flops,
        "micro_batches": made.micro_batches,
        "largest": {name: asdict(layout) for name, layout in made.largest.items()},
        "dry_run_bytes": made.dry_run,
        "memory_gib": memory,
        "verdict": memory and verdict(made, memory),
        "remarks": remarks(made),
    }


def _type(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _short(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _rows(layout: Any) -> str:
    apart = f" on {layout.prompts} prompts of {layout.prompt}" if layout.prompts else ""
    return f"{layout.rows} x {layout.width}{apart}"

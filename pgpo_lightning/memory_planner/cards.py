"""Peak rates of graphics cards by their vendor's data sheets, and the rates that a run is assumed to reach."""

from dataclasses import dataclass
from functools import partial

import torch

from pgpo_lightning.core.settings import Positive, PositiveFraction, checked

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Card:
    """Peak rates of one device.

    Attributes:
        name: As in the source.
        memory: GiB that the device has for tensors.
        bf16: FLOP/s of dense products in bf16 or fp16.
        fp32: FLOP/s of products in fp32 without TF32, which is torch's default.
        bandwidth: Bytes per second of its memory.
        link: Bytes per second to another card of the machine, in one direction.
        source: Where the figures are from.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    source: str


_HOPPER = {"bf16": 989.4 * TERA, "fp32": 66.9 * TERA, "link": 450 * GIGA}
_PCIE4 = 32 * GIGA
CARDS = {
    "h100": Card("H100 SXM 80 GB", 79.6, bandwidth=3350 * GIGA, source="NVIDIA H100 data sheet", **_HOPPER),
    "h200": Card("H200 SXM 141 GB", 139.8, bandwidth=4800 * GIGA, source="NVIDIA H200 data sheet", **_HOPPER),
    "a100": Card("A100 SXM 80 GB", 79.3, 312 * TERA, 19.5 * TERA, 2039 * GIGA, 300 * GIGA, "NVIDIA A100 data sheet"),
    "l40s": Card("L40S 48 GB", 44.5, 362 * TERA, 91.6 * TERA, 864 * GIGA, _PCIE4, "NVIDIA L40S data sheet"),
    "l4": Card("L4 24 GB", 22.5, 121 * TERA, 30.3 * TERA, 300 * GIGA, _PCIE4, "NVIDIA L4 data sheet"),
    "a10": Card("A10 24 GB", 22.5, 125 * TERA, 31.2 * TERA, 600 * GIGA, _PCIE4, "NVIDIA A10 data sheet"),
    "rtx4090": Card(
        "RTX 4090 24 GB", 23.6, 165.2 * TERA, 82.6 * TERA, 1008 * GIGA, _PCIE4, "NVIDIA Ada architecture white paper"
    ),
}
"""Cards by the name that ``--card`` takes."""


@partial(checked, prefix="assume.")
@dataclass(frozen=True)
class Assumptions:
    """What seconds are calculated from, beside the card's data sheet. None of it has been measured on a GPU.

    Args:
        utilisation: Fraction of the card's peak FLOP/s that matrix products reach.
        bandwidth_utilisation: Fraction of the bandwidth of memory and links that is reached.
        launch_overhead: Seconds that the host takes for one operation of the device.
        engine_overhead: Seconds that vLLM's host code takes for one token of all responses.
        network: GB/s per device between nodes, in one direction; 400 Gbit/s by default.
        disk: GB/s of the folder through which vLLM's server gets its weights.
        tflops: TFLOP/s that matrix products reach, in place of the card's.
        bandwidth: GB/s that the memory reaches, in place of the card's.

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    utilisation: PositiveFraction = 0.6
    bandwidth_utilisation: PositiveFraction = 0.8
    launch_overhead: Positive = 8e-6
    engine_overhead: Positive = 1e-3
    network: Positive = 50.0
    disk: Positive = 1.0
    tflops: Positive | None = None
    bandwidth: Positive | None = None


@dataclass(frozen=True)
class Rates:
    """The rates that a run reaches.

    Attributes:
        name: Of the card.
        flops: FLOP/s of matrix products.
        bandwidth: Bytes per second of the memory.
        link: Bytes per second between devices, in one direction.
        overhead: Seconds of the host per operation.
        engine_overhead: Seconds of vLLM's host code per token of all responses.
        disk: Bytes per second of the folder of vLLM's server.
    """

    name: str
    flops: float
    bandwidth: float
    link: float
    overhead: float
    engine_overhead: float = 0.0
    disk: float = 1e9


def rates(card: str, assumed: Assumptions, products: torch.dtype, nodes: int = 1) -> Rates:
    """Return the rates that a run is assumed to reach.

    Args:
        card: A key of :data:`CARDS`, or ``cpu``, whose rates must be given.
        assumed: Assumptions.
        products: Type of the operands of matrix products.
        nodes: Number of machines. With several, the network is the slowest link.

    Raises:
        ValueError: If the card is unknown, or has no data sheet and a rate is missing; names the field.
    """
    found = CARDS.get(card)
    if found is None and card != "cpu":
        raise ValueError(f"Expected `card` to be one of {', '.join(CARDS)}, cpu, but got {card}.")
    if found is None and (assumed.tflops is None or assumed.bandwidth is None):
        missing = "tflops" if assumed.tflops is None else "bandwidth"
        raise ValueError(f"Expected `assume.{missing}` with `card` cpu, whose rates are in no table, but got null.")
    peak, memory, link = (0.0, 0.0, GIGA) if found is None else (found.bf16, found.bandwidth, found.link)
    if found is not None and products == torch.float32:
        peak = found.fp32
    flops = peak * assumed.utilisation if assumed.tflops is None else assumed.tflops * TERA
    bandwidth = memory * assumed.bandwidth_utilisation if assumed.bandwidth is None else assumed.bandwidth * GIGA
    link = (min(link, assumed.network * GIGA) if nodes > 1 else link) * assumed.bandwidth_utilisation
    name = "CPU" if found is None else found.name
    return Rates(name, flops, bandwidth, link, assumed.launch_overhead, assumed.engine_overhead, assumed.disk * GIGA)


def default_card(memory: float | None) -> str:
    """Return the card that a plan is for if none is named: the local GPU's, else one with the given memory, else an H100.

    Args:
        memory: GiB of a device, if known.
    """
    if torch.cuda.is_available():
        local = torch.cuda.get_device_name(0).lower().replace(" ", "")
        for name in CARDS:
            if name in local:
                return name
    known = {name: card.memory for name, card in CARDS.items() if memory and card.memory >= 0.93 * memory}
    fitting = [name for name, size in known.items() if size <= 1.07 * (memory or 0)]
    return fitting[0] if fitting else "h100"

"""A pretended GPU for a build of torch without one: data on the CPU, but a device of its own with CUDA's rules.

PyTorch's spare device type (PrivateUse1) is registered as a Python backend. Autograd, autocast and device contexts then see a
device that is not the CPU. Every operation on it is checked as CUDA would check it, counted, and computed on the CPU.

Limits: attention takes the math path, nothing is asynchronous, memory is not counted, and nothing is compiled.
"""

from tests.support.pretended_gpu.counts import Counts, counting
from tests.support.pretended_gpu.device import NAME, register
from tests.support.pretended_gpu.rules import DeviceMismatchError

__all__ = ["NAME", "Counts", "DeviceMismatchError", "counting", "register"]

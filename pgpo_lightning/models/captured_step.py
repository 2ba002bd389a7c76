"""One step that is recorded on a GPU and repeated there, so that the host need not start its operations one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CapturedStep:
    """Runs a step as a CUDA graph, from its second run on.

    The step has to work in place: what changes between two runs lies in tensors that it reads and writes, always the same ones.
    The first run is an ordinary one, in which libraries get their memory. The second captures it.

    Args:
        step: Returns its result.
        device: A GPU.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        self.step = step
        self.backend: Any = torch.get_device_module(device)
        self.pool = self.backend.graph_pool_handle()  # one for all captures, of which only the last is ever repeated
        self.forget()

    def forget(self) -> None:
        """Let the next run be the first, because the step's tensors have been replaced."""
        self.graph: Any = None
        self.result: Tensor | None = None
        self.started = False

    def __call__(self) -> Tensor:
        """Run the step. The result is overwritten by the next run."""
        if not self.started:
            self.started = True
            return self.step()
        if self.result is None:
            self.graph = self.backend.CUDAGraph()
            with self.backend.graph(self.graph, pool=self.pool):
                self.result = self.step()
        self.graph.replay()
        return self.result

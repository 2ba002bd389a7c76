"""Programs run on tests: the verifier, and the processes in which the tests run."""

from pgpo_lightning.rewards.code.verifier import CodeExecution

__all__ = ["CodeExecution"]

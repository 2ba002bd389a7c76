"""Jobs of a cluster that make the runs of a study, submitted through submitit.

A job is one more `pgpo ablate` on the study's folder: it starts the runs that nobody has started, holds locks on those it makes,
and leaves when all that is missing is made by others. Runs of a job that was preempted or reached its time limit go on from
their checkpoints when the job is started again.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgpo_lightning.core.settings import Count, Text, checked

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission

FOLDER = "jobs"
"""Within the folder of a study: what jobs print, and what they were submitted with."""


@checked
@dataclass(frozen=True)
class Cluster:
    """Jobs that share a study's runs.

    Attributes:
        jobs: Their number.
        executor: Of submitit: ``slurm``, ``local`` for processes of this machine, or null for the one that is there.
        parameters: Of each job, as `submitit.AutoExecutor.update_parameters` takes them: ``timeout_min``, ``gpus_per_node``,
            ``cpus_per_task``, ``mem_gb``, ``slurm_partition``, ...
    """

    jobs: Count
    executor: Text | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


class Worker:
    """What a job runs.

    Args:
        config: File of the study.
        processes: Number of runs at the same time in one job; by default that of the study.
    """

    def __init__(self, config: str, processes: int | None) -> None:
        self.config, self.processes = config, processes

    def __call__(self) -> None:
        """Make runs of the study until none is left to start."""
        from pgpo_lightning.commands.ablate import work  # here, because that module imports this one

        work(self.config, self.processes)

    def checkpoint(self) -> "DelayedSubmission":
        """Return what a job that is stopped by the cluster runs when it is started again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(worker: Worker, cluster: Cluster, folder: Path) -> "list[Job[None]]":
    """Submit the jobs of a study.

    Args:
        worker: What every job runs.
        cluster: The jobs.
        folder: Of the study.

    Returns:
        The jobs.

    Raises:
        ModuleNotFoundError: Without submitit, the extra `cluster`.
        ValueError: If submitit does not take `cluster.executor` or `cluster.parameters`.
    """
    if find_spec("submitit") is None:
        raise ModuleNotFoundError("`cluster` needs submitit: pip install 'pgpo-lightning[cluster]'")
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=folder / FOLDER, cluster=cluster.executor)
        executor.update_parameters(**{"name": f"pgpo-{folder.name}", **cluster.parameters})
    except (ValueError, NameError, RuntimeError) as error:
        raise ValueError(f"Expected submitit to take `cluster`, but {error}") from None
    with executor.batch():
        return [executor.submit(worker) for _ in range(cluster.jobs)]

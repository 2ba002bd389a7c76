"""What a run shows in experiment trackers beside its curves: hyperparameters, custom charts, tables of texts, a picture.

TensorBoard, W&B and MLflow get what they can display. A logger of another kind gets tables and pictures if it has the methods
`log_table` and `log_image` of Lightning's ``WandbLogger``, and curves in any case.
"""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger


def log_run(trainer: L.Trainer, facts: dict[str, Any], charts: dict[str, Any], scores: list[str]) -> None:
    """Log what a run is, before its first curve.

    TensorBoard lists the facts under HPARAMS beside the scores. Only the first such list of a folder counts there, so this has to
    come before Lightning logs the arguments of the module.

    Args:
        trainer: Of the run; the others of its ranks do nothing.
        facts: Numbers and texts by their names.
        charts: TensorBoard's custom-scalars layout.
        scores: Names of the curves that will say how good the run was.
    """
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(charts)
            writer = logger.experiment._get_file_writer()
            from torch.utils.tensorboard.summary import hparams  # loads TensorBoard

            for summary in hparams(facts, dict.fromkeys(scores, 0.0)):
                writer.add_summary(summary)
        else:
            logger.log_hyperparams({"run": facts})


def log_texts(trainer: L.Trainer, name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Log texts: as a table, in TensorBoard as Markdown.

    Args:
        trainer: Of the run.
        name: Of the table.
        rows: With the same columns.
        step: Batches trained on.
    """
    columns = list(rows[0])
    for logger in _loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, "\n\n---\n\n".join(map(_markdown, rows)), step)
        elif isinstance(logger, MLFlowLogger):
            table = {column: [row[column] for row in rows] for column in columns}
            # One table, to which every call adds rows.
            logger.experiment.log_table(logger.run_id, {"step": [step] * len(rows)} | table, f"{name}.json")
        elif hasattr(logger, "log_table"):
            data = [[step, *row.values()] for row in rows]
            logger.log_table(key=name, columns=["step", *columns], data=data, step=step)


def log_picture(trainer: L.Trainer, name: str, path: Path, step: int) -> None:
    """Log a picture. TensorBoard gets none: it draws the curves itself.

    Args:
        trainer: Of the run.
        name: Of the picture.
        path: Of its file.
        step: Batches trained on.
    """
    for logger in _loggers(trainer):
        if isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path))
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(path)], step=step)


def _loggers(trainer: L.Trainer) -> list[Logger]:
    return trainer.loggers if trainer.is_global_zero else []


def _markdown(row: dict[str, Any]) -> str:
    return "\n\n".join(f"**{name}**\n\n{_indented(str(value))}" for name, value in row.items())


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())

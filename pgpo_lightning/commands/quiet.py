"""Warnings that a user of the program cannot act on."""

import logging
import os
import warnings


def quiet() -> None:
    """Silence them. To be called before the libraries that warn are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's, not ours
    # Questions are text in memory, and workers would break the exact resume.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # The metrics synchronise the scores themselves.
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")
    # The teacher stays in evaluation mode on purpose.
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_about_this_program)


def _about_this_program(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in ("litlogger", "litmodels", "`weights_only`"))

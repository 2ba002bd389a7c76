"""Base class of callbacks with a state: one callback object serves several runs of one process, as in a loop over seeds."""

import copy
from typing import Any

import lightning as L


class PerRunState(L.Callback):
    """A callback whose state is reset when a new run begins."""

    _fresh: dict[str, Any] | None = None

    def reset_for_new_run(self, trainer: L.Trainer, stage: str) -> None:
        """Restore the state of before the first run, if a new run begins. To be called in `setup`.

        If the run is resumed, Lightning loads the state of the checkpoint afterwards. A Trainer that continues a run has taken
        steps already, and keeps the state.
        """
        if stage != "fit" or trainer.global_step > 0:
            return
        if self._fresh is None:
            self._fresh = copy.deepcopy(self.state_dict())
        else:
            self.load_state_dict(copy.deepcopy(self._fresh))

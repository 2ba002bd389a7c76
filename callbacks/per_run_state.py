"""What makes one callback object usable in several runs of one process, as in a loop over seeds."""

import copy
from typing import Any

import lightning as L


class PerRunState(L.Callback):
    """A callback with a state, which a new run does not take over from the last one."""

    _fresh: dict[str, Any] | None = None

    def reset_for_new_run(self, trainer: L.Trainer, stage: str) -> None:
        """Put back the state that there was before the first run, if a new run begins. To be called in `setup`.

        Afterwards a checkpoint's state is loaded, if one is resumed from. A Trainer that goes on has taken steps already.
        """
        if stage != "fit" or trainer.global_step > 0:
            return
        if self._fresh is None:
            self._fresh = copy.deepcopy(self.state_dict())
        else:
            self.load_state_dict(copy.deepcopy(self._fresh))

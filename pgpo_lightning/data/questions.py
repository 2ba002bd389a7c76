"""Base class of all data sets: splits of questions, dropped questions, loaders and the position in them."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from pgpo_lightning.core.run_settings import Remembers
from pgpo_lightning.core.seeding import global_seed
from pgpo_lightning.core.settings import Count, Seed, checked
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.sampler import ResumableSampler

SPLITS = ("train", "validation", "test")
STAGES = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}
"""The splits that each stage of the Trainer reads; the first one is required."""


class QuestionLoader(DataLoader):
    """A data loader that tells Lightning that it is resumable.

    Without these two methods Lightning warns about unreliable results whenever a run continues inside an epoch. The
    position itself is saved by the data module, which is restored before the loaders are built.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is part of the data module's state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


@checked
class QuestionData(Remembers, L.LightningDataModule):
    """Base of all data sets: a subclass implements :meth:`load`, which returns the questions of a split.

    A batch is a list of :class:`~pgpo_lightning.core.types.Question`. The order of the training questions is a function
    of the seed and the epoch, and the position in it is saved in checkpoints. A resumed run therefore sees the same
    questions as an uninterrupted run.

    Args:
        batch_size: Training questions per device and optimizer step.
        eval_batch_size: Validation and test questions per device and call of the engine; null for all of a device. Then only
            `max_sequences` of engine or evaluation limits how many are decoded at the same time.
        seed: Seed of the order of the training questions; null means the module's seed.
        limit_train: Use only this number of training questions, the first ones.
        limit_val: Use only this number of validation questions, the first ones. The test split is always complete.

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    def __init__(
        self,
        batch_size: Count = 32,
        eval_batch_size: Count | None = 32,
        seed: Seed | None = None,
        limit_train: Count | None = None,
        limit_val: Count | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.limits = {"train": limit_train, "validation": limit_val, "test": None}
        self.questions: dict[str, list[Question]] = {}
        self.dropped: dict[str, int] = {}
        self.sampler: ResumableSampler | None = None
        self._restored: dict[str, int] | None = None

    def load(self, split: str) -> list[Question]:
        """Return the questions of one split; an empty list if the data has no such split.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `load(split)`.")

    def load_prompts(self) -> list[Question]:
        """Return the questions that ``Trainer.predict`` answers: those of the test split, unless a subclass has others."""
        return self.load("test")

    def held_out_questions(self) -> int | None:
        """Return the number of validation questions if it is known before anything is loaded, for `pgpo plan`."""
        return self.limits["validation"]

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that a stage needs, each of them once.

        Raises:
            ValueError: If the data has no split for this stage, or if the data itself is faulty.
        """
        if stage == "fit" and self.trainer is not None and self.trainer.global_step == 0:
            # Another Trainer may have used this object before. A resumed run also gets here, and restores its position later.
            self.sampler, self._restored = None, None
        needed = STAGES.get(stage, SPLITS) if stage is not None else SPLITS
        for split in needed:
            if split not in self.questions:
                loaded = self.load_prompts() if split == "predict" else self.load(split)
                questions = loaded[: self.limits.get(split)]
                for index, question in enumerate(questions):
                    question.index = index
                self.questions[split] = questions
                self.dropped[split] = 0
        if stage in STAGES and not self.questions[needed[0]]:
            raise ValueError(
                f"Expected {type(self).__name__} to have {needed[0]} questions for the stage `{stage}`, but it has "
                f"none. Give it a {needed[0]} file or split."
            )

    def drop_prompts(self, reasons: Callable[[list[Question]], list[str | None]]) -> None:
        """Drop questions that cannot be used, from all splits that are loaded.

        The training module calls this after ``setup`` and before the loaders are built, because only it knows the
        tokenizer and the prompt limit. The number is kept in ``self.dropped[split]``.

        Args:
            reasons: Returns why each of a split's questions must be dropped (``"2100 tokens, limit 2048"``), ``None`` to keep it.

        Raises:
            ValueError: If no question of a split is left.
        """
        for split, questions in self.questions.items():
            whys = reasons(questions)
            bad = [(question, why) for question, why in zip(questions, whys, strict=True) if why is not None]
            if not bad:
                continue
            first, why = bad[0]
            message = f"{len(bad)} of {len(questions)} {split} questions; the first is {first.source}: {why}"
            if len(bad) == len(questions):
                raise ValueError(f"Expected to keep at least one {split} question, but had to drop {message}.")
            rank_zero_warn(f"Dropped {message}.")
            self.questions[split] = [q for q, why in zip(questions, whys, strict=True) if why is None]
            self.dropped[split] += len(bad)
        if self.questions.get("train"):
            self._check_batch()  # before the base model is evaluated

    def _check_batch(self) -> None:
        _, world_size = self._rank_and_world_size()
        count = len(self.questions["train"])
        if count < self.batch_size * world_size:
            raise ValueError(
                f"Expected at least one batch of training questions, {self.batch_size * world_size} (`batch_size` "
                f"{self.batch_size} x {world_size} devices), but got {count} ({self.dropped['train']} were dropped). "
                "Lower `batch_size`, or use more questions."
            )

    def train_dataloader(self) -> QuestionLoader:
        """Return the loader of the training questions.

        Raises:
            ValueError: If there are too few questions for one step, or if the data is not the data of the checkpoint.
        """
        self._check_batch()
        rank, world_size = self._rank_and_world_size()
        questions = self.questions["train"]
        consumed = 0 if self.sampler is None else self.sampler.consumed
        self.sampler = ResumableSampler(len(questions), self.batch_size, self._order_seed(), rank, world_size, consumed)
        if self._restored is not None:
            self._restore(self._restored, self.sampler)
        # No workers: they would have nothing to read, and would be ahead of the saved position.
        dataset: Any = questions  # a DataLoader accepts a list, although its annotation does not
        return QuestionLoader(dataset, self.batch_size, sampler=self.sampler, collate_fn=list, drop_last=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the validation questions, in their order; an empty list if there are none."""
        return self._eval_dataloader("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the test questions, in their order."""
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the questions to answer, in their order."""
        return self._eval_dataloader("predict")

    def _eval_dataloader(self, split: str) -> DataLoader | list[DataLoader]:
        questions: Any = self.questions[split]
        if not questions:
            return []
        # By its name, because Lightning builds the loader again for `Trainer.predict`.
        return DataLoader(questions, batch_size=self.eval_batch_size or len(questions), collate_fn=list)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training questions, and the settings that it depends on."""
        if self.sampler is None or self._restored is not None:
            return dict(self._restored or {})
        return {
            "consumed": self.sampler.consumed,
            "size": self.sampler.size,
            "seed": self.sampler.seed,
            "batch_size": self.sampler.batch_size,
            "world_size": self.sampler.num_replicas,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a saved position, at once or when the training loader is built.

        Raises:
            ValueError: If the training loader exists and its data is not the data of the checkpoint.
        """
        # Lightning also restores the data module when it only tests a checkpoint, perhaps on other data.
        if self.trainer is not None and self.trainer.state.fn not in (None, TrainerFn.FITTING):
            return
        self._restored = dict(state_dict)
        if self.sampler is not None:
            self._restore(self._restored, self.sampler)

    def _restore(self, state: dict[str, int], sampler: ResumableSampler) -> None:
        step, saved_step = sampler.batch_size * sampler.num_replicas, state["batch_size"] * state["world_size"]
        for what, saved, present in (
            ("training questions", state["size"], sampler.size),
            ("as data seed", state["seed"], sampler.seed),
            ("questions per step", saved_step, step),
        ):
            if saved != present:
                raise ValueError(
                    f"Expected {saved} {what} as in the checkpoint, but got {present}: the run cannot continue at the "
                    "same question. Resume with the same data, or start a new run from the checkpoint's weights."
                )
        # Counted per rank: the same steps are other numbers of questions if there are now more or fewer devices.
        sampler.consumed = state["consumed"] * sampler.batch_size // state["batch_size"]
        self._restored = None

    def _order_seed(self) -> int:
        if self.seed is not None:
            return self.seed
        module_seed = getattr(getattr(self.trainer, "lightning_module", None), "seed", None)
        return global_seed() if module_seed is None else module_seed

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

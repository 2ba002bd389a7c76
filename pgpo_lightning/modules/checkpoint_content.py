"""What a module leaves in its checkpoints beside weights, and how it takes that over."""

from typing import TYPE_CHECKING, Any

from pgpo_lightning.training.resuming import check_origin, check_state

if TYPE_CHECKING:
    from pgpo_lightning.modules.on_policy import OnPolicyModule


def collect(module: "OnPolicyModule") -> dict[str, Any]:
    """Return counters, states, and what is needed to tell whether a checkpoint belongs to a configuration."""
    teaching = module.objective.teaching
    return {
        "module": type(module).__name__,
        **module.student.saved(module.model),
        "tokenizer": module.tokenizer.name_or_path,
        "seed": module.seed,
        "settings": None if module.resumed is None else module.resumed.settings,
        "objective": module.objective.state_dict(),
        **({} if teaching is None else teaching.saved(module.teacher)),
        **{name: getattr(holder, name) for name, holder in _counters(module)},
    }


def restore(module: "OnPolicyModule", checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to a module, and take over counters and states.

    Args:
        module: Its model has been loaded.
        checkpoint: Its content. Without a teacher in the module, the teacher's weights are taken out of it.

    Raises:
        MisconfigurationException: If it is another module's, another architecture's or another program's, or has nothing but
            weights where a run is to go on.
    """
    trainer = module._trainer
    path = None if trainer is None else trainer.ckpt_path
    saved = check_origin(checkpoint, type(module).__name__, path)
    module.student.check_architecture(saved, module.model)
    continues = trainer is not None and module.training_run  # what only evaluates may draw other samples
    if continues and module.resumed is not None:
        module.resumed.compare(saved)
    module.student.check_identity(saved)
    if continues and not module.placement.sharded:
        check_state(checkpoint, path)
    if continues:
        module.run_seed.take_over(saved.get("seed"))
    if module.training_run:
        module.objective.load_state_dict(saved.get("objective", {}))
    for name, holder in _counters(module):
        setattr(holder, name, saved.get(name, 0))
    if module.teacher is None and (state := checkpoint.get("state_dict")) is not None:  # sharded: loaded before
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("teacher.")}
    if module.objective.teaching is not None:
        module.objective.teaching.restore(saved, module.teacher)


def _counters(module: "OnPolicyModule") -> list[tuple[str, Any]]:
    learner = [(name, module.learner) for name in ("skipped", "skipped_in_a_row")]
    return [("steps", module), ("steps_without_signal", module), ("verifier_errors", module.actor), *learner]

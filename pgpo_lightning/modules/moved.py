"""Settings that stand in a group now: where."""

from collections.abc import Iterable

GROUPS = {
    "model_config": (
        "tokenizer",
        "enable_thinking",
        "dtype",
        "attn_implementation",
        "revision",
        "trust_remote_code",
        "gradient_checkpointing",
        "chat_template_kwargs",
    ),
    "update": (
        "max_grad_norm",
        "updates_per_batch",
        "num_iterations",
        "micro_batch_tokens",
        "loss_agg_mode",
        "max_skipped_steps",
        "lr_scheduler_type",
        "warmup_steps",
    ),
    "mismatch": ("max_sampler_gap", "importance_weight_cap"),
    "reprompt": (
        "demonstration_choice",
        "dont_reprompt_on_self_success",
        "remove_thinking_from_demonstration",
        "include_environment_feedback",
        "environment_feedback_only_without_solution",
        "max_reprompt_len",
        "reprompt_template",
        "solution_template",
        "feedback_template",
        "demonstration_source",
        "reprompt_without_context",
        "demonstration_column",
    ),
    "divergence": (
        "full_logit_distillation",
        "distillation_topk",
        "distillation_add_tail",
        "entry_clip",
        "softening",
        "alpha",
    ),
    "policy_gradient": (
        "norm_adv_by_std_in_grpo",
        "clip_ratio_low",
        "clip_ratio_high",
        "clip_ratio_c",
        "std",
        "kl_to_reference",
    ),
    "injection": (
        "ties",
        "demonstration_advantage",
        "confidence_weight",
        "shaping",
        "gradient_parts_every_n_steps",
    ),
}

MOVED = {name: f"{group}.{name}" for group, names in GROUPS.items() for name in names} | {
    "eval_samples": "evaluation.samples",
    "eval_temperature": "evaluation.temperature",
    "eval_top_p": "evaluation.top_p",
    "is_clip": "mismatch.importance_weight_cap",
    "success_reward_threshold": "reward.success_threshold",
    "on_verifier_error": "reward.on_error",
    "teacher_regularization": "teacher.regularization",
    "teacher_update_rate": "teacher.update_rate",
    "teacher_offload": "teacher.offload",
    "teacher_period": "teacher.period",
    "teacher_gate": "teacher.gate",
    "preflight": "teacher.preflight",
    "divergence_alpha": "divergence.alpha",
    "allocation": "token_weights",
}
"""From a name that peers and earlier versions have at the top level to where it stands."""


def check_moved(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise if an argument has a name that stands in a group now.

    Args:
        names: Of the arguments that were given.
        known: Of those that the class takes.

    Raises:
        ValueError: Names the argument, and where it stands.
    """
    for name in names:
        if name in MOVED and name not in known and MOVED[name].split(".")[0] in known:
            raise ValueError(f"Expected `{MOVED[name]}`, where `{name}` stands now, but got `{name}`. Write it there.")

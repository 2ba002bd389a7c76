"""An attempt of a run of `pgpo discover`, as a run would write it."""

from pgpo_lightning.discovery.attempts import Attempt


def attempt(number, batch=0, success=False, **changes):
    values = {"text": f"é{number}", "reward": float(success), "success": success, "feedback": "no", "tokens": 5,
              "prompt_tokens": 10, "update_tokens": 30, "seconds": 0.5, "update_seconds": 0.25, "finished": True}  # fmt: skip
    return Attempt(number, batch, **(values | changes))

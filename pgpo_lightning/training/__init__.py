"""One training step and the held-out evaluation, without Lightning's hooks."""

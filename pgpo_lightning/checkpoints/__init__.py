"""Checkpoint files: written, checked, found and read."""

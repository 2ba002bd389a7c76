"""Test-time self-distillation: many attempts at one question until the first success, by several methods."""

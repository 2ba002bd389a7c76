"""Divergences, policy gradients, information and token weights: pure functions of tensors."""

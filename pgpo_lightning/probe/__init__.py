"""Estimates, before training, of how much each teacher context helps, and their calibration on finished runs."""

"""What a teacher's context is worth before training: its accuracy gap, and what such gaps brought in calibration runs."""

"""What a run records of itself, and the rules that detect a collapse in it."""

"""What a run will need, before anything is loaded: memory by part and phase, operations and seconds by phase."""

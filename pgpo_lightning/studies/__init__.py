"""Studies over many runs: which arm is better, by how much, and how sure that is."""

"""Exchanges between ranks, sharded weights (FSDP2), and signals that end a run."""

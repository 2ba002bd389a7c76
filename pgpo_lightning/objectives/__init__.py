"""Objectives: which samples are learnt from, and by which loss. Plain objects, without Lightning."""

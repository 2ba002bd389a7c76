"""Verifiers, and the safe calling of them."""

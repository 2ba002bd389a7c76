"""Research notes on the theory of PGPO, as programs."""

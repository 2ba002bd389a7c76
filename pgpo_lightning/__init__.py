"""Self-distilled policy optimisation of language models as PyTorch Lightning modules and callbacks."""

__version__ = "0.1.0"

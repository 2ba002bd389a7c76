"""Self-distilled policy optimisation of language models as PyTorch Lightning modules and callbacks."""

import os

# Nothing leaves the machine: no usage reports of the libraries we call. They read this when they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

__version__ = "0.1.0"

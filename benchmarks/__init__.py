"""Programs that measure time, memory and accuracy: ``python -m benchmarks.loss`` and so on, from the root of the repository."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a second thread on shared cores costs more than it brings

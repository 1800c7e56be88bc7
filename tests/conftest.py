"""Where pytest runs one worker for each core, each of them computes in one thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start as well
    import torch

    torch.set_num_threads(1)

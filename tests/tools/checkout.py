"""What the tests know of where they run: the checkout, whether there is a CUDA GPU, and their number of threads."""

from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
THREADS = 1  # fixed, since sums over 1 and over 2 threads differ in their last bits; two test processes have two cores

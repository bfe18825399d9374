"""Whether there is a CUDA GPU."""

import torch

CUDA = torch.cuda.is_available()

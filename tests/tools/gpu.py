"""The constant CUDA: whether torch sees a CUDA GPU."""

import torch

CUDA = torch.cuda.is_available()

"""Read by every Python that a test starts, and by the tests' own: none sees a GPU, so that results are the same on each
machine."""

from functools import cache

import torch

torch.cuda.is_available = torch.backends.mps.is_available = cache(lambda: False)  # torch looks into the wrapped one

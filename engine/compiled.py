"""`--compile`: torch.compile where one shape of code runs long enough to earn it: for the layers in training, and for a
whole step where long answers are generated, token after token."""

import os
import shutil
import sys

import torch

from model import UserError, run_layer


def compile_model(model):
    """What is compiled is made at its first use; hooks of a method are part of it, and layers with equal code share
    theirs in training. Raises UserError where there is no compiler."""
    if model.device.type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if not shutil.which(compiler):
            raise UserError(f"--compile needs a C++ compiler, and {compiler} is not here: install one, set CXX, or "
                            "leave --compile out")
    from torch._dynamo import config, reset
    reset()  # what the runs before it in this process have compiled counts for the limit below
    # A method may do something of its own at each layer (CS-ReFT does): that is a version of the code for each.
    config.cache_size_limit = max(8, 4 * model.config.num_hidden_layers)
    model.model.compiled = torch.compile(run_layer, dynamic=True)
    model.compiled = torch.compile(model.model.forward, dynamic=True)

"""The command line of torch_rpa.serving: ``python -m torch_rpa.generate``."""

# First of all, since it says which extra to install if transformers is missing.
import torch_rpa.transformers  # noqa: F401

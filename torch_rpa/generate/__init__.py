"""The command line of torch_rpa.serving: ``python -m torch_rpa.generate``."""

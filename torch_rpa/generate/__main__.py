"""Command line: ``python -m torch_rpa.generate --help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch_rpa.generate import command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = command_line.parser()
    args = command_line.parse(parser, argv)
    # Only now: --help and most mistakes need not wait for torch and transformers. If
    # one is missing, the first import of it says which extra to install.
    import torch_rpa.public
    import torch_rpa.transformers  # noqa: F401
    from torch_rpa.generate.run import run

    return run(args, command_line.option_names(parser, args))


if __name__ == "__main__":
    sys.exit(main())

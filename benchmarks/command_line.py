"""What the commands of the benchmarks have in common on their command lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import environment


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description as it is written, and shows the default of each option.

    An option whose default is worked out, or long, says in its help what it is.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if (
            action.help is None
            or isinstance(default, bool)
            or not isinstance(default, int | float | str)
            or default == argparse.SUPPRESS
        ):
            return action.help
        return f"{action.help} (default: %(default)s)".lstrip()


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds where peers are installed and compiled, and by which Python."""
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="for environments and dumps, by default one in the user's cache",
    )
    parser.add_argument("--python", help="3.12 or newer, that makes environments")


def check_update(parser: argparse.ArgumentParser, file: str | None, mark: str) -> None:
    """Ends the program if ``--update`` could not write a table, before it is made.

    Args:
      parser: Whose option it is.
      file: Its value, or None.
      mark: As in ``environment.update_markdown``.
    """
    if file is None:
        return
    try:
        environment.check_markdown(file, mark)
    except ValueError as error:
        parser.error(f"--update: {error}")

"""What the commands of the benchmarks have in common on their command lines."""

from __future__ import annotations

import argparse


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

"""Makes the long description; all other metadata is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

CONTENTS = re.compile(r"<!-- contents -->.*?<!-- contents -->\n", re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?://)([^)\s]+)\)")
NOTE = """\
Paths in this text are those of the source tree. Files in `jax_kernels/` and
`torch_rpa/` are installed beside the modules; the others are in the source
distribution.
"""


def long_description(readme: str) -> str:
    """Returns the README with paths in the place of links into the source tree.

    On a package index, and in the metadata of a wheel, such links lead nowhere.
    """

    def as_text(link: re.Match) -> str:
        text, target = link.groups()
        path = target.partition("#")[0]
        if not path:
            return text
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return LINK.sub(as_text, CONTENTS.sub(NOTE, readme))


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(
        long_description=long_description(readme),
        long_description_content_type="text/markdown",
    )

"""The API reference names everything that is public."""

import importlib
import types
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    "jax_kernels.contract": "jax.rst",
    "jax_kernels.ragged_paged_attention": "jax.rst",
    "torch_rpa": "torch.rst",
    "torch_rpa.transformers": "transformers.rst",
    "torch_rpa.serving": "serving.rst",
}


def public_names(module: types.ModuleType) -> set[str]:
    """Returns what a package exports, other than its modules and its version."""
    names = getattr(module, "__all__", vars(module))
    return {
        name
        for name in names
        if not name.startswith("_")
        and not isinstance(getattr(module, name), types.ModuleType)
    }


@pytest.mark.parametrize(("module_name", "page"), PAGES.items())
def test_the_reference_names_everything_public(module_name, page):
    lines = (DOCS / page).read_text("utf-8").splitlines()
    named = {
        line.split("::")[1].split("(")[0].strip()
        for line in lines
        if line.startswith(".. ") and "::" in line
    }
    names = public_names(importlib.import_module(module_name))
    assert names
    assert names - named == set()

"""How Sphinx makes the API reference: `python -m sphinx -W docs docs/_build`."""

import importlib.metadata

project = "torch-rpa"
author = "The torch-rpa developers"
copyright = author
release = importlib.metadata.version("torch-rpa")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"torch-rpa {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# A reference of a docstring to a name of this project must lead somewhere. Names of
# other projects are not linked, so that the build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|contextlib|dataclasses|os|typing|weakref)\..*"),
    (r"py:.*", r"(jax|numpy|np|torch|torch_xla|transformers)\..*"),
    (r"py:.*", r"torch_rpa\.transformers\.attention\.Model"),  # a type variable
    (r"py:.*", r"torch_rpa\.serving\.text\.OutputText"),  # not for users
    (r"py:.*", r"PreTrainedModel"),  # imported for types alone
    (r"py:.*", r"(Granularity|LayerScales)"),  # the docstrings say what they are
    (r"py:.*", r"(Any|Array|ArrayLike|CollectorRegistry|DTypeLike|Mesh|ndarray)"),
]

"""What importing the packages gives."""

import subprocess
import sys
import types


def test_import_as_gives_the_package_and_not_its_function():
    import jax_kernels.ragged_paged_attention as rpa

    assert isinstance(rpa, types.ModuleType)
    assert callable(rpa.ragged_paged_attention)


def test_the_outer_package_imports_no_jax():
    code = "import jax_kernels, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

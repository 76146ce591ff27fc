"""The contract is free of JAX and of torch."""

import subprocess
import sys


def test_importing_the_contract_loads_neither_jax_nor_torch():
    code = (
        "import sys, jax_kernels.contract\n"
        "print([n for n in ('jax', 'torch', 'ml_dtypes') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

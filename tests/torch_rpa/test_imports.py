"""Importing torch_rpa must stay cheap and must not touch a device."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import torch_rpa

HEAVY = (
    "jax",
    "jaxlib",
    "torch_xla",
    "transformers",
    "jax_kernels.ragged_paged_attention",
)


def run_in_new_interpreter(code: str) -> str:
    script = textwrap.dedent(code)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_and_cpu_calls_load_neither_jax_nor_torch_xla():
    loaded = run_in_new_interpreter(f"""
        import sys
        import torch
        import torch_rpa

        cache = torch_rpa.empty_kv_cache(2, 8, 1, 64)
        tensor = torch.ones(1, 1, 64, dtype=torch.bfloat16)
        metadata = [torch.tensor(x, dtype=torch.int32)
                    for x in ([1], [0], [0, 1], [1, 1, 1])]
        torch_rpa.ragged_paged_attention(tensor, tensor, tensor, cache, *metadata)
        print([name for name in {HEAVY} if name in sys.modules])
    """)
    assert loaded == "[]"


def test_nothing_that_is_installed_imports_what_is_not():
    import jax_kernels

    for package in (torch_rpa, jax_kernels):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            text = path.read_text("utf-8")
            assert not re.search(
                r"^\s*(from|import) (benchmarks|tests)\b", text, re.M
            ), path


def test_torch_ops_handle_exists_after_import():
    schema = run_in_new_interpreter("""
        import torch
        import torch_rpa
        print(torch.ops.rpa.ragged_paged_attention.default._schema)
    """)
    assert schema.startswith("rpa::ragged_paged_attention(Tensor q,")
    assert "Tensor(a!) kv_cache" in schema

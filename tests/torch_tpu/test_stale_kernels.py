"""Programs on disk: none of another kernel, of another chip or of other block sizes.

``torch.compile`` keeps programs in a directory, and finds them by the graph of the
user's code. The kernel is not in it.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from jax_kernels import tuned
from tests.support import compile_only_tpu
from tests.torch_tpu.tuned_record import tuned_record

REASON = compile_only_tpu.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.slow,
]

ROOT = pathlib.Path(__file__).parents[2]
ROOM = "jax_kernels/ragged_paged_attention/kernel/online_softmax.py"
LINE = "NO_KEY_MAX = float(np.finfo(np.float32).min) / 2"
CODE = """
import torch
from tests.torch_rpa.calls import make_call, to_device

call = to_device(make_call(dtype=torch.bfloat16, pages_per_seq=64), "tpu")
attend = torch.compile(torch.ops.rpa.ragged_paged_attention, backend="tpu")
with torch.no_grad():
    attend(*call).cpu()
"""


@pytest.fixture
def program_of(tmp_path):
    """Runs the code in a process of its own; gives the program of the kernel."""
    processes = iter(range(100))

    def run(chip="v6e", root=ROOT, **variables):
        directory = tmp_path / f"process-{next(processes)}"
        completed = subprocess.run(
            [sys.executable, "-m", "tests.support.compile_only_tpu", "-c", CODE],
            cwd=root,  # where the packages are imported from
            env=os.environ
            | compile_only_tpu.environment(chip, directory)
            | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
            | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, completed.stderr
        programs = compile_only_tpu.Dump(directory).programs()
        (program,) = (p for p in programs if p.hlo.kernel_calls)
        return program

    return run


def test_what_a_program_follows_from_is_compiled_anew(program_of, tmp_path):
    first = program_of()
    assert not first.loaded

    # The same packages in another place.
    changed = tmp_path / "changed"
    for package in ("jax_kernels", "torch_rpa", "tests"):
        shutil.copytree(ROOT / package, changed / package)
    assert program_of(root=changed).loaded

    source = (changed / ROOM).read_text()
    assert LINE in source
    (changed / ROOM).write_text(source.replace(LINE, "NO_KEY_MAX = -1.0e30"))
    records = tmp_path / "records.json"
    tuned.save(records, [tuned_record()])
    others = {
        "a changed kernel": program_of(root=changed),
        "block sizes": program_of(TORCH_RPA_TUNED_BLOCK_SIZES=str(records)),
        "another chip": program_of("tpu7x"),
    }
    for what, program in others.items():
        assert not program.loaded, what
        assert program.hlo.text != first.hlo.text, what
    assert others["another chip"].topology.startswith("tpu7x")

    assert program_of().loaded  # the first one is still there

"""TorchTPU without a TPU: programs are compiled for real, and computed as zeros.

``plugin.cc`` is a PJRT plug-in around libtpu's compiler. A test runs a child process
with it, and reads afterwards what the child compiled and executed::

    result = compile_only_tpu.run("v6e", dump_dir, "-c", '''
    import torch
    x = torch.ones(4, 4, device="tpu")
    print((x @ x).cpu())
    ''')
    dump = compile_only_tpu.Dump(dump_dir)
    (matmul,) = dump.programs("tt_jit_mm")
    assert matmul.hlo.aliases == {}

What is as on a TPU: the programs, their options and what the compiler makes of them;
how often TorchTPU compiles; which executions run with which buffers; that a donated
buffer is gone and that its use is an error.

What is not: values. Results of executions are zeros. What was copied from the host is
read back as it was, up to 16 MiB a buffer, and as zeros beyond. Sizes of buffers do not
count padding, nothing takes time, and there is no limit of memory. A serialised
program, as torch's cache on disk holds it, is compiled anew when it is loaded, for the
chip that is there then; the record says that it was loaded, and what it was compiled
for before.

Functions of PJRT that TorchTPU 0.2 was not seen to call are not there, such as those
for memory of the host, for copies between devices and for views: they give an error
that names the function by its number in ``pjrt.h``.
"""

from tests.support.compile_only_tpu.building import (
    build,
    compile_library,
    reason_to_skip,
)
from tests.support.compile_only_tpu.dump import CompiledProgram, Dump, Execution
from tests.support.compile_only_tpu.running import environment, open_tpu, run

__all__ = [
    "CompiledProgram",
    "Dump",
    "Execution",
    "build",
    "compile_library",
    "environment",
    "open_tpu",
    "reason_to_skip",
    "run",
]

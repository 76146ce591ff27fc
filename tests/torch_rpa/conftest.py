"""Environment of the XLA tests: set before torch_xla or libtpu is loaded."""

import glob
import os

# A TPU VM keeps its own device; elsewhere torch_xla runs on the CPU.
if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    # For compiling with libtpu, which would otherwise look for a TPU VM.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

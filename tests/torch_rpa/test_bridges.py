"""What a bridge defines, who knows torch_xla, and that one more bridge is no more."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_rpa
from tests.support.bridge_check import assert_is_bridge
from torch_rpa import bridges, devices

CASES = Path(__file__).with_name("lazy_bridge_cases.py")
PACKAGE = Path(torch_rpa.__file__).parent
# Rooms that know a framework: its bridge, and of torch_xla its way to shard over
# devices, and what is in the engine that is built on it.
KNOW = {
    "torch_xla": (
        "bridges/torch_xla.py",
        "context_parallel.py",
        "spmd.py",
        "vllm/__init__.py",
        "vllm/fused_moe.py",
        "vllm/runner.py",
        "vllm/worker.py",
    ),
    "torch_tpu": ("bridges/torch_tpu.py", "bridges/torch_tpu_launch.py"),
}
# What they alone may say, as device type or framework.
NAMES = {"torch_xla": {"xla", "torch_xla"}, "torch_tpu": {"torch_tpu"}}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def nodes(path: Path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("framework", KNOW)
@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_its_bridge_knows_a_framework(path, framework):
    room = str(path.relative_to(PACKAGE))
    imported, strings = set(), set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            imported.add(module.partition(".")[0])
            imported |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value.lower())
    if room not in KNOW[framework]:
        assert not imported & {framework, f"torch_rpa.bridges.{framework}"}
    if room not in (*KNOW[framework], "bridges/__init__.py"):
        assert not strings & NAMES[framework]


@pytest.mark.parametrize("device_type", bridges.BRIDGES)
def test_a_bridge_defines_what_the_protocol_lists(device_type):
    pytest.importorskip(bridges.BRIDGES[device_type].framework)
    if device_type == "tpu" and devices.usual_name() != "tpu":
        pytest.skip("TorchTPU needs a TPU, or tests/torch_tpu/, which compiles only")
    assert_is_bridge(bridges.find(device_type))


@pytest.mark.slow
def test_one_more_bridge_needs_a_file_and_an_entry():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(CASES)]
    result = subprocess.run(
        command, cwd=CASES.parents[2], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


# ---- devices


def test_the_cpu_needs_no_bridge():
    device = devices.open_device("cpu")
    assert device == torch.device("cpu")
    assert not devices.is_compiled(device)
    assert devices.num_compilations(device) == 0
    assert devices.compiled(len, device) is len
    devices.sync(device, wait=True)


@pytest.mark.parametrize("device", ["cuda", "tpux:0", "nonsense"])
def test_an_unknown_device_is_named_with_those_that_there_are(device):
    with pytest.raises(
        ValueError, match=f"must be 'xla', 'tpu' or 'cpu', got '{device}'"
    ):
        devices.open_device(device)


def test_another_device_than_that_of_the_process_is_an_error():
    pytest.importorskip("torch_xla")
    with pytest.raises(ValueError, match=r"device must be xla:0.*, got xla:1"):
        devices.open_device("xla:1")
    device = devices.open_device("xla")
    assert devices.is_compiled(device)


@pytest.mark.torch_tpu
def test_a_machine_without_a_tpu_runs_on_the_cpu():
    """As a user starts it, so that torch loads torch_tpu by itself."""
    environment = {k: v for k, v in os.environ.items() if "AUTOLOAD" not in k}
    command = [sys.executable, "-m", "torch_rpa.generate", "--max-new-tokens", "2"]
    ran = [
        subprocess.run(
            [*command, "--prompt", "a", *more],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for more in ([], ["--device", "tpu"])
    ]
    assert ran[0].returncode == 0, ran[0].stderr
    assert "device                  cpu\n" in ran[0].stdout
    assert ran[1].returncode == 2
    assert "error: device 'tpu' needs a TPU, and TorchTPU sees none" in ran[1].stderr


# ---- frameworks that are missing, or do not fit


@pytest.mark.parametrize("entry", bridges.BRIDGES.values(), ids=bridges.BRIDGES)
def test_a_missing_framework_is_named_with_the_extra_that_brings_it(entry, monkeypatch):
    monkeypatch.setattr(bridges.importlib.util, "find_spec", lambda name: None)
    problem = entry.problem()
    assert problem.startswith(f"{entry.framework}, which is not installed: ")
    assert f"pip install 'torch-rpa[{entry.extra}]'" in problem
    assert f"pip install '.[{entry.extra}]'" in problem


@pytest.mark.parametrize(
    ("device_type", "installed", "fitting"),
    [
        ("xla", "2.13.0+cpu", "torch 2.9, got torch 2.13.0+cpu"),
        ("tpu", "2.9.1", "torch 2.11 to 2.15, got torch 2.9.1"),
        ("tpu", "2.16.0.dev1", "torch 2.11 to 2.15, got torch 2.16.0.dev1"),
    ],
)
def test_a_torch_that_does_not_fit_is_named(
    device_type, installed, fitting, monkeypatch
):
    entry = bridges.BRIDGES[device_type]
    monkeypatch.setattr(bridges.importlib.util, "find_spec", lambda name: "a package")
    monkeypatch.setattr(bridges.importlib.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setattr(torch, "__version__", installed)
    monkeypatch.setattr(bridges, "_loaded", {})
    expected = f"{entry.framework} 1.2.3, which is {re.escape(fitting)}: .*environment"
    for function in (bridges.find, devices.open_device):
        with pytest.raises(ValueError, match=f"{device_type!r} needs .*{expected}"):
            function(device_type)


@pytest.mark.parametrize(
    ("device_type", "installed"),
    [("xla", "2.9.1"), ("tpu", "2.11.0"), ("tpu", "2.15.0")],
)
def test_a_torch_that_fits_is_no_problem(device_type, installed, monkeypatch):
    monkeypatch.setattr(bridges.importlib.util, "find_spec", lambda name: "a package")
    monkeypatch.setattr(torch, "__version__", installed)
    assert bridges.BRIDGES[device_type].problem() is None


@pytest.mark.torch_xla
def test_programs_of_torch_xla_are_kept_on_disk_where_they_can_be_loaded(
    tmp_path, monkeypatch
):
    import torch_xla
    import torch_xla.runtime

    directory = tmp_path / "programs"
    with pytest.raises(NotImplementedError, match="CPU of torch_xla cannot load"):
        devices.keep_programs("xla", directory)
    assert not directory.exists()
    monkeypatch.setattr(torch_xla.runtime, "device_type", lambda: "TPU")
    is_initialized = "_xla_computation_cache_is_initialized"
    monkeypatch.setattr(torch_xla._XLAC, is_initialized, lambda: True)
    with pytest.raises(RuntimeError, match="before models run"):
        devices.keep_programs("xla", directory)
    monkeypatch.setattr(torch_xla._XLAC, is_initialized, lambda: False)
    for name in ("XLA_PERSISTENT_CACHE_PATH", "XLA_PERSISTENT_CACHE_READ_ONLY"):
        monkeypatch.setenv(name, "")
    devices.keep_programs("xla", directory)
    assert os.environ["XLA_PERSISTENT_CACHE_PATH"] == str(directory)
    assert directory.is_dir()
    monkeypatch.setattr(torch_xla._XLAC, is_initialized, lambda: True)
    devices.keep_programs("xla", directory)  # once more


def test_the_cpu_has_no_programs_to_keep(tmp_path):
    devices.keep_programs("cpu", tmp_path / "programs")
    assert not any(tmp_path.iterdir())

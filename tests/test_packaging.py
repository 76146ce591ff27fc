"""What the wheel holds, what it says of itself, and what runs without PyTorch."""

import email.message
import email.parser
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import torch_rpa

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax_kernels", "torch_rpa")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of this tree, built from a copy, since a build leaves files behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    result = subprocess.run(
        [sys.executable, "-c", BUILD],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return email.parser.Parser().parsestr(wheel.read(name).decode("utf-8"))


def test_the_wheel_has_every_file_of_the_packages(wheel):
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "torch_rpa/serving/README.md" in files
    assert files == {n for n in wheel.namelist() if n.split("/")[0] in PACKAGES}


def test_no_link_of_the_long_description_is_relative(metadata):
    text = metadata.get_payload()
    assert "# Ragged paged attention" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    targets += re.findall(r"(?:href|src)=\"([^\"]*)\"", text)
    assert [t for t in targets if not t.startswith("https://")] == []
    assert "<!-- contents -->" not in text


def test_files_that_the_long_description_names_exist(metadata):
    paths = re.findall(r"`([\w/]+/[\w/.]+\.\w+)`", metadata.get_payload())
    assert "jax_kernels/README.md" in paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_a_plain_install_brings_no_torch(metadata):
    requirements = metadata.get_all("Requires-Dist", [])
    plain = [r for r in requirements if "extra ==" not in r]
    names = {re.split(r"[^\w-]", r)[0] for r in plain}
    assert names == {"jax", "jaxlib", "numpy"}


def test_the_version_is_the_one_of_the_newest_release_of_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    unreleased, release = re.findall(r"^## (.*)", changelog, re.MULTILINE)[:2]
    assert unreleased == "Unreleased"
    assert re.fullmatch(r"\d+\.\d+\.\d+, \d{4}-\d\d-\d\d", release)
    assert release.startswith(f"{project['version']},")
    assert torch_rpa.__version__ == project["version"]


def test_the_console_script_is_there(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    line = "torch-rpa-generate = torch_rpa.generate.__main__:main"
    assert line in wheel.read(name).decode("utf-8")
    from torch_rpa.generate.__main__ import main

    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0


def run_without(missing: tuple[str, ...], code: str) -> subprocess.CompletedProcess:
    """Runs code in an interpreter in which some packages cannot be imported."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    return subprocess.run(
        [sys.executable, "-c", hidden + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_jax_function_runs_without_torch():
    result = run_without(
        ("torch", "torch_xla", "transformers", "tqdm", "matplotlib"),
        """
        import jax.numpy as jnp
        from jax_kernels import ragged_paged_attention as rpa

        shape = rpa.kv_cache_shape(6, 8, 2, 128, jnp.float32)
        out, cache = rpa.ragged_paged_attention_reference(
            jnp.ones((4, 8, 128)), jnp.ones((4, 2, 128)), jnp.ones((4, 2, 128)),
            jnp.zeros(shape), jnp.array([5, 3]), jnp.array([4, 1]),
            jnp.array([0, 1, 4]), jnp.array([1, 1, 2]), sm_scale=128**-0.5,
        )
        print(out.shape, cache.shape == shape)
        """,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(4, 8, 128) True"


def test_importing_torch_rpa_without_torch_names_the_extra_and_the_alternative():
    result = run_without(("torch",), "import torch_rpa")
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError: torch_rpa needs PyTorch")
    assert "pip install 'torch-rpa[xla]'" in message
    assert "jax_kernels.ragged_paged_attention" in message

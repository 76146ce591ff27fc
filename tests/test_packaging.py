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
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import torch_rpa
from torch_rpa.bridges import BRIDGES

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


def requirements_of(metadata, *extras: str) -> list[Requirement]:
    """What an install with some extras asks for, with the extras that they name."""
    given = [Requirement(r) for r in metadata.get_all("Requires-Dist", [])]
    chosen = []
    for requirement in given:
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in extras):
            chosen.append(requirement)
    own = [r for r in chosen if r.name == "torch-rpa"]
    if not own:
        return chosen
    more = set().union(*(r.extras for r in own)) - set(extras)
    if not more:
        return [r for r in chosen if r not in own]
    return requirements_of(metadata, *extras, *more)


def names_of(metadata, *extras: str) -> set[str]:
    return {canonicalize_name(r.name) for r in requirements_of(metadata, *extras)}


def allowed(metadata, package: str, *extras: str) -> SpecifierSet:
    """Which releases of a package an install with some extras takes."""
    result = SpecifierSet()
    for requirement in requirements_of(metadata, *extras):
        if canonicalize_name(requirement.name) == package:
            result &= requirement.specifier
    return result


FRAMEWORKS = {"torch", "torch-xla", "torch-tpu"}


def test_a_plain_install_brings_no_torch(metadata):
    assert names_of(metadata) == {"jax", "jaxlib", "numpy"}


@pytest.mark.parametrize("extra", ["hf", "plot", "tpu", "test-tools"])
def test_an_extra_beside_a_framework_brings_none(extra, metadata):
    assert names_of(metadata, extra) > names_of(metadata)
    assert not names_of(metadata, extra) & FRAMEWORKS


@pytest.mark.parametrize(
    ("extra", "brought"),
    [
        ("xla", {"torch", "torch-xla"}),
        ("test", {"torch", "torch-xla"}),
        ("docs", {"torch", "torch-xla"}),
        ("dev", {"torch", "torch-xla"}),
        ("torchtpu", {"torch", "torch-tpu"}),
        ("test-torchtpu", {"torch", "torch-tpu"}),
    ],
)
def test_an_extra_brings_one_framework(extra, brought, metadata):
    assert names_of(metadata, extra) & FRAMEWORKS == brought
    assert "libtpu" in names_of(metadata, extra) or extra in ("xla", "docs")


@pytest.mark.parametrize("entry", BRIDGES.values(), ids=BRIDGES)
def test_bridges_and_extras_agree_on_the_releases_of_torch(entry, metadata):
    torch_releases = allowed(metadata, "torch", entry.extra)
    (first, last) = entry.torch_releases
    before, after = ((first[0], first[1] - 1), (last[0], last[1] + 1))
    inside = [f"{first[0]}.{first[1]}.0", f"{last[0]}.{last[1]}.0"]
    outside = [f"{before[0]}.{before[1]}.9", f"{after[0]}.{after[1]}.0"]
    assert [release for release in inside if release not in torch_releases] == []
    assert [release for release in outside if release in torch_releases] == []


def test_the_releases_that_the_tests_run_with_are_allowed(metadata):
    for extra, releases in {
        "test": {"torch": "2.9.1", "torch-xla": "2.9.0", "libtpu": "0.0.52"},
        "test-torchtpu": {"torch": "2.13.0", "torch-tpu": "0.2.0", "libtpu": "0.0.52"},
    }.items():
        for package, release in (releases | {"jax": "0.10.2"}).items():
            assert release in allowed(metadata, package, extra), (extra, package)


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
    assert "pip install 'torch-rpa[torchtpu]'" in message
    assert "jax_kernels.ragged_paged_attention" in message

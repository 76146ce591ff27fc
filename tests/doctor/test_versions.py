"""What fits what: the rules, and that they are those of pyproject.toml."""

import importlib.metadata
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.test_readme import ROOT
from torch_rpa.bridges import BRIDGES
from torch_rpa.doctor import versions
from torch_rpa.doctor.checks import Status
from torch_rpa.doctor.installation import Installation, read

XLA = {
    "torch": "2.9.1",
    "torch_xla": "2.9.0",
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "libtpu": "0.0.52",
    "transformers": "5.24.0",
}
TORCHTPU = {**XLA, "torch": "2.13.0+cpu", "torch_tpu": "0.2.0"}
del TORCHTPU["torch_xla"]
OFFICIAL = {**XLA, "libtpu": "0.0.21"}  # `pip install torch_xla[tpu]`, then this
PAIR = {**OFFICIAL, "jax": "0.7.1", "jaxlib": "0.7.1"}


def without(given, *names):
    return {name: version for name, version in given.items() if name not in names}


def made(given, name, **settings):
    """The check of a name."""
    installation = Installation(python="3.11.9", versions=given, **settings)
    (check,) = [c for c in versions.checks(installation) if c.name == name]
    return check


@pytest.mark.parametrize("given", [XLA, TORCHTPU], ids=["xla", "torchtpu"])
def test_what_the_extras_install_fits(given):
    installation = Installation(python="3.11.9", versions=given, has_tpu=True)
    found = list(versions.checks(installation))
    assert [c for c in found if c.status is not Status.OK] == []
    assert len(found) == 5


TRANSFORMERS_4 = {**XLA, "transformers": "4.56.2"}
BOTH_FRAMEWORKS = {**XLA, "torch_tpu": "0.2.0"}
NEW_JAX = {**XLA, "jax": "0.12.0.1", "jaxlib": "0.12.0.1"}
BAD_JAX = {**XLA, "jax": "0.8.3", "jaxlib": "0.8.3"}
CONFLICTS = [
    # name, what is installed, status, in the finding, in the remedy
    ("framework", {**XLA, "torch": "2.13.0"}, "failed", "does not fit", ".[xla]"),
    ("framework", {**TORCHTPU, "torch": "2.9.1"}, "failed", "2.11 to", "torchtpu"),
    ("framework", BOTH_FRAMEWORKS, "warning", "only", "uninstall torch_tpu"),
    ("framework", {**XLA, "torch_xla": "2.8.1"}, "warning", "never", ".[xla]"),
    (
        "framework",
        without(XLA, "torch_xla"),
        "warning",
        "CPU tensors",
        "xla or torchtpu",
    ),
    ("jax", without(XLA, "jaxlib"), "failed", "both", "jaxlib==0.10.2"),
    ("jax", {**XLA, "jaxlib": "0.10.1"}, "failed", "not one release", "jax==0.10.2"),
    ("jax", BAD_JAX, "failed", "0.10.2 to 0.12", "jax==0.10.2"),
    ("jax", NEW_JAX, "warning", "not with torch_xla", "jax==0.10.2"),
    ("libtpu", OFFICIAL, "failed", "cannot read", "'libtpu>=0.0.42,<=0.0.52'"),
    ("libtpu", PAIR, "warning", "v5e and v6e, not for TPU7x", "jax==0.10.2"),
    ("libtpu", {**PAIR, "libtpu": "0.0.52"}, "warning", "never", "jax==0.10.2"),
    ("libtpu", {**TORCHTPU, "libtpu": "0.0.42"}, "failed", "cannot", ">=0.0.50"),
    ("libtpu", {**XLA, "libtpu": "0.0.60"}, "warning", "newer", "<=0.0.52"),
    ("libtpu", {**XLA, "libtpu-nightly": "0.1"}, "failed", "last", "uninstall"),
    ("libtpu", without(XLA, "libtpu"), "skipped", "only a TPU needs it", None),
    ("transformers", TRANSFORMERS_4, "failed", "not within", ">=4.57"),
    ("transformers", {**XLA, "transformers": "6.0"}, "failed", "4.57 to 5.x", "<6"),
    ("transformers", without(XLA, "transformers"), "skipped", "models", "tqdm"),
]


@pytest.mark.parametrize(
    ("name", "given", "status", "finding", "remedy"),
    CONFLICTS,
    ids=[f"{c[0]}-{c[3]}" for c in CONFLICTS],
)
def test_a_conflict_is_named_with_its_remedy(name, given, status, finding, remedy):
    check = made(given, name)
    assert check.status == status
    assert finding in check.finding
    assert (check.remedy is None) if remedy is None else remedy in str(check.remedy)


def test_on_a_tpu_what_is_missing_is_a_failure():
    for package, name in (("torch_xla", "framework"), ("libtpu", "libtpu")):
        check = made(without(XLA, package), name, has_tpu=True)
        assert check.status is Status.FAILED


def test_a_libtpu_from_elsewhere_is_named():
    check = made(XLA, "libtpu", variables={"TPU_LIBRARY_PATH": "/there/libtpu.so"})
    assert check.status is Status.WARNING
    assert check.remedy == "unset TPU_LIBRARY_PATH"


@pytest.mark.parametrize(
    ("python", "status"),
    [("3.10.12", "failed"), ("3.11.0", "ok"), ("3.13.9", "ok"), ("3.14.0", "failed")],
)
def test_the_releases_of_python(python, status):
    (check, *_) = versions.checks(Installation(python=python, versions=XLA))
    assert check.status == status


@pytest.mark.parametrize("text", ["", "unknown"])
def test_a_version_without_a_number_is_an_error(text):
    with pytest.raises(ValueError, match="version must begin with a number"):
        versions.release(text)


# ---- the same releases as pyproject.toml


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def allowed(requirements, package):
    (found,) = [
        r for r in map(Requirement, requirements) if r.name.replace("-", "_") == package
    ]
    return found.specifier


def last_of(numbers):
    """The last release that begins with these numbers, and the first after them."""
    *rest, last = numbers
    return versions.text_of((*numbers, 99)), versions.text_of((*rest, last + 1))


@pytest.mark.parametrize(
    ("requirements", "package", "bounds"),
    [
        ([f"python{PROJECT['requires-python']}"], "python", versions.PYTHON),
        (PROJECT["dependencies"], "jax", versions.JAX_RANGE),
        (EXTRAS["hf"], "transformers", versions.TRANSFORMERS),
    ],
    ids=["python", "jax", "transformers"],
)
def test_ranges_are_those_of_the_project(requirements, package, bounds):
    specifier = allowed(requirements, package)
    first, (inside, outside) = versions.text_of(bounds[0]), last_of(bounds[1])
    assert first in specifier and inside in specifier
    assert outside not in specifier


@pytest.mark.parametrize(("extra", "device"), [("tpu", "xla"), ("torchtpu", "tpu")])
def test_bounds_of_libtpu_are_those_of_the_extras(extra, device):
    specifier = allowed(EXTRAS[extra], "libtpu")
    releases = BRIDGES[device].libtpu_releases
    assert releases is not None
    first, last = releases
    assert str(specifier) in (
        f">={versions.text_of(first)},<={versions.text_of(last)}",
        f"<={versions.text_of(last)},>={versions.text_of(first)}",
    )


@pytest.mark.parametrize("entry", BRIDGES.values(), ids=BRIDGES)
def test_frameworks_are_those_of_the_extras(entry):
    requirements = EXTRAS[entry.extra]
    wanted = versions.text_of(entry.release)
    specifier = allowed(
        [r.replace("torch-tpu", "torch_tpu") for r in requirements], entry.framework
    )
    assert str(specifier) == f"=={wanted}.*"
    assert str(allowed(requirements, "jax")) == f"=={versions.text_of(versions.JAX)}"


@pytest.mark.torch_xla
def test_the_old_pair_is_what_torch_xla_asks_for():
    pair = BRIDGES["xla"].own_pair
    assert pair is not None and pair[0] == versions.OLD_JAX
    wanted = " ".join(importlib.metadata.requires("torch_xla") or [])
    assert f"jax=={versions.text_of(pair[0])};" in wanted
    assert f"libtpu=={versions.text_of(pair[1])};" in wanted


def test_what_is_installed_here_is_read_and_fits():
    installation = read()
    assert {"torch", "jax", "jaxlib", "numpy"} <= set(installation.versions)
    found = {c.name: c.status for c in versions.checks(installation)}
    assert found["python"] is found["jax"] is Status.OK

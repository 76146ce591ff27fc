"""One line for each check, and what the program ends with."""

import pytest

from torch_rpa.doctor import checks
from torch_rpa.doctor.checks import Check, Status


def test_a_check_is_one_line_with_its_remedy():
    check = checks.failed("libtpu", "too old", "install another one")
    assert str(check) == "failed   libtpu: too old. Remedy: install another one"
    assert str(checks.ok("python", "3.11")) == "ok       python: 3.11"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([], 0),
        ([Status.OK, Status.WARNING, Status.SKIPPED], 0),
        ([Status.OK, Status.FAILED, Status.OK], 1),
    ],
)
def test_only_a_failed_check_is_a_failure(statuses, expected):
    made = [Check("name", status, "finding") for status in statuses]
    assert checks.exit_status(made) == expected


# As other software words them.
ERRORS = {
    "Unsupported version: expected <= 7 but got 11": "libtpu is too old",
    "INVALID_ARGUMENT: Invalid TPU external name: TPU7x": "does not know this chip",
    "ABORTED: The TPU is already in use by process with pid 5. Not attempting to load "
    "libtpu.so in this process.": "end the other one",
    "RESOURCE_EXHAUSTED: Attempting to reserve 15.00G": "--quick",
    "something else": "attach the file",
}


@pytest.mark.parametrize(("text", "remedy"), ERRORS.items(), ids=ERRORS.values())
def test_an_error_of_other_software_has_a_remedy(text, remedy):
    def fail() -> Check:
        raise RuntimeError(f"first line\n  {text}")

    check = checks.guarded("numbers", fail)
    assert check.status is Status.FAILED
    assert "\n" not in str(check)
    assert text in check.finding
    assert remedy in str(check.remedy)


def test_a_long_error_is_cut_on_the_line_and_longer_in_the_report():
    check = checks.of_error("numbers", ValueError("x" * 1000))
    assert len(check.finding) < 400
    assert len(check.figures["error"]) == 1000

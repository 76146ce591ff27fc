"""Settings that keep a program from the TPU, or the TPU from its speed."""

import pytest

from torch_rpa.doctor import settings
from torch_rpa.doctor.installation import Installation

FLAG = {"LIBTPU_INIT_ARGS": "--other --xla_tpu_dvfs_p_state=7"}


def with_variables(has_tpu=True, **variables):
    return Installation("3.11.9", {}, variables, has_tpu)


@pytest.mark.parametrize(
    ("installation", "device", "status", "remedy"),
    [
        (with_variables(has_tpu=False), "xla", "skipped", None),
        (with_variables(), "xla", "ok", None),
        (with_variables(PJRT_DEVICE="TPU"), "xla", "ok", None),
        (with_variables(PJRT_DEVICE="CPU"), "xla", "warning", "export PJRT_DEVICE=TPU"),
        (with_variables(PJRT_DEVICE="CPU"), "tpu", "ok", None),
        (with_variables(), "cpu", "warning", "--device xla or tpu"),
    ],
)
def test_a_tpu_that_is_there_is_used(installation, device, status, remedy):
    check = settings.device_check(installation, device)
    assert (check.status, check.remedy) == (status, remedy)


@pytest.mark.parametrize(
    ("variables", "platform", "chip", "expected"),
    [
        ({}, "cpu", None, []),
        ({}, "tpu", "v6e", [("chip", "ok")]),
        ({}, "tpu", "v4", [("chip", "warning")]),
        ({}, "tpu", None, [("chip", "warning")]),
        ({}, "tpu", "tpu7x", [("chip", "ok"), ("clock", "warning")]),
        (FLAG, "tpu", "tpu7x", [("chip", "ok"), ("clock", "ok")]),
    ],
)
def test_the_chip_and_its_clock(variables, platform, chip, expected):
    found = settings.chip_checks(with_variables(**variables), platform, chip)
    assert [(check.name, check.status) for check in found] == expected

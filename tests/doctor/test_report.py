"""The report says nothing of the machine that its owner would not show."""

import json
import math

import pytest

from torch_rpa.doctor import checks, report
from torch_rpa.doctor.installation import Installation

TEXTS = {
    "cannot open /home/alice/models/weights.bin": "cannot open .../weights.bin",
    'File "/home/alice/a.py", line 3': 'File ".../a.py", line 3',
    "--xla_dump_to=/srv/alice": "--xla_dump_to=.../alice",
    "~/secret/x": ".../x",
    "see https://github.com/jax-ml/jax/issues": "see https://github.com/jax-ml/jax/issues",
    "1/2 of 3 TB/s, float32/int8": "1/2 of 3 TB/s, float32/int8",
    "worker alices-vm-3: lost": "worker HOST: lost",
    "alices-vm-30 is another": "alices-vm-30 is another",
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.items(), ids=TEXTS.values())
def test_paths_are_cut_and_the_host_is_not_named(text, expected):
    assert report.without_names(text, "alices-vm-3") == expected


def make(**more):
    installation = Installation(
        "3.11.9",
        {"jax": "0.10.2"},
        {
            "TPU_LIBRARY_PATH": "/home/alice/libtpu.so",
            "LIBTPU_INIT_ARGS": "--xla_dump_to=/home/alice/dump --other",
        },
    )
    made = [
        checks.of_error("numbers", OSError("/home/alice/x: not found")),
        checks.failed("numbers", "not a number", checks.REPORT, error=math.inf),
    ]
    return report.content(
        installation, {"name": "xla"}, made, {"chips": {}}, complete=True, **more
    )


def test_nothing_in_a_report_is_a_path():
    text = json.dumps(make())
    assert "alice" not in text.replace(".../dump", "") and "/home" not in text
    content = json.loads(text)
    assert content["installation"]["variables"]["TPU_LIBRARY_PATH"] == "set"
    assert content["exit_status"] == 1
    assert content["checks"][0]["remedy"] == checks.REPORT
    assert content["checks"][1]["figures"] == {"error": "inf"}


def test_a_report_is_written_whole(tmp_path):
    path = tmp_path / "report.json"
    report.write(path, make())
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["complete"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]

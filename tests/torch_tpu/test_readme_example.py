"""The README's lines for TorchTPU run as printed."""

import pytest

from tests.support import compile_only_tpu
from tests.test_readme import README, block

REASON = compile_only_tpu.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.slow,
    pytest.mark.torch_tpu,
]

CODE = """
from tests.test_readme import README, block, run
names = {}
for marker in ("example", "module example", "torchtpu example"):
    print(marker, run(block(marker), README, names))
q, k, v, cache = (names[name].to("tpu") for name in "q k v cache".split())
batch = [x.to("tpu") for x in names["batch"]]
print(names["torch"].ops.rpa.ragged_paged_attention(q, k, v, cache, *batch).cpu().shape)
"""


def test_the_example_runs_as_printed(tmp_path):
    assert 'backend="tpu"' in block("torchtpu example", README)
    completed = compile_only_tpu.run("v6e", tmp_path, "-c", CODE)
    *_, printed, expected, at_once = completed.stdout.splitlines()
    assert expected == f"torchtpu example {[printed]}"
    assert at_once == "torch.Size([4, 8, 128])"
    programs = compile_only_tpu.Dump(tmp_path).programs()
    decoder, alone = (p for p in programs if p.hlo.kernel_calls)
    assert len(decoder.hlo.kernel_calls) == 2 and len(alone.hlo.kernel_calls) == 1

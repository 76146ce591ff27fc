#!/usr/bin/env bash
# transformers 5: mixtures of experts do not run on XLA devices as they come.
#
# Versions: transformers 5.24.0, torch_xla 2.9.0, torch 2.9.1, on the XLA CPU device.
#
# Seen: a small Mixtral.
#
#   grouped_mm, the default: NotImplementedError: "histogram_cpu" not implemented for
#   'Int'
#   batched_mm: logits as on the CPU
#
# Expected: that the default runs, or that the error names the way out. It names neither
# experts nor XLA. Off the CPU, transformers counts the tokens of each expert by a
# histogram of int32; torch_xla hands it to the CPU, which has none for int32.
#
# Why it matters here: models with experts are among the tested families. Call
# `model.set_experts_implementation("batched_mm")` before they are moved, as
# torch_rpa/transformers/README.md says.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    torch==2.9.1 torch_xla==2.9.0 numpy==2.4.6 \
    transformers==5.24.0

cd "$work"
HF_HUB_OFFLINE=1 PJRT_DEVICE=CPU "$work/venv/bin/python" - <<'EOF'
import torch
import torch_xla
from transformers import MixtralConfig, MixtralForCausalLM

config = MixtralConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=4,
)
model = MixtralForCausalLM(config).eval()
tokens = torch.tensor([[5, 6, 7, 8]])
device = torch_xla.device()


@torch.no_grad()
def logits(tokens):
    return model(tokens, use_cache=False).logits.cpu()


expected = logits(tokens)
model.to(device)
default = model.config._experts_implementation
try:
    logits(tokens.to(device))
except NotImplementedError as error:
    print(f"{default}, the default: NotImplementedError: {error}")
    assert default == "grouped_mm" and "histogram_cpu" in str(error)
else:
    raise AssertionError(f"{default} ran")

model.set_experts_implementation("batched_mm")
difference = (logits(tokens.to(device)) - expected).abs().max().item()
print(f"batched_mm: logits differ by {difference:.1e}")
assert difference < 1e-5
EOF

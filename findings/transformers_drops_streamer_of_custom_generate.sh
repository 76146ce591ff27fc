#!/usr/bin/env bash
# transformers: `streamer=`, `assistant_model=` and `tokenizer=` do not reach
# custom_generate.
#
# Versions: transformers 5.24.0, torch 2.9.1, on the CPU. The same in 4.57.6.
#
# Seen: `model.generate(..., streamer=streamer, custom_generate=function)`, where the
# function names both parameters.
#
#   the function gets streamer=None, assistant_model=None
#   the streamer was given the prompt, no token, and was never ended
#
# With `stop_strings=` and `tokenizer=`, `generate` raises before it calls the function:
# it could not locate a tokenizer, which must be passed as `tokenizer`.
#
# Expected: both passed on, as `generate` passes them to its own loops; or an error. The
# streamer is taken, gets the prompt, and then nothing: who reads from a
# TextIteratorStreamer waits for ever, since nobody ends it.
#
# Why it matters here: `model.generate(custom_generate=torch_rpa.transformers.generate)`
# streams. It finds the arguments in the frames of the call to `generate`
# (`_call_of_transformers` in torch_rpa/transformers/generation.py), feeds the streamer
# and refuses the assistant; see `test_a_streamer_gets_the_prompt_and_every_token`. It
# takes `stop_strings` itself, before `generate` asks for the tokenizer; see
# `test_stop_strings_end_rows_as_in_eager`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    torch==2.9.1 transformers==5.24.0 numpy==2.4.6

cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'EOF'
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer


class Streamer(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.tensor([[5, 6, 7]])
options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

streamer = Streamer()
tokens = model.generate(prompt, streamer=streamer, **options)
assert streamer.tokens == tokens[0].tolist() and streamer.ended

got = {}


def function(model, input_ids, streamer=None, assistant_model=None, **others):
    got.update(others, streamer=streamer, assistant_model=assistant_model)
    return input_ids


streamer = Streamer()
model.generate(
    prompt,
    streamer=streamer,
    assistant_model=model,
    custom_generate=function,
    **options,
)
print(f"the function gets {got['streamer']=}, {got['assistant_model']=}")
print(f"the streamer was given {streamer.tokens}, ended: {streamer.ended}")
assert got["streamer"] is None and got["assistant_model"] is None
assert "logits_processor" in got
assert streamer.tokens == [5, 6, 7] and not streamer.ended

stop = {"stop_strings": ["a"], "tokenizer": object()}
try:
    model.generate(prompt, custom_generate=function, **stop, **options)
except ValueError as error:
    print(f"with stop strings: {error}")
    assert "could not locate a tokenizer" in str(error)
else:
    raise AssertionError("the tokenizer was found")
EOF

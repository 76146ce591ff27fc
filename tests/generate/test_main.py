"""The command line: what it prints, checks and refuses."""

import dataclasses
import io
import itertools
import json
import os
import re
import resource
import runpy
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

import torch_rpa
from jax_kernels.contract.cache import CACHE_DTYPES
from tests.support.recorded_caches import RecordedCaches
from torch_rpa.generate import check, command_line, constants, run
from torch_rpa.generate import models as generate_models
from torch_rpa.generate.__main__ import main
from torch_rpa.generate.tokenizer import ByteTokenizer, PromptEncoder
from torch_rpa.generate.trace import PARAMS_FIELDS
from torch_rpa.options import torch_dtype
from torch_rpa.serving import (
    Engine,
    EngineOptions,
    SamplingParams,
    StructuredOutputsParams,
    sampling_params,
)
from torch_rpa.transformers import ATTENTION_NAME

SHORT = ["--device", "cpu", "--max-new-tokens", "6"]


@pytest.fixture
def model_directory(llama, tmp_path):
    """A tiny model with a tokenizer of bytes, as ``save_pretrained`` writes them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>"
    ).save_pretrained(tmp_path)
    llama("eager").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.torch_xla
def test_the_built_in_model_passes_its_check_on_the_xla_device(capsys):
    arguments = ["--check", "--max-new-tokens", "8", "--page-size", "8"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "--- Once upon a time\n" in out
    assert "compilations            3\n" in out  # prefill, decode and the caches
    assert "compiling:   0%" in err  # before there is a step
    assert "check passed: 32 tokens" in out


def test_a_model_directory_passes_its_check(model_directory, capsys):
    arguments = ["--model", str(model_directory), "--check", *SHORT]
    assert main([*arguments, "--prompt", "one", "--prompt", "two two"]) == 0
    out = capsys.readouterr().out
    assert "--- one\n" in out and "--- two two\n" in out
    assert "prompt tokens           10\n" in out
    assert "check passed: 12 tokens" in out


def test_a_difference_fails_the_check_and_is_named(monkeypatch, capsys):
    def one_token_off(model, prompt, **keywords):
        tokens = reference(model, prompt, **keywords)
        return [*tokens[:4], tokens[4] ^ 1, *tokens[5:]] if len(prompt) > 5 else tokens

    reference = check.reference_generate
    monkeypatch.setattr(check, "reference_generate", one_token_off)
    arguments = ["--check", *SHORT, "--prompt", "four", "--prompt", "longer"]
    assert main(arguments) == 1
    assert "check FAILED: prompt 1, generated token 4: got" in capsys.readouterr().err


def test_bfloat16_and_a_small_cache_dtype_run(capsys):
    dtypes = ["--dtype", "bfloat16", "--cache-dtype", "float8_e4m3fn"]
    assert main([*SHORT, *dtypes]) == 0
    assert "generated tokens        24\n" in capsys.readouterr().out


def test_a_cache_in_int8_gives_the_same_text_with_scales(capsys):
    def text(*options):
        assert main([*SHORT, "--prompt", "Return a new ", *options]) == 0
        return capsys.readouterr().out.split("\n\ndevice")[0]

    # Its largest key is 15, and its largest value 10.
    scales = {"--k-scale": "0.13", "--v-scale": "0.09"}
    int8 = ["--cache-dtype", "int8"]
    assert text(*int8, *itertools.chain(*scales.items())) == text()
    for option in scales:  # 1 rounds to whole numbers
        rounding = {**scales, option: "1"}
        assert text(*int8, *itertools.chain(*rounding.items())) != text()


def test_each_scale_divides_what_is_its_own(monkeypatch):
    caches = RecordedCaches(monkeypatch)
    assert main(SHORT) == 0
    unscaled = caches.last()
    assert main([*SHORT, "--k-scale", "2", "--v-scale", "8"]) == 0
    keys, values = caches.last().unbind(2)
    assert torch.equal(torch.stack([keys * 2, values * 8], 2), unscaled)


def test_scales_of_layers_come_from_a_file(monkeypatch, tmp_path):
    layers = torch.tensor([2.0, 4.0, 8.0, 16.0])
    torch_rpa.KVScales(layers, 0.5).save(tmp_path / "scales.json")
    names = ("layers.{}.attention.k_scale", "layers.{}.attention.v_scale")
    tensors = {
        name.format(layer): scale
        for name, scales in zip(names, (layers, torch.full((4,), 0.5)), strict=True)
        for layer, scale in enumerate(scales.unbind())
    }
    save_file(tensors, tmp_path / "model.safetensors")
    caches = RecordedCaches(monkeypatch)
    assert main(SHORT) == 0
    keys, values = caches.last().unbind(2)
    for source in ("scales.json", "."):
        assert main([*SHORT, "--kv-scales", str(tmp_path / source)]) == 0
        scaled_keys, scaled_values = caches.last().unbind(2)
        factors = layers[:, None, None, None, None]
        torch.testing.assert_close(scaled_keys * factors, keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scaled_values / 2, values, rtol=1e-5, atol=1e-5)


def test_prompts_come_from_arguments_a_file_or_standard_input(
    tmp_path, monkeypatch, capsys
):
    file = tmp_path / "prompts.txt"
    file.write_text("second\n\nthird\n", encoding="utf-8")
    arguments = ["--prompt", "first", "--prompt-file"]
    assert main([*SHORT, *arguments, str(file)]) == 0
    from_file = capsys.readouterr().out
    headings = [line for line in from_file.splitlines() if line.startswith("---")]
    assert headings == ["--- first", "--- second", "--- third"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("second\nthird\n"))
    assert main([*SHORT, *arguments, "-"]) == 0
    from_stdin = capsys.readouterr().out
    assert from_stdin.split("device")[0] == from_file.split("device")[0]


def test_streamed_texts_are_the_same_texts(capsys):
    arguments = [*SHORT, "--prompt", "one", "--temperature", "1", "--seed", "3"]
    assert main(arguments) == 0
    text = capsys.readouterr().out.split("--- one\n")[1].split("\n\ndevice")[0]
    assert main([*arguments, "--stream"]) == 0
    assert capsys.readouterr().out.split("\n\ndevice")[0] == f"one{text}"
    assert main([*arguments, "--seed", "4"]) == 0
    assert text not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repetition-penalty", "1.5"],
        ["--presence-penalty", "1.5"],
        ["--frequency-penalty", "1.5"],
        ["--temperature", "5", "--min-p", "0.9"],
    ],
)
def test_an_option_of_sampling_means_what_it_means_to_the_engine(arguments, capsys):
    prompt = "aaaaaaaa"
    names = [arg.removeprefix("--").replace("-", "_") for arg in arguments[::2]]
    wishes = dict(zip(names, map(float, arguments[1::2]), strict=True))
    model = generate_models.load_model(None, ATTENTION_NAME, torch.float32)
    engine = Engine(model, EngineOptions(device="cpu"), tokenizer=ByteTokenizer())

    def text(**fields):
        params = SamplingParams(max_new_tokens=16, seed=0, **fields)
        (output,) = engine.generate_batch([prompt], params).values()
        return output.text

    expected = text(**wishes)
    assert expected != text(**{"temperature": wishes.get("temperature", 0.0)})
    command = ["--device", "cpu", "--max-new-tokens", "16", "--prompt", prompt]
    assert main([*command, *arguments]) == 0
    assert f"--- {prompt}\n{expected}\n\ndevice" in capsys.readouterr().out


def test_min_tokens_keep_a_text_from_its_end(capsys):
    arguments = [*SHORT, "--prompt", "one", "--stop", " "]
    assert main(arguments) == 0
    short = capsys.readouterr().out
    assert main([*arguments, "--min-tokens", "6"]) == 0
    assert "generated tokens        6\n" in capsys.readouterr().out != short


@pytest.mark.parametrize(
    ("arguments", "expression"),
    [
        (["--regex", "[xy]{3}(é|z)"], "[xy]{3}(é|z)"),
        (["--choice", "no", "--choice", "maybe"], "no|maybe"),
        (["--json", '{"enum": [1, "a"]}'], '1|"a"'),
    ],
)
def test_a_text_is_what_an_option_says_it_must_be_like(arguments, expression, capsys):
    pytest.importorskip("llguidance")
    options = ["--device", "cpu", "--max-new-tokens", "12", "--prompt", "one"]
    assert main([*options, *arguments]) == 0
    text = capsys.readouterr().out.split("--- one\n")[1].split("\n\ndevice")[0]
    assert re.fullmatch(expression, text)


def test_llguidance_is_asked_for_by_the_option(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert main([*SHORT, "--regex", "a"]) == 2
    message = "error: --json, --regex or --choice needs llguidance, which is not inst"
    assert message in capsys.readouterr().err


def test_several_texts_are_numbered_and_have_log_probabilities(capsys):
    arguments = [*SHORT, "--prompt", "one", "--prompt", "two", "--temperature", "1"]
    assert main([*arguments, "--n", "2", "--logprobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "generated tokens        24\n" in out
    texts = [text.splitlines() for text in out.split("\n\ndevice")[0].split("--- ")]
    headings = [text[0] for text in texts[1:]]
    assert headings == ["one [1 of 2]", "one [2 of 2]", "two [1 of 2]", "two [2 of 2]"]
    for _, text, title, *lines in texts[1:]:
        assert title == "logprob  rank  token: most likely"
        rows = [re.fullmatch(r" *(-\S+) +(\d+)  '(.+?)': (.+)", line) for line in lines]
        assert "".join(row[3] for row in rows if row) == text and len(rows) == 6
        for row in rows:
            entries = row[4].split(", ") if row else []
            assert row and entries[min(int(row[2]), 3) - 1] == f"'{row[3]}' {row[1]}"
    assert main([*arguments, "--n", "2", "--stream"]) == 0
    streamed = {line[:3] for line in capsys.readouterr().out.splitlines()}
    assert {"[0]", "[1]", "[2]", "[3]"} <= streamed


def test_the_bar_says_compiling_until_a_step_compiles_nothing(monkeypatch):
    seen = []

    class Bar(run.tqdm):
        def update(self, n=1):
            seen.append(self.desc.removesuffix(": "))
            return super().update(n)

    class Compiling(Engine):
        """Compiles in its first three steps: each asks twice how much it has been."""

        num_calls = 0

        def _num_compilations(self):
            self.num_calls = min(self.num_calls + 1, 8)
            return self.num_calls

    monkeypatch.setattr(run, "tqdm", Bar)
    monkeypatch.setattr(run, "Engine", Compiling)
    assert main([*SHORT, "--prompt", "a"]) == 0
    # What the first step brings comes with the second.
    assert seen == ["compiling", "compiling", *["generating"] * 4]


def test_there_may_be_more_sequences_than_tokens_of_prompts(capsys):
    assert main([*SHORT, "--prompt", "a", "--max-num-sequences", "8"]) == 0
    assert "at most               8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trace_is_replayed_checked_and_plotted(tmp_path, capsys):
    trace, picture = tmp_path / "trace.jsonl", tmp_path / "steps.png"
    prefix = '"prefix": "p", "prefix_tokens": 32'
    for index in range(5):
        with trace.open("a") as file:
            file.write(
                f'{{"arrival_step": {4 * index}, "prompt_tokens": {40 + index}, '
            )
            file.write(f"{prefix}}}\n")
    arguments = ["--trace", str(trace), "--check", "--plot", str(picture)]
    assert main([*SHORT, *arguments]) == 0
    out = capsys.readouterr().out
    assert "requests                5\n" in out
    assert "prompt tokens           210\n" in out
    assert "  from prefix cache     128\n" in out
    assert "check passed: 30 tokens" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_requests_that_do_not_fit_fail_and_the_others_are_printed(capsys):
    arguments = [*SHORT, "--num-pages", "1", "--prompt", "a", "--prompt", "b" * 20]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "--- a\n" in out
    assert f"error: '{'b' * 20}': 21 prompt tokens and 6 new ones need 2 pages" in err


def test_a_missing_matplotlib_is_reported_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SHORT, "--plot", "steps.png"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--plot needs matplotlib: pip install matplotlib" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "no/such/file"], "No such file"),
        (["--max-new-tokens", "999"], "--max-new-tokens together must be at most the"),
        (["--model", "no/such/directory"], "error: --model must be a directory"),
        (["--model", os.path.dirname(__file__)], "with a config.json, as save_pre"),
        (["--kv-scales", "no/such/file.json"], "No such file"),
        (["--kv-scales", "no/such"], "--kv-scales: source must be a folder or a file"),
        (["--kv-scales", __file__], "--kv-scales: source must be a folder or a file"),
        (["--prompt-file", sys.executable], "--prompt-file must be text in UTF-8, got"),
        (["--n", "2"], "error: --n must be 1 at temperature 0, got 2"),
        (
            ["--min-tokens", "7"],
            "--min-tokens must be at least 0 and at most --max-",
        ),
        (["--num-pages", "1", "--prompt", "b" * 20], "raise --num-pages, or shorten"),
        (["--plot", "no/such/folder/steps.png"], "--plot must be a file in a folder"),
        (["--plot", "steps.xyz"], "--plot must end in one of ."),
        (["--prompt-file", "no/such/file"], "No such file"),
        (["--regex", "(a"], "--regex must be one that llguidance can follow, got '(a'"),
        (["--json", '{"type": "x"}'], "--json must be one that llguidance can follow"),
    ],
)
def test_user_mistakes_are_one_line(arguments, message, capsys):
    assert main([*SHORT, *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"k_scale": -1, "v_scale": 1}, "scales.json: k_scale must be a positive"),
        ({"k_scale": 1, "v_scale": [1, 1]}, "error: v_scale must be a number or have"),
    ],
)
def test_mistakes_in_a_file_of_scales_name_no_other_option(
    numbers, message, tmp_path, capsys
):
    file = tmp_path / "scales.json"
    file.write_text(json.dumps(numbers), encoding="utf-8")
    assert main([*SHORT, "--kv-scales", str(file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "--dtype", "bfloat16"], "drop --dtype and --cache-dtype"),
        (["--check", "--cache-dtype", "float8_e4m3fn"], "drop --dtype and --cache"),
        (["--check", "--temperature", "1", "--stop", "a"], "--temperature and --stop"),
        (["--check", "--n", "2"], "the model's own greedy texts: drop --n"),
        (["--check", "--presence-penalty", "1"], "drop --presence-penalty"),
        (["--trace", "file", "--prompt", "a"], "drop --prompt and --prompt-file"),
        (["--trace", "file", "--stream"], "drop --stream and --logprobs"),
        (["--trace", "file", "--logprobs", "0"], "drop --stream and --logprobs"),
        (["--stream", "--logprobs", "0"], "printed after a text: drop --stream"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be an int of at least 1"),
        (["--max-new-tokens", "many"], "--max-new-tokens: must be an int of at least"),
        (["--max-num-sequences", "9999999999"], "below 2**31, got 9999999999"),
        (
            ["--max-num-sequences", "4", "--max-tokens-per-step", "2"],
            "--max-tokens-per-step must be at least one for each of the 4 of --max-num",
        ),
        (["--page-size", "12"], "--page-size: must be a power of two from 8 to 512"),
        (["--temperature", "-1"], "--temperature: must be 0 or at least 1e-05"),
        (["--temperature", "nan"], "--temperature: must be 0 or at least 1e-05"),
        (["--top-k", "-1"], "--top-k: must be an int, 0 (all) or more"),
        (["--top-p", "1.5"], "--top-p: must be more than 0 and at most 1, got 1.5"),
        (["--min-p", "2"], "--min-p: must be at least 0 and at most 1, got 2"),
        (["--n", "0"], "--n: must be an int of at least 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty: must be more than 0"),
        (["--presence-penalty", "3"], "--presence-penalty: must be from -2 to 2"),
        (["--frequency-penalty", "nan"], "--frequency-penalty: must be from -2 to 2"),
        (["--min-tokens", "-1"], "--min-tokens: must be an int of at least 0"),
        (["--logprobs", "21"], "--logprobs: must be an int from 0 to 20, got 21"),
        (["--k-scale", "0"], "--k-scale: must be a positive number from 2**-120"),
        (["--v-scale", "x"], "--v-scale: must be a positive number from 2**-120"),
        (["--kv-scales", "a", "--v-scale", "1"], "drop --k-scale and --v-scale"),
        (["--stop", ""], "--stop: must have one character or more"),
        (["--json", "file.json"], "--json: must be a JSON schema, got 'file.json': "),
        (["--json", "[]"], "--json: must be a JSON schema, which is an object, got"),
        (["--regex", ""], "--regex: must have one character or more"),
        (["--choice", ""], "--choice: must have one character or more"),
        (["--json", "{}", "--choice", "a"], "--choice: not allowed with argument --j"),
        (["--check", "--regex", "a"], "the model's own greedy texts: drop --regex"),
        (["--device", "cuda"], "--device: invalid choice: 'cuda'"),
    ],
)
def test_impossible_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    err = capsys.readouterr().err
    assert "usage: python -m torch_rpa.generate" in err
    assert message in err.splitlines()[-1]


def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", *SHORT, "--prompt", "a"])
    monkeypatch.delitem(sys.modules, "torch_rpa.generate.__main__")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("torch_rpa.generate", run_name="__main__")
    assert "--- a\n" in capsys.readouterr().out


def test_the_models_generation_config_is_honoured(model_directory, capsys):
    """Such as that of Llama 2, whose length counts the prompt."""
    arguments = ["--model", str(model_directory), "--device", "cpu", "--prompt", "one"]

    def text(*more):
        assert main([*arguments, *more]) == 0
        return capsys.readouterr().out.split("\n\ndevice")[0]

    greedy = text("--max-new-tokens", "6")
    sampling = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "max_length": 96}
    GenerationConfig(**sampling).save_pretrained(model_directory)
    sampled = text("--max-new-tokens", "6")
    assert sampled != greedy == text("--max-new-tokens", "6", "--temperature", "0")
    assert len(text()) > len(sampled)
    check = [*arguments, "--check", "--max-new-tokens", "6"]
    assert main(check) == 0 and "check passed: 6" in capsys.readouterr().out
    GenerationConfig(max_new_tokens=3).save_pretrained(model_directory)
    short = text()
    assert greedy.startswith(short) and short != greedy


@pytest.mark.parametrize("prompt", ["hi", "<s>hi"])
def test_a_begin_token_is_never_doubled_and_a_chat_is_written(prompt):
    letters = {letter: index for index, letter in enumerate("hiuser: ")}
    characters = Tokenizer(models.BPE(vocab={**letters, "<s>": 9}, merges=[]))
    characters.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 9)]
    )
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=characters, bos_token="<s>"
    )
    assert tokenizer.encode("<s>hi")[:2] == [9, 9]  # of the tokenizer alone
    assert PromptEncoder(tokenizer).encode(prompt) == [9, 0, 1]
    with pytest.raises(ValueError, match=r"--chat needs .* chat template, got"):
        PromptEncoder(tokenizer, as_chat=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}i{% endif %}"
    )
    chat = [9, *(letters[letter] for letter in "user: hii")]
    assert PromptEncoder(tokenizer, as_chat=True).encode("hi") == chat


def test_a_chat_needs_a_template(capsys):
    assert main([*SHORT, "--chat"]) == 2
    assert "--chat needs a tokenizer with a chat template" in capsys.readouterr().err


def test_what_is_known_before_torch_is_imported_is_what_it_knows(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "run", lambda args, with_option_names: seen.append(args))
    main([])
    assert seen[0].page_size == EngineOptions().page_size
    assert command_line.MOST_LOGPROBS == sampling_params.MAX_LOGPROBS
    fields = [field.name for field in dataclasses.fields(SamplingParams)]
    assert set(run.SAMPLING_OPTIONS) <= {*fields} & {*vars(seen[0])}
    assert set(PARAMS_FIELDS) <= {*run.SAMPLING_OPTIONS}
    structure = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    assert list(run.STRUCTURE_OPTIONS) == structure
    assert {*structure} <= {*vars(seen[0])}
    for name in (*constants.MODEL_DTYPES, *CACHE_DTYPES):
        assert isinstance(torch_dtype(name), torch.dtype)


def test_every_bad_line_of_a_trace_is_named_before_anything_runs(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt": 1}\n{"prompt": "a"}\n{"prompt": "a", "top_p": 2}\n')
    arguments = ["--trace", str(trace), "--model", "no/such/directory"]
    assert main([*SHORT, *arguments]) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert first == f"error: {trace}, line 1: prompt must be a text, got 1"
    assert second.startswith(f"error: {trace}, line 3: top_p must be more than 0")
    assert out == ""


@pytest.mark.parametrize("streams", [False, True])
def test_an_interrupt_keeps_the_texts_so_far_and_the_summary(
    streams, monkeypatch, capsys
):
    step, num_steps = Engine.step, 0

    def interrupted(self):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 5:
            raise KeyboardInterrupt
        return step(self)

    arguments = [*SHORT, "--prompt", "one", "--prompt", "two"]
    assert main(arguments) == 0
    whole = capsys.readouterr().out.split("--- one\n")[1].split("\n--- two")[0]
    monkeypatch.setattr(Engine, "step", interrupted)
    assert main([*arguments, *["--stream"] * streams]) == 130
    out, err = capsys.readouterr()
    heading = "[0] one" if streams else "--- one\n"
    assert f"{heading}{whole[:3]}\n" in out
    assert "generated tokens        6\n" in out
    assert "interrupted: 0 of 2 texts had ended" in err


@pytest.mark.parametrize("as_script", [False, True])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "--max-new-tokens"),
        (["--top-p", "2"], "--top-p: must be more than 0 and at most 1, got 2"),
    ],
)
def test_help_and_range_errors_take_less_than_a_second(
    arguments, expected, as_script, tmp_path
):
    """Of the processors. Importing torch alone takes longer."""
    command = ["-m", "torch_rpa.generate"]
    if as_script:  # as pip writes it
        script = tmp_path / "torch-rpa-generate"
        script.write_text(
            "import sys\n"
            "from torch_rpa.generate.__main__ import main\n"
            "sys.exit(main())\n"
        )
        command = [str(script)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert expected in result.stdout + result.stderr
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "torch_rpa.generate.command_line" in imported
    assert not imported & {"torch", "transformers", "torch_xla", "jax"}
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 1


def test_names_that_the_command_line_left_for_later_are_found(tmp_path):
    """By a model's own code, for example."""
    script = tmp_path / "torch-rpa-generate"
    script.write_text(
        "import sys, torch_rpa\n"
        "assert 'torch' not in sys.modules\n"
        "torch_rpa.ragged_paged_attention\n"
        "import torch\n"
        "torch.ops.rpa.ragged_paged_attention\n"
        "assert all(hasattr(torch_rpa, name) for name in torch_rpa.__all__)\n"
        "print(hasattr(torch_rpa, 'nothing'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout == "False\n", result.stderr

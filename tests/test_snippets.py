"""All code that pages print is run, and all commands are understood.

Examples are run by the tests that name them. Fragments are run here, with the names
that the comment before each lists, on CPU tensors: only the name of the device and the
number of new tokens are replaced. Commands are read by the parser of the program that
they start.
"""

import argparse
import importlib
import json
import re
import shlex
import tomllib

import pytest
import torch

from tests.support import snippets
from tests.support.snippets import ROOT, Snippet

PYTHON = snippets.all_snippets("python")
SHELL = snippets.all_snippets("bash", "sh")
FRAGMENTS = [s for s in PYTHON if s.given is not None]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


def test_all_the_code_is_found():
    documents = {snippet.document for snippet in PYTHON}
    assert {"README.md", "torch_rpa/serving/README.md"} <= documents
    fences = sum(
        len(re.findall(r"^ *```", path.read_text("utf-8"), re.MULTILINE))
        for path in snippets.documents()
    )
    others = snippets.all_snippets("text", "")
    assert 2 * len(PYTHON + SHELL + others) == fences


@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_python_is_a_fragment_or_an_example_that_a_test_names(snippet):
    assert snippet.marker is not None, (
        "put <!-- fragment: NAMES --> or <!-- NAME example --> before the code"
    )
    if snippet.given is None:
        assert snippet.marker.endswith("example")
        tests = [p for p in (ROOT / "tests").rglob("test_*.py")]
        assert any(f'"{snippet.marker}"' in p.read_text("utf-8") for p in tests)


def test_pages_of_the_reference_print_no_code():
    for page in (ROOT / "docs").glob("*.rst"):
        text = page.read_text("utf-8")
        assert re.findall(r"code-block|code::|literalinclude|>>>|\w::$", text) == []


# ---- fragments


class Tokenizer:
    """Enough of a tokenizer: each letter is a token."""

    def __call__(self, texts, padding, return_tensors):
        assert padding and return_tensors == "pt"
        width = max(map(len, texts))
        rows = [[0] * (width - len(t)) + list(t.encode()) for t in texts]
        mask = [[0] * (width - len(t)) + [1] * len(t) for t in texts]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}

    def encode(self, text):
        return list(text.encode())


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    pytest.importorskip("transformers")
    from tests.support.tiny_llama import build_llama

    folder = tmp_path_factory.mktemp("model")
    model = build_llama("eager")
    model.generation_config.max_new_tokens = 3
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return str(folder)


def given_names(saved_model) -> dict:
    """All names that fragments may want; sizes are those of the tiny model."""
    import transformers

    import torch_rpa
    import torch_rpa.transformers as rpa_transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved_model, attn_implementation="rpa"
    )
    tokenizer, prompts = Tokenizer(), ["ab", "abc"]
    kv_lens, page_indices, cu_q_lens, distribution = (
        torch.tensor(x).int() for x in ([5, 3], [4, 1], [0, 1, 4], [1, 1, 2])
    )
    heads = {"num_pages": 6, "page_size": 8}
    return {
        "torch": torch,
        "rpa_transformers": rpa_transformers,
        "name": saved_model,
        "model": model,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "inputs": tokenizer(prompts, padding=True, return_tensors="pt"),
        "token_ids": [[5, 6, 7], [8]],
        **heads,
        "kv_caches": rpa_transformers.empty_kv_caches(
            model, *heads.values(), dtype=torch.float32, device="cpu"
        ),
        "kv_cache": torch_rpa.empty_kv_cache(6, 8, 2, 64, dtype=torch.float32),
        "kv_lens": kv_lens,
        "page_indices": page_indices,
        "cu_q_lens": cu_q_lens,
        "distribution": distribution,
        "batch": rpa_transformers.RaggedBatch(
            kv_lens, page_indices, cu_q_lens, distribution
        ),
        "input_ids": torch.tensor([[1, 2, 3, 4]]),
        "positions": torch.tensor([[4, 0, 1, 2]]),
        "last_tokens": torch.tensor([0, 3]),
        "D": 64,
        "q": torch.ones(4, 4, 64),
        "k": torch.ones(4, 2, 64),
        "v": torch.ones(4, 2, 64),
        "local_output_weight": torch.ones(4 * 64, 8),
    }


@pytest.fixture
def one_process():
    """A group of torch.distributed with one member."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


ON_THE_CPU = {
    "import torch_xla\n": "",
    '"xla"': '"cpu"',
    "EngineOptions(": 'EngineOptions(device="cpu", ',
    "max_new_tokens=64": "max_new_tokens=2",
}
# What each computes last, as a name of it and a condition.
RESULTS = {
    "tokens": lambda tokens: tokens.shape[0] == 2 and tokens.shape[1] > 3,
    "logits": lambda logits: logits.shape[-1] == 258 and bool(logits.isfinite().all()),
    "outputs": lambda outputs: len(outputs) == 2,
    "out": lambda out: out.shape == (4, 4, 64),
    "lse": lambda lse: lse.shape == (4, 4) and bool(lse.isfinite().all()),
    "y": lambda y: y.shape == (4, 8),
}


# Heads over several devices need a process of their own: spmd_cases.py runs that one.
@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet", [s for s in FRAGMENTS if "use_spmd" not in s.code], ids=str
)
@torch.no_grad()
def test_a_fragment_runs_with_the_names_it_is_given(snippet, saved_model, one_process):
    known = given_names(saved_model)
    assert set(snippet.given) <= set(known), "add what is missing to given_names"
    names = {name: known[name] for name in snippet.given}
    run(snippet, names, ON_THE_CPU)
    results = [
        is_right(names[result])
        for result, is_right in RESULTS.items()
        if result in names and result not in snippet.given
    ]
    assert results and all(results), f"{sorted(names)}: is its result among RESULTS?"


def run(snippet: Snippet, names: dict, replaced: dict[str, str]) -> None:
    code = snippet.code
    for printed, other in replaced.items():
        code = code.replace(printed, other)
    exec(compile(code, snippet.document, "exec"), names)


def test_the_peer_example_names_a_call(monkeypatch, capsys):
    """Compiling a peer takes minutes, and an environment of its own."""
    from benchmarks.peers import prediction

    calls = []

    def predict_call(call):
        calls.append(call)
        return argparse.Namespace(microseconds=1.0)

    monkeypatch.setattr(prediction, "predict_call", predict_call)
    (snippet,) = [s for s in PYTHON if s.marker == "peer example"]
    run(snippet, {}, {})
    assert capsys.readouterr().out == "1.0\n"
    assert len(calls) == 1


# ---- commands


class ReadError(Exception):
    """Ends a program whose options have been read."""


def commands() -> list[tuple[str, str]]:
    """Each command of each page, on one line and without its comment."""
    found = []
    for snippet in SHELL:
        lines = snippet.code.replace("\\\n", " ").splitlines()
        for line in lines:
            parts = shlex.split(line, comments=True)
            joined = shlex.join(parts).replace("'&&'", "\n")
            found += [(snippet.document, c.strip()) for c in joined.split("\n") if c]
    return found


@pytest.mark.parametrize(
    ("document", "command"), commands(), ids=lambda text: text[:60]
)
def test_a_command_is_understood(document, command, monkeypatch):
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=\S*", words[0]):  # variables
        words.pop(0)
    program, *arguments = words
    if program in ("export", "source"):
        assert arguments
    elif program == "uv":
        if arguments[0] == "venv":
            assert "--seed" in arguments  # without it there is no pip
        else:
            assert arguments[:2] == ["pip", "install"]
            overrides = arguments[arguments.index("--overrides") + 1]
            assert (ROOT / overrides).is_file()
            extras = re.findall(r"\.\[([\w,-]+)\]", command)
            assert {e for x in extras for e in x.split(",")} <= set(EXTRAS)
    elif program.endswith("vllm"):  # which is in an environment of its own
        assert arguments[0] == "serve"
    elif program == "curl":
        assert json.loads(arguments[arguments.index("-d") + 1])["prompt"]
    elif "findings/" in program:
        assert (ROOT / program).is_file()
    elif program.endswith("pip") and arguments[0] == "install":
        extras = re.findall(r"\.\[([\w,-]+)\]", command)
        assert extras or "." in arguments
        assert {e for x in extras for e in x.split(",")} <= set(EXTRAS)
    elif re.search(r"python(3(\.\d+)?)?$", program) and arguments[0] == "-m":
        read_options(arguments[1], arguments[2:], monkeypatch)
    else:
        pytest.fail(f"{document} has a command that no test knows: {command}")


def read_options(module: str, arguments: list[str], monkeypatch) -> None:
    """Starts a module up to the point where it has read its options."""
    if module == "venv":
        assert len(arguments) == 1
        return
    if module == "pytest":
        paths = [a for a in arguments if a.startswith("tests")]
        assert all((ROOT / path).exists() for path in paths)
        return
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after(self, *given, **keywords):
        parse_args(self, *given, **keywords)
        raise ReadError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
    found = importlib.import_module(module)
    if not hasattr(found, "main"):  # a package
        found = importlib.import_module(f"{module}.__main__")
    with pytest.raises(ReadError):
        found.main(arguments)

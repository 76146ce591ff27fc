"""Calls of other kernels, without their packages: requests, pins, what is needed.

One extended test installs a peer and predicts a call of it.
"""

import fcntl
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compiler
from benchmarks.peers import calls, compilation, environments, prediction
from benchmarks.peers.calls import Capacity, PeerCall
from benchmarks.tpu_timing.workloads import Sequence, parse_sequences
from jax_kernels import chips
from tests.benchmarks import synthetic_dump

BLOCKS = {"bq_sz": 256, "bkv_sz": 512, "bq_csz": 128, "bkv_csz": 256}


def call_of(lengths, **fields):
    given = {
        "peer": "rpa_v3",
        "chip": "tpu7x",
        "num_q_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 256,
        "sequences": tuple(parse_sequences(lengths)),
    }
    return PeerCall(**{**given, **fields})


# --- environments ------------------------------------------------------------


def test_each_peer_has_an_environment_and_each_environment_pins():
    assert set(calls.PEERS) == set(environments.ENVIRONMENTS)
    for environment in environments.ENVIRONMENTS.values():
        pins = environment.pins()
        assert all("==" in pin for pin in pins)
        assert pins[-1] == f"libtpu=={environment.libtpu}"
        assert any(pin.startswith("jax==") for pin in pins)
        assert environment.pins("0.0.1")[-1] == "libtpu==0.0.1"


@pytest.fixture
def installations(tmp_path, monkeypatch):
    """Commands that would have made an environment."""
    commands = []

    def run(command):
        commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            python = environments.Path(command[3], "bin", "python")
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setattr(environments, "_run", run)
    monkeypatch.setattr(environments, "_version", lambda python: (3, 12))
    return commands


def test_an_environment_is_made_once(installations, tmp_path):
    python = environments.make("rpa_v3", directory=tmp_path, python="py")
    assert python == tmp_path / "rpa_v3-libtpu==0.0.44" / "bin" / "python"
    venv, together, alone = installations
    assert venv[0] == "py"
    assert together[-3:] == ["jax==0.11.0", "jaxlib==0.11.0", "libtpu==0.0.44"]
    assert alone[-2:] == ["--no-deps", "tpu-inference==0.31.0"]
    assert environments.make("rpa_v3", directory=tmp_path, python="py") == python
    assert len(installations) == 3
    other = environments.make("rpa_v3", "0.0.52", directory=tmp_path, python="py")
    assert other.parent.parent.name == "rpa_v3-libtpu==0.0.52"


def test_an_environment_with_other_pins_or_cut_off_is_made_anew(
    installations, tmp_path
):
    python = environments.make("splash", directory=tmp_path, python="py")
    (python.parent.parent / "pins.json").write_text('["jax==0.1"]')
    environments.make("splash", directory=tmp_path, python="py")
    (python.parent.parent / "pins.json").unlink()
    environments.make("splash", directory=tmp_path, python="py")
    assert sum("venv" in command for command in installations) == 3


def test_an_environment_is_made_by_one_process_at_a_time(
    installations, tmp_path, monkeypatch
):
    run = environments._run

    def nested(command):
        monkeypatch.setattr(environments, "_run", run)
        lock = next(tmp_path.glob("*.lock"))
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run(command)

    monkeypatch.setattr(environments, "_run", nested)
    environments.make("splash", directory=tmp_path, python="py")
    with next(tmp_path.glob("*.lock")).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_unknown_environment_is_refused():
    with pytest.raises(
        ValueError, match=r"name: expected one of .*'rpa_v3'.*, got 'x'"
    ):
        environments.make("x")


def test_an_old_python_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(environments, "_version", lambda python: (3, 11))
    with pytest.raises(
        ValueError, match=r"python: expected Python 3\.12 or newer.*got py \(3\.11\)"
    ):
        environments.find_python("py")


def test_a_python_that_does_not_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not run"):
        environments.find_python(str(tmp_path / "python"))


def test_a_python_is_looked_for(monkeypatch):
    versions = {"python3.12": None, "python3.13": (3, 13)}
    monkeypatch.setattr(environments, "_version", versions.get)
    assert environments.find_python() == "python3.13"


def test_a_failed_installation_shows_the_last_words():
    command = [sys.executable, "-c", "import sys; sys.exit('no such release')"]
    with pytest.raises(RuntimeError, match=r"exit status 1:\nno such release"):
        environments._run(command)


def test_an_installation_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(environments, "_INSTALL_SECONDS", 0.1)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(RuntimeError, match=r"took more than 0\.1 seconds"):
        environments._run(command)


# --- calls -------------------------------------------------------------------


def test_a_request_is_what_json_has():
    request = call_of("2*1/300,512/512", blocks=BLOCKS).request()
    assert json.loads(json.dumps(request)) == request
    assert request["sequences"] == [[1, 300], [1, 300], [512, 512]]
    assert (request["has_decodes"], request["has_others"]) == (True, True)
    assert (request["max_tokens"], request["max_seqs"]) == (514, 3)
    assert (request["pages_per_seq"], request["num_pages"]) == (4, 12)
    assert request["topology"] == chips.TPU7X.topology
    assert request["v_head_dim"] == 256
    assert request["blocks"] == BLOCKS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peer": "x"}, "peer: expected one of .*'splash'.*, got 'x'"),
        ({"chip": "v4"}, "chip: expected one of .*'v6e'.*, got 'v4'"),
        ({"dtype": "int4"}, "dtype: expected one of .*, got 'int4'"),
        ({"sequences": ()}, "sequences: expected one or more, got none"),
        (
            {"sequences": (Sequence(2, 2), Sequence(1, 9))},
            r"sequences: expected those with one new token first, got \[2, 1\]",
        ),
        ({"sequences": (Sequence(0, 2),)}, "sequences: expected 0 < q_len <= kv_len"),
        ({"sequences": (Sequence(3, 2),)}, r"q_len <= kv_len, got .*q_len=3"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected at least 1, got 0"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"page_size": 0}, "page_size: expected at least 1, got 0"),
        ({"num_kv_heads": 5}, "num_q_heads: expected a multiple of num_kv_heads=5"),
        (
            {"capacity": Capacity(64, 1, 1)},
            r"capacity: expected Capacity\(tokens=512.* or more, got .*tokens=64",
        ),
        (
            {"peer": "splash", "capacity": Capacity(1024, 1, 8)},
            "capacity: expected .*, since each length is a program of splash",
        ),
    ],
)
def test_wrong_calls_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        call_of("512/512", **fields)


def test_calls_that_differ_in_lengths_share_a_program():
    shared = calls.sharing_programs(
        [
            call_of("1024/1024"),
            call_of("2048/8192"),
            call_of("4*1/128"),
            call_of("512/512", peer="splash"),
            call_of("1024/1024", peer="splash"),
        ]
    )
    assert [call.capacity for call in shared] == [
        Capacity(2048, 1, 64),
        Capacity(2048, 1, 64),
        Capacity(4, 4, 1),
        None,
        None,
    ]


def test_needed_operations_are_those_of_the_heads_that_were_asked_for():
    """RPA v3 pads one query head for each key head to two; that is not needed."""
    few, many = call_of("512/512"), call_of("512/512", num_kv_heads=32)
    pairs = 512 * 513 / 2
    assert few.ideal.flops == many.ideal.flops == 4 * 32 * 256 * pairs


def test_values_may_be_narrower_than_keys():
    call = call_of("8/8", peer="splash", head_dim=192, v_head_dim=128)
    pairs = 8 * 9 / 2
    assert call.ideal.flops == 2 * 32 * (192 + 128) * pairs
    assert call.ideal.kv_read_bytes == 8 * 4 * (192 + 128) * 2
    assert call.ideal.write_bytes == 8 * 32 * 128 * 2  # no cache


def test_paged_calls_write_new_keys_and_values():
    call = call_of("8/8")
    assert call.ideal.write_bytes == 8 * (32 + 2 * 4) * 256 * 2


def test_without_a_cache_only_outputs_are_written():
    assert call_of("8/8", peer="flywheel").ideal.write_bytes == 8 * 32 * 256 * 2
    cached = call_of("8/64", peer="flywheel")
    assert cached.ideal == call_of("8/64").ideal


# --- the script of RPA v3 ----------------------------------------------------


@pytest.fixture
def rpa_v3(monkeypatch):
    """The module of the script, which its peer's Python would run."""
    monkeypatch.syspath_prepend(str(calls.SCRIPTS))
    for name in ("compile_rpa_v3", "here"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("compile_rpa_v3")


def test_operands_of_rpa_v3(rpa_v3):
    call = call_of("2*1/300,200/512", capacity=Capacity(256, 4, 8))
    kv_lens, pages, starts, distribution = rpa_v3.scalars(call.request())
    assert kv_lens.tolist() == [300, 300, 512, 0]
    assert starts.tolist() == [0, 1, 2, 202, 202]
    assert distribution.tolist() == [2, 2, 3]
    table = pages.reshape(4, 8)
    used = np.concatenate([table[0, :3], table[1, :3], table[2, :4]])
    assert len(set(used)) == 10
    assert used.max() < 32
    assert table[:, 4:].sum() == 0
    for array in (kv_lens, pages, starts, distribution):
        assert array.dtype == np.int32


def test_pages_of_rpa_v3_stay_in_the_cache(rpa_v3):
    call = call_of("128*1/16384")
    request = call.request()
    assert request["num_pages"] == compiler.MAX_PAGES
    _, pages, _, _ = rpa_v3.scalars(request)
    assert (pages.min(), pages.max()) == (0, compiler.MAX_PAGES - 1)


def test_blocks_of_rpa_v3(rpa_v3):
    prefill = call_of("512/512", blocks=BLOCKS)
    assert rpa_v3.block_options(prefill.request()) == {
        "d_block_sizes": (1, 128, 1, 128),
        "m_block_sizes": (256, 512, 128, 256),
    }
    decode = call_of("4*1/512", page_size=256)
    assert rpa_v3.block_options(decode.request()) == {"m_block_sizes": (1, 256, 1, 256)}
    wrong = call_of("512/512", blocks={"block_q": 8}).request()
    with pytest.raises(ValueError, match=r"blocks: expected bq_sz, .* got .*block_q"):
        rpa_v3.block_options(wrong)


# --- compilation and prediction ----------------------------------------------


@pytest.fixture
def toy_script(monkeypatch, tmp_path):
    """A script in place of RPA v3's, whose kernel is the toy; how often it ran."""
    script = tmp_path / "compile_toy.py"
    monkeypatch.setattr(environments, "make", lambda *_: Path(sys.executable))
    script.write_text(
        f"""
import json, os, re, sys
sys.path.insert(0, {str(calls.SCRIPTS.parent.parent)!r})
import numpy as np
from pathlib import Path
from tests.benchmarks import synthetic_dump
request = json.load(sys.stdin)
if request["window"]:
    sys.exit("no windows")
if request["compile"]:
    flags = os.environ["LIBTPU_INIT_ARGS"]
    dump = Path(re.search(r"xla_jf_dump_to=(\\S+)", flags).group(1))
    synthetic_dump.write(dump)
    (dump / "123-copy-64-packed-bundles-post-ra.txt").touch()
counts = np.array([s[1] for s in request["sequences"]] + [0] * 126)
np.savez(Path(sys.argv[1], "operands.npz"), **{{"toy:0": counts}})
Path(sys.argv[1], "call.json").write_text(json.dumps(
    {{"request": request, "kernels": ["toy"], "versions": {{"jax": "0"}}}}))
"""
    )
    runs = []
    run = compilation.subprocess.run

    def counted(command, **options):
        runs.append(json.loads(options["input"])["compile"])
        return run(command, **options)

    monkeypatch.setattr(compilation, "subprocess", types.SimpleNamespace(run=counted))
    monkeypatch.setattr(calls.Peer, "script", script)
    return runs


def test_a_call_is_compiled_once_and_a_program_too(toy_script, tmp_path):
    calls_ = calls.sharing_programs([call_of("2/3"), call_of("2/5")])
    programs = {}
    predictions = [
        prediction.predict_call(call, tmp_path, programs=programs)
        for call in (*calls_, *calls_)
    ]
    assert toy_script == [True, False]
    assert len(programs) == 1
    fetched = [p.results[0].bytes_moved["hbm_to_vmem"] for p in predictions]
    assert fetched == [3 * 32768, 5 * 32768] * 2
    compiled = compilation.compile_call(calls_[0], tmp_path)
    assert {path.name.split("-")[1] for path in compiled.dump.iterdir()} == {"toy.1"}
    assert compiled.versions == {"jax": "0"}


def test_a_prediction_adds_up_its_kernels(toy_script, tmp_path):
    one = prediction.predict_call(call_of("2/3"), tmp_path)
    two = prediction.PeerPrediction(one.call, one.results * 2, one.versions)
    for name in ("cycles", "microseconds", "dma_wait_cycles", "mxu_stall_cycles"):
        assert getattr(two, name) == 2 * getattr(one, name)
    assert two.unit_share == pytest.approx(one.unit_share)
    assert two.shares["mfu"] == pytest.approx(one.shares["mfu"] / 2)
    assert one.warnings == []
    written = json.loads(json.dumps(two.as_dict()))
    assert written["kind"] == "prediction"
    assert written["kernels"] == ["toy.1", "toy.1"]


def test_a_failed_script_shows_its_last_words(toy_script, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"compiling rpa_v3 for tpu7x failed.*1:\nno windows"
    ):
        compilation.compile_call(call_of("2/3", window=1), tmp_path)


def test_a_script_that_does_not_end_is_given_up(toy_script, tmp_path, monkeypatch):
    def too_long(command, **options):
        raise compilation.subprocess.TimeoutExpired(command, options["timeout"])

    import subprocess

    monkeypatch.setattr(
        compilation,
        "subprocess",
        types.SimpleNamespace(run=too_long, TimeoutExpired=subprocess.TimeoutExpired),
    )
    with pytest.raises(RuntimeError, match="rpa_v3 for tpu7x took more than 3600"):
        compilation.compile_call(call_of("2/3"), tmp_path)


def test_synthetic_dump_is_complete(tmp_path):
    """The toy's files are those that are kept."""
    written = {path.name for path in synthetic_dump.write(tmp_path).iterdir()}
    compiler.prune(tmp_path, ["toy"])
    assert {path.name for path in tmp_path.iterdir()} == written


@pytest.mark.extended
def test_rpa_v3_from_its_package(tmp_path):
    try:
        environments.find_python()
    except ValueError as error:
        pytest.skip(str(error))
    call = PeerCall(
        "rpa_v3",
        "tpu7x",
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=128,
        sequences=(Sequence(64, 64), Sequence(32, 300)),
        page_size=64,
        blocks={"bq_sz": 32, "bkv_sz": 256, "bq_csz": 32, "bkv_csz": 128},
    )
    found = prediction.predict_call(call, tmp_path)
    assert found.warnings == []
    assert found.versions["tpu-inference"] == "0.31.0"
    assert [result.kernel[:4] for result in found.results] == ["RPAd", "RPAm"]
    assert 5 < found.microseconds < 10
    fetched = found.results[1].bytes_moved["hbm_to_vmem"]
    assert fetched >= call.ideal.kv_read_bytes

"""checkpoint/files.py: safetensors, pickles, a hub imitated by a local server, kills, full disks.

Next: test_load.py, for whole models; test_merge.py, for streamed merging.
"""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint import files
from checkpoint.adapters import save_adapter
from checkpoint.files import (CODES, PICKLES_ARE_SAFE, find_checkpoint, into_folder, new_folder,
                              open_tensors, plan_shards, stored_as, tensor_files, write_json,
                              write_tensors)
from checkpoint.load import load_model
from checkpoint.work_folder import MARK
from lora import LoRAConfig, attach_lora
from model import init_weights
from tests.common import ROOT
from tests.tiny_models import same_bytes, tiny, write_tiny


# ---- finding, on disk ----


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    assert find_checkpoint(str(tmp_path)) == tmp_path


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError,
                       match="model.safetensors is a file; name the folder that holds"):
        find_checkpoint(str(tmp_path / "model.safetensors"))


def test_a_folder_that_does_not_exist_gets_the_nearest_name(tmp_path, monkeypatch):
    (tmp_path / "Meta-Llama-3-8B").mkdir()
    for wrong in (tmp_path / "Meta-LLama-3-8b", tmp_path / "x" / "y", tmp_path / "a b"):
        with pytest.raises(FileNotFoundError, match=f"{wrong} does not exist"):
            find_checkpoint(str(wrong))
    with pytest.raises(FileNotFoundError, match=r"did you mean .*/Meta-Llama-3-8B\?"):
        find_checkpoint(str(tmp_path / "Meta-LLama-3-8b"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="./Meta does not exist"):
        find_checkpoint("./Meta")


# ---- finding, on the hub ----

FILES = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors": b"weights",
         "README.md": b"text", "consolidated.safetensors": b"weights again",
         "original/params.json": b"{}", "pytorch_model.bin": b"pickle", "modeling_tiny.py": b"code"}
PICKLED = {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": b"pickle",
           "training_args.bin": b"arguments", "pytorch_model.bin.index.json": b"{}"}


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does: a good repository, one of pickles, one gated, one unknown,
    one that fails."""

    def do_GET(self):
        path, commit = self.path.split("?")[0], "a" * 40
        if "acme/gated" in path:
            return self.answer(403, error="GatedRepo")
        if "acme/unknown" in path:
            return self.answer(401, error="RepoNotFound")
        if "acme/tiny/revision/nope" in path:
            return self.answer(404, error="RevisionNotFound")
        for name, contents in (("acme/tiny", FILES), ("acme/pickled", PICKLED)):
            if f"{name}/revision" in path:
                listing = [{"rfilename": file} for file in contents]
                return self.answer(200, {"id": name, "sha": commit, "siblings": listing,
                                         "private": False, "tags": []})
            if f"{name}/tree" in path:
                return self.answer(200, [
                    {"type": "file", "path": file, "size": len(data), "oid": "b" * 40}
                    for file, data in contents.items()])
            if f"{name}/resolve" in path:
                return self.answer(200, contents[path.split(f"{commit}/")[1]], commit)
        self.answer(500)

    do_HEAD = do_GET

    def answer(self, status, content=b"", commit=None, error=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Error-Code": error, "X-Repo-Commit": commit,
                   "ETag": f'"{hashlib.sha1(body).hexdigest()}"' if commit else None}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


ASK = """
import json, os, sys
from checkpoint.files import find_checkpoint
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        folder = find_checkpoint(*arguments)
        files = [p for p in folder.rglob("*") if p.is_file()]
        answers.append([str(folder), sorted(str(p.relative_to(folder)) for p in files)])
    except Exception as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def ask(home, endpoint, *arguments, **env):
    """What find_checkpoint returns in a process of its own: huggingface_hub reads the environment
    when it is imported."""
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint,
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
           **env}
    env.pop("HF_TOKEN", None)
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(arguments)], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_of_modelscope(tmp_path, monkeypatch):
    """Its package is asked for the same files; a folder is a folder all the same."""
    asked = []

    def snapshot_download(name, revision=None, cache_dir=None, allow_patterns=None,
                          ignore_patterns=None):
        if name == "a/missing":
            raise RuntimeError("no such model\nmore")
        asked.append((name, revision, cache_dir, allow_patterns))
        return str(tmp_path)

    module = types.ModuleType("modelscope")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", module)
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert find_checkpoint("a/b", "main", "cache") == tmp_path
    assert asked[0][:3] == ("a/b", None, "cache") and "*.safetensors" in asked[0][3]
    assert asked[1:] == [("a/b", None, "cache", ["pytorch_model*.bin"])] * PICKLES_ARE_SAFE
    (tmp_path / "model.safetensors").touch()
    assert find_checkpoint("a/b", "v2") == tmp_path and asked[-1][1] == "v2"
    assert find_checkpoint(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"from ModelScope \(no such model\)"):
        find_checkpoint("a/missing")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(FileNotFoundError, match="pip install modelscope"):
        find_checkpoint("a/b")


def test_hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        good, pickled, gated, unknown, revision, name, failing = ask(
            tmp_path, endpoint, ["acme/tiny"], ["acme/pickled"], ["acme/gated"], ["acme/unknown"],
            ["acme/tiny", "nope"], ["acme/a--b"], ["acme/failing"])
    finally:
        server.shutdown()
        server.server_close()
    assert good[0].startswith(str(tmp_path))                            # HF_HOME
    # nothing twice
    assert good[1] == ["README.md", "config.json", "model.safetensors", "modeling_tiny.py",
                       "tokenizer.json"]
    # no file that could not be read
    weights = ["pytorch_model-00001-of-00001.bin"] if PICKLES_ARE_SAFE else []
    assert pickled[1] == ["config.json", *weights, "pytorch_model.bin.index.json"]
    for error, words in [
        (gated,
         "gated: accept its license at https://huggingface.co/acme/gated, then log in "
         "with `hf auth login`"),
        (unknown, "acme/unknown is neither a local folder nor a repository of the hub"),
        (revision, "acme/tiny has no revision 'nope'"),
        (name, "acme/a--b does not exist, and no repository of the hub can have that name"),
        (
            failing,
            "acme/failing is no local folder and is not in the cache, and the hub "
            "could not be reached",
        )]:
        assert error[0] == "FileNotFoundError" and words in error[1], error

    # without the server, downloaded files are found and others have an error
    cached, also, absent = ask(tmp_path, endpoint, ["acme/tiny"], ["acme/pickled"], ["acme/other"],
                               HF_HUB_OFFLINE="1")
    assert cached == good and also == pickled
    assert absent[0] == "FileNotFoundError"
    assert "(HF_HUB_OFFLINE is set)" in absent[1] and "hf download acme/other" in absent[1]


# ---- writing tensors ----


def assorted():
    """Tensors of every supported dtype, and of unusual shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t.{code}": (torch.randn(5, 7, generator=generator) * 9).to(dtype)
               for dtype, code in CODES.items()}
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4),
            "turned": torch.randn(6, 3).T, "odd bytes": torch.zeros(3, dtype=torch.uint8),
            "last": torch.randn(2, 2, 2)}


def write_all(folder, tensors, **more):
    """Write these tensors with write_tensors."""
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_tensors(folder, shapes, lambda name: [tensors[name]], **more)


def test_the_safetensors_package_reads_our_files(tmp_path):
    tensors, seen = assorted(), []
    write_all(tmp_path, tensors, progress=seen.append)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(same_bytes(read[name], tensors[name]) for name in tensors)
    assert sum(seen) == sum(t.nbytes for t in tensors.values())
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_stay_below_the_limit_and_the_index_names_them(tmp_path):
    tensors = ({f"layers.{i}.weight": torch.randn(50, 10) for i in range(10)}
               | {"large": torch.randn(3000)})
    limit = 5000
    write_all(tmp_path, tensors, limit=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
                     for i in range(len(files))]
    assert len(files) > 4
    for file in files:
        held = load_file(tmp_path / file)
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file}
        assert all(same_bytes(held[name], tensors[name]) for name in held)
        assert os.path.getsize(tmp_path / file) <= limit or list(held) == ["large"]
    assert {name: file.name for name, file in tensor_files(tmp_path).items()} == index["weight_map"]


def test_names_come_in_the_order_of_the_bytes(tmp_path):
    if not hasattr(safe_open, "offset_keys"):
        pytest.skip("this version of safetensors lists names by the alphabet only")
    write_all(tmp_path, {name: torch.ones(2) for name in ("b.10", "a", "b.9")})
    assert list(tensor_files(tmp_path)) == ["b.10", "a", "b.9"]


def test_shards_keep_the_order_of_the_tensors():
    shards = plan_shards({"a": 400, "b": 400, "c": 400, "d": 5000, "e": 10}, 1500)
    assert shards == [["a", "b"], ["c"], ["d"], ["e"]]


def test_tensors_in_blocks_are_held_one_at_a_time(tmp_path):
    whole, alive, most = torch.randn(12, 5), weakref.WeakSet(), []

    def rows_of(name):
        for start in range(0, 12, 4):
            block = whole[start:start + 4].clone()
            alive.add(block)
            most.append(len(alive))
            yield block
            del block

    write_tensors(tmp_path, {name: ((12, 5), torch.float32) for name in "ab"}, rows_of)
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["a"], whole) and torch.equal(read["b"], whole) and most == [1] * 6


def test_a_file_is_written_through_while_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SECONDS_BEHIND", 0)
    sizes, synced, sync = [], threading.Event(), os.fsync

    def watched(number):
        sync(number)
        sizes.append(os.fstat(number).st_size)
        synced.set()

    monkeypatch.setattr(os, "fsync", watched)
    half = b"x" * 100_000
    with files.written_behind(tmp_path / "new") as out:
        out.write(half)
        synced.clear()
        assert synced.wait(10)
        assert sizes[-1] == len(half)
        out.write(half)
    assert (tmp_path / "new").read_bytes() == half + half


def test_an_error_of_the_disk_behind_the_writing_is_raised(tmp_path, monkeypatch):
    """Linux reports it once: it would be missing at the end."""
    monkeypatch.setattr(files, "SECONDS_BEHIND", 0)
    failed = threading.Event()

    def fail(number):
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        with files.written_behind(tmp_path / "new") as out:
            assert failed.wait(10)
            out.write(b"more")


def test_a_disk_that_is_too_small_is_an_error_before_writing(tmp_path, monkeypatch):
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    asked = []
    with pytest.raises(OSError,
                       match="7.629 MiB to write, 2.861 MiB free. Make room, or choose another"):
        write_tensors(tmp_path, {"x": ((2000, 1000), torch.float32)}, asked.append)
    assert not asked and not list(tmp_path.iterdir())
    write_all(tmp_path, {"x": torch.zeros(700, 1000)})                     # 2.8 MB fit


@pytest.fixture
def no_file_above_20_kb():
    """The disk is full in the middle of a write: the system refuses every byte beyond the limit."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_no_files(tmp_path, no_file_above_20_kb):
    model = attach_lora(tiny(), LoRAConfig(r=64))
    with pytest.raises(OSError):
        with new_folder(tmp_path / "streamed") as work:
            write_all(work, {"x": torch.zeros(100, 100)})
    with pytest.raises(
        OSError, match="adapter_model.safetensors could not be written .*Is there room on the disk"
    ):
        with new_folder(tmp_path / "adapter") as work:
            save_adapter(model, work, LoRAConfig(r=64), "base")
    with pytest.raises(OSError):
        with new_folder(tmp_path / "json") as work:
            write_json(work / "state.json", ["long"] * 10_000)
    assert not list(tmp_path.iterdir())


# ---- whole models ----


@pytest.mark.parametrize("text",
                         ['{"weight_map": {"a": ', "{}", '{"weight_map": ', "[]",
                          '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json (is damaged or incomplete|is not valid JSON .*"
                       "|holds a list, not .*); fetch it again"):
        tensor_files(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"\0" * 500]
)
def test_files_that_are_not_safetensors(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError,
                       match="x.safetensors is damaged or incomplete .*; fetch it again"):
        with open_tensors(tmp_path / "x.safetensors"):
            pass


# ---- pickles ----

needs_safe_pickles = pytest.mark.skipif(not PICKLES_ARE_SAFE,
                                        reason=f"torch {torch.__version__} reads no pickles")


def pickled(folder, shards=1, **more):
    """The tiny model as pytorch_model.bin, or in shards with an index."""
    folder = write_tiny(folder, tiny())
    tensors = load_file(folder / "model.safetensors") | more
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    where = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin"
             for i, name in enumerate(tensors)}
    for file in set(where.values()):
        torch.save({name: t for name, t in tensors.items() if where[name] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": where})
    return folder


@needs_safe_pickles
@pytest.mark.parametrize("shards", [1, 3])
def test_a_pickled_checkpoint_is_read_like_any_other(shards, tmp_path):
    folder = pickled(tmp_path, shards,
                     **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    want = tiny()
    model = load_model(folder)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in want.named_parameters())
    assert {p.dtype for p in load_model(folder, torch.bfloat16).parameters()} == {torch.bfloat16}
    files = tensor_files(folder)
    assert len(set(files.values())) == shards
    assert stored_as(files["lm_head.weight"], "lm_head.weight") == ((50, 32), torch.float32)
    with open_tensors(files["lm_head.weight"]) as tensors:
        assert torch.equal(tensors.get_slice("lm_head.weight")[3:7], want.lm_head.weight[3:7])


@needs_safe_pickles
def test_safetensors_win_where_both_exist(tmp_path):
    folder = pickled(tmp_path)
    (folder / "pytorch_model.bin").rename(tmp_path / "kept")
    write_tiny(tmp_path, tiny())
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {}})
    load_model(folder)
    assert set(tensor_files(folder).values()) == {folder / "model.safetensors"}


class Other:
    """An object that is no tensor."""


@needs_safe_pickles
@pytest.mark.parametrize("damage, words", [
    (lambda file: file.write_bytes(file.read_bytes()[:-200]),
     "pytorch_model.bin is damaged, incomplete, or older"),
    (lambda file: file.write_bytes(b""), "pytorch_model.bin is damaged, incomplete, or older"),
    (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
     "bin is damaged.* fetch it again"),
    (lambda file: torch.save({"a": torch.ones(1)}, file, _use_new_zipfile_serialization=False),
     "older than torch 1.6"),
    (lambda file: torch.save({"a": Other()}, file),
     "holds objects other than tensors, which are not read"),
    (lambda file: torch.save({"model": {"a": torch.ones(1)}}, file), "is not a dict of tensors"),
    (lambda file: torch.save([torch.ones(1)], file), "is not a dict of tensors"),
    (lambda file: torch.save({"lm_head.weight": torch.ones(1)}, file), "missing: 24"),
], ids=["cut", "empty", "text", "old", "object", "nested", "list", "incomplete"])
def test_pickles_that_are_refused(damage, words, tmp_path):
    folder = pickled(tmp_path)
    damage(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=words):
        load_model(folder)


@needs_safe_pickles
def test_an_index_that_names_missing_tensors(tmp_path):
    folder = pickled(tmp_path, 2)
    file = tensor_files(folder)["lm_head.weight"]
    torch.save({}, file)
    with pytest.raises(ValueError,
                       match="holds no .*, which the index says it does; fetch both again"):
        load_model(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError,
                       match="pytorch_model.bin.index.json names 1 file.s. that are not there"):
        load_model(folder)


def test_pickles_are_refused_before_torch_2_6(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PICKLES_ARE_SAFE", False)
    with pytest.raises(
        ValueError,
        match="safe to read with torch 2.6 or newer only .CVE-2025-32434.*python merge.py",
    ):
        load_model(pickled(tmp_path))


def test_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="has no weights: no model.safetensors or pytorch_model.bin"):
        tensor_files(tmp_path)


@needs_safe_pickles
@pytest.mark.skipif(not os.path.isfile("/proc/self/status"),
                    reason="the peak of a process is read from /proc (Linux)")
def test_a_tensor_of_a_pickle_is_read_without_the_others(tmp_path):
    # 240 MB
    torch.save({name: torch.full((20_000_000,), 0.5) for name in "abc"}, tmp_path / "x.bin")
    code = (
        "import sys; from checkpoint import files\n"
        "def peak():\n"
        "    lines = [s for s in open('/proc/self/status') if s.startswith('VmHWM')]\n"
        "    return int(lines[0].split()[1])\n"
        "before = peak()\n"
        "for start in range(0, 20_000_000, 2_000_000):\n"
        "    with files.open_tensors(sys.argv[1]) as tensors:\n"
        "        assert tensors.get_slice('b')[start:start + 2_000_000].sum() == 1_000_000\n"
        "print((peak() - before) * 1024)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.bin")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    (tmp_path / "x.bin").unlink()
    assert int(out.stdout) < 40 * 10**6, f"{int(out.stdout) / 1e6:.0f} MB"


# ---- which files hold the weights ----


def in_shards(folder, stem="model", ending="safetensors", index=True):
    """The tiny model of another seed as two shards of this kind; returns its state."""
    folder.mkdir(exist_ok=True)
    model = tiny()
    init_weights(model, torch.Generator().manual_seed(1))
    state = {name: p.clone() for name, p in model.named_parameters()}
    where = {name: f"{stem}-{i % 2 + 1:05d}-of-00002.{ending}" for i, name in enumerate(state)}
    save = save_file if ending == "safetensors" else torch.save
    for file in set(where.values()):
        save({name: t for name, t in state.items() if where[name] == file}, folder / file)
    if index:
        index = {"metadata": {}, "weight_map": where}
        write_json(folder / f"{stem}.{ending}.index.json", index)
    return state


KINDS = [("model", "safetensors"), pytest.param("pytorch_model", "bin", marks=needs_safe_pickles)]


@pytest.mark.parametrize("shards_are_there", [True, False])
@pytest.mark.parametrize("stem, ending", KINDS)
def test_a_single_file_wins_over_a_left_over_index(stem, ending, shards_are_there, tmp_path):
    """As in transformers: the index names the shards of an older model."""
    transformers = pytest.importorskip("transformers")
    folder = write_tiny(tmp_path, tiny())
    in_shards(folder, stem, ending)
    if ending == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    if not shards_are_there:
        for shard in folder.glob("*-of-*"):
            shard.unlink()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours, want = load_model(folder), tiny()
    assert {file.name for file in tensor_files(folder).values()} == {f"{stem}.{ending}"}
    for name, p in want.named_parameters():
        assert torch.equal(ours.get_parameter(name), p), name
        assert torch.equal(theirs.get_parameter(name), p), name


@needs_safe_pickles
def test_an_index_of_safetensors_wins_over_a_single_pickle(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = pickled(tmp_path)
    state = in_shards(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(load_model(folder).lm_head.weight, state["lm_head.weight"])
    assert torch.equal(theirs.lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize("stem, ending", KINDS)
def test_shards_without_an_index_are_read_if_the_set_is_whole(stem, ending, tmp_path):
    folder = write_tiny(tmp_path, tiny())
    (folder / "model.safetensors").unlink()
    state = in_shards(folder, stem, ending, index=False)
    assert torch.equal(load_model(folder).lm_head.weight, state["lm_head.weight"])
    first = folder / f"{stem}-00001-of-00002.{ending}"
    os.rename(first, folder / "aside")
    with pytest.raises(FileNotFoundError, match="index.json is missing, .* not one whole set"):
        load_model(folder)
    os.rename(folder / "aside", first)
    shutil.copyfile(first, folder / f"{stem}-00001-of-00003.{ending}")
    with pytest.raises(FileNotFoundError, match="not one whole set"):
        load_model(folder)
    (folder / f"{stem}-00001-of-00003.{ending}").unlink()
    shutil.copyfile(first, folder / f"{stem}-00002-of-00002.{ending}")
    with pytest.raises(ValueError, match="both hold .*, and .*index.json is missing"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../x", "..",
                                  "a\\..\\x", "C:x", "a\0b", "", "a//b"])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(name, tmp_path):
    folder = write_tiny(tmp_path / "base", tiny())
    os.rename(folder / "model.safetensors", tmp_path / "outside.safetensors")
    names = [name for name, _ in tiny().named_parameters()]
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, name)})
    with pytest.raises(ValueError, match="index.json: .* which is no file in that folder"):
        load_model(folder)


def test_an_index_that_names_the_single_file_or_one_in_a_folder_below(tmp_path):
    folder = write_tiny(tmp_path, tiny())
    (folder / "parts").mkdir()
    os.rename(folder / "model.safetensors", folder / "parts" / "all.safetensors")
    names = [name for name, _ in tiny().named_parameters()]
    index = {"weight_map": dict.fromkeys(names, "parts/all.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)
    assert torch.equal(load_model(folder).lm_head.weight, tiny().lm_head.weight)


@needs_safe_pickles
@pytest.mark.parametrize("tensors, words", [
    ({0: torch.ones(1)}, "a tensor is called 0, which is no text"),
    ({("a", 1): torch.ones(1)}, "a tensor is called .*, which is no text"),
    ({"a": torch.ones(2, 2).to_sparse()}, "a is stored torch.sparse_coo; only plain"),
    ({"a": torch.ones(2, device="meta")}, "a is stored without data"),
])
def test_pickled_tensors_that_no_model_has(tensors, words, tmp_path):
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin: {words}"):
        tensor_files(tmp_path)


@pytest.mark.parametrize("text, words", [
    ("[" * 100_000, "is nested too deeply|is not valid JSON"),
    ('{"a":' * 100_000, "is nested too deeply|is not valid JSON"),
    ('{"weight_map": ' + "9" * 5000 + "}", "is not valid JSON|is damaged"),
    ("\ud800".encode("utf-8", "surrogatepass"), "is not valid JSON"),
])
def test_json_that_breaks_readers_is_named(text, words, tmp_path):
    for name, read in (("model.safetensors.index.json", tensor_files), ("config.json", load_model)):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=f"{name} ({words})"):
            read(tmp_path)


def test_a_null_character_in_a_folders_name():
    with pytest.raises(ValueError, match=r"'a\\x00b' holds a null character"):
        find_checkpoint("a\0b")


# ---- all or nothing ----


def test_new_folder_replaces_no_file(tmp_path):
    """Nor a pipe, as devices such as /dev/null are tested for."""
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe"):
        with pytest.raises(ValueError, match=f"{name} is a file, and a folder is to be written"):
            with new_folder(tmp_path / name):
                pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "kept" and (tmp_path / "pipe").is_fifo()


def test_new_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as work:
        (work / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_new_folder_after_an_exception(tmp_path, error):
    """No part of the new folder is left, and an old one is unchanged."""
    for old in (False, True):
        if old:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a").write_text("old")
        with pytest.raises(error):
            with new_folder(tmp_path / "out") as work:
                (work / "a").write_text("new")
                raise error
        assert [p.name for p in tmp_path.rglob("*")] == (["out", "a"] if old else [])
    assert (tmp_path / "out" / "a").read_text() == "old"
    with new_folder(tmp_path / "out", replaceable={"a"}) as work:
        (work / "b").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "b"]


def test_an_old_folder_survives_an_error_between_the_renames(tmp_path, monkeypatch):
    """It is moved away, not deleted, before the new folder takes its name."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    replace = os.replace

    def stop(source, target):
        if source.name == "new":
            raise SystemExit("stopped")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(SystemExit):
        with new_folder(tmp_path / "out") as work:
            (work / "a").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]
    assert (tmp_path / "out" / "a").read_text() == "old"


KILLED_BETWEEN = """
import os, sys
from pathlib import Path
from checkpoint.files import new_folder
replace = os.replace
def die(source, target):
    if source.name == "new":
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = die
with new_folder(Path(sys.argv[1])) as work:
    (work / "a").write_text("new")
"""


def test_an_old_folder_survives_a_kill_between_the_renames(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN, tmp_path / "out"], cwd=ROOT)
    assert {p.parent.name: p.read_text() for p in tmp_path.rglob("a")} == {
        "old": "old", "new": "new"
    }
    with pytest.raises(KeyError):
        with new_folder(tmp_path / "out"):
            assert (tmp_path / "out" / "a").read_text() == "old"
            raise KeyError
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]


def test_a_folder_with_files_of_others_is_kept_under_another_name(tmp_path, capsys):
    for number in ("", ".2"):
        (tmp_path / "out/photos").mkdir(parents=True)
        (tmp_path / "out/photos/one.jpg").write_text("mine")
        (tmp_path / "out/a").write_text("old")
        with new_folder(tmp_path / "out") as work:
            (work / "a").write_text("new")
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"a"}
        assert (tmp_path / f"out{number}.kept/photos/one.jpg").read_text() == "mine"
        assert "it holds photos/one.jpg, which was not written here" in capsys.readouterr().out
        (tmp_path / "out/a").unlink()
        (tmp_path / "out").rmdir()


def test_folders_that_only_look_like_work_folders_stay(tmp_path, capsys):
    """Names as those of an earlier release, or of our own work folders, without a mark; a mark of
    another content; a mark whose lock is free, but of another target."""
    for name in ("out.partial", "out.old", "out.ab.partial", "out.cd.partial", "out.ef.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    (tmp_path / "out.cd.partial" / MARK).write_text('{"target": "../out"}')
    (tmp_path / "out.ef.partial" / MARK).write_text('{"target": "other"}')
    with new_folder(tmp_path / "out") as work:
        (work / "a").write_text("new")
    for path in tmp_path.glob("*/mine"):
        assert path.read_text() == path.parent.name
    assert len(list(tmp_path.glob("*/mine"))) == 5 and (tmp_path / "out" / "a").is_file()
    shown = capsys.readouterr().out
    assert f"{tmp_path}/out.partial is left as it is" in shown and "out.old is left" in shown


@pytest.mark.parametrize("write", ["new_folder", "into_folder"])
def test_two_writers_of_one_place_exclude_each_other(write, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    command = [sys.executable, "-c", KILLED.replace("new_folder", write), str(target)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "writing\n"
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=f"another process is writing it .process {child.pid}"):
            with getattr(files, write)(target):
                pass
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        child.kill()
        child.wait(30)
        child.stdout.close()


KILLED = """
import sys, time, torch
from pathlib import Path
from checkpoint.files import new_folder, write_tensors
def rows_of(name):
    if name == "c":
        print("writing", flush=True)
        time.sleep(60)
    return [torch.ones(1000, 100)]
with new_folder(Path(sys.argv[1])) as work:
    write_tensors(work, {name: ((1000, 100), torch.float32) for name in "abc"}, rows_of)
"""


def test_a_kill_while_writing_leaves_no_folder(tmp_path):
    target = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], cwd=ROOT,
                             stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()
    left, = tmp_path.iterdir()          # half a checkpoint, under another name
    assert left.name.startswith("out.") and left.suffix == ".partial" and (left / MARK).is_file()
    with new_folder(target) as work:
        write_all(work, {"a": torch.ones(2)})
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "model.safetensors"]


def test_files_move_into_an_existing_folder_all_or_none(tmp_path):
    (tmp_path / "kept").write_text("old")
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError):
        with into_folder(tmp_path) as work:
            (work / "a").write_text("half")
            raise KeyError
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"kept": "old", "a": "old"}
    with into_folder(tmp_path) as work:
        (work / "a").write_text("new")
        (work / "b").write_text("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "kept": "old", "a": "new", "b": "new"
    }


def test_json_that_cannot_be_written_leaves_no_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": {1}})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_json_is_replaced_atomically(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_json(path, {"name": "小明", "loss": float("nan")})
    assert "小明" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8"))["loss"] != 0
    with pytest.raises(TypeError):
        write_json(path, {"name": object()})
    assert "小明" in path.read_text(encoding="utf-8")

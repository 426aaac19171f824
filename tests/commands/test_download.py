"""Models and data by name, from a stand-in of Hugging Face's hub that runs here: whole, cut, wrong, missing, no hub.

The stand-in has the routes of the hub's API that ``huggingface_hub`` uses to fetch a snapshot: ``GET
/api/models/OWNER/NAME[/revision/R]`` lists the files, ``HEAD`` and ``GET /OWNER/NAME/resolve/R/FILE`` are the files, in
ranges, too; for datasets there is ``datasets/`` before the owner.
"""

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from lora_ms.config import load_config
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import base_name
from lora_ms.recipes import download, sequence
from lora_ms.recipes.download import Wanted, fetch, fetch_named, is_name

QWEN = "someone/qwen2-small"
ROWS = "datasets/someone/rows"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """repositories: name -> folder, "datasets/owner/name" for a dataset. cut: file -> bytes until the cut."""

    def __init__(self, repositories: dict[str, Path]):
        self.repositories = repositories
        self.cut: dict[str, int] = {}
        self.other_digest: set[str] = set()
        self.other_size: set[str] = set()
        self.not_there: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.url = ""

    def files(self, name: str) -> dict[str, bytes]:
        folder = self.repositories[name]
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            path = self.path.partition("?")[0]
            listing = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
            content = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if listing:
                self._list(listing[1], listing[2], listing[3])
            elif content:
                self._file(content[1], content[3])
            else:
                self._answer(404, b"")

        def _list(self, kind: str, owner_name: str, revision: str | None) -> None:
            name = owner_name if kind == "models" else f"datasets/{owner_name}"
            if name not in hub.repositories:
                return self._answer(401, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
            if name in hub.gated:
                return self._answer(403, b"", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            if revision not in (None, "main", COMMIT):
                return self._answer(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message="Revision Not Found")
            siblings = []
            for file, data in hub.files(name).items():
                entry = {"rfilename": file, "size": len(data) + (7 if file in hub.other_size else 0)}
                git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                sha = hashlib.sha256(data).hexdigest()
                if file in hub.other_digest:
                    sha = git = "0" * 64
                entry["blobId"] = git
                if file.endswith((".safetensors", ".parquet")):
                    entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            body = json.dumps({"id": owner_name, "sha": COMMIT, "siblings": siblings, "private": False}).encode()
            return self._answer(200, body, Content_Type="application/json")

        def _file(self, name: str, file: str) -> None:
            found = hub.files(name).get(file) if name in hub.repositories else None
            if found is None or file in hub.not_there:
                return self._answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry Not Found")
            etag = f'"{hashlib.sha256(found).hexdigest()}"'
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
            body = found[start:]
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", etag)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(found) - 1}/{len(found)}")
            self.end_headers()
            if self.command == "HEAD":
                return None
            if file in hub.cut:
                self.wfile.write(body[: hub.cut.pop(file)])
                self.wfile.flush()
                self.close_connection = True
                return self.connection.shutdown(2)
            return self.wfile.write(body)

    return Handler


@contextmanager
def serving(repositories: dict[str, Path]):
    """The hub with these repositories, on a port of this machine."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(text_model, tmp_path, rows_text):
    """A model in two shards with code and a pickle beside them, and a dataset of two splits."""
    model = tmp_path / "hub" / "model"
    shutil.copytree(text_model, model)
    (model / "modeling_qwen.py").write_text("raise SystemExit('this code must never be fetched')")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (model / "README.md").write_text("A model.")
    rows = tmp_path / "hub" / "rows"
    (rows / "data").mkdir(parents=True)
    for split in ("train", "test"):
        (rows / "data" / f"{split}.jsonl").write_text(rows_text)
    (rows / "dataset_infos.json").write_text("{}")
    with serving({QWEN: model, ROWS: rows}) as served:
        yield served


@pytest.fixture(scope="session")
def rows_text() -> str:
    return "".join(json.dumps({"instruction": f"say {n}", "output": str(n)}) + "\n" for n in range(4))


@pytest.fixture
def command(python, python_env, tmp_path):
    """``command(hub, "download", …)``: status and lines of ``lora-ms``; hub: the stand-in, or its address."""

    def run(hub, *argv: str, cwd: Path | None = None, **env: str) -> tuple[int, str]:
        env = {
            **{k: v for k, v in python_env.items() if not k.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "LORA_MS_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
            **env,
        }
        done = subprocess.run(
            [python, "-m", "lora_ms.cli", *argv],
            env=env,
            cwd=cwd or tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def error_of(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("error: "))


def fetched(hub) -> list[str]:
    files = [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    return sorted(set(files))


def test_a_whole_model(hub, command, text_model, tmp_path):
    status, text = command(hub, "download", QWEN)
    assert status == 0, text
    folder = Path(text.splitlines()[-2])
    wanted = {file.name for file in text_model.iterdir()} & {file.name for file in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= wanted
    assert all((folder / name).read_bytes() == (text_model / name).read_bytes() for name in wanted)
    assert not {"modeling_qwen.py", "pytorch_model.bin", "README.md"} & {file.name for file in folder.iterdir()}
    assert text.splitlines()[0].startswith(f"{QWEN}: {len(wanted)} files, ") and hub.url in text.splitlines()[0]
    assert base_name(folder) == QWEN
    assert text.splitlines()[-1] == f"use it: --load_checkpoint {QWEN}"
    hub.requests.clear()
    assert command(hub, "download", QWEN)[0] == 0
    assert fetched(hub) == []  # looked for newer files, found none


def test_into_a_folder_of_the_users(hub, command, text_model, tmp_path):
    status, text = command(hub, "download", QWEN, "--output_dir", "here", "--revision", "main")
    assert status == 0, text
    assert (tmp_path / "here" / "config.json").read_bytes() == (text_model / "config.json").read_bytes()
    assert text.splitlines()[-1] == "use it: --load_checkpoint here"
    text = command(hub, "download", QWEN, "--revision", "main")[1]
    assert text.splitlines()[-1] == f"use it: --load_checkpoint {QWEN} --revision main"
    assert command(hub, "preview", "--load_checkpoint", "here", "--train_dataset_dir", "x.jsonl")[0] == 2


def test_names_in_place_of_paths(hub, command, tmp_path):
    """The model and the rows by name; once fetched, the hub is not asked, and need not be there."""
    asked = ("preview", "--load_checkpoint", QWEN, "--train_dataset_dir", "someone/rows", "--row", "2")
    status, text = command(hub, *asked)
    assert status == 0 and "say 1" in text, text
    assert "train.jsonl" in fetched(hub) and "test.jsonl" not in fetched(hub)
    hub.requests.clear()
    again = command(hub, *asked)
    assert again[0] == 0 and hub.requests == []
    assert command("http://127.0.0.1:9", *asked, HF_HUB_OFFLINE="1")[0] == 0


def test_rows_of_tasks_and_sets_by_name(monkeypatch, tmp_path):
    """All are fetched before the first task; those that a sequence does not read are not."""
    asked = []

    def fetched(wanted):
        asked.append((wanted.name, wanted.split))
        folder = tmp_path / wanted.name
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("{}")
        return folder

    monkeypatch.setattr(download, "fetch", fetched)
    tasks = [{"name": n, "dataset_dir": f"hub/{n}", "eval_dir": f"hub/{n}"} for n in ("one", "two")]
    mix = [{"dataset_dir": f"hub/{role}", "weight": 1, "role": role} for role in ("domain", "general")]
    sets = {"kept": {"dataset_dir": "hub/kept"}}
    given = {"sequence.tasks": tasks, "train_dataset.mix": mix, "evaluation.sets": sets}
    config = load_config(None, options=[f"{key}={json.dumps(value)}" for key, value in given.items()])
    fetch_named(config, "sequence")
    assert asked == [
        *(("hub/one", "train"), ("hub/one", "test"), ("hub/two", "train"), ("hub/two", "test")),
        *(("hub/general", "train"), ("hub/kept", "test")),
    ]
    task = config.sequence.tasks[1]
    assert (task.dataset_dir, task.eval_dir) == tuple(str(tmp_path / f"hub/two/{s}.jsonl") for s in ("train", "test"))
    assert config.evaluation.sets["kept"].dataset_dir == str(tmp_path / "hub/kept/test.jsonl")


@pytest.mark.parametrize("learnt", [1, 2])
def test_rows_of_learnt_tasks_may_be_gone(monkeypatch, tmp_path, learnt):
    """Nor are the rows for scores needed, where all tasks are learnt."""

    def absent(wanted):
        raise wanted.fault("not there")

    monkeypatch.setattr(download, "_look_hf", absent)
    monkeypatch.chdir(tmp_path)
    tasks = [{"name": n, "dataset_dir": f"gone/{n}", "eval_dir": f"gone/{n}_scored"} for n in ("one", "two")]
    if learnt == 1:
        tasks[0]["eval_dir"] = tasks[1]["eval_dir"] = "rows.jsonl"
    config = load_config(None, options=[f"sequence.tasks={json.dumps(tasks)}", "output_dir=output"])
    for number in range(learnt):
        (sequence.folder_of(config, number) / "adapter").mkdir(parents=True)
        sequence.mark_done(config, number)
    if learnt == 1:
        with pytest.raises(LoraMsError, match=r"^sequence\.tasks, two: not there$"):
            fetch_named(config, "sequence")
        (tmp_path / "gone").mkdir()
        (tmp_path / "gone" / "two").touch()
    fetch_named(config, "sequence")
    sequence.check_same(config)


def test_a_connection_that_is_cut_is_gone_on_with(hub, command, tmp_path):
    name, block = "model-00003-of-00003.safetensors", 10 * 2**20  # the library keeps whole blocks
    (tmp_path / "hub" / "model" / name).write_bytes(bytes(range(256)) * 4 * 10 * 1100)
    hub.cut[name] = block + 1000
    status, text = command(hub, "download", QWEN)
    assert status == 0, text
    ranges = [each for method, path, each in hub.requests if path.endswith(name) and method == "GET"]
    assert ranges == [None, f"bytes={block}-"]
    assert (Path(text.splitlines()[-2]) / name).read_bytes() == (tmp_path / "hub" / "model" / name).read_bytes()


def test_a_wrong_digest(hub, command, text_model):
    name = next(file.name for file in sorted(text_model.glob("*.safetensors")))
    hub.other_digest.add(name)
    status, text = command(hub, "download", QWEN)
    assert status == 2
    assert error_of(text) == (
        f"error: {QWEN}: {name} is not what {hub.url} lists (its digest is another): it was removed; run the same "
        "command again, and if that does not help, use another mirror"
    )
    hub.other_digest.clear()
    assert command(hub, "download", QWEN)[0] == 0


def test_a_wrong_digest_of_a_small_file(hub, command):
    hub.other_digest.add("config.json")
    status, text = command(hub, "download", QWEN, "--output_dir", "here")
    assert status == 2 and "config.json is not what" in error_of(text)


def test_a_wrong_size(hub, command, text_model):
    name = next(file.name for file in sorted(text_model.glob("*.safetensors")))
    hub.other_size.add(name)
    status, text = command(hub, "download", QWEN)
    size = (text_model / name).stat().st_size
    assert status == 2 and f"{name} is not what {hub.url} lists ({size:,} bytes, not {size + 7:,})" in error_of(text)


def test_a_file_that_is_listed_and_not_there(hub, command):
    hub.not_there.add("tokenizer.json")
    status, text = command(hub, "download", QWEN)
    assert status == 2 and f"{QWEN}: the download broke off" in error_of(text)


def test_a_name_that_the_hub_does_not_know(hub, command):
    status, text = command(hub, "predict", "--load_checkpoint", "someone/typo", "--predict_data", "x")
    assert status == 2
    assert error_of(text) == (
        f"error: load_checkpoint: someone/typo is no path here, and {hub.url} has no model of that name: correct one "
        "or the other (a private one needs HF_TOKEN)"
    )


def test_other_refusals(hub, command):
    assert error_of(command(hub, "download", QWEN, "--revision", "v9")[1]) == (
        f"error: {QWEN} has no revision v9 on {hub.url}"
    )
    assert "'qwen' is no name of a hub" in error_of(command(hub, "download", "qwen")[1])
    hub.gated.add(QWEN)
    assert "is given to those who accept its terms" in error_of(command(hub, "download", QWEN)[1])


def test_a_model_without_safetensors(hub, command, tmp_path):
    for file in (tmp_path / "hub" / "model").glob("model*"):
        file.unlink()
    assert error_of(command(hub, "download", QWEN)[1]) == (
        f"error: {QWEN} holds no safetensors: its weights are pytorch_model.bin, which are not read; take a revision "
        "or a copy that has them"
    )
    assert fetched(hub) == []


def test_no_server(command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    status, text = command(url, "predict", "--load_checkpoint", QWEN, "--predict_data", "x")
    assert status == 2 and time.monotonic() - began < 20
    assert error_of(text) == (
        f"error: load_checkpoint: {QWEN} is no path here, and {url}, where it may be a name, cannot be reached "
        f"(connection refused): correct the path, or run lora-ms download {QWEN} --output_dir DIR where there is a "
        "network, with --hub modelscope, or through a mirror (HF_ENDPOINT=URL), and give DIR"
    )
    assert len(text.splitlines()) == 1, text


def test_a_split_that_is_not_there(hub, command):
    asked = ("--load_checkpoint", QWEN, "--train_dataset_dir", "someone/rows")
    status, text = command(hub, "preview", *asked, "--train_dataset.data_loader.split", "dev")
    assert status == 2 and "someone/rows has no split dev; there are test, train" in error_of(text)


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "here").mkdir(parents=True)
    assert is_name("Qwen/Qwen2.5-0.5B-Instruct") and is_name("a/b")
    for path in ("Qwen/here", "a", "/a/b", "./a/b", "a/b/c", "~/a", "a/b.jsonl", "a/b.ckpt", "a/*", "../b", "a/..", ""):
        assert not is_name(path), path


def test_the_name_of_a_folder_of_the_hubs_cache(tmp_path):
    folder = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / COMMIT
    assert base_name(folder) == "Qwen/Qwen2.5-0.5B"
    assert base_name(tmp_path / "a") == str(tmp_path / "a")


@contextmanager
def serving_modelscope(name: str, folder: Path, digests: dict[str, str]):
    """The two routes of ModelScope that its library uses to list a model's files and to fetch one."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            url = urlparse(self.path)
            file = parse_qs(url.query).get("FilePath", [""])[0]
            status = 200
            if url.path == f"/api/v1/models/{name}/repo/files":
                entries = [
                    {
                        "Path": each,
                        "Name": each,
                        "Type": "blob",
                        "Size": len(data),
                        "Sha256": digests.get(each, hashlib.sha256(data).hexdigest()),
                    }
                    for each, data in files.items()
                ]
                body = json.dumps({"Code": 200, "Data": {"Files": entries}}).encode()
            elif url.path == f"/api/v1/models/{name}/repo" and file in files:
                body = files[file]
            else:
                status, body = 404, json.dumps({"Code": 10010205001, "Message": "not found"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def modelscope(command, tmp_path):
    """``modelscope(url, name, …)``: ``lora-ms download --hub modelscope``."""
    pytest.importorskip("modelscope_hub")

    def run(url: str, name: str, *argv: str):
        env = {"MODELSCOPE_ENDPOINT": url, "MODELSCOPE_CACHE": str(tmp_path / "ms"), "MODELSCOPE_HOME": str(tmp_path)}
        return command("http://127.0.0.1:9", "download", name, "--hub", "modelscope", *argv, **env)

    return run


def test_modelscope(modelscope, text_model, tmp_path):
    with serving_modelscope(QWEN, text_model, {}) as url:
        status, text = modelscope(url, QWEN, "--output_dir", "here")
        assert status == 0, text
        for name in ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors"):
            assert (tmp_path / "here" / name).read_bytes() == (text_model / name).read_bytes()
        status, text = modelscope(url, QWEN)
        assert status == 0 and Path(text.splitlines()[1], "config.json").is_file(), text
        status, text = modelscope(url, "someone/typo")
        assert status == 2 and f"someone/typo is no path here, and {url} has no model of that name" in error_of(text)
    with serving_modelscope(QWEN, text_model, {"config.json": "0" * 64}) as url:
        status, text = modelscope(url, QWEN, "--output_dir", "there")
        assert status == 2 and "config.json" in error_of(text), text


def test_modelscope_out_of_reach(modelscope):
    began = time.monotonic()
    status, text = modelscope("http://127.0.0.1:9", QWEN)
    assert status == 2 and "cannot be reached (connection refused)" in error_of(text), text
    assert time.monotonic() - began < 30


def test_modelscope_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(LoraMsError, match=r"needs its library: pip install modelscope-hub"):
        fetch(Wanted(QWEN, hub="modelscope"))


def test_names_in_python(monkeypatch, text_model, rows_text, tmp_path):
    from mindspore import nn

    from lora_ms import AutoTokenizer, Trainer, TrainingArguments
    from lora_ms.recipes import download

    rows = tmp_path / "data"
    rows.mkdir()
    (rows / "train.jsonl").write_text(rows_text)
    asked = []

    def fetch_here(wanted: Wanted, *_):
        asked.append(wanted)
        return text_model if wanted.kind == "model" else rows

    monkeypatch.setattr(download, "fetch", fetch_here)
    tokenizer = AutoTokenizer.from_pretrained(QWEN, revision="v1", hub="modelscope")
    assert tokenizer.eos_token == "<|im_end|>"
    trainer = Trainer(nn.Cell(), TrainingArguments(str(tmp_path / "out")), "someone/rows", tokenizer)
    assert trainer.train_dataset == str(rows / "train.jsonl")
    assert asked == [Wanted(QWEN, "model", "modelscope", "v1"), Wanted("someone/rows", "dataset", split="train")]


def test_two_processes_fetch_once(hub, python, python_env, tmp_path):
    env = {
        **{k: v for k, v in python_env.items() if not k.startswith("HF_")},
        **{"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "LORA_MS_CACHE": str(tmp_path / "cache")},
        **{"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"},
    }
    program = f"from lora_ms.recipes.download import local_folder; print(local_folder({QWEN!r}))"
    both = [subprocess.Popen([python, "-c", program], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=100)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    assert sorted(len(lines) for lines in outputs) == [1, 2]  # one says what it fetches
    assert len([path for _, path, _ in hub.requests if path.endswith("?blobs=True")]) == 1

"""`pull`, against a Hub on this computer that has every fault."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Fault, HubServer, Repository
from huggingface_hub import constants
from llava_checkpoints import edit_json, random_model, save
from official_checkpoints import save_clip, save_official
from safetensors.torch import load_file
from xtuner_checkpoints import save_encoder, save_llm, save_projector, save_settings

from local_llava import store
from local_llava.convert import convert, resume
from local_llava.errors import CheckpointError, DownloadError, LocalLlavaError, ModelFileError, OutputError, UsageError
from local_llava.pull import hub_api
from local_llava.pull.prepare import prepare_pull
from local_llava.pull.target import KeptPair, Report
from local_llava.types import ModelFiles

NAME = "me/tiny-llava-transformers"
WEIGHTS = [f"model-{i + 1:05d}-of-00004.safetensors" for i in range(4)]
GGUF = "me/tiny-llava-gguf"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(random_model(), tmp_path_factory.mktemp("checkpoints") / "sharded", shards=4)
    (directory / "README.md").write_text("---\nlicense: llama3\n---\n")
    (directory / "training.log").write_text("of no use")
    (directory / "pytorch_model.bin").write_bytes(b"the same once more")
    return directory


@pytest.fixture(scope="session")
def pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return convert(checkpoint, tmp_path_factory.mktemp("pair"), quant="Q4_K_M")


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(NAME, checkpoint)
        yield server


@pytest.fixture(autouse=True)
def here(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the Hub's library and ours keep lies in the test's own directory, and nothing waits."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "LOCAL_LLAVA_HOME": str(tmp_path / "home"),
    }
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(hub_api, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(resume, "SYNC_BYTES", 0)


DRIVER = """
import sys
from local_llava import cli
from local_llava.pull import hub_api
from local_llava.convert import resume
hub_api.RETRY_SECONDS = 0.001
resume.SYNC_BYTES = 0
{before}
cli.main()
"""


def start(*args: object, before: str = "", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(before=before), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def run(*args: object, code: int = 0, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(*args, before=before, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, f"{process.returncode}: {err}"
    assert "Traceback" not in err
    return subprocess.CompletedProcess(args, code, out, err)


def pull(name: str = NAME, report: Report | None = None, **options: Any) -> ModelFiles:
    return prepare_pull(name, **options).run(report or Report())


def refused(kind: type[LocalLlavaError], name: str = NAME, **options: Any) -> str:
    with pytest.raises(kind) as raised:
        pull(name, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def contents(files: ModelFiles) -> tuple[bytes, bytes]:
    return files.model.read_bytes(), files.mmproj.read_bytes()


def snapshot(tmp_path: Path, hub: HubServer, name: str = NAME) -> Path:
    return tmp_path / "hf/hub" / f"models--{name.replace('/', '--')}" / "snapshots" / hub.repositories[name].commit


def left_over(tmp_path: Path) -> list[str]:
    """Files that only a pull that is not finished may leave."""
    ends = (".incomplete", ".partial", ".journal", ".kept", ".previous", "unfinished.json", "publishing.json")
    return [str(path) for path in tmp_path.rglob("*") if path.name.endswith(ends)]


# ---- a checkpoint ----


def test_a_checkpoint_is_converted_as_if_it_were_here(hub: HubServer, tmp_path: Path) -> None:
    done = run("pull", NAME, HF_HUB_DISABLE_TELEMETRY="0")
    assert "Downloading (" in done.stderr and "Converting (" in done.stderr
    files = ModelFiles(*map(Path, done.stdout.split()))
    reference = convert(snapshot(tmp_path, hub), tmp_path / "reference")
    assert contents(files) == contents(reference)
    assert files.model.name == reference.model.name == "tiny-llava-Q4_K_M.gguf"
    (kept,) = store.find(NAME)
    assert kept.files == files
    assert (kept.origin.kind, kept.origin.repository, kept.origin.quant) == ("converted", NAME, "Q4_K_M")
    assert kept.origin.revision == hub.repositories[NAME].commit
    assert left_over(tmp_path) == []

    # Only what is needed was asked for, and nothing that the user did not ask for.
    small = ["README.md", "chat_template.jinja", "config.json", "generation_config.json"]
    small += ["model.safetensors.index.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
    asked = hub.downloads()
    assert asked[: len(small)] == small
    headers, bodies = asked[len(small) : len(small) + 4], asked[len(small) + 4 :]
    assert headers == WEIGHTS
    assert sorted(bodies) == WEIGHTS
    index = json.loads((snapshot(tmp_path, hub) / "model.safetensors.index.json").read_text())["weight_map"]
    assert bodies[0] == next(file for name, file in index.items() if "projector" in name)
    assert sum(path.startswith("/api/") for _, path, _ in hub.requests) == 1
    agents = {headers["user-agent"] for _, _, headers in hub.requests}
    assert len(agents) == 1 and agents.pop().startswith("local-llava/") and "torch" not in str(agents)


def test_the_cache_is_the_librarys_own(hub: HubServer, tmp_path: Path) -> None:
    pull()
    asked = len(hub.requests)
    cache = huggingface_hub.scan_cache_dir()
    assert cache.warnings == []
    (repository,) = cache.repos
    assert repository.repo_id == NAME and [r.refs for r in repository.revisions] == [{"main"}]
    for file in ("config.json", *WEIGHTS):
        found = huggingface_hub.hf_hub_download(NAME, file, local_files_only=True)
        assert Path(found).read_bytes() == hub.repositories[NAME].files[file]
    assert len(hub.requests) == asked


def test_what_is_in_the_cache_is_not_downloaded_again(hub: HubServer, tmp_path: Path) -> None:
    for file in (WEIGHTS[1], "tokenizer.json"):
        huggingface_hub.hf_hub_download(NAME, file)
    hub.requests.clear()
    first = pull()
    assert WEIGHTS[1] not in hub.downloads() and "tokenizer.json" not in hub.downloads()
    hub.requests.clear()
    assert isinstance(prepare_pull(NAME), KeptPair)
    assert pull() == first
    assert hub.downloads() == []
    again = pull(force=True)
    assert again == first and hub.downloads() == []


def test_a_damaged_copy_in_the_cache_is_seen(hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = contents(pull())
    blob = (snapshot(tmp_path, hub) / WEIGHTS[0]).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    hub.requests.clear()
    assert contents(pull(force=True)) == files
    assert hub.downloads() == [WEIGHTS[0]]
    assert f"{NAME}/{WEIGHTS[0]}: the copy in the Hub's cache is damaged: removed" in caplog.text


def test_it_is_converted_while_it_arrives(hub: HubServer, tmp_path: Path) -> None:
    """The mmproj is complete before the last file has come."""
    seen: list[bool] = []

    def wait(_: int) -> None:
        if "range" in hub.requests[-1][2] or WEIGHTS[0] not in hub.requests[-1][1] or seen:
            return
        deadline = time.monotonic() + 5
        while not list(tmp_path.glob("home/pairs/*/tiny-llava-mmproj-F16.gguf")) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(time.monotonic() < deadline)

    hub.on_body = wait
    files = pull()
    assert seen == [True]
    assert contents(files) == contents(convert(snapshot(tmp_path, hub), tmp_path / "reference"))


def test_what_cannot_be_converted_is_refused_early(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    edit_json(copy / "config.json", text_config__num_hidden_layers=3)
    hub.add("me/deep", copy)
    assert "is missing" in refused(CheckpointError, "me/deep")
    ranges = [h.get("range") for _, path, h in hub.requests if path.endswith(".safetensors")]
    assert len(ranges) == 4 and None not in ranges
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not a whole safetensors file: a header of 0 bytes"),
        (b"\xff" * 8, "not a whole safetensors file: a header of 18446744073709551615 bytes"),
        (b"\x00\x00\x01\x00\x00\x00\x00\x00", "its header did not come whole"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}              ", "not a whole safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!", "not a whole safetensors file"),
    ],
)
def test_hostile_headers(hub: HubServer, body: bytes, message: str) -> None:
    hub.repositories[NAME].faults[WEIGHTS[2]] = Fault(body=body, no_range=True)
    error = refused(LocalLlavaError)
    assert error.startswith(f"{NAME}/{WEIGHTS[2]}: ") and message in error


def test_long_headers_come_in_two_parts(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("local_llava.pull.arriving._FIRST_BYTES", 100)
    hub.repositories[NAME].faults[WEIGHTS[2]] = Fault(no_range=True)
    assert contents(pull()) == contents(convert(snapshot(tmp_path, hub), tmp_path / "reference"))


def test_a_file_that_changes_behind_its_header(hub: HubServer) -> None:
    """The digest is of the file as it came; the header came before."""
    hub.repositories[NAME].faults[WEIGHTS[2]] = Fault(times=1, flip=20)
    error = refused(LocalLlavaError)
    assert WEIGHTS[2] in error


def test_one_file(hub: HubServer, tmp_path: Path) -> None:
    hub.add("me/single", save(random_model(), tmp_path / "single"))
    files = pull("me/single", out=tmp_path / "out")
    assert files.model.parent == tmp_path / "out"
    assert contents(files) == contents(convert(snapshot(tmp_path, hub, "me/single"), tmp_path / "reference"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (files.model, files.mmproj))
    assert "already exists; --force" in refused(OutputError, "me/single", out=tmp_path / "out")
    assert pull("me/single", out=tmp_path / "out", force=True) == files
    assert store.pairs() == []


def test_bin_files_are_converted_when_they_are_here(hub: HubServer, checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "bin"
    directory.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix in (".json", ".jinja") and "index" not in path.name:
            shutil.copy(path, directory)
    tensors = {name: t for file in WEIGHTS for name, t in load_file(checkpoint / file).items()}
    torch.save(tensors, directory / "pytorch_model.bin")
    (directory / "training_args.bin").write_bytes(b"no weights")
    hub.add("me/bin", directory)
    prepared = prepare_pull("me/bin", quant="Q8_0")
    assert "converted when all of it is here" in prepared.lines()[0]
    files = pull("me/bin", quant="Q8_0")
    assert hub.downloads(".bin") == ["pytorch_model.bin"]
    reference = convert(snapshot(tmp_path, hub, "me/bin"), tmp_path / "reference", quant="Q8_0")
    assert contents(files) == contents(reference)


def test_the_official_format_as_it_arrives(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "official").mkdir()
    hub.add("me/official", save_official(random_model(), tmp_path / "official", shards=3))
    (tmp_path / "clip").mkdir()
    hub.add("openai/clip-vit-tiny", save_clip(random_model(), tmp_path / "clip"))
    prepared = prepare_pull("me/official")
    assert "converted as it arrives" in prepared.lines()[0]
    files = prepared.run(Report())
    assert not hub.downloads(".bin")  # of the tower only the configuration
    assert contents(files) == contents(convert(snapshot(tmp_path, hub, "me/official"), tmp_path / "reference"))


def test_a_tower_in_another_repository(hub: HubServer, tmp_path: Path) -> None:
    model = random_model()
    for name in ("official", "clip"):
        (tmp_path / name).mkdir()
    hub.add("me/official", save_official(model, tmp_path / "official", tower=False, suffix="bin", shards=2))
    hub.add("openai/clip-vit-tiny", save_clip(model, tmp_path / "clip"))
    lines = prepare_pull("me/official").lines()
    assert [line for line in lines if line.startswith("openai/clip-vit-tiny: ") and "to download" in line]
    files = pull("me/official")
    assert contents(files) == contents(convert(snapshot(tmp_path, hub, "me/official"), tmp_path / "reference"))


def test_parts_in_directories(hub: HubServer, tmp_path: Path) -> None:
    """XTuner's format."""
    model, directory = random_model(), tmp_path / "xtuner"
    for place in ("projector", "visual_encoder"):
        (directory / place).mkdir(parents=True)
    save_encoder(model, save_projector(model, save_llm(model, directory, shards=2)))
    save_settings(directory)
    hub.add("me/xtuner", directory)
    files = pull("me/xtuner")
    assert "xtuner_config.py" in hub.downloads() and "visual_encoder/model.safetensors" in hub.downloads()
    assert contents(files) == contents(convert(snapshot(tmp_path, hub, "me/xtuner"), tmp_path / "reference"))


def test_two_at_once_download_once(hub: HubServer) -> None:
    for file in WEIGHTS:
        hub.repositories[NAME].faults[file] = Fault(delay=0.0005)
    both = [start("pull", NAME) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    bodies = [path for _, path, h in hub.requests if path.endswith("?signature=1") and "range" not in h]
    assert len(bodies) == len({*bodies}) == 4


# ---- little room ----


def test_low_disk_holds_few_files_and_gives_the_same(hub: HubServer, tmp_path: Path) -> None:
    sizes = {file: len(hub.repositories[NAME].files[file]) for file in WEIGHTS}
    most = 0

    def watch(_: int) -> None:
        nonlocal most
        held = 0
        for pattern in ("*.safetensors", "*.safetensors.incomplete"):
            for path in tmp_path.glob(f"home/pairs/*/{pattern}"):
                try:
                    held += path.stat().st_size
                except FileNotFoundError:  # just now
                    continue
        most = max(most, held)

    prepared = prepare_pull(NAME, low_disk=True)
    assert "at most" in prepared.lines()[-1]
    needs = sum(size for _, size in prepared._needs()) - sum(prepared.planned.sizes)  # type: ignore[union-attr]
    hub.on_body = watch
    files = pull(low_disk=True)
    assert not any((snapshot(tmp_path, hub) / file).exists() for file in WEIGHTS)
    assert contents(files) == contents(pull(force=True))
    assert left_over(tmp_path) == []
    # The tower and the projector are in two files; so much is needed for the beginning.
    assert max(sizes.values()) < most < sum(sizes.values())
    assert most <= needs < sum(sizes.values())


def test_low_disk_leaves_the_cache_alone(hub: HubServer, tmp_path: Path) -> None:
    huggingface_hub.hf_hub_download(NAME, WEIGHTS[3])
    pull(low_disk=True)
    assert (snapshot(tmp_path, hub) / WEIGHTS[3]).is_file()
    assert not any((snapshot(tmp_path, hub) / file).exists() for file in WEIGHTS[:3])


KILLER = """
import os, random, signal
from pathlib import Path
from local_llava.pull import download
from local_llava.pull import prepare as pull
from local_llava.convert import conversion, resume
import huggingface_hub.utils, httpx2  # noqa: what is heavy is loaded once, before the forks

def one_life(events):
    # Kill this process before or after the so-manieth thing that it does to the disk.
    left = [events]
    def counted(function):
        def call(*args, **values):
            for step in (lambda: None, lambda: function(*args, **values)):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = step()
            return result
        return call
    download._write_fully = counted(download._write_fully)
    resume._write_fully = counted(resume._write_fully)
    os.fsync = counted(os.fsync)
    os.link = counted(os.link)
    for name in ("replace", "unlink", "symlink_to", "rename"):
        setattr(Path, name, counted(getattr(Path, name)))
    cli.main()

random.seed(int(sys.argv.pop()))
lives = 0
while True:
    lives += 1
    child = os.fork()
    if child == 0:
        one_life(random.randint(1, 150))
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    assert lives < 200
print("lives", lives, flush=True)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize(("low_disk", "out"), [(False, False), (True, True)])
def test_killed_at_many_points_it_gives_the_same(
    low_disk: bool, out: bool, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*(["--low-disk"] if low_disk else []), *(["-o", str(tmp_path / "out")] if out else [])]
    done = run("pull", NAME, *options, 1 + low_disk, before=KILLER)
    *paths, lives = done.stdout.splitlines()
    assert int(lives.split()[1]) > 3
    assert [path for path in left_over(tmp_path) if not path.endswith("unfinished.json")] == []
    reference = convert(snapshot(tmp_path, hub), tmp_path / "reference") if not low_disk else pull(force=True)
    assert contents(ModelFiles(*map(Path, paths))) == contents(reference)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child")
def test_an_interrupt_stops_soon_and_is_resumed(hub: HubServer, tmp_path: Path) -> None:
    for file in WEIGHTS:
        hub.repositories[NAME].faults[file] = Fault(skip=1, delay=0.05)
    process = start("pull", NAME)
    blobs = tmp_path / "hf/hub" / f"models--{NAME.replace('/', '--')}" / "blobs"
    deadline = time.monotonic() + 30
    while (
        not any(p.stat().st_size > 3000 for p in blobs.glob(f"{64 * '?'}.incomplete")) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 130 and out == "" and err.endswith("local-llava: interrupted\n"), err
    for fault in hub.repositories[NAME].faults.values():
        fault.delay = 0
    hub.requests.clear()
    pull()
    ranges = [h["range"] for _, path, h in hub.requests if "?sig" in path and "range" in h]
    assert any(int(r.removeprefix("bytes=").split("-")[0]) >= 3000 for r in ranges)


# ---- faults on the way ----


def broken(hub: HubServer, fault: Fault, file: str = WEIGHTS[1]) -> Repository:
    fault.skip = 1 if file.endswith(".safetensors") else 0  # its header comes first
    hub.repositories[NAME].faults[file] = fault
    return hub.repositories[NAME]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(times=4, cut=20_000),
        Fault(times=3, cut=0),
        Fault(times=3, cut=20_000, no_range=True),
        Fault(times=2, status=500),
        Fault(times=2, status=503, headers={"Retry-After": "0"}),
        Fault(times=1, status=429, headers={"RateLimit": '"resolvers";r=0;t=0'}),
        Fault(times=1, flip=9000),
        Fault(times=1, status=408),
    ],
    ids=lambda fault: f"{fault.cut}-{fault.status}-{fault.flip}-{fault.no_range}",
)
@pytest.mark.parametrize("file", [WEIGHTS[1], "tokenizer.json"])
def test_what_passes_is_tried_again(fault: Fault, file: str, hub: HubServer, tmp_path: Path) -> None:
    broken(hub, Fault(**vars(fault)), file)
    files = pull()
    assert hub.repositories[NAME].faults[file].times < fault.times
    assert contents(files) == contents(convert(snapshot(tmp_path, hub), tmp_path / "reference"))
    starts = [h["range"] for _, path, h in hub.requests if file in path and "range" in h]
    if fault.cut and not fault.no_range and file != "tokenizer.json":
        assert {"bytes=20000-", "bytes=40000-"} <= {*starts}


def test_what_does_not_pass_ends_with_one_line(hub: HubServer, tmp_path: Path) -> None:
    where = f"{NAME}/{WEIGHTS[1]}"
    for fault, message in (
        (Fault(status=503), f"{where}: the server answered 503 (Service Unavailable)"),
        (Fault(status=418), f"{where}: the server answered 418 (I'm a Teapot)"),
        (Fault(status=404), f"{where}: there is no such file at {hub.url} (404)"),
        (Fault(status=403), f"{where}: access is forbidden (403)"),
        (Fault(status=429, headers={"Retry-After": "900"}), f"{where}: too many requests for the Hub's liking (429); "),
        (Fault(cut=0), f"{where}: the connection broke off"),
        (Fault(body=b"short"), f"{where}: "),
    ):
        broken(hub, fault)
        assert refused(DownloadError).startswith(message)
    assert store.pairs() == []


def test_wrong_bytes_are_deleted_and_named(hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken(hub, Fault(flip=9000))
    error = refused(DownloadError)
    assert error.startswith(f"{NAME}/{WEIGHTS[1]}: not what the Hub announced (digest ")
    assert error.endswith("; it was deleted, and came so twice")
    assert "and comes once more" in caplog.text
    sha256 = hub.repositories[NAME].sibling(WEIGHTS[1])["lfs"]["sha256"]
    assert not list(tmp_path.rglob(f"{sha256}*[!k]")) and not (snapshot(tmp_path, hub) / WEIGHTS[1]).exists()
    hub.repositories[NAME].faults.clear()
    pull()


def test_waits_grow_and_end_at_the_hubs_word(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waits.append(seconds))
    for wait, failures in ((None, 0), (None, 3), (7.0, 1)):
        hub_api.wait_before_retry(hub_api.PassingError("x", wait), failures)
    assert waits == [0.001, 0.008, 7.0]
    for wait, failures in ((None, hub_api.RETRIES), (1000.0, 0)):
        with pytest.raises(hub_api.PassingError):
            hub_api.wait_before_retry(hub_api.PassingError("x", wait), failures)


def test_logins(hub: HubServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    login = "run `hf auth login`, or set HF_TOKEN"
    hub.add("me/private", checkpoint, private=True)
    hub.add("me/gated", checkpoint, gated=True)
    for name in ("me/private", "me/nothing"):
        message = f"{name}: there is no such repository at {hub.url}, or it is private: {login}"
        assert refused(DownloadError, name) == message
    gated = f"is gated: ask for access at {hub.url}/me/gated, then {login}"
    assert refused(DownloadError, "me/gated").endswith(gated)
    assert hub.downloads()[-1] == "README.md"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refused(DownloadError) == f"{NAME}: the Hub does not accept the token that you are logged in with: {login}"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refused(DownloadError, "me/gated").endswith(gated)
    assert "or this login may not see it (404)" in refused(DownloadError, "me/nothing")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text(TOKEN)  # what `hf auth login` leaves
    pull("me/private")


def test_names_and_revisions(hub: HubServer) -> None:
    commit = hub.repositories[NAME].commit
    assert refused(DownloadError, revision="v2") == f"{NAME}: has no revision 'v2'"
    assert "lines" in dir(prepare_pull(NAME, revision=commit))
    assert "did you mean llava-phi-3-mini" in refused(UsageError, "llava-phi-3-mni")
    assert "neither a name of the model list nor owner/repository" in refused(UsageError, "a/b/c")
    assert "name two types" in refused(UsageError, f"{NAME}:Q8_0", quant="Q4_K_M")
    assert "Q9" in refused(UsageError, f"{NAME}:q9")
    assert "holds no GGUF files" in refused(UsageError, source="gguf")
    assert "no GGUF files of Q5_K_M with an mmproj of F16 are published" in refused(
        UsageError, "llava-phi-3", quant="q5_k_m", source="gguf"
    )


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"id": 3}', b'{"sha": "../../x", "siblings": []}', b"<html>"])
def test_answers_that_are_not_the_hubs(hub: HubServer, body: bytes) -> None:
    hub.repositories[NAME].faults["listing"] = Fault(body=body)
    assert refused(DownloadError) == f"{NAME}: what {hub.url} says of it is not as the Hub's API has it"


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "a/../../b", "a//b", "x\n", "c:\\x", "./config.json", ""]
)
def test_hostile_names_of_files(hub: HubServer, name: str) -> None:
    entry = {"rfilename": name, "size": 1, "blobId": "0" * 40}
    listing = {"id": NAME, "sha": "0" * 40, "siblings": [entry]}
    hub.repositories[NAME].faults["listing"] = Fault(body=json.dumps(listing).encode())
    assert "not as the Hub's API has it" in refused(DownloadError)


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(url: str) -> str:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        return refused(LocalLlavaError)

    name = "http://no-such-host.invalid"
    assert at(name) == f"{NAME}: no connection: the name of the server cannot be found ({name})"
    assert at("http://127.0.0.1:9") == f"{NAME}: no connection to http://127.0.0.1:9"
    assert at("ftp://example") == "HF_ENDPOINT must be an http or https address, not 'ftp://example'"
    assert at(hub.url.replace("http:", "https:")).startswith(f"{NAME}: ")


def test_a_server_that_does_not_answer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.repositories[NAME].faults["listing"] = Fault(stall=0.4)
    message = "no answer within the time (HF_HUB_DOWNLOAD_TIMEOUT sets another)"
    assert refused(DownloadError) == f"{NAME}: {message}"
    hub.repositories[NAME].faults.clear()
    broken(hub, Fault(stall=0.4))
    assert refused(DownloadError) == f"{NAME}/{WEIGHTS[1]}: {message}"


def test_offline(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(DownloadError)
    assert message.startswith(f"{NAME}: offline mode is on (HF_HUB_OFFLINE), and revision 'main' is not in the Hub's")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = contents(pull())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert contents(pull()) == contents(pull(force=True)) == first
    (snapshot(tmp_path, hub) / WEIGHTS[0]).unlink()
    assert WEIGHTS[0] in refused(CheckpointError, force=True)
    shutil.rmtree(tmp_path / "hf")
    assert contents(pull()) == first  # the pair is here, whatever the Hub has
    assert hub.requests == []


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_room_is_known_before(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_pull(NAME)
    needed = sum(size for _, size in prepared._needs())  # type: ignore[union-attr]
    weights = sum(len(hub.repositories[NAME].files[file]) for file in WEIGHTS)
    assert needed == weights + sum(prepared.planned.sizes)  # type: ignore[union-attr]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, needed - 1))
    hub.requests.clear()
    assert refused(OutputError).startswith(f"not enough room on the disk of {tmp_path}")
    assert all("range" in h for _, path, h in hub.requests if "?sig" in path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, needed))
    pull()


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@pytest.mark.skipif(sys.platform == "win32", reason="no limits")
@pytest.mark.parametrize("options", [[], ["--low-disk"]])
def test_a_full_disk_is_one_line_and_what_came_is_kept(options: list[str], hub: HubServer, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the system refuses to write on."""
    # The header is probed with a sparse file, which is refused as well; so it is read without the limit.
    before = "from local_llava.pull import arriving as a; f = a.read_shard; n = []\n"
    before += "import resource\ndef limited(*x):\n    s = f(*x); n.append(0)\n"
    before += "    if len(n) == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n    return s\n"
    before += "a.read_shard = limited"
    done = run("pull", NAME, *options, code=1, before=before)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("Note: ", "Downloading", "Converting"))]
    assert len(lines) == 1 and lines[0].startswith("local-llava: cannot write ") and "File too large" in lines[0]
    (partial,) = tmp_path.rglob("*.incomplete")
    assert partial.stat().st_size == 100_000
    hub.requests.clear()
    pull(low_disk=bool(options))
    assert "bytes=100000-" in [h.get("range") for _, _, h in hub.requests]


def test_quiet_and_dry_run(hub: HubServer, tmp_path: Path) -> None:
    done = run("pull", NAME, "--dry-run", "--low-disk")
    assert done.stderr == "" and f"{hub.url}/{NAME} at " in done.stdout and "at most" in done.stdout
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob("*.safetensors"))
    quiet = run("--quiet", "pull", f"{NAME}:F16")
    assert quiet.stderr == "" and quiet.stdout.count("\n") == 2
    assert "is here already" in prepare_pull(NAME, quant="F16").lines()[0]


# ---- published GGUF files ----


@pytest.fixture
def published(hub: HubServer, pair: ModelFiles, tmp_path: Path) -> Repository:
    directory = tmp_path / "published"
    directory.mkdir()
    shutil.copy(pair.model, directory / "tiny-Q4_K_M.gguf")
    shutil.copy(pair.model, directory / "tiny-q8_0.gguf")
    shutil.copy(pair.mmproj, directory / "mmproj-tiny-f16.gguf")
    (directory / "README.md").write_text("no")
    return hub.add(GGUF, directory)


def test_a_published_pair(hub: HubServer, published: Repository, pair: ModelFiles, tmp_path: Path) -> None:
    prepared = prepare_pull(GGUF)
    assert "published GGUF files" in prepared.lines()[0]
    files = pull(GGUF)
    assert contents(files) == contents(pair)
    assert hub.downloads() == ["tiny-Q4_K_M.gguf", "mmproj-tiny-f16.gguf"]
    (kept,) = store.find(GGUF)
    sha256 = published.sibling("tiny-Q4_K_M.gguf")["lfs"]["sha256"]
    assert (kept.origin.kind, kept.origin.model_sha256, kept.files) == ("downloaded", sha256, files)
    assert not list((tmp_path / "hf").rglob("*.gguf")) and left_over(tmp_path) == []
    hub.requests.clear()
    assert pull(GGUF) == files and hub.downloads() == []
    other = pull(f"{GGUF}:q8_0", out=tmp_path / "out")
    assert other.model == tmp_path / "out" / "tiny-q8_0.gguf"
    assert "no file of the language model in Q6_K; there are: Q4_K_M, Q8_0 (--quant)" in refused(
        DownloadError, GGUF, quant="q6_k"
    )


def test_a_pair_in_the_cache_is_linked(hub: HubServer, published: Repository, pair: ModelFiles) -> None:
    cached = Path(huggingface_hub.hf_hub_download(GGUF, "tiny-Q4_K_M.gguf"))
    hub.requests.clear()
    files = pull(GGUF)
    assert hub.downloads() == ["mmproj-tiny-f16.gguf"]
    assert files.model.samefile(cached) and contents(files) == contents(pair)


def test_a_download_that_was_cut_goes_on(hub: HubServer, published: Repository, pair: ModelFiles) -> None:
    published.faults["tiny-Q4_K_M.gguf"] = Fault(cut=50_000, times=1)
    published.faults["mmproj-tiny-f16.gguf"] = Fault(status=503)
    assert "503" in refused(DownloadError, GGUF)
    assert "unfinished" in {leftover.state for leftover in store.leftovers()}
    published.faults.clear()
    hub.requests.clear()
    assert contents(pull(GGUF)) == contents(pair)
    assert hub.downloads() == ["mmproj-tiny-f16.gguf"]


def test_a_name_of_the_list_takes_what_is_published(hub: HubServer, pair: ModelFiles, tmp_path: Path) -> None:
    directory = tmp_path / "phi"
    directory.mkdir()
    shutil.copy(pair.model, directory / "llava-phi-3-mini-int4.gguf")
    shutil.copy(pair.mmproj, directory / "llava-phi-3-mini-mmproj-f16.gguf")
    hub.add("xtuner/llava-phi-3-mini-gguf", directory)
    files = pull("llava-phi-3")
    assert contents(files) == contents(pair)
    assert store.find("llava-phi-3-mini", "Q4_K_M")[0].files == files
    assert pull("XTuner/llava-phi-3-mini-GGUF") == files


def test_a_name_of_the_list_is_converted_where_nothing_is_published(hub: HubServer, checkpoint: Path) -> None:
    hub.add("xtuner/llava-phi-3-mini-hf", checkpoint)
    files = pull("llava-phi-3-mini:Q8_0")
    assert files.model.name == "llava-phi-3-mini-Q8_0.gguf"
    assert store.find("llava-phi-3-mini", "Q8_0")[0].origin.repository == "xtuner/llava-phi-3-mini-hf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mmproj-tiny-f16.gguf": None}, "has no mmproj file"),
        ({"mmproj-tiny-f16.gguf": "tiny-Q4_K_M.gguf"}, "mmproj-tiny-f16.gguf: is no mmproj"),
        ({"tiny-Q4_K_M.gguf": "mmproj-tiny-f16.gguf"}, "tiny-Q4_K_M.gguf: is no language model"),
        ({"tiny-Q4_K_M.gguf": "README.md"}, "tiny-Q4_K_M.gguf: "),
        ({"tiny-Q4_K_M.gguf": None, "tiny-Q4_K_M-00001-of-00002.gguf": "README.md"}, "is split into parts"),
        ({"other-Q4_K_M.gguf": "README.md"}, "several files of the language model in Q4_K_M"),
    ],
)
def test_pairs_that_are_none(
    changes: dict[str, str | None], message: str, hub: HubServer, published: Repository, tmp_path: Path
) -> None:
    for name, source in changes.items():
        if source is None:
            del published.files[name]
        else:
            published.files[name] = published.files[source]
    with pytest.raises((DownloadError, ModelFileError)) as raised:
        pull(GGUF)
    assert str(raised.value).startswith(GGUF) and message in str(raised.value)
    assert store.pairs() == []

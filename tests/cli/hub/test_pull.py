"""Pulls from a local server that speaks the hub's protocol."""

import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

from cli.hub.repository import pull_repository
from tests.cli.hub.conftest import (
    COMMIT,
    ENCODER,
    TOKEN,
    WEIGHTS,
    Repository,
    git_oid,
    sha256,
    use_endpoint,
)

NEEDED = {"config.json", "preprocessor_config.json", "model.safetensors"}
SMALL = NEEDED - {"model.safetensors"}
PATIENCE_S = 60  # a process that is well may take so long beside others that keep every core busy
PLAIN = {"config.json": b"{}", "model.safetensors": b"tensors" * 1000}


def names(folder: Path) -> set[str]:
    """All files but the library's records of a download, in ``.cache``."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith(".cache/")}


def blobs(home: Path) -> list[Path]:
    return sorted(home.rglob("blobs/*"))


def test_a_pull_takes_what_an_import_needs_verified_into_the_shared_cache(hub, encoder, home, run):
    outcome = run("pull", ENCODER)
    assert outcome.status == 0, outcome.err
    folder = Path(outcome.out.strip())
    assert outcome.out.count("\n") == 1
    assert names(folder) == NEEDED
    assert all((folder / name).read_bytes() == encoder.files[name] for name in NEEDED)
    command = f"drorae import --encoder {folder} --new-decoder xl --output dinov2-with-registers-small"
    assert outcome.err == f"next: {command}\n"
    assert hub.file_requests() == dict.fromkeys(NEEDED, 1)
    # Other programs find it: by the revision and without the hub.
    assert snapshot_download(ENCODER, local_files_only=True, allow_patterns=["*.json"]) == str(folder)
    assert try_to_load_from_cache(ENCODER, "model.safetensors") == str(folder / "model.safetensors")
    assert not [path for path in blobs(home) if path.suffix]


def test_a_second_pull_fetches_nothing(hub, encoder):
    first = pull_repository(ENCODER)
    hub.requests.clear()
    assert pull_repository(ENCODER) == first
    assert not hub.file_requests()


def test_a_new_commit_fetches_only_what_changed(hub, encoder):
    first = pull_repository(ENCODER)
    hub.requests.clear()
    encoder.files["config.json"] = b'{"changed": true}'
    encoder.commits.update({"main": "2" * 40, "2" * 40: "2" * 40})
    second = pull_repository(ENCODER)
    assert second != first
    assert (second / "config.json").read_bytes() == b'{"changed": true}'
    assert (second / "model.safetensors").read_bytes() == WEIGHTS
    assert sum(asked.num_bytes for asked in hub.requests) == len(b'{"changed": true}')
    encoder.files["config.json"] = (first / "config.json").read_bytes()
    assert pull_repository(ENCODER, revision=COMMIT) == first


def test_a_cut_connection_continues_where_it_was_cut(hub, encoder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.cuts["model.safetensors"] = [1_000_000, 1, 500_000]
    folder = pull_repository(ENCODER)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [asked.range for asked in hub.sent("model.safetensors")]
    assert ranges == [None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]


def test_complete_files_of_a_failed_pull_are_kept_for_the_next(hub, encoder, home, refused):
    hub.cuts["model.safetensors"] = [1_000_000, *[0] * 9]
    message = refused("pull", ENCODER, status=1)
    assert f"{hub.url}: cannot be reached" in message
    assert {path.name for path in blobs(home)} == {git_oid(encoder.files[name]) for name in SMALL}
    hub.cuts.clear()
    hub.requests.clear()
    assert (pull_repository(ENCODER) / "model.safetensors").read_bytes() == WEIGHTS
    assert "config.json" not in hub.file_requests()


def test_a_server_without_ranges_sends_all_again(hub, encoder):
    hub.cuts["model.safetensors"] = [1_000_000]
    hub.knows_ranges = False
    assert (pull_repository(ENCODER) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json"]
)  # SHA-256 of large files, git's of others
def test_wrong_bytes_are_refused_and_not_kept(hub, encoder, home, refused, name):
    hub.corrupt.add(name)
    assert f"{name}: the download from {hub.url} differs" in refused("pull", ENCODER, status=1)
    assert not [path for path in blobs(home) if path.name in (sha256(WEIGHTS),) or path.suffix]
    assert not list(home.rglob(f"snapshots/*/{name}"))


def test_the_token_goes_to_the_hub_and_no_further(hub, encoder, monkeypatch):
    encoder.private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pull_repository(ENCODER)
    seen = {asked.authorization for asked in hub.requests if asked.path.startswith("/api/")}
    assert seen == {f"Bearer {TOKEN}"}
    assert {asked.authorization for asked in hub.sent("model.safetensors")} == {None}  # redirected to storage


def test_output_holds_plain_files_and_is_checked_again(hub, encoder, tmp_path, home, run):
    folder = tmp_path / "models" / "dinov2"
    hub.cuts["model.safetensors"] = [1_000_000]
    assert run("pull", ENCODER, "--output", folder).out == f"{folder}\n"
    assert names(folder) == NEEDED
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert not blobs(home)
    hub.requests.clear()
    pull_repository(ENCODER, output=folder)
    assert not hub.file_requests()
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"x")
    pull_repository(ENCODER, output=folder)
    assert hub.file_requests() == {"model.safetensors": 1}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_output_is_filled_from_the_cache(hub, encoder, tmp_path):
    pull_repository(ENCODER)
    hub.requests.clear()
    pull_repository(ENCODER, output=tmp_path / "models")
    assert not hub.file_requests()
    assert (tmp_path / "models" / "model.safetensors").read_bytes() == WEIGHTS


def test_offline_the_cache_serves(hub, encoder, monkeypatch, tmp_path, refused):
    folder = pull_repository(ENCODER)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull_repository(ENCODER) == folder
    assert names(pull_repository(ENCODER, output=tmp_path / "models")) == NEEDED
    assert "not all of it is in" in refused("pull", ENCODER, "--include", "*.bin", status=1)
    assert "HF_HUB_OFFLINE is set" in refused("pull", "dinov2-g", status=1)
    assert "at v2: not all of it" in refused("pull", f"{ENCODER}@v2", status=1)
    assert not hub.requests


def test_without_a_network_the_cache_serves_and_says_so(hub, encoder, monkeypatch, run, refused):
    folder = pull_repository(ENCODER)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    outcome = run("pull", ENCODER)
    assert outcome.out == f"{folder}\n"
    assert "http://127.0.0.1:9: cannot be reached" in outcome.err
    assert "this is the copy in the cache" in outcome.err
    message = refused("pull", "dinov2-g", status=1)
    assert "http://127.0.0.1:9: cannot be reached ([Errno 111] Connection refused)" in message


def test_patterns_replace_the_choice(hub, encoder, run):
    folder = Path(run("pull", ENCODER, "--include", "*.bin", "onnx/").out.strip())
    assert names(folder) == {"pytorch_model.bin", "onnx/model.onnx"}


def test_a_known_name_takes_its_files_and_leads_to_the_import(hub, run):
    decoder, statistics = "decoders/mae/base_p16/ViTXL_n08/model.pt", "stats/mae/base_p16/ImageNet1k/stat.pt"
    other = "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
    files = {decoder: b"decoder", statistics: b"mean and var", other: b"another"}
    hub.repositories["nyu-visionx/RAE-collections"] = Repository(files, frozenset(files))
    outcome = run("pull", "rae-decoder-mae-b")
    folder = Path(outcome.out.strip())
    assert names(folder) == {decoder, statistics}
    command = f'drorae import --encoder "$(drorae pull mae-b)" --decoder {folder / decoder}'
    assert outcome.err == f"next: {command} --statistics {folder / statistics} --output rae-decoder-mae-b\n"


REFUSALS = {
    "missing repository": (["nobody/nothing"], 2, "has no such repository, or it is private: check the name"),
    "missing revision": ([f"{ENCODER}@v9"], 2, f"{ENCODER}: has no revision v9"),
    "missing commit": ([f"{ENCODER}@{'3' * 40}"], 2, f"{ENCODER}: has no revision {'3' * 40}"),
    "missing file": ([ENCODER, "--include", "model.pt"], 2, f"{ENCODER}: has no file model.pt"),
    "empty revision": ([f"{ENCODER}@"], 2, "expected REPO or REPO@REVISION"),
    "unknown name": (["dinov9-b"], 2, "dinov9-b: expected ORGANIZATION/NAME, or one of dinov2-s, dinov2-b"),
    "invalid name": (["facebook/.dinov2"], 2, "no valid name of a repository"),
    "address": (["https://huggingface.co/facebook/dinov2-base"], 2, "expected ORGANIZATION/NAME"),
    "output is a file": ([ENCODER, "--output", __file__], 2, "is a file: --output names a directory"),
    "private": (["some/private"], 2, "or it is private: check the name, or set HF_TOKEN"),
    "gated": (["some/gated"], 1, "access is restricted: accept its conditions on http"),
    "no weights": (["some/text"], 2, "has no weights that drorae can import"),
    "several models": (["some/collection"], 2, "holds 2 models (a, b): choose by --include FOLDER/"),
    "path outside": (["some/trap"], 1, "does not answer as a Hugging Face hub does"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_sentence_and_leave_nothing(hub, encoder, home, tmp_path, refused, case):
    hub.repositories |= {
        "some/private": Repository(PLAIN, private=True),
        "some/gated": Repository(PLAIN, frozenset({"model.safetensors"}), gated=True),
        "some/text": Repository({"README.md": b"nothing here"}),
        "some/collection": Repository({"a/model.pt": b"1", "b/model.pt": b"2"}),
        "some/trap": Repository({"../../model.safetensors": b"1"}),
    }
    argv, status, sentence = REFUSALS[case]
    assert sentence in refused("pull", *argv, status=status)
    output = tmp_path / "output"
    if "--output" not in argv:
        refused("pull", *argv, "--output", output, status=status)
    assert not blobs(home)
    assert not names(output)


@pytest.mark.parametrize(
    ("status", "token", "sentence"),
    [
        (401, TOKEN, "answered 401: check HF_TOKEN"),
        (403, TOKEN, "answered 403: set HF_TOKEN"),
        (429, None, "answered 429: wait"),
        (503, None, "answered 503"),
    ],
)
def test_statuses_of_the_hub(hub, encoder, monkeypatch, refused, status, token, sentence):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.status = status
    message = refused("pull", ENCODER, status=1)
    assert sentence in message
    assert TOKEN not in message


def test_a_portal_that_answers_for_the_hub(hub, encoder, refused):
    hub.page = b"<html>Please log in to this network.</html>"
    assert "does not answer as a Hugging Face hub does" in refused("pull", ENCODER, status=1)


def test_a_token_with_foreign_characters_is_not_shown(hub, encoder, monkeypatch, refused):
    monkeypatch.setenv("HF_TOKEN", "hf_gehéim\x01")
    message = refused("pull", ENCODER, status=1)
    assert "HF_TOKEN: has characters that no token has" in message
    assert "gehéim" not in message


def test_a_file_that_cannot_fit_is_refused_before_it_is_fetched(hub, encoder, home, monkeypatch, refused):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    assert "Not enough free disk space" in refused("pull", ENCODER, status=1)
    assert "model.safetensors" not in hub.file_requests()


def test_a_person_sees_a_progress_bar(hub, encoder, monkeypatch, run):
    hub.cuts["model.safetensors"] = [1_000_000]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    outcome = run("pull", ENCODER)
    assert "model.safetensors: 100%" in outcome.err
    assert "3.15M/3.15M" in outcome.err


def test_equal_files_are_fetched_once(hub):
    same = b"tensors" * 1000
    files = {"model-00001-of-00002.safetensors": same, "model-00002-of-00002.safetensors": same}
    hub.repositories["some/twins"] = Repository(files, frozenset(files))
    assert names(pull_repository("some/twins")) == set(files)
    assert sum(asked.num_bytes for asked in hub.requests) == len(same)


def test_without_the_library_the_extra_is_named(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "cli.hub.repository", raising=False)
    assert "pip install 'drorae[hub]'" in refused("pull", ENCODER, status=1)


def environment(hub, home: Path) -> dict[str, str]:
    """The variables that a user sets; the library reads them at import."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE_S),  # a server that is starved has not stalled
        "HF_HUB_ETAG_TIMEOUT": str(PATIENCE_S),
    }


@pytest.mark.slow
def test_an_interrupt_ends_at_once_and_leaves_nothing_half_written(hub, encoder, home):
    encoder.private = True
    hub.stall_at["model.safetensors"] = 2_000_000
    script = (
        "import signal, sys\n"
        "from cli.main import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", script, "pull", ENCODER]
    with subprocess.Popen(command, env=environment(hub, home), stderr=subprocess.PIPE, text=True) as process:
        assert hub.stalled.wait(PATIENCE_S)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == "drorae: interrupted\n"
    assert process.returncode == 130
    assert {path.name for path in blobs(home)} == {git_oid(encoder.files[name]) for name in SMALL}


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(hub, encoder, home, tmp_path):
    code = (
        "import resource, sys; from cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        f"sys.exit(main(['pull', {ENCODER!r}, *sys.argv[1:]]))"
    )
    for argv in ([], ["--output", str(tmp_path / "models")]):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv],
            env=environment(hub, home),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "File too large: free some space" in done.stderr
        assert not [
            path
            for path in tmp_path.rglob("*")
            if "incomplete" in path.name or path.name == "model.safetensors"
        ]
        assert sha256(WEIGHTS) not in {path.name for path in blobs(home)}

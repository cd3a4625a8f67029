"""Fetching, against a server of this machine that can break off, lie, hide, demand a token and send elsewhere."""

import errno
import hashlib
import http.server
import io
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from codalib.base.files import read_json
from codalib.pretrained import registry
from codalib.tools import fetch
from codalib.workflow import profiles

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
TOKEN = "hf_of_this_test"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` {path: bytes} with ranges; what else it does is in the server's own attributes."""

    def do_HEAD(self):  # what huggingface_hub asks before a download
        self.do_GET()

    def do_GET(self):
        server = self.server
        asked = server.asked if self.command == "HEAD" else server.requests
        asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if self.path in server.sent_on:
            self.send_response(302)
            self.send_header("Location", server.sent_on[self.path])
            if self.path in server.linked:
                self.send_header("X-Linked-Etag", f'"{server.linked[self.path]}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path not in server.files:
            return self.send_error(404)
        if self.path in server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send_error(401)
        content, start = server.files[self.path], 0
        wanted = re.match(r"bytes=(\d+)-$", self.headers.get("Range") or "")
        if wanted and server.ranges:
            start = int(wanted[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if server.etags:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = content[start:]
        if server.breaks:
            server.breaks -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *arguments):
        pass


def make_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.sent_on, server.linked, server.gated = {}, {}, {}, set()
    server.requests, server.asked = [], []  # GET and HEAD: (path, range, authorization)
    server.breaks, server.ranges, server.etags = 0, True, True
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def server():
    server = make_server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty weights folder; no token, and nothing of this machine's own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch.huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(fetch.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # bytes: the files of these tests are small
    monkeypatch.setattr(fetch.huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("CODALIB_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


@pytest.fixture
def network(server, monkeypatch):
    """One registered network of one file; its name carries the first digits of its SHA-256."""
    file = f"tiny-{SHA256[:8]}.pth"
    server.files[f"/{file}"] = CONTENT
    network = registry.Network("tiny", "tests", file, "none", "fetch it", url=f"{server.address}/{file}")
    monkeypatch.setattr(fetch, "NETWORKS", {"tiny": network})
    monkeypatch.setattr(registry, "NETWORKS", {"tiny": network})
    return network


@pytest.fixture
def hub(server, weights, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    return server


def part_of(path: Path, content: bytes = CONTENT) -> Path:
    """Where what has come of a file lies, named after the version that the server tells."""
    return path.with_name(
        f"{path.name}.{hashlib.sha256(hashlib.md5(content).hexdigest().encode()).hexdigest()[:8]}.part"
    )


def breaks_off(monkeypatch, fraction: float = 0.5) -> None:
    """The next transfer ends after a part of what is missing, as if it had been interrupted."""
    whole = fetch.http_get

    def broken(url, file, **options):
        with io.BytesIO() as received:
            whole(url, received, **options)
            file.write(received.getvalue()[: int(fraction * len(received.getvalue()))])
        monkeypatch.setattr(fetch, "http_get", whole)
        raise RuntimeError("the client's own error")

    monkeypatch.setattr(fetch, "http_get", broken)


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != fetch.LOCK)


# --- one file ---------------------------------------------------------------------------------------------------------


def test_a_file_comes_whole_and_its_checksum_is_kept(network, server, weights):
    assert fetch.fetch("tiny") == []
    assert (weights / network.file).read_bytes() == CONTENT
    assert files_in(weights) == ["checksums.json", network.file]
    row = {"sha256": SHA256, "bytes": len(CONTENT), "from": network.url}
    assert read_json(weights / fetch.CHECKSUMS) == {network.file: row}
    assert fetch.fetch("tiny") == []  # verified, not fetched again
    assert len(server.requests) == 1


def test_a_broken_connection_goes_on_where_it_was(network, server, weights):
    server.breaks = 2
    assert fetch.fetch("tiny") == []
    assert (weights / network.file).read_bytes() == CONTENT
    half, quarter = len(CONTENT) // 2, len(CONTENT) // 4
    assert [wanted for _, wanted, _ in server.requests] == [None, f"bytes={half}-", f"bytes={half + quarter}-"]


def test_an_interrupted_run_is_continued_by_the_next(network, server, weights, monkeypatch):
    breaks_off(monkeypatch)
    (problem,) = fetch.fetch("tiny")
    assert "the connection broke off: the client's own error; run again to go on" in problem
    done = part_of(weights / network.file).stat().st_size
    assert 0 < done < len(CONTENT)
    assert not (weights / network.file).exists()
    assert fetch.fetch("tiny") == []
    assert server.requests[-1][1] == f"bytes={done}-"
    assert files_in(weights) == ["checksums.json", network.file]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_anew(network, server, weights, monkeypatch, ranges):
    server.files[f"/{network.file}"] = CONTENT[::-1]
    breaks_off(monkeypatch)
    assert fetch.fetch("tiny") != []
    server.files[f"/{network.file}"] = CONTENT
    server.ranges = ranges  # a server without ranges sends the whole again
    assert fetch.fetch("tiny") == []
    assert (weights / network.file).read_bytes() == CONTENT
    assert files_in(weights) == ["checksums.json", network.file]


def test_a_whole_part_needs_nothing_more(network, server, weights):
    part = part_of(weights / network.file)
    part.write_bytes(CONTENT)
    assert fetch.fetch("tiny") == []
    assert server.requests == []
    assert (weights / network.file).read_bytes() == CONTENT
    (weights / network.file).unlink()
    part.write_bytes(CONTENT + b"more than there is")
    assert fetch.fetch("tiny") == []
    assert (weights / network.file).read_bytes() == CONTENT


def test_one_process_leaves_anothers_part_alone(network, server, weights):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fetch.fetch, ["tiny"] * 4)) == [[], [], [], []]
    assert len(server.requests) == 1
    assert (weights / network.file).read_bytes() == CONTENT


def test_a_server_that_tells_no_version_is_asked_anew(network, server, weights, monkeypatch):
    server.etags = False
    breaks_off(monkeypatch)
    assert fetch.fetch("tiny") != []
    assert fetch.fetch("tiny") == []
    assert (weights / network.file).read_bytes() == CONTENT
    assert [wanted for _, wanted, _ in server.requests] == [None, None]


def test_a_file_that_lies_with_another_server_is_continued_there(network, server, weights, monkeypatch):
    other = make_server()
    try:
        other.files["/blob"] = CONTENT
        server.sent_on[f"/{network.file}"] = f"{other.address}/blob"
        breaks_off(monkeypatch)
        assert fetch.fetch("tiny") != []
        assert fetch.fetch("tiny") == []
        assert (weights / network.file).read_bytes() == CONTENT
        assert [wanted for _, wanted, _ in other.requests] == [None, f"bytes={len(CONTENT) // 2}-"]
        server.sent_on[f"/{network.file}"] = f"{other.address}/around"
        other.sent_on["/around"] = network.url
        (weights / network.file).unlink()
        (problem,) = fetch.fetch("tiny")
        assert "leads on and on" in problem
    finally:
        other.shutdown()
        other.server_close()


def test_a_folder_that_may_only_be_read(network, server, weights, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "FileLock", refuse)
        (problem,) = fetch.fetch("tiny")
        assert "Read-only file system): set CODALIB_WEIGHTS to a folder that can be written" in problem
        (weights / network.file).write_bytes(CONTENT)
        assert fetch.fetch("tiny") == []  # what is there is checked all the same
    assert "is not noted" in caplog.text


def test_broken_checksums_are_one_sentence(network, weights, caplog):
    (weights / fetch.CHECKSUMS).write_text("{")
    (weights / network.file).write_bytes(CONTENT)
    assert fetch.main(["tiny"]) == 1
    assert "checksums.json is not a JSON file" in caplog.text


def test_a_wrong_checksum_is_refused_and_removed(network, server, weights):
    server.files[f"/{network.file}"] = b"another file"
    (problem,) = fetch.fetch("tiny")
    assert f"expected a SHA-256 that begins with {SHA256[:8]}" in problem
    assert files_in(weights) == []


def test_a_damaged_file_is_noticed_later(network, weights):
    fetch.fetch("tiny")
    (weights / network.file).write_bytes(CONTENT[:-1])
    (problem,) = fetch.fetch("tiny")
    assert f"expected the SHA-256 {SHA256}," in problem
    assert "remove it and run again" in problem
    (weights / fetch.CHECKSUMS).unlink()  # then the name alone tells
    (problem,) = fetch.fetch("tiny")
    assert f"expected the SHA-256 {SHA256[:8]}...," in problem


def test_a_file_put_there_by_hand_is_taken_up(network, server, weights):
    (weights / network.file).write_bytes(CONTENT)
    assert fetch.fetch("tiny") == []
    assert read_json(weights / fetch.CHECKSUMS)[network.file]["sha256"] == SHA256
    assert server.requests == []


def test_a_full_disk_is_one_sentence(network, weights, monkeypatch):
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    (problem,) = fetch.fetch("tiny")
    assert f"needs {len(CONTENT):,} bytes" in problem


# --- no network -------------------------------------------------------------------------------------------------------


def test_without_a_network_each_file_gets_one_sentence(weights, monkeypatch, caplog, capsys):
    with socket.socket() as probe:  # a port where nobody listens
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    networks = {name: registry.NETWORKS[name] for name in ("kl16", "flux", "coda/mar_v16384", "efficientnet_lite0")} | {
        "tiny": registry.Network("tiny", "tests", "tiny.pth", "none", "fetch it", url=f"{nowhere}/tiny.pth")
    }
    monkeypatch.setattr(fetch, "NETWORKS", networks)
    monkeypatch.setattr(registry, "NETWORKS", networks)
    assert fetch.main(list(networks)) == 1
    sentences = [record.message for record in caplog.records if record.levelname == "ERROR"]
    places = ["kl16.safetensors", *(f"flux-vae/{name}" for name in registry.VAE_FILES)]
    places += [f"coda/mar_v16384/{name}" for name in registry.RELEASED_FILES[0]] + ["tiny.pth"]
    assert len(sentences) == len(places)
    for sentence, place in zip(sentences, places, strict=True):
        assert sentence.endswith(f"put it at {weights / place}.")
        assert f"get {nowhere}/" in sentence
        assert "\n" not in sentence
    assert "Traceback" not in capsys.readouterr().err


# --- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_large_file_of_the_hub_is_checked_against_its_own_sum(hub, weights):
    other = make_server()  # where the Hub keeps its files
    try:
        other.files["/blob"] = CONTENT
        address = "/jadechoghari/mar/resolve/main/kl16.safetensors"
        hub.sent_on[address], hub.linked[address] = f"{other.address}/blob", "0" * 64
        (problem,) = fetch.fetch("kl16")
        assert f"begins with {'0' * 64}" in problem
        hub.linked[address], other.breaks = SHA256, 1
        assert fetch.fetch("kl16") == []
        assert (weights / "kl16.safetensors").read_bytes() == CONTENT
        assert other.requests[-1][1] == f"bytes={len(CONTENT) // 2}-"
        assert read_json(weights / fetch.CHECKSUMS)["kl16.safetensors"]["from"] == hub.address + address
    finally:
        other.shutdown()
        other.server_close()


def test_the_token_opens_a_gated_file_and_goes_to_the_hub_alone(hub, weights, monkeypatch):
    other = make_server()
    try:
        other.files["/blob"] = CONTENT
        config, model = (f"/black-forest-labs/FLUX.1-dev/resolve/main/vae/{name}" for name in registry.VAE_FILES)
        hub.files |= {"/moved": b"{}", model: b""}
        hub.sent_on[config] = "/moved"  # to the Hub itself, which wants the token there too
        hub.gated |= {"/moved", model}
        problems = fetch.fetch("flux")
        assert len(problems) == 2
        assert all("accept the licence at" in problem and "HF_TOKEN" in problem for problem in problems)
        monkeypatch.setattr(fetch.huggingface_hub, "get_token", lambda: TOKEN)
        hub.sent_on[model], hub.linked[model] = f"{other.address}/blob", SHA256
        assert fetch.fetch("flux") == []
        assert registry.has_weights("flux")
        assert hub.requests[-1][2] == f"Bearer {TOKEN}"
        assert [token for _, _, token in other.requests] == [None]
        assert not any(TOKEN in path.read_text(errors="ignore") for path in weights.rglob("*") if path.is_file())
    finally:
        other.shutdown()
        other.server_close()


def test_a_released_folder_may_hold_one_set_of_weights_alone(hub, weights):
    address = "/shuidi0020/CODA/resolve/main/mar_v16384"
    hub.files |= {f"{address}/{name}": name.encode() for name in ("vae.pth", "quantizer.pth")}
    assert fetch.fetch("coda/mar_v16384") == []
    assert files_in(weights / "coda/mar_v16384") == ["quantizer.pth", "vae.pth"]
    asked = len(hub.requests)
    assert fetch.fetch("coda/mar_v16384") == []  # whole: nothing is asked for
    assert len(hub.requests) == asked
    (weights / "coda/mar_v16384" / "vae.pth").unlink()
    hub.files.clear()
    problems = fetch.fetch("coda/mar_v16384")
    assert len(problems) == 1
    assert "404" in problems[0]


# --- profiles ---------------------------------------------------------------------------------------------------------


def test_a_profile_says_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_train_tokenizer.ipynb").touch()
    (tmp_path / "notebooks" / "table.ipynb").touch()
    for module in (profiles, fetch):
        monkeypatch.setattr(module, "project_folder", lambda: tmp_path)

    def needs(text: str) -> list[str]:
        (tmp_path / "profiles" / "some.yaml").write_text(text)
        return fetch.needed("some")

    papers = ["dino_vits16", "inception_fid", "vgg16_lpips"]
    assert needs("01_train_tokenizer: {vae: kl16}") == [*papers, "kl16"]
    assert needs("table: {frechet: fid, text_encoder: clip}") == ["inception_fid", "clip_vit_l14"]
    assert needs("table: {tokenizers: {theirs: coda/flux_v65536}, vaes: [flux-vae]}") == [
        *papers,
        "flux",
        "coda/flux_v65536",
    ]
    assert needs("01_train_tokenizer: {discriminator_network: dino, vae: 3}") == ["dino_vits16"]
    assert needs("01_train_tokenizer: {limit: 3}") == []
    with pytest.raises(profiles.StageError, match="expected a profile of some, got 'other'"):
        fetch.needed("other")


def test_the_command_line(network, weights, caplog, monkeypatch):
    caplog.set_level("INFO")
    assert fetch.main(["tiny"]) == 0
    assert "All of it is here: tiny." in caplog.text
    assert fetch.main(["--profile", "smoke"]) == 0
    assert "needs no network" in caplog.text
    assert fetch.main(["--profile", "no such profile"]) == 1
    with monkeypatch.context() as patch:

        def stop(name):
            raise KeyboardInterrupt

        patch.setattr(fetch, "fetch", stop)
        assert fetch.main(["tiny"]) == fetch.INTERRUPTED
    for wrong in ([], ["no such network"]):
        with pytest.raises(SystemExit):
            fetch.main(wrong)
    with pytest.raises(KeyError, match="expected one of tiny"):
        fetch.fetch("other")

"""Download pretrained networks into the weights folder: `codalib fetch --profile PROFILE`, or `... NAME ...`.

A file that is here is checked against the SHA-256 kept when it came (checksums.json, in the weights folder) or the
digits in its name; one on its way from the Hugging Face Hub against the Hub's. huggingface_hub says where the Hub's
files lie and what they are; it would begin an interrupted file anew, so `download` carries every file and continues
where it broke off. Without a network each missing file gets one sentence: where it is, where to put it.
"""

import argparse
import errno
import hashlib
import http.client
import logging
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from tqdm.auto import tqdm

from codalib.base.files import read_json, write_json
from codalib.base.paths import project_folder
from codalib.pretrained.registry import NETWORKS, Network, find_weights, has_weights, weights_folder
from codalib.workflow.profiles import StageError, profile_path, profile_section, profile_stages

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"  # in the weights folder: {file: {"sha256", "bytes", "from"}}
LOCK = ".lock"  # in the weights folder: held by the process that writes there
ATTEMPTS = 3  # connections a file; each goes on where the last one broke off
TIMEOUT = 30  # seconds without an answer
CHUNK = 2**20  # bytes
SHA256 = re.compile(r"[0-9a-f]{64}")  # the etag of a large file on the Hub; a small one's has fewer digits
INTERRUPTED = 130  # the shell's exit status after Ctrl-C
REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
DIGITS_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # torch's habit: NAME-FIRST_DIGITS_OF_THE_SHA_256.pth
PUBLISHED = ("kl16", "flux", "coda/mar_v16384", "coda/flux_v65536")
PAPERS_METRICS = ("dino_vits16", "vgg16_lpips", "inception_fid")  # of whoever trains or evaluates one of these
OTHER_NAMES = {  # in a profile
    "dino": "dino_vits16",
    "perceptual_vgg": "vgg16_lpips",
    "rfid": "inception_fid",
    "fid": "inception_fid",
    "clip": "clip_vit_l14",
}


class FetchError(Exception):
    """A file that could not be fetched, or is not what it was; one sentence says why and what to do."""


class NotThere(FetchError):
    """The server does not have the file."""


# --- what a profile needs ---------------------------------------------------------------------------------------------
def needed(profile: str) -> list[str]:
    """The networks that the stages of PROFILE name, in the registry's order; the paper's VAEs and tokenizers bring the
    networks of its losses and metrics with them.

    Raises StageError for an unknown profile.
    """
    profile_path(profile)  # an unknown one stops here, with the known ones named
    notebooks = sorted(path.stem for path in (project_folder() / "notebooks").glob("*.ipynb"))
    values = {text for name in profile_stages(profile, notebooks) for text in _texts(profile_section(profile, name))}
    names = {name for name, network in NETWORKS.items() if values & {name, network.file}}
    names |= {name for other, name in OTHER_NAMES.items() if other in values}
    if names & set(PUBLISHED):
        names |= set(PAPERS_METRICS)
    return [name for name in NETWORKS if name in names]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


# --- one network ------------------------------------------------------------------------------------------------------
def fetch(name: str) -> list[str]:
    """Bring a network's files here, or check those that are; returns one sentence a file that is still wanted or wrong.

    Raises KeyError for a name that is not in `NETWORKS`.
    """
    if name not in NETWORKS:
        raise KeyError(f"expected one of {', '.join(NETWORKS)}, got the network {name!r}")
    network = NETWORKS[name]
    here = find_weights(name) if has_weights(name) else None
    if network.url is None and network.hub is None:  # comes with a package or with the kit
        return [] if here else [f"{network.file} is not here: {network.how_to_get}."]
    if not network.contents:
        return _problems(network, {"": here or network.candidates()[0]})[0]
    folder = here or network.candidates()[0]
    for names in network.contents:
        files = {inner: folder / inner for inner in names}
        if here is not None:  # what else the server may hold is not asked for again, unless it was on its way
            files = {inner: path for inner, path in files.items() if path.exists() or _part(path).exists()}
        problems, absent = _problems(network, files)
        last = names == network.contents[-1]
        if problems and (not absent or (last and not network.is_whole(folder))):
            return problems
    return []


def _problems(network: Network, files: dict[str, Path]) -> tuple[list[str], bool]:
    """The sentences of files {name inside the folder: path}, and whether the server lacks one of them."""
    problems, absent = [], False
    for inner, path in files.items():
        try:
            if path.is_file():
                _verify(path)
                log.info("%s is here, its SHA-256 is right: %s", network.name, path)
            else:
                _fetch_file(network, inner, path)
                log.info("%s was fetched: %s", network.name, path)
        except FetchError as error:
            problems.append(str(error))
            absent = absent or isinstance(error, NotThere)
    return problems, absent


def _fetch_file(network: Network, inner: str, path: Path) -> None:
    url, repository, file = network.url, "", {"sha256": _digits_in_name(path)}
    if network.hub:
        owner, name, outer = network.hub.split("/", 2)
        endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
        repository, inside = f"{endpoint}/{owner}/{name}", "/".join(filter(None, (outer, inner)))
        url = huggingface_hub.hf_hub_url(f"{owner}/{name}", inside, endpoint=endpoint)
    by_hand = f"get {url} by another way and put it at {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone():
            if path.is_file():  # another process has brought it meanwhile
                return
            if network.hub:
                file |= _on_the_hub(url)
            download(url, path, **file)
    except (urllib.error.HTTPError, HfHubHTTPError) as error:
        code = error.code if isinstance(error, urllib.error.HTTPError) else error.response.status_code
        said = f"{code} {HTTPStatus(code).phrase}"
        if repository and code in REFUSED:
            raise FetchError(
                f"{path.name} was not fetched (the Hub says {said}): accept the licence at {repository} and set "
                f"HF_TOKEN to a token of yours, or {by_hand}."
            ) from error
        kind = NotThere if code == HTTPStatus.NOT_FOUND else FetchError
        raise kind(f"{path.name} was not fetched (the server says {said}): {by_hand}.") from error
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
            by_hand = "set CODALIB_WEIGHTS to a folder that can be written"
        raise FetchError(f"{path.name} was not fetched ({_reason(error)}): {by_hand}.") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock of the weights folder, so that no process touches the parts and the checksums of another."""
    lock = FileLock(weights_folder() / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process fetches into %s: waiting for it", weights_folder())
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _on_the_hub(url: str) -> dict[str, str]:
    """What `download` needs to know about a file of the Hub; the token stays with the Hub's own host."""
    token = huggingface_hub.get_token()  # HF_TOKEN, or what a login to the Hub left
    try:
        file = huggingface_hub.get_hf_file_metadata(url, token=token or False, timeout=TIMEOUT)
    except HfHubHTTPError:
        raise
    except Exception as error:  # those of huggingface_hub's HTTP client, which is another in each of its versions
        raise ConnectionError(_reason(error)) from error
    known = {"location": file.location, "version": file.etag or ""}
    if SHA256.fullmatch(known["version"]):
        known["sha256"] = known["version"]
    return known | ({"token": token} if token and urlsplit(file.location).netloc == urlsplit(url).netloc else {})


def _reason(error: Exception) -> str:
    error = getattr(error, "reason", None) or error  # urllib wraps what happened
    return " ".join(str(error).split()) or type(error).__name__


# --- one file ---------------------------------------------------------------------------------------------------------
def download(url: str, path: Path, sha256: str = "", location: str = "", version: str = "", token: str = "") -> None:
    """Download a file, going on from PATH.part if it is there, and rename it to PATH once its SHA-256 is right.

    Args:
        url: http or https.
        path: in a folder that is there.
        sha256: all or its first digits; "" takes whatever comes.
        location: where the server keeps the file, if not at the URL.
        version: changes with the file; "" takes the server's ETag or date. Without any, nothing is gone on with.
        token: sent to the location's host, and to no other that it redirects to.
    Raises:
        FetchError: another SHA-256; what came is removed. Or the disk is full.
        OSError, http.client.HTTPException: no connection, or one that broke off; PATH.part stays.
    """
    part = _part(path)
    request = urllib.request.Request(location or url, headers={"User-Agent": "codalib"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    for attempt in range(ATTEMPTS):
        try:
            _continue(request, part, version)
            break
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS - 1 or not part.exists():
                raise
            log.warning("%s broke off (%s): going on", path.name, _reason(error))
    found = sha256_of(part)
    if not found.startswith(sha256):
        _discard(part)
        raise FetchError(
            f"{path.name}: expected a SHA-256 that begins with {sha256}, got {found}: what came from {url} was "
            "removed, so run again; if it happens again, the file there is another."
        )
    size = part.stat().st_size
    part.replace(path)
    _discard(part)
    _keep(path, found, size, url)


def _continue(request: urllib.request.Request, part: Path, version: str) -> None:
    """Append what is missing to PART, or start over where the server cannot go on or has another file by now."""
    done = part.stat().st_size if part.exists() else 0
    if done:
        request.add_header("Range", f"bytes={done}-")
    else:
        request.remove_header("Range")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not done or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":  # nothing was missing
            return
        _discard(part)
        return _continue(request, part, version)
    with response:
        version, known = version or _version_of(response), _version(part)
        appending = response.status == HTTPStatus.PARTIAL_CONTENT
        if appending and not (version and known.exists() and known.read_text() == version):
            _discard(part)
            return _continue(request, part, version)
        done = done if appending else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else done + int(length)
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - done > free:
            raise FetchError(f"{part.stem} needs {total - done:,} bytes and {part.parent} has {free:,}: free some.")
        known.write_text(version)
        with (
            open(part, "ab" if appending else "wb") as file,
            tqdm(total=total, initial=done, desc=part.stem, unit="B", unit_scale=True, mininterval=1.0) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
    if total is not None and done < total:
        raise ConnectionError(f"the connection broke off after {done:,} of {total:,} bytes; run again to go on")


def _version_of(response: http.client.HTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _version(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _version(part).unlink(missing_ok=True)


# --- checksums --------------------------------------------------------------------------------------------------------
def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digits_in_name(path: Path) -> str:
    match = DIGITS_IN_NAME.search(path.name)
    return match[1] if match else ""


def _verify(path: Path) -> None:
    """Check a file that is here against what is known of it; keep its SHA-256 where nothing was."""
    known = _checksums().get(_key(path), {}).get("sha256")
    found = sha256_of(path)
    expected = known or _digits_in_name(path)
    if not found.startswith(expected):
        raise FetchError(
            f"{path}: expected the SHA-256 {expected}{'' if known else '...'}, got {found}: it is damaged or was "
            f"replaced, so remove it and run again (or, if it is meant, its line in {weights_folder() / CHECKSUMS})."
        )
    if known is None:
        try:
            with _alone():
                _keep(path, found, path.stat().st_size, "was here")
        except OSError as error:  # a folder of others, that one may only read
            log.warning("the SHA-256 of %s is not kept (%s)", path, _reason(error))


def _keep(path: Path, sha256: str, size: int, origin: str) -> None:
    row = {"sha256": sha256, "bytes": size, "from": origin}
    write_json(weights_folder() / CHECKSUMS, _checksums() | {_key(path): row})


def _checksums() -> dict[str, Any]:
    path = weights_folder() / CHECKSUMS
    return read_json(path) if path.exists() else {}


def _key(path: Path) -> str:
    return str(path.relative_to(weights_folder()) if path.is_relative_to(weights_folder()) else path)


# --- the command line -------------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="codalib fetch", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--profile", help="what this profile needs: a name in profiles/")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if unknown := [name for name in options.names if name not in NETWORKS]:
        parser.error(f"expected networks among {', '.join(NETWORKS)}, got {', '.join(unknown)}")
    if not options.names and options.profile is None:
        parser.error("expected a profile (--profile PROFILE) or names of networks")
    try:
        names = list(dict.fromkeys([*options.names, *(needed(options.profile) if options.profile else ())]))
        problems = [problem for name in names for problem in fetch(name)]
    except KeyboardInterrupt:
        log.error("Stopped: run again to go on where it was.")
        return INTERRUPTED
    except (StageError, OSError, ValueError) as error:
        log.error("%s", error)
        return 1
    for problem in problems:
        log.error("%s", problem)
    if not names:
        log.info("The profile %s needs no network that the kit does not bring along.", options.profile)
    elif not problems:
        log.info("All of it is here: %s.", ", ".join(names))
    return 1 if problems else 0

"""Download pretrained networks into the weights folder: `codalib fetch --profile PROFILE`, or `... NAME ...`.

A file that is here is checked against the SHA-256 noted when it came (checksums.json, in the weights folder) or the
digits in its name; one on its way from the Hugging Face Hub against the Hub's. huggingface_hub carries the bytes of
every file; what came of one that was interrupted stays here, since huggingface_hub itself would begin anew. Without a
network each missing file gets one sentence: where it is, where to put it.
"""

import argparse
import errno
import glob
import hashlib
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub import HfFileMetadata, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from codalib.base.files import read_json, write_json
from codalib.base.files import sha256 as sha256_of
from codalib.base.paths import project_folder
from codalib.pretrained.registry import NETWORKS, Network, find_weights, has_weights, weights_folder
from codalib.workflow.profiles import StageError, profile_path, profile_section, profile_stages, texts_in

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"  # in the weights folder: {file: {"sha256", "bytes", "from"}}
LOCK = ".lock"  # in the weights folder: held by the process that writes there
TIMEOUT = 30  # seconds without an answer
REDIRECTIONS = 5  # from one server to another
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
    values = {text for name in profile_stages(profile, notebooks) for text in texts_in(profile_section(profile, name))}
    names = {name for name, network in NETWORKS.items() if values & {name, network.file}}
    names |= {name for other, name in OTHER_NAMES.items() if other in values}
    if names & set(PUBLISHED):
        names |= set(PAPERS_METRICS)
    return [name for name in NETWORKS if name in names]


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
            files = {inner: path for inner, path in files.items() if path.exists() or _parts(path)}
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
    url, repository, token = network.url, "", None
    if network.hub:
        owner, name, outer = network.hub.split("/", 2)
        endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
        repository, inside = f"{endpoint}/{owner}/{name}", "/".join(filter(None, (outer, inner)))
        url = huggingface_hub.hf_hub_url(f"{owner}/{name}", inside, endpoint=endpoint)
        token = huggingface_hub.get_token()  # HF_TOKEN, or what a login to the Hub left
    by_hand = f"get {url} by another way and put it at {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone():
            if not path.is_file():  # or another process has brought it meanwhile
                download(url, path, _digits_in_name(path), token)
    except HfHubHTTPError as error:
        code = error.response.status_code
        said = f"{code} {HTTPStatus(code).phrase}"
        if repository and code in REFUSED:
            raise FetchError(
                f"{path.name} was not fetched (the Hub says {said}): accept the licence at {repository} and set "
                f"HF_TOKEN to a token of yours, or {by_hand}."
            ) from error
        kind = NotThere if code == HTTPStatus.NOT_FOUND else FetchError
        raise kind(f"{path.name} was not fetched (the server says {said}): {by_hand}.") from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
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


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- one file ---------------------------------------------------------------------------------------------------------
def download(url: str, path: Path, sha256: str = "", token: str | None = None) -> None:
    """Download a file, going on from its part if that is here, and rename it to PATH once its SHA-256 is right.

    Args:
        url: http or https.
        path: in a folder that is there.
        sha256: all or its first digits; "" takes whatever comes. The Hub's own goes before it.
        token: sent to the URL's host, and to no other that it redirects to.
    Raises:
        FetchError: another SHA-256; what came is removed. Or the disk is full.
        HfHubHTTPError: the server refuses.
        OSError: no connection, or one that broke off; the part stays.
    """
    try:
        found, token = _look_up(url, token)
        part = _part_of(path, found)
        _receive(found, token, part)
    except (FetchError, HfHubHTTPError, OSError):
        raise
    except Exception as error:  # those of huggingface_hub's HTTP client, which is another in each of its versions
        raise ConnectionError(f"the connection broke off: {_reason(error)}; run again to go on") from error
    got = sha256_of(part)
    expected = found.etag if SHA256.fullmatch(found.etag or "") else sha256
    if not got.startswith(expected):
        part.unlink()
        raise FetchError(
            f"{path.name}: expected a SHA-256 that begins with {expected}, got {got}: what came from {url} was "
            "removed, so run again; if it happens again, the file there is another."
        )
    size = part.stat().st_size
    part.replace(path)
    _note(path, got, size, url)


def _look_up(url: str, token: str | None) -> tuple[HfFileMetadata, str | None]:
    """Where a file lies, its version and size; and the token, None where it lies with another host than the URL's."""
    for _ in range(REDIRECTIONS):
        found = huggingface_hub.get_hf_file_metadata(url, token=token or False, timeout=TIMEOUT)
        token = token if urlsplit(found.location).netloc == urlsplit(url).netloc else None
        if found.etag or found.location == url:
            return found, token
        url = found.location
    raise ConnectionError(f"{url} leads on and on")


def _part_of(path: Path, found: HfFileMetadata) -> Path:
    """Where what has come of a file lies; parts of another version are removed, all where the server tells none."""
    part = path.with_name(f"{path.name}.{hashlib.sha256((found.etag or '').encode()).hexdigest()[:8]}.part")
    for old in _parts(path):
        if old != part or not found.etag or old.stat().st_size > (found.size or math.inf):
            old.unlink()
    return part


def _parts(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{glob.escape(path.name)}.*.part"))


def _receive(found: HfFileMetadata, token: str | None, part: Path) -> None:
    """Append to PART what is missing; after a broken connection http_get itself goes on a few times."""
    done, free = part.stat().st_size if part.exists() else 0, shutil.disk_usage(part.parent).free
    if found.size is not None and found.size - done > free:
        raise FetchError(f"{part.name} needs {found.size - done:,} bytes and {part.parent} has {free:,}: free some.")
    headers, name = build_hf_headers(token=token or False), part.name.rsplit(".", 2)[0]
    with open(part, "ab") as file:
        http_get(
            found.location, file, resume_size=done, headers=headers, expected_size=found.size, displayed_filename=name
        )


# --- checksums --------------------------------------------------------------------------------------------------------
def _digits_in_name(path: Path) -> str:
    match = DIGITS_IN_NAME.search(path.name)
    return match[1] if match else ""


def _verify(path: Path) -> None:
    """Check a file that is here against what is known of it; note its SHA-256 where nothing was."""
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
                _note(path, found, path.stat().st_size, "was here")
        except OSError as error:  # a folder of others, that one may only read
            log.warning("the SHA-256 of %s is not noted (%s)", path, _reason(error))


def _note(path: Path, sha256: str, size: int, origin: str) -> None:
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

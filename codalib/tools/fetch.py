"""Download pretrained networks into the weights folder: `codalib fetch --profile PROFILE`, or `... NAME ...`.

What is here is checked against the SHA-256 that was kept when it came (checksums.json in the weights folder), against
the digits that its name carries, and, on its way from the Hugging Face Hub, against the Hub's own. A download that
broke off goes on where it was. Without a network each file that is missing gets one sentence: where it is, where to
put it.
"""

import argparse
import hashlib
import http.client
import logging
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from tqdm.auto import tqdm

from codalib.base.files import read_json, write_json
from codalib.base.paths import project_folder
from codalib.pretrained.registry import NETWORKS, Network, find_weights, has_weights, weights_folder
from codalib.workflow.profiles import StageError, profile_section

log = logging.getLogger(__name__)


CHECKSUMS = "checksums.json"  # in the weights folder: {file: {"sha256", "bytes", "from"}}
ATTEMPTS = 3  # connections a file; each goes on where the last one broke off
TIMEOUT = 30  # seconds without an answer
CHUNK = 2**20  # bytes
HUB = "https://huggingface.co"  # HF_ENDPOINT names another
HUB_SHA256 = re.compile(r'"?([0-9a-f]{64})"?$')  # the tag of a large file on the Hub; a small one's has fewer digits
INTERRUPTED = 130  # the shell's exit status after Ctrl-C
REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
DIGITS_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # torch's habit: NAME-FIRST_DIGITS_OF_THE_SHA_256.pth
PUBLISHED = ("kl16", "flux", "coda/mar_v16384", "coda/flux_v65536")
PAPERS_MEASURES = ("dino_vits16", "vgg16_lpips", "inception_fid")  # of whoever trains or measures one of these
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
    """The networks that PROFILE names anywhere, in the registry's order; the paper's VAEs and tokenizers bring the
    networks of its losses and measures with them.

    Raises StageError for an unknown profile.
    """
    notebooks = sorted(path.stem for path in (project_folder() / "notebooks").glob("*.ipynb"))
    values = {text for name in notebooks for text in _texts(profile_section(profile, name))}
    names = {name for name, network in NETWORKS.items() if values & {name, network.file}}
    names |= {name for other, name in OTHER_NAMES.items() if other in values}
    if names & set(PUBLISHED):
        names |= set(PAPERS_MEASURES)
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
        raise KeyError(f"got the network name {name!r}, expected one of {', '.join(NETWORKS)}")
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
    repository, url, headers = "", network.url, {}
    if network.hub:
        owner, name, outer = network.hub.split("/", 2)
        repository = f"{os.environ.get('HF_ENDPOINT', HUB)}/{owner}/{name}"
        url = "/".join(filter(None, (repository, "resolve/main", outer, inner)))
        token = huggingface_hub.get_token()  # HF_TOKEN, or what a login to the Hub left
        headers = {"Authorization": f"Bearer {token}"} if token else {}
    by_hand = f"get {url} by another way and put it at {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(url, path, _digits_in_name(path), headers)
    except urllib.error.HTTPError as error:
        if repository and error.code in REFUSED:
            raise FetchError(
                f"{path.name} was not fetched (the Hub says {error.code} {error.reason}): accept the licence at "
                f"{repository} and set HF_TOKEN to a token of yours, or {by_hand}."
            ) from error
        kind = NotThere if error.code == HTTPStatus.NOT_FOUND else FetchError
        raise kind(f"{path.name} was not fetched (the server says {error.code} {error.reason}): {by_hand}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{path.name} was not fetched ({_reason(error)}): {by_hand}.") from error


def _reason(error: Exception) -> str:
    error = getattr(error, "reason", None) or error  # urllib wraps what happened
    return str(error).strip() or type(error).__name__


# --- one file ---------------------------------------------------------------------------------------------------------
def download(url: str, path: Path, sha256: str = "", headers: Mapping[str, str] | None = None) -> None:
    """Download a file, going on from PATH.part if it is there, and rename it to PATH once its SHA-256 is right.

    Args:
        url: http or https.
        path: in a folder that is there.
        sha256: all or its first digits; "" takes the Hub's where the server sends one, and else whatever comes.
        headers: of the request; an `Authorization` is left behind where the server sends us to another host.
    Raises:
        FetchError: another SHA-256; what came is removed. Or the disk is full.
        OSError, http.client.HTTPException: no connection, or one that broke off; PATH.part stays.
    """
    part = _part(path)
    for attempt in range(ATTEMPTS):
        try:
            sha256 = _continue(url, part, headers or {}) or sha256
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
            f"{path.name} has the SHA-256 {found}, expected one that begins with {sha256}: what came from {url} was "
            "removed, so run again; if it happens again, the file there is another."
        )
    size = part.stat().st_size
    part.replace(path)
    _discard(part)
    _keep(path, found, size, url)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows the server's directions, leaves a token behind at another host, and notes the Hub's SHA-256."""

    sha256 = ""

    def redirect_request(self, request, file, code, message, headers, address):
        self.note(headers)
        onward = super().redirect_request(request, file, code, message, headers, address)
        if onward is not None and urlsplit(address).netloc != urlsplit(request.full_url).netloc:
            onward.remove_header("Authorization")
        return onward

    def note(self, headers: Mapping[str, str]) -> None:
        found = HUB_SHA256.match(headers.get("X-Linked-Etag") or "")
        self.sha256 = found[1] if found else self.sha256


def _continue(url: str, part: Path, headers: Mapping[str, str]) -> str:
    """Append what is missing to PART, or start over where the server cannot go on or has another file by now.

    Returns the SHA-256 that the Hub states, "" where it states none.
    """
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "codalib", **headers})
    if done:
        request.add_header("Range", f"bytes={done}-")
    redirects = _Redirects()
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not done or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":  # nothing was missing
            return redirects.sha256
        _discard(part)
        return _continue(url, part, headers)
    with response:
        redirects.note(response.headers)
        version, known = redirects.sha256 or response.headers.get("ETag") or "", _version(part)
        appending = response.status == HTTPStatus.PARTIAL_CONTENT
        if appending and (not known.exists() or known.read_text() != version):
            _discard(part)
            return _continue(url, part, headers)
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
    return redirects.sha256


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
            f"{path} has the SHA-256 {found}, expected {expected}{'' if known else '...'}: it is damaged or was "
            f"replaced, so remove it and run again (or, if it is meant, its line in {weights_folder() / CHECKSUMS})."
        )
    if known is None:
        _keep(path, found, path.stat().st_size, "was here")


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
        parser.error(f"there is no network {', '.join(unknown)}; the known ones are {', '.join(NETWORKS)}")
    if not options.names and options.profile is None:
        parser.error("name a profile (--profile PROFILE) or networks")
    try:
        names = list(dict.fromkeys([*options.names, *(needed(options.profile) if options.profile else ())]))
        problems = [problem for name in names for problem in fetch(name)]
    except KeyboardInterrupt:
        log.error("Stopped: run again to go on where it was.")
        return INTERRUPTED
    except (StageError, OSError) as error:
        log.error("%s", error)
        return 1
    for problem in problems:
        log.error("%s", problem)
    if not names:
        log.info("The profile %s needs no network that the kit does not bring along.", options.profile)
    elif not problems:
        log.info("All of it is here: %s.", ", ".join(names))
    return 1 if problems else 0

"""Build the embedded emoji data set (data/emoji/train.parquet and val.parquet) from three npm packages.

Usage: python data/build_emoji.py [--packages FOLDER]

The packages are fetched with `npm pack` at the pinned versions, unless FOLDER holds them already, and are refused
when their SHA-512 differs from the one below. Every picture is composed on white, brought to 64 x 64 pixels (Lanczos)
and stored losslessly as WebP, so the result does not depend on the machine except for the encoder's own bytes.
"""

import argparse
import base64
import hashlib
import io
import json
import logging
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

SIZE = 64  # pixels
VALIDATION_SHARE = 0.1  # of the concepts

# package, version, SHA-512 of the tarball (npm's integrity field), path of a picture inside it, licence of the pictures
STYLES = {
    "noto": (
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "package/img/google/64/{}.png",
        "Apache-2.0",
    ),
    "twemoji": (
        "emoji-datasource-twitter",
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "package/img/twitter/64/{}.png",
        "CC-BY-4.0",
    ),
    "fluent": (
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets/{}.webp",
        "MIT",
    ),
}
CATALOGUE = "package/emoji.json"  # in emoji-datasource-twitter

# Two of the five skin tones, and only where one tone is shown: with all tones and every pairing two thirds of the set
# would be people.
SKIN_TONES = {"1F3FB": "light skin tone", "1F3FF": "dark skin tone"}
ALL_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
PERSON = "1F9D1"
PERSON_VARIANTS = {"1F468", "1F469"}  # man, woman
IGNORED_IN_CONCEPT = ALL_TONES | {"2640", "2642", "27A1", "FE0F", "200D"}  # tones, gender signs, direction, joiners


def concept_of(unified: str) -> str:
    """The code points of an emoji without skin tone, gender and direction: what the split keeps together."""
    points = [PERSON if point in PERSON_VARIANTS else point for point in unified.split("-")]
    return "-".join(point for point in points if point not in IGNORED_IN_CONCEPT) or unified


def split_of(concept: str) -> str:
    """ "val" for about a tenth of the concepts, by a hash that does not depend on the order of the catalogue."""
    share = int(hashlib.sha256(concept.encode()).hexdigest()[:8], 16) / 16**8
    return "val" if share < VALIDATION_SHARE else "train"


def fetch(package: str, version: str, sha512: str, folder: Path) -> Path:
    """The package's tarball in `folder`, fetched through npm when it is not there; raises ValueError on other bytes."""
    tarball = folder / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        subprocess.run(
            ["npm", "pack", f"{package}@{version}", "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if digest != sha512:
        raise ValueError(f"{tarball} has SHA-512 {digest}, expected {sha512}: delete it and run again")
    return tarball


def read_tarball(tarball: Path, keep) -> dict[str, bytes]:
    with tarfile.open(tarball) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and keep(m.name)}


def compose(picture: bytes) -> bytes:
    """A picture of any size and mode -> 64 x 64 RGB on white, lossless WebP."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    image = white.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=75, method=4)
    return buffer.getvalue()


def entries(catalogue: list[dict]):
    """Yield (emoji, file stem, caption) for every emoji and for its single-person skin tones."""
    for emoji in sorted(catalogue, key=lambda e: e["sort_order"]):
        if emoji["category"] == "Component":  # five swatches of skin, no emoji
            continue
        caption = emoji["name"].lower().replace("flag for ", "flag of ")
        yield emoji, emoji["image"].removesuffix(".png"), caption
        for tones, variant in emoji.get("skin_variations", {}).items():
            if tones in SKIN_TONES:
                yield emoji, variant["image"].removesuffix(".png"), f"{caption}, {SKIN_TONES[tones]}"


def build(packages: Path, out: Path) -> None:
    pictures, files = {}, {}
    for style, (package, version, sha512, pattern, _) in STYLES.items():
        prefix = pattern.split("{}")[0]
        files[style] = read_tarball(
            fetch(package, version, sha512, packages), lambda name, p=prefix: name.startswith(p) or name == CATALOGUE
        )
    catalogue = json.loads(files["twemoji"][CATALOGUE])
    classes = sorted({emoji["category"] for emoji in catalogue} - {"Component"})
    rows = {"train": [], "val": []}
    for emoji, stem, caption in tqdm(list(entries(catalogue)), desc="emoji"):
        concept = concept_of(emoji["unified"])
        for style, (*_, pattern, licence) in STYLES.items():
            picture = files[style].get(pattern.format(stem))
            if picture is None:
                continue
            stored = compose(picture)
            if pictures.setdefault(stored, concept) != concept:
                continue  # the same picture under two names: keep the first, so that no picture is on both sides
            rows[split_of(concept)].append(
                {
                    "image": stored,
                    "label": classes.index(emoji["category"]),
                    "class": emoji["category"],
                    "subgroup": emoji["subcategory"],
                    "caption": caption,
                    "style": style,
                    "concept": concept,
                    "licence": licence,
                }
            )
    out.mkdir(parents=True, exist_ok=True)
    summary = {"classes": classes, "size": SIZE, "splits": {}}
    for split, items in rows.items():
        table = pa.Table.from_pylist(items)
        path, partial = out / f"{split}.parquet", out / f"{split}.parquet.part"
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
        summary["splits"][split] = {
            "images": len(items),
            "concepts": len({item["concept"] for item in items}),
            "bytes": path.stat().st_size,
            "styles": dict(sorted(Counter(item["style"] for item in items).items())),
            "per class": dict(sorted(Counter(item["class"] for item in items).items())),
        }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    logging.info("%s", json.dumps(summary, indent=1))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=Path(__file__).parent / ".packages")
    arguments = parser.parse_args()
    arguments.packages.mkdir(parents=True, exist_ok=True)
    build(arguments.packages, Path(__file__).parent / "emoji")

"""The page of a profile: what its stages measured, the paper's claims, and how each number came about.

It reads only the `manifest.json` of each stage in `runs/PROFILE/` and the files that it names (see `runs.Run.finish`).
"""

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from codalib.base.files import atomic_write, read_json, write_json
from codalib.base.paths import MANIFEST, project_folder, reports_folder, runs_folder
from codalib.experiments.paper import CLAIMS, COLUMNS, PAPER, Claim
from codalib.experiments.statistics import FAILS, HOLDS, NOT_TESTED, UNDECIDED, corrected
from codalib.reporting import pages
from codalib.reporting.figures import figure_uri
from codalib.reporting.tables import clock, html_table, markdown_table, number, read_table, readable, size

log = logging.getLogger(__name__)


VERDICTS = {  # verdict -> its CSS class, and how one and several claims are said to have come out
    HOLDS: ("holds", "holds", "hold"),
    FAILS: ("fails", "does not hold", "do not hold"),
    UNDECIDED: ("undecided", "is undecided", "are undecided"),
    NOT_TESTED: ("quiet", "is not tested", "are not tested"),
}
PAPERS = "fig", "table"  # how the notebooks of the paper's figures and tables are named
MOST_HTML = 500_000  # characters of a figure that moves: a larger one stays on its notebook's page, so that this loads
OTHER_PAGES = {"bench": "Time and memory of the quantizers."}  # in reports/, of no profile
SUMMARY = f"""
**What CODA is.** A *tokenizer* turns a picture into a short list of whole numbers, so that models made for text can
make pictures too. CODA ([{PAPER}](https://arxiv.org/abs/2503.17760)) does not train one from nothing: it takes a
continuous autoencoder that already compresses pictures well, and learns only how to round its output to a fixed set of
codes. It does so in several levels, each rounding what the levels before left over; it picks codes by attention instead
of by distance, so that all codes come into use; and it adapts the autoencoder a little to the rounding.
""".strip()


# --- the stages -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    """One notebook's run: its folder and what its manifest says; or, KEPT, what a report's folder holds of it."""

    folder: Path
    manifest: dict[str, Any]
    kept: bool = False

    @property
    def name(self) -> str:
        return self.manifest["notebook"]

    @property
    def title(self) -> str:
        """The notebook's first heading, as it was executed; its name where it was not run through papermill."""
        notebook = (project_folder() / "notebooks" if self.kept else self.folder.parent) / f"{self.name}.ipynb"
        cells = read_json(notebook)["cells"] if notebook.exists() else []
        text = "".join(cells[0]["source"]) if cells else ""
        return text.splitlines()[0].removeprefix("# ") if text.startswith("# ") else self.name

    @property
    def finished(self) -> bool:
        return self.manifest["state"] == "finished"

    def results(self, kind: str) -> list[dict[str, Any]]:
        """The results of one kind, "tables", "figures" or "claims"; none while the stage has not finished."""
        return self.manifest["results"].get(kind, []) if self.finished else []

    def file(self, kind: str, name: str) -> Path:
        """Where a result's file lies, KIND being "tables" or "figures"."""
        return self.folder / kind / f"{self.name}-{name}" if self.kept else self.folder / name

    @property
    def seconds(self) -> float:
        return self.manifest.get("seconds") or 0

    @property
    def values(self) -> dict[str, str]:
        """Every parameter and setting of the run, as Python writes its value."""
        parameters = self.manifest["parameters"]
        for own in self.manifest.get("settings", {}).values():  # a record from before there were any has none
            parameters = own | parameters
        return {name: repr(value) for name, value in parameters.items()}


def read_stages(profile: str, keep: bool = False) -> list[Stage]:
    """The stages that have run under PROFILE: the paper's figures and tables by number, then the others by name.

    The report's own run and a rehearsal are left out. With KEEP those stages of PROFILE's report join whose runs are
    not here, but whose notebooks are.
    """
    stages = [Stage(path.parent, read_json(path)) for path in runs_folder(profile).glob(f"*/{MANIFEST}")]
    if keep and (reports_folder(profile) / MANIFEST).exists():
        before = [Stage(reports_folder(profile), own, True) for own in read_json(reports_folder(profile) / MANIFEST)]
        names = {stage.name for stage in stages}
        stages += [stage for stage in before if stage.name not in names and stage.title != stage.name]
    shown = [stage for stage in stages if stage.name not in ("report", "rehearse")]
    return sorted(shown, key=lambda stage: (not stage.name.startswith(PAPERS), stage.name))


# --- the page ---------------------------------------------------------------------------------------------------------
def build(profile: str, keep: bool = False) -> Path:
    """Write the page of PROFILE, its tables (CSV, Markdown), figures (PNG, SVG) and manifests; returns the page.

    With KEEP a stage that is in the report but not among the runs here stays in it as it was, and the page links to
    nothing that git ignores, SVG and the index of profiles: the report is to be committed.
    """
    stages, folder = read_stages(profile, keep), reports_folder(profile)
    found = _claims(stages)
    results = [result for own in found.values() for _, result in own]
    drawn = [(stage, _tables(stage, folder), _figures(stage, folder)) for stage in stages]
    written = {f"{own['name']}.{kind}" for _, tables, _ in drawn for own in tables for kind in ("csv", "md")}
    written |= {name for _, _, figures in drawn for own in figures for name in own["files"].values()}
    for left in (
        path for kind in ("tables", "figures") for path in (folder / kind).glob("*") if path.name not in written
    ):
        left.unlink()  # of a stage that has gone
    body = pages.fill(
        "report.html.j2",
        profile=profile,
        folder=folder,
        summary=pages.markdown(SUMMARY),
        stages=stages,
        claims=[(CLAIMS[name], own) for name, own in found.items()],
        unchecked=[claim for claim in CLAIMS.values() if claim.id not in found],
        settings=sorted({result["setting"] for result in results}, reverse=True),
        verdicts=VERDICTS,
        counts=_counts(results),
        tests=sum(result["adjusted_p"] is not None for result in results),
        published=_published,
        results=[one for one in drawn if one[1] or one[2]],
        made_with={title: _distinct(stages, title.lower()) for title in ("Machine", "Versions")},
        clock=clock,
        size=size,
        commit=commit,
        committed=keep,
    )
    write_json(folder / MANIFEST, [stage.manifest for stage in stages])
    home = "" if keep else "../index.html"  # a report that is committed stands alone, without what git ignores
    page = pages.page(f"CODA, profile {profile}", body, home=home, home_text="All profiles")
    with atomic_write(folder / "index.html") as file:
        file.write(page)
    build_index()
    log.info("%s: %d stages, %.1f MB", folder / "index.html", len(stages), len(page) / 1e6)
    return folder / "index.html"


def build_index() -> Path:
    """Write the page that leads to every profile's: one row for each that has one, and one for each verdict."""
    rows, claims = [], []
    for page in sorted(reports_folder().glob("*/index.html")):
        name, manifests = page.parent.name, page.parent / MANIFEST
        stages = read_json(manifests) if manifests.exists() else []
        stages = [stage for stage in stages if "notebook" in stage] if isinstance(stages, list) else []
        own = corrected(
            [
                {"setting": "", "page": name, "notebook": stage["notebook"], "seed": stage["seed"]} | claim
                for stage in stages
                for claim in stage.get("results", {}).get("claims", [])
            ]
        )
        claims += [claim | {"title": CLAIMS[claim["id"]].title} for claim in own if claim["id"] in CLAIMS]
        rows.append({"name": name, "what": _description(name), "stages": stages, "counts": _counts(own)})
    claims.sort(key=lambda claim: list(CLAIMS).index(claim["id"]))  # the paper's order
    body = pages.fill("index.html.j2", pages=rows, claims=claims, summary=pages.markdown(SUMMARY), verdicts=VERDICTS)
    path = reports_folder() / "index.html"
    with atomic_write(path) as file:
        file.write(pages.page("CODA, reproduced", body))
    return path


def _counts(claims: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts = Counter(claim["verdict"] for claim in claims)
    return {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}


def _description(name: str) -> str:
    """The first sentences that a profile's file says about it: its comment up to the note on its sections."""
    path = project_folder() / "profiles" / f"{name}.yaml"
    if not path.exists():
        return OTHER_PAGES.get(name, "")
    lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()]
    return " ".join(itertools.takewhile(lambda line: line and not line.startswith("One section a notebook"), lines))


def _claims(stages: Sequence[Stage]) -> dict[str, list[tuple[Stage, dict[str, Any]]]]:
    """The checked claims in the paper's order: id -> each stage that checked it, with its corrected verdict."""
    pairs = [(stage, {"setting": ""} | result) for stage in stages for result in stage.results("claims")]
    found: dict[str, list[tuple[Stage, dict[str, Any]]]] = {}
    for stage, result in pairs:
        if result["id"] not in CLAIMS or result["verdict"] not in VERDICTS:
            raise ValueError(f"{stage.folder / MANIFEST}: expected a known claim and verdict, got {result}")
    for (stage, _), result in zip(pairs, corrected([result for _, result in pairs]), strict=True):
        found.setdefault(result["id"], []).append((stage, result))
    return {name: found[name] for name in CLAIMS if name in found}


def _published(claim: Claim) -> list[str]:
    """The published numbers behind a claim: first and last of each metric."""
    ends: dict[str, list[float]] = {}
    for comparison in claim.comparisons:
        before, after = comparison.published
        ends.setdefault(comparison.column, [before])[1:] = [after]
    return [
        f"{COLUMNS[column][0]} {' → '.join(number(value, column == 'utilization') for value in values)}"
        for column, values in ends.items()
    ]


def _tables(stage: Stage, folder: Path) -> list[dict[str, str]]:
    """The tables of a stage, also written into FOLDER/tables as CSV and Markdown."""
    found = []
    for result in stage.results("tables"):
        source, name = stage.file("tables", result["file"]), f"{stage.name}-{Path(result['file']).stem}"
        shown, caption = readable(read_table(source)), result.get("caption", "")
        with atomic_write(folder / "tables" / f"{name}.csv") as file:
            file.write(source.read_text(encoding="utf-8"))
        with atomic_write(folder / "tables" / f"{name}.md") as file:
            file.write(f"{result['title']}\n\n{markdown_table(shown)}\n\n{caption}\n")
        wide = [column for column in shown if shown[column].astype(str).str.len().max() > 40]
        html = pages.Markup(html_table(shown, prose=wide))
        found.append({"name": name, "title": result["title"], "caption": caption, "html": html})
    return found


def _figures(stage: Stage, folder: Path) -> list[dict[str, Any]]:
    """The figures of a stage, also written into FOLDER/figures: caption, alt, picture, file names by kind."""
    found = []
    for result in stage.results("figures"):
        own = {kind: stage.file("figures", result[kind]) for kind in ("png", "svg", "gif", "html") if kind in result}
        if stage.kept:  # a report's folder may have left out what is large
            own = {kind: path for kind, path in own.items() if path.exists()}
        files = {kind: f"{stage.name}-{Path(result[kind]).name}" for kind in own if kind != "html"}
        for kind, name in files.items():
            with atomic_write(folder / "figures" / name, "wb") as file:
                file.write(own[kind].read_bytes())
        if "png" not in own:
            missing = stage.file("figures", result["png"])
            raise ValueError(
                f"expected the figure {missing}, which the report holds no longer: restore it, or run {stage.name}"
            )
        with Image.open(own["png"]) as picture:
            entry = {"caption": result["caption"], "alt": result["alt"], "files": files, "source": figure_uri(picture)}
        if "html" in own:
            more = own["html"].read_text(encoding="utf-8")
            entry |= {"more": pages.Markup(more)} if len(more) <= MOST_HTML else {"moves_in": f"{stage.name}.html"}
        found.append(entry)
    return found


def _distinct(stages: Sequence[Stage], key: str) -> list[str]:
    """What the stages' manifests say under KEY, each different one once."""
    values = {tuple(sorted((stage.manifest.get(key) or {}).items(), key=str)) for stage in stages}
    return sorted(
        ", ".join(f"{name.removesuffix('_bytes')} {_plain(name, value)}" for name, value in one if value)
        for one in values
    )


def _plain(key: str, value: Any) -> str:
    return size(value) if key.endswith("_bytes") else "in hardware" if value is True else str(value)


def commit(manifest: Mapping[str, Any]) -> str:
    """The commit's first digits, with a plus where the checkout held changes that it does not hold."""
    return (
        f"{manifest['commit'][:9]}{' + changes' if manifest.get('dirty') else ''}"
        if manifest.get("commit")
        else "unknown"
    )

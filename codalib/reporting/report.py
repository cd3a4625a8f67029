"""The page of a profile: what its stages measured, the paper's claims, and how each number came about.

It reads only the `manifest.json` of each stage in `runs/PROFILE/` and the files that it names (see `runs.Run.finish`).
"""

import html
import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from codalib.base.files import atomic_write, read_json, write_json
from codalib.base.paths import MANIFEST, project_folder, reports_folder, runs_folder
from codalib.experiments.paper import CLAIMS, COLUMNS, PAPER, Claim
from codalib.experiments.statistics import FAILS, HOLDS, NOT_TESTED, UNDECIDED, corrected
from codalib.reporting import pages
from codalib.reporting.tables import clock, html_table, markdown_table, number, readable, size

log = logging.getLogger(__name__)


VERDICTS = {  # verdict -> its CSS class, and how one and several claims are said to have come out
    HOLDS: ("holds", "holds", "hold"),
    FAILS: ("fails", "does not hold", "do not hold"),
    UNDECIDED: ("undecided", "is undecided", "are undecided"),
    NOT_TESTED: ("quiet", "is not tested", "are not tested"),
}
PAPERS = "fig", "table"  # how the notebooks of the paper's figures and tables are named
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
    """One notebook's run: its folder and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.manifest["notebook"]

    @property
    def title(self) -> str:
        """The executed notebook's first heading; its name where it was not run through papermill."""
        notebook = self.folder.parent / f"{self.name}.ipynb"
        cells = read_json(notebook)["cells"] if notebook.exists() else []
        text = "".join(cells[0]["source"]) if cells else ""
        return text.splitlines()[0].removeprefix("# ") if text.startswith("# ") else self.name

    @property
    def finished(self) -> bool:
        return self.manifest["state"] == "finished"

    def results(self, kind: str) -> list[dict[str, Any]]:
        """The results of one kind, "tables", "figures" or "claims"; none while the stage has not finished."""
        return self.manifest["results"].get(kind, []) if self.finished else []


def read_stages(profile: str) -> list[Stage]:
    """The stages that have run under PROFILE: the paper's figures and tables by number, then the others by name.

    The report's own run and a rehearsal are left out.
    """
    stages = [Stage(path.parent, read_json(path)) for path in runs_folder(profile).glob(f"*/{MANIFEST}")]
    shown = [stage for stage in stages if stage.name not in ("report", "rehearse")]
    return sorted(shown, key=lambda stage: (not stage.name.startswith(PAPERS), stage.name))


# --- the page ---------------------------------------------------------------------------------------------------------
def build(profile: str) -> Path:
    """Write the page of PROFILE, its tables (CSV, Markdown), figures (PNG, SVG) and manifests; returns the page."""
    stages, folder = read_stages(profile), reports_folder(profile)
    for generated in ("tables", "figures"):
        shutil.rmtree(folder / generated, ignore_errors=True)
    body = [f"<h1>CODA, reproduced: profile {html.escape(profile)}</h1>", pages.markdown(SUMMARY)]
    if not stages:
        body.append("<p>No stage has run yet: <code>make reproduce</code> runs them all.</p>")
    body += [_glance(stages), _claims(stages, folder), _results(stages, folder), _provenance(stages, folder)]
    write_json(folder / MANIFEST, [stage.manifest for stage in stages])
    page = pages.page(f"CODA, profile {profile}", "\n".join(body), home="../index.html", home_text="All profiles")
    with atomic_write(folder / "index.html") as file:
        file.write(page)
    build_index()
    log.info("%s: %d stages, %.1f MB", folder / "index.html", len(stages), len(page) / 1e6)
    return folder / "index.html"


def build_index() -> Path:
    """Write the page that leads to every profile's: one row for each folder of reports that has a page."""
    rows = []
    for page in sorted(reports_folder().glob("*/index.html")):
        name, manifests = page.parent.name, page.parent / MANIFEST
        stages = read_json(manifests) if manifests.exists() else []
        stages = [stage for stage in stages if "notebook" in stage] if isinstance(stages, list) else []
        claims = corrected([claim for stage in stages for claim in stage.get("results", {}).get("claims", [])])
        verdicts = [claim["verdict"] for claim in claims]
        counts = [f"{verdicts.count(v)} {VERDICTS[v][1]}" for v in VERDICTS if v in verdicts]
        rows.append(
            {
                "Page": f'<a href="{html.escape(name)}/index.html">{html.escape(name)}</a>',
                "What it is": _description(name),
                "Stages": str(len(stages) or ""),
                "Verdicts": ", ".join(counts),
                "Last run (UTC)": max((stage["started"][:10] for stage in stages), default=""),
            }
        )
    table = html_table(pd.DataFrame(rows), markup=["Page"], prose=["What it is"])
    body = f"<h1>CODA, reproduced: all results</h1>{pages.markdown(SUMMARY)}{table}"
    path = reports_folder() / "index.html"
    with atomic_write(path) as file:
        file.write(pages.page("CODA, reproduced", body))
    return path


def _description(name: str) -> str:
    """The first sentences that a profile's file says about it: its comment up to the note on its sections."""
    path = project_folder() / "profiles" / f"{name}.yaml"
    if not path.exists():
        return OTHER_PAGES.get(name, "")
    lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines()]
    return " ".join(itertools.takewhile(lambda line: line and not line.startswith("One section a notebook"), lines))


def _link(stage: Stage, folder: Path, text: str = "") -> str:
    name = html.escape(text or stage.name)
    return f'<a href="{stage.name}.html">{name}</a>' if (folder / f"{stage.name}.html").exists() else name


def _glance(stages: Sequence[Stage]) -> str:
    """One sentence on the claims: how many were checked, and how the verdicts came out."""
    found = corrected([claim for stage in stages for claim in stage.results("claims")])
    if not found:
        return ""
    verdicts, claims = [claim["verdict"] for claim in found], len({claim["id"] for claim in found})
    counts = []
    for verdict, (style, *words) in VERDICTS.items():
        count = verdicts.count(verdict)
        if count:
            counts.append(f'<span class="{style}">{count} {words[count != 1]}</span>')
    said = (
        f"Of {claims} checked claims of the paper, {', '.join(counts)}."
        if claims == len(verdicts)
        else f"{claims} claims of the paper were checked, some in more than one setting: of {len(verdicts)} "
        f"verdicts, {', '.join(counts)}."
    )
    tests = sum(claim["adjusted_p"] is not None for claim in found)
    how = f" Each is a two-sided test at 5 %, after Holm's correction for {tests} tests." if tests else ""
    return f"<p><strong>What this run found.</strong> {said}{how}</p>"


def _claims(stages: Sequence[Stage], folder: Path) -> str:
    """The checked claims in the paper's order: a table of verdicts, then each; then those that no stage has checked."""
    found: dict[str, list[tuple[Stage, Mapping[str, Any]]]] = {}
    pairs = [(stage, result) for stage in stages for result in stage.results("claims")]
    for stage, result in pairs:
        if result["id"] not in CLAIMS or result["verdict"] not in VERDICTS:
            raise ValueError(f"{stage.folder / MANIFEST}: expected a known claim and verdict, got {result}")
    for (stage, _), result in zip(pairs, corrected([result for _, result in pairs]), strict=True):
        found.setdefault(result["id"], []).append((stage, result))
    if not found:
        return ""
    checked = {name: found[name] for name in CLAIMS if name in found}
    settings = sorted({result.get("setting", "") for own in checked.values() for _, result in own}, reverse=True)
    rows = []
    for name, own in checked.items():
        verdicts = {r.get("setting", ""): _verdict(r) for _, r in own}
        row = {"Claim": f'<a href="#claim-{name}">{html.escape(CLAIMS[name].title)}</a>'}
        rows.append(row | {setting.capitalize() or "As trained": verdicts.get(setting, "") for setting in settings})
    table = html_table(pd.DataFrame(rows), markup=list(rows[0]))
    items = "".join(_claim(CLAIMS[name], own, folder) for name, own in checked.items())
    parts = [f"<h2>The paper's claims</h2>{table}", f'<ul class="claims">{items}</ul>']
    if rest := [claim for claim in CLAIMS.values() if claim.id not in checked]:
        lines = "".join(f"<li>{pages.inline(claim.statement)} ({claim.source})</li>" for claim in rest)
        parts.append(f"<details><summary>Not checked in this run: {len(rest)}</summary><ul>{lines}</ul></details>")
    return "\n".join(parts)


def _verdict(result: Mapping[str, Any]) -> str:
    return f'<span class="{VERDICTS[result["verdict"]][0]}">{result["verdict"].capitalize()}</span>'


def _claim(claim: Claim, found: Sequence[tuple[Stage, Mapping[str, Any]]], folder: Path) -> str:
    """One claim: what the paper says, then each verdict with what was measured, and what the run cannot show."""
    lines = []
    for _, result in found:
        setting = f" ({html.escape(result['setting'])})" if result.get("setting") else ""
        effect, detail = (html.escape(str(result.get(key, ""))) for key in ("effect", "detail"))
        lines.append(f'<p>{_verdict(result)}{setting}. Measured: {effect}. <span class="quiet">{detail}</span></p>')
    styles = {VERDICTS[result["verdict"]][0] for _, result in found}
    mark = f' class="{styles.pop()}-mark"' if len(styles) == 1 else ""
    links = ", ".join(dict.fromkeys(_link(stage, folder) for stage, _ in found))
    return (
        f'<li{mark} id="claim-{claim.id}"><p><strong>{html.escape(claim.title)}.</strong> '
        f"{pages.inline(claim.statement)}</p>{''.join(lines)}"
        f'<p class="quiet">Paper: {claim.source}; {_published(claim)}notebook {links}. '
        f"What this cannot show: {pages.inline(claim.caution)}</p></li>"
    )


def _published(claim: Claim) -> str:
    """The published numbers behind a claim: first and last of each metric."""
    ends: dict[str, list[float]] = {}
    for comparison in claim.comparisons:
        before, after = comparison.published
        ends.setdefault(comparison.column, [before])[1:] = [after]
    texts = [
        f"{COLUMNS[column][0]} {number(before, column == 'utilization')} → {number(after, column == 'utilization')}"
        for column, (before, after) in ends.items()
    ]
    return f"{', '.join(texts)}; " if texts else ""


def _results(stages: Sequence[Stage], folder: Path) -> str:
    """Tables and figures, stage by stage."""
    parts = []
    for stage in stages:
        tables, figures = stage.results("tables"), stage.results("figures")
        if not tables and not figures:
            continue
        parts.append(f"<h2>{html.escape(stage.title)}</h2>")
        parts.append(f'<p class="quiet">Notebook {_link(stage, folder)}.</p>')
        parts += [_table(stage, result, folder) for result in tables]
        parts += [_figure(stage, result, folder) for result in figures]
    return "\n".join(parts)


def _table(stage: Stage, result: Mapping[str, Any], folder: Path) -> str:
    source = stage.folder / result["file"]
    frame = pd.read_csv(source)
    name = f"{stage.name}-{Path(result['file']).stem}"
    shown = readable(frame)
    with atomic_write(folder / "tables" / f"{name}.csv") as file:
        file.write(source.read_text(encoding="utf-8"))
    with atomic_write(folder / "tables" / f"{name}.md") as file:
        file.write(f"{result['title']}\n\n{markdown_table(shown)}\n\n{result.get('caption', '')}\n")
    wide = [column for column in shown if shown[column].astype(str).str.len().max() > 40]
    links = f'<a href="tables/{name}.csv">CSV</a>, <a href="tables/{name}.md">Markdown</a>'
    caption = html.escape(result.get("caption", ""))
    return (
        f"<h3>{html.escape(result['title'])}</h3>{html_table(shown, prose=wide)}"
        f'<p class="quiet">{caption} ({links})</p>'
    )


def _figure(stage: Stage, result: Mapping[str, Any], folder: Path) -> str:
    links = []
    for kind in ("png", "svg", "gif"):
        if kind in result:
            name = f"{stage.name}-{Path(result[kind]).name}"
            with atomic_write(folder / "figures" / name, "wb") as file:
                file.write((stage.folder / result[kind]).read_bytes())
            links.append(f'<a href="figures/{html.escape(name)}">{kind.upper()}</a>')
    return pages.figure(stage.folder / result["png"], result["caption"], result["alt"], f" ({', '.join(links)})")


def _provenance(stages: Sequence[Stage], folder: Path) -> str:
    """How the numbers came about: one row a stage, then versions, machine and every parameter."""
    if not stages:
        return ""
    rows = [
        {
            "Stage": _link(stage, folder),
            "State": stage.manifest["state"],
            "Time": clock(stage.manifest.get("seconds")),
            "Peak memory": size(stage.manifest.get("peak_memory_bytes")),
            "Peak GPU memory": size(stage.manifest.get("peak_gpu_memory_bytes")),
            "Seed": str(stage.manifest["seed"]),
            "Commit": commit(stage.manifest),
            "Started (UTC)": stage.manifest["started"][:16].replace("T", " "),
        }
        for stage in stages
    ]
    frame = pd.DataFrame(rows)
    if not frame["Peak GPU memory"].any():
        frame = frame.drop(columns="Peak GPU memory")
    total = clock(sum(stage.manifest.get("seconds") or 0 for stage in stages))
    parts = [
        "<h2>How these numbers came about</h2>",
        html_table(frame, markup=["Stage"]),
        f"<p>All stages together: {total}.</p>",
    ]
    for title, key in (("Machine", "machine"), ("Versions", "versions")):
        values = {tuple(sorted((stage.manifest.get(key) or {}).items(), key=str)) for stage in stages}
        texts = [", ".join(f"{k.removesuffix('_bytes')} {_plain(k, v)}" for k, v in value if v) for value in values]
        parts.append(f"<p><strong>{title}.</strong> {html.escape('; or '.join(sorted(texts)))}.</p>")
    for stage in stages:
        values = stage.manifest["parameters"]
        for own in stage.manifest.get("settings", {}).values():  # a record from before there were any has none
            values = values | {name: value for name, value in own.items() if name not in values}
        lines = pd.DataFrame([{"Parameter": k, "Value": repr(v)} for k, v in values.items()])
        inside = html_table(lines, prose=["Value"]) if len(lines) else "<p>None.</p>"
        parts.append(f"<details><summary>Parameters of {html.escape(stage.name)}</summary>{inside}</details>")
    return "\n".join(parts)


def _plain(key: str, value: Any) -> str:
    return size(value) if key.endswith("_bytes") else "in hardware" if value is True else str(value)


def commit(manifest: Mapping[str, Any]) -> str:
    """The commit's first digits, with a plus where the checkout held changes that it does not hold."""
    return (
        f"{manifest['commit'][:9]}{' + changes' if manifest.get('dirty') else ''}"
        if manifest.get("commit")
        else "unknown"
    )

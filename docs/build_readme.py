"""Write what README.md and docs/results.md say from the committed report: `python docs/build_readme.py`.

The report's own verdicts, what does not hold first, and Table 1; `make readme` after a new report, tests/test_readme.py
holds it.
"""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codalib.base.files import atomic_write, read_json
from codalib.experiments.paper import CLAIMS
from codalib.experiments.statistics import FAILS, HOLDS, NOT_TESTED, UNDECIDED, corrected
from codalib.reporting.report import VERDICTS

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
REPORT = ROOT / "reports" / "emoji-long" / "manifest.json"
TABLE_1 = REPORT.parent / "tables" / "table1_ablation-table1.csv"
COLUMNS = {  # of Table 1 -> heading and decimals
    "quantization_error": ("quantization error", 4),
    "fd_effnet@128": ("fd_effnet@128", 1),
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "utilization": ("codes used", 3),
}
ORDER = (FAILS, HOLDS, UNDECIDED, NOT_TESTED)
HEAD = "| claim | verdicts, and in how many settings | measured, for the first |\n|---|---|---|"
OUTCOMES = {  # of a claim over all its settings, in this order -> whether it is that, from the verdicts
    "Does not hold": lambda found: FAILS in found and HOLDS not in found,
    "Holds in one setting and not in another": lambda found: {FAILS, HOLDS} <= found,
    "Undecided": lambda found: UNDECIDED in found and FAILS not in found,
    "Not tested": lambda found: found == {NOT_TESTED},
    "Holds": lambda found: found - {NOT_TESTED} == {HOLDS},
}


def blocks(stages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name -> text of the marked blocks of README.md, from the manifests of a report's stages."""
    claims = [{"setting": ""} | own for stage in stages for own in stage.get("results", {}).get("claims", [])]
    if any("p" in claim for claim in claims):  # a record without them was judged by an older rule, and stands as it is
        claims = corrected(claims)
    by_id = {name: [claim for claim in claims if claim["id"] == name] for name in CLAIMS}
    outcomes = {
        outcome: [name for name, own in by_id.items() if own and is_it({claim["verdict"] for claim in own})]
        for outcome, is_it in OUTCOMES.items()
    }
    outcomes["Not checked"] = [name for name, own in by_id.items() if not own]
    shown = {outcome: [CLAIMS[name].title for name in names] for outcome, names in outcomes.items() if names}
    lines = [
        f"- **{outcome}** ({len(titles)} of {len(CLAIMS)}): {'; '.join(titles)}." for outcome, titles in shown.items()
    ]
    ordered = [name for names in outcomes.values() for name in names if by_id[name]]
    return {
        "outcomes": "\n".join(lines),
        "claims": "\n".join([HEAD, *(_line(CLAIMS[name].title, by_id[name]) for name in ordered)]),
    }


def _line(title: str, claims: Sequence[Mapping[str, Any]]) -> str:
    """One claim in a row: its verdicts, in how many settings each, and what stands behind the first of them."""
    counts = Counter(claim["verdict"] for claim in claims)
    verdicts = [f"{VERDICTS[verdict][1]} ({counts[verdict]})" for verdict in ORDER if counts[verdict]]
    first = min(claims, key=lambda claim: ORDER.index(claim["verdict"]))
    measured = f"{first['setting']}: {first['effect']}" if first["setting"] else first["effect"]
    return f"| {title} | {', '.join(verdicts)} | {measured.replace('->', '→')} |"


def table_1(rows: Sequence[Mapping[str, str]]) -> str:
    """Table 1 in Markdown: mean ± standard deviation over the seeds, the paper's number in brackets."""

    def cell(row: Mapping[str, str], name: str, decimals: int) -> str:
        own, spread, paper = (row.get(key) for key in (name, f"{name}_std", f"paper_{name}"))
        text = f"{float(own):.{decimals}f}" if own else ""
        text += f" ± {float(spread):.{decimals}f}" if own and spread else ""
        return text + (f" ({float(paper):g})" if paper else "")

    heads = ["", *(heading for heading, _ in COLUMNS.values())]
    lines = [heads, ["---"] * len(heads)]
    lines += [[row["method"], *(cell(row, name, digits) for name, (_, digits) in COLUMNS.items())] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(readme: str, results: str) -> tuple[str, str]:
    """Both texts as the committed report has them."""
    with TABLE_1.open(encoding="utf-8", newline="") as file:
        table = table_1(list(csv.DictReader(file)))
    return fill(readme, blocks(read_json(REPORT))), fill(results, {"table 1": table})


def fill(text: str, found: Mapping[str, str]) -> str:
    """TEXT with the blocks between its marks replaced; ValueError where a mark is missing."""
    for name, block in found.items():
        begin, end = f"<!-- {name}: make readme -->", "<!-- end -->"
        text, count = re.subn(f"(?s){begin}.*?{end}", lambda _, whole=f"{begin}\n{block}\n{end}": whole, text)
        if count != 1:
            raise ValueError(f"expected one block {begin} ... {end}, got {count}")
    return text


if __name__ == "__main__":
    pages = README, RESULTS
    for page, text in zip(pages, written(*(page.read_text(encoding="utf-8") for page in pages)), strict=True):
        with atomic_write(page) as file:
            file.write(text)

"""Write what README.md says of the paper's claims from the committed report: `python docs/build_readme.py`.

The report's own verdicts, what does not hold first; `make readme` after a new report, tests/test_readme.py holds it.
"""

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
REPORT = ROOT / "reports" / "emoji-long" / "manifest.json"
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


def fill(text: str, found: Mapping[str, str]) -> str:
    """TEXT with the blocks between its marks replaced; ValueError where a mark is missing."""
    for name, block in found.items():
        begin, end = f"<!-- {name}: make readme -->", "<!-- end -->"
        text, count = re.subn(f"(?s){begin}.*?{end}", lambda _, whole=f"{begin}\n{block}\n{end}": whole, text)
        if count != 1:
            raise ValueError(f"expected one block {begin} ... {end}, got {count}")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = fill(readme.read_text(encoding="utf-8"), blocks(read_json(REPORT)))
    with atomic_write(readme) as file:
        file.write(text)

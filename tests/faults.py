"""The faults and threats that the pipeline survives, each with the tests that prove it, collected from their marks.

`make faults` prints the table; with --write it becomes docs/faults.md.
"""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
TABLE = TESTS.parent / "docs/faults.md"
MISSING = "**missing**"

FAULTS: Mapping[int, tuple[str, str]] = {
    1: ("subject folder empty, or fewer photos than the minimum", "stop in validate with both numbers, nothing made"),
    2: (".DS_Store, Thumbs.db, .ipynb_checkpoints, captions.txt", "ignored and listed"),
    3: ("truncated JPEG", "refused by a full decode, named"),
    4: ("20,000 x 20,000 PNG of 50 kB", "refused by the cap on pixels before decoding"),
    5: ("zero bytes; a.jpg that is EPS, PSD, SVG, HTML", "refused: JPEG, PNG, WEBP only, by content"),
    6: ("EXIF orientation 2-8", "upright pixels, no tag"),
    7: ("CMYK, 16 bits, palette and alpha, animated", "converted by a stated rule, or refused"),
    8: ("exact, re-saved and mirrored duplicates; all photos alike", "duplicates dropped; a warning of diversity"),
    9: ("too small, extreme aspect, blurred, nearly black", "warning or refusal by thresholds in params.yaml"),
    10: ("names with any character, leading -, 255 bytes", "generated ids; the original only in the manifest"),
    11: ("subject id ../../etc, absolute, a link out of the tree, empty", "refused"),
    12: ("identifier is the class noun, common, many pieces; empty class", "error or warning with the pieces"),
    13: ("text for a number, NaN, negative, unknown key", "all faults at once, full path, nearest key, before work"),
    14: ("params.yaml and dvc.yaml disagree", "every key that is read is declared, every declared one exists"),
    15: ("SIGKILL while a checkpoint is written, at each file", "resumes from the one before; the torn one put aside"),
    16: ("checkpoint flipped, truncated, a file missing", "named by its hash; falls back; an explicit one raises"),
    17: ("SIGTERM in a step", "checkpoint at its end, exit 75; the next run continues"),
    18: ("N + M steps against N, kill, resume M", "the same bits on a CPU"),
    19: ("disk full: checkpoint, prior, report, database", "old state whole; both numbers named; no partial file"),
    20: ("estimated space above the free space", "refused before the start"),
    21: ("out of memory", "one retry in halves, else advice; state kept"),
    22: ("loss NaN or Inf, black samples", "stop, last finite checkpoint kept, gate fails"),
    23: ("two processes train the same subject", "the second says which process and host runs"),
    24: ("dvc repro killed, trainer orphaned", "the orphan ends with its parent"),
    25: ("two dvc repro in one checkout", "the lock's message reaches the user; nothing corrupted"),
    26: ("prior stopped, shared, changed, topped up, damaged", "continues, waits, has a new key, or is made again"),
    27: ("base missing, gated, of the wrong type, offline, truncated", "which file, and how to get it"),
    28: (
        "hub, MLflow or remote down, slow, 401",
        "bounded retries; the model stays; publishing alone; 401 not retried",
    ),
    29: ("upload to MLflow cut in the middle", "no version registered; the next registers once"),
    30: ("registered twice, flow retried", "one version"),
    31: ("the champion's artifacts are gone", "doctor says so; promote and rollback refuse"),
    32: ("gate: metric missing, NaN, other evaluator", "fails closed, or scores the champion again"),
    33: ("promotion interrupted; two promotions race", "recovered from the log; compare and set"),
    34: ("rollback with no version before", "clear refusal"),
    35: ("worker down for three days, 72 late runs", "one run"),
    36: ("clock jumps, DST, skewed hosts", "monotonic durations; keys hold no time; schedules carry a zone"),
    37: ("schedule fires, nothing changed", "skipped in seconds"),
    38: ("20 subjects, 3 bad", "17 succeed; 3 listed with codes; exit != 0; the next touches the 3"),
    39: ("Prefect says Crashed though it finished", "the next run is a success without work"),
    40: ("library or device changed between save and resume", "warning with versions"),
    41: ("old manifest or params version", "migrated, or refused with the command to run"),
    42: ("read-only data, no HOME, path with spaces, umask 077", "works, or a clear message"),
    43: ("report with missing images or metrics", "still built, gaps marked"),
    44: ("forget interrupted; a shared prior", "resumable; shared priors untouched; receipt lists every place"),
}
THREATS: Mapping[int, tuple[str, str]] = {
    1: ("decompression bombs", "caps on bytes, pixels, frames, count, total; Pillow's warning is an error"),
    2: ("parser bugs of rare formats", "one open_photo with an allow list; a test forbids a bare Image.open"),
    3: ("polyglot files", "always re-encoded from pixels; originals are never served"),
    4: ("EXIF GPS, XMP, comments", "prepared pictures carry no metadata; validate warns of GPS"),
    5: ("escape sequences and line breaks in names of files", "printed as one line of letters"),
    6: ("path traversal in ids, archives, manifests", "pattern of ids; resolved and inside"),
    7: ("links in a photo folder", "regular files only"),
    8: ("shell and argument injection", "DVC's commands hold ids only; lists, never shell=True; no leading -"),
    9: ("pipes, devices, endless links for photos, captions, params.yaml", "passed over or refused"),
    10: ("YAML tags, alias bombs, duplicate keys", "safe loader, error on duplicates, strict model"),
    11: (
        "pickle: .ckpt, .bin, .pt, results, pyfunc",
        "safetensors, JSON; checkpoints after a hash; else weights_only",
    ),
    12: ("pointers and manifests of strangers: names that lead elsewhere", "names inside, hashes, or refused"),
    13: ("remote code: trust_remote_code, custom_pipeline, *.py", "never passed; refused"),
    14: ("hub ids: typosquat, moving revision", "pinned to a commit and recorded; local path"),
    15: ("MLflow server", "default is a local database; documentation for a server"),
    16: ("Prefect server", "127.0.0.1; password documented; doctor warns of an open bind"),
    17: ("secrets in parameters, logs, artifacts", "environment only; log filter; a canary searched for everywhere"),
    18: ("markup in prompts or names (report, card, CSV formulas)", "escaped, CSP, a <script> subject in the tests"),
    19: ("dependencies", "bounds and tested constraints; a job that installs without them"),
    20: ("pull requests that run in CI, actions that move", "read-only token, no secrets, pinned commits"),
    21: ("a person without consent", "a record is required; gate item; shown in the card"),
    22: ("output repeats a training photo", "copy rate in evaluation and gate"),
    23: ("erasure", "forget: inventory, every place, receipt; a canary searched for"),
    24: ("absurd parameters (10^9 steps)", "bounds; the plan with its hours before the first stage"),
    25: ("world-readable outputs", "0700 folders for work and caches"),
}
KINDS = {"fault": FAULTS, "threat": THREATS}
Proofs = dict[tuple[str, int], list[str]]


def collect() -> Proofs:
    """Return the tests that say they prove a row, by (kind, number); the files are read, not imported.

    Raises:
        SystemExit: a mark with a number of no row, or at no test.
    """
    proofs: Proofs = {}
    faults: list[str] = []
    for path in sorted(TESTS.rglob("test_*.py")):
        tree, place = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(TESTS.parent).as_posix()
        at_tests = set()
        for test in tree.body:
            if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
                continue
            for mark in (mark for decorator in test.decorator_list for mark in _marks(decorator)):
                at_tests.add(mark)
                kind, numbers = mark.func.attr, [ast.literal_eval(number) for number in mark.args]
                faults += [f"{place}::{test.name}: there is no {kind} {n}" for n in numbers if n not in KINDS[kind]]
                for number in numbers:
                    proofs.setdefault((kind, number), []).append(f"{place}::{test.name}")
        faults += [f"{place}:{mark.lineno}: a mark of no test" for mark in _marks(tree) if mark not in at_tests]
    if faults:
        raise SystemExit("\n".join(faults))
    return {row: list(dict.fromkeys(tests)) for row, tests in proofs.items()}


def _marks(tree: ast.AST) -> list[Any]:
    """Return the calls of `pytest.mark.fault` and `pytest.mark.threat`, also those of the cases of a test."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [call for call in calls if call.func.attr in KINDS and ast.unparse(call.func.value) == "pytest.mark"]


def render(proofs: Proofs) -> str:
    """Write the table, and how many rows no test proves yet."""
    open_rows = [f"{kind} {number}" for kind, rows in KINDS.items() for number in rows if (kind, number) not in proofs]
    lines = [
        "# Faults and threats, and the tests that prove each",
        "",
        "Written by `make faults` from the marks of the tests (`@pytest.mark.fault(3)`); the cases stand in "
        "tests/faults.py. Threats 5, 9, 12 and 20 were added to the numbers that the first list left free.",
        f"{len(open_rows)} of {len(FAULTS) + len(THREATS)} rows have no test: {', '.join(open_rows) or 'none'}.",
    ]
    for kind, rows in KINDS.items():
        lines += ["", f"## {kind.capitalize()}s", "", "| # | case | what happens | tests |", "|---|---|---|---|"]
        for number, (case, expected) in rows.items():
            tests = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in sorted(proofs.get((kind, number), [])))
            lines.append(f"| {number} | {case} | {expected} | {tests or MISSING} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table; with --write, into docs/faults.md."""
    text = render(collect())
    sys.stdout.write(text)
    if "--write" in sys.argv:
        TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

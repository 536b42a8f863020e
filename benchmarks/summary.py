"""Write benchmarks/results/summary.json, one number to a key, from the results beside it.

python benchmarks/summary.py           # rewrite
python benchmarks/summary.py --check   # fail if it is out of date

Keys are such as "kernel.bf16.75600.0.25.vs_cudnn", "step.wan2.1-14b.720p81.radial.vs_eager" and
"pipeline.tiny-wan.radial.vs_dense". Each row also has its date, commit, GPU and file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dit_accel.bench.summary import summarise
from dit_accel.files import write_text

RESULTS = Path(__file__).parent / "results"
SUMMARY = RESULTS / "summary.json"


def summary_text() -> str:
    """Return what the file should hold."""
    files = sorted(path for path in RESULTS.glob("*.json") if path != SUMMARY)
    results = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in files}
    return json.dumps(summarise(results), indent=1) + "\n"


def main() -> None:
    """Write the summary, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = summary_text()
    if not parser.parse_args().check:
        write_text(SUMMARY, text)
    elif not SUMMARY.exists() or SUMMARY.read_text(encoding="utf-8") != text:
        sys.exit(f"{SUMMARY.name} is out of date: run python benchmarks/summary.py")


if __name__ == "__main__":
    main()

"""The five attention methods on every bundled model, for the README's quality table.

    python benchmarks/standard.py --commit COMMIT

`dit-accel eval` with suite standard, blocks of 32 tokens (the models have some thousand), the first
quarter of the steps dense. Runs go on where they stopped; several GPUs: put
`accelerate launch --multi_gpu` in place of `python`. Each model's results.json is copied to
benchmarks/results/eval-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from accelerate import PartialState

from dit_accel.cli import main as dit_accel
from dit_accel.models import list_models

RESULTS = Path(__file__).parent / "results"
METHODS = "radial,gna,psa,rectified,pisa"
SETTINGS = ("dense_steps=0.25", "dense_layers=0", "min_tokens=0")
BLOCK = "32"


def evaluate(model: str, run: Path, args: argparse.Namespace) -> int:
    """Make or finish one model's run; return the exit code."""
    command = ["eval", "--model", model, "--methods", METHODS, "--suite", args.suite]
    command += ["--density", args.density, "--block-size", BLOCK, "--batch", str(args.batch)]
    command += [part for setting in SETTINGS for part in ("--set", setting)]
    command += ["--device", args.device, "--output", str(run)]
    if args.commit:
        command += ["--commit", args.commit]
    for name in ("prompts", "steps"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    try:
        dit_accel(command)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list_models())
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--density", default="0.5", help="a,b,...")
    parser.add_argument("--batch", type=int, default=11, help="prompts at once")
    parser.add_argument("--prompts", type=int, help="only the first so many, for a trial")
    parser.add_argument("--steps", type=int, help="the model's own by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit")
    parser.add_argument("--runs", type=Path, default=Path("runs/standard"), help="for the clips")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of eval-MODEL.json")
    args = parser.parse_args()
    codes, summaries = {}, {}
    for model in args.models:
        run = args.runs / Path(model).name
        codes[model] = evaluate(model, run, args)
        found = run / "results.json"
        if PartialState().is_main_process and codes[model] < 2 and found.is_file():
            args.output.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, args.output / f"eval-{Path(model).name}.json")
            results = json.loads(found.read_text())
            summaries[model] = {n: results[n] for n in ("summary", "problems")}
    if PartialState().is_main_process:
        print(json.dumps(summaries))
    sys.exit(max(codes.values()))


if __name__ == "__main__":
    main()

"""Two launched processes do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dit_accel.headhunt.processes import Processes

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from dit_accel.headhunt.processes import Processes
processes = Processes()
mine = [[item, processes.index] for item in processes.share("abcde")]
seen = processes.gather(mine)
processes.wait()
print(json.dumps(seen) if processes.is_main else "", end="")
"""


def test_one_process_needs_no_launching():
    alone = Processes()
    assert (alone.count, alone.is_main, alone.device("cpu")) == (1, True, "cpu")
    assert alone.share(["a", "b"]) == alone.gather(["a", "b"]) == ["a", "b"]


def test_launched_processes_share_items_and_know_all_results(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         script],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == '[["a", 0], ["b", 0], ["c", 0], ["d", 1], ["e", 1]]'

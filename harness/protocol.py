"""A protocol: commands run one after the other, each once, going on where they were stopped.

The scripts under evidence/ list the commands and read the figures off the folders.
"""

import csv
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from utils import UserError

ROOT = Path(__file__).parents[1]


def run(kind, name, root, script, *flags):
    """The folder of the finished run ROOT/KIND-NAME-DATE of a script; begun or gone on with.

    kind: "search" or "eval", as the script names its folders. A run is finished when it has its
    weights. Stopped by a signal, it leaves with the script's exit code; call again to go on.
    """
    begun = sorted(Path(root).glob(f"{kind}-{name}-*"))
    begun = [folder for folder in begun if (folder / "args.json").exists()]
    if begun and (begun[-1] / "weights.pt").exists():
        return begun[-1]
    if begun and (begun[-1] / "checkpoint.pt").exists():
        flags = ["--resume", begun[-1]]
    else:
        flags = [*flags, "--save", Path(root) / name]
    command = [sys.executable, ROOT / script, *flags]
    print(">", shlex.join(map(str, [script, *flags])), flush=True)
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the script has had it, too, and saves
        code = process.wait() or 130
    signal.signal(signal.SIGTERM, before)
    if code:
        if code == 2:  # the script has said what is wrong
            raise UserError(f"{script} of {name} stopped; the line above says why")
        sys.exit(code if code > 0 else 128 - code)
    return sorted(Path(root).glob(f"{kind}-{name}-*"))[-1]


def rows(folder):
    """The rows of a run's metrics.csv, [{column: text}]."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def mean(figures, digits=2):
    """ "MEAN ± STD (N runs)"; of one run, the figure and no deviation."""
    text = f"{statistics.mean(figures):.{digits}f}"
    if len(figures) > 1:
        text += f" ± {statistics.stdev(figures):.{digits}f}"
    return f"{text} ({len(figures)} run{'s' * (len(figures) > 1)})"


def table(header, lines):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

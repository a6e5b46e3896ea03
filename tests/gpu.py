"""What `make gpu` does: all tests of a GPU, a short search and the benchmark, in one report.

    python tests/gpu.py [gpu-report.md]

The report is written anew after each of the three parts; Ctrl-C and SIGTERM end it with what there
is. Exit code 0 where all went well, 1 where something failed, 2 where there is no CUDA GPU, 130
where it was told to end.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
HOURS = 2  # that one part may take at most
signals = []  # that told this process to end
SETTINGS = "--set digits --epochs 2 --begin 1 --batch_size 64 --validate --save gpu"


def commands(folder):
    """{part: command line}; the files that they make lie in `folder`."""
    python = [sys.executable, "-u"]
    return {
        "tests": [*python, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={folder / 'tests.xml'}"],
        "search": [*python, ROOT / "train_search.py", *SETTINGS.split()],
        "benchmark": [*python, ROOT / "benchmark.py", "all", "--json", folder / "benchmark.json"],
    }


def machine():
    """What the figures depend on, by name."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    smi = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], ROOT)
    git = _run(["git", "describe", "--always", "--dirty", "--abbrev=12"], ROOT)
    return {
        "GPU": "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus),
        "compute capability": "; ".join(f"{gpu.major}.{gpu.minor}" for gpu in gpus),
        "driver": smi.stdout.split("\n")[0] if smi.returncode == 0 else "unknown",
        "CUDA of PyTorch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": git.stdout.strip() if git.returncode == 0 else "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _run(command, cwd, log=None):
    """The finished command; with `log` its output goes to this file and to the terminal."""
    try:
        if log is None:
            return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )  # fmt: skip
            # Of all its processes: one that waits for ever writes no line.
            end = threading.Timer(3600 * HOURS, os.killpg, (process.pid, signal.SIGKILL))
            end.start()
            try:
                for _ in range(2):
                    try:
                        for line in process.stdout:
                            print(line, end="", flush=True)
                            file.write(line)
                        break
                    except KeyboardInterrupt:  # which a session of its own does not get
                        signals.append(signal.SIGINT)
                        os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
            finally:
                end.cancel()
            if process.wait() == -signal.SIGKILL:
                file.write(f"killed, after {HOURS} hours perhaps\n")
        return subprocess.CompletedProcess(command, process.wait(), Path(log).read_text(), "")
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, str(error), str(error))


def cell(text):
    """Text as it may stand in a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")[:300]


def tests_of(path):
    """[(name, outcome, seconds, figures or reason)] of a junit file."""
    rows = []
    for case in ET.parse(path).getroot().iter("testcase"):
        outcome, detail = "passed", []
        for tag, word in (("failure", "failed"), ("error", "failed"), ("skipped", "not run")):
            for element in case.findall(tag):
                outcome = word
                detail.append(element.get("message") or "")
        detail += [f"{p.get('name')} {p.get('value')}" for p in case.iter("property")]
        rows.append((case.get("name"), outcome, float(case.get("time", 0)), "; ".join(detail)))
    return rows


def table(names, rows):
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def search_of(output):
    """The lines of a search that tell of its form, its graphs, its speed and its end."""
    words = ("device ", "form ", "supernet", "graph", "epoch ", "genotype", "rror", "Warning")
    return [line for line in output.splitlines() if any(word in line for word in words)][-60:]


def section(name, command, folder):
    """(the text of one part, which it runs, what failed in it)"""
    start, failures = time.monotonic(), []
    # pytest reads its settings at the root; the other parts leave files where they are run
    done = _run(command, ROOT if name == "tests" else folder, folder / f"{name}.log")
    took = f"{time.monotonic() - start:.0f} s"
    shown = " ".join(map(str, command)).replace(f"{folder}/", "").replace(f"{ROOT}/", "")
    text = [f"## {name.capitalize()}", f"`{shown}`, {took}, exit code {done.returncode}"]
    output = done.stdout.rstrip()
    if done.returncode:
        failures.append(f"{name}: exit code {done.returncode}")
    if name == "tests" and (folder / "tests.xml").exists():
        rows = tests_of(folder / "tests.xml")
        failures += [f"{row[0]}: {cell(row[3])}" for row in rows if row[1] == "failed"]
        words = "passed", "failed", "not run"
        counts = [sum(row[1] == word for row in rows) for word in words]
        text.append("{} passed, {} failed, {} not run".format(*counts))
        rows = [(n, outcome, f"{seconds:.1f}", d) for n, outcome, seconds, d in rows]
        text.append(table(["test", "outcome", "s", "figures"], rows))
    elif name == "benchmark":
        text.append(output)  # Markdown, with headings of the same rank
    elif name == "search":
        text.append("```\n" + "\n".join(search_of(output)) + "\n```")
    if done.returncode:
        last = "\n".join(output.splitlines()[-60:])
        text.append(f"The end of its output:\n\n```\n{last}\n```")
    return "\n\n".join(text), failures


def report(about, sections, failures):
    """The text of the file. sections: {name of each part: its text, or None}."""
    about = "\n".join(f"- {name}: {value}" for name, value in about.items())
    failures = failures + [f"{name}: not run" for name in sections if not sections[name]]
    failed = "\n".join(f"- {line}" for line in failures) or "Nothing failed."
    done = filter(None, sections.values())
    return "\n\n".join(["# Report of a GPU", about, "## Failures", failed, *done]) + "\n"


def main(arguments):
    target = Path(arguments[0] if arguments else "gpu-report.md").resolve()
    if not torch.cuda.is_available():
        print("make gpu: there is no CUDA GPU here, so nothing was run", file=sys.stderr)
        return 2
    signals.clear()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of a scheduler: as Ctrl-C
    failures, about = [], machine()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        planned = commands(folder)
        sections = dict.fromkeys(planned)
        for name, command in planned.items():
            target.write_text(report(about, sections, failures))  # should it be killed in this part
            sections[name], failed = section(name, command, folder)
            failures += failed
            if signals:
                failures.append(f"{name}: told to end")
                break
    target.write_text(report(about, sections, failures))
    print(f"{len(failures)} failures; all figures are in {target}")
    return 130 if signals else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A protocol: commands run one after the other, each once, going on where they were stopped.

The scripts under evidence/ list the commands and read the figures off the folders.
"""

import csv
import glob
import io
import itertools
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from harness import files, imagefiles, report
from harness.flags import FREE as FREE_NAMES
from utils import UserError

ROOT = Path(__file__).parents[1]
FREE = tuple(f"--{name}" for name in FREE_NAMES)


def run(kind, name, root, script, *flags):
    """The folder of the finished run ROOT/KIND-NAME-DATE of a script; begun or gone on with.

    kind: "search" or "eval", as the script names its folders. A run is finished when it has its
    weights. Stopped by a signal, it leaves with the script's exit code; call again to go on.
    Raises UserError where the script says that it cannot, and where the run was begun with other
    flags: those that a run may be given anew, such as --data and --device, do not count.
    """
    folder = begun(kind, name, root)
    if folder is not None:
        _check_begun(folder, script, flags)
        if (folder / "weights.pt").exists():
            return folder
        anew = ((flag, *words) for flag, words in _by_flag(flags).items() if flag in FREE)
        flags = ["--resume", folder, *itertools.chain(*anew)]
    else:
        flags = [*flags, "--save", Path(root) / name]
    command = [sys.executable, ROOT / script, *flags]
    print(">", shlex.join(map(str, [script, *flags])), flush=True)
    process, told = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL), []

    def pass_on(number, frame):
        told.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the script has had it, too, and saves
        code = process.wait() or 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if told and not code:  # too late for the script, which has ended well
        sys.exit(128 + told[0])
    if code:
        if code == 2:  # the script has said what is wrong
            raise UserError(f"{script} of {name} stopped; the line above says why")
        sys.exit(code if code > 0 else 128 - code)
    folder = begun(kind, name, root)
    if folder is None:
        raise UserError(f"{script} left no folder {Path(root) / kind}-{name}-*: look for it")
    return folder


def begun(kind, name, root):
    """The latest folder ROOT/KIND-NAME-DATE that a script has begun to fill, or None."""
    date = f"{'[0-9]' * 8}-{'[0-9]' * 6}*"  # so that run "a" is not taken for "a-b"
    folders = sorted(Path(root).glob(f"{kind}-{glob.escape(name)}-{date}"))
    return next((each for each in folders[::-1] if (each / "args.json").exists()), None)


def _check_begun(folder, script, flags):
    """Raises UserError where the run in the folder is of another script or has other flags."""
    about = files.read_args(folder)
    hint = "give another --root, or the flags it was begun with"
    if about.get("script") != Path(script).stem:
        raise UserError(f"{folder} is a run of {about.get('script')}.py, not {script}: {hint}")
    then, now = _by_flag(about["command"][1:]), _by_flag(flags)
    for flag in sorted({*then, *now} - {"--save", *FREE}):
        # A path is the same however it is written; of other words this changes nothing.
        one, other = ([*map(os.path.realpath, d[flag])] if flag in d else None for d in (then, now))
        if one != other:
            old, new = (" ".join([flag, *d[flag]]) if flag in d else "" for d in (then, now))
            raise UserError(
                f"{folder} was begun {f'with {old}' if old else f'without {flag}'}, now it is "
                f"{f'{new}' if new else 'left out'}: {hint}"
            )


def _by_flag(words):
    """{"--flag": [its words]} of a command line; of a flag that is given twice the last counts."""
    found, flag = {}, None
    for word in map(str, words):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag] = [value] if equals else []
        else:
            found[flag].append(word)
    return found


def rows(folder):
    """The rows of a run's metrics.csv, [{column: text}]."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, rows):
    """Writes rows, dicts, with a column for each of their names; a file without rows is empty."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    if rows:
        writer.writeheader()
        writer.writerows(rows)
    files.write(Path(path), text.getvalue().encode())


def mean(figures, digits=2):
    """The text MEAN ± STD (N runs), of one run the figure alone; STD divides by N - 1."""
    return f"{report.mean(figures, digits)} ({len(figures)} run{'s' * (len(figures) > 1)})"


def table(header, lines):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def thinned(folder, root, train_every, test_every):
    """A folder in `root` of links to each n-th image, by name, of each class of a folder set.

    Raises UserError where `folder` has no train folder, or neither test nor val, and where the
    links that are there lead to other data.
    """
    folder = Path(os.path.abspath(files.expanded(folder)))
    subset = Path(root, f"data-{train_every}-{test_every}")
    test = "test" if (folder / "test").is_dir() else "val"
    for half in ("train", test):
        if not (folder / half).is_dir():
            raise UserError(f"{folder} has no {half} folder: give the data of the set")
    for link in subset.glob("*/*/*"):
        target = Path(os.readlink(link)) if link.is_symlink() else link
        both = target, target.resolve()
        within = any(f in t.parents for f in (folder, folder.resolve()) for t in both)
        if link.exists() and not within:
            raise UserError(f"{subset} is of other data, {target}: give another --root")
    for half, n in (("train", train_every), (test, test_every)):
        classes = imagefiles.class_names(folder / half)
        samples = sorted(imagefiles.image_files(folder / half, classes))  # by class, then by name
        for label, of_class in itertools.groupby(samples, key=lambda sample: sample[1]):
            links = subset / half / classes[label]
            links.mkdir(parents=True, exist_ok=True)
            for path, _ in itertools.islice(of_class, 0, None, n):
                name = Path(path).relative_to(folder / half / classes[label])
                link = links / "-".join(name.parts)  # of subfolders, too
                if not link.exists():
                    link.unlink(missing_ok=True)  # to an image that has moved
                    link.symlink_to(os.path.abspath(path))
    return subset

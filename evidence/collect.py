"""Keep a run as evidence: its figures, cells and pictures, without weights and machine paths.

    python -m evidence.collect runs/cells/search-found-0-20260101-120000 evidence/NAME

Of args.json the data's path becomes DIR, any other path its last name. The pictures, of which
--format none draws none, are those of visualize.py --format and need matplotlib (pip install -r
requirements-viz.txt).
"""

import json
import shutil
from pathlib import Path

from harness import drawing, files, flags, report, script
from harness.runs import RECORDS
from utils import UserError

DATA = ("data", "tmp_data_dir")  # flags that name the data's folder


def get_args():
    parser = flags.Parser(__doc__)
    parser.add_argument("run", help="folder of a search or training")
    parser.add_argument("dest", help="folder to make, such as evidence/NAME")
    kinds = ["png", "svg", "none"]
    parser.add_argument("--format", choices=kinds, default="png", help="of the pictures, or none")
    return parser.parse_args()


def main(args):
    for path in collect(args.run, args.dest, args.format):
        print(path)


def collect(run, dest, format="png"):
    """Copies what is small of a run folder into dest; returns the paths. UserError: no run."""
    record, dest = report.read(run), files.expanded(dest)
    if any((dest / name).exists() for name in ("log.txt", "checkpoint.pt", "weights.pt")):
        raise UserError(f"{dest} is a run: give another folder, such as evidence/NAME")
    # Drawn before the folder is made: it may say what to install.
    pictures = {} if format == "none" else report.pictures(record)
    dest.mkdir(parents=True, exist_ok=True)
    written = [dest / "args.json"]
    files.write(written[0], (json.dumps(portable(record.about), indent=2) + "\n").encode())
    for name in (*RECORDS, "genotype.json"):
        if (record.folder / name).exists():
            written.append(Path(shutil.copyfile(record.folder / name, dest / name)))
    for title, (_, figure) in pictures.items():
        written.append(drawing.save(figure, dest / f"{report.file_name(title)}.{format}"))
    return written


def portable(about):
    """What args.json tells, without paths of the machine."""
    words, flag = [], ""
    for word in about["command"]:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            words.append(_portable(flag, word))
        else:
            flag = name.lstrip("-")
            words.append(f"{name}={_portable(flag, value)}" if equals else word)
    args = {name: _portable(name, value) for name, value in about["args"].items()}
    return about | {"command": words, "args": args}


def _portable(name, value):
    if isinstance(value, list):
        return [_portable(name, each) for each in value]
    if not isinstance(value, str):
        return value
    return "DIR" if name in DATA else Path(value).name if "/" in value else value


if __name__ == "__main__":
    script.run(main, get_args)

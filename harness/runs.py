"""A run: its folder, what it was started with, its checkpoints, and how it ends and goes on."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

import genotypes
import utils
from harness import distributed, drawing, files, flags, generators, older, report, script
from harness.files import FORMAT
from operations import OPS
from utils import UserError

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.prev.pt"
IMPATIENT = 2  # seconds within which a second signal is torchrun repeating the first
RECORDS = ("metrics.csv", "genotypes.jsonl", "widths.jsonl")  # a checkpoint holds them as they were


class Run:
    """The folder of a new run, or of the one to --resume, which this process alone writes.

    parts: what a checkpoint holds, {name: object with state_dict and load_state_dict}. values:
    plain values that it holds besides. genotype: of a training. epoch: how many are done.
    begin: a function of the folder that writes what else a new run holds from its start.
    write_report: a function of the folder that takes the place of report.write. about: what
    args.json tells of the data; classes, and images if given, must stay the same. Raises UserError
    where the folder cannot be made, is in use, or does not fit.
    """

    def __init__(
        self, kind, args, device, parts, values=None, genotype=None, begin=None, write_report=None,
        **about,
    ):  # fmt: skip
        self.args = {name: value for name, value in vars(args).items() if name not in flags.FREE}
        self.genotype = None if genotype is None else genotypes.text(genotype)
        self.device, self.parts, self.values = device, parts, dict(values or {})
        self.epoch, self.figures, self.unfinished = 0, None, None
        self.write_report = write_report
        self.epochs, self.epoch_began, self.report_every = args.epochs, time.time(), args.report
        self.time_left_said = 0.0  # when the log last told how long it will take
        self.minutes, self.saved_at = args.save_every, time.monotonic()
        self.signal, self.signalled_at = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        self.resumed = args.resume is not None
        if self.resumed:
            self.folder = Path(args.resume)
        else:
            self.folder = distributed.on_main(lambda: files.make_folder(kind, args.save))
        self.log = files.start_log(self.folder, quiet=not distributed.is_main())
        if distributed.is_main():
            self._lock()
        if self.resumed:
            before = files.read_args(self.folder)
            self._check_same_data(before, about)
            self._restore(load_checkpoint(self.folder, self.log), before, args)
        else:
            self._begin(args, genotype, begin, about)
        processes = distributed.world_size()
        self.log.info("%s%s", flags.describe(device), f", {processes} processes" * (processes > 1))
        self.tensorboard = None
        if args.tensorboard and distributed.is_main():
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.folder / "tensorboard", purge_step=self.epoch + 1)

    def _lock(self):
        """The log file is locked as long as this process lives."""
        stream = self.log.handlers[-1].stream
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                busy = f"{self.folder} is in use by another process: wait for it"
                raise UserError(busy) from None
            self.log.info("no lock on %s (%s): start no other process in it", self.folder,
                          error.strerror)  # fmt: skip

    def _begin(self, args, genotype, begin, about):
        """Fills the folder of a new run."""
        if distributed.is_main():
            _copy_scripts(self.folder / "scripts")
            if genotype is not None:
                files.write(self.folder / "genotype.json", genotypes.to_json(genotype).encode())
            if begin is not None:
                begin(self.folder)
            device = flags.describe(self.device)
            # The last: from here on the folder is a run, which --resume takes.
            files.write_args(self.folder, args, device=device, **_code(), **about)
        _seed(args)

    def _check_same_data(self, before, about):
        """UserError where what args.json tells of the data is not what this process has."""
        if before.get("classes") != about["classes"]:
            raise UserError(f"{self.folder} learned other classes: give the data of the run")
        if before.get("images", about.get("images")) != about.get("images"):
            raise UserError(f"{self.folder} is of other images: give the data of the run")
        if before.get("primitives", about.get("primitives")) != about.get("primitives"):
            raise UserError(f"{self.folder} searches among {before['primitives']}: restore "
                            "PRIMITIVES in genotypes.py")  # fmt: skip

    def _restore(self, state, before, args):
        """Goes on from the checkpoint `state`, or None; before: what args.json tells."""
        if distributed.is_main():
            for path in self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
                path.unlink(missing_ok=True)
        then, now = before.get("torch"), torch.__version__
        if then != now:
            self.log.info("this is torch %s, the run began with %s: bits may differ", now, then)
        if before.get("device") != flags.describe(self.device):
            self.log.info("the run began with: %s; bits may differ", before.get("device"))
        if state is None and (self.folder / "weights.pt").exists():
            raise UserError(f"{self.folder} has weights.pt and no checkpoint: begin a new run")
        if state is None:
            self.log.info("resumed %s: no checkpoint yet, from the beginning", self.folder)
            state = {"records": {}}
            _seed(args)
        else:
            self._load(state, args)
        if distributed.is_main():
            _write_records(self.folder, state["records"])
        if self.finished(args):
            self.log.info("resumed %s, which is finished: nothing is left to do", self.folder)
        elif self.epoch or self.unfinished:
            steps = f" and {self.unfinished['step']} steps" if self.unfinished else ""
            done = f"epoch {self.epoch} of {args.epochs}{steps}"
            self.log.info("resumed %s after %s", self.folder, done)

    def _check_fits(self, state, args):
        """UserError where the checkpoint is of other epochs, flags or of another cell."""
        path, epoch = self.folder / CHECKPOINT, state.get("epoch")
        nothing = epoch == 0 and state.get("unfinished") is None
        if type(epoch) is not int or not 0 <= epoch <= args.epochs or nothing:
            raise UserError(f"{path} does not fit the run's {args.epochs} epochs: begin a new run")
        its = state.get("args") if isinstance(state.get("args"), dict) else {}
        for name, value in self.args.items():
            if its.get(name, value) != value:
                raise UserError(
                    f"{path} is of a run with {name} {its[name]}, args.json of one with {value}: "
                    "restore what was there"
                )
        if state.get("genotype") != self.genotype:
            raise UserError(
                f"{path} is of {state.get('genotype')}, genotype.json of {self.genotype}: "
                "restore the one that was there"
            )

    def _load(self, state, args):
        """The parts, values and random numbers of a checkpoint."""
        self._check_fits(state, args)
        path, epoch, unfinished = self.folder / CHECKPOINT, state["epoch"], state.get("unfinished")
        try:
            self.values = {name: state["values"][name] for name in self.values}
            for name, part in self.parts.items():
                kept = state[name]
                if name == "optimizer":
                    kept = older.by_edge(kept, self.parts["model"])
                part.load_state_dict(kept)
            if unfinished is not None:
                unfinished = {name: unfinished[name] for name in ("step", "seconds", "each")}
                self.epoch_began -= unfinished["seconds"]
            _check_records(state["records"])
            states = state["generators"]
            if len(states) == distributed.world_size():
                generators.restore(states[distributed.rank()], self.device)
            else:
                torch.manual_seed(args.seed + 1000 * epoch + distributed.rank())
        except UserError:
            raise
        except Exception as error:  # whatever torch makes of what does not fit
            reason = f"{type(error).__name__}: {str(error).splitlines()[-1:]}"[:200]
            raise UserError(
                f"{path} does not fit the run's args.json or data ({reason}): "
                "restore what was changed, or begin a new run"
            ) from None
        self.epoch, self.unfinished = epoch, unfinished
        # As in a run that ended between the last step of an epoch and the scheduler's.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")

    def finished(self, args):
        """Whether nothing is left to do."""
        path = self.folder / "weights.pt"
        with contextlib.suppress(OSError, zipfile.BadZipFile, ValueError):
            return self.epoch == args.epochs and files.is_whole(path)
        return False

    def _signalled(self, number, frame):
        now = time.monotonic()
        if not self.signal:
            self.signal, self.signalled_at = number, now
        elif now - self.signalled_at > IMPATIENT:
            os._exit(128 + number)

    def step(self, figures):
        """After each step: saves every --save_every minutes; ends where a signal asks for it."""
        self.figures = figures
        due = time.monotonic() - self.saved_at > 60 * self.minutes
        number, due = divmod(distributed.maximum(2 * self.signal + due), 2)  # one message for both
        if number or due:
            self.save()
        if number:
            self._stop(number)

    def evaluating(self):
        """After each step of an evaluation, which a resumed run makes again."""
        if self.signal and distributed.world_size() == 1:
            self.save()
            self._stop(self.signal)

    def _stop(self, number):
        step = "" if self.figures is None else f" and {self.figures.step} steps"
        self.log.info(
            "%s: saved %s after %d epochs%s; go on with --resume %s", signal.Signals(number).name,
            self.folder / CHECKPOINT, self.epoch, step, self.folder,
        )  # fmt: skip
        distributed.leave(128 + number)

    def record(self, row, cell=None, widths=None):
        """Writes what an epoch gave: a row of metrics.csv, of a search one of genotypes.jsonl.

        widths: one of widths.jsonl.
        """
        if not distributed.is_main():
            return
        files.append_csv(self.folder / "metrics.csv", row)
        if cell is not None:
            files.append_jsonl(self.folder / "genotypes.jsonl", cell)
        if widths is not None:
            files.append_jsonl(self.folder / "widths.jsonl", widths)
        if self.tensorboard is not None:
            board = self.tensorboard
            for name, value in row.items():
                board.add_scalar(name, value, row["epoch"])
            for name in [name for name in cell or () if name.startswith("softmax")]:
                board.add_histogram(name, np.array(cell[name]), row["epoch"])
            if cell is not None:
                genotype = genotypes.from_json(json.dumps(cell), ops=())
                for kind, figure in drawing.draw(genotype).items():
                    board.add_figure(f"{kind} cell", figure, row["epoch"])
            board.flush()

    def epoch_done(self, **values):
        """The epoch is recorded: from here a resumed run goes on. values: anew."""
        self.epoch, self.figures = self.epoch + 1, None
        self.values |= values
        self.save()
        left, now = self.epochs - self.epoch, time.time()
        seconds = left * (now - self.epoch_began)
        if seconds >= 120 and now - self.time_left_said >= 60:
            self.time_left_said = now
            until = time.strftime("%a %H:%M", time.localtime(now + seconds))
            self.log.info("%d epochs left: %s at the pace of the last one, until about %s",
                          left, utils.duration(seconds), until)  # fmt: skip
        self.epoch_began = now
        due = self.report_every and (self.epoch % self.report_every == 0 or not left)
        if due and distributed.is_main():
            try:
                if self.write_report is not None:
                    self.write_report(self.folder)
                else:
                    report.write(report.read(self.folder), self.folder / "report.html")
            except Exception as error:  # of matplotlib or of the disk: no reason to end the run
                self.log.warning("no report.html: %s", error)
        if number := distributed.maximum(self.signal):
            self._stop(number)

    def save(self):
        """Writes the checkpoint; the one before stays beside it."""
        unfinished = None if self.figures is None else self.figures.state_dict()
        states = distributed.gather(generators.state(self.device))
        self.saved_at = time.monotonic()
        if not distributed.is_main():
            return
        state = {"format": FORMAT, "script": files.script_name(), "args": self.args}
        state |= {"genotype": self.genotype, "epoch": self.epoch, "unfinished": unfinished}
        state |= {"values": self.values, "generators": states}
        state["records"] = {name: path.read_text() for name in RECORDS
                            if (path := self.folder / name).exists()}  # fmt: skip
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        tensors = state["model"]
        finite = torch.stack([torch.isfinite(t).all() for t in tensors.values()]).tolist()
        for name, fine in zip(tensors, finite, strict=True):  # a GPU is waited for once
            if not fine:
                raise UserError(
                    f"{name} is NaN or infinite in epoch {self.epoch + (unfinished is not None)}: "
                    "lower --learning_rate; the checkpoint before was left as it is"
                )
        path = self.folder / CHECKPOINT
        files.save(state, path, previous=self.folder / PREVIOUS)
        script.unsaved_runs.clear()


def _seed(args):
    """At the start of a run: of drop path, each process its own."""
    torch.manual_seed(args.seed + distributed.rank())


def load_genotype(args):
    """The genotype of --arch; on a resume the run's own, whatever --arch has come to mean."""
    own = None if args.resume is None else Path(args.resume, "genotype.json")
    with utils.user_errors(genotypes.GenotypeError):
        return genotypes.load(own if own is not None and own.exists() else args.arch, OPS)


def load_checkpoint(folder, log):
    """The checkpoint in a run's folder, or where it is damaged the one before; None without any.

    Raises UserError where none can be used.
    """
    name, failed = files.script_name(), None
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            if not files.is_whole(path):
                raise UserError(f"{path} is damaged")
            state = files.load(path)
        except Exception as error:  # whatever zipfile makes of damage
            failed = failed or error
            log.info("%s cannot be used (%s)", path, " ".join(str(error).split()))
            continue
        if not isinstance(state, dict) or state.get("script") != name:
            raise UserError(f"{path} is no checkpoint of {name}.py: give the folder of one")
        if state.get("format") != FORMAT:
            raise UserError(f"{path} is of another version of this code: use that one")
        if path.name == PREVIOUS:
            if distributed.is_main():  # otherwise the next save would keep it as the one before
                (folder / CHECKPOINT).unlink(missing_ok=True)
            log.info("going on from the one before, %s", path)
        return state
    if failed:
        raise UserError(f"no checkpoint in {folder} can be used: begin a new run")
    return None


def _check_records(records):
    if not all(name in RECORDS and isinstance(text, str) for name, text in records.items()):
        raise TypeError("records")


def _write_records(folder, records):
    """metrics.csv and the others as they were: no row twice, none that a kill has cut."""
    for name in RECORDS:
        if name in records:
            files.write(folder / name, records[name].encode())
        else:
            (folder / name).unlink(missing_ok=True)


def _code():
    """The git commit of this code and whether its files are as committed; None without git."""

    def git(*words):
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.TimeoutExpired):
        commit = changes = None
    return {"commit": commit, "clean": None if changes is None else changes == ""}


def _copy_scripts(folder):
    """The code as it was, as the published scripts keep it."""
    code = Path(__file__).parents[1]
    for path in [*code.glob("*.py"), *code.glob("*/__init__.py")]:
        package = path.parent if path.name == "__init__.py" else code
        for each in [path] if package == code else package.glob("*.py"):
            copy = folder / each.relative_to(code)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(each, copy)

"""What several test files use."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


@functools.cache
def warm_python():
    """The words before a script's: a Python that has torch imported already (warm.py)."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # no Linux, an old one, a sandbox
        return [sys.executable]
    folder = tempfile.mkdtemp(prefix="warm-", dir="/tmp")  # the name of a socket must be short
    warm, socket = ROOT / "tests" / "warm.py", Path(folder, "socket")
    server = subprocess.Popen([sys.executable, warm, "--serve", socket], stdin=subprocess.PIPE)

    @atexit.register
    def end():
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)

    return [sys.executable, "-S", "-E", str(warm), str(socket)]


def torchrun(processes):
    """The words before a script's that run it in several processes, all of a warm Python."""
    launcher = [*warm_python(), "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*launcher, "--standalone", "--no-python", *warm_python()]


def copy_code(folder):
    """The scripts and their packages, to be changed there."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for package in ROOT.glob("*/__init__.py"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package.parent, Path(folder, package.parent.name), ignore=ignore)

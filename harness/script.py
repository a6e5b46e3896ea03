"""What surrounds the main function of a script: how errors and interrupts end it."""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from utils import UserError


def run(main, get_args):
    """main(get_args()) as a script: a UserError is one line and exit code 2, an interrupt 130."""
    args = None
    keep_memory()
    for name in ("stdout", "stderr"):  # closed by who started this
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        with contextlib.suppress(AttributeError, OSError):  # of streams that cannot
            stream.reconfigure(errors="backslashreplace")  # names need not be text
        setattr(sys, name, stream)
    try:
        args = get_args()
        main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads, as head does, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        sys.exit(_fail(error, 2))
    except OSError as error:  # a full disk, a folder that is read-only
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
        sys.exit(_fail(f"{error}{': make it writable or free some space' * full}", 2))
    except (torch.cuda.OutOfMemoryError, MemoryError):
        sys.exit(_fail(_out_of_memory(args), 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # PyTorch raises it anywhere
            why = "a process that reads images died, of too little memory perhaps"
            hint = "lower --workers or --batch_size, in a container raise its --shm-size"
            sys.exit(_fail(f"{why}: {hint}; go on with --resume", 2))
        if "busy or unavailable" in str(error):
            hint = "wait for it, or take another with --gpu, or --device cpu"
            sys.exit(_fail(f"the GPU is busy or unavailable: {hint}", 2))
        if "no kernel image" in str(error):
            hint = "give --device cpu, or install a PyTorch for it"
            sys.exit(_fail(f"this PyTorch has no kernels for the GPU: {hint}", 2))
        if re.search("can't allocate memory|out of memory|ALLOC_FAILED", str(error)):
            sys.exit(_fail(_out_of_memory(args), 2))
        if "returned nan values" in str(error):  # of --detect_anomaly, which warned where
            sys.exit(_fail(f"{error} The forward call is shown above: mend it there", 2))
        if not dist.is_initialized() or not re.search("gloo|NCCL|[Cc]onnection", str(error)):
            raise
        hint = "see what it says, then go on with --resume FOLDER"
        sys.exit(_fail(f"another process of this job ended or cannot be reached; {hint}", 1))
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_memory():
    """Lets this process keep the memory of tensors that are freed, for those that come next.

    glibc gives blocks of 32 MiB and more back to the system at once, and each new one costs a page
    fault for every 4 KiB: 2 million in a step of the supernet at batch 256 on a CPU, a fifth of its
    time or more (BENCHMARKS.md). The process then stays as large as it once was. Does nothing where
    there is no glibc, or where the user has set malloc's own variables.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, most = -1, -3, 2**31 - 1  # of malloc.h; an int
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # which musl does not have
        # An old glibc takes 32 MiB at most. Without the first the second would do harm.
        if mallopt and (mallopt(M_MMAP_THRESHOLD, most) or mallopt(M_MMAP_THRESHOLD, 2**25)):
            mallopt(M_TRIM_THRESHOLD, most)


def _out_of_memory(args):
    batch, sizes = ["batch_size", "identities", "instances"], ["init_channels", "input_size"]
    lower = [f"--{name}" for name in [*batch, *sizes, "height"] if hasattr(args, name)]
    used = {name: getattr(args, name) for name in [*batch, "k"] if hasattr(args, name)}
    hints = {"recompute": "give --recompute", "amp": "give --amp", "k": "raise --k"}
    hints = [text for name, text in hints.items() if hasattr(args, name)]
    hints = [f"lower {' or '.join(lower)}"] * bool(lower) + hints or ["use a larger machine"]
    used = ", ".join(f"{name} {value}" for name, value in used.items())
    return f"out of memory{f' with {used}' if used else ''}: {', or '.join(hints)}"


unsaved_runs = []  # folders of this process that hold no checkpoint yet
made_parents = []  # folders that were made for them, the inner ones first


def _fail(message, code):
    """Prints the line; a run folder that holds nothing to go on from is taken away."""
    for folder in unsaved_runs if code == 2 else ():
        if not any((Path(folder) / name).exists() for name in ("checkpoint.pt", "weights.pt")):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in made_parents if code == 2 else ():
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
    message = " ".join(str(message).split())
    who = f" (process {dist.get_rank()})" if dist.is_initialized() else ""
    if dist.is_initialized() and dist.get_rank() > 0:
        time.sleep(3)  # so that where process 0 says the same, its message ends the job first
    print(f"{Path(sys.argv[0]).name}: error{who}: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # at once: the other processes may never answer again
    return code

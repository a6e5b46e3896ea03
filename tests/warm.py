"""A Python that has imported torch already: it starts a script in a tenth of a second, not in four.

    python -S -E warm.py SOCKET script.py --flag ...    # as python script.py --flag ...
    python -S -E warm.py SOCKET -m module --flag ...    # as python -m module --flag ...
    python warm.py --serve SOCKET                       # what that talks to, until its stdin ends

The script runs in a process of its own, forked from the server before anything is computed, with
the terminal, folder, environment, exit code and signals of the one who started it; but for SIGKILL
and SIGSTOP, which do not get through. It ends without the second that Python takes to throw torch
away. helpers.warm_python is how the tests use it.
"""

import os
import signal
import sys


def client(path, words):
    import json
    import socket
    import time

    with socket.socket(socket.AF_UNIX) as server:
        for _ in range(3000):
            try:
                server.connect(path)
                break
            except OSError:  # it is importing
                time.sleep(0.1)
        request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        process = int.from_bytes(read(server), "big")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, lambda number, _: os.kill(process, number))
        status = int.from_bytes(read(server), "big")
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


def read(server):
    answer = server.recv(8)
    return answer or sys.exit("the warm Python has died")


def reap(*_):
    """Waits for the forks that have ended, whose processor time thus counts as the server's."""
    while True:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                return
        except ChildProcessError:
            return


def serve(path):
    """Waits for a client; returns in the process that shall run its script, set up for it."""
    import json
    import select
    import socket

    import torch
    import torchvision  # noqa: F401

    torch.optim.SGD([torch.zeros(1)])  # which imports torch._dynamo
    import frozen  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, reap)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, terminal, _, _ = socket.recv_fds(client, 8, 3)
        request = client.makefile("rb").read(int.from_bytes(size, "big"))
        process = os.fork()
        if process:  # tells the client how it goes
            client.sendall(process.to_bytes(8, "big"))
            ended = os.pidfd_open(process)
            if ended not in select.select([client, ended], [], [])[0]:  # the client has been killed
                os.kill(process, signal.SIGKILL)
                os._exit(0)
            client.sendall(os.waitpid(process, 0)[1].to_bytes(8, "big"))
            os._exit(0)
        client.close()
        for number, descriptor in enumerate(terminal):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.argv, folder, environment = json.loads(request)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return
    os._exit(0)


def run():
    """Runs the script or module of sys.argv, as Python does."""
    import runpy

    if sys.argv[0] == "-u":
        sys.argv.pop(0)
        sys.stdout.reconfigure(write_through=True)
    module = sys.argv[0] == "-m"
    beside = os.getcwd() if module else os.path.dirname(os.path.abspath(sys.argv[0]))
    sys.path[:1] = [beside, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if module:
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def leave(code):
    """Ends this process as Python does, but for taking its modules apart."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)


if __name__ == "__main__" and sys.argv[1] == "--serve":
    serve(sys.argv[2])
    try:
        run()
    except SystemExit as end:  # all else that is raised ends it the long way
        if not isinstance(end.code, int | None):
            raise
        leave(end.code or 0)
    leave(0)
elif __name__ == "__main__":
    client(sys.argv[1], sys.argv[2:])

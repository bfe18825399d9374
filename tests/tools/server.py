"""A Python that has imported torch and starts programs by forking: 0.1 s each, where a new Python takes 3 s.

`programs` runs this file and never imports it: every program inherits what is imported here, so it imports nothing of
ours. Arguments: the name of the abstract socket on which it listens, and the libraries. A second server with the same
name ends at once. A connection brings three file descriptors, a program's standard streams, and a line of JSON that
describes it; the answers are its process id and its exit status. When the other end is closed, the program is killed,
so a test process that dies takes its programs with it.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import threading


def serve(name: str) -> None:
    """Serve forever; `watch` ends this process."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0{name}")
    except OSError:  # another process was faster
        os._exit(0)
    prepare(sys.argv[2:])
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for keepers
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request = keep(connection)
            os._exit(0 if request is None else end_of(request))
        connection.close()


def prepare(libraries: list[str]) -> None:
    for name in libraries:
        with contextlib.suppress(ImportError):  # programs then have to do without it too
            __import__(name)
    atexit._clear()  # programs must not run what libraries have registered for the end of this process
    gc.collect()
    gc.freeze()  # otherwise each program's garbage collector would copy all pages


def keep(connection: socket.socket) -> dict | None:
    """Fork a program. Return the request in the program, and None in its keeper once the program has ended."""
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as file:
        request = json.loads(file.readline())
    pid = os.fork()
    if pid == 0:
        os.setsid()  # a process group of its own, which can be killed as one
        connection.close()
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
            os.close(fd)
        return request
    for fd in streams:
        os.close(fd)
    connection.sendall(b"%d\n" % pid)
    ended = os.pidfd_open(pid)
    if connection.fileno() in select.select([connection.fileno(), ended], [], [])[0]:
        with contextlib.suppress(ProcessLookupError):  # it has just started, or ended
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # no one is connected any more
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    return None


def end_of(request: dict) -> int:
    """Run the program and return its exit code, after Python's shutdown steps but finalization, which takes 0.5 s."""
    code = 0
    try:
        run(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed, or no one reads it
            code = code or 120
    return code


def run(request: dict) -> None:
    """Run the program as Python would, with its command line, environment, working folder, path and threads."""
    import runpy

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in enumerate(("r", "w", "w"))
    )
    what, *args = request["argv"]
    if what == "-m":
        sys.argv = args
        sys.path.insert(0, request["cwd"])
        runpy.run_module(args[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *args[1:]]
        sys.path.insert(0, "")
        exec(compile(args[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [what, *args]
        sys.path.insert(0, os.path.dirname(os.path.abspath(what)))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, whose modules have names of ours
    serve(sys.argv[1])

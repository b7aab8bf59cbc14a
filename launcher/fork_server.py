"""The node process: forks and reaps everything that runs on a node, and is the only one that does.

One thread, one poll loop, started in a clean interpreter. ``node`` is its entry; the raylet asks it for workers over a
socket pair (StartWorker, KillProcess, FollowLogs) and hears from it by lane (WorkerForked, ProcessExited). Drivers and
links attach through an abstract Unix socket.

FORK-1 (nothing outlives the node): each child gets SIGKILL when this process dies; each worker leads a process group, which
is killed when the worker dies; orphans are adopted (subreaper) and killed with the worker whose mark they carry; at the
end everything that is left below this process is killed.
FORK-2 (output is kept): a pipe is read until its end, also after its writer's death.
FORK-3 (reaped before told): ProcessExited is sent after waitpid, so the raylet may reclaim what the process held.
FORK-4 (lifetime): the node ends when its holder says so, or without a word closes the control channel or dies, unless it was started
detached.
"""

from __future__ import annotations

import errno
import functools
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from hpc_ray import _core, as_ray
from hpc_ray.config import RUNTIME_ENV_VARIABLE, NodeConfig, encode_config
from hpc_ray.exceptions import LaunchError
from hpc_ray.ids import FORK_SERVER_LANE, GCS_ADDRESS, raylet_address
from hpc_ray.launcher import channel, mpi_files, session
from hpc_ray.protocol import (
    ENDED_BY_MPIRUN,
    FollowLogs,
    KillProcess,
    LogLines,
    ProcessExited,
    ProcessKind,
    Shutdown,
    StartWorker,
    WorkerForked,
    decode,
    encode,
)
from hpc_ray.slurm import signals
from hpc_ray.worker_log import OutputSplitter

WORKER_VARIABLE = "HPC_RAY_WORKER"  # pid of the worker, in the environment of what it starts
_READ_BYTES = 1 << 16
_MOST_UNSENT = 16 << 20  # bytes of output that drivers have not taken
_FLUSH_S = 0.002
_LOOK_S = 10.0  # between two looks for what MPI has left behind
_GONE_S = 0.5  # for the ranks of a gang to be gone, once one is
_PART_S = 2.0  # for a link to end its MPI
_TAIL_LINES = 20
_kept: list[Any] = []  # of the parent, in a child: must not be closed by the collector there


def describe_status(status: int) -> str:
    """Words for a status of waitpid."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"killed by {name}"
    return f"exit code {os.WEXITSTATUS(status)}"


class Output:
    """One stream of one worker: pipe, log file, splitter."""

    def __init__(self, pid: int, pipe: int, path: str, is_error: bool):
        self.pid = pid
        self.pipe = pipe
        self.path = path
        self.is_error = is_error
        self.splitter = OutputSplitter()
        self.file = -1

    def write(self, data: bytes) -> None:
        if not data:
            return
        try:
            if self.file < 0:
                self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            while data:
                data = data[os.write(self.file, data) :]
        except OSError as error:  # a full disk must not end the node; drivers still get the lines
            print(f"cannot write {self.path}: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        os.close(self.pipe)
        if self.file >= 0:
            os.close(self.file)


class Client:
    """Somebody attached: a driver, a link, or a visitor that has opened no lane yet."""

    def __init__(self, connection: socket.socket, pid: int):
        self.connection = connection
        self.pid = pid
        self.address = 0
        self.kind = int(ProcessKind.DRIVER)
        self.keeper = -1  # a rank's: the pipe through which it tells how the rank has ended


class ForkServer:
    """One node. ``start`` brings up segment and roles, ``serve`` runs until the node has ended."""

    def __init__(
        self,
        config: NodeConfig,
        control: socket.socket,
        lock: int,
        load: Callable[[str], Callable[..., Any]],
        roles: dict[str, str],
        *,
        detached: bool = False,
        outlives: bool = False,
    ):
        """``detached``: the node goes on without whoever started it; ``outlives``: it outlives its drivers."""
        self.config = config
        self.control: socket.socket | None = control
        self.lock = lock
        self._leftovers = mpi_files.Leftovers(time.time())
        self._look_at = time.monotonic() + _LOOK_S
        self.detached = detached
        self.outlives = outlives
        self._load = load
        self._entries = roles
        self._roles: dict[int, str] = {}  # pid → name, while alive
        self._workers: dict[int, int] = {}  # pid → token, while alive
        self._outputs: dict[int, Output] = {}  # by pipe
        self._paused = False
        self._clients: dict[int, Client] = {}  # by fd
        self._followers: dict[bytes, set[int]] = {}
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._code: int | None = None  # exit code, once the end has begun
        self._deadline = 0.0
        self._pidfd = -1
        self._holder = 0  # pid
        self._link: socket.socket | None = None
        self._files: list[str] = []  # outside of our folder, to be removed at the end

    # -- up

    def start(self) -> None:
        config = self.config
        settings = config.settings
        wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_read = wake_read
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.drains = signals.in_job() and not self.detached  # whoever holds us decides (SIGNAL-1)
        if self.drains:
            signals.ignore()
        else:
            signal.signal(signal.SIGTERM, lambda *_: self.end("SIGTERM"))
            signals.let_come()
        self._watch(wake_read, self._on_wake)

        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(config.socket_name)
        self.listener.listen(64)
        self.listener.setblocking(False)
        self.segment = _core.Segment(
            node=config.node,
            arena_bytes=config.arena_bytes,
            max_lanes=settings.max_processes,
            ring_bytes=settings.ring_bytes,
        )
        self.raylet_socket, theirs = channel.pair()
        if config.node == 0:
            self._fork_role("gcs", None)
        self._fork_role("raylet", theirs)
        theirs.close()
        self.raylet_socket.setblocking(False)
        self.lane = self.segment.open_lane(FORK_SERVER_LANE)
        self._watch(self.listener.fileno(), self._on_connect)
        self._watch(self.raylet_socket.fileno(), self._on_raylet)
        assert self.control is not None
        self._watch(self.control.fileno(), self._on_control)
        if not self.detached:
            self._holder, _ = channel.peer_user(self.control)
            try:
                self._pidfd = os.pidfd_open(self._holder)
                self._watch(self._pidfd, self._on_holder_gone)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    raise LaunchError("whoever started this node is gone") from None
                self._pidfd = -1  # a sandbox without pidfd: the channel alone tells

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # -- the loop

    def serve(self) -> int:
        """Until the node has ended; the exit code. An error of our own ends it too, with its words, and leaves nothing."""
        try:
            self._loop()
        except BaseException:
            self.fail(f"the node process of node {self.config.node} has failed:\n{traceback.format_exc()}")
        self._finish()
        return self._code or 0

    def _loop(self) -> None:
        while not self._has_ended():
            now = time.monotonic()
            if now >= self._look_at:
                self._leftovers.remove()
                self._look_at = now + _LOOK_S
            timeout = max(0.0, (self._look_at if self._code is None else self._deadline) - now)
            if unsent := self.lane.flush():  # a driver reads more slowly than workers print
                timeout = min(timeout, _FLUSH_S)
            self._pause_outputs(unsent > _MOST_UNSENT)
            for fd, _ in self._poll.poll(timeout):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()
            self._drain_lane()

    def _has_ended(self) -> bool:
        """The raylet leaves when its workers have; the GCS, whose journal is safe at any time, is there until the very end."""
        if self._code is None:
            return False
        return "raylet" not in self._roles.values() or time.monotonic() >= self._deadline

    def _drain_lane(self) -> None:
        self.lane.receive(0)  # nobody is meant to write here; what comes is dropped, never kept

    def _on_wake(self) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass
        self._reap()

    # -- children

    def _fork_role(self, name: str, connection: socket.socket | None) -> None:
        pid = os.fork()
        if pid:
            self._roles[pid] = name
            return
        try:
            keep = {self.segment.fd, connection.fileno() if connection is not None else -1}
            log = os.open(f"{self.config.session_dir}/logs/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._become_child(log, log, keep)
            _set_title(f"hpc_ray::{name}")
            entry = self._load(self._entries[name])
            if connection is None:
                entry(self.segment, self.config)
            else:
                entry(self.segment, self.config, connection)
            _leave(0)
        except SystemExit as leaving:
            _leave(_exit_code(leaving))
        except BaseException:
            traceback.print_exc()
            _leave(1)

    def _fork_worker(self, request: StartWorker) -> None:
        if self._code is not None:
            self._tell_raylet(WorkerForked(request.token, 0, "the node is ending"))
            return
        pipes: list[int] = []
        try:
            for _ in range(2):
                pipes.extend(os.pipe2(os.O_CLOEXEC))
            pid = os.fork()
        except OSError as error:
            for fd in pipes:
                os.close(fd)
            self._tell_raylet(WorkerForked(request.token, 0, f"cannot fork a worker: {error}"))
            return
        if pid == 0:
            self._run_worker(request, pipes[1], pipes[3])
        try:
            os.setpgid(pid, pid)  # also done in the child; whoever comes first
        except OSError:
            pass
        self._workers[pid] = request.token
        for pipe, write_end, suffix in ((pipes[0], pipes[1], "out"), (pipes[2], pipes[3], "err")):
            os.close(write_end)
            os.set_blocking(pipe, False)
            output = Output(pid, pipe, session.worker_log(self.config.session_dir, pid, suffix), suffix == "err")
            self._outputs[pipe] = output
            self._watch(pipe, functools.partial(self._on_output, output))
        self._tell_raylet(WorkerForked(request.token, pid))

    def _run_worker(self, request: StartWorker, out: int, err: int) -> None:
        """In the child; never returns."""
        try:
            os.setpgid(0, 0)
            self._become_child(out, err, {self.segment.fd})
            config = self.config
            os.environ.update(request.environment)
            os.environ[WORKER_VARIABLE] = str(os.getpid())
            if request.runtime_env:
                os.environ[RUNTIME_ENV_VARIABLE] = request.runtime_env
            if as_ray.VARIABLE in os.environ:
                as_ray.install()
            sys.path[:] = [*config.python_path, *(p for p in sys.path if p not in config.python_path)]
            if config.working_dir:
                try:
                    os.chdir(config.working_dir)
                except OSError as error:
                    print(f"the working directory of the driver is not here: {error}", file=sys.stderr)
            self._load(self._entries["worker"])(self.segment, config, request.token)
            _leave(0)
        except SystemExit as leaving:
            _leave(_exit_code(leaving))
        except BaseException:
            traceback.print_exc()
            _leave(1)

    def _become_child(self, out: int, err: int, keep: set[int]) -> None:
        """In a fresh child: own death signal, signals, descriptors and streams."""
        parent = self._pid_of_parent
        _core.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not self.drains:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGPIPE, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        _kept.append((self._poll, self.control, self.listener, list(self._clients.values())))
        for connection in (
            self.control,
            self.listener,
            getattr(self, "raylet_socket", None),
            *(client.connection for client in self._clients.values()),
        ):
            if connection is not None and connection.fileno() not in keep:
                connection.detach()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in keep:
                try:
                    os.close(int(name))
                except OSError:
                    pass
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  for the life of the process
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115  for the life of the process
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115  for the life of the process
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]  # what they were is the node\'s
        gc.enable()

    @property
    def _pid_of_parent(self) -> int:
        return _SERVER_PID

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            pid = found.si_pid
            if pid in self._workers:
                _kill_group(pid)  # while its pid cannot be anybody else's
            _, status = os.waitpid(pid, 0)
            if pid in self._workers:
                del self._workers[pid]
                self._kill_orphans(of=pid)
                for output in [o for o in self._outputs.values() if o.pid == pid]:
                    self._on_output(output)
                self._tell_raylet(ProcessExited(pid, status, int(ProcessKind.WORKER)))
            elif pid in self._roles:
                self._on_role_exited(pid, self._roles.pop(pid), status)
            else:  # an orphan, whose own children are orphans now
                self._kill_orphans(of=None)

    def _kill_orphans(self, of: int | None = 0) -> int:
        """Kills children that we did not fork: those that a worker left behind (``of`` None: any that is gone), or (``of`` 0) all."""
        alive = {str(pid).encode() for pid in self._workers}
        count = 0
        for pid in session.children(os.getpid()):
            if pid in self._workers or pid in self._roles:
                continue
            mark = session.environment_of(pid).get(WORKER_VARIABLE.encode(), b"")
            if of == 0 or ((mark and mark not in alive) if of is None else mark == str(of).encode()):
                try:
                    os.kill(pid, signal.SIGKILL)
                    count += 1
                except OSError:
                    pass
        return count

    def _on_role_exited(self, pid: int, name: str, status: int) -> None:
        if self._code is not None:
            return
        if status == 0:
            self.end(f"the {name} has ended")
            return
        tail = self._tail(name)
        self.fail(
            f"the {name} of node {self.config.node} on {self.config.hostname} (pid {pid}) died: {describe_status(status)}"
            + (f". Its last output:\n{tail}" if tail else "")
        )

    def _tail(self, name: str) -> str:
        try:
            with open(f"{self.config.session_dir}/logs/{name}.log", errors="replace") as file:
                return "".join(file.readlines()[-_TAIL_LINES:]).rstrip()
        except OSError:
            return ""

    # -- the raylet

    def _tell_raylet(self, message: Any) -> None:
        self.lane.send(raylet_address(self.config.node), encode(message))

    def _on_raylet(self) -> None:
        while True:
            try:
                data = self.raylet_socket.recv(1 << 20)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:  # it closes when it dies; SIGCHLD tells the rest
                self._unwatch(self.raylet_socket.fileno())
                return
            message = decode(data)
            if isinstance(message, StartWorker):
                self._fork_worker(message)
            elif isinstance(message, KillProcess):
                if message.pid in self._workers:
                    try:
                        os.kill(message.pid, message.signal)
                    except ProcessLookupError:
                        pass
            elif isinstance(message, FollowLogs):
                followers = self._followers.setdefault(message.job_id, set())
                if message.on:
                    followers.add(message.driver)
                else:
                    self._end_following(followers, message)
            elif isinstance(message, Shutdown):
                self.end(message.reason)
            else:
                print(f"unexpected request {message!r}", file=sys.stderr, flush=True)

    # -- output

    def _end_following(self, followers: set[int], message: FollowLogs) -> None:
        """The driver gets what has been printed so far, then LogLines without lines."""
        for output in list(self._outputs.values()):
            self._on_output(output)
            if output.splitter.job_id == message.job_id:  # a line without an end is one, as nobody will see the rest
                self._take(output, b"", end=True)
        followers.discard(message.driver)
        self.lane.send(message.driver, encode(LogLines(0, "", self.config.ip, message.job_id, False, [])))

    def _on_output(self, output: Output, reads: int = 16) -> None:
        """Takes what is there, up to so many reads (then others have their turn); closes at the end (FORK-2)."""
        for _ in range(reads):
            try:
                data = os.read(output.pipe, _READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self._take(output, data, end=not data)
            if not data:
                self._unwatch(output.pipe)
                self._outputs.pop(output.pipe, None)
                output.close()
                return

    def _take(self, output: Output, data: bytes, *, end: bool) -> None:
        """What was printed, to the log and to those who follow. ``end``: also a line that has none."""
        cleaned, groups = output.splitter.feed(data, end=end)
        output.write(cleaned)
        for name, job_id, lines in groups:
            self._forward(output, name, job_id, lines)

    def _pause_outputs(self, pause: bool) -> None:
        """Workers whose pipes are full wait in their prints."""
        if pause != self._paused:
            self._paused = pause
            for pipe in self._outputs:
                self._poll.modify(pipe, 0 if pause else select.EPOLLIN)

    def _forward(self, output: Output, name: str, job_id: bytes, lines: list[str]) -> None:
        wanted = [job_id] if job_id else list(self._followers)  # before the first task: for all
        message = None
        for job in wanted:
            for driver in list(self._followers.get(job, ())):
                if message is None:
                    message = encode(LogLines(output.pid, name, self.config.ip, job_id, output.is_error, lines))
                if self.lane.send(driver, message) < 0:
                    self._followers[job].discard(driver)

    # -- who attaches

    def _on_connect(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        pid, uid = channel.peer_user(connection)
        if uid != os.getuid():
            connection.close()
            return
        note = {"config": encode_config(self.config), "pid": os.getpid(), "detached": self.outlives}
        try:
            channel.send_note(connection, note, (self.segment.fd,))
        except OSError:
            connection.close()
            return
        fd = connection.fileno()
        self._clients[fd] = Client(connection, pid)
        self._watch(fd, lambda: self._on_client(fd))

    def _on_client(self, fd: int) -> None:
        client = self._clients[fd]
        descriptors: list[int] = []
        try:
            note, descriptors = channel.receive_note(client.connection)
        except (OSError, ValueError):
            note = None
        if note is None and client.keeper >= 0:
            self._unwatch(fd)  # the keeper has the word
        elif note is None:
            self._on_client_gone(fd, 0)
        elif "address" in note:
            client.address = int(note["address"])
            client.kind = int(note.get("kind", ProcessKind.DRIVER))
            if descriptors:
                client.keeper = descriptors[0]
                self._watch(client.keeper, lambda: self._on_keeper(fd))
        elif "remove" in note:  # the link: what MPI has put into shared memory
            self._link = client.connection
            self._files = [str(path) for path in note["remove"]]
            session.note_leader(self.lock, os.getpid(), self._files, self.config.spill_dir)
        elif "stop" in note:
            self.end(str(note["stop"]))

    def _on_keeper(self, fd: int) -> None:
        """A rank has ended, and its keeper says how; or says nothing, as it was mpirun that ended both."""
        keeper = self._clients[fd].keeper
        word = os.read(keeper, 16)
        self._unwatch(keeper)
        os.close(keeper)
        self._on_client_gone(fd, int(word) if word else ENDED_BY_MPIRUN)

    def _on_client_gone(self, fd: int, status: int) -> None:
        """``status``: of waitpid, where that is known."""
        self._unwatch(fd)
        client = self._clients.pop(fd)
        client.connection.close()
        if client.kind == ProcessKind.RANK:
            self._look_at = min(self._look_at, time.monotonic() + _GONE_S)
        if client.address:
            for followers in self._followers.values():
                followers.discard(client.address)
            self._tell_raylet(ProcessExited(client.pid, status, client.kind, client.address))

    # -- the end

    def _on_control(self) -> None:
        assert self.control is not None
        try:
            note, _ = channel.receive_note(self.control)
        except (OSError, ValueError):
            note = None
        if note is not None:
            if "stop" in note:
                self.end(str(note["stop"]))
            return
        self._unwatch(self.control.fileno())
        self.control.close()
        self.control = None
        if not self.detached:
            self.end(self._holder_text())

    def _on_holder_gone(self) -> None:
        self._unwatch(self._pidfd)
        self.end(self._holder_text())

    def _holder_text(self) -> str:
        who = f"the link of node {self.config.node}" if self.config.has_link else "the program that started this node"
        return f"{who} has died (pid {self._holder} on {self.config.hostname})"

    def end(self, reason: str) -> None:
        """In order: roles are asked to leave and have ``kill_on_exit_s`` for it."""
        if self._code is not None:
            return
        self._code = 0
        self._reason = reason
        self._deadline = time.monotonic() + self.config.settings.kill_on_exit_s
        self._stop_listening()
        message = encode(Shutdown(reason))
        if self.config.node == 0:
            self.lane.send(GCS_ADDRESS, message)
        self._tell_raylet(Shutdown(reason))

    def fail(self, text: str) -> None:
        """At once, with an error for everybody who waits."""
        print(text, file=sys.stderr, flush=True)
        self._code = 1
        self._reason = text
        self._deadline = 0.0
        self._stop_listening()
        self._notify({"died": text})

    def _stop_listening(self) -> None:
        """Whoever is not in by now gets no answer, rather than half of one."""
        if self.listener.fileno() >= 0:
            self._unwatch(self.listener.fileno())
            self.listener.close()

    def _notify(self, note: dict[str, Any]) -> None:
        connections = [client.connection for client in self._clients.values()]
        for connection in [*connections, *([self.control] if self.control is not None else [])]:
            connection.setblocking(False)
            try:
                channel.send_note(connection, note)
            except OSError:
                pass

    def _finish(self) -> None:
        """Kills and reaps all that is left, reads the last output, removes the folder (FORK-1, FORK-2)."""
        for pid in [*self._workers, *self._roles]:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            self._reap()
            self._kill_orphans()
            if not session.children(os.getpid()):
                break
            self._poll.poll(0.01)
            self._on_wake()
        session.kill_leftovers(self.config.session, str(self.config.node), os.getpid())
        for output in list(self._outputs.values()):
            self._on_output(output, 1 << 20)
        self.lane.flush()
        if self._code == 0:
            self._notify({"ended": self._reason})
        self._part_from_link()
        mpi_files.remove(self._files)
        self._leftovers.remove()
        session.remove_dir(self.config.spill_dir)
        session.remove_node(self.config.session_dir, self._leftovers.since)
        os.close(self.lock)

    def _part_from_link(self) -> None:
        """Lets the link end MPI, which removes its files itself and complains of those it does not find, and waits until it has."""
        if self._link is None or not self._files:
            return
        try:
            self._link.settimeout(_PART_S)
            self._link.shutdown(socket.SHUT_WR)
            while self._link.recv(4096):
                pass
        except OSError:
            pass  # it is gone, or takes too long


_SERVER_PID = os.getpid()


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass


def _set_title(title: str) -> None:
    try:
        import setproctitle

        setproctitle.setproctitle(title)
    except ImportError:
        pass


def _exit_code(leaving: SystemExit) -> int:
    """As the interpreter has it: a text is printed and counts as 1."""
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _leave(code: int) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)

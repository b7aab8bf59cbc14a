"""A node of a cluster over TCP: ``python -P -m hpc_ray.launcher.member [FD | -]``, with the plan in ``HPC_RAY_LAUNCH_PLAN`` or,
after ``-``, in a line of stdin. FD is the driver's control channel, where a driver started us.

The head listens and lets others in, one by one, for as long as it lives: those that it has started itself, on this host, by an
agent or as a step of the Slurm job, and those that come with the file that ``hpc-ray start --join-file`` writes. From the moment a
node is let in everything is as in a world of ranks, but that the loss of a node other than the head is not the end.

MEMBER-1 (one judge): the head alone says that a node is lost; whoever loses sight of another tells it. So all agree, and a node that
has only been cut off hears of it, when it can be reached again, and ends (transport, TCP-3).
MEMBER-2 (the head is all): a node that loses the head ends; to the head and the others it is a node that is lost.
MEMBER-3 (whom we start): agents and steps end with the head. Where one of them ends before its nodes are up, the start has failed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

from hpc_ray import _core
from hpc_ray.config import Settings
from hpc_ray.exceptions import ConfigurationError, LaunchError
from hpc_ray.launcher import channel, host, hosts, link, relay, session, world
from hpc_ray.launcher import rank as rank_module
from hpc_ray.launcher.attachment import Attachment
from hpc_ray.transport import Event, Expelled, Joining, PeerLost, tcp

_END_S = 5.0  # for agents, after their nodes have gone

# Payloads between links, beside those of ``link``.
_LOST = b"\x11"  # node 0 → all: a node is lost, and why
_MISSING = b"\x12"  # → node 0: we have lost sight of a node, and why


class Started(NamedTuple):
    """Something of ours that brings up nodes."""

    process: subprocess.Popen[bytes]
    hosts: list[str]
    options: dict[str, Any] | None  # amounts; None: those of all
    request: int  # of whoever holds the control channel; -1: it belongs to the start
    pidfd: int  # readable when it has ended


class Member(rank_module.Rank):
    """One node's life from start to exit code."""

    has_link = True

    def __init__(self, plan: dict[str, Any], control: socket.socket | None):
        self.is_head = "join" not in plan
        self.told = False  # the head has the words for our failure, which is its own
        super().__init__(plan, control)
        self.watchdog.set(self.settings.start_timeout_s + 10, "the node was not up in time (HPC_RAY_START_TIMEOUT_S)")

    def find_place(self) -> world.Rank:
        return world.Rank(0 if self.is_head or self.plan["invited"] else 1, 1, 0, "hpc-ray")

    def run(self) -> int:
        try:
            self.facts = rank_module.facts(0)
            self.ranks = [self.facts]
            self.prepare()
            self.unbind()
            bridge = self.lead() if self.is_head else self.follow()
        except (LaunchError, ConfigurationError, OSError) as error:
            return self._refuse(str(error))
        self.watchdog.set(None)
        code = bridge.run()
        bridge.part()
        self.send_report(code)
        return code

    def _refuse(self, text: str) -> int:
        if self.place.rank and not self.told:
            relay.say(text)
        return super()._refuse(text)

    def release_workers(self) -> None:
        """There are none."""

    def host_of(self, node: int) -> str:
        return str(self.members[node]["host"]) if node in self.members else "?"

    # -- the head

    def lead(self) -> Head:
        self.members: dict[int, dict[str, Any]] = {0: self.facts}
        self.node, self.nodes = 0, self.plan["world"]
        self.session = self.plan["session"]
        self.secret = bytes.fromhex(self.plan["secret"] or secrets.token_hex(tcp.SECRET_BYTES))
        own = self.settings.network_interface
        if own:
            address = host.interface_address(own)
        elif self.plan["virtual"] and not self.plan["join_file"]:
            address = "127.0.0.1"
        else:
            others = [name for launch in self.plan["launches"] for name in launch["hosts"]]
            address = tcp.address_towards(others) or host.first_address() or "127.0.0.1"
        self.listener = tcp.open_listener(address)
        session.sweep()
        # Others start while our node does; the kernel keeps their calls.
        self.invitation = {"session": self.session, "addresses": [self.listener.getsockname()[:2]], "secret": self.secret.hex()}
        started = [self.start(launch["argv"], launch["hosts"], by_stdin=launch["by_stdin"]) for launch in self.plan["launches"]]
        if self.plan["virtual"]:
            started += [self.start_here() for _ in range(self.nodes - 1)]
        if self.plan["join_file"]:
            write_invitation(self.plan["join_file"], self.invitation)
        attachment = self.bring_up(self.nodes if self.plan["virtual"] else 1, 0, self.plan["head_options"])
        self.keep_words(attachment)
        return Head(self, attachment, started)

    def keep_words(self, attachment: Attachment) -> None:
        """Where nobody reads what we print, it goes to the node's logs."""
        if self.plan["detached"]:
            log = os.open(f"{attachment.config.session_dir}/logs/link.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            for standard in (1, 2):
                os.dup2(log, standard)
            os.close(log)

    def start_here(self, options: dict[str, Any] | None = None, request: int = -1) -> Started:
        """A node more on this host."""
        return self.start(world.MEMBER_COMMAND, [socket.gethostname()], options=options, request=request)

    def start(
        self,
        argv: list[str],
        names: list[str],
        *,
        by_stdin: bool = False,
        options: dict[str, Any] | None = None,
        request: int = -1,
    ) -> Started:
        """Starts something that brings up a node on each of these hosts. Raises LaunchError."""
        plan = {**self.plan, "script": None, "report": "", "control": "", "join_file": "", "join": self.invitation}
        plan["launches"] = []
        variables = dict(os.environ) if argv[0] == "srun" else world.under_root(session.scrubbed_environment())
        source = subprocess.DEVNULL
        parent = os.getpid()

        def before_exec() -> None:
            _core.set_parent_death_signal(signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        try:
            if by_stdin:
                plan["variables"] = hosts.passed_variables(variables)
                source = os.memfd_create("hpc_ray-plan")
                os.write(source, json.dumps(plan).encode() + b"\n")
                os.lseek(source, 0, os.SEEK_SET)
            else:
                variables[world.PLAN_VARIABLE] = json.dumps(plan)
            process = subprocess.Popen(
                argv,
                env=variables,
                stdin=source,
                start_new_session=True,
                preexec_fn=before_exec,  # noqa: PLW1509  a link has threads that hold no lock of the interpreter's
            )
        except OSError as error:
            raise LaunchError(f"{argv[0]} cannot be run: {error.strerror}") from None
        finally:
            if source >= 0:
                os.close(source)
        return Started(process, names, options, request, os.pidfd_open(process.pid))

    # -- the others

    def follow(self) -> Follower:
        invitation = self.plan["join"]
        addresses = [(str(name), int(port)) for name, port in invitation["addresses"]]
        own = self.settings.network_interface
        if own and not host.is_address(own):  # an address is the head's
            address = host.interface_address(own)
        else:
            address = tcp.source_towards(addresses[0][0])
        self.listener = tcp.open_listener(address or "127.0.0.1")
        self.secret = bytes.fromhex(invitation["secret"])
        facts = {**self.facts, "session": invitation["session"], "address": self.listener.getsockname()[:2]}
        facts["invited"] = self.plan["invited"]
        connection, welcome = tcp.join(addresses, self.secret, facts, self.settings.start_timeout_s)
        self.session, self.node, self.nodes = invitation["session"], welcome["node"], welcome["nodes"]
        self.members = {0: {"host": welcome["host"]}}
        self.settings = Settings(**welcome["settings"])
        self.plan |= welcome["plan"]
        options = {**welcome["options"], **{name: amount for name, amount in self.plan["own_options"].items() if amount is not None}}
        session.sweep()
        try:
            attachment = self.bring_up(welcome["share"], self.node if welcome["share"] > 1 else 0, options)
        except (LaunchError, ConfigurationError, OSError) as error:
            bridge = Follower(self, None, connection, welcome["peers"])
            bridge.leave(str(error))
            self.told = True
            raise
        self.keep_words(attachment)
        return Follower(self, attachment, connection, welcome["peers"])

    def make_transport(self, bridge: link.Link, communicator: Any = None) -> tcp.TCPTransport:
        return tcp.TCPTransport(
            self.node,
            self.session,
            self.secret,
            self.listener,
            bridge,
            bridge.on_message,
            heartbeat_s=self.settings.heartbeat_s,
            timeout_s=self.settings.heartbeat_timeout_s,
            connect_timeout_s=self.settings.start_timeout_s,
        )


class _Bridge(link.Link):
    """What the links of all nodes have in common."""

    transport: tcp.TCPTransport
    rank: Member

    def __init__(self, rank: Member, attachment: Attachment | None):
        rank.leaders = [0]
        super().__init__(rank, attachment, rank.make_transport)
        if rank.plan["invited"]:
            self.drains = False  # whoever takes our host away does not end the driver, which is elsewhere
            if not rank.plan["detached"]:
                signal.signal(signal.SIGINT, self.on_signal)

    def signs_of_life(self) -> None:
        """The transport's own."""

    def announce(self, note: dict[str, Any]) -> None:
        """To whoever started us."""
        if self.rank.control is not None:
            try:
                channel.send_note(self.rank.control, {"session": self.rank.session, "node": self.node, **note})
            except OSError:
                pass

    def on_control_closed(self) -> None:
        """Of those that go on without whoever started them, too."""
        assert self.rank.control is not None
        if not self.rank.plan["detached"]:
            super().on_control_closed()
            return
        self.rank.control.close()
        self.rank.control = None

    def on_event(self, event: Event) -> None:
        if isinstance(event, Expelled):
            if not self.stopping:
                relay.say(f"node {self.node} on {self.rank.facts['host']} ends: the others go on without it ({event.text})")
                self.stop(event.text, code=1)
        else:
            super().on_event(event)


class Head(_Bridge):
    """Lets nodes in, and says who is lost (MEMBER-1)."""

    def __init__(self, rank: Member, attachment: Attachment, started: list[Started]):
        super().__init__(rank, attachment)
        self.started = started
        self.up: dict[int, dict[str, Any]] = {}  # what nodes have said of themselves
        self.unanswered: set[int] = set()  # requests for a node
        self.announced = False
        self.next_node = 1
        self.deadline = time.monotonic() + rank.settings.start_timeout_s
        for one in started:
            self.awaken_at_end_of(one)
        self.on_up(0, own_words(rank, attachment))

    # -- who comes

    def on_event(self, event: Event) -> None:
        if isinstance(event, Joining):
            problem = self.problem_with(event.facts)
            if problem:
                self.transport.refuse(event.door, problem)
            else:
                self.let_in(event.door, event.facts)
        elif isinstance(event, PeerLost):
            self.declare_lost(event.node, event.text)
        elif isinstance(event, Expelled):  # it has lost sight of us, and ends (MEMBER-2)
            self.declare_lost(event.node, f"it had lost the head: {event.text}")
        else:
            super().on_event(event)

    def problem_with(self, facts: dict[str, Any]) -> str:
        """Why it cannot be one of us; "" if it can."""
        if self.stopping:
            return f"session {self.rank.session} ends just now"
        if facts.get("session") != self.rank.session:
            return f"session {facts.get('session')} is over; here is {self.rank.session}"
        mine = self.rank.facts
        for key, name in (("build", "hpc_ray"), ("protocol", "the protocol of hpc_ray"), ("python", "Python")):
            here, there = str(mine[key]), str(facts.get(key))
            if key == "python":
                here, there = here.rpartition(".")[0], there.rpartition(".")[0]
            if here != there:
                return f"{name} is {here} on {mine['host']} and {there} on {facts.get('host')}: use one environment on all hosts"
        return ""

    def let_in(self, door: int, facts: dict[str, Any]) -> None:
        node, self.next_node = self.next_node, self.next_node + 1
        self.rank.members[node] = facts
        plan, asked = self.rank.plan, self.asked_for(facts)
        if asked is not None and asked.request >= 0:
            self.awaited[node] = ("start", asked.request)
        welcome = {
            "node": node,
            "nodes": max(self.rank.nodes, node + 1),
            "host": self.rank.facts["host"],
            "share": self.rank.nodes if plan["virtual"] and (asked is None or asked.request < 0) else 1,
            "options": self.options_for(facts, asked),
            "settings": plan["settings"],
            "plan": {name: plan[name] for name in ("environment", "python_path", "working_dir", "roles")},
            "peers": [(other, self.rank.members[other]["address"]) for other in self.transport.others()],
        }
        self.transport.admit(door, node, welcome)

    def options_for(self, facts: dict[str, Any], asked: Started | None) -> dict[str, Any]:
        """Amounts: those that were asked for with it, or of all nodes that the session was started with; who was invited says its own."""
        if asked is not None and asked.options is not None:
            return asked.options
        return {} if facts.get("invited") else dict(self.rank.plan["options"])

    def asked_for(self, facts: dict[str, Any]) -> Started | None:
        """Of those on this host: which one it is."""
        for one in self.started:
            if one.process.pid == facts.get("pid") and facts.get("host") == self.rank.facts["host"]:
                return one
        return None

    def answer(self, node: int, note: dict[str, Any]) -> None:
        if "node_id" not in note and "error" not in note and self.awaited.get(node, ("", 0))[0] == "start":
            note = {"error": note.get("text", "it is gone")}
        if "error" in note:
            text = f"node {node} on {self.rank.host_of(node)}: {note['error']}"
            self.transport.forsake(node)
            if not self.announced:
                self.fail_start(text)
            elif node not in self.awaited:
                relay.say(text)
            super().answer(node, {"error": text})
        else:
            if "node_id" in note and node not in self.transport.forsaken:
                self.on_up(node, note)
            super().answer(node, note)

    def on_up(self, node: int, words: dict[str, Any]) -> None:
        self.up[node] = words
        if not self.announced and len(self.up) == self.rank.nodes:
            self.announced = True
            self.show_roster()
            self.announce({"roster": list(self.up.values())})

    def show_roster(self) -> None:
        if self.rank.plan["quiet"]:
            return
        count = len(self.up)
        lines = [f"hpc-ray: session {self.rank.session}, {count} node{'s' if count > 1 else ''} over TCP"]
        lines.append(f"  {'node':>4}  {'CPUs':>5}  {'GPUs':>4}  {'pid':>8}  host")
        for node, words in sorted(self.up.items()):
            lines.append(f"  {node:>4}  {words['cpus']:>5g}  {words['gpus']:>4g}  {words['pid']:>8}  {words['host']}")
        os.write(2, ("\n".join(lines) + "\n").encode())

    # -- who does not come

    def watch(self) -> None:
        super().watch()
        if self.stopping:
            return
        for one in list(self.started):
            code = one.process.poll()
            if code is None:
                continue
            self.started.remove(one)
            os.close(one.pidfd)  # with which it leaves the doorbell, that would ring for ever
            if one.request in self.unanswered:
                if not any(request == one.request for _, request in self.awaited.values()):
                    self.reply(one.request, {"error": f"the node's process ended with {code} before it was let in"})
            elif not self.announced:
                where = ", ".join(one.hosts[:8])
                self.fail_start(f"what started the node on {where} ended with {code} before it was up; see what it printed")
        if not self.announced and not self.stopping and time.monotonic() > self.deadline:
            there = ", ".join(words["host"] for words in self.up.values())
            self.fail_start(
                f"{len(self.up)} of {self.rank.nodes} nodes were up after {self.rank.settings.start_timeout_s:g} s "
                f"(HPC_RAY_START_TIMEOUT_S): {there}. Can the others reach {self.transport.address[0]}? See network_interface"
            )

    def fail_start(self, text: str) -> None:
        self.announced = True
        self.rank.say_refusal(text)
        self.code = 1
        self.stop(text, code=1)

    # -- who is lost

    def declare_lost(self, node: int, text: str) -> None:
        if node in self.transport.forsaken:
            self.transport.lose(node, text)
            return
        if not self.announced:
            self.fail_start(f"node {node} on {self.rank.host_of(node)} is lost: {text}")
        self.on_node_gone(node, text)
        self.transport.lose(node, text)
        self.tell_all(_LOST + json.dumps([node, text]).encode())

    def on_message(self, node: int, source: int, destination: int, data: bytes) -> None:
        if destination == self.address and data[:1] == _MISSING:
            missing, text = json.loads(data[1:])
            if node not in self.transport.forsaken and missing not in self.transport.forsaken:
                self.declare_lost(missing, f"node {node} has lost it: {text}")
            return
        super().on_message(node, source, destination, data)

    # -- more nodes, and the end

    def on_command(self, note: dict[str, Any]) -> None:
        if "start" not in note:
            super().on_command(note)
            return
        try:
            one = self.rank.start_here(note["start"], note["request"])
        except LaunchError as error:
            self.reply(note["request"], {"error": str(error)})
            return
        self.unanswered.add(one.request)
        self.started.append(one)
        self.awaken_at_end_of(one)

    def awaken_at_end_of(self, one: Started) -> None:
        assert self.doorbell is not None
        self.doorbell.add(one.pidfd)

    def reply(self, request: int, note: dict[str, Any]) -> None:
        self.unanswered.discard(request)
        super().reply(request, note)

    def run(self) -> int:
        code = super().run()
        deadline = time.monotonic() + _END_S
        for one in self.started:
            try:
                one.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                world.end_process(one.process, 0.0)
        if self.rank.plan["join_file"]:
            remove_invitation(self.rank.plan["join_file"], self.rank.session)
        return code


class Follower(_Bridge):
    """Any other node's."""

    def __init__(self, rank: Member, attachment: Attachment | None, connection: socket.socket, peers: list[Any]):
        super().__init__(rank, attachment)
        self.transport.adopt(0, connection)
        known = {int(node): (str(address[0]), int(address[1])) for node, address in peers if node}
        for node in range(1, self.node):
            if node in known:
                self.transport.expect(node, [known[node]])
            else:  # it came and went before us
                self.transport.forsake(node)
        if attachment is not None:
            self.say_up(own_words(rank, attachment))
            self.announce({})

    def say_up(self, note: dict[str, Any]) -> None:
        self.tell(0, link.NODE_UP + json.dumps(note).encode())

    def leave(self, error: str) -> None:
        """The node did not come up: the head is told, and that is all."""
        self.say_up({"error": error})
        self.transport.close(link.FINALIZE_S)

    def on_event(self, event: Event) -> None:
        if isinstance(event, PeerLost) and event.node and event.node not in self.transport.forsaken and not self.stopping:
            self.tell(0, _MISSING + json.dumps([event.node, event.text]).encode())  # who judges (MEMBER-1)
            self.transport.forsake(event.node)
        elif isinstance(event, Joining):
            self.transport.refuse(event.door, f"this is node {self.node}, not the head")
        else:
            super().on_event(event)

    def on_message(self, node: int, source: int, destination: int, data: bytes) -> None:
        if destination == self.address and data[:1] == _LOST:
            lost, text = json.loads(data[1:])
            if lost == self.node:
                self.on_event(Expelled(node, text))
            else:
                self.transport.forsake(lost)
                self.transport.lose(lost, text)
            return
        super().on_message(node, source, destination, data)

    def on_node_gone(self, node: int, text: str) -> None:
        if node == 0 and not self.stopping and node not in self.transport.forsaken:
            relay.say(f"node {self.node} on {self.rank.facts['host']} ends: the head is gone ({text})")
        super().on_node_gone(node, text)

    def on_own_node_gone(self, text: str) -> None:
        """All are told, and then there is nothing to stay for."""
        super().on_own_node_gone(text)
        self.stop(text, code=0 if not text or text.startswith(link.ORDERLY) else 1)


def own_words(rank: Member, attachment: Attachment) -> dict[str, Any]:
    """What the roster has of a node, and its id."""
    config = attachment.config
    amounts = {"cpus": config.resources.get("CPU", 0), "gpus": config.resources.get("GPU", 0)}
    return {"node_id": config.node_id, "node": rank.node, "host": config.hostname, "pid": os.getpid(), **amounts}


# ------------------------------------------------------------------ invitations


def write_invitation(path: str, invitation: dict[str, Any]) -> None:
    """The file that others join with: for its owner's eyes only, and whole from the first moment on. Raises LaunchError."""
    path = os.path.abspath(path)
    draft = f"{path}.{secrets.token_hex(4)}"
    try:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, json.dumps(invitation).encode() + b"\n")
        finally:
            os.close(file)
        os.rename(draft, path)
    except OSError as error:
        raise LaunchError(f"the file for nodes that join cannot be written: {path}: {error.strerror}") from None


def read_invitation(path: str) -> dict[str, Any]:
    """Raises LaunchError: there is none, others may read it or have written it, or it is something else."""
    try:
        with open(path) as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}; `hpc-ray start --join-file {path}` writes it") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LaunchError(f"{path} must be yours and readable by nobody else (chmod 600), as it has the session's secret")
    try:
        found: dict[str, Any] = json.loads(text)
        if {"session", "addresses", "secret"} <= set(found):
            return found
    except (ValueError, TypeError):
        pass
    raise LaunchError(f"{path} is no file of `hpc-ray start --join-file`")


def remove_invitation(path: str, name: str) -> None:
    """When the session is over; a newer one of the same name stays."""
    try:
        if read_invitation(path)["session"] == name:
            os.unlink(path)
    except (LaunchError, OSError):
        pass


# ------------------------------------------------------------------ the process


def main(arguments: list[str]) -> int:
    if arguments == ["-"]:
        plan = json.loads(sys.stdin.buffer.readline())
        os.environ.update(plan["variables"])
    else:
        plan = json.loads(os.environ.pop(world.PLAN_VARIABLE))
    control = socket.socket(fileno=int(arguments[0])) if arguments and arguments[0] != "-" else None
    if control is not None:
        control.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Member(plan, control).live("a link ends")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)

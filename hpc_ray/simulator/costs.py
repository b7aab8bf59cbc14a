"""What things take: seconds that pass, and seconds of a core."""

from __future__ import annotations

import msgspec


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that things take. The defaults are of the order measured on the reference machine."""

    lane_s: float = 10e-6  # a message on a node
    network_s: float = 40e-6  # and one between nodes
    jitter: float = 1.0  # latencies are drawn from once to (1 + jitter) times
    launch_s: float = 0.0  # until the launcher has started the nodes' processes; this and the next one with prices
    boot_s: float = 0.0  # work of a node before it registers
    fork_s: float = 0.002
    worker_start_s: float = 0.01
    reap_s: float = 0.0005
    detect_s: float = 0.1  # until it is known that a node is gone: to the GCS; with prices, to the node's link
    bytes_per_s: float = 5e9


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a core that things take, as measured. A price of the deciding halves is for one event or action and depends on
    how many nodes there are: it is ``[[nodes, seconds], …]``, and lies on straight lines between."""

    events: dict[str, dict[str, list[list[float]]]] = {}  # role ("gcs", "raylet") → class of event → price
    turn_s: float = 0.0  # a role looks at its lane
    receive_s: float = 0.0  # takes a message from it and decodes it
    receive_byte_s: float = 0.0
    encode_s: float = 0.0
    encode_byte_s: float = 0.0
    send_s: float = 0.0  # puts a message into a lane
    send_byte_s: float = 0.0
    wake_s: float = 0.0  # a process that slept runs again: so much of a core, before anything else
    cold_s: float = 0.0  # and so much more where others have had the cores since it last ran: its caches are theirs
    idle_s: float = 0.0  # and so much more where nobody has had them for long: the machine itself has gone to sleep
    awake_s: float = 6e-3  # after so much work it is by a factor of e less so
    stale_s: float = 0.0  # and so much more where the process itself has slept as long
    code_s: float = 0.0  # and so much more where nobody of its kind has run as long: its code is in no cache
    commit_s: float = 0.0  # the GCS's journal takes what one event has changed
    link_turn_s: float = 0.0  # a link looks at its lane and at MPI
    link_wake_s: float = 0.0  # as wake_s, of a link
    link_out_s: float = 0.0  # and takes a message out of the node
    link_in_s: float = 0.0  # or into it
    ring_s: float = 0.0  # wakes another one, where they have been quiet
    link_chunk_s: float = 0.0  # what goes to one node at once, at either end
    link_byte_s: float = 0.0  # of objects, at the receiving end
    submit_s: float = 0.0  # an owner makes and sends a task
    reply_s: float = 0.0  # and takes its result
    task_s: float = 0.0  # a worker runs a task that does nothing
    create_s: float = 0.0  # an owner makes an actor, and hears of it
    actor_s: float = 0.0  # a worker becomes an actor that does nothing in its constructor
    exit_s: float = 0.0  # the kernel takes apart a process that was killed

    def event_s(self, role: str, name: str, nodes: int) -> float:
        points = self.events.get(role, {}).get(name) or self.events.get(role, {}).get("other")
        if not points:
            return 0.0
        below = points[0]
        for point in points:
            if point[0] >= nodes:
                share = (nodes - below[0]) / (point[0] - below[0]) if point[0] > below[0] else 0.0
                return below[1] + share * (point[1] - below[1])
            below = point
        return below[1]

"""Every message of the runtime, declared once.

A message is a frozen struct; on the wire it is a MessagePack array that starts with the tag. Grouped by direction; each
class says sender → receiver, what it means, and what answers it. Addresses are the integers of ``ids.address_of``;
ids are raw bytes; amounts of resources are fixed-point integers, ``UNIT`` = 1.0.

PROTO-1 (one handler): each message class is handled by exactly one method per receiving role (a test checks it).
PROTO-2 (attempts): whatever can be tried again carries the number of the attempt, so a late answer is recognised.
PROTO-3 (order): two messages from one process to another arrive in the order they were sent, and a death notice
arrives after everything its subject sent. Nothing is promised about messages of different senders.
"""

from __future__ import annotations

import enum
from typing import Any, Union

import msgspec

VERSION = 1
UNIT = 10_000  # fixed-point scale of resource amounts

Resources = dict[str, int]


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of everything that travels."""


# ------------------------------------------------------------------ parts of messages


class ProcessKind(enum.IntEnum):
    WORKER = 0
    DRIVER = 1
    RAYLET = 2
    GCS = 3
    LINK = 4
    RANK = 5  # of a gang's job step


class Strategy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a task or actor may run. ``kind``: "DEFAULT", "SPREAD", "NODE", "LABELS"; a placement group is expressed
    through its resource names (see ``bundle_resources``) and needs no kind of its own."""

    kind: str = "DEFAULT"
    node_id: bytes = b""  # NODE: the 28-byte id wanted
    soft: bool = False  # NODE: another node will do
    hard_labels: dict[str, Any] = {}  # LABELS: label → operator and values, as in util.scheduling_strategies
    soft_labels: dict[str, Any] = {}
    fallbacks: list[dict[str, Any]] = []  # LABELS: other conditions, the first preferred, where hard_labels lead nowhere


class Shape(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a lease must offer. Tasks of equal shape share leases."""

    resources: Resources
    job_id: bytes
    strategy: Strategy
    runtime_env: str = ""  # JSON, canonical; "" = the plain worker
    group_id: bytes = b""  # placement group whose bundle is used, to be told when it is removed
    bundle: int = -1
    capture_children: bool = False


class Gang(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The MPI ranks that a task or an actor has."""

    ranks: int
    each: Resources  # of a rank
    gpus: float = 0  # of a rank
    per_node: int = 0  # ranks on each node; 0: as few nodes as have room
    single: bool = False  # one rank, whose result is not in a list
    spread: bool = False  # on several nodes, in a placement group of its own
    even: bool = False  # without ``per_node``: rather many nodes than few
    labels: dict[str, Any] = {}  # that the nodes must have


class LeaseRefusal(enum.IntEnum):
    UNSCHEDULABLE = 0  # e.g. hard affinity to a node that is gone
    GROUP_REMOVED = 1
    RUNTIME_ENV = 2  # setting up the environment failed
    CANCELLED = 3


class ResultKind(enum.IntEnum):
    INLINE = 0  # payload = the serialised value
    ARENA = 1  # the value lies in the arena of ``node`` under ``handle``
    ERROR = 2  # payload = a serialised exception; get raises it


class Result(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The value of one object, or where it is."""

    kind: int
    payload: bytes = b""
    node: int = 0
    handle: int = 0
    size: int = 0  # bytes, serialised
    contained: list[bytes] = []  # ids of references inside the value


class Dependency(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A top-level reference among the arguments, with its value as known to the submitter."""

    object_id: bytes
    result: Result
    slot: int | str  # which argument: a position, a keyword, or ALL_ARGUMENTS
    places: list[list[int]] = []  # [[node, handle], …] for ARENA


ALL_ARGUMENTS = -1  # slot of a dependency that holds the whole (args, kwargs)


def short_name(qualified: str) -> str:
    """A class's name without those of what it was defined in."""
    return qualified.rpartition(".")[2]


class ActorSpec(msgspec.Struct, frozen=True, array_like=True):
    """All that is needed to make an actor, again if it must be."""

    actor_id: bytes
    class_name: str
    class_id: bytes
    class_blob: bytes
    arguments: bytes  # serialised (args, kwargs)
    dependencies: list[Dependency]
    contained: list[bytes]
    shape: Shape  # held for the whole life
    placement: Resources  # needed to be placed; the difference to shape.resources is given back (Ray: 1 CPU)
    owner: int  # address; when it dies the actor goes, unless detached
    job_id: bytes
    name: str = ""
    namespace: str = ""
    detached: bool = False
    max_restarts: int = 0  # -1: for ever
    max_task_retries: int = 0
    max_concurrency: int = 1
    concurrency_groups: dict[str, int] = {}
    is_async: bool = False
    out_of_order: bool = False
    max_pending_calls: int = -1
    handle: bytes = b""  # serialised handle, given to whoever finds the actor by name
    creation_task_id: bytes = b""
    call_site: str = ""
    logging: str = ""  # LoggingConfig as JSON
    gang: Gang | None = None
    program_namespace: str = ""  # of the job, where the actor itself looks for names and makes named actors
    recorded: bool = True  # in what list_tasks and timeline show

    @property
    def short_name(self) -> str:
        return short_name(self.class_name)


class ActorState(enum.IntEnum):
    """Life of an actor at the GCS; DEAD is final."""

    DEPENDENCIES_UNREADY = 0
    PENDING_CREATION = 1
    ALIVE = 2
    RESTARTING = 3
    DEAD = 4


class DeathCause(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why a process or an actor is gone, for the error that its waiters get."""

    kind: str  # CRASHED, KILLED, EXITED, INIT_FAILED, NODE_DIED, OWNER_DIED, OUT_OF_SCOPE, UNSCHEDULABLE, GROUP_REMOVED, RUNTIME_ENV, OOM
    text: str = ""
    error: bytes = b""  # serialised exception, where there is one
    node_id: bytes = b""
    pid: int = 0


class ActorInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the GCS says about an actor."""

    actor_id: bytes
    state: int
    address: int = 0  # while ALIVE
    attempt: int = 0  # counts (re)starts; a new one means a new process
    node_id: bytes = b""
    pid: int = 0
    restarts_left: int = 0  # -1: for ever
    cause: DeathCause | None = None
    class_name: str = ""
    name: str = ""
    namespace: str = ""
    stopping: bool = False  # all handles that own it are gone: it takes no more calls, and DEAD follows


class NodeInfo(msgspec.Struct, frozen=True, array_like=True):
    """A node as the GCS knows it."""

    node_id: bytes
    index: int
    hostname: str
    ip: str
    pid: int
    total: Resources
    available: Resources
    labels: dict[str, str]
    alive: bool = True
    is_head: bool = False
    arena_bytes: int = 0
    death: str = ""
    pending: list[Resources] = []  # shapes that wait for room there


class CallRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One attempt of a task or an actor's call, as its submitter knows it. Times are ns of the epoch; 0: not yet."""

    task_id: bytes
    attempt: int
    kind: str  # NORMAL_TASK, ACTOR_TASK
    name: str
    function: str
    state: str  # PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT, SUBMITTED_TO_WORKER, FINISHED, FAILED
    parent: bytes  # task that made the call; empty: the driver
    actor_id: bytes
    worker: int  # address of the process that has or had it; 0: none
    pid: int
    created: int
    sent: int
    ended: int
    error_type: str = ""
    error_text: str = ""
    resources: Resources = {}
    group_id: bytes = b""
    runtime_env: str = ""


class RunRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One attempt as the process that ran it knows it. Times are ns of the epoch; 0: not yet, or never."""

    task_id: bytes
    attempt: int
    kind: str  # NORMAL_TASK, ACTOR_CREATION_TASK, ACTOR_TASK
    name: str
    function: str
    state: str  # RUNNING, RUNNING_IN_RAY_GET, RUNNING_IN_RAY_WAIT, FINISHED, FAILED
    actor_id: bytes
    started: int
    called: int  # the arguments were there
    returned: int  # the user's code was done
    ended: int  # the results were packed


class SpanRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A span of user code, named by ``util.profiling.profile``. Times are ns of the epoch."""

    name: str
    task_id: bytes
    started: int
    ended: int
    extra: dict[str, Any]


class History(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one process remembers of tasks."""

    worker_id: bytes
    address: int
    pid: int
    is_driver: bool
    calls: list[CallRow]
    runs: list[RunRow]
    spans: list[SpanRow]


class ObjectRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An object, as one of the processes that refer to it knows it."""

    object_id: bytes
    size: int  # bytes; -1: not known
    task_status: str
    attempt: int
    reference: str  # LOCAL_REFERENCE, PINNED_IN_MEMORY, USED_BY_PENDING_TASK, CAPTURED_IN_OBJECT, ACTOR_HANDLE


# ------------------------------------------------------------------ any process → its raylet, and back


class ProcessStarted(Message, tag=1):
    """worker, driver, link → raylet: I have opened my lane. Answer: Welcome."""

    kind: int
    worker_id: bytes
    pid: int
    token: int  # the StartWorker this answers; 0 for processes nobody asked for
    version: int = VERSION
    build: str = ""  # version of the package


class Welcome(Message, tag=2):
    """raylet → process: you are registered."""

    node_id: bytes
    node: int
    ip: str
    session: str  # name of the session
    session_dir: str
    config: dict[str, Any]
    refusal: str = ""  # why not, where the process cannot stay


class ProcessLeaving(Message, tag=3):
    """worker, driver → raylet: an orderly exit follows; not a crash."""

    reason: str = ""


class StayingOn(Message, tag=29):
    """worker → raylet: I take no more tasks, but others use objects that I own; I leave when they do not any more."""


class LeaveHistory(Message, tag=9):
    """worker, driver → raylet, ahead of ProcessLeaving: keep this for those who list tasks."""

    rows: int
    history: bytes  # a packed History


class ProcessDied(Message, tag=4):
    """raylet → every process of its node, and → GCS; GCS → raylets of other nodes. No answer."""

    address: int
    worker_id: bytes
    pid: int
    kind: int
    cause: DeathCause


class NodeDied(Message, tag=5):
    """GCS → raylets → every process: all that lived on this node is gone."""

    node: int
    node_id: bytes
    text: str


class Deaths(Message, tag=63):
    """GCS → raylets: all of these, as if told one by one. Those of processes on the receiver's own node do not count."""

    nodes: list[NodeDied]
    processes: list[ProcessDied]


class Shutdown(Message, tag=6):
    """driver or launcher → GCS → raylets → processes: the session ends; leave in order now. raylet → worker: you are not needed
    any more."""

    reason: str = ""
    keep_history: bool = False  # the session goes on: send LeaveHistory
    unless_used: bool = False  # of an idle worker: others may use objects that it owns; then it stays as long, and says StayingOn


class EnvironmentFailed(Message, tag=7):
    """worker → raylet: my runtime environment cannot be made; instead of ProcessStarted, and I leave. Whoever waits for such
    a worker gets the text."""

    token: int  # of the StartWorker
    text: str


class InstallEnvironment(Message, tag=8):
    """driver → raylets: workers of this environment will be wanted; have it made."""

    runtime_env: str


# ------------------------------------------------------------------ owner ↔ raylet: leases


class RequestLease(Message, tag=10):
    """owner → raylet: I could use ``count`` (more) workers of this shape. Answers: LeaseGranted, LeaseRedirected or
    LeaseRefused, one for each unit of count, over time."""

    request_id: int
    shape: Shape
    count: int
    redirected: bool = False  # came by a redirect: queue or grant here, unless impossible here


class ResizeLeaseRequest(Message, tag=11):
    """owner → raylet: the count still wanted is now this; 0 cancels. To want more, repeat RequestLease under its number:
    that stays right when grants are under way."""

    request_id: int
    count: int


class LeaseGranted(Message, tag=12):
    """raylet → owner: this worker is yours until ReturnLease."""

    request_id: int
    lease_id: int
    worker: int
    worker_id: bytes
    pid: int
    instances: dict[str, list[list[int]]]  # GPU → [[index, amount], …]


class LeaseRedirected(Message, tag=13):
    """raylet → owner: ask that node instead, for so many units."""

    request_id: int
    node: int
    count: int = 1


class LeaseRefused(Message, tag=14):
    """raylet → owner: this shape will never be had; all of the request's count is void."""

    request_id: int
    reason: int
    text: str


class LeaseContended(Message, tag=15):
    """raylet → lease holders: others wait; give back what you do not need, and share."""


class ReturnLease(Message, tag=16):
    """owner → raylet: I am done with the worker. ``reusable`` False: retire it (max_calls, broken)."""

    lease_id: int
    reusable: bool = True


class WorkerBlocked(Message, tag=17):
    """worker → raylet: my task waits for objects, so its CPUs are free meanwhile."""


class WorkerUnblocked(Message, tag=18):
    """worker → raylet: it goes on and takes its CPUs back, even if that overcommits for a while."""


class LeaseRevoked(Message, tag=19):
    """raylet → owner: the leased worker died or was taken (node drained, group removed)."""

    lease_id: int
    cause: DeathCause


# ------------------------------------------------------------------ owner ↔ worker: tasks


class ExportFunction(Message, tag=20):
    """caller → worker: the pickled function (or actor class) behind an id; sent once, ahead of its first use."""

    function_id: bytes
    blob: bytes


class PushTask(Message, tag=21):
    """caller → leased worker or actor: run this. Answer: TaskReply."""

    task_id: bytes
    attempt: int
    function_id: bytes  # of the function, or of the actor's class
    name: str  # the method's name for actors, else the task's
    arguments: bytes  # serialised (args, kwargs); top-level references replaced by dependencies
    dependencies: list[Dependency]
    num_returns: int  # -1: streaming, -2: dynamic
    actor_id: bytes = b""
    extras: bytes = b""  # serialised dict of rare things: concurrency_group, retry_exceptions, max_calls
    lease_id: int = 0
    depth: int = 0  # how deep in nested tasks, for recursive cancel


class TaskReply(Message, tag=22):
    """worker → caller: the results, one for each return."""

    task_id: bytes
    attempt: int
    results: list[Result]
    nanoseconds: int  # run time of the user's code
    retryable: bool = False  # failed with an exception that asks for a retry
    retiring: bool = False  # the worker takes no more tasks (max_calls)


class TaskItem(Message, tag=23):
    """worker → caller: one more item of a streaming task. Answer: ItemsConsumed when flow is limited."""

    task_id: bytes
    attempt: int
    index: int
    result: Result


class ItemsConsumed(Message, tag=24):
    """caller → worker: the consumer has taken this many; -1: it wants no more."""

    task_id: bytes
    count: int


class StealTasks(Message, tag=25):
    """owner → worker: give back what you have not started. Answer: TasksStolen."""

    lease_id: int


class TasksStolen(Message, tag=26):
    """worker → owner: these were not started and will not be (``task ids``)."""

    lease_id: int
    task_ids: list[bytes]


class CancelTask(Message, tag=27):
    """owner → worker or actor: stop this task. Answer: the TaskReply with TaskCancelledError."""

    task_id: bytes
    attempt: int
    force: bool
    recursive: bool


class UseLease(Message, tag=28):
    """owner → leased worker: what the tasks of this lease may use; sent once, ahead of the first of them."""

    lease_id: int
    shape: Shape
    namespace: str
    instances: dict[str, list[list[int]]]
    logging: str = ""  # LoggingConfig as JSON


# ------------------------------------------------------------------ process ↔ owner: objects and references


class GetObject(Message, tag=30):
    """borrower → owner: tell me the value or its place once there is one. Answer: ObjectReady."""

    object_id: bytes
    value: bool = True  # False: only that it is ready


class ObjectReady(Message, tag=31):
    """owner → borrower."""

    object_id: bytes
    result: Result
    places: list[list[int]] = []  # [[node, handle], …] for ARENA


class AddBorrower(Message, tag=32):
    """a process that was lent a reference → owner: ``borrower`` (the sender, or whom it passed the reference to) holds
    it from now on. Answer if ``acknowledge``: BorrowerAdded to the sender, who ends its loan only then."""

    object_id: bytes
    borrower: int
    acknowledge: bool = False


class BorrowerAdded(Message, tag=33):
    """owner → sender of AddBorrower."""

    object_id: bytes


class RemoveBorrower(Message, tag=34):
    """borrower → owner: my last reference is gone; it takes back ``count`` additions. May overtake AddBorrower."""

    object_id: bytes
    count: int


class ObjectLostAt(Message, tag=35):
    """reader → owner: the copy that you named on this node is not there any more. Answer: ObjectReady."""

    object_id: bytes
    node: int


class AddPlace(Message, tag=36):
    """raylet → owner: this node holds a copy as well."""

    object_id: bytes
    node: int
    handle: int


class DeleteCopies(Message, tag=37):
    """owner → raylet of another node: free these (handles in its arena)."""

    handles: list[int]


class OrphanedObject(Message, tag=38):
    """raylet → owner: a dead worker left this sealed and perhaps unannounced; free it if you do not know it."""

    object_id: bytes
    handle: int


class FreeObject(Message, tag=39):
    """borrower → owner: drop the value now, whoever still refers to it."""

    object_id: bytes


class CancelOwned(Message, tag=64):
    """borrower → owner: stop the task or call of yours whose result I have. No answer: who asks for the result is told."""

    task_id: bytes
    force: bool
    recursive: bool


# ------------------------------------------------------------------ process ↔ raylet ↔ link: copies between nodes


class PullObject(Message, tag=40):
    """process → own raylet: I need a copy here. Answer: ObjectLocal or PullFailed."""

    object_id: bytes
    size: int
    places: list[list[int]]


class ObjectLocal(Message, tag=41):
    """raylet → process: it is here. Told to its owner, it says as well what AddPlace says."""

    object_id: bytes
    handle: int


class PullFailed(Message, tag=42):
    """raylet → process."""

    object_id: bytes
    node: int  # which place had nothing
    text: str


class TransferObject(Message, tag=43):
    """raylet → own link: fetch from there into this block of the arena. Answer: TransferDone."""

    transfer_id: int
    object_id: bytes
    source_node: int
    source_handle: int
    handle: int
    size: int


class TransferDone(Message, tag=44):
    """link → own raylet."""

    transfer_id: int
    error: str = ""


class RequestCopy(Message, tag=47):
    """raylet → raylet of another node: may my link fetch this from you? Answer: CopyOffered, when it is its turn; and it says
    CopyEnded when it is done."""

    transfer_id: int
    object_id: bytes
    handle: int  # in the arena of the asked


class CopyOffered(Message, tag=48):
    """raylet → raylet of another node: fetch it now; or, where ``node`` is not the sender, ask there: it has had its copy from us."""

    transfer_id: int
    node: int
    handle: int


class CopyEnded(Message, tag=49):
    """raylet → raylet of another node: our link does not fetch this from you any more. No answer."""

    object_id: bytes
    handle: int  # of the copy that the sender has now; 0: none


class ArenaFullNotice(Message, tag=45):
    """process → raylet: I need this many bytes and there is no room; spill. Answer: ArenaRoom."""

    request_id: int
    size: int


class ArenaRoom(Message, tag=46):
    """raylet → process: try again, or, ``on_disk``, write a file; ``error``, of this class, says why it is hopeless."""

    request_id: int
    error: str = ""
    error_kind: str = ""
    on_disk: bool = False


# ------------------------------------------------------------------ process ↔ GCS: actors, names, jobs, keys


class CreateActor(Message, tag=50):
    """owner → GCS: make this actor. Answer: ActorCreated at once, then ActorUpdate as things happen. ``unready``: when ActorArguments
    has come."""

    request_id: int
    spec: ActorSpec
    get_if_exists: bool = False
    unready: bool = False


class ActorArguments(Message, tag=102):
    """owner → GCS: what the constructor's arguments depend on is ready (see CreateActor)."""

    actor_id: bytes
    dependencies: list[Dependency]


class ActorCreated(Message, tag=51):
    """GCS → owner: accepted (journalled). ``error``: e.g. the name is taken; ``existing``: found by get_if_exists."""

    request_id: int
    error: str = ""
    existing: bytes = b""  # serialised handle


class SubscribeActor(Message, tag=52):
    """holder of a handle → GCS: send me ActorUpdate now and at each change."""

    actor_id: bytes


class ActorUpdate(Message, tag=53):
    """GCS → subscribers."""

    info: ActorInfo


class KillActor(Message, tag=54):
    """anyone → GCS: end it at once; restart only if allowed and ``no_restart`` is False."""

    actor_id: bytes
    no_restart: bool = True


class ActorOutOfScope(Message, tag=55):
    """owner → GCS: no handle is left; end it after the calls it already has."""

    actor_id: bytes


class GetNamedActor(Message, tag=56):
    """any → GCS. Answer: NamedActor."""

    request_id: int
    name: str
    namespace: str


class NamedActor(Message, tag=57):
    """GCS → asker; ``handle`` empty: there is none."""

    request_id: int
    handle: bytes
    info: ActorInfo | None = None


class RegisterJob(Message, tag=58):
    """driver → GCS: a new program. Answer: JobRegistered."""

    request_id: int
    driver: int
    pid: int
    entrypoint: str
    namespace: str
    config: dict[str, Any]


class JobRegistered(Message, tag=59):
    """GCS → driver."""

    request_id: int
    job_id: bytes


class FinishJob(Message, tag=60):
    """driver → GCS: the program is over; its actors go, its detached ones stay."""

    job_id: bytes


class Query(Message, tag=61):
    """any → GCS, raylet, worker or driver: a question (``nodes``, ``kv_get``, ``list_actors`` …) with arguments by name.
    Answer: Answer. The names are the ``query_…`` methods of the role's state; of workers and drivers, ``Records.questions``."""

    request_id: int
    name: str
    arguments: dict[str, Any]


class Answer(Message, tag=62):
    """GCS or raylet → asker."""

    request_id: int
    value: Any
    error: str = ""
    error_kind: str = ""  # name of an exception class in ``exceptions`` or of a built-in


# ------------------------------------------------------------------ GCS ↔ raylet


class RegisterNode(Message, tag=70):
    """raylet → GCS: here I am. Answer: NodeRegistered, then ClusterView at changes."""

    info: NodeInfo
    version: int = VERSION
    build: str = ""


class NodeRegistered(Message, tag=71):
    """GCS → raylet. ``refusal``: why the node cannot join."""

    refusal: str = ""


class ReportResources(Message, tag=72):
    """raylet → GCS: what is free here now and what waits; sent when it changed, at most every 100 ms."""

    node: int
    sequence: int
    total: Resources
    available: Resources
    pending: list[Resources] = []


class DrainNode(Message, tag=101):
    """anyone → raylet: leave the session, if nothing is lost by it. Answer: Answer with "", or with what the node is needed for."""

    request_id: int
    reason: str = ""


class SetResources(Message, tag=96):
    """GCS → raylet: have these amounts and labels from now on; ``without``: and none of these resources. What is not mentioned is
    as the node was configured. Answered by ResourcesSet."""

    resources: Resources
    labels: dict[str, str]
    without: list[str] = []
    object_store_memory: int = 0  # bytes that objects may fill, of those that the node was launched with; 0: all


class ResourcesSet(Message, tag=97):
    """raylet → GCS: the node has them; a ReportResources went before this."""

    node: int
    labels: dict[str, str]


class ClusterView(Message, tag=73):
    """GCS → raylets: nodes that changed. Where there are many, a raylet passes it on to others."""

    nodes: list[NodeInfo]
    number: int = 0  # grows; an earlier one may come later
    then: list[int] = []  # nodes that the receiver shall tell


class StartActor(Message, tag=74):
    """GCS → raylet: lease a worker for good and make the actor there. Answers: ActorStarting or ActorRejected;
    then ActorReady or ActorInitFailed from the worker itself."""

    attempt: int
    spec: ActorSpec


class ActorRejected(Message, tag=75):
    """raylet → GCS: not here (no room any more; environment failed: ``cause`` says so and it is final)."""

    actor_id: bytes
    attempt: int
    cause: DeathCause | None = None


class ActorStarting(Message, tag=76):
    """raylet → GCS: a worker has it."""

    actor_id: bytes
    attempt: int
    address: int
    pid: int


class InstallActor(Message, tag=77):
    """raylet → worker: become this actor."""

    attempt: int
    spec: ActorSpec
    instances: dict[str, list[list[int]]]


class ActorReady(Message, tag=78):
    """worker → GCS: __init__ is done."""

    actor_id: bytes
    attempt: int
    address: int


class ActorInitFailed(Message, tag=79):
    """worker → GCS: __init__ raised."""

    actor_id: bytes
    attempt: int
    cause: DeathCause


class ActorFailed(Message, tag=100):
    """worker → GCS: the actor's process cannot go on, and why; end it as if it had crashed. Answer: none, it is ended."""

    actor_id: bytes
    attempt: int
    text: str


class StopActor(Message, tag=80):
    """GCS → raylet: end that worker. ``force``: by SIGKILL; otherwise after the calls it already has."""

    actor_id: bytes
    attempt: int
    force: bool
    reason: str


class TerminateActor(Message, tag=81):
    """raylet → actor: finish what you have, then leave."""

    reason: str


class JobFinished(Message, tag=82):
    """GCS → raylets: end the job's idle workers, what the driver leases, and its lease requests. What detached actors
    lease goes on; what the driver's tasks leased goes with those."""

    job_id: bytes
    driver: int = 0


class PrepareBundles(Message, tag=83):
    """GCS → raylet: set these bundles aside (first phase). Answer: BundlesPrepared."""

    group_id: bytes
    attempt: int
    bundles: dict[int, Resources]


class BundlesPrepared(Message, tag=84):
    """raylet → GCS."""

    group_id: bytes
    attempt: int
    node: int
    ok: bool


class CommitBundles(Message, tag=85):
    """GCS → raylet: they are final; their resource names may be used."""

    group_id: bytes
    attempt: int


class ReleaseBundles(Message, tag=86):
    """GCS → raylet: give them back; ``attempt`` -1: all of the group. With ``kill``, whoever runs in them ends."""

    group_id: bytes
    attempt: int
    kill: bool = True


class GroupRemoved(Message, tag=87):
    """GCS → raylets, also those without a bundle of it: refuse whoever waits for this group."""

    group_id: bytes


# ------------------------------------------------------------------ raylet ↔ fork server, fork server → drivers


class StartWorker(Message, tag=90):
    """raylet → fork server: fork a worker. Answer: WorkerForked, later ProcessExited."""

    token: int
    runtime_env: str
    environment: dict[str, str]  # variables to set, e.g. CUDA_VISIBLE_DEVICES


class WorkerForked(Message, tag=91):
    """fork server → raylet. ``pid`` 0: it failed and ``error`` says why."""

    token: int
    pid: int
    error: str = ""


class KillProcess(Message, tag=92):
    """raylet → fork server: send this signal."""

    pid: int
    signal: int


ENDED_BY_MPIRUN = -1  # a status


class ProcessExited(Message, tag=93):
    """fork server → raylet: a worker was reaped (``status`` as of waitpid), or somebody who attached is gone (address and kind; the status
    of a rank, or ENDED_BY_MPIRUN; for others 0)."""

    pid: int
    status: int
    kind: int = 0
    address: int = 0


class LogLines(Message, tag=94):
    """fork server → drivers: what a worker printed."""

    pid: int
    name: str  # task or actor that printed
    ip: str
    job_id: bytes
    is_error: bool
    lines: list[str]


class Values(Message, tag=110):
    """process → process, both in one compiled graph or collective group: values for it. Answer: none."""

    inbox: bytes  # which graph or group, at the receiver
    number: int  # graph: of the execution; group: see util.collective.members
    values: list[Dependency]  # slot: graph: which value; group: the sender's rank


class RankHere(Message, tag=98):
    """rank of a gang → worker that leads it: once when it has attached to its node, and once when it can be called (``number`` is no
    longer -1) or cannot (``error``). Answer: none."""

    step: int  # which of those that this worker has started
    pid: int
    worker_id: bytes
    number: int = -1  # its rank
    hostname: str = ""
    files: list[str] = []  # in shared memory, which MPI removes only if it is finalized
    error: str = ""


class LeaveGang(Message, tag=99):
    """worker → rank of its gang: no more calls come; finalize MPI and go, or go ``at_once``. Answer: none."""

    at_once: bool = False


class FollowLogs(Message, tag=95):
    """driver → fork server of each node (through the raylets): send me LogLines of this job; or no more: then each node
    sends what there is, and last LogLines without lines."""

    driver: int
    job_id: bytes
    on: bool


# ------------------------------------------------------------------ codec

ALL_MESSAGES: tuple[type[Message], ...] = tuple(
    sorted(Message.__subclasses__(), key=lambda cls: cls.__struct_config__.tag)  # type: ignore[arg-type, return-value]
)

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
"""Bytes of a message."""

pack = encode
"""Bytes of a part of a message that those in between need not read."""

_decoder = msgspec.msgpack.Decoder(Union[ALL_MESSAGES])  # noqa: UP007 (made from a tuple)
decode = _decoder.decode
"""The message in some bytes; ``msgspec.ValidationError`` if it is none."""

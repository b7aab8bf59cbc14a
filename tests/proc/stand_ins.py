"""The smallest raylet, GCS and worker that the launcher's tests need; named to a node through its ROLES.

A stand-in raylet welcomes whoever says ProcessStarted, starts ``prestart_workers`` workers, passes FollowLogs on, and answers
Query: "pids" (of gcs, raylet, workers by token), "start", "kill", "exits" (statuses seen), "run" (a Python text in a worker).
"""

import os
import signal
import sys

from hpc_ray import worker_log
from hpc_ray.ids import GCS_LANE, RAYLET_LANE
from hpc_ray.protocol import (
    Answer,
    FollowLogs,
    KillProcess,
    ProcessExited,
    ProcessStarted,
    Query,
    Shutdown,
    StartWorker,
    Welcome,
    WorkerForked,
    decode,
    encode,
)

ROLES = {"gcs": "stand_ins:gcs", "raylet": "stand_ins:raylet", "worker": "stand_ins:worker"}


def gcs(segment, config):
    if config.environment.get("STAND_IN_GCS") == "crash":
        sys.exit("no journal, says the stand-in")
    lane = segment.open_lane(GCS_LANE)
    while True:
        for source, data in lane.receive(None):
            message = decode(data)
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Query):
                lane.send(source, encode(Answer(message.request_id, os.getpid())))


def raylet(segment, config, connection):
    lane = segment.open_lane(RAYLET_LANE)
    workers, forked, exits, waiting = {}, {}, [], []
    for token in range(max(0, config.settings.prestart_workers)):
        connection.send(encode(StartWorker(token + 1, "", {})))
    while True:
        for source, data in lane.receive(None):
            message = decode(data)
            if isinstance(message, Shutdown):
                return
            elif isinstance(message, ProcessStarted):
                if message.token:
                    workers[message.token] = source
                welcome = Welcome(bytes.fromhex(config.node_id), config.node, config.ip, config.session, "", {})
                lane.send(source, encode(welcome))
            elif isinstance(message, FollowLogs):
                connection.send(data)
            elif isinstance(message, WorkerForked):
                forked[message.token] = message.pid
            elif isinstance(message, ProcessExited):
                exits.append([message.pid, message.status, message.kind, message.address])
                if message.address:
                    segment.mark_dead(message.address)
                    segment.reclaim(message.address)
            elif isinstance(message, Query):
                waiting.append((source, message))
            elif isinstance(message, Answer):
                lane.send(message.value[0], encode(Answer(message.value[1], message.value[2])))
        for source, query in list(waiting):
            value = None
            if query.name == "start":
                connection.send(encode(StartWorker(query.arguments["token"], "", query.arguments.get("env", {}))))
                value = True
            elif query.name == "kill":
                connection.send(encode(KillProcess(query.arguments["pid"], query.arguments["signal"])))
                value = True
            elif query.name == "pids" and len(workers) >= query.arguments["workers"] and len(forked) >= len(workers):
                value = {"raylet": os.getpid(), "workers": {str(token): forked[token] for token in workers}}
            elif query.name == "exits" and len(exits) >= query.arguments["count"]:
                value = exits
            elif query.name == "run":
                arguments = dict(query.arguments, source=source, request_id=query.request_id)
                lane.send(workers[query.arguments["token"]], encode(Query(0, "run", arguments)))
                waiting.remove((source, query))
                continue
            if value is not None:
                waiting.remove((source, query))
                lane.send(source, encode(Answer(query.request_id, value)))


def worker(segment, config, token):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lane = segment.open_lane()
    target = config.node << 48
    lane.send(target, encode(ProcessStarted(0, os.urandom(28), os.getpid(), token)))
    while True:
        for source, data in lane.receive(None):
            message = decode(data)
            if not isinstance(message, Query):
                continue
            arguments = message.arguments
            mark = worker_log.mark(arguments.get("name", "task"), bytes.fromhex(arguments.get("job", "01000000")))
            for fd in (1, 2):
                os.write(fd, mark)
            space = {"lane": lane, "os": os, "sys": sys, "config": config}
            exec(arguments["code"], space)
            sys.stdout.flush()
            lane.send(source, encode(Answer(0, [arguments["source"], arguments["request_id"], space.get("answer")])))

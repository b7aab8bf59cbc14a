"""What workers print is shown at the driver, with who printed it. In programs of their own, whose output is looked at."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

PRELUDE = """
import sys, time
import hpc_ray as ray

class Watched:
    '''A stream that remembers what was written.'''
    def __init__(self, stream):
        self.stream, self.seen = stream, ""
    def write(self, text):
        self.seen += text
        return self.stream.write(text)
    def flush(self):
        self.stream.flush()

sys.stdout, sys.stderr = Watched(sys.stdout), Watched(sys.stderr)

def await_output(*texts):
    deadline = time.monotonic() + 10
    while not all(text in sys.stdout.seen + sys.stderr.seen for text in texts) and time.monotonic() < deadline:
        time.sleep(0.01)

"""


@pytest.fixture
def run(own_world, no_leaks, tmp_path):
    """Run a program to its end: (stdout, stderr)."""

    def run(code, status=0):
        script = tmp_path / "script.py"
        script.write_text(PRELUDE + code)
        found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert found.returncode == status, found.stderr
        return found.stdout, found.stderr

    return run


def test_prints_of_tasks_and_actors(run):
    out, err = run("""
import sys
ray.init(num_cpus=2)

@ray.remote
def speak(i):
    print("task", i)
    print("grumble", i, file=sys.stderr)

@ray.remote
class Speaker:
    def speak(self):
        print("actor here")
        print("two", "words")

speaker = Speaker.remote()
ray.get([speak.remote(i) for i in range(3)])
ray.get(speaker.speak.remote())
print("the driver")
await_output("task 0", "task 1", "task 2", "grumble 0", "grumble 1", "grumble 2", "two words")
""")
    for i in range(3):
        assert re.search(rf"^\(speak pid=\d+\) task {i}$", out, re.MULTILINE), out
        assert re.search(rf"^\(speak pid=\d+\) grumble {i}$", err, re.MULTILINE), err
    spoken = re.findall(r"^\(.+ pid=\d+\) (actor here|two words)$", out, re.MULTILINE)  # the driver may print in between
    assert spoken == ["actor here", "two words"], out
    assert re.search(r"^the driver$", out, re.MULTILINE)


def test_actors_are_called_by_their_class(run):
    out, _ = run("""
ray.init(num_cpus=1)

@ray.remote
class Speaker:
    def method(self):
        print("actor here")

speaker = Speaker.remote()
ray.get(speaker.method.remote())
await_output("actor here")
""")
    assert re.search(r"^\(Speaker pid=\d+\) actor here$", out, re.MULTILINE), out


def test_actors_with_a_repr_are_called_by_that(run):
    out, _ = run("""
ray.init(num_cpus=2)

@ray.remote
class Speaker:
    def __init__(self, number):
        self.number = number
    def __repr__(self):
        return f"Speaker({1 / self.number})"
    def method(self):
        print("actor here", self.number)

ray.get([Speaker.remote(number).method.remote() for number in (2, 0)])
await_output("actor here 2", "actor here 0")
""")
    assert re.search(r"^\(Speaker\(0\.5\) pid=\d+\) actor here 2$", out, re.MULTILINE), out
    assert re.search(r"^\(Speaker pid=\d+\) actor here 0$", out, re.MULTILINE), out


def test_printed_pid_is_the_workers(run):
    out, _ = run("""
import os
ray.init(num_cpus=1)

@ray.remote
def pid():
    print("it is", os.getpid())

ray.get(pid.remote())
await_output("it is")
""")
    match = re.search(r"^\(pid pid=(\d+)\) it is (\d+)$", out, re.MULTILINE)
    assert match and match[1] == match[2], out


def test_nothing_is_lost_at_the_end(run):
    """What was printed just before the program ends is shown."""
    out, _ = run("""
ray.init(num_cpus=2)

@ray.remote
def chatter(k):
    for i in range(5000):
        print(f"line {k} {i}")

ray.get([chatter.remote(k) for k in range(4)])
""")
    lines = re.findall(r"^\(chatter pid=\d+\) line (\d+) (\d+)$", out, re.MULTILINE)
    assert sorted((int(k), int(i)) for k, i in lines) == [(k, i) for k in range(4) for i in range(5000)]


def test_an_unfinished_last_line_is_shown(run):
    """Of workers that are free again, by a task, an actor, a thread pool's actor and an asyncio actor."""
    out, err = run("""
ray.init(num_cpus=1)

@ray.remote
def task():
    print("grumble", end="", file=sys.stderr)
    print("the task's line\\nand its last", "words", end="")

class Speaker:
    def speak(self, name):
        print(name, "was here", end="")

class Waiter:
    async def speak(self, name):
        print(name, "was here", end="")

actors = [ray.remote(Speaker).remote(), ray.remote(Speaker).options(max_concurrency=2).remote(), ray.remote(Waiter).remote()]
ray.get([actor.speak.remote(name) for actor, name in zip(actors, ["simple", "threaded", "asyncio"])])
ray.get(task.remote())
""")
    for line in ("the task's line", "and its last words", "simple was here", "threaded was here", "asyncio was here"):
        assert re.search(rf"^\(.+ pid=\d+\) {line}$", out, re.MULTILINE), out
    assert re.search(r"^\(task pid=\d+\) grumble$", err, re.MULTILINE), err


def test_output_of_subprocesses_and_c_code(run):
    out, _ = run("""
import os, subprocess
ray.init(num_cpus=1)

@ray.remote
def shell():
    subprocess.run(["echo", "from a child"], check=True)
    os.write(1, b"from below\\n")

ray.get(shell.remote())
await_output("from below")
""")
    assert re.search(r"^\(shell pid=\d+\) from a child$", out, re.MULTILINE), out
    assert re.search(r"^\(shell pid=\d+\) from below$", out, re.MULTILINE), out


def test_last_words_of_a_crash(run):
    out, err = run("""
import os, sys
ray.init(num_cpus=1)

@ray.remote(max_retries=0)
def crash():
    print("before the end", flush=True)
    print("unfinished", end="", file=sys.stderr, flush=True)
    os._exit(3)

try:
    ray.get(crash.remote())
except ray.exceptions.WorkerCrashedError:
    print("seen")
await_output("before the end", "unfinished")
""")
    assert "seen" in out and re.search(r"^\(crash pid=\d+\) before the end$", out, re.MULTILINE), out
    assert "unfinished" in err


def test_quiet(run):
    out, err = run("""
ray.init(num_cpus=1, log_to_driver=False)

@ray.remote
def speak():
    print("silent")

ray.get(speak.remote())
""")
    assert "silent" not in out + err


def test_odd_output(run):
    out, _ = run(r"""
import sys
ray.init(num_cpus=1)

@ray.remote
def odd():
    sys.stdout.buffer.write(b"bytes \xff\x1e\n")
    print("grüße 🎓")
    print()
    print("x" * 100_000)

ray.get(odd.remote())
await_output("x" * 100_000)
""")
    assert "grüße 🎓" in out and "x" * 100_000 in out and "bytes" in out


def test_an_uncaught_error_ends_the_program(run):
    _, err = run(
        """
ray.init(num_cpus=1)

@ray.remote
def fail():
    raise ValueError("uncaught, of a task")

ray.get(fail.remote())
""",
        status=1,
    )
    assert "uncaught, of a task" in err and "fail" in err and "RayTaskError(ValueError)" in err


def test_records_of_the_program_s_loggers(run):
    """``logging_config``: the same form in the driver, tasks (also nested ones) and actors, with who wrote it."""
    _, err = run("""
import json, logging
ray.init(num_cpus=2, logging_config=ray.LoggingConfig(encoding="JSON", additional_log_standard_attrs=["name"]))

@ray.remote
def inner():
    logging.getLogger("inner").info("of a nested task")

@ray.remote
def outer():
    logging.getLogger("outer").info("of a task", extra={"step": 7})
    logging.getLogger("outer").debug("not shown")
    ray.get(inner.remote())
    return ray.get_runtime_context().get_task_id()

@ray.remote
class Actor:
    def speak(self):
        logging.getLogger("actor").warning("of an actor")
        return ray.get_runtime_context().get_actor_id()

logging.getLogger("driver").info("of the driver")
actor = Actor.options(name="speaker").remote()
ids = ray.get([outer.remote(), actor.speak.remote()])
await_output("of a task", "of a nested task", "of an actor")
records = {}
for line in sys.stderr.seen.splitlines():
    if "{" in line:
        record = json.loads(line[line.index("{"):])
        records[record["message"]] = record
assert records["of a task"]["step"] == 7 and records["of a task"]["task_id"] == ids[0]
assert records["of a task"]["task_name"] == "outer" and records["of a task"]["levelname"] == "INFO"
assert records["of an actor"]["actor_id"] == ids[1] and records["of an actor"]["actor_name"] == "speaker"
assert records["of a nested task"]["name"] == "inner"
assert "task_id" not in records["of the driver"]
assert "not shown" not in records
ray.shutdown()
assert not logging.getLogger().handlers
""")
    assert "of the driver" in err


def test_records_as_text(run):
    _, err = run("""
import logging
ray.init(num_cpus=1, logging_config={"log_level": "WARNING"})
logging.getLogger().info("not shown")
logging.getLogger("a").warning("shown")
""")
    assert "not shown" not in err
    line = next(line for line in err.splitlines() if "shown" in line)
    assert "WARNING script.py:" in line and "-- shown" in line and " job_id=00000001 " in line

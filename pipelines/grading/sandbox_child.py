"""The processes behind `sandbox`: a keeper, a checker and the candidate. Run as a script; imports the standard library
only.

    sandbox (caller) ── keeper ── checker (init of pid namespace 1) ── candidate (init of pid namespace 2)

The keeper enters the namespaces and waits. The checker alone holds the tests: it forks the candidate *before* it reads
them, sends it the program, and runs the tests itself, calling the candidate's function through a pipe. Calls and
results are plain data, parsed as JSON, so nothing of the candidate's runs in the checker. The candidate has nothing to
forge: the verdict goes through a pipe it does not have, and it knows neither the tests nor the expected values. Killing
the keeper kills the checker (it asked for that), and with it, as the init of its namespace, everything below. Where
isolation is off, rlimits, a process group and an empty environment are all there is.
"""

import builtins
import json
import os
import resource
import select
import signal
import sys
import time
import types
from contextlib import suppress
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import isolation

LONGEST_MESSAGE = 8 << 20
MESSAGES = {"died": "the program ended before it answered", "garbage": "the program's answer is not plain data"}


class Ended(BaseException):
    """The candidate cannot answer any more. No test can catch it by accident."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


def encode(value: object) -> object:
    """Plain data as JSON that tells lists from tuples, sets and dicts. TypeError for anything else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for mark, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return [mark, *[encode(member) for member in value]]
    if isinstance(value, dict):
        return ["dict", *[[encode(key), encode(member)] for key, member in value.items()]]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    raise TypeError(f"a value of type {type(value).__name__} is not plain data")


def decode(data: Any) -> Any:
    """The inverse of `encode`. ValueError or TypeError for anything that `encode` cannot have made."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("not plain data")
        return data
    mark, *members = data
    if mark == "dict":
        return {decode(key): decode(member) for key, member in members}
    if mark == "complex":
        return complex(*members)
    if mark == "bytes":
        return bytes.fromhex(members[0])
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[mark](
        decode(member) for member in members
    )


class Candidate:
    """The checker's end of the pipes. Calling it calls the candidate's function."""

    def __init__(self, pid: int, requests: int, replies: int) -> None:
        self.pid, self.requests, self.replies = pid, requests, replies
        self.deadline = time.monotonic() + 60.0
        self.buffer = b""

    def send(self, message: object) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                if not select.select([], [self.requests], [], max(0.0, self.deadline - time.monotonic()))[1]:
                    raise Ended("timeout", "the program did not take its arguments in time")
                data = data[os.write(self.requests, data[:4096]) :]
        except BrokenPipeError:
            raise Ended("failed", MESSAGES["died"]) from None

    def receive(self) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            if not select.select([self.replies], [], [], max(0.0, self.deadline - time.monotonic()))[0]:
                raise Ended("timeout", "the program did not answer in time")
            chunk = os.read(self.replies, 1 << 16)
            if not chunk:
                raise Ended("failed", MESSAGES["died"])
            self.buffer += chunk
            if len(self.buffer) > LONGEST_MESSAGE:
                raise Ended("failed", "the program's answer is too long")
        line, self.buffer = self.buffer.split(b"\n", 1)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise Ended("failed", MESSAGES["garbage"]) from None
        if not isinstance(message, dict):
            raise Ended("failed", MESSAGES["garbage"])
        return message

    def __call__(self, *arguments: object, **named: object) -> object:
        self.send({"arguments": encode(list(arguments)), "named": encode(named)})
        reply = self.receive()
        if "value" in reply:
            try:
                return decode(reply["value"])
            except (ValueError, TypeError, KeyError, IndexError, RecursionError):
                raise Ended("failed", MESSAGES["garbage"]) from None
        kind = getattr(builtins, str(reply.get("raised")), None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        if issubclass(kind, (StopIteration, StopAsyncIteration)):  # would end a test's own loop as if all were well
            kind = RuntimeError
        raise kind(str(reply.get("text"))[:200])


def serve_candidate(requests: int, replies: int) -> None:
    """The candidate's side: loads the program, then answers calls until the pipe closes."""
    pending = os.fdopen(requests, encoding="utf-8")

    def reply(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(replies, data) :]

    reply({"ready": True})
    job = json.loads(pending.readline())
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    try:
        exec(compile(job["code"], "<candidate>", "exec"), module.__dict__)
        function = module.__dict__[job["entry_point"]]
    except BaseException as error:
        reply({"raised": type(error).__name__, "text": str(error)[:200]})
        return
    reply({"loaded": True})
    for line in pending:
        call = json.loads(line)
        try:
            message = {"value": encode(function(*decode(call["arguments"]), **decode(call["named"])))}
            json.dumps(message)
        except BaseException as error:
            message = {"raised": type(error).__name__, "text": str(error)[:200]}
        reply(message)


def candidate(limits: dict[str, Any], isolate: bool, requests: int, replies: int) -> None:
    """Becomes the isolated candidate process. Never returns."""
    try:
        # Descriptors 0-2 lead nowhere, 3 and 4 are the pipes, and nothing else stays open: not the tests, not the
        # verdict.
        null = os.open("/dev/null", os.O_RDWR)
        moved = [os.dup(descriptor) for descriptor in (null, null, null, requests, replies)]
        for target, descriptor in enumerate(moved):  # the copies are numbered above 4, as the pipes came before them
            os.dup2(descriptor, target)
        os.closerange(5, 1 << 16)
        if isolate:
            settings = os.open("/proc/sys/user", os.O_RDONLY)
            isolation.enter_root(limits["scratch_bytes"])
            isolation.drop_privileges(settings)
        else:
            os.setsid()
            isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
        isolation.limit(limits["cpu_seconds"], limits["memory_bytes"], limits["processes"], limits["file_bytes"])
    except OSError as error:
        os.write(4, json.dumps({"unavailable": str(error)}).encode() + b"\n")
        os._exit(1)
    try:
        serve_candidate(3, 4)
    finally:
        os._exit(0)


def run_tests(remote: Candidate, job: dict[str, str], wall_seconds: float) -> dict[str, Any]:
    """Loads the program in the candidate, then runs the tests here."""
    remote.deadline = time.monotonic() + wall_seconds
    remote.send({"code": job["code"], "entry_point": job["entry_point"]})
    loaded = remote.receive()
    if "loaded" not in loaded:
        return {"status": "failed", "detail": f"{loaded.get('raised')}: {str(loaded.get('text'))[:200]}"}
    tests: dict[str, Any] = {"__name__": "tests"}
    exec(compile(job["preamble"], "<prompt>", "exec"), tests)
    exec(compile(job["test"], "<tests>", "exec"), tests)
    tests[job["entry_point"]] = remote
    try:
        tests["check"](remote)
    except Exception as error:
        return {"status": "failed", "detail": f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")}
    return {"status": "passed", "detail": ""}


def checker(limits: dict[str, Any], isolate: bool) -> dict[str, Any]:
    """Forks the candidate, reads the job, and returns the verdict with the candidate dead."""
    request_read, request_write = os.pipe()
    reply_read, reply_write = os.pipe()
    if isolate:
        isolation.unshare(isolation.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        candidate(limits, isolate, request_read, reply_write)
    os.close(request_read)
    os.close(reply_write)
    # Hostile data may be slow to read or compare; what the checker itself may use ends that.
    cpu_seconds = int(limits["wall_seconds"]) + limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    remote = Candidate(pid, request_write, reply_read)
    try:
        first = remote.receive()
        if "ready" not in first:
            return {"status": "unavailable", "detail": str(first.get("unavailable"))}
        job = json.loads(sys.stdin.readline())
        return run_tests(remote, job, limits["wall_seconds"])
    except Ended as ended:
        return {"status": ended.status, "detail": ended.detail}
    finally:
        os.kill(pid, signal.SIGKILL)
        if not isolate:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def main() -> None:
    limits, isolate = json.loads(sys.argv[1]), sys.argv[2] == "isolated"
    os.set_blocking(1, True)
    try:
        if isolate:
            isolation.enter_namespaces()
    except OSError as error:
        print(json.dumps({"status": "unavailable", "detail": str(error)}))
        return
    pid = os.fork()
    if pid == 0:
        isolation.prctl(isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            print(json.dumps(checker(limits, isolate)))
        except OSError as error:
            print(json.dumps({"status": "unavailable", "detail": str(error)}))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main()

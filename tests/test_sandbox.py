"""Model-written code: what may pass, what may not, and that nothing is left of it. The hostile programs are real."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.grading import sandbox
from pipelines.grading.code import program
from pipelines.grading.sandbox import Limits, SandboxUnavailable, check

TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
QUICK = Limits(cpu_seconds=1, wall_seconds=3.0)

isolated = pytest.mark.skipif(sandbox.unavailable() is not None, reason=f"no isolation here: {sandbox.unavailable()}")


def own_processes() -> set[str]:
    """Command lines of sandbox processes that are alive."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
        except OSError:
            continue
        if b"sandbox_child.py" in line:
            found.add(folder.name)
    return found


@isolated
def test_right_and_wrong_programs() -> None:
    assert check("def square(x):\n    return x * x\n", TEST, "square").passed
    assert check("def square(x):\n    print('noise')\n    return x ** 2\n", TEST, "square").passed
    wrong = check("def square(x):\n    return x + x\n", TEST, "square")
    assert (wrong.status, wrong.detail) == ("failed", "AssertionError")
    assert "SyntaxError" in check("def square(x) return", TEST, "square").detail
    assert "KeyError" in check("def other(x): return x", TEST, "square").detail
    assert "ZeroDivisionError" in check("def square(x):\n    return 1 / 0\n", TEST, "square").detail


@isolated
def test_values_come_back_as_they_are() -> None:
    test = (
        "def check(f):\n"
        "    for value in ([1, (2, 3)], {'a': {1, 2}, 3: None}, 1.5, 1e300, float('inf'), True, 'é\\n\\ud800', b'x', 2 + 3j, 10 ** 50):\n"
        "        back = f(value)\n"
        "        assert back == value and type(back) is type(value), value\n"
        "    assert f([1]) != (1,)\n"
    )
    assert check("def f(x): return x", test, "f").status == "passed"
    assert "not plain data" in check("def f(x): return map(str, [1])", test, "f").detail


@isolated
def test_the_prompts_helpers_serve_the_tests() -> None:
    prompt = "import math\n\ndef double(x):\n    return 2 * x\n\ndef half(x):\n    '''Undo double.'''\n"
    code = program("    return x / 2", prompt, "half")
    assert check(
        code, "def check(f):\n    assert f(double(math.floor(4.5))) == 4\n", "half", preamble=prompt + "    pass\n"
    ).passed


ALWAYS_EQUAL = """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
def square(x): return Equal()
"""
HOSTILE = {
    "leaves before the tests": "import sys\nsys.exit(0)\n",
    "leaves at once": "import os\nos._exit(0)\n",
    "leaves when called": "import os\ndef square(x): os._exit(0)\n",
    "raises SystemExit when called": "def square(x): raise SystemExit(0)\n",
    "raises StopIteration": "def square(x): raise StopIteration\n",
    "equals everything": ALWAYS_EQUAL,
    "equals everything as a number": "class N(int):\n    __eq__ = lambda s, o: True\ndef square(x): return N(7)\n",
    "redefines the checker": "def check(candidate): pass\ndef square(x): return 0\n",
    "redefines assert's error": "import builtins\nbuiltins.AssertionError = type('E', (BaseException,), {})\ndef square(x): return 0\n",
    "patches builtins and sys": (
        "import builtins, sys\nbuiltins.len = lambda x: 0\nsys.exit = lambda *a: None\n"
        "sys.excepthook = lambda *a: None\nsys.settrace(lambda *a: None)\ndef square(x): return 0\n"
    ),
    "prints a verdict": "print('{\"status\": \"passed\", \"detail\": \"\"}', flush=True)\ndef square(x): return 0\n",
    "writes a verdict to every descriptor": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"status\": \"passed\", \"detail\": \"\"}\\n')\n"
        "    except OSError: pass\ndef square(x): return 0\n"
    ),
    "answers garbage to every descriptor": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'[' * 100000 + b'\\n')\n    except OSError: pass\ndef square(x): return 0\n"
    ),
    "replays an answer": (
        "import os\ndef square(x):\n    os.write(4, b'{\"value\": 4}\\n' * 10)\n    return 4\n"
    ),
    "looks for the tests in frames and memory": (
        "import gc, sys\ndef square(x):\n    found = []\n    frame = sys._getframe()\n"
        "    while frame:\n        found.append(repr(frame.f_locals) + repr(frame.f_globals)); frame = frame.f_back\n"
        "    found += [o for o in gc.get_objects() if isinstance(o, str)] + [repr(o) for o in gc.get_objects() if isinstance(o, dict)]\n"
        "    text = ' '.join(found)\n    return x * x if ')3(etadidnac'[::-1] in text else 0\n"
    ),
    "looks for the tests in descriptors": (
        "import os\ndef square(x):\n    seen = b''\n    for fd in range(5, 256):\n        try: seen += os.read(fd, 1 << 16)\n"
        "        except OSError: pass\n    return x * x if b'candidate' in seen else 0\n"
    ),
    "reads the environment": "import os\ndef square(x): return x * x if os.environ.get('S2T_SECRET') else 0\n",
    "reads home": "import os\ndef square(x): return x * x if os.path.exists(os.path.expanduser('~nobody')) or HOME else 0\nHOME = os.path.exists('/home') or os.path.exists('/etc/passwd')\n",
    "reads other processes": "import os\ndef square(x): return x * x if os.path.exists('/proc/1') else 0\n",
    "writes outside": "import sys\ndef square(x):\n    open(sys.prefix + '/lib/s2t-was-here', 'w').write('x')\n    return x * x\n",
    "writes to the root": "def square(x):\n    open('/s2t-was-here', 'w').write('x')\n    return x * x\n",
    "makes the root writable": (
        "import ctypes\ndef square(x):\n    assert ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None) == 0\n    return x * x\n"
    ),
    "gains capabilities in a new namespace": (
        "import ctypes\ndef square(x):\n    assert ctypes.CDLL(None).unshare(0x10000000 | 0x20000) == 0\n    return x * x\n"
    ),
    "reaches the network": (
        "import socket\ndef square(x):\n    socket.create_connection(('192.0.2.1', 80), timeout=1)\n    return x * x\n"
    ),
    "reaches the machine's own ports": (
        "import socket\ndef square(x):\n    s = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', 22))\n    return x * x\n"
    ),
    "kills its parent": (
        "import os, signal\ndef square(x):\n    for pid in (os.getppid(), 1, -1, 0):\n        try: os.kill(pid, signal.SIGKILL)\n"
        "        except OSError: pass\n    return 0\n"
    ),
    "needs a bomb of memory": "def square(x):\n    block = bytearray(4 << 30)\n    return x * x\n",
    "answers without end": "def square(x): return 'x' * (64 << 20)\n",
    "answers nested without end": "def square(x):\n    v = []\n    for _ in range(100000): v = [v]\n    return v\n",
    "writes a large file": "def square(x):\n    open('big', 'wb').write(b'x' * (64 << 20))\n    return x * x\n",
    "runs other programs": "import subprocess\ndef square(x):\n    subprocess.run(['/bin/sh', '-c', 'true'], check=True)\n    return x * x\n",
}  # fmt: skip


@isolated
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_never_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2T_SECRET", "seen")
    outcome = check(HOSTILE[name], TEST, "square", limits=QUICK)
    assert not outcome.passed, outcome
    assert not Path("/s2t-was-here").exists()
    assert not Path(sys.prefix, "lib", "s2t-was-here").exists()


ENDLESS = {
    "loops while loading": "while True: pass\n",
    "loops when called": "def square(x):\n    while True: pass\n",
    "sleeps": "import time\ntime.sleep(1000)\n",
    "prints forever": "def square(x):\n    while True: print('x' * 1000)\n",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "leaves a child behind": (
        "import os, time\ndef square(x):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n            time.sleep(1000)\n"
        "        os._exit(0)\n    time.sleep(1000)\n"
    ),
    "ignores signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass\n"
    ),
    "threads": "import threading\ndef spin():\n    while True: pass\nfor _ in range(3): threading.Thread(target=spin).start()\nspin()\n",
    "fills the scratch folder": (
        "def square(x):\n    n = 0\n    while True:\n        n += 1\n        try: open(f'f{n}', 'wb').write(b'x' * 1000000)\n        except OSError: pass\n"
    ),
}  # fmt: skip


@isolated
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_programs_are_ended_with_all_their_children(name: str) -> None:
    before = own_processes()
    outcome = check(ENDLESS[name], TEST, "square", limits=QUICK)
    assert not outcome.passed
    assert own_processes() <= before


@isolated
def test_hostile_data_cannot_hold_up_the_checker() -> None:
    """Keys that all hash to 0 make a dict quadratic to build; the checker's own CPU limit ends that."""
    code = (
        "import os\ndef square(x):\n"
        "    pairs = ','.join(f'[{n * (2**61 - 1)},0]' for n in range(200000))\n"
        '    data = f\'{{"value": ["dict",{pairs}]}}\\n\'.encode()\n'
        "    while data: data = data[os.write(4, data):]\n"
    )
    assert not check(code, TEST, "square", limits=QUICK).passed


@isolated
def test_a_killed_caller_takes_everything_with_it(tmp_path: Path) -> None:
    """A keeper that is killed (as `check` does past the limit) leaves no process behind."""
    before = own_processes()
    command = [sys.executable, "-I", "-S", "-B", str(Path(sandbox.__file__).with_name("sandbox_child.py"))]
    limits = '{"cpu_seconds": 60, "wall_seconds": 60, "memory_bytes": 536870912, "processes": 8, "file_bytes": 1024, "scratch_bytes": 1048576}'
    job = b'{"code": "import time\\ntime.sleep(60)", "entry_point": "f", "preamble": "", "test": ""}\n'
    with subprocess.Popen(
        [*command, limits, "isolated"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}
    ) as keeper:
        assert keeper.stdin is not None
        keeper.stdin.write(job)
        keeper.stdin.flush()
        deadline = time.monotonic() + 60
        while len(own_processes() - before) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(own_processes() - before) == 3
        keeper.kill()
    while own_processes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert own_processes() <= before


def test_without_isolation_it_refuses_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda: "[Errno 1] unshare: Operation not permitted")
    with pytest.raises(SandboxUnavailable, match=r"cannot be isolated on this system.*allow_unsandboxed=True"):
        check("def square(x): return x * x", TEST, "square")
    assert check("def square(x): return x * x", TEST, "square", allow_unsandboxed=True).passed
    assert not check("import os\nos._exit(0)", TEST, "square", allow_unsandboxed=True).passed
    before = own_processes()
    assert not check("while True: pass", TEST, "square", limits=QUICK, allow_unsandboxed=True).passed
    assert own_processes() <= before


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests already run as an ordinary user")
def test_an_ordinary_user_is_isolated_too(tmp_path: Path) -> None:
    """The same programs as nobody, where that user can run this interpreter."""
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    folder = str(Path(sandbox.__file__).parents[2])
    script = (
        f"import sys; sys.path.insert(0, {folder!r})\n"
        "from pipelines.grading import sandbox\n"
        f"test = {TEST!r}\n"
        "assert sandbox.unavailable() is None, sandbox.unavailable()\n"
        "assert sandbox.check('def square(x): return x * x', test, 'square').passed\n"
        f"for code in {[*HOSTILE.values()]!r}:\n"
        "    assert not sandbox.check(code, test, 'square', limits=sandbox.Limits(1, 3.0)).passed, code\n"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        usable = (
            "import subprocess, sys; assert sys.version_info >= (3, 11); "
            f"open({sandbox.__file__!r}); subprocess.run([sys.executable, '-c', ''], check=True)"
        )
        probe = [*become, python, "-c", usable]
        try:
            if subprocess.run(probe, capture_output=True).returncode == 0:
                done = subprocess.run([*become, python, "-c", script], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                return
        except FileNotFoundError:
            continue
    pytest.skip("no interpreter here that nobody can run")

"""Attacks by a model's code: the sandbox stops each one, gives the right verdict and leaves nothing behind."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from prefill_router.common.errors import UserError
from prefill_router.graders import confinement
from prefill_router.graders import sandbox as sandbox_module
from prefill_router.graders.sandbox import Sandbox, Verdict

needs_confinement = pytest.mark.skipif(bool(confinement.lacking()), reason=f"lacks {confinement.lacking()}")
pytestmark = needs_confinement

SMALL = Sandbox(cpu_s=1, wall_s=4, memory_bytes=200 * 2**20, num_files=20, folder_bytes=2**20, output_bytes=20_000)
RIGHT = "def f(x):\n    return x + 1\n"
INTO_PIPES = "for fd in range(3, 1000):\n    try: os.write(fd, b'{}')\n    except OSError: pass"
TESTS = "assert f(1) == 2\nassert f(-1) == 0"


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks that no file, process or open pipe is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    yield
    assert list(tmp_path.glob("grade-*")) == []
    assert _running(tmp_path) == 0
    assert len(os.listdir("/proc/self/fd")) <= len(before)  # noqa: PTH208


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def run(code: str, tests: str = TESTS, entry_point: str | None = None, sandbox: Sandbox = SMALL) -> Verdict:
    return sandbox.run(code, tests, entry_point)


def fails_with(expression: str, preamble: str = "") -> str:
    """The error that an expression raises in the sandbox."""
    verdict = run(f"{preamble}\n{expression}\n{RIGHT}")
    assert verdict.status == "failed", verdict
    return verdict.detail


@pytest.mark.parametrize(
    ("code", "tests", "entry_point"),
    [
        (RIGHT, TESTS, None),
        (RIGHT, "def check(candidate):\n    assert candidate(1) == 2", "f"),
        (RIGHT, "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)", None),
        (RIGHT, "def test_one():\n    assert f(1) == 2\n", None),
        (RIGHT, "from solution import f as g\nimport math\nassert math.isclose(g(0.5), 1.5)", None),
        ("import json, math, re, itertools, collections, random, datetime, decimal, functools, heapq, string\n"
         "import asyncio, threading, statistics, typing, dataclasses, enum, bisect, hashlib, copy, zoneinfo, ssl\n"
         "@dataclasses.dataclass\nclass P:\n    x: int\n"
         "async def g(x):\n    await asyncio.sleep(0.001)\n    return P(x).x\n"
         "def f(x):\n    t = threading.Thread(target=print, args=('hello',)); t.start(); t.join()\n"
         "    assert zoneinfo.ZoneInfo('Europe/Paris')\n"
         "    return asyncio.run(g(json.loads(json.dumps(x)) + 1))\n", TESTS, None),
        ("def f(x):\n    with open('notes.txt', 'w') as out:\n        out.write(str(x + 1))\n"
         "    return int(open('notes.txt').read())\n", TESTS, None),
        ("def sum(a, b):\n    return a + b\n", "assert sum(1, 2) == 3", None),
        ("def f(x):\n    try:\n        return int(input())\n    except EOFError:\n        return x + 1", TESTS, None),
        ("if __name__ == '__main__':\n    raise SystemExit\n" + RIGHT, TESTS, None),
    ],
)  # fmt: skip
def test_a_right_solution_passes(code: str, tests: str, entry_point: str | None) -> None:
    assert run(code, tests, entry_point).status == "passed"


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("def f(x):\n    return x", "AssertionError at test line 1: assert f(1) == 2"),
        ("def f(x): return 2", "AssertionError at test line 2: assert f(-1) == 0"),
        ("def f(x:\n", "SyntaxError"),
        ("def g(x): return x + 1", "NameError: name 'f' is not defined"),
        ("import numpy\n" + RIGHT, "ModuleNotFoundError: No module named 'numpy'"),
        ("import prefill_router\n" + RIGHT, "ModuleNotFoundError: No module named 'prefill_router'"),
        ("def f(x): return f(x)", "RecursionError"),
        (
            "class E(Exception):\n    def __str__(self): raise self\ndef f(x): raise E",
            "E at test line 1: assert f(1) == 2",
        ),
    ],
)
def test_a_wrong_solution_fails_and_says_where(code: str, detail: str) -> None:
    verdict = run(code)
    assert verdict.status == "failed"
    assert verdict.detail.startswith(detail)


@pytest.mark.parametrize(
    ("tests", "entry_point", "detail"),
    [
        ("assert f(1) ==", None, "SyntaxError"),
        ("import numpy\nassert f(1) == 2", None, "ModuleNotFoundError"),
        ("x = f(1)", None, "ValueError: the tests have no assert"),
        ("class T:\n    def test(self):\n        assert False", None, "ValueError: the tests have no assert"),
        ("def check(candidate):\n    assert candidate(1) == 2", None, "ValueError: the tests define check(candidate)"),
    ],
)
def test_tests_that_cannot_run_say_nothing_of_the_code(tests: str, entry_point: str | None, detail: str) -> None:
    verdict = run(RIGHT, tests, entry_point)
    assert (verdict.status, verdict.detail[: len(detail)]) == ("broken", detail)


def test_the_entry_point_must_be_defined() -> None:
    assert "the code defines no g" in run(RIGHT, "def check(candidate):\n    pass", "g").detail


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)", "timeout"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "timeout"),
        ("import os, time\nos.closerange(0, 10_000)\ntime.sleep(60)", "ended"),
        ("x = 'a' * 2**40", "memory"),
        ("x = []\nwhile True: x.append(bytearray(2**20))", "memory"),
        ("def f(x):\n    x = [0] * 10**7\n    while True: x = x + x", "memory"),
        ("while True: print('y' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('y' * 1000)", "output"),
        ("import os\nfor i in range(10**9): open(str(i), 'w')", "files"),
        ("import os, time\nfor i in range(10): open(str(i), 'wb').write(bytes(2**20))\ntime.sleep(60)", "files"),
        ("import ctypes\nctypes.string_at(0)", "ended"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef g(): return [*map(lambda _: g(), [0])]\ng()", "ended"),
    ],
)
def test_what_takes_too_much_is_stopped(code: str, status: str) -> None:
    start = time.monotonic()
    # Code that sleeps after exceeding a limit gets 40 s: two processes start slowly on a busy machine.
    sandbox = replace(SMALL, wall_s=2 if status == "timeout" else 40) if "sleep" in code else SMALL
    verdict = run(f"{code}\n{RIGHT}" if "def f" not in code else code, sandbox=sandbox)
    assert verdict.status == status, verdict
    assert time.monotonic() - start < 50.0  # less than any of them takes without the limit
    assert len(verdict.output) <= SMALL.output_bytes


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    try: os.fork()\n    except OSError as e: raise SystemExit(str(e))",
        "os.fork()",
        "os.system('true') and 1/0",
        "import subprocess; subprocess.run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "os.posix_spawn('/bin/true', ['true'], {})",
    ],
)
def test_there_is_no_other_process(code: str) -> None:
    """Rules out fork bombs and daemons."""
    verdict = run(f"import os\n{code}\n{RIGHT}")
    assert verdict.status == "failed"
    assert "Operation not permitted" in verdict.detail or "ZeroDivisionError" in verdict.detail, verdict


def test_threads_are_counted() -> None:
    bomb = "import threading, time\nthreading.stack_size(32768)\n"
    code = bomb + "while True: threading.Thread(target=time.sleep, args=(60,)).start()"
    assert run(code, sandbox=replace(SMALL, memory_bytes=2**30, threads=20)).status == "threads"
    few = bomb + "for _ in range(9): threading.Thread(target=time.sleep, args=(0.2,)).start()\n" + RIGHT
    assert run(few, sandbox=replace(SMALL, threads=20)).status == "passed"


@pytest.mark.parametrize(
    "expression",
    [
        "open('/etc/passwd')",
        "open('/etc/hostname')",
        "open('/proc/self/environ')",
        "open(f'/proc/{os.getppid()}/environ')",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "os.listdir('/')",
        "os.listdir('..')",
        "os.listdir('/proc')",
        "open('../x', 'w')",
        "open('/tmp/prefill-router-was-here', 'w')",
        "open('/dev/shm/prefill-router-was-here', 'w')",
        "os.mkdir('folder')",
        "os.symlink('/etc/passwd', 'link')",
        "os.mkfifo('pipe')",
        "os.chmod('.', 0)",
        "os.chown('.', 1, 1)",
        "os.truncate(os.__file__, 0)",
        "open(os.__file__, 'a')",
        "os.rename('x', '../x')",
        "os.link('x', '../x')",
        "os.chroot('.')",
        "os.setuid(1)",
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "os.killpg(os.getpgid(os.getppid()), 9)",
        "os.memfd_create('x')",
        "os.sched_setaffinity(0, {0})",
        "os.nice(-1)",
    ],
)
def test_files_and_processes_of_others_are_out_of_reach(expression: str) -> None:
    detail = fails_with(expression, "import os\nopen('x', 'w').close()")
    assert detail.startswith(("PermissionError", "OSError: [Errno 18]")), detail  # 18: EXDEV, from Landlock
    assert not Path("/tmp/prefill-router-was-here").exists()


def test_walking_the_file_system_finds_nothing() -> None:
    assert run(f"import os\nassert list(os.walk('/')) == []\n{RIGHT}").status == "passed"


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    known = {"PYTHONHASHSEED", "TMPDIR", "HOME", "LANG", "LC_CTYPE", "OPENBLAS_NUM_THREADS"}
    assert run(f"import os\nassert os.environ.keys() <= {known!r}\n{RIGHT}").status == "passed"


def test_limits_cannot_be_raised() -> None:
    detail = fails_with("resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))", "import resource")
    assert "not allowed to raise maximum limit" in detail
    assert "PermissionError" in fails_with(f"resource.prlimit({os.getpid()}, resource.RLIMIT_CPU)", "import resource")


def test_a_file_has_a_largest_size() -> None:
    sandbox = Sandbox(cpu_s=1, file_bytes=1000)
    assert "File too large" in run("with open('x', 'wb') as out: out.write(bytes(2000))", sandbox=sandbox).detail


def test_there_is_no_network() -> None:
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def accept() -> None:
            server.accept()[0].close()
            reached.set()

        threading.Thread(target=accept, daemon=True).start()
        detail = fails_with(f"socket.create_connection(('127.0.0.1', {port}))", "import socket")
        assert detail.startswith("PermissionError")
        assert not reached.is_set()
        socket.create_connection(("127.0.0.1", port)).close()
        assert reached.wait(5)
    for expression in (
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    ):
        assert fails_with(expression, "import socket").startswith("PermissionError")
    assert "gaierror" in fails_with("socket.getaddrinfo('example.com', 80)", "import socket")


@pytest.mark.parametrize(
    "code",
    [
        "print('passed'); import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import os\n" + INTO_PIPES.format("+passed\\0passed\\0") + "\nos._exit(0)",
        "import os\ndef f(x): os._exit(0)",
        "def f(x): raise SystemExit(0)",
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\nbuiltins.exec = lambda *a: None\n"
        "builtins.compile = lambda *a, **k: None\ndef f(x): return 0",
        "import builtins\nbuiltins.all = lambda _: True\nbuiltins.abs = lambda _: 2\ndef f(x): return 0",
        "def all(_): return True\ndef f(x): return 0",
        "import os\nos.write = os.read = print\nos._exit = lambda _: None\ndef f(x): return 0",
        "import __main__\n__main__.Tests = None\n__main__.write = None\ndef f(x): return 0",
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
        "import threading, os, time\nthreading.Timer(0.0, os._exit, [0]).start()\ntime.sleep(0.5)\ndef f(x): return 0",
        "import sys\nsys.excepthook = lambda *a: None\nsys.stdout = None\ndef f(x): return 0",
        "def check(candidate): pass\ndef f(x): return 0",
        "def test_one(): pass\ndef f(x): return 0",
        "raise GeneratorExit",
        "",
    ],
)
def test_cheats_do_not_pass(code: str) -> None:
    tests = "def test_one():\n    assert all([f(i) == i + 1 for i in range(9)])\n    assert abs(f(1)) == 2"
    assert run(code, tests).status in ("failed", "ended")


def test_what_is_written_into_the_verdicts_pipe_is_no_verdict() -> None:
    code = f"import os, time\n{INTO_PIPES.format('x' * 9000)}\ntime.sleep(60)"
    assert run(code, sandbox=replace(SMALL, wall_s=2)).status == "ended"


WALK = "import sys\nframe = sys._getframe()\nwhile 'report' not in frame.f_locals: frame = frame.f_back\n"
EVERY_PIPE = """
import json, os
for message in (["return", True, [None]], ["return", 2, [None, None]], ["ready"]):
    data = json.dumps(message).encode()
    for fd in range(3, 64):
        for text in (len(data).to_bytes(8, "little") + data, b"+passed\\0", b"\\0passed\\0"):
            try: os.write(fd, text)
            except OSError: pass
"""
READ_PIPES = """
import os
for fd in range(64):
    try: os.set_blocking(fd, False); secret = os.read(fd, 64); os.write(fd, secret + b"\\0passed\\0")
    except OSError: pass
os._exit(0)
"""
COLLECT = """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == "Report": thing.end("passed")
def strings():
    for thing in gc.get_objects():
        yield from (str(value) for value in (thing.values() if type(thing) is dict else ()) if type(value) is str)
assert not any("assert f(1) == 2" in text for text in strings() if "gc.get_objects" not in text)
"""
EQUAL = "class E(%s):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return E()"


@pytest.mark.parametrize(
    "code",
    [
        f"{WALK}frame.f_locals['report'].end('passed')",
        EVERY_PIPE + "def f(x): return 0",
        EVERY_PIPE + "os._exit(0)",
        READ_PIPES,
        COLLECT + "def f(x): return 0",
        *(EQUAL % base for base in ("object", "int", "list", "str", "dict")),
        "def f(x):\n    raise AssertionError",
        "import remote_calls\nremote_calls.Peer.ask = lambda *a: True\ndef f(x): return 0",
        "import sys\nsys.modules['__main__'].judge_main = lambda *a: None\ndef f(x): return 0",
        "import builtins, operator\noperator.eq = builtins.isinstance = lambda a, b: True\ndef f(x): return 0",
        "import os\nfor pid in range(os.getpid() - 9, os.getpid() + 9):\n    try: os.kill(pid, 9)\n"
        "    except OSError: pass\ndef f(x): return 0",
        "import os\nos.closerange(0, 64)\nos._exit(0)",
    ],
)  # fmt: skip
def test_a_verdict_is_out_of_reach_of_what_is_written_against_it(code: str) -> None:
    assert run(code).status in ("failed", "ended")


@pytest.mark.parametrize(
    "tests", ["assert abs(f(1) - 2) < 1e-6", "assert 2 in f(1)", "assert f(1) <= 2", "assert 2 - f(1) == 0"]
)
def test_an_object_is_not_shown_what_it_is_compared_with(tests: str) -> None:
    methods = ("sub", "rsub", "contains", "le", "ge", "eq", "abs", "iter")
    code = "\n".join(f"    def __{name}__(self, *others): return others[0] * 0 if others else self" for name in methods)
    assert run(f"class E:\n{code}\ndef f(x): return E()", tests).status == "failed"


def test_code_and_tests_in_one_process_are_not_held_apart() -> None:
    """Documents that code can forge a pass with `together`."""
    together = replace(SMALL, together=True)
    assert run(f"{WALK}frame.f_locals['report'].end('passed')", sandbox=together).status == "passed"
    assert run(EQUAL % "object", sandbox=together).status == "passed"
    assert run(RIGHT, sandbox=together).status == "passed"
    assert run("def f(x): return x", sandbox=together).status == "failed"


POINT = """
import collections, dataclasses, decimal, fractions, datetime
class Stack:
    def __init__(self): self.items, self.size = [], 0
    def push(self, item): self.items.append(item); self.size += 1; return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __add__(self, other): return len(self) + len(other)
    def __getitem__(self, place): return self.items[place]
class Empty(ValueError): pass
@dataclasses.dataclass(order=True)
class P:
    x: int
def sort(a): a.sort()
def grow(d): d["k"] = [1]; return d
def fail(kind): raise {"e": Empty("no"), "k": KeyError("k")}[kind]
def gen(n):
    yield from range(n)
def apply(g, x): return g(x)
def same(x): return x
def make(): return lambda x: x * 2
counted = collections.Counter("aab")
"""
VALUES = (
    "decimal.Decimal('0.10'), fractions.Fraction(1, 3), datetime.date(2026, 1, 2), datetime.timedelta(1), "
    "10 ** 9999, -5, 1.5, float('inf'), 1j, b'x', (1, (2,)), {1: {2}}, frozenset('a'), {(1, 2): None}, "
    "'ü\\ud800', range(3), True, [[]], ''"
)


@pytest.mark.parametrize(
    "tests",
    [
        "s = Stack()\nassert s.push(1).push(2).pop() == 2 and s.size == 2",
        "s = Stack().push(1)\nassert len(s) == 1 and list(s) == [1] and 1 in s",
        "s = Stack().push(1)\nassert s + s == 2 and s[0] == 1",
        "a = [3, 1, 2]\nassert sort(a) is None and a == [1, 2, 3]",
        "d = {}\nassert grow(d) == {'k': [1]} == d",
        "try:\n    fail('e'); assert False\nexcept Empty as error:\n    assert str(error) == 'no'",
        "try:\n    fail('e'); assert False\nexcept ValueError:\n    pass",
        "try:\n    fail('k'); assert False\nexcept KeyError as error:\n    assert error.args == ('k',)",
        "assert list(gen(3)) == [0, 1, 2] and sorted(gen(2)) == [0, 1] and next(iter(gen(1))) == 0",
        "assert apply(lambda x: x + 1, 1) == 2 and apply(len, 'abc') == 3 and apply(str, 1) == '1' and make()(3) == 6",
        "assert apply(apply, 1) if False else apply(make(), 4) == 8",
        "assert P(1) == P(1) and P(1) != P(2) and P(1) < P(2) and P(1).x == 1",
        "assert isinstance(P(1), P) and not isinstance(1, P) and not isinstance(Stack(), P)",
        "assert counted == {'a': 2, 'b': 1}",
        f"import decimal, fractions, datetime\nfor v in ({VALUES}):\n"
        "    assert same(v) == v and type(same(v)) is type(v), v",
        "assert same(float('nan')) != same(0)",
        "assert same.__name__ == 'same' and callable(same) and bool(Stack()) is False",
    ],
)  # fmt: skip
def test_tests_use_what_another_process_defines_as_if_it_were_theirs(tests: str) -> None:
    verdict = run(POINT, tests)
    assert verdict.status == "passed", verdict


def test_tests_that_hand_over_what_only_they_can_use_are_not_run_apart() -> None:
    tests = "class Node:\n    x = 1\nassert f(Node()) == 2"
    code = "def f(node): return node.x + 1"
    verdict = run(code, tests)
    assert verdict.status == "broken"
    assert verdict.detail.endswith("run code and tests in one process with together = true")
    assert run(code, tests, sandbox=replace(SMALL, together=True)).status == "passed"


def test_a_machine_that_is_too_slow_to_start_says_nothing_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox_module, "_HARNESS", str(slow))
    assert run(RIGHT, sandbox=Sandbox(wall_s=0.2)).status == "killed"


def test_other_system_calls_are_denied() -> None:
    """Calls by number: sockets, io_uring, BPF, tracing, namespaces, kernel modules."""
    if platform.machine() != "x86_64":
        pytest.skip("numbers of x86_64")
    calls = "41,425,321,101,272,165,57,58,59,310,311,434,438,157,317,76,90,62,200,234,161,175,250,298,323,308"
    code = (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for n in ({calls}):\n    assert libc.syscall(n, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM, n\n"
    )
    assert run(code + RIGHT).status == "passed"


def test_runs_beside_each_other_do_not_mix() -> None:
    def one(i: int) -> str:
        return run(f"def f(x): return x + {i}", "assert f(0) == 3").status

    with ThreadPoolExecutor(6) as pool:
        statuses = list(pool.map(one, range(12)))
    assert [i for i, status in enumerate(statuses) if status == "passed"] == [3]


def test_a_machine_that_cannot_confine_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "landlock_abi", lambda: 1)
    confinement.lacking.cache_clear()
    try:
        with pytest.raises(UserError, match=r"lacks landlock \(version 1.* unconfined = true"):
            Sandbox()
        accepted = Sandbox(unconfined=True)
        assert run(RIGHT, sandbox=accepted).status == "passed"
        # The protections that the machine has still apply.
        assert run("import os; os.fork()", sandbox=accepted).status == "failed"
    finally:
        confinement.lacking.cache_clear()


def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "seccomp_program", lambda: b"nonsense")
    with pytest.raises(UserError, match="the sandbox did not start: OSError"):
        run(RIGHT)


def test_installed_packages_are_there_when_asked_for() -> None:
    sandbox = Sandbox(site_packages=True, memory_bytes=2**31)
    assert run("import numpy as np\ndef f(x): return int(np.add(x, 1))", sandbox=sandbox).status == "passed"


def test_code_ends_with_the_process_that_runs_it(tmp_path: Path) -> None:
    program = (
        f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
        "from prefill_router.graders.sandbox import Sandbox\n"
        "Sandbox(wall_s=60.0).run('import time; time.sleep(60)', 'assert True')"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    assert _eventually(lambda: list(tmp_path.glob("grade-*")) != [] and _running(tmp_path) > 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _eventually(lambda: _running(tmp_path) == 0)
    for folder in tmp_path.glob("grade-*"):  # the killed parent could not remove it
        folder.rmdir()


def _running(folder: Path) -> int:
    return sum(str(folder).encode() in _read(path) for path in Path("/proc").glob("[0-9]*/environ"))


def _eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60.0
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()

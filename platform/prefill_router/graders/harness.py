"""The program inside the sandbox: confines its own process, then runs an answer's code or a row's tests.

It runs by its path, without this package on the import path, so that it starts fast and the code finds nothing to
import. The code and the tests run in separate processes. The judge process runs the tests, which call the code's
functions through `remote_calls`: return values arrive as plain data, from which the judge builds its own objects. The
code can therefore neither see the tests nor change their process. The judge reports the result through a pipe that
only it has, after a secret that waits unread in another pipe.

The code still controls its return values, its own objects (their attributes and how they compare with each other) and
the names that the tests take from it. The role `together` runs both in one process, for tests that need the code's own
objects. There, code written against this file can forge a verdict.
"""

from __future__ import annotations

import _ast
import builtins
import ctypes
import marshal
import resource
import sys
from collections.abc import Callable, Iterator
from os import O_RDONLY, O_RDWR, _exit, close, dup, dup2, getppid, read, write
from os import open as open_fd
from types import CodeType, ModuleType
from typing import Any

# A copy, so that code which replaces names in `builtins` changes neither this file nor the tests.
BUILTINS: dict[str, Any] = dict(vars(builtins))
globals()["__builtins__"] = BUILTINS

_SET_PDEATHSIG, _SET_NO_NEW_PRIVS, _SET_SECCOMP = 1, 38, 22
_SIGKILL, _O_PATH, _FILTER = 9, 0o10000000, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _PATH_BENEATH = 444, 445, 446, 1
_CAPABILITY_VERSION = 0x20080522
_MAX_DETAIL_CHARS = 1000
_PEER_GONE = 3  # exit status
_SOLUTION = "solution"  # name of the module that the code runs as

Names = dict[str, Any]


class Confinement:
    """Irrevocable restrictions of this process, as requested by the parent. Raises OSError if one cannot be applied."""

    def __init__(self, request: Names) -> None:
        self.request = request
        self.libc = ctypes.CDLL(None, use_errno=True)

    def put_on(self) -> None:
        self._check("prctl", self.libc.prctl(_SET_PDEATHSIG, _SIGKILL, 0, 0, 0))
        if getppid() != self.request["parent"]:
            _exit(1)
        for name, limit in self.request["limits"].items():
            resource.setrlimit(getattr(resource, name), limit)
        self._check("prctl", self.libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if self.request["landlock"]:
            self._restrict_files()
        self._drop_capabilities()
        if self.request["seccomp"]:
            self._filter_calls()

    def _restrict_files(self) -> None:
        attributes = self.request["landlock"]
        ruleset = self.libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
        self._check("landlock", ruleset)
        for path, access in self.request["paths"]:
            self._allow(ruleset, path, access)
        self._check("landlock", self.libc.syscall(_RESTRICT_SELF, ruleset, 0))
        close(ruleset)

    def _allow(self, ruleset: int, path: str, access: int) -> None:
        fd = open_fd(path, O_RDONLY | _O_PATH)
        rule = access.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
        self._check(f"landlock: {path}", self.libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
        close(fd)

    def _drop_capabilities(self) -> None:
        """Drops root's powers: the process cannot raise its limits again, and reads only what its user may read."""
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
        self._check("capset", self.libc.capset(header, (ctypes.c_uint32 * 6)()))

    def _filter_calls(self) -> None:
        class Program(ctypes.Structure):
            _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

        instructions = self.request["seccomp"]
        program = Program(len(instructions) // 8, instructions)
        self._check("seccomp", self.libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0))

    @staticmethod
    def _check(what: str, returned: int) -> None:
        if returned < 0:
            raise OSError(ctypes.get_errno(), what)


class Report:
    """The pipe to the parent, and the pipe that holds the secret. The first status reported is final."""

    def __init__(self, out: int, secret: int) -> None:
        self.out, self.secret = out, secret

    def started(self) -> None:
        write(self.out, b"+")

    def end(self, status: str, detail: str = "") -> None:
        text = f"{status}\0{detail[:_MAX_DETAIL_CHARS]}".encode(errors="replace")
        write(self.out, read(self.secret, 64) + b"\0" + text)
        _exit(0)


class Tests:
    """A row's tests, compiled before the code runs: asserts, a `check(candidate)`, or functions named test_…"""

    def __init__(self, source: str, entry_point: str | None) -> None:
        """Raises ValueError if the tests test nothing, SyntaxError or ImportError if they cannot run."""
        self.entry_point, self.lines = entry_point, source.splitlines()
        self.code = compile(source, "<tests>", "exec", dont_inherit=True)
        tree: Any = compile(source, "<tests>", "exec", flags=_ast.PyCF_ONLY_AST, dont_inherit=True)
        functions = [node.name for node in tree.body if isinstance(node, _ast.FunctionDef)]
        calls_check = any(_is_call_of_check(node) for node in tree.body)
        self.functions = [name for name in functions if name.startswith("test_")]
        self.has_check = "check" in functions and not calls_check
        if self.has_check and entry_point is None:
            raise ValueError("the tests define check(candidate), but the row has no entry_point")
        if not (self.functions or self.has_check or calls_check or any(map(_asserts, tree.body))):
            raise ValueError("the tests have no assert, no check(candidate) and no function test_…")
        for module in _imports(tree):
            __import__(module)

    def run(self, solution: Names) -> None:
        """Runs the tests on the code's names, with separate builtins. Raises what the first failing test raises."""
        names = {**self._needed(solution), "__builtins__": dict(BUILTINS)}
        names["__name__"] = "tests"
        if self.entry_point is not None and self.entry_point not in solution:
            raise NameError(f"the code defines no {self.entry_point}")
        candidate = names.get(self.entry_point or "")
        exec(self.code, names)
        for name in self.functions:
            names[name]()
        if self.has_check:
            names["check"](candidate)

    def _needed(self, solution: Names) -> Names:
        """The code's names, without those that shadow a builtin, unless the tests use no others."""
        used = {name for name in _names(self.code) if name in solution and not name.startswith("__")}
        hidden = {name for name in used if name in BUILTINS}
        if used == hidden:
            hidden = set()
        return {name: value for name, value in solution.items() if name not in hidden - {self.entry_point}}


def _is_call_of_check(node: _ast.AST) -> bool:
    call = node.value if isinstance(node, _ast.Expr) else None
    return isinstance(call, _ast.Call) and isinstance(call.func, _ast.Name) and call.func.id == "check"


def _asserts(node: _ast.AST) -> bool:
    """Whether running the statement runs an assert."""
    if isinstance(node, _ast.FunctionDef | _ast.AsyncFunctionDef | _ast.ClassDef | _ast.Lambda):
        return False
    bodies = [getattr(node, name, None) or [] for name in ("body", "orelse", "finalbody")]
    return isinstance(node, _ast.Assert) or any(_asserts(child) for body in bodies for child in body)


def _imports(tree: _ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, _ast.Import):
            yield from (alias.name for alias in node.names if alias.name != _SOLUTION)
        elif isinstance(node, _ast.ImportFrom) and node.module not in (None, _SOLUTION):
            yield str(node.module)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _describe(error: BaseException, lines: list[str]) -> str:
    """The error and the test line that it passed through. The code may raise errors that cannot be printed."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:
        text = "an error that cannot be printed"
    step, at = error.__traceback__, 0
    while step is not None:
        at = step.tb_lineno if step.tb_frame.f_code.co_filename == "<tests>" else at
        step = step.tb_next
    return f"{text} at test line {at}: {lines[at - 1].strip()}" if 0 < at <= len(lines) else text


def _attempt(report: Report, step: Callable[[], object], lines: list[str], peer: Any = None) -> None:
    """Runs a step, and reports the error if it fails. Exits without a report if the code's process, `peer`, has ended.

    In that case the exit status of the code's process decides the verdict.
    """
    caught: BaseException | None = None
    try:
        step()
    except BaseException as error:
        caught = error
    if peer is not None and peer.is_gone:
        _exit(_PEER_GONE)
    if peer is not None and peer.is_unportable:
        report.end("broken", f"{caught}: run code and tests in one process with together = true")
    if isinstance(caught, MemoryError):
        report.end("memory", "MemoryError")
    if caught is not None:
        report.end("failed", _describe(caught, lines))


def _request() -> Names:
    """The request, read from standard input up to the secret."""
    size = int.from_bytes(read(0, 8), "little")
    data = b""
    while len(data) < size:
        data += read(0, size - len(data))
    request: Names = marshal.loads(data)
    return request


def _without_input() -> None:
    null = open_fd("/dev/null", O_RDWR)
    dup2(null, 0)
    close(null)


def _remote_calls() -> Any:
    """Imports `remote_calls` from the folder of this file."""
    sys.path.insert(0, __file__.rpartition("/")[0])
    try:
        return __import__("remote_calls")
    finally:
        sys.path.pop(0)


def judge_main(report_fd: int, reads: int, writes: int) -> None:
    """Runs the tests. Calls of the code's functions go to the code's process."""
    request, remote_calls = _request(), _remote_calls()
    report = Report(report_fd, dup(0))
    _without_input()
    peer = remote_calls.Peer(reads, writes, shares_all=False)
    try:
        Confinement(request).put_on()
        kind, *reason = peer.receive()
    except (Exception, remote_calls.Gone) as error:
        report.end("broken", f"{type(error).__name__}: {error}")
    if kind != "ready":
        report.end("broken", str(reason[0]))
    report.started()
    tests = _tests(report, request)
    solution: Names = {}
    _attempt(report, lambda: solution.update(remote_calls.Remote(peer, 0)()), [], peer)
    module = ModuleType(_SOLUTION)
    vars(module).update(solution)
    sys.modules[_SOLUTION] = module
    _attempt(report, lambda: tests.run(solution), tests.lines, peer)
    report.end("passed")


def code_main(reads: int, writes: int) -> None:
    """Runs an answer's code, in a process that has neither the tests nor the pipe of the verdict."""
    request, remote_calls = _request(), _remote_calls()
    _without_input()
    peer = remote_calls.Peer(reads, writes, shares_all=True)
    try:
        Confinement(request).put_on()
    except Exception as error:
        peer.send(["broken", f"{type(error).__name__}: {error}"])
        _exit(1)
    sys.path += request["packages"]
    module = ModuleType(_SOLUTION)
    sys.modules[_SOLUTION] = sys.modules["__main__"] = module
    names = vars(module)
    names["__builtins__"] = builtins

    def run() -> Names:
        exec(compile(request["code"], "<answer>", "exec", dont_inherit=True), names)
        return {name: value for name, value in names.items() if not name.startswith("__")}

    peer.hold_first(run)
    peer.send(["ready"])
    try:
        peer.serve()
    except remote_calls.Gone:
        _exit(0)


def together_main(report_fd: int) -> None:
    """Runs code and tests in one process, where the code can reach the tests and the pipe of the verdict."""
    request = _request()
    report = Report(report_fd, dup(0))
    _without_input()
    try:
        Confinement(request).put_on()
    except Exception as error:
        report.end("broken", f"{type(error).__name__}: {error}")
    report.started()
    tests = _tests(report, request)
    module = ModuleType(_SOLUTION)
    sys.modules[_SOLUTION] = sys.modules["__main__"] = module
    solution = vars(module)
    solution["__builtins__"] = builtins
    run: Callable[..., None] = exec
    _attempt(report, lambda: run(compile(request["code"], "<answer>", "exec", dont_inherit=True), solution), [])
    _attempt(report, lambda: tests.run(solution), tests.lines)
    report.end("passed")


def _tests(report: Report, request: Names) -> Tests:
    """The request's tests. Ends the process if they cannot run."""
    sys.path += request["packages"]
    try:
        return Tests(request["tests"], request["entry_point"])
    except Exception as error:
        report.end("broken", _describe(error, []))
        raise


_MAIN: dict[str, Callable[..., None]] = {"judge": judge_main, "code": code_main, "together": together_main}

if __name__ == "__main__":
    _MAIN[sys.argv[1]](*map(int, sys.argv[2:]))

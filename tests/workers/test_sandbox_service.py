import subprocess
import sys
import threading

import hostile
import pytest
from json_server import serving

from jaxrl_llm.workers.sandbox import levels, programs, service
from jaxrl_llm.workers.sandbox.levels import Sandbox
from jaxrl_llm.workers.sandbox.programs import Calling, Printing, run, verdicts


def run_code(path, request, headers):
    """What SandboxFusion answers, by its documentation."""
    assert path == "/run_code" and request["language"] == "python"
    result = {"stdout": "", "stderr": "", "return_code": None, "execution_time": 0.01}
    try:
        ran = subprocess.run(
            [sys.executable, "-S", "-c", request["code"]],
            input=request["stdin"],
            capture_output=True,
            text=True,
            timeout=request["run_timeout"],
        )
    except subprocess.TimeoutExpired:
        result["status"] = "TimeLimitExceeded"
    else:
        result |= {"stdout": ran.stdout, "stderr": ran.stderr, "status": "Finished"}
        result["return_code"] = ran.returncode
    status = "Success" if result["return_code"] == 0 else "Failed"
    return 200, {
        "status": status,
        "message": "",
        "compile_result": None,
        "run_result": result,
        "executor_pod_name": None,
        "files": {},
    }


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(service.time, "sleep", lambda seconds: None)
    yield
    programs.release()


def test_programs_run_there_and_are_judged_here():
    with serving(run_code) as url:
        sandbox = Sandbox(level="url", url=url, jobs=2, wall_s=60.0)
        assert levels.describe(sandbox) == f"programs run at {url} (sandbox level url)"
        printing = Printing(inputs=("1", "2"), outputs=("2", "4"))
        calling = Calling(
            tests=("s = Stack()\ns.push(1)\nassert s.values == [1]", "assert f(2) == 4")
        )
        right = "f = lambda x: 2 * x"
        stack = (
            "class Stack:\n    def __init__(self): self.values = []\n"
            f"    def push(self, x): self.values.append(x)\n{right}"
        )
        found = verdicts(
            [
                ("print(2 * int(input()))", printing),
                ("import sys; sys.exit(2)", printing),
                (stack, calling),
                (right, calling),
            ],
            sandbox,
            all_tests=True,
        )
        assert [verdict.passed for verdict in found] == [2, 0, 2, 1]


def test_no_verdict_can_be_forged_there_either():
    names = ["equals everything", "exits", "prints a verdict", "answers code"]
    names += ["rewrites what compares", "goes early"]
    with serving(run_code) as url:
        sandbox = Sandbox(level="url", url=url, jobs=2, wall_s=60.0)
        tests = Calling(tests=("assert f(2) == 4",))
        found = verdicts([(hostile.FORGERS[name], tests) for name in names], sandbox)
        assert [verdict.passed for verdict in found] == [0] * len(names)


def test_a_time_limit_there_is_a_failure_of_the_program():
    with serving(run_code) as url:
        service.check(url)
        sandbox = Sandbox(level="url", url=url, jobs=1, wall_s=0.2)
        assert run("while True: pass", "", sandbox).why == "took too long"


def test_a_slow_service_is_not_the_program_s_failure(monkeypatch):
    waits = []

    def slow(path, request, headers):
        if waits:
            threading.Event().wait(waits.pop())
        return run_code(path, request | {"run_timeout": 60.0}, headers)

    with serving(slow) as url:
        service.check(url)
        sandbox = Sandbox(level="url", url=url, jobs=1, wall_s=1.0)
        job = ("f = lambda x: 2 * x", Calling(tests=("assert f(2) == 4",)))
        waits.append(1.2)
        (found,) = verdicts([job], sandbox)
        assert found.passed == 1
        monkeypatch.setattr(service, "_SLOWER", 0.1)
        waits.append(0.5)
        assert verdicts([job], sandbox) == [None]


def test_a_program_without_end_is_a_failure_of_the_program(monkeypatch):
    monkeypatch.setattr(service, "_MOST_QUESTIONS", 3)
    source = "def f():\n    while True: yield 1"
    with serving(run_code) as url:
        sandbox = Sandbox(level="url", url=url, jobs=1, wall_s=60.0)
        (found,) = verdicts([(source, Calling(tests=("list(f())",)))], sandbox)
        assert found.passed == 0 and "ended" in found.why


@pytest.mark.parametrize(
    "failure, cause",
    [
        ((200, {"status": "SandboxError", "message": "no room"}), "no room"),
        ((503, "busy"), "HTTP 503"),
        ((200, "<html>"), "JSONDecodeError"),
        ((200, {"detail": "what"}), "KeyError: 'status'"),
    ],
)
def test_a_service_that_fails_is_asked_again_and_then_an_error(failure, cause):
    left = [failure] * 2

    def answer(*request):
        return left.pop() if left else run_code(*request)

    with serving(answer) as url:
        sandbox = Sandbox(level="url", url=url, jobs=1)
        assert run("print(1)", "", sandbox).stdout == b"1\n"
        left += [failure] * 100
        tests = Calling(tests=("assert f(2) == 4",))
        for source, given in (
            ("f = 1", tests),
            ("", Printing(inputs=("",), outputs=("",))),
        ):
            with pytest.raises(service.ServiceError, match=cause):
                verdicts([(source, given)], sandbox)


def test_an_address_where_no_service_is_is_an_error_before_anything_runs():
    with serving(lambda *request: (404, "not here")) as url:
        with pytest.raises(service.ServiceError, match="HTTP 404"):
            run("print(1)", "", Sandbox(level="url", url=url))
    with pytest.raises(service.ServiceError, match="refused"):
        run("print(1)", "", Sandbox(level="url", url=url))

"""Python as a tool: a policy writes a program and reads what it prints."""

import functools
from collections.abc import Callable

from jaxrl_llm.workers.sandbox import programs
from jaxrl_llm.workers.sandbox.jail import Ran
from jaxrl_llm.workers.sandbox.levels import Sandbox

_LONGEST = 4000
"""Characters that a policy reads of each of output and errors."""


def python(code: str) -> str:
    """Runs a Python program and returns what it prints and the value of its last line.

    Args:
        code: The program. It starts anew each time, and has no files and no network.
    """
    return _answered(code, Sandbox())


def python_tool(sandbox: Sandbox) -> Callable[[str], str]:
    """`python` with settings of its own."""

    @functools.wraps(python)
    def tool(code: str) -> str:
        return _answered(code, sandbox)

    return tool


def _answered(code: str, sandbox: Sandbox) -> str:
    """What a program printed, shortened, and how it ended if not well.

    Raises:
      SandboxError: programs cannot be run as they are to be.
    """
    ran = programs.run(_SHOWN.format(code=code), "", sandbox)
    parts = [_short(ran.stdout), _short(ran.stderr), _end(ran)]
    return "\n".join(part for part in parts if part)


def _short(output: bytes) -> str:
    text = output.decode(errors="backslashreplace").strip()
    if len(text) <= _LONGEST:
        return text
    half, left = _LONGEST // 2, len(text) - _LONGEST
    return f"{text[:half]}\n[{left} characters left out]\n{text[-half:]}"


def _end(ran: Ran) -> str:
    if ran.why:
        return f"[the program was ended: it {ran.why}]"
    if ran.status and not ran.stderr:
        return f"[the program ended with status {ran.status}]"
    return ""


_SHOWN = """
import ast, sys, traceback
names = {{"__name__": "__main__"}}
try:
    tree = ast.parse({code!r}, "<code>")
    last = tree.body[-1:]
    if last and isinstance(last[0], ast.Expr):
        tree.body.pop()
    exec(compile(tree, "<code>", "exec"), names)
    if last and isinstance(last[0], ast.Expr):
        value = eval(compile(ast.Expression(last[0].value), "<code>", "eval"), names)
        if value is not None:
            print(repr(value))
except Exception as error:
    trace = None if isinstance(error, SyntaxError) else error.__traceback__.tb_next
    traceback.print_exception(type(error), error, trace)
    sys.exit(1)
"""

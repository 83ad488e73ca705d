"""The reward of a program: whether tests pass.

Tests are read from the columns that data sets have them in:

    test, entry_point                HumanEval: Python that defines check(candidate)
    test_list, test_setup_code,      MBPP: assertions
      test_imports
    input_output                     APPS, TACO: {inputs, outputs, fn_name}, or the text
                                     of that as JSON
    answer (data.train.answer_key)   as input_output; a list of {input, output, fn_name}
                                     (LiveCodeBench, DeepCoder), also as {test_cases}
                                     (Open-R1); a list of assertions; Python

With fn_name (func_name, also in `metadata`) a function is called, or a method of the
class Solution, else the program reads and prints.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.rewards.per_response import last_said
from jaxrl_llm.workers.messages import Unjudged
from jaxrl_llm.workers.pool import deadline
from jaxrl_llm.workers.sandbox import levels, programs
from jaxrl_llm.workers.sandbox.levels import Sandbox
from jaxrl_llm.workers.sandbox.programs import Calling, Printing, Tests

_FENCED = re.compile(r"```(?:python3?|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)


class NoTests(ValueError):
    """A row has no tests that can be read."""


def code(
    completions: Sequence[str | list],
    answer: Sequence[Any],
    prompts: Sequence[str | list] | None = None,
    test: Sequence[str | None] | None = None,
    entry_point: Sequence[str | None] | None = None,
    test_list: Sequence[Sequence[str] | None] | None = None,
    test_setup_code: Sequence[str | None] | None = None,
    test_imports: Sequence[Sequence[str] | None] | None = None,
    input_output: Sequence[Any] | None = None,
    *,
    partial: bool = False,
    sandbox: Sandbox | None = None,
) -> list[float]:
    """All tests of the row pass for the program in the reply: its last block of Python
    between ```, or all of it if there is none.

    Programs run by the configuration's section `sandbox`. For HumanEval, what the
    prompt begins is completed: a reply that does not define the function goes on with
    it. Replies that there was no time for are `Unjudged`.

    Args:
      completions: the replies.
      answer: tests, where no column below has any.
      prompts: what was asked.
      test: Python that defines check(candidate).
      entry_point: the function that is the candidate.
      test_list: assertions.
      test_setup_code: Python before them.
      test_imports: imports before that.
      input_output: inputs and outputs.
      partial: score the fraction of tests that pass.
      sandbox: where programs run.

    Raises:
      ValueError: a row without tests that can be read, tests that fail without asking
        the program anything, or no sandbox.

    Source: Chen et al. 2021 (arXiv:2107.03374), Hendrycks et al. 2021
    (arXiv:2105.09938).
    """
    sandbox = sandbox or Sandbox()
    if not completions:
        levels.describe(sandbox)  # says now if there is none
    columns = {
        "answer": answer,
        "prompts": prompts,
        "test": test,
        "entry_point": entry_point,
        "test_list": test_list,
        "test_setup_code": test_setup_code,
        "test_imports": test_imports,
        "input_output": input_output,
    }
    given = {name: column for name, column in columns.items() if column}
    known: dict[tuple[int, ...], Tests] = {}
    jobs = []
    for index, reply in enumerate(completions):
        row = {name: column[index] for name, column in given.items()}
        # The replies to one question have the same objects beside them.
        key = tuple(map(id, row.values()))
        if key not in known:
            known[key] = read_tests(row)
        text = reply if isinstance(reply, str) else last_said(reply)
        jobs.append((_whole(program_in(text), row), known[key]))
    scores = []
    for verdict in programs.verdicts(
        jobs, sandbox, all_tests=partial, until=deadline()
    ):
        if verdict is None:
            scores.append(Unjudged())
        elif partial:
            scores.append(verdict.passed / verdict.of)
        else:
            scores.append(float(verdict.passed == verdict.of))
    return scores


def program_in(text: str) -> str:
    """The last block of Python between ``` in a text, or all of it."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


def _whole(program: str, row: Mapping[str, Any]) -> str:
    """A program with the beginning that the prompt has of it."""
    if not row.get("entry_point"):
        return program
    begun = _beginning(row)
    if re.search(rf"^def {re.escape(row['entry_point'])}\b", program, re.MULTILINE):
        return f"{begun}\n{program}"
    return begun + program


def _beginning(row: Mapping[str, Any]) -> str:
    """The Python that a prompt gives: between ```, or all of it if it is Python."""
    prompt = row.get("prompts") or ""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if _FENCED.search(text):
        return program_in(text)
    try:
        ast.parse(text)
    except SyntaxError:
        return ""
    return text


def read_tests(row: Mapping[str, Any]) -> Tests:
    """The tests of one row, by its columns.

    Raises:
      NoTests: it has none, or none that can be read.
    """
    if row.get("test_list"):
        before = [*(row.get("test_imports") or ()), row.get("test_setup_code") or ""]
        return Calling(tests=tuple(row["test_list"]), setup="\n".join(before))
    if row.get("test") and row.get("entry_point"):
        name = row["entry_point"]
        return Calling(
            tests=(f"{row['test']}\ncheck(candidate)\n",),
            setup=_beginning(row),
            programs={"candidate": name, name: name},
        )
    found = row.get("input_output") or row.get("answer")
    try:
        return _read(_parsed(found), None)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise NoTests(
            f"a row has no tests that can be read ({type(error).__name__}: {error}); "
            f"its columns are {', '.join(row)}, its answer {str(found)[:200]!r}. Name "
            "the column that has them by answer_key"
        ) from error


def _parsed(found: Any) -> Any:
    """JSON as what it stands for; other text as it is."""
    if isinstance(found, str):
        try:
            return json.loads(found)
        except ValueError:
            if "assert" not in found:
                raise ValueError("neither JSON nor assertions") from None
            return [found]
    return found


def _read(found: Any, name: str | None) -> Tests:
    """Tests in the form of a list or of a dictionary.

    Args:
      name: of the function that is called, if that is known.
    """
    if isinstance(found, Mapping):
        name = _function(found) or name
        if "test_cases" in found:
            return _read(found["test_cases"], name)
        return _made(found["inputs"], found["outputs"], name)
    found = list(found)
    if isinstance(found[0], str):
        return Calling(tests=tuple(found))
    name = _function(found[0]) or name
    inputs, outputs = ([case[key] for case in found] for key in ("input", "output"))
    return _made(inputs, outputs, name)


def _function(found: Mapping[str, Any]) -> str | None:
    metadata = found.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    for where in (found, metadata):
        for key in ("fn_name", "func_name"):
            if where.get(key):
                return where[key]
    return None


def _made(inputs: Sequence[Any], outputs: Sequence[Any], name: str | None) -> Tests:
    if not len(inputs) == len(outputs) > 0:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    if name is None:
        return Printing(
            inputs=tuple(map(_lines, inputs)), outputs=tuple(map(_lines, outputs))
        )
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no function's name")
    arguments = [
        [json.loads(line) for line in one.splitlines() if line.strip()]
        if isinstance(one, str)
        else list(one)
        for one in inputs
    ]
    results = [json.loads(one) if isinstance(one, str) else one for one in outputs]
    return programs.calls(name, arguments, results)


def _lines(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(map(str, text))

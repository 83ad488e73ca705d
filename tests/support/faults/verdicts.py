"""Verdicts: (what it is, seconds, words).

right: the result is that of the unbroken run.  said: refused, by a line that says what
is wrong.  silent: a wrong result without a word.  lost: steps or rows that are missing
or doubled, or a run that cannot go on.  traceback.  hang.
"""

from collections.abc import Sequence

from faults.processes import Ended

Verdict = tuple[str, float, str]
LIMIT_S = 30.0
"""A process that trains nothing has to end within it."""


def of_a_refusal(ended: Ended, naming: Sequence[str] = ()) -> Verdict:
    """A process that should have ended with an error that has one of the words."""
    words = f"status {ended.status}: {ended.last_words}"
    if ended.hung:
        return "hang", ended.seconds, words
    if ended.raw:
        return "traceback", ended.seconds, words
    if ended.status == 0:
        return "silent", ended.seconds, words
    error = ended.output.rpartition("error\n")[2]
    if naming and not any(name in error for name in naming):
        return "silent", ended.seconds, f"does not name {naming[0]}: {words}"
    return "said", ended.seconds, words


def of_a_whole_run(ended: Ended, wrong: str | None) -> Verdict:
    """A process that should have brought the run to its end; `wrong` as
    `faults.runs.wrong` says."""
    words = f"status {ended.status}: {ended.last_words}"
    if ended.hung:
        return "hang", ended.seconds, words
    if ended.raw:
        return "traceback", ended.seconds, words
    if ended.status != 0:
        return "lost", ended.seconds, words
    if wrong:
        kind, _, what = wrong.partition(": ")
        return kind, ended.seconds, what
    return "right", ended.seconds, ""

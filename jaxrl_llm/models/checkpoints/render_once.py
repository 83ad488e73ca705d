"""A process that renders a chat template and dies of what that costs.

Run as a file, with limits of its own; reads {"template", "seconds", "bytes"} as JSON
and prints one line that says what is wrong, or nothing. Errors that the template itself
raises are its way to refuse a conversation, and no fault.
"""

import contextlib
import json
import resource
import sys

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

_LONGEST = 10_000_000


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant says; here it is only rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def main() -> None:
    """Renders what standard input asks for."""
    asked = json.load(sys.stdin)
    for limit, most in (
        (resource.RLIMIT_CPU, asked["seconds"]),
        (resource.RLIMIT_AS, asked["bytes"]),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS knows no RLIMIT_AS
            resource.setrlimit(limit, (most, most))
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: "2000-01-01"
    user = {"role": "user", "content": "What is 1 + 1?"}
    system = {"role": "system", "content": "Answer."}
    answer = {"role": "assistant", "content": "2"}
    tokens = {f"{name}_token": "<s>" for name in ("bos", "eos", "pad", "unk")}
    try:
        template = environment.from_string(asked["template"])
        for messages in ([user], [system, user], [system, user, answer, user]):
            length = 0
            try:
                for text in template.generate(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **tokens,
                ):
                    length += len(text)
                    if length > _LONGEST:
                        print(f"makes more than {_LONGEST} characters of one question")
                        return
            except (MemoryError, RecursionError):
                raise
            except Exception:  # it refuses this conversation, which a row will say
                continue
    except MemoryError:
        print("needs too much memory")
    except RecursionError:
        print("is nested too deeply")
    except Exception:  # no template at all: whoever renders it names the cause
        return


if __name__ == "__main__":
    main()

"""Hostile chat templates: refused by a line that says so, before any training."""

import pathlib

import pytest
from faults import count, generator, runs
from faults.verdicts import LIMIT_S, of_a_refusal

KIND = "hostile template"
MEMORY = 6 * 2**30
# Each with a number that is drawn.
TEMPLATES = {
    "loops": "{% for i in range(N) %}{% for j in range(N) %}{% for k in range(N) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "prints in loops": "{% for i in range(N) %}{% for j in range(N) %}x{% endfor %}"
    "{% endfor %}",
    "allocates a text": "{{ 'x' * (N * 1000000) }}",
    "allocates a list": "{% set a = [0] * (N * 10000000) %}{{ a | length }}",
    "doubles": "{% set n = namespace(s='ab') %}{% for i in range(N) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "pads": "{{ '%N000000d' | format(1) }}",
    "centres": "{{ 'x' | center(N * 10000000) }}",
    "indents": "{{ ('x\\n' * 99999) | indent(N * 100) }}",
    "powers": "{{ 9 ** (9 ** N) }}",
    "recursion": "{% macro f(x) %}{{ f(x + N) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for x in [[N]] recursive %}{{ loop([x]) }}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[N % 2].__subclasses__() }}",
    "globals": "{{ messages.__init__.__globals__['os'].system('exit N') }}",
    "functions": "{{ raise_exception.__globals__['__builtins__'].open('/dev/fdN') }}",
    "includes": "{% include '/etc/hostsN' %}",
    "imports": "{% import '/etc/hostsN' as x %}{{ x }}",
    "raises": "{{ raise_exception('not with N messages') }}",
    "divides": "{{ N / 0 }}",
    "undefined": "{{ nothing.of.it[N] }}",
    "syntax": "{% for m in messages %}{{ m.content }} N",
    "unknown filter": "{{ messages | f_N }}",
    "nothing": "{% set x = N %}",
    "surrogate": "{{ '\\ud83d' }}{{ N }}",
    "batches": "{{ [1] | batch(N * 10000000, 0) | list | length }}",
}
NUMBERS = (1009, 4001, 9973)


@pytest.mark.parametrize("number", range(count(len(TEMPLATES))))
def test_a_hostile_template(campaign, verdicts, number):
    name = list(TEMPLATES)[number]
    drawn = generator(KIND, number).choice(NUMBERS)
    place = campaign.place("template")
    model = runs.copy(pathlib.Path(campaign.values["model"]["path"]), place / "model")
    template = TEMPLATES[name].replace("N", str(drawn))
    (model / "chat_template.jinja").write_text(template)
    changed = {"model.path": str(model), "trainer.total_training_steps": 1}
    process = campaign.train(place, changed=changed, memory=MEMORY)
    found = of_a_refusal(process.wait(LIMIT_S), ["template", "prompt"])
    verdicts(KIND, f"{name}, {drawn}", *found)

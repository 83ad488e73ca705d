"""The worked examples of docs/extending.md, as a reader runs them."""

import pathlib
import re

from jaxrl_llm.models.checkpoints import families

PAGE = pathlib.Path(__file__).parent.parent / "docs/extending.md"


def test_every_example_of_the_page_runs(monkeypatch):
    for table in ("_FAMILIES", "_CLASSES", "_CLASSIFIERS"):
        monkeypatch.setattr(families, table, dict(getattr(families, table)))
    text = PAGE.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == 1 + text.count("\n## ") == 6
    names = {"__name__": "extending"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
    assert names["arch"].model_type == "ourlm"

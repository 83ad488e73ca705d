"""How tests lie: each file stands alone, what several need is in tests/support."""

import pathlib
import re

HERE = pathlib.Path(__file__).parent
FILES = sorted(HERE.glob("**/*.py"))
TESTS = [path.stem for path in FILES if path.name.startswith("test_")]
# Read from the text, so that the programs that tests start count too.
IMPORT = re.compile(r"^\s*(?:from|import)\s+([\w.]+)", re.MULTILINE)


def test_nothing_imports_a_test():
    for path in FILES:
        for name in IMPORT.findall(path.read_text()):
            found = set(TESTS) & set(name.split("."))
            assert not found, f"{path.name}: move what it uses of {name} to support"

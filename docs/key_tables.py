"""The tables of keys on the pages from_*.md: `python docs/key_tables.py` writes them.

They are made from `jaxrl_llm.config.peers`, which the error about an unknown key reads.
"""

from pathlib import Path

from jaxrl_llm.config.peers.lookup import OFFLINE, PEERS

DOCS = Path(__file__).parent
BEGIN_OFFLINE = "<!-- keys of sft, rm and dpo: docs/key_tables.py -->"
BEGIN, END = "<!-- keys: docs/key_tables.py -->", "<!-- end of keys -->"


def pages():
    """The path of each page and the text that it should have."""
    for name, peer in PEERS.items():
        path = DOCS / f"from_{name}.md"
        before, _, rest = path.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        if name in OFFLINE:
            middle, _, rest = after.partition(BEGIN_OFFLINE)
            end = rest.partition(END)[2]
            after = f"{middle}{BEGIN_OFFLINE}\n{table(OFFLINE[name])}{END}{end}"
        yield path, f"{before}{BEGIN}\n{table(peer)}{END}{after}"


def table(peer):
    """One row for each key: its name there, its name here, what is different."""
    same = {name for name, key in peer.keys.items() if key.here == name}
    lines = [f"| {peer.title} | here | |", "|---|---|---|"]
    for name, key in peer.keys.items():
        here = " and ".join(f"`{target}`" for target in key.targets) or "none"
        here = "the same" if name in same else here
        lines.append(f"| `{name}` | {here} | {key.note.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for page, text in pages():
        page.write_text(text)

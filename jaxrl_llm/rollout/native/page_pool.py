"""Which pages of the cache are whose, on the host.

Pages are counted: sequences that begin alike hold the same ones. A page that nobody
holds keeps what was written to it until it is needed for something else, and is found
again by those who begin alike.

Source: Kwon et al. 2023 (arXiv:2309.06180).
"""

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence

Block = tuple[int, tuple[int, ...]]
"""The tokens of a page, and the number of the block before it (0: none)."""


class Pool:
    """Pages 1 .. num_pages - 1; page 0 belongs to nobody.

    Args:
      size: positions in a page.
    """

    def __init__(self, num_pages: int, size: int):
        self.size = size
        self._free = OrderedDict.fromkeys(range(1, num_pages))  # oldest first
        self._holders = [0] * num_pages
        self._found: dict[Block, tuple[int, int]] = {}  # its page and number
        self._blocks_in: dict[int, list[Block]] = defaultdict(list)
        # Never given twice, so that a block is found only behind the very tokens it was
        # written behind.
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """The page that has been free for longest; what it held is forgotten.

        Raises:
          KeyError: there is none.
        """
        page, _ = self._free.popitem(last=False)
        for block in self._blocks_in.pop(page, ()):
            del self._found[block]
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holds the page, or the first again."""
        self._free.pop(page, None)
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """One fewer."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free[page] = None

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Pages that hold the beginning of `tokens`, in order; if they hold all, the
        last may hold less than a page of it."""
        pages, number = [], 0
        for part in self._parts(tokens):
            if (number, part) not in self._found:
                break
            page, number = self._found[number, part]
            pages.append(page)
        return pages

    def keep(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remembers that `pages` hold `tokens`, as far as no others do."""
        number = 0
        for part, page in zip(self._parts(tokens), pages, strict=False):
            block = number, part
            if block not in self._found:
                self._found[block] = page, next(self._numbers)
                self._blocks_in[page].append(block)
            _, number = self._found[block]

    def _parts(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        for start in range(0, len(tokens), self.size):
            yield tuple(tokens[start : start + self.size])

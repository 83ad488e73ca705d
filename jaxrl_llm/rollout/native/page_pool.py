"""The pages of the cache: who has them, and which prefixes they hold. On the host.

Pages are counted: sequences with the same prefix retain the same ones. A page that all
have released keeps what was written to it until it is allocated again, and is found
meanwhile by sequences with that prefix.

Source: Kwon et al. 2023 (arXiv:2309.06180).
"""

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence

Block = tuple[int, tuple[int, ...]]
"""The tokens of a page, and the number of the block before it (0: none)."""


class PagePool:
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
        """Pages that can be allocated."""
        return len(self._free)

    def allocate(self) -> int:
        """The page that was released longest ago; what it held is forgotten.

        Raises:
          KeyError: there is none.
        """
        page, _ = self._free.popitem(last=False)
        for block in self._blocks_in.pop(page, ()):
            del self._found[block]
        self._holders[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more sequence has the page."""
        self._free.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One fewer sequence has the page."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free[page] = None

    def match_prefix(self, tokens: Sequence[int]) -> list[int]:
        """Pages that hold the longest known prefix of `tokens`, in order; if they hold
        all, the last may hold less than a page of it."""
        pages, number = [], 0
        for part in self._parts(tokens):
            if (number, part) not in self._found:
                break
            page, number = self._found[number, part]
            pages.append(page)
        return pages

    def cache_prefix(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
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

"""The scheduler against a device that only counts, and the pool by hand."""

import numpy as np
import pytest

from jaxrl_llm.rollout.engine import Request, Sampling
from jaxrl_llm.rollout.native import scheduler as schedulers
from jaxrl_llm.rollout.native.page_pool import PagePool
from jaxrl_llm.rollout.native.scheduler import Response, Scheduler


def test_sequences_that_begin_alike_find_the_same_pages():
    pool = PagePool(num_pages=6, size=2)
    pages = [pool.allocate() for _ in range(3)]
    pool.cache_prefix((1, 2, 3, 4, 5), pages)
    assert pool.match_prefix((1, 2, 3, 4, 5)) == pages
    assert pool.match_prefix((1, 2, 3, 4, 6)) == pages[:2]  # its end is another
    assert pool.match_prefix((1, 2, 3)) == pages[:1]  # half a page was never kept
    assert pool.match_prefix((3, 4, 5)) == []  # the same tokens, but behind others
    assert len(pool) == 2


def test_pages_that_nobody_holds_are_found_until_they_are_needed():
    pool = PagePool(num_pages=4, size=2)
    pages = [pool.allocate(), pool.allocate()]
    pool.cache_prefix((1, 2, 3, 4), pages)
    pool.retain(pages[0])
    pool.release(pages[0])
    for page in pages:
        pool.release(page)
    assert len(pool) == 3 and pool.match_prefix((1, 2, 3, 4)) == pages
    assert pool.allocate() == 3  # it was free for longest
    assert pool.allocate() == pages[0]
    assert pool.match_prefix((1, 2, 3, 4)) == []  # nothing is found behind what is lost
    pool.cache_prefix((1, 2), [pages[0]])
    assert pool.match_prefix((1, 2, 3, 4)) == [pages[0]]  # nor behind its like
    pool.allocate()
    with pytest.raises(KeyError):
        pool.allocate()


@pytest.fixture(params=[0, 1, 2, 3])
def rng(request):
    return np.random.default_rng(request.param)


def simulate(
    rng, *, num_pages, size, rows, chunk, prompts, stop_early=0.0, most=(4, 4, 5)
):
    """Runs random requests; checks at every step that what a sequence reads is what was
    written for it. Returns how often a response was preempted.

    Prompts, samples and responses are shorter than `most`, in pages; or equal to it
    where that is negative."""

    def drawn(most, unit=1):
        return -most * unit if most < 0 else int(rng.integers(1, most * unit))

    scheduler = Scheduler(
        PagePool(num_pages, size),
        num_rows=rows,
        num_slots=2 * rows,
        width=num_pages,
        chunk=chunk,
        max_prefill=3 * size,
    )
    cache = {}  # (page, place): the tokens up to the one that stands there
    on_device = [None] * rows  # [slot, position, tokens, limit]
    begin, queue = {}, []
    asked = []
    for p in range(prompts):
        length = drawn(most[0], size)
        tokens = tuple(rng.integers(0, 2, length).tolist())
        request = Request(
            prompt_id=p,
            tokens=tokens,
            num_samples=drawn(most[1]),
            seed=0,
            sampling=Sampling(max_tokens=drawn(most[2], size)),
        )
        asked += [Response(request, i) for i in range(request.num_samples)]
    scheduler.waiting.extend(asked)
    done, flight, preempted = [], None, 0

    def write(pages, position, tokens):
        place = pages[position // size], position % size
        assert place[0] != 0
        cache[place] = tuple(tokens[: position + 1])

    def token_of(response_key, count):
        return (response_key * 7 + count) % 5

    for _ in range(10_000):
        if not scheduler.outstanding:
            break
        parts = list(scheduler.plan())
        preempted += len(scheduler._preempted)
        for made in parts:
            for number, pieces in enumerate(made.rounds):
                for piece in pieces:
                    assert (piece.start == 0) == (number == 0)
                    assert 0 < len(piece.tokens) <= 3 * size
                for (
                    piece
                ) in pieces:  # what comes before was written by an earlier round
                    owner = next(
                        r
                        for r in scheduler.slots
                        if r and tuple(r.pages) == piece.pages
                    )
                    for position in range(piece.start):
                        place = piece.pages[position // size], position % size
                        assert cache[place] == owner.sequence[: position + 1]
                    for i in range(len(piece.tokens)):
                        write(piece.pages, piece.start + i, owner.sequence)
            for source, target in made.copies:
                for i in range(size):
                    if (source, i) in cache:
                        cache[target, i] = cache[source, i]
        for slot in [slot for made in parts for slot in made.queue]:
            response = scheduler.slots[slot]
            key = response.request.prompt_id * 3 + response.sample
            begin[slot] = [
                slot, response.position, list(response.sequence),
                response.end, key, len(response.tokens),
            ]  # fmt: skip
            queue.append(slot)
        # The tables as they are sent; the host goes on to change its own.
        tables, room = scheduler.tables.copy(), scheduler.room.copy()
        last, steps = flight, []
        for i, row in enumerate(on_device):
            if row and row[0] in scheduler.released:
                on_device[i] = None
        for _ in range(chunk):
            line = []
            for i in range(rows):
                if on_device[i] is None and queue:
                    on_device[i] = begin.pop(queue.pop(0))
                row = on_device[i]
                if row is None or row[1] >= room[row[0]]:
                    line.append((-1, 0))
                    continue
                slot, position, tokens, end, key, count = row
                write(tables[slot], position, tokens)
                for p in range(position + 1):  # all that it attends to
                    place = tables[slot, p // size], p % size
                    assert cache[place] == tuple(tokens[: p + 1])
                tokens.append(token_of(key, count))
                line.append((slot, tokens[-1]))
                row[1], row[5] = position + 1, count + 1
                if row[1] == end:
                    on_device[i] = None
            steps.append(line)
        flight = np.array(steps)
        if last is None:
            continue
        zeros = np.zeros(last.shape[:2], np.float32)
        none = zeros[..., None][..., :0]
        for response, before in scheduler.append(
            last[..., 0], last[..., 1], zeros, zeros, zeros, none, none
        ):
            key = response.request.prompt_id * 3 + response.sample
            expected = [token_of(key, i) for i in range(len(response.tokens))]
            assert response.tokens == expected
            full = len(response.tokens) == response.request.sampling.max_tokens
            early = rng.random() < stop_early
            if full or early:
                if early:
                    del response.tokens[before + 1 :]
                scheduler.finish(response, device_knows=full and not early)
                done.append(response)
    assert len(done) == len(asked) == len(set(map(id, done)))
    pool = scheduler.pool
    for _ in range(3):  # slots that are told off come back a plan later
        list(scheduler.plan())
    assert len(pool) == num_pages - 1 and len(scheduler._free) == 2 * rows
    return preempted


@pytest.mark.parametrize("together", [1, 3, 100])
def test_with_room_for_all_nobody_is_preempted(rng, together, monkeypatch):
    monkeypatch.setattr(schedulers, "PLANNED_TOGETHER", together)
    sizes = {"num_pages": 200, "size": 4, "rows": 4, "chunk": 3, "prompts": 12}
    assert simulate(rng, **sizes) == 0


@pytest.mark.parametrize("together", [1, 3, 100])
def test_without_room_responses_are_put_back_and_none_is_lost(
    rng, together, monkeypatch
):
    monkeypatch.setattr(schedulers, "PLANNED_TOGETHER", together)
    # The longest sequence needs nine pages, and that is all there are.
    sizes = {"num_pages": 10, "size": 4, "rows": 4, "chunk": 3, "prompts": 12}
    assert simulate(rng, **sizes) > 0


def test_nothing_is_read_ahead_that_must_be_given_up(rng):
    # Four sequences of seven pages fit, and one page is left.
    sizes = {"num_pages": 30, "size": 4, "rows": 4, "chunk": 3, "prompts": 12}
    assert simulate(rng, **sizes, most=(-2, -1, -5)) == 0


def test_responses_that_the_host_stops_make_room(rng):
    sizes = {"num_pages": 16, "size": 4, "rows": 3, "chunk": 5, "prompts": 12}
    simulate(rng, **sizes, stop_early=0.3)


def test_the_page_to_copy_from_may_be_the_only_one_there_is():
    scheduler = Scheduler(
        PagePool(2, size=8), num_rows=1, num_slots=2, width=1, chunk=4, max_prefill=8
    )
    request = Request(
        prompt_id=0, tokens=(1, 2, 3), num_samples=2, seed=0,
        sampling=Sampling(max_tokens=2),
    )  # fmt: skip
    scheduler.waiting.extend(Response(request, i) for i in range(2))
    for _ in range(2):
        [made] = scheduler.plan()
        [slot] = made.queue
        [[piece]] = made.rounds  # read again: nothing to copy from would be left
        assert (piece.tokens, made.copies) == ((1, 2), [])
        [(response, _)] = scheduler.append(
            np.full((2, 1), slot), *np.zeros((4, 2, 1), int), *np.zeros((2, 2, 1, 0))
        )
        scheduler.finish(response, device_knows=True)
    assert scheduler.outstanding == 0

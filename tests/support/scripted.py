"""An engine, a template and environments that play by a script, without a model."""

import heapq
import random
import threading
from concurrent.futures import Future

import numpy as np

from jaxrl_llm.agents.environments import Opening, Outcome, Reply
from jaxrl_llm.data.types import Completion
from jaxrl_llm.rollout import engine

END, TURN, USER = 1, 2, 3  # tokens of the template


class Engine(engine.Engine):
    """Draws tokens from a hash of all that it is asked; answers in a random order."""

    def __init__(self, order=0, length=4, cut=lambda request: False):
        self.requests, self._order = [], random.Random(order)
        self._length, self._cut = length, cut

    def completions(self, more):
        outstanding = []
        while True:
            outstanding += more(not outstanding)
            if not outstanding:
                return
            request = outstanding.pop(self._order.randrange(len(outstanding)))
            assert request.num_samples == 1
            self.requests.append(request)
            yield self._answer(request)

    def _answer(self, request):
        words = [request.seed, request.prompt_id, request.first_sample, request.turn]
        draw = np.random.default_rng([*words, *request.tokens])
        limit = request.sampling.max_tokens
        count = min(int(draw.integers(1, self._length + 1)), limit)
        cut = count == limit or self._cut(request)
        tokens = draw.integers(100, 200, count).tolist()
        if not cut:
            tokens[-1] = END
        return Completion(
            prompt_id=request.prompt_id,
            sample=request.first_sample,
            tokens=np.array(tokens, np.int32),
            logprobs=draw.random(count, np.float32),
            raw_logprobs=None,
            finish_reason="length" if cut else "stop",
            weight_version=0,
            text=" ".join(map(str, tokens[:-1])),
            prefilled=len(request.tokens) - 1,
        )


class Template:
    """A message is its role and one token for every letter; nothing decodes.

    Args:
      rewrites: whether, told of a "b", it writes answers without what was sampled.
    """

    def __init__(self, rewrites=False):
        self._rewrites = rewrites

    def begin(self, messages, tools):
        return (*self._said(messages), TURN)

    def splice(self, sampled, finish_reason, messages):
        end = () if sampled[-1] == END else (END,)
        return (*end, *self._said(messages), TURN)

    def rewritten(self, messages, tools, tokens):
        if self._rewrites and "b" in messages[-1]["content"]:
            return self.begin([m for m in messages if m["role"] != "assistant"], tools)
        return None

    def _said(self, messages):
        return [t for m in messages for t in (USER, *map(ord, m["content"]), END)]


class Environments:
    """Each episode says its seed, then so many words as `script` has.

    Args:
      script: called with key, seed and number of the turn; gives the reply, or raises.
      order: answers come in a random order, by a thread.
    """

    def __init__(self, script, order=0, opening=lambda key, seed: "go"):
        self._script, self._opening = script, opening
        self._order = random.Random(order)
        self._turns, self._seeds, self._sum = {}, {}, {}
        self.opened, self.closed, self.most = [], [], 0
        self._jobs, self._ready = [], threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def open(self, key, prompt, seed):
        def begin():
            self.opened.append((key, seed))
            self._turns[key], self._seeds[key], self._sum[key] = 0, seed, 0.0
            self.most = max(self.most, len(self._turns))
            said = {"role": "user", "content": self._opening(key, seed)}
            return Opening(messages=(*prompt.content, said))

        return self._later(begin)

    def answer(self, key, text):
        def reply():
            turn = self._turns[key]
            self._turns[key] += 1
            made = self._script(key, self._seeds[key], turn)
            self._sum[key] += made.reward or 0.0
            return made

        return self._later(reply)

    def close(self, key):
        def end():
            self.closed.append(key)
            del self._turns[key]
            return Outcome(reward=self._sum[key], environment=f"of {key}")

        return self._later(end)

    def shutdown(self):
        self._later(None)
        self._thread.join()

    def _later(self, act):
        future = Future()
        with self._ready:
            priority = self._order.random() if act else 2
            heapq.heappush(self._jobs, (priority, len(self._jobs), act, future))
            self._ready.notify()
        return future

    def _work(self):
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._jobs)
                _, _, act, future = heapq.heappop(self._jobs)
            if act is None:
                return
            try:
                result = act()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)


def said(text, **more):
    """A reply of a user."""
    return Reply(messages=({"role": "user", "content": text},), **more)

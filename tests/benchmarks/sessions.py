"""What do conversations cost that stay, that move, and that move when it pays? Agents' sessions, simulated.

    python tests/benchmarks/sessions.py --sessions 200 --seed 0

The trace is synthetic. A session has 8 user turns on average, each with 6 calls amid tools; histories grow, are
replaced by a summary above 120,000 tokens, and every tenth turn starts a sub-agent. A turn has a difficulty, which
follows that of the turn before; P(correct) of a target is logistic(skill - difficulty), and the router reads it with an
error. A sixth of the pauses between turns is longer than upstreams cache a prefix, five minutes; writing to their
caches costs nothing more. Each call goes through the gateway's own code: `thread_of`, `Conversations`, `known_prefix`,
`RoutedPlan` and `decide_one`; only the encoder and the upstreams are simulated.

Quality is the mean P(correct) of the user turns, of the target that gave the last answer. Printed are a table, and one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

from prefill_router.common.console import say
from prefill_router.policy.decision import Decision, KnownPrefix, Policy, Prediction, decide_one
from prefill_router.policy.pool import Pool, Target
from prefill_router.policy.switching import SwitchRule
from prefill_serve.gateway.candidates import RoutedPlan
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.conversation_keys import thread_of
from prefill_serve.gateway.planner import known_prefix
from prefill_serve.gateway.state.conversations import Conversations, Past

POOL = Pool(
    name="agents",
    targets=(
        Target(name="large", input_price=5.0, output_price=25.0, cached_input_price=0.5),
        Target(name="medium", input_price=1.25, output_price=10.0, cached_input_price=0.125),
        Target(name="small", input_price=0.25, output_price=2.0, cached_input_price=0.025),
    ),
)
TARGETS = {target.name: target for target in POOL.targets}
SKILLS = np.array([2.2, 1.5, 0.6])  # of large, medium and small
TURN_ERROR, CALL_ERROR = 0.3, 0.15  # standard deviations of the router's error in logits, of a turn and of each call
SESSION_S = 1e5  # of the simulation's clock
TOOL_TOKENS, SYSTEM_TOKENS, SUMMARY_TOKENS = 8_000, 4_000, 3_000
MOST_TOKENS = 120_000


@dataclass
class Message:
    role: str
    text: str  # stands for the content
    tokens: int


@dataclass
class Step:
    """One call of an agent: what it sends, when, and what its answer will take."""

    session: str
    agent: str  # "coder" or "searcher"
    messages: list[Message]
    at_s: float
    difficulty: float
    output_tokens: int
    ends_turn: bool  # of the user, whose answer it is

    @property
    def counted_tokens(self) -> int:
        """Tokens by the encoder, which does not see tools."""
        return SYSTEM_TOKENS + sum(message.tokens for message in self.messages)

    @property
    def call(self) -> ChatCall:
        said = [{"role": message.role, "content": message.text} for message in self.messages]
        system = {"role": "system", "content": f"You are {self.agent}"}
        return ChatCall({"messages": [system, *said], "tools": [{"function": {"name": self.agent}}]})


# --- trace ---------------------------------------------------------------------------------------------------------


def trace(num_sessions: int, seed: int) -> list[Step]:
    """The calls of all sessions, by time."""
    rng = Random(seed)
    steps = [step for number in range(num_sessions) for step in _session(f"s-{number}", Random(rng.random()))]
    return sorted(steps, key=lambda step: step.at_s)


def _session(name: str, rng: Random) -> Iterator[Step]:
    at_s, difficulty = rng.uniform(0.0, SESSION_S), rng.gauss(0.0, 1.0)
    history: list[Message] = []
    for turn in range(1 + _geometric(rng, 8.0)):
        at_s += rng.lognormvariate(math.log(90.0), 1.2) if turn else 0.0
        difficulty = 0.6 * difficulty + 0.8 * rng.gauss(0.0, 1.0)
        history.append(Message("user", f"{name} asks {turn}", 50 + _geometric(rng, 200.0)))
        if rng.random() < 0.1:  # the main agent waits for another one
            task = [Message("user", f"{name} delegates {turn}", 400)]
            for step in _turn(name, "searcher", task, at_s, difficulty - 1.0, rng, 0):
                step.ends_turn = False
                at_s = step.at_s
                yield step
        for step in _turn(name, "coder", history, at_s, difficulty, rng, turn):
            at_s = step.at_s
            yield step


def _turn(
    session: str, agent: str, history: list[Message], at_s: float, difficulty: float, rng: Random, turn: int
) -> Iterator[Step]:
    """The calls until the answer. `history` grows, or is replaced by a summary."""
    num_calls = 1 + _geometric(rng, 5.0)
    for number in range(num_calls):
        if sum(message.tokens for message in history) > MOST_TOKENS:
            history[:] = [Message("user", f"{session} {agent} summary {turn} {number}", SUMMARY_TOKENS)]
        is_last = number == num_calls - 1
        output_tokens = 40 + _geometric(rng, 400.0 if is_last else 150.0)
        yield Step(session, agent, list(history), at_s, difficulty, output_tokens, is_last)
        history.append(Message("assistant", f"{session} {agent} {turn} {number}", output_tokens))
        if not is_last:
            result_tokens = min(20_000, round(rng.lognormvariate(math.log(700.0), 1.2)))
            history.append(Message("tool", f"{session} {agent} result {turn} {number}", result_tokens))
        at_s += 3.0 + rng.expovariate(1 / 8.0)


def _geometric(rng: Random, mean: float) -> int:
    return round(rng.expovariate(1.0 / mean))


# --- upstreams ---------------------------------------------------------------------------------------------------


@dataclass
class PrefixCache:
    """A target's cache: the last message of each prefix that it has read, and when it was last used."""

    life_s: float
    _used_s: dict[str, float] = field(default_factory=dict)

    def read(self, step: Step) -> int:
        """Reads a prompt, and returns how many of its tokens were cached."""
        prefix, tokens, cached = step.agent, TOOL_TOKENS + SYSTEM_TOKENS, 0
        for message in [None, *step.messages]:
            if message is not None:
                prefix, tokens = message.text, tokens + message.tokens  # which occurs after one history only
            if step.at_s - self._used_s.get(prefix, -math.inf) <= self.life_s:
                cached = tokens
            self._used_s[prefix] = step.at_s
        return cached


# --- gateway -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedRouting:
    """A prompt as the router reads it, for a RoutedPlan."""

    prediction: Prediction
    counted_tokens: int
    tolerance: float

    @property
    def reading(self) -> Any:
        return SimpleNamespace(input_tokens=self.counted_tokens)

    def decide(self, policy: Policy, *, explores: bool = True, known: KnownPrefix | None = None) -> Decision:  # noqa: ARG002
        return decide_one(POOL, self.prediction, self.counted_tokens, False, policy, self.tolerance, "simulated", known)


def predicted(step: Step) -> Prediction:
    """P(correct) as the router reads it. Most of its error is that of the turn."""
    errors = (
        (Random(f"{step.session} {step.agent} {step.difficulty}"), TURN_ERROR),
        (Random(f"{step.session} {step.at_s}"), CALL_ERROR),
    )
    logits = SKILLS - step.difficulty + sum(np.array([rng.gauss(0.0, sd) for _ in SKILLS]) for rng, sd in errors)
    return Prediction(_p(logits).astype(np.float32), np.full(len(SKILLS), 200.0, np.float32))


def _p(logits: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-logits))


@dataclass
class Totals:
    usd: float = 0.0
    p_correct: float = 0.0
    turns: int = 0
    calls: int = 0
    moves: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0

    def figures(self, num_sessions: int) -> dict[str, float]:
        return {
            "usd_per_session": round(self.usd / num_sessions, 4),
            "quality": round(self.p_correct / self.turns, 4),
            "moves_per_session": round(self.moves / num_sessions, 2),
            "cached_share": round(self.cached_tokens / self.input_tokens, 3),
        }


def simulated(steps: Sequence[Step], rule: SwitchRule | None, tolerance: float) -> Totals:
    """Sends all calls through the gateway's code; without a rule each call is routed as if it began a conversation."""
    now_s = 0.0
    conversations = Conversations(lambda: now_s)
    caches = {name: PrefixCache(target.cache_life_s) for name, target in TARGETS.items()}
    totals = Totals()
    for step in steps:
        now_s, call = step.at_s, step.call
        thread = thread_of(call, "caller", step.session)
        past = conversations.past(thread.earlier, thread.main)
        routing: Any = SimulatedRouting(predicted(step), step.counted_tokens, tolerance)
        plan = _plan(routing, past, rule, call)
        chosen = plan.choose(list(TARGETS))
        assert chosen is not None
        input_tokens, cached_tokens = TOOL_TOKENS + step.counted_tokens, caches[chosen.target].read(step)
        conversations.keep([thread.own], Past(chosen.target, input_tokens, step.counted_tokens), thread.main)
        totals.calls += 1
        totals.moves += past is not None and past.target != chosen.target
        totals.input_tokens += input_tokens
        totals.cached_tokens += cached_tokens
        totals.usd += TARGETS[chosen.target].cost(input_tokens, step.output_tokens, cached_tokens)
        if step.ends_turn:
            totals.turns += 1
            totals.p_correct += float(_p(SKILLS - step.difficulty)[list(TARGETS).index(chosen.target)])
    return totals


def _plan(routing: Any, past: Past | None, rule: SwitchRule | None, call: ChatCall) -> RoutedPlan:
    if past is None or rule is None:
        return RoutedPlan(routing, Policy(), None, SwitchRule(0.0))
    known = known_prefix(past, routing.counted_tokens, TARGETS[past.target].cache_life_s)
    return RoutedPlan(routing, Policy(), past.target, rule, known, call.carries_results)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.05, 0.15])
    parser.add_argument("--quality-usd", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    options = parser.parse_args(arguments)
    steps = trace(options.sessions, options.seed)
    rules = {
        "always switch": None,
        "always stick": SwitchRule(1.0),
        "margin 0.05": SwitchRule(0.05),
        **{f"cache-aware, {usd:g} USD": SwitchRule(0.05, usd) for usd in options.quality_usd},
    }
    found = {
        f"{name}, tolerance {tolerance:g}": simulated(steps, rule, tolerance).figures(options.sessions)
        for tolerance in options.tolerance
        for name, rule in rules.items()
    }
    say(f"{'':40} {'USD':>8} {'quality':>8} {'moves':>6} {'cached':>7}")
    for name, (usd, quality, moves, cached) in ((name, figures.values()) for name, figures in found.items()):
        say(f"{name:40} {usd:8.4f} {quality:8.4f} {moves:6.2f} {cached:7.1%}")
    turns = sum(step.ends_turn for step in steps)
    result = {"sessions": options.sessions, "turns": turns, "calls": len(steps), "policies": found}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

"""Sessions of agents, in the shape in which they send them: which calls belong to one conversation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.conversation_keys import thread_of
from prefill_serve.gateway.messages_calls import MessagesCall
from prefill_serve.gateway.openai_calls import Call
from prefill_serve.gateway.responses_calls import ResponsesCall
from prefill_serve.gateway.state.conversations import Conversations, Past

TURNS = 50
CODE = ("edit", "read", "run", "task")
SEARCH = ("read", "run")
_minutes = itertools.count()


def clock() -> str:
    """The time, which is another at each call."""
    minute = next(_minutes)
    return f"Today is 2026-11-29, {minute // 60:02}:{minute % 60:02}."


class Agent:
    """An agent that sends its whole history with each call, the time in its instructions, and two tools at once."""

    def __init__(self, kind: type[Call], role: str, tools: tuple[str, ...], task: str) -> None:
        self.kind, self.role, self.tools = kind, role, tools
        self.history = [self._user(task)]
        self.turns = 0

    def _user(self, text: str) -> dict[str, Any]:
        if self.kind is MessagesCall:
            return {"role": "user", "content": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]}
        return {"role": "user", "content": text}

    @property
    def instructions(self) -> str:
        return f"{clock()} You are {self.role}. Answer in a line."

    def call(self, **fields: Any) -> Call:
        """The next call. Breakpoints of the cache have moved to its end."""
        said = [self._without_breakpoints(each) for each in self.history[:-1]] + self.history[-1:]
        if self.kind is ChatCall:
            tools = [{"type": "function", "function": {"name": name}} for name in self.tools]
            said = [{"role": "system", "content": self.instructions}, *said]
            return ChatCall({"messages": said, "tools": tools, **fields})
        if self.kind is ResponsesCall:
            tools = [{"type": "function", "name": name} for name in self.tools]
            return ResponsesCall({"instructions": self.instructions, "input": said, "tools": tools, **fields})
        tools = [{"name": name, "input_schema": {"type": "object"}} for name in self.tools]
        system = [{"type": "text", "text": self.instructions}]
        return MessagesCall({"system": system, "messages": said, "tools": tools, **fields})

    @staticmethod
    def _without_breakpoints(message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        return {**message, "content": [{k: part[k] for k in part if k != "cache_control"} for part in content]}

    def proceed(self) -> None:
        """Adds an answer that calls two tools, and their results."""
        self.turns += 1
        ids = [f"{self.role}-{self.turns}-{i}" for i in range(2)]
        if self.kind is ChatCall:
            calls = [{"id": each, "type": "function", "function": {"name": "read"}} for each in ids]
            self.history.append({"role": "assistant", "content": None, "tool_calls": calls})
            self.history += [{"role": "tool", "tool_call_id": each, "content": f"result {each}"} for each in ids]
        elif self.kind is ResponsesCall:
            self.history += [{"type": "function_call", "call_id": each, "name": "read"} for each in ids]
            self.history += [{"type": "function_call_output", "call_id": each, "output": each} for each in ids]
        else:
            calls = [{"type": "tool_use", "id": each, "name": "read", "input": {}} for each in ids]
            self.history.append({"role": "assistant", "content": calls})
            results = [{"type": "tool_result", "tool_use_id": each, "content": f"result {each}"} for each in ids]
            self.history.append({"role": "user", "content": results})

    def compact(self) -> None:
        """Replaces the history by a summary."""
        self.history = [self._user(f"What was done so far: {self.turns} turns.")]


class Ledger:
    """Stores each call's conversation under a target of its own."""

    def __init__(self) -> None:
        self.conversations = Conversations()
        self._numbers = itertools.count()

    def ask(self, call: Call, session: str | None = None, caller: str = "ann") -> tuple[str | None, str]:
        """The target that the conversation is known by, and the one that answers now."""
        thread = thread_of(call, caller, session)
        past = self.conversations.past(thread.earlier, thread.main)
        target = f"target {next(self._numbers)}"
        self.conversations.keep([thread.own], Past(target, 10, 10), thread.main)
        return past and past.target, target


KINDS = pytest.mark.parametrize("kind", [ChatCall, ResponsesCall, MessagesCall])
SESSIONS = pytest.mark.parametrize("session", ["s-1", None])


@KINDS
@SESSIONS
def test_fifty_turns_with_two_sub_agents_are_three_conversations(kind: type[Call], session: str | None) -> None:
    ledger, main = Ledger(), Agent(kind, "the main agent", CODE, "fix the build")
    subs: list[Agent] = []
    latest: dict[str, str | None] = {}
    for turn in range(TURNS):
        if turn in (10, 12):
            task = f"search for {turn}"
            subs.append(Agent(kind, "a search agent", SEARCH, task))
        for agent in [main, *subs]:
            name = f"{agent.role} {subs.index(agent)}" if agent in subs else agent.role
            found, latest[name] = ledger.ask(agent.call(), session), latest.get(name)
            assert found[0] == latest[name]
            latest[name] = found[1]
            agent.proceed()
    assert len(latest) == 3


@KINDS
def test_a_main_agent_that_replaces_its_history_goes_on(kind: type[Call]) -> None:
    ledger, main = Ledger(), Agent(kind, "the main agent", CODE, "fix the build")
    sub = Agent(kind, "a search agent", SEARCH, "search")
    for agent in (main, sub, main):
        target = ledger.ask(agent.call(), "s-1")[1]
        agent.proceed()
    main.compact()
    thread = thread_of(main.call(), "ann", "s-1")
    past = ledger.conversations.past(thread.earlier, thread.main)
    assert past is not None
    assert (past.target, past.age_s) == (target, float("inf"))  # its cache is of the other history
    assert ledger.ask(main.call(), "s-1")[0] == target


@KINDS
def test_a_sub_agent_that_replaces_its_history_is_not_taken_for_the_main_agent(kind: type[Call]) -> None:
    ledger, main = Ledger(), Agent(kind, "the main agent", CODE, "fix the build")
    sub = Agent(kind, "a search agent", SEARCH, "search")
    for agent in (main, sub):
        ledger.ask(agent.call(), "s-1")
    sub.compact()
    assert ledger.ask(sub.call(), "s-1")[0] is None


@KINDS
def test_agents_with_the_same_tools_are_told_apart_by_their_instructions(kind: type[Call]) -> None:
    ledger = Ledger()
    ledger.ask(Agent(kind, "the main agent", CODE, "fix the build").call(), "s-1")
    assert ledger.ask(Agent(kind, "a reviewer", CODE, "review it").call(), "s-1")[0] is None


def test_a_call_for_a_title_is_not_the_main_agent() -> None:
    ledger = Ledger()
    main = Agent(MessagesCall, "the main agent", CODE, "fix the build")
    title = Agent(MessagesCall, "a writer of titles", (), "fix the build")
    ledger.ask(title.call(), "s-1")
    found, target = ledger.ask(main.call(), "s-1")
    assert found is None
    main.compact()
    assert ledger.ask(main.call(), "s-1")[0] == target


@KINDS
def test_a_history_without_its_middle_is_found_by_its_first_message(kind: type[Call]) -> None:
    ledger, main = Ledger(), Agent(kind, "the main agent", CODE, "fix the build")
    for _ in range(6):
        target = ledger.ask(main.call(), "s-1")[1]
        main.proceed()
    main.history = [main.history[0], *main.history[-3:]]
    assert ledger.ask(main.call(), "s-1")[0] == target


@KINDS
def test_a_cache_key_names_conversations_only_with_their_first_message(kind: type[Call]) -> None:
    ledger = Ledger()
    one, other = (Agent(kind, "an assistant", CODE, task) for task in ("fix the build", "write a test"))
    targets = [ledger.ask(agent.call(prompt_cache_key="app"))[1] for agent in (one, other)]
    again = Agent(kind, "an assistant", CODE, "fix the build")
    assert ledger.ask(again.call(prompt_cache_key="app"))[0] is None
    other.proceed()
    assert ledger.ask(other.call(prompt_cache_key="app"))[0] == targets[1]
    assert ledger.ask(other.call(prompt_cache_key="app"), caller="bob")[0] is None
    assert ledger.ask(other.call(prompt_cache_key="other"))[0] is None


@KINDS
def test_nobody_finds_another_callers_session(kind: type[Call]) -> None:
    ledger, main = Ledger(), Agent(kind, "the main agent", CODE, "fix the build")
    ledger.ask(main.call(), "s-1")
    main.proceed()
    assert ledger.ask(main.call(), "s-1", caller="bob")[0] is None

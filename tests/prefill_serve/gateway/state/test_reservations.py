"""Reservations are returned in full, and lapse."""

from __future__ import annotations

import random

from prefill_serve.gateway.state.reservations import LAPSES_S, Reservations


class Clock:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def test_reservations_add_up_by_caller_and_end_each_by_itself() -> None:
    reservations = Reservations()
    reservations.make("a", "ann", 0.25)
    reservations.make("b", "ann", 0.5)
    reservations.make("c", "bob", 1.0)
    assert reservations.usd() == {"ann": 0.75, "bob": 1.0}
    reservations.end("a")
    reservations.end("a")
    reservations.end("nobody's")
    assert reservations.usd() == {"ann": 0.5, "bob": 1.0}


def test_a_ticket_has_one_reservation_at_a_time() -> None:
    reservations = Reservations()
    reservations.make("a", "ann", 0.25)
    reservations.make("a", "ann", 0.5)
    assert reservations.usd() == {"ann": 0.5}
    reservations.end("a")
    assert reservations.usd() == {}


def test_nothing_is_left_of_many_in_any_order() -> None:
    dice, reservations = random.Random(0), Reservations()
    tickets = [str(n) for n in range(10_000)]
    costs = {ticket: dice.lognormvariate(-8.0, 3.0) for ticket in tickets}
    for ticket, usd in costs.items():
        reservations.make(ticket, "ann", usd)
    assert abs(reservations.usd()["ann"] - sum(costs.values())) < 1e-6
    dice.shuffle(tickets)
    for ticket in tickets:
        reservations.end(ticket)
    assert reservations.usd() == {}


def test_of_calls_whose_end_nobody_tells_nothing_is_held_for_ever() -> None:
    clock = Clock()
    reservations = Reservations(clock)
    reservations.make("of a replica that dies", "ann", 0.25)
    clock.now_s += LAPSES_S - 1.0
    reservations.make("of another", "ann", 0.5)
    assert reservations.usd() == {"ann": 0.75}
    clock.now_s += 1.0
    assert reservations.usd() == {"ann": 0.5}
    reservations.end("of a replica that dies")  # it was only slow
    assert reservations.usd() == {"ann": 0.5}
    clock.now_s += LAPSES_S
    assert reservations.usd() == {}


def test_a_call_that_lasts_keeps_its_reservation_while_it_is_renewed() -> None:
    clock = Clock()
    reservations = Reservations(clock)
    for ticket in ("long", "of a replica that dies", "ended"):
        reservations.make(ticket, "ann", 0.25)
    reservations.end("ended")
    for _ in range(5):
        clock.now_s += LAPSES_S / 2
        reservations.renew(["long", "ended", "of nobody"])
    assert reservations.usd() == {"ann": 0.25}
    clock.now_s += LAPSES_S
    assert reservations.usd() == {}

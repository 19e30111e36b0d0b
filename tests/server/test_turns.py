"""Turns between clients, however much each has asked for."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from siliconlm.server.turns import Turns


def drain(turns: Turns[str]) -> list[str]:
    return [turns.next() for _ in range(len(turns))]


def test_each_client_has_its_turn() -> None:
    turns: Turns[str] = Turns()
    for work in ("a1", "a2", "a3", "b1", "a4", "c1", "b2"):
        turns.add(work[0], work)
    assert len(turns) == 7
    assert drain(turns) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert not turns.waiting


def test_who_comes_late_does_not_wait_for_all_that_came_before() -> None:
    turns: Turns[str] = Turns()
    for number in range(100):
        turns.add("many", f"many{number}")
    assert [turns.next(), turns.next()] == ["many0", "many1"]
    turns.add("one", "one0")
    assert "one0" in (turns.next(), turns.next())


def test_work_that_is_no_longer_wanted() -> None:
    turns: Turns[str] = Turns()
    for work in ("a1", "a2", "b1"):
        turns.add(work[0], work)
    for client, work in (("a", "a1"), ("b", "b1"), ("b", "b1"), ("c", "c1"), ("a", "a9")):
        turns.remove(client, work)
    assert len(turns) == 1 and drain(turns) == ["a2"] and not turns.waiting


@given(st.lists(st.sampled_from("abcd"), max_size=40))
def test_nobody_is_two_ahead_of_anyone_who_waits(clients: list[str]) -> None:
    turns: Turns[str] = Turns()
    for client in clients:
        turns.add(client, client)
    left, served = Counter(clients), Counter[str]()
    for client in drain(turns):
        served[client] += 1
        left[client] -= 1
        assert all(served[client] - served[other] <= 1 for other in left if left[other])
    assert served == Counter(clients)

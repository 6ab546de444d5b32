"""capacity.py: where queueing theory knows the answer, the simulation has it too."""

import pytest

from capacity import Card, enough, row, simulate


def test_one_picture_after_the_other_waits_as_m_d_1():
    """Fixed times and one row for each: the mean wait is rho / (2 (1 - rho)) services."""
    card, load = Card([2], [0.1], 1.0), 0.7
    _, latencies, _ = simulate(card, load, 40000, steps=10, max_rows=2)
    wait = sum(latencies) / len(latencies) - 1
    assert wait == pytest.approx(load / (2 * (1 - load)), rel=0.1)


def test_nothing_is_drawn_beyond_capacity():
    card = Card([2, 8], [0.1, 0.2], 1.0)
    # Four at once in 20 steps of 0.2 s are one a second.
    _, latencies, _ = simulate(card, 3.0, 1000)
    assert len(latencies) / 500 <= 1.0


def test_alone_a_picture_takes_its_steps():
    _, latencies, replicas = simulate(Card([2, 8], [0.05, 0.2], 1.0), 0.001, 100000, steps=20)
    assert min(latencies) == pytest.approx(1.0) and replicas == 1


def test_steps_between_measured_ones_lie_between():
    card = Card([2, 4, 8], [0.1, 0.2, 0.3], 1.0)
    assert [round(card.step(rows), 3) for rows in (1, 2, 3, 4, 6, 8, 16)] == [0.1, 0.1, 0.15, 0.2, 0.25, 0.3, 0.6]


def test_more_replicas_wait_less_than_their_share():
    """Pooled queues: 20 replicas at the same use keep a promise that one does not."""
    card = Card([2, 8], [0.1, 0.3], 1.0)
    one = row(card, 0.55, 4000, replicas=1)
    twenty = row(card, 11, 800, replicas=20)
    assert twenty["p99"] < one["p99"]


def test_the_autoscaler_follows_and_costs_less_than_the_most():
    card = Card([2, 8], [0.1, 0.3], 1.0)
    found = row(card, 3, 4000, replicas=1, most=20, start=30)
    assert found["kept"] > 0.95 and 4 <= found["replicas"] < 15


def test_what_is_enough_keeps_the_promise():
    card = Card([2, 8], [0.1, 0.3], 1.0)
    found = enough(card, 5, 300, 12)
    assert found["p99"] <= 12

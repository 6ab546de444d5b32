#!/usr/bin/env python3
"""How many replicas a load needs: a simulation of arrivals, queues, steps that are shared, and an autoscaler.

    tests/deploy/capacity.py                          # the table of docs/scaling.md
    tests/deploy/capacity.py --step-ms 42 42 45 60 --rows 2 4 8 16 --rate 2 --steps 20

A picture takes `steps` steps. All pictures of a replica share each step; a step of r rows takes what the
table of measured times says, between its entries by a straight line. A picture has two rows. A replica
takes `max-rows` rows at once, the others wait in its queue. Pictures go to the replica with the fewest.
Every `poll` seconds the autoscaler wants as many replicas as waiting and running pictures fill, times
`batches`; a new one is ready after `start` seconds; no more than one is ended every `pace` seconds, and only
what was not wanted for `window` seconds, as the chart's ScaledObject has it.
"""

import argparse
import heapq
import math
import random
import statistics
from bisect import bisect_left
from dataclasses import dataclass, field


@dataclass
class Card:
    """Seconds of a step by the number of rows, and what an hour costs."""

    rows: list
    seconds: list
    usd_hour: float

    def step(self, rows):
        if rows <= self.rows[0]:
            return self.seconds[0]
        place = bisect_left(self.rows, rows)
        if place == len(self.rows):
            # Beyond the table in proportion.
            return self.seconds[-1] * rows / self.rows[-1]
        low, high = self.rows[place - 1], self.rows[place]
        share = (rows - low) / (high - low)
        return self.seconds[place - 1] + share * (self.seconds[place] - self.seconds[place - 1])


@dataclass
class Replica:
    """Pictures that share steps as [steps left, arrived], those that wait, and whether a step runs."""

    ready: float
    running: list = field(default_factory=list)
    waiting: list = field(default_factory=list)
    busy: bool = False
    ending: bool = False

    def load(self):
        return len(self.running) + len(self.waiting)


def simulate(card, rate, seconds, *, steps=20, max_rows=8, replicas=1, most=None, start=120.0,
             poll=5.0, batches=2.0, window=120.0, pace=30.0, seed=1):
    """Of the second half: the pictures that arrived, the latencies in seconds of those that were drawn by
    the end, and the mean number of replicas."""
    chance, capacity = random.Random(seed), max_rows // 2
    pool = [Replica(0.0) for _ in range(replicas)]
    events, order, latencies, arrived, paid, last = [], 0, [], 0, 0.0, 0.0
    wanted_lately, least, most, ended = [], replicas, most or replicas, 0.0

    def push(at, what, which=None):
        nonlocal order
        order += 1
        heapq.heappush(events, (at, order, what, which))

    def begin(now, replica):
        """The next step of a replica, with all pictures that fit."""
        while replica.waiting and len(replica.running) < capacity:
            replica.running.append(replica.waiting.pop(0))
        replica.busy = bool(replica.running)
        if replica.busy:
            push(now + card.step(2 * len(replica.running)), "step", replica)

    push(chance.expovariate(rate), "arrival")
    if most > least:
        push(poll, "poll")
    while events:
        now, _, what, replica = heapq.heappop(events)
        paid += len(pool) * max(0.0, min(now, seconds) - max(last, seconds / 2))
        last = now
        if now > seconds:
            break
        if what == "arrival":
            push(now + chance.expovariate(rate), "arrival")
            arrived += now > seconds / 2
            ready = [one for one in pool if one.ready <= now and not one.ending]
            # The best of a few, as least-request balancers choose; of all where there are few.
            some = ready if len(ready) <= 8 else chance.sample(ready, 8)
            replica = min(some, key=Replica.load)
            replica.waiting.append([steps, now])
            if not replica.busy:
                begin(now, replica)
        elif what == "step":
            for picture in replica.running:
                picture[0] -= 1
                if picture[0] == 0 and picture[1] > seconds / 2:
                    latencies.append(now - picture[1])
            replica.running = [picture for picture in replica.running if picture[0] > 0]
            begin(now, replica)
            if replica.ending and not replica.load():
                pool.remove(replica)
        else:
            push(now + poll, "poll")
            value = sum(one.load() for one in pool) / capacity
            wanted = min(max(math.ceil(value / batches), least), most)
            wanted_lately = [(at, n) for at, n in wanted_lately if at > now - window] + [(now, wanted)]
            living = [one for one in pool if not one.ending]
            for _ in range(wanted - len(living)):
                pool.append(Replica(now + start))
            ready = sorted((one for one in living if one.ready <= now), key=Replica.load)
            if len(living) > max(n for _, n in wanted_lately) and len(ready) > 1 and now - ended >= pace:
                ready[0].ending, ended = True, now
                if not ready[0].load():
                    pool.remove(ready[0])
    return arrived, latencies, paid / (seconds / 2)


def row(card, rate, seconds, **how):
    arrived, latencies, replicas = simulate(card, rate, seconds, **how)
    drawn = len(latencies) / (seconds / 2)
    latencies.sort()
    return {
        "rate": rate,
        "replicas": replicas,
        "kept": len(latencies) / max(arrived, 1),
        "p50": statistics.median(latencies) if latencies else math.inf,
        "p99": latencies[int(0.99 * len(latencies))] if latencies else math.inf,
        "usd": replicas * card.usd_hour / (3600 * drawn) * 1000 if drawn else math.inf,
    }


def enough(card, rate, seconds, within, **how):
    """The fewest replicas, without an autoscaler, of which p99 is within so many seconds."""
    fewest = math.ceil(rate * how.get("steps", 20) * card.step(how.get("max_rows", 8)) / (how.get("max_rows", 8) // 2))
    for replicas in range(max(fewest, 1), 4 * fewest + 8, max(1, fewest // 50)):
        found = row(card, rate, seconds, replicas=replicas, **how)
        if found["p99"] <= within and found["kept"] > 0.95:
            return found | {"replicas": replicas}
    raise ValueError(f"{rate} pictures a second are not to be had within {within} s")


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parse.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8])
    parse.add_argument("--step-ms", type=float, nargs="+", default=[60, 120, 240])
    parse.add_argument("--usd-hour", type=float, default=1.2)
    parse.add_argument("--rate", type=float, nargs="+", help="pictures a second; default: the whole table")
    parse.add_argument("--steps", type=int, default=20)
    parse.add_argument("--max-rows", type=int, default=8)
    parse.add_argument("--within", type=float, default=20.0, help="p99 to be kept, in seconds")
    parse.add_argument("--start", type=float, default=120.0, help="seconds until a new replica is ready")
    parse.add_argument("--seconds", type=float, default=1200.0)
    given = parse.parse_args()
    if len(given.rows) != len(given.step_ms):
        parse.error("--rows and --step-ms are of the same length")
    card = Card(given.rows, [ms / 1000 for ms in given.step_ms], given.usd_hour)
    how = {"steps": given.steps, "max_rows": given.max_rows}
    print("| pictures/s | replicas | p50, s | p99, s | USD per 1,000 |\n|---|---|---|---|---|")
    for rate in given.rate or [0.2, 1, 5, 20, 100, 800]:
        found = enough(card, rate, min(given.seconds, max(120.0, 20000 / rate)), given.within, **how)
        print(f"| {rate:g} | {found['replicas']} | {found['p50']:.1f} | {found['p99']:.1f} | {found['usd']:.2f} |")
    print("\n| start of a replica, s | batches per replica | replicas, mean | p99, s | USD per 1,000 |\n|---|---|---|---|---|")
    for start in (given.start / 4, given.start, given.start * 3):
        for batches in (1.0, 2.0):
            found = row(card, 5, 12 * given.seconds, replicas=1, most=40, start=start, batches=batches, **how)
            print(f"| {start:g} | {batches:g} | {found['replicas']:.1f} | {found['p99']:.1f} | {found['usd']:.2f} |")


if __name__ == "__main__":
    main()

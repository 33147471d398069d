from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rayexpand.runs import fleet
from rayexpand.runs.fleet import Course, Fleet, simulate

CALM = {"node_start_s": 100.0, "load_s": 20.0, "idle_s": 0.0}


def courses(seconds_n: np.ndarray, fleet: Fleet, repetitions: int) -> list[Course]:
    return [simulate(seconds_n, fleet, 7, number) for number in range(repetitions)]


def test_without_losses_the_end_is_start_load_and_rounds_of_shards() -> None:
    made = simulate(np.full(10, 50.0), Fleet(4, **CALM))  # 4, 4, 2 shards

    assert made.wall_hours * 3600 == pytest.approx(120 + 3 * 50)
    assert made.paid_hours * 3600 == pytest.approx(2 * (120 + 150) + 2 * (120 + 100))  # two are idle before the end
    assert made.waited_hours * 3600 == pytest.approx(4 * 120)
    assert (made.lost_hours, made.losses) == (0, 0)


def test_idle_nodes_are_paid_for_as_long_as_they_are_kept() -> None:
    made = simulate(np.array([10.0, 300.0]), Fleet(2, node_start_s=0, load_s=0, idle_s=60))

    assert made.paid_hours * 3600 == pytest.approx(300 + 70)


def test_a_node_of_several_gpus_is_idle_when_all_of_them_are() -> None:
    made = simulate(np.array([10.0, 300.0]), Fleet(2, per_node=2, node_start_s=0, load_s=0, idle_s=60))

    assert made.paid_hours * 3600 == pytest.approx(2 * 300)


def test_more_gpus_than_shards_are_not_asked_for() -> None:
    assert simulate(np.full(3, 50.0), Fleet(512, **CALM)).paid_hours * 3600 == pytest.approx(3 * 170)


def test_each_wave_loads_anew_and_waits_for_its_last_shard() -> None:
    seconds_n = np.array([10.0, 40.0, 10.0, 15.0])
    kept = simulate(seconds_n, Fleet(2, wave=2, node_start_s=100, load_s=20, idle_s=60))
    given_back = simulate(seconds_n, Fleet(2, wave=2, node_start_s=100, load_s=20, idle_s=20))

    assert kept.wall_hours * 3600 == pytest.approx(120 + 40 + 20 + 15)
    assert given_back.wall_hours * 3600 == pytest.approx(120 + 40 + 20 + 10 + 15)  # the other one would come later


def test_a_node_that_waited_for_a_wave_is_kept_while_it_loads_for_the_next() -> None:
    made = simulate(np.array([10.0, 40.0, 10.0, 10.0]), Fleet(2, wave=2, node_start_s=0, load_s=80, idle_s=60))

    assert made.wall_hours * 3600 == pytest.approx(80 + 40 + 80 + 10)


@pytest.mark.parametrize("rate", [1.0, 4.0, 12.0])
def test_one_gpu_with_losses_against_the_closed_form(rate: float) -> None:
    """A GPU that is up is lost at rate l. With boot B and loading L it is ready X = B + (1/l + B)(e^{lL} - 1) after a
    loss, and a shard of T seconds takes (1/l + X)(e^{lT} - 1), by the memoryless property."""
    shards, t_s, boot, load = 40, 240.0, 120.0, 60.0
    found = courses(np.full(shards, t_s), Fleet(1, loss_rate=rate, node_start_s=boot, load_s=load), 300)
    wall = 3600 * np.array([one.wall_hours for one in found])
    per_s = rate / 3600
    ready = boot + (1 / per_s + boot) * math.expm1(per_s * load)
    expected = ready + shards * (1 / per_s + ready) * math.expm1(per_s * t_s)

    assert wall.mean() == pytest.approx(expected, abs=4 * wall.std() / len(wall) ** 0.5)


def test_hours_add_up_with_losses() -> None:
    seconds_n = np.linspace(100, 300, 200)
    for made in courses(seconds_n, Fleet(16, per_node=4, loss_rate=12, **CALM), 10):
        assert made.losses > 0
        assert made.paid_hours == pytest.approx(seconds_n.sum() / 3600 + made.lost_hours + made.waited_hours)
        assert made.waited_hours > 0
        assert made.wall_hours * 16 >= made.paid_hours - 1e-9


def test_a_lost_shard_is_taken_by_a_gpu_that_has_nothing_left() -> None:
    """Otherwise the end would wait for a node that takes a day to come."""
    slow = Fleet(8, loss_rate=0.3, node_start_s=86_400, load_s=0, idle_s=1e9)
    ends = [one.wall_hours for one in courses(np.full(64, 300.0), slow, 20)]

    assert np.median(ends) < 24 + 3


def test_smaller_shards_lose_less_and_larger_ones_pay_less_overhead() -> None:
    def wall(shards: int, rate: float) -> float:
        made = courses(np.full(shards, 64 * 3600.0 / shards), Fleet(8, loss_rate=rate, shard_s=5, **CALM), 10)
        return float(np.mean([one.wall_hours for one in made]))

    assert wall(800, rate=4) < wall(64, rate=4)
    assert wall(800, rate=0) < wall(20_000, rate=0)


def test_a_course_follows_from_its_key_alone() -> None:
    fleet = Fleet(8, loss_rate=5)
    seconds_n = np.full(50, 200.0)

    assert simulate(seconds_n, fleet, 1, 2) == simulate(seconds_n, fleet, 1, 2)
    assert simulate(seconds_n, fleet, 1, 2) != simulate(seconds_n, fleet, 1, 3)


def test_what_is_lost_faster_than_made_never_ends() -> None:
    assert math.isinf(simulate(np.full(10, 36_000.0), Fleet(1, loss_rate=3)).wall_hours)


def test_what_a_task_has_saved_is_not_lost() -> None:
    """With one GPU, a task that saves every minute goes as ten of a minute would."""
    fleet = Fleet(1, loss_rate=40.0, node_start_s=30, load_s=5)
    for number in range(5):
        saved = simulate(np.array([600.0]), replace(fleet, saved_s=60), 3, number)
        parts = simulate(np.full(10, 60.0), fleet, 3, number)

        assert parts.losses > 1
        assert saved == pytest.approx(parts)
        assert simulate(np.array([600.0]), fleet, 3, number).wall_hours > saved.wall_hours


@pytest.mark.parametrize(("other", "lost_at", "end"), [
    (100.0, 1150.0, 1165 + 10 + 100),  # idle since 1110, and Ray knows of the loss after 15 s
    (300.0, 1150.0, 1310 + 10 + 100),  # Ray knows before the other one is idle
    (100.0, 2000.0, 1110 + 100)])  # nothing is lost any more
def test_a_lost_shard_goes_to_a_gpu_without_work(monkeypatch: pytest.MonkeyPatch, other: float, lost_at: float,
                                                 end: float) -> None:
    monkeypatch.setattr(fleet, "lives", lambda settings, node, seed, repetition: iter(
        [lost_at - 1000, math.inf] if node == 0 else [math.inf]))

    made = simulate(np.array([100.0, other, 100.0]), Fleet(2, loss_rate=1, node_start_s=1000, load_s=10, idle_s=2000))

    assert made.wall_hours * 3600 == pytest.approx(end)


def test_without_such_a_gpu_a_lost_shard_waits_for_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "lives", lambda settings, node, seed, repetition: iter(
        [150.0, math.inf] if node == 0 else [math.inf]))

    made = simulate(np.array([100.0, 5000.0, 100.0]), Fleet(2, loss_rate=1, node_start_s=1000, load_s=10, idle_s=2000))

    assert made.wall_hours * 3600 == pytest.approx(1010 + 5000)  # the lost one is done at 2150 + 10 + 100

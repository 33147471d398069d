"""Early signals: samples measured before a trial trains, once, said with their correlation, used only if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.contract.errors import ConfigError, Interrupted, UsageError
from rayexpand.reports.sweep import counts, write_sweep_report
from rayexpand.studies.sweep import proxies as measuring
from rayexpand.studies.sweep.config import SweepConfig, parse_sweep
from rayexpand.studies.sweep.proxies import is_poor
from rayexpand.studies.sweep.proxies_config import EarlyConfig
from rayexpand.studies.sweep.search import Search, run_here
from rayexpand.studies.sweep.signals import said, signals
from rayexpand.studies.sweep.sweep import open_sweep, read_suggestions

MAGNITUDE, LR = "expansions.noisy.method.magnitude", "recipe.lr"


def raw(out: Path, **sections: Any) -> dict[str, Any]:
    """Ten digits, RandAugment of one strength each; a step of training is enough, for nothing is learned."""
    return {"name": "early", "out": str(out), "arm": "noisy", "search": "grid", "hold_out": 3, "fresh_seeds": 0,
            "proxies": {"metrics": ["fd", "class_energy"]}, "space": {MAGNITUDE: {"choice": [1, 9, 17]}},
            "study": {"data": {"source": "digits"}, "test": {"source": "digits", "split": "test"}, "seeds": [0],
                      "subset": {"kind": "per_class", "n": 2},
                      "recipe": {"preset": "digits", "updates": 2, "epochs": 2, "backbone_args": {"width": 4}},
                      "expansions": {"noisy": {"method": {"name": "classical", "policy": "randaugment", "ratio": 1}}},
                      "arms": [{"name": "original"}, {"name": "noisy", "use": "noisy"}]}, **sections}


def ran(config: SweepConfig) -> Search:
    search = Search(open_sweep(config))
    run_here(search)
    return search


# Measuring -----------------------------------------------------------------------------------------------------------


def test_samples_are_measured_before_they_train_and_once_for_all_who_share_them(tmp_path: Path,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    score = measuring.score_samples
    monkeypatch.setattr(measuring, "score_samples",
                        lambda study, trials, *rest: (compared.append(trials[0].run), score(study, trials, *rest))[1])
    search = ran(parse_sweep(raw(tmp_path, space={MAGNITUDE: {"choice": [1, 17]}, LR: {"choice": [0.1, 0.01]}})))
    results = list(search.results.values())

    assert [one["state"] for one in results] == ["finished"] * 4
    assert len(compared) == len(set(compared)) == 2, "two strengths, two learning rates"
    by_strength: dict[int, set[str]] = {}
    for one in results:
        assert set(one["proxies"]) == {"fd_digits", "class_energy_digits"}
        by_strength.setdefault(one["values"][MAGNITUDE], set()).add(json.dumps(one["proxies"]))
    weak, strong = (json.loads(by_strength[n].pop()) for n in (1, 17))
    assert not by_strength[1], "those who share samples have the same numbers"
    assert weak["class_energy_digits"] < strong["class_energy_digits"], "the stronger augmentation is farther away"


def test_scores_that_the_method_writes_are_proxies_too(tmp_path: Path) -> None:
    sections = raw(tmp_path, arm="guided", space={LR: {"choice": [0.1, 0.01]}}, proxies={"metrics": ["class_energy"]})
    sections["study"]["arms"].append({"name": "guided", "use": "guided"})
    sections["study"]["expansions"]["guided"] = {
        "method": {"name": "distdiff", "ratio": 1, "steps": 4, "strength": 0.5, "guide_step": 2, "lookahead": 1,
                   "measure": True}, "fit": {"groups": 1}, "sampler": {"batch": 20}}
    found = ran(parse_sweep(sections)).results.values()

    for one in found:
        assert {"method.energy_before", "method.energy_after", "class_energy_digits"} <= set(one["proxies"])
        pilot = tmp_path / "early/pilots" / one["pilots"][0]
        rows = [dict(row) for row in _scores(pilot)]
        assert one["proxies"]["method.energy_after"] == pytest.approx(np.mean([row["energy_after"] for row in rows]))


def _scores(pilot: Path) -> list[Any]:
    from rayexpand.runs.run import open_run

    run = open_run(str(pilot))
    return [[(one["name"], one["value"]) for one in row] for receipt in run.store.receipts()
            for row in run.store.data(receipt, ["scores"])["scores"].to_pylist()]


def test_a_sweep_without_proxies_measures_nothing_and_is_as_it_was(tmp_path: Path) -> None:
    config = parse_sweep({key: value for key, value in raw(tmp_path).items() if key != "proxies"})
    assert not {"proxies", "early"} & config.model_dump(mode="json").keys()


# Correlations --------------------------------------------------------------------------------------------------------


def results(n: int, relation: float, **changes: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    values, noise = rng.normal(size=n), rng.normal(size=n)
    return [{"key": str(i), "state": "finished", "pilots": [str(i)], "score": float(0.5 + relation * x + e / 10),
             "proxies": {"fd_x": float(x), "method.odd": float(-x)}, **changes}
            for i, (x, e) in enumerate(zip(values, noise, strict=True))]


@pytest.mark.parametrize(("relation", "shown", "odd"), [
    (-1.0, "better values go with higher scores", "rises with the score"),
    (1.0, "better values go with lower scores", "falls with the score"),
    (0.0, "no relation is shown, the interval holds 0", "no relation is shown, the interval holds 0")])
def test_a_relation_is_said_by_its_interval_and_by_what_is_better(relation: float, shown: str, odd: str) -> None:
    found = signals(results(24, relation))
    assert found is not None
    distance, unknown, *notes = said(found)

    assert distance.startswith("fd_x (lower is better): Spearman ")
    assert shown in distance
    assert odd in unknown
    assert "24 finished trials of 24 expansions" in notes[0]
    one = found["proxies"][0]
    assert one["loses_best"] is (relation > 0) or not relation
    assert (one["loses_best_share"] < 0.01, one["loses_best_share"] > 0.9) == (relation < 0, relation > 0)


def test_few_trials_show_nothing() -> None:
    found = signals(results(4, -1.0))
    assert found is not None
    assert "no interval below 5 expansions, so nothing is shown" in said(found)[0]


def test_trials_of_one_expansion_are_no_independent_cases() -> None:
    found = signals(results(24, -1.0, pilots=["one"]))
    assert found is not None
    assert (found["expansions"], found["proxies"][0]["spearman_interval"]) == (1, None)


def test_stopped_and_diverged_trials_are_left_out_and_counted() -> None:
    mixed = [*results(6, -1.0), *results(2, -1.0, state="stopped"), *results(1, -1.0, state="diverged")]
    found = signals(mixed)
    assert found is not None
    assert (found["trials"], found["left_out"]) == (6, 3)
    assert "left out, for they have no score after the last epoch: 3 measured trials" in said(found)
    assert signals([{"state": "finished", "score": 0.5}]) is None


# Dropping ------------------------------------------------------------------------------------------------------------


def test_the_first_ones_are_trained_and_then_those_among_the_best() -> None:
    early = EarlyConfig(proxy="fd", keep=0.5, first=3)
    before = [{"fd_x": v, "fd_x_infinity": 0.0} for v in (1, 2, 3, 4)]
    poor = [is_poor(early, {"fd_x": v, "fd_x_infinity": 9.0}, before) for v in (0.5, 2, 2.5, 2.6, 9)]

    assert poor == [False, False, False, True, True]
    assert not is_poor(early, {"fd_x": 99.0}, before[:2])
    assert not is_poor(None, {"fd_x": 99.0}, before)
    assert is_poor(early.model_copy(update={"prefer": "higher"}), {"fd_x": 1.5}, before)
    with pytest.raises(UsageError, match="'kd' was not measured; there are fd_x"):
        is_poor(early.model_copy(update={"proxy": "kd", "prefer": "lower"}), {"fd_x": 1.0}, before)


def test_what_a_proxy_finds_poor_is_not_trained_and_a_killed_sweep_drops_the_same(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = raw(tmp_path, early={"proxy": "class_energy", "keep": 0.4, "first": 1},
                   space={MAGNITUDE: {"choice": [1, 25, 3, 17]}})
    calm = ran(parse_sweep({**sections, "name": "calm"}))
    config = parse_sweep(sections)
    measured = Search.measured

    def dies(self: Search, key: str, proxies: dict[str, float], started: float = 0.0) -> bool:
        if len(self.results) == 2:
            raise Interrupted("killed")
        return measured(self, key, proxies, started)

    with monkeypatch.context() as patched:
        patched.setattr(Search, "measured", dies)
        with pytest.raises(Interrupted):
            ran(config)
    found = ran(config)
    states = [(one["values"], one["state"], one["score"], one["curve"]) for one in found.results.values()]

    assert states == [(one["values"], one["state"], one["score"], one["curve"]) for one in calm.results.values()]
    assert [state for _, state, *_ in states] == ["finished", "dropped", "finished", "dropped"]
    assert found.failed == []
    assert all("proxies" in one for one in found.results.values())
    summary = write_sweep_report(found.sweep)
    assert summary["counts"] == {"suggested": 4, "finished": 2, "stopped": 0, "dropped": 2, "diverged": 0,
                                 "without a result": 0, "cannot be": 0, "equal to another": 0, "not tried yet": 0}
    page = Path(summary["report"]).read_text()
    assert page.count("<td>dropped</td>") == 2
    assert any("2 dropped by class_energy and never trained, so whether the best was among them" in line
               for line in summary["words"])


@pytest.mark.chaos
def test_asha_without_ray_stops_the_same_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate that learns nothing falls behind; everything that was suggested is accounted for."""
    sections = raw(tmp_path, arm="original", search="optuna", samples=6, space={LR: {"loguniform": [1e-7, 0.05]}},
                   scheduler={"asha": {"grace": 1, "reduction_factor": 2}})
    del sections["proxies"]
    sections["study"]["recipe"] = {"preset": "digits", "updates": 40, "epochs": 4, "schedule": "constant"}
    calm = ran(parse_sweep({**sections, "name": "calm"}))
    config, heard = parse_sweep(sections), Search.heard

    def dies(self: Search, key: str, epoch: int, score: float, started: float = 0.0) -> None:
        if len(self.results) == 3 and epoch == 1:
            raise Interrupted("killed")
        heard(self, key, epoch, score, started)

    with monkeypatch.context() as patched:
        patched.setattr(Search, "heard", dies)
        with pytest.raises(Interrupted):
            ran(config)
    found = ran(config)

    for name in ("values", "state", "curve"):
        assert [one[name] for one in found.results.values()] == [one[name] for one in calm.results.values()]
    became = counts(found.sweep, read_suggestions(found.sweep.files), list(found.results.values()))
    assert became["stopped"] > 0
    assert became["finished"] > 0
    assert sum(became.values()) == 2 * became.pop("suggested") == 12


@pytest.mark.parametrize(("changes", "problem"), [
    ({"proxies": None, "early": {"proxy": "fd"}}, "early: needs the section proxies"),
    ({"early": {"proxy": "kd"}}, "early.proxy: 'kd' is not measured; known: fd, class_energy, method.<score"),
    ({"early": {"proxy": "method.odd"}}, "early.prefer: is required, because whether lower or higher method.odd"),
    ({"early": {"proxy": "fd", "keep": 1.5}}, "early.keep"),
    ({"proxies": {"metric": ["fd"]}}, "did you mean 'metrics'"),
    ({"proxies": {"metrics": ["fid"]}}, "proxies.metrics: fid is the name of a published convention"),
    ({"arm": "original", "space": {LR: {"choice": [0.1, 0.2]}}}, "proxies: the arm 'original' has no samples")])
def test_what_cannot_be_is_said_before_anything_is_made(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(raw(tmp_path, **changes))
    assert any(problem in line for line in caught.value.problems), caught.value.problems

"""What tells several runs apart."""

from __future__ import annotations

from rayexpand.runs.differences import differences_of, short_names


def test_what_tells_runs_apart() -> None:
    plain = {"name": "a", "seed": 0, "method": {"name": "img2img", "strength": 0.5, "steps": 10, "solver": "ddim"},
             "sampler": {"batch": 4}, "prior": {"weights": "sd", "device": "cpu"}, "artifacts": {}}
    other = {"name": "b", "seed": 0, "method": {"name": "distdiff", "strength": 0.9, "steps": 10, "rho": 10.0},
             "sampler": {"batch": 8}, "prior": {"weights": "sd", "device": "cuda"},
             "artifacts": {"adapter": "artifacts/adapter-1a2b"}}

    assert differences_of([plain, other]) == [
        [("method", "img2img"), ("strength", "0.5"), ("solver", "ddim"), ("artifacts.adapter", "–")],
        [("method", "distdiff"), ("strength", "0.9"), ("rho", "10"), ("artifacts.adapter", "adapter-1a2b")]]


def test_pilots_of_a_sweep_are_called_by_what_was_swept() -> None:
    pilots = [{"name": name, "method": {"name": "img2img", "strength": strength}}
              for name, strength in (("1a2b3c4d", 0.3), ("deadbeef", 0.9))]

    assert short_names(pilots) == ["strength 0.3", "strength 0.9"]
    assert short_names([{**pilots[0], "name": "plain"}, pilots[1]]) == ["plain", "strength 0.9"]
    assert short_names(pilots[:1]) == ["1a2b3c4d"], "nothing to tell it from"


def test_lists_are_short_texts() -> None:
    lists = [{"name": "a", "method": {"name": "gif", "adjectives": value}} for value in ([""], ["bright", "dark"],
                                                                                         ["word"] * 40,
                                                                                         ["word"] * 41)]
    (_, first), (_, second), (_, third), _ = (lines[0] for lines in differences_of(lists))

    assert (first, second) == ("no word", "bright, dark")
    assert len(third) == 60
    assert third.endswith("…")
    assert differences_of(lists[2:])[0], "compared whole"

"""What a stage is told of the machine."""

from __future__ import annotations

from flows.devices import stage_settings


def test_a_training_gets_its_share_of_threads_but_params_yaml_decides() -> None:
    settings = stage_settings({"MODE_DEVICE": "cpu"}, 3, "dask")
    assert settings["OMP_NUM_THREADS"] == "3"
    assert (settings["MODE_DEVICE"], settings["MODE_ENGINE"]) == ("cpu", "dask")
    assert "MODE_THREADS" not in settings


def test_what_is_not_given_is_left_to_params_yaml() -> None:
    assert stage_settings({}, 0, "") == {}
    assert stage_settings({"MODE_DEVICE": "cuda:1"}, 0, "") == {"MODE_DEVICE": "cuda:1"}

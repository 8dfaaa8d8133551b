"""Settings: defaults keep the page on this machine, the command line wins over the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.settings import Settings, is_loopback, settings_from
from mole_diffusion.errors import InvalidRequest


def test_defaults_are_private_and_per_user() -> None:
    settings = settings_from([], {})
    assert settings.host == "127.0.0.1"
    assert settings.port == 7860
    assert settings.data_dir.name == "mole-diffusion"
    assert not settings.is_open


def test_the_command_line_wins_over_the_environment(tmp_path: Path) -> None:
    env = {"MOLE_DATA_DIR": str(tmp_path / "env"), "MOLE_PORT": "9000", "MOLE_PASSWORD": "word"}
    settings = settings_from(["--data-dir", str(tmp_path / "cli")], env)
    assert settings.data_dir == tmp_path / "cli"
    assert (settings.port, settings.password) == (9000, "word")


@pytest.mark.parametrize("word", ["here", "./here", "there/../here"])
def test_a_relative_folder_is_the_same_for_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings_from(["--data-dir", word], {}).data_dir == tmp_path / "here"
    assert settings_from([], {"MOLE_DATA_DIR": word}).data_dir == tmp_path / "here"


@pytest.mark.parametrize(
    ("host", "password", "is_open"),
    [("127.0.0.1", None, False), ("::1", None, False), ("localhost", None, False), ("0.0.0.0", None, True),
     ("192.168.1.4", None, True), ("0.0.0.0", "word", False)],
)  # fmt: skip
def test_a_page_without_password_is_open_beyond_this_machine(host: str, password: str | None, is_open: bool) -> None:
    assert Settings(Path("data"), host=host, password=password).is_open is is_open


def test_a_host_name_is_not_taken_for_this_machine() -> None:
    assert not is_loopback("example.org")


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["--base", "flux"], "flux"), (["--port", "70000"], "70000"), (["--base-folder", "/nowhere"], "model_index")],
)
def test_impossible_settings_are_refused_with_a_sentence(argv: list[str], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        settings_from(argv, {})


def test_a_port_from_the_environment_must_be_a_number() -> None:
    with pytest.raises(InvalidRequest, match="number"):
        settings_from([], {"MOLE_PORT": "eighty"})


def test_a_local_base_is_offered_only_by_the_owner(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    settings = settings_from(["--base-folder", str(tmp_path)], {})
    assert str(tmp_path.resolve()) in settings.base_names


def test_a_zero_gpu_space_says_why_it_cannot_train() -> None:
    settings = settings_from([], {"SPACE_ID": "someone/space", "SPACES_ZERO_GPU": "true"})
    assert settings.host == "0.0.0.0"
    assert settings.training_blocked is not None
    assert "ZeroGPU" in settings.training_blocked
    assert settings_from([], {"SPACE_ID": "someone/space"}).training_blocked is None


def test_the_command_says_one_sentence_about_a_bad_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from app.__main__ import main

    assert main(["--base", "flux"]) == 2
    assert "flux" in capsys.readouterr().err

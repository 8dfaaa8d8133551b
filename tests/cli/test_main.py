from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mole_diffusion.__main__ import main
from mole_diffusion.bases import get_base
from mole_diffusion.composition import compose
from mole_diffusion.experts import Expert
from mole_diffusion.gates import GateConfig
from mole_diffusion.png import read_parameters
from tests.tiny import tiny_lora, tiny_sd, tiny_sdxl

PROMPT = "a zwx robot and a zwx bunny"


def _generate(out: Path, *more: str) -> int:
    return main(["generate", "--prompt", PROMPT, "--steps", "2", "--out", str(out), "--json", *more])


@pytest.fixture(scope="module")
def robot(assets_folder: Path) -> Path:
    return assets_folder / "demo" / "experts" / "robot.safetensors"


def test_inspect_tells_what_a_file_is(demo_assets: Path, robot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(robot), "--base", "demo"]) == 0
    assert "zwx robot" in capsys.readouterr().out
    assert main(["inspect", str(robot), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["trigger"] == "zwx robot" and set(report["ranks"]) == {"2"}


def test_inspect_forecasts_where_two_files_collide(robot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = robot.with_name("bunny.safetensors")
    assert main(["inspect", str(robot), "--beside", str(robot), "--beside", str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith(f"Beside {robot}: overlap ")
    assert main(["inspect", str(robot), "--beside", str(other), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["beside"][str(other)]
    assert 0 < report["whole"]["reads"] < 1 and report["blocks"]
    assert main(["inspect", str(robot), "--beside", "absent.safetensors"]) == 2
    assert "absent.safetensors" in capsys.readouterr().err


def test_inspect_works_on_large_bases_without_a_network(robot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(robot), "--base", "sdxl", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is False
    assert "Stable Diffusion XL" in captured.err and captured.err.count("\n") == 1


def test_inspect_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.safetensors").write_text("not a LoRA")
    for file in (tmp_path / "a.safetensors", tmp_path / "absent.safetensors"):
        assert main(["inspect", str(file)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1


def test_generate_writes_pictures_with_their_parameters(
    demo_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ("--expert", "robot", "--expert", "bunny", "--method", "nla")
    code = _generate(tmp_path, *pair, "--seed", "4", "--count", "2")
    made = json.loads(capsys.readouterr().out)
    assert code == 0 and made["seconds_per_image"] > 0
    assert (made["method"], made["scorer"]) == ("nla", "demo CLIP")
    assert [Path(image["path"]).name for image in made["images"]] == ["seed-4.png", "seed-5.png"]
    assert all(-1 <= image["scores"]["prompt"] <= 1 for image in made["images"])
    parameters = read_parameters(made["images"][1]["path"])
    assert (parameters["seed"], parameters["count"], parameters["method"]) == (5, 1, "nla")
    assert [entry["name"] for entry in parameters["composition"]["experts"]] == ["robot", "bunny"]


def test_earlier_pictures_are_kept(demo_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "seed-0.png").write_text("an earlier one")
    assert _generate(tmp_path, "--no-scores") == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["path"].endswith("seed-0-2.png")
    assert (tmp_path / "seed-0.png").read_text() == "an earlier one"


@pytest.mark.parametrize(
    ("experts", "method", "expected"),
    [
        ((), None, "base alone"),
        (("robot",), None, "sum"),
        (("robot", "bunny"), None, "spans"),
        (("robot", "bunny"), "sum", "sum"),
    ],
)
def test_the_method_is_said(
    demo_assets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    experts: tuple[str, ...],
    method: str | None,
    expected: str,
) -> None:
    more = [part for name in experts for part in ("--expert", name)] + (["--method", method] if method else [])
    assert main(["generate", "--prompt", PROMPT, "--steps", "1", "--out", str(tmp_path), "--no-scores", *more]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{expected}, ")


def test_weights_and_regions_are_recorded(
    demo_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ("--expert", "robot", "--expert", "bunny", "--method", "composite", "--weights", "0.8", "-0.1")
    assert _generate(tmp_path, *pair, "--region", "robot=0,0,0.5,1", "--no-scores") == 0
    parameters = read_parameters(json.loads(capsys.readouterr().out)["images"][0]["path"])
    assert parameters["composition"]["gate"] == {"kind": "composite", "weights": [0.8, -0.1]}
    assert (parameters["method"], parameters["regions"]) == ("composite", {"robot": [0, 0, 0.5, 1]})


def test_a_composition_brings_its_experts(
    demo_assets: Path, robot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = get_base("demo").load()
    experts = [Expert.load(robot), Expert.load(robot.with_name("bunny.safetensors"))]
    file = compose(pipe, experts, gate=GateConfig(), base=get_base("demo")).save(tmp_path / "pair.safetensors")
    assert _generate(tmp_path, "--composition", str(file), "--no-scores") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["method"] == "composition pair.safetensors"
    assert [entry["name"] for entry in made["parameters"]["composition"]["experts"]] == ["robot", "bunny"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--expert", "dragon"], "shipped expert (bunny, robot)"),
        (["--expert", "absent.safetensors"], "found none"),
        (["--base", "flux"], "'flux'"),
        (["--width", "65"], "multiples of 8"),
        (["--guidance", "-1"], "guidance"),
        (["--composition", "a.safetensors", "--method", "nla"], "either --composition or --method"),
        (["--composition", "absent.safetensors"], "found none"),
        (["--device", "toaster"], "'toaster'"),
        (["--method", "switch"], "needs experts"),
        (["--expert", "robot", "--weights", "1", "2"], "each of 1 experts (robot), got 2"),
        (["--expert", "robot", "--region", "robot=0,0"], "NAME=left,top,right,bottom"),
    ],
)
def test_generate_refuses_in_one_sentence(
    demo_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], reason: str
) -> None:
    assert _generate(tmp_path, "--no-scores", *more) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and reason in captured.err and len(captured.err.splitlines()) == 1
    assert not list(tmp_path.glob("*.png"))


def test_an_expert_of_another_base_is_refused(
    demo_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_lora(tmp_path / "xl.safetensors", tiny_sdxl(), targets=("attn2.to_k",))
    assert _generate(tmp_path, "--expert", str(file)) == 2
    assert "does not fit" in capsys.readouterr().err


def test_a_pipeline_folder_is_a_base(demo_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_sd("epsilon").save_pretrained(tmp_path / "base")
    assert _generate(tmp_path, "--base", str(tmp_path / "base"), "--no-scores") == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["base"] == "base"


def test_a_prompt_that_is_too_long_is_told(
    demo_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--prompt", "cat " * 40 + "hat", "--steps", "1", "--out", str(tmp_path), "--no-scores"]
    assert main(arguments) == 0
    assert "ignored: cat" in capsys.readouterr().err


def test_as_a_process_it_helps_at_once_and_exits_with_2(tmp_path: Path) -> None:
    program = "import sys, runpy\n"
    program += "try: runpy.run_module('mole_diffusion', run_name='__main__')\n"
    program += "except SystemExit as stop: print(stop.code, *(name in sys.modules for name in ('torch', 'gradio')))"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)

    assert run("generate", "--help").stdout.splitlines()[-1] == "0 False False"
    refused = run("inspect", str(tmp_path / "absent.safetensors"))
    assert refused.stdout.split() == ["2", "True", "False"] and len(refused.stderr.splitlines()) == 1

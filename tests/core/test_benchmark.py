"""The composition benchmark on a toy: contenders agree, rows say what they promise. Nothing is timed."""

from __future__ import annotations

import json

import pytest
import torch

from tests.benchmarks.composition import main, tables
from tests.benchmarks.contenders import CONTENDERS, PAPER_LIMIT, XLORA_LIMIT, Skipped
from tests.benchmarks.measure import paired, quartiles
from tests.benchmarks.paper_gate import block_shapes, gate_elements, install
from tests.benchmarks.sizes import Stage


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage("toy", "cpu", rank=2)


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    """One whole run: fields, agreement with the merged weights, exact restoration."""
    words = "--size toy --rank 2 --counts 2 --attach-counts 1 --rounds 2 --seed 5 --json"
    code = main(words.split())
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["finished"]
    assert {"device", "date", "versions", "threads", "settings", "finished", "rows", "attach"} == set(found)
    assert found["settings"]["seed"] == 5 and found["settings"]["dtype"] == "float32"
    [row] = found["rows"]
    assert row["n"] == 2 and row["rounds"] == 2 and row["skipped"] == {}
    for name in CONTENDERS:
        low, high = row["quartiles_s"][name]
        assert 0 < low <= row[f"{name}_s"] <= high
    assert row["ratio"]["base"] == 1
    alike = {name: value for name, value in row["difference"].items() if name != "base"}
    assert set(alike) == {"peft", "xlora", "ours_sample", "ours_token"}
    assert max(alike.values()) < 1e-5 < 1e-3 < row["difference"]["base"]
    assert row["restored"] == {"merged": True, "ours_sample": True, "ours_token": True}
    assert [(item["tool"], item["n"]) for item in found["attach"]] == [("ours", 1), ("peft", 1)]
    assert found["attach"][0]["disk_mb"] == pytest.approx(found["attach"][1]["disk_mb"])
    assert "×1.00" in tables(found) and "bit for bit: yes" in tables(found)


def test_gates_are_live_while_they_are_timed(stage: Stage) -> None:
    for name in ("ours_sample", "ours_token", "xlora"):
        contender = CONTENDERS[name](stage, stage.experts(2))
        uniform = contender.call()
        contender.randomise(0)
        assert not torch.allclose(contender.call(), uniform, rtol=1e-5)


def test_paper_gate_with_even_weights_is_the_block_plus_the_experts_mean(stage: Stage) -> None:
    """Eq. 12-13 with G = 1/N, each E_i from a UNet that holds expert i alone, merged."""
    experts = stage.experts(3)
    unet = stage.twin().unet
    shapes = block_shapes(unet, lambda: stage.call(unet))
    path, (length, width) = next(iter(shapes.items()))
    assert (length, width) == (16, 32)
    assert gate_elements({path: (length, width)}, 3) == 9 * 16 * 32
    hidden = torch.randn(2, length, width, generator=torch.Generator().manual_seed(0))
    text = {"encoder_hidden_states": stage.inputs["encoder_hidden_states"]}
    with torch.no_grad():
        wanted = unet.get_submodule(path)(hidden, **text)
        for expert in experts:
            alone = stage.twin(own_weights=True).unet
            for key, pair in expert.modules.items():
                alone.get_submodule(key.removeprefix("unet.")).weight += pair.delta()
            wanted = wanted + alone.get_submodule(path)(hidden, **text) / 3
        [block] = install(unet, experts, {path: (length, width)})
        block.e.zero_()
        assert block.e.shape == (3 * length * width, 3)
        assert torch.allclose(block(hidden, **text), wanted, atol=1e-5)


def test_what_grows_too_large_is_left_out_with_a_reason(stage: Stage) -> None:
    for name, limit in (("paper", PAPER_LIMIT), ("xlora", XLORA_LIMIT)):
        with pytest.raises(Skipped, match=f"beyond {limit} experts"):
            CONTENDERS[name](stage, stage.experts(limit + 1))


def test_twins_share_weights_unless_they_are_written(stage: Stage) -> None:
    held = stage.pipe.unet.conv_in.weight
    assert stage.twin().unet.conv_in.weight is held
    copied = stage.twin(own_weights=True).unet.conv_in.weight
    assert copied is not held and torch.equal(copied, held)


def test_rounds_are_paired_and_bounded() -> None:
    heard: list[str] = []
    calls = {name: lambda name=name: heard.append(name) for name in "abc"}
    times = paired(calls, torch.device("cpu"), rounds=4)
    assert [len(values) for values in times.values()] == [4, 4, 4]
    assert all(set(heard[start : start + 3]) == set("abc") for start in range(0, 12, 3))
    assert len(paired(calls, torch.device("cpu"), budget_s=0.0)["a"]) == 3
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


@pytest.mark.parametrize("wrong", ["--counts 0", "--batch 3", "--size huge", "--device tpu"])
def test_bad_input_ends_with_one_sentence(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(wrong.split())
    assert stop.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err

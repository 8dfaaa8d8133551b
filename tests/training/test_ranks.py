"""Two real processes with gloo train as one does: same weights, stop and resume, one voice, shares that do not fit.

Run as a module by the launcher, this file is one of the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mole_diffusion.errors import InvalidRequest
from training.control import Commands
from training.events import Event, MemorySink
from training.loop import Schedule, run
from training.ranks import ALONE, Ranks
from training.rng import step_generator

REPOSITORY = Path(__file__).parents[2]


class Fit:
    """Two layers, and a third that gets no gradient, on batches drawn whole and worked on in parts."""

    name = "fit"
    total_steps = 7

    def __init__(self, ranks: Ranks = ALONE, batch: int = 4) -> None:
        torch.manual_seed(ranks.index)  # what is drawn outside the step's generator differs, and must not matter
        self.ranks, self.batch, self.done = ranks, batch, 0
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        self.layers.append(torch.nn.Linear(2, 2))
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.optimiser = torch.optim.AdamW(self.layers.parameters(), lr=0.05)

    def step(self, index: int) -> dict[str, float]:
        x = torch.randn(self.batch, 3, generator=step_generator(0, 1, index))[self.ranks.part(self.batch)]
        loss = (self.layers[:3](x) - x.sum(1, keepdim=True)).square().mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.average(self.layers.parameters())
        self.optimiser.step()
        self.done += 1
        return {"loss": self.ranks.mean(loss.item())}

    def enough(self) -> bool:
        return self.ranks.first and self.done == 6  # only the first knows, and all must hear

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self.layers.state_dict(), "optimiser": self.optimiser.state_dict(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layers.load_state_dict(state["layers"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.done = state["done"]

    def sample(self, step: int, folder: Path) -> list:
        (folder / f"{step}-{self.ranks.index}").touch()
        return []

    def finish(self, out: Path) -> dict[str, Any]:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.layers.state_dict(), out)
        return {"path": str(out), "rank": self.ranks.index}


class StopAt(MemorySink):
    """Tells to stop when a step is done; the flag is the control's, so only the process that hears events sets it."""

    def __init__(self, control: Commands, step: int) -> None:
        super().__init__()
        self.control, self.at = control, step

    def emit(self, event: Event) -> None:
        super().emit(event)
        self.control.stop = getattr(event, "step", 0) == self.at


@dataclass
class Run:
    folder: Path
    ranks: Ranks

    def __call__(self, task: Any, name: str, stop: int = -1) -> tuple[list[float], list[str], str, int]:
        control = Commands()
        sink, folder = StopAt(control, stop), self.folder / name
        schedule = Schedule(save_every=2, sample_every=3)
        out = folder / "out.safetensors"
        outcome = run(task, sink, control, folder / "c", out=out, schedule=schedule, ranks=self.ranks)
        losses = [event.loss for event in sink.events if hasattr(event, "loss")]
        return losses, [type(event).__name__ for event in sink.events], outcome.status, outcome.step


def subject_task(base_folder: str, ranks: Ranks) -> Any:
    from tests.training.helpers import load, subject
    from training.config import parse
    from training.tasks.subject import SubjectConfig, SubjectTask

    values = {"base": base_folder, "token": "zwx", "class": "robot", "steps": 3, "batch": 4, "pool": 8, "rank": 2}
    base, pipe = load(Path(base_folder))
    return SubjectTask(parse(SubjectConfig, values), base, pipe, subject("robot"), ranks)


def processes(folder: Path, base_folder: str) -> None:
    """What each of the two processes does; it notes what it saw."""
    ranks = Ranks.here("cpu")
    again = Ranks.here()
    train, seen = Run(folder, ranks), {}
    seen["ranks"] = (ranks.count, ranks.index, again.index, ranks.device)
    seen["whole"] = train(Fit(ranks), "whole")
    seen["stopped"] = train(Fit(ranks), "parts", stop=3)
    seen["resumed"] = train(Fit(ranks), "parts")
    with pytest.raises(InvalidRequest) as refused:
        train(Fit(ranks, batch=3), "refused")
    seen["refused"] = str(refused.value)
    seen["agreed"] = ranks.agree([ranks.index == 0, ranks.index == 1])
    if base_folder:
        seen["subject"] = train(subject_task(base_folder, ranks), "subject")
    ranks.close()
    assert not torch.distributed.is_initialized() and Ranks.here().first == ranks.first
    (folder / f"seen-{ranks.index}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes wrote into."""
    return together(tmp_path_factory.mktemp("two"), "")


def together(folder: Path, base_folder: str) -> Path:
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.training.test_ranks"]
    command = [sys.executable, "-m", *words, str(folder), base_folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=350)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def seen(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"seen-{rank}.json").read_text())


@pytest.mark.timeout(400)
def test_two_processes_train_as_one(two: Path, tmp_path: Path) -> None:
    assert [seen(two, rank)["ranks"] for rank in (0, 1)] == [[2, 0, 0, "cpu"], [2, 1, 1, "cpu"]]
    losses, *_ = Run(tmp_path, ALONE)(Fit(), "whole")
    ours, names, status, step = seen(two, 0)["whole"]
    assert (status, step) == ("finished", 6) and ours == pytest.approx(losses, rel=1e-6)
    one, both = (load_file(folder / "whole" / "out.safetensors") for folder in (tmp_path, two))
    assert all(torch.allclose(value, both[name], atol=1e-6) for name, value in one.items())
    assert torch.equal(one["3.weight"], both["3.weight"])  # no gradient anywhere: not even decayed
    assert not torch.equal(one["0.weight"], Fit().layers[0].weight)
    assert names.count("Progress") == 6 and names.count("Finished") == 1


def test_only_the_first_speaks_and_writes(two: Path) -> None:
    other = seen(two, 1)
    assert other["whole"] == [[], [], "finished", 6] and other["stopped"] == [[], [], "stopped", 3]
    pictures = sorted(path.name for path in (two / "whole" / "samples").iterdir())
    assert pictures == ["0-0", "3-0", "6-0"]
    assert other["agreed"] == [True, False]


def test_two_processes_stop_together_and_resume_exactly(two: Path) -> None:
    assert seen(two, 0)["stopped"][2:] == ["stopped", 3] and seen(two, 0)["resumed"][2:] == ["finished", 6]
    assert seen(two, 0)["stopped"][0] + seen(two, 0)["resumed"][0] == seen(two, 0)["whole"][0]
    whole, parts = (load_file(two / name / "out.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_batch_that_cannot_be_shared_is_refused(two: Path) -> None:
    sentence = "A batch of 3 cannot be shared evenly by 2 devices; choose a multiple of 2."
    assert [seen(two, rank)["refused"] for rank in (0, 1)] == [sentence, sentence]


@pytest.mark.long
def test_real_task_trains_as_in_one_process(base_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    two = together(tmp_path / "two", str(base_folders["sd-v"]))
    losses, *_ = Run(tmp_path, ALONE)(subject_task(str(base_folders["sd-v"]), ALONE), "subject")
    assert seen(two, 0)["subject"][0] == pytest.approx(losses, rel=1e-6)
    one, both = (load_file(folder / "subject" / "out.safetensors") for folder in (tmp_path, two))
    assert one.keys() == both.keys()
    gaps = sorted(float((one[name] - both[name]).abs().max()) for name in one)
    # Where a gradient is next to nothing Adam makes a part of a step (1e-4) of how it was rounded.
    assert gaps[len(gaps) // 2] < 1e-7 and gaps[-1] < 5e-5


if __name__ == "__main__":
    processes(Path(sys.argv[1]), sys.argv[2])

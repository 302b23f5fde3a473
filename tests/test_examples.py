import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import looptransfer as lt
from looptransfer.trials.function import Function
from looptransfer.trials.ledger import Ledger
from tests.test_pytest_plugin import ROOT, run_pytest

CI = ROOT / "examples" / "ci"
SCRIPT = ROOT / "examples" / "script" / "train.py"
SLURM = ROOT / "examples" / "slurm"
MARK = "# looptransfer"
TOY = "--steps 12 --layers 1 --width 16 --sequence 16 --batch 8"
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """What a user copies out of examples/ci."""
    for path in CI.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_test_of_every_commit_passes_as_it_is(copied: Path) -> None:
    told = run_pytest(copied, "-k", "bracketed")
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.slow
def test_the_test_of_every_commit_fails_where_the_multiplier_is_lost(copied: Path) -> None:
    with (copied / "experiment.py").open("a", encoding="utf-8") as file:
        file.write(LOST)
    told = run_pytest(copied, "-k", "bracketed")
    assert told.returncode == 1, told.stdout + told.stderr
    assert "MOVED" in told.stdout or "WORSE" in told.stdout
    assert "stored LR" in told.stdout


@pytest.mark.slow
def test_the_tests_of_every_night_pass_as_they_are(copied: Path) -> None:
    told = run_pytest(copied)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "2 passed" in told.stdout


LOST = """

from looptransfer.trials import training

kept = training.parametrize
training.parametrize = lambda model, inputs, rule, *others, **named: kept(model, inputs, "unscaled", *others, **named)
"""


def test_the_workflow_runs_what_is_there() -> None:
    workflow = (CI / "lr-transfer.yml").read_text(encoding="utf-8")
    assert "pytest test_lr_transfer.py -k bracketed" in workflow
    assert "looptransfer check results.csv --tolerance 0.4 --baseline lr-optima.json --markdown" in workflow
    assert "def test_the_stored_optima_are_still_bracketed" in (CI / "test_lr_transfer.py").read_text(encoding="utf-8")


def run(*words: str | Path, status: tuple[int, ...] = (0,), cwd: Path | None = None) -> str:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    told = subprocess.run(
        [str(word) for word in words], check=False, cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert told.returncode in status, told.stdout + told.stderr
    return told.stdout


def train_once(script: Path, out: Path, *words: str, launcher: list[str] = RANKS) -> list[float]:
    """The losses in the log of a run at N = 2."""
    out.mkdir(exist_ok=True)
    run(*launcher, script, "--lr", "0.02", "--loops", "2", "--seed", "0", "--out", out, *TOY.split(), *words)
    return [json.loads(line)["val_loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_script_trains_on_two_ranks_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    losses = train_once(SCRIPT, tmp_path / "run")
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    (tmp_path / "run" / "log.jsonl").unlink()
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert train_once(SCRIPT, tmp_path / "again") == losses
    text = SCRIPT.read_text().replace("% max(1, args.steps // 4) == 0:", "% 3 == 0:\n            assert step < 7")
    (tmp_path / "stopped.py").write_text(text)
    with pytest.raises(AssertionError):
        train_once(tmp_path / "stopped.py", tmp_path / "stopped")
    assert train_once(SCRIPT, tmp_path / "stopped") == losses
    assert kept


@pytest.mark.slow
def test_three_lines_rewrite_the_script_and_without_them_it_trains_as_before(tmp_path: Path) -> None:
    lines = SCRIPT.read_text().splitlines()
    assert sum(line.endswith(MARK) for line in lines) == 3
    plain = tmp_path / "plain.py"
    plain.write_text("\n".join(line for line in lines if not line.endswith(MARK)))
    before = train_once(plain, tmp_path / "plain", launcher=[sys.executable])
    unscaled = train_once(SCRIPT, tmp_path / "unscaled", "--rule", "unscaled", launcher=[sys.executable])
    assert unscaled == before
    assert train_once(SCRIPT, tmp_path / "factored", launcher=[sys.executable]) != before


@pytest.mark.slow
def test_the_script_goes_from_tune_to_a_verdict(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "looptransfer"]
    words = "--lr {lr} --loops {loops} --seed {seed} --rule {rule} --out {dir}"
    command = f"{shlex.join([sys.executable, str(SCRIPT)])} {words} {TOY}"
    train = ["--cmd", command, "--metric", "{dir}/log.jsonl:val_loss", "--workers", "2", "--seeds", "2"]
    told = run(*program, "tune", *train, "--loops", "2", "-o", "best.json", cwd=tmp_path)
    assert re.search(r"best LR.* at N = 2: [\d.]+", told)
    assert 1e-4 < json.loads((tmp_path / "best.json").read_text())["lr"] < 1
    swept = ["--loops", "1,4", "--around", "best.json", "--octaves=-2,-1,0,1", "-o", "results.csv"]
    run(*program, "sweep", *train, *swept, cwd=tmp_path)
    told = run(*program, "check", "results.csv", status=(0, 1, 3), cwd=tmp_path)
    assert re.search("FLAT|DRIFTS|INCONCLUSIVE", told)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 2 * 4 * 2


def test_the_slurm_job_is_a_script_that_bash_can_read() -> None:
    run("bash", "-n", SLURM / "sweep.sbatch")
    assert "#SBATCH --array=" in (SLURM / "sweep.sbatch").read_text()


@pytest.mark.slow
def test_muon_and_adamw_learn_with_groups_that_pass_the_audit(capsys: pytest.CaptureFixture[str]) -> None:
    train = runpy.run_path(str(ROOT / "examples" / "muon" / "train.py"))["train"]
    losses = train(steps=40, loops=3)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    table = capsys.readouterr().out
    assert "blocks.0.attention.qkv.weight  branch matrix  muon" in table
    assert "loop_norm.weight               on stream      adamw      0.3333" in table


@pytest.mark.slow
@pytest.mark.parametrize("name", ["albert", "llama"])
def test_trainer_is_tuned_and_swept_and_its_checkpoint_loads_as_it_was_trained(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    text = (ROOT / "examples" / "huggingface" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    smaller = {'"max_steps": 60': '"max_steps": 6', "loops=1, seeds=2": "loops=1, seeds=2, regret=0.5, workers=1"}
    smaller |= {
        f'seeds=2, ledger="{name}.db")))': f'seeds=2, ledger="{name}.db", workers=1)))',
        "[-2, -1, 0, 1, 2]": "[0]",
    }
    for written, run_here in smaller.items():
        assert written in text
        text = text.replace(written, run_here)
    (tmp_path / f"{name}.py").write_text(text)
    told = run(sys.executable, f"{name}.py", cwd=tmp_path)
    assert "INCONCLUSIVE" in told
    losses = re.search(r"held-out loss (\S+) as trained, (\S+) as loaded", told)
    assert losses
    assert losses[1] == losses[2]


SMALLER = {
    "rows(1024, run.seed)": "rows(64, run.seed)",
    "seeds=2, ledger": "seeds=2, workers=1, ledger",
    "loops=1, seeds=2": "loops=1, regret=0.5, seeds=2",
    "[-2, -1, 0, 1, 2]": "[0]",
    "row[:, :-1], 50": "row[:, :-1], 2",
    "run.directory, **settings": "run.directory, log_every_n_steps=2, **settings",
}


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """The Lightning example with four steps an epoch."""
    for package in ("pytorch_lightning", "tensorboard"):
        pytest.importorskip(package)
    text = (ROOT / "examples" / "lightning" / "train.py").read_text()
    assert len(text.splitlines()) <= 60
    for written, run_here in SMALLER.items():
        assert written in text
        text = text.replace(written, run_here)
    (tmp_path / "counting.py").write_text(text)
    return tmp_path / "counting.py"


@pytest.mark.slow
def test_lightning_is_tuned_and_swept(counting: Path) -> None:
    assert "INCONCLUSIVE" in run(sys.executable, counting.name, cwd=counting.parent)


@pytest.mark.slow
def test_a_lightning_run_that_is_stopped_goes_on_to_the_same_average_under_its_plan(
    counting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(counting.parent)
    example: Any = importlib.import_module("counting")
    straight, stopped = (lt.Trial("factored", 2, 3e-3, 0, "cpu", counting.parent / name) for name in ("one", "two"))
    loss = example.train(straight)

    def fails_at_six(self: Any, batch: Any) -> Any:
        assert self.global_step < 6
        return training_step(self, batch)

    training_step = example.Counting.training_step
    monkeypatch.setattr(example.Counting, "training_step", fails_at_six)
    with pytest.raises(AssertionError):
        example.train(stopped)
    monkeypatch.setattr(example.Counting, "training_step", training_step)
    assert example.train(stopped) == loss

    kept, again = (
        example.Counting.load_from_checkpoint(trial.directory / "last.ckpt") for trial in (straight, stopped)
    )
    assert all(map(torch.equal, kept.state_dict().values(), again.state_dict().values()))
    assert again.plan == kept.plan
    assert lt.verify(again.model, again.probe[:, :-1]).loops == 2
    with pytest.raises(lt.VerificationError, match="2 visits planned, 4 measured"):
        example.Counting.load_from_checkpoint(straight.directory / "last.ckpt", loops=4)
    logged = scalars(straight.directory / "lightning_logs" / "version_0")
    assert [step for step, _ in logged["layers.0.mlp/gradient_rms/2"]] == [1, 3, 5, 7]  # from 0; after every other one


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run in TensorBoard's files, by tag."""
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


TRAIN = """
import math, time

def train(run):
    time.sleep(1)
    return 2 + 0.05 * (math.log2(run.lr) + 8) ** 2
"""
CLUSTER = f"""
import runpy, sys, threading
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False}})
second = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address)
work_everywhere = runpy.run_path({str(ROOT / "examples" / "ray" / "work.py")!r})["work_everywhere"]
threading.Timer(10, lambda: cluster.remove_node(second, allow_graceful=False)).start()
print("ended on", work_everywhere(sys.argv[1], "sweep", ["--workers", "1"]), "of 2 nodes")
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install ray)")
def test_a_ray_cluster_that_loses_a_node_makes_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("exp.py", TRAIN), ("cluster.py", CLUSTER)):
        (tmp_path / name).write_text(text)
    storage = f"journal://{tmp_path / 'runs.log'}"
    ledger = Ledger(storage)
    monkeypatch.syspath_prepend(tmp_path)
    function = Function(importlib.import_module("exp").train)
    ledger.admit(function.identity(), {}, target=f"{tmp_path / 'exp.py'}:train")
    ledger.ask(
        {
            "kind": "sweep",
            "cells": [["factored", 2, "factored"]],
            "lrs": [0.002, 0.004],
            "seeds": [*range(10)],
            "without": [],
        }
    )
    assert "ended on 1 of 2 nodes" in run(sys.executable, "cluster.py", storage, cwd=tmp_path)
    ledger.refresh()
    assert len(ledger.finished) == 20

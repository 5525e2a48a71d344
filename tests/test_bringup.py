"""The run folder and its runner: whatever ends a run loses nothing finished and repeats nothing finished."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from surefoot.bench.stats import pooled, summary
from surefoot.bringup import folder as folders
from surefoot.bringup.folder import DiskError, RunFolder
from surefoot.bringup.run import Clock, Run, died
from surefoot.bringup.settings import QUICK, BringupSettings, fitted, folder_name
from surefoot.bringup.stages.explain import _claim
from surefoot.bringup.stages.order import BY_NAME
from surefoot.bringup.stages.order import STAGES as REAL_STAGES
from surefoot.cli.main import run_cli
from surefoot.core.errors import InputError
from tests.bringup_fakes import NAMES, STAGES, Quiet, new_folder, run
from tests.report_page import Page, check_recorded

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def path(tmp_path):
    new_folder(tmp_path / "run")
    return tmp_path / "run"


def starts(path: Path) -> Counter:
    return Counter(line.split()[0] for line in (path / "ran").read_text().splitlines())


def last_pid(path: Path) -> int:
    return int((path / "ran").read_text().split()[-1])


def wait_for(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.bringup_fakes", "run", str(path)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def states(path: Path) -> dict[str, str]:
    return {name: entry["state"] for name, entry in RunFolder.open(path).stages.items()}


# ---- ends and resumes


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
@pytest.mark.parametrize("stage", NAMES)
def test_a_run_that_ends_in_any_stage_resumes(path, stage, how):
    (path / f"hang-{stage}").touch()
    process = start(path)
    wait_for((path / "hanging").exists)
    child = last_pid(path)
    process.send_signal(how)
    assert process.wait(20) == (130 if how == signal.SIGINT else -9)
    process.stderr.close()
    wait_for(lambda: not alive(child))  # no orphan goes on writing
    assert states(path)[stage] == ("interrupted" if how == signal.SIGINT else "running")

    done = NAMES[: NAMES.index(stage)]
    before = {name: (path / f"{name}.json").read_bytes() for name in done}
    (path / f"hang-{stage}").unlink()
    good, watcher = run(path)
    assert good
    assert starts(path) == Counter(NAMES) + Counter([stage])  # nothing finished ran again
    assert before == {name: (path / f"{name}.json").read_bytes() for name in done}  # and nothing was lost
    assert [name for name, _, _, reused in watcher.ended if reused] == list(done)
    assert json.loads((path / "last.json").read_text())["from"] == {n: n for n in NAMES[:-1]}
    kept = json.loads((path / "interrupted" / f"1-{stage}.json").read_text())
    assert kept["partial"] is True  # what the interrupted stage had measured stays, and is marked


def test_a_finished_run_runs_nothing_again(path):
    assert run(path)[0]
    good, watcher = run(path)
    assert good
    assert all(reused for *_, reused in watcher.ended)
    assert starts(path) == Counter(NAMES)


def test_a_stage_that_died_after_its_record_is_finished(path):
    run(path)
    folder = RunFolder.open(path)
    entry = folder.stages["second"]
    folder.stages["second"] = {k: entry[k] for k in ("inputs", "runs", "command")} | {"state": "running"}
    folder.save()
    assert run(path)[0]
    assert starts(path) == Counter(NAMES)
    assert states(path)["second"] == "done"


def test_a_stage_runs_again_when_what_it_reads_has_changed(path):
    run(path)
    (path / "first.json").write_text('{"made_by": "somebody else"}')
    run(path)
    assert starts(path) == Counter(NAMES) + Counter(["last"])
    assert json.loads((path / "last.json").read_text())["from"]["first"] == "somebody else"


@pytest.mark.parametrize(
    "what, says",
    [
        ("fail", "second cannot be done: do something else"),
        ("bug", "ZeroDivisionError: something unexpected (see logs/second.log)"),
        ("crash", "its process was ended by SIGKILL"),
    ],
)
def test_a_stage_that_fails_is_told_and_the_others_go_on(path, what, says):
    (path / f"{what}-second").touch()
    good, watcher = run(path)
    assert not good
    assert [(name, state) for name, state, *_ in watcher.ended] == [
        ("first", "done"), ("second", "failed"), ("third", "done"), ("last", "done"),
    ]  # fmt: skip
    assert says in RunFolder.open(path).stages["second"]["text"]
    if what == "bug":
        assert "Traceback" in (path / "logs" / "second.log").read_text()
    (path / f"{what}-second").unlink()
    assert run(path)[0]
    assert starts(path) == Counter(["first", "second", "second", "third", "last", "last"])


# ---- the disk


def test_a_full_disk_in_a_stage_ends_the_run_in_one_line(path):
    (path / "full-second").touch()
    process = start(path)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert said.count("\n") == 1
    assert "no space left on device" in said
    assert f"--resume {path}" in said
    assert states(path) == {"first": "done", "second": "failed", "third": "pending", "last": "pending"}
    (path / "full-second").unlink()
    assert run(path)[0]
    assert starts(path)["first"] == 1


def test_a_full_disk_keeps_the_last_good_manifest(path, monkeypatch):
    folder = RunFolder.open(path)
    before = (path / "manifest.json").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(DiskError, match="no space left on device; what was finished is kept"):
        folder.update("first", state="done")
    assert (path / "manifest.json").read_bytes() == before
    assert not list(path.glob("*.tmp"))


def test_a_folder_that_became_read_only(path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DiskError, match="read-only file system"):
        Run(RunFolder(path, {"settings": {"model": "m"}, "stages": {}}), Quiet(), STAGES).go()


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = run_cli(["bringup", "canary-llama", "--quick", "--runs", str(tmp_path / "file" / "runs")])
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "name another --runs" in said[0]


def test_only_one_process_works_on_a_folder(path):
    with RunFolder.open(path).locked(), pytest.raises(InputError, match="another process"):
        run(path)


# ---- input


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "give a MODEL to bring up, or --resume DIR"),
        (["canary-llama", "--resume", "x"], "one of the two"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        (["--resume", "nowhere", "--quick"], "leave out everything but --resume"),
        (["--resume", "nowhere", "--device", "cuda"], "leave out everything but --resume"),
        (["--resume", "nowhere", "--lang", "zh"], "leave out everything but --resume"),
        (["canary-llama", "--lang", "fr"], "unknown --lang 'fr'"),
        (["canary-llama", "--batch", "1,x"], "--batch '1,x': write positive numbers"),
        (["canary-llama", "--prompt-len", "0"], "impossible sweep"),
        (["canary-llama", "--device", "npu:0"], "torch"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli(["bringup", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert not (tmp_path / "runs").exists()


def test_a_manifest_of_another_format(path):
    (path / "manifest.json").write_text('{"format": "surefoot-run/99"}')
    with pytest.raises(InputError, match="surefoot-run/99"):
        RunFolder.open(path)


# ---- settings, time, commands


def test_sizes_fit_the_model():
    settings = fitted(BringupSettings("m"), 512)
    assert max(settings.prompt_lens) + max(settings.output_lens) <= 512
    assert fitted(BringupSettings("m"), None) == BringupSettings("m")
    assert fitted(BringupSettings("m"), 8).prompt_lens


def test_settings_survive_the_manifest():
    settings = BringupSettings("m", device="npu:0", **QUICK)
    assert BringupSettings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings
    assert folder_name(settings, "bfloat16").startswith("m-npu0-bfloat16-20")


def test_time_left_shrinks_and_learns():
    clock = Clock(STAGES)
    whole = clock.left("first", 0.0, None)
    assert clock.left("last", 0.0, None) < whole
    clock.spent["first"] = 10.0  # a hundred times as long as usual
    assert clock.left("second", 0.0, None) > 50 * clock.left("last", 0.0, None) / 100 > 0


def own_point(name: str, count: int, steps: list[list[float]], first: float = 0.01) -> dict:
    """A point of a bench as it is recorded, from the seconds of the decode steps of each pass; one sequence."""
    walls = [first + sum(group) for group in steps]
    rates = summary([len(group) / sum(group) for group in steps])
    return {
        "name": name, "batch": 1, "prompt_len": 16, "output_len": count, "generation_s": summary(walls),
        "prefill": {"seconds": summary([first] * len(steps))},
        "decode": {"step_s": pooled(steps), "llama_bench_tg": rates},
    }  # fmt: skip


def test_own_claims_are_as_wide_as_the_passes_were():
    """A machine that halves its speed for some passes contradicts nothing; a number that is wrong does."""
    slow, fast = 0.0014, 0.0007
    short = own_point("short", 10, [[slow] * 9] * 3 + [[fast] * 9] * 3)
    long = own_point("long", 50, [[fast] * 49] * 4 + [[slow] * 49] * 2)
    rows = [_claim(short), _claim(long)]
    assert rows[0]["decode_step_s"] == pytest.approx([fast, slow])
    assert audit({"rows": rows}) == []
    for name in ("tokens_per_s", "decode_step_s"):
        wrong = dict(rows[1])
        wrong[name] = [4 * v for v in wrong[name]]
        assert "impossible" in audit({"rows": [rows[0], wrong]}), name


def audit(page: dict) -> list[str]:
    from surefoot.analyze import audit, claims

    return [f.severity for f in audit.audit(claims.parse({"format": "surefoot-claims-1"} | page, "test"))]


def test_every_stage_can_be_repeated_by_a_command():
    settings = BringupSettings("canary-llama", num_threads=1, **QUICK)
    for stage in REAL_STAGES:
        words = stage.command(settings)
        assert words[0] == "surefoot"
        assert run_cli([words[1], "--help"]) == 0
    needed = {name for stage in REAL_STAGES for name in stage.needs}
    assert needed <= set(BY_NAME)


SMALL = ["--quick", "--batch", "1,2", "--prompt-len", "16", "--output-len", "8", "--concurrency", "2"]
SMALL += ["--requests", "8", "--threads", "1"]


@pytest.mark.slow
def test_the_real_run_killed_in_three_stages_resumes_and_reports(tmp_path):
    """A canary from start to report, killed in the middle of the proof, the bench and the server's load."""
    surefoot = [sys.executable, "-m", "surefoot.cli.main", "bringup"]
    command = [*surefoot, "canary-llama", *SMALL, "--runs", str(tmp_path)]
    killed = ("proof", "bench", "load")
    for stage in killed:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(
            lambda s=stage: any(states(p.parent).get(s) == "running" for p in tmp_path.glob("*/manifest.json")), 300
        )
        time.sleep(1.0)
        process.kill()
        process.wait(20)
        (path,) = tmp_path.iterdir()
        command = [*surefoot, "--resume", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "kept" in done.stdout
    entries = RunFolder.open(path).stages
    assert {name: e["state"] for name, e in entries.items()} == dict.fromkeys(BY_NAME, "done"), done.stdout
    assert {name: e["runs"] for name, e in entries.items()} == {n: 1 + (n in killed) for n in BY_NAME}
    bench, load = (json.loads((path / f"{n}.json").read_text()) for n in ("bench", "load"))
    assert bench["proof"]["status"] == load["proof"]["status"] == "PROVEN"
    assert bench["config_hash"] == load["served"]["config_hash"]
    assert not any(p.name.endswith((".tmp", ".measured.json")) for p in path.iterdir())
    page = Page((path / "report.html").read_text(encoding="utf-8"))
    check_recorded(path, page)


def test_words_for_a_death():
    assert "memory runs out" in died(-signal.SIGKILL)
    assert died(-signal.SIGSEGV).endswith("a library crashed")
    assert died(3) == "its process ended with exit code 3"


def test_a_killed_parent_takes_the_server_along(tmp_path):
    """The load stage's server ends when its parent's pipe closes."""
    code = "import os, sys, time; from surefoot.bringup.child import end_with_parent; end_with_parent(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT, env=dict(os.environ))
    child.stdin.close()
    assert child.wait(20) == 1

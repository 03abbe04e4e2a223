"""bench_gpu.sh: all parts are rehearsed on a CPU, and what goes wrong in one costs itself alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import write_checkpoint, write_data

import bench_gpu as G
import bench_machine
import bench_real
import bench_run
import fast
import plan
from checkpoint import UserError
from measuring import FULL, TINY, Job, falling
from settings import settle, training_arguments

REPO = Path(__file__).resolve().parent.parent


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def model_and_data(tmp_path):
    """A tiny checkpoint with the questions beside it."""
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    write_data(tmp_path / "data")
    for source, name in (("train", bench_real.TRAINED_ON), ("nq", bench_real.ASKED)):
        shutil.copy(tmp_path / "data" / f"{source}.jsonl", folder / name)
    return folder


@pytest.fixture
def wheels(tmp_path):
    """A liger-kernel that changes nothing."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "liger_kernel-1-py3-none-any.whl", "w") as archive:
        archive.writestr("liger_kernel/__init__.py", "")
        archive.writestr("liger_kernel/transformers.py",
                         "def apply_liger_kernel_to_llama():\n    print('liger is applied')\n")
        archive.writestr("liger_kernel-1.dist-info/METADATA", "Name: liger-kernel\nVersion: 1\n")
    return tmp_path / "wheels"


def test_all_parts_are_rehearsed_on_a_cpu(tmp_path, model_and_data, wheels):
    """Every measurement of every part has numbers, or says which package it lacks."""
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(REPO / "bench_gpu.sh"), "--device", "cpu", "--tiny", "--out", str(out),
         "--model", str(model_and_data), "--wheels", str(wheels), "--limit", "3000"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert {p.name for p in out.iterdir()} == {"results.jsonl", "log.txt", "table.txt"}
    assert done.stdout.endswith((out / "table.txt").read_text())
    found = lines(out / "results.jsonl")
    assert [(x["part"], x["status"]) for x in found] == [(i, "done") for i in range(8)]
    for x in found:
        assert x["rows"] and not x["unfinished"] and x["settings"]["tiny"]
        assert {"commit", "torch", "transformers", "python"} <= set(x["about"])
        assert x["about"]["liger-kernel"] == "1"  # of the wheels
        for row in x["rows"]:
            assert len(row) > 2, row
            assert row.get("missing", "cupy") == "cupy", row
    check_numbers({(x["part"], row["what"]): row for x in found for row in x["rows"]})


def check_numbers(rows):
    """What must hold on any machine."""
    for (part, what), row in rows.items():
        if part == 2 and "worst sigma" in row:
            assert row["orthogonality"] < 1e-5 and row["residual"] < 1e-5, what
        if part in (4, 5) and "tokens/s" in row:
            assert row["tokens/s"] > 0, what
    start = rows[3, "FARSS, 1 of 2 blocks"]
    parts = [start[name] for name in ("passes", "decompositions", "moments", "candidates",
                                      "attach")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(start["seconds"])
    assert len(rows[4, "here, one step, 2 at a time, padded"]["kernel"]) == bench_run.SLOWEST
    assert (rows[5, "here, merged, calls a token"]["operators"]
            < rows[5, "here, not merged, calls a token"]["operators"])
    run = rows[7, "FARSS, 8 steps, killed, resumed"]
    assert run["steps"] == 8 and run.get("loss differs by", 0) < 1e-5
    assert rows[7, "logits, float32"]["distance"] < 1e-5
    answers = rows[7, "greedy answers"]
    assert answers["equal"] == answers["of"] == 2


# ----------------------------------------------------------------------------- parts that go wrong

GOOD = "row({'about': {}}); row({'begun': 'a'}); row({'what': 'a', 'seconds': 1.0, 'took': 1.0})"
SAYS = {
    "good": GOOD,
    "fails": GOOD + "; row({'begun': 'b'}); sys.exit('no memory')",
    "is late": "import subprocess; p = subprocess.Popen(['sleep', '1000']); row({'about': {}}); "
               "row({'begun': 'a'}); row({'what': 'a', 'pid': p.pid, 'took': 1.0}); "
               "row({'begun': 'b'}); time.sleep(1000)",
    "is cut": GOOD + "; file.write('{\"wha'); file.flush(); os.kill(os.getpid(), 9)",
    "stops": GOOD + "; os.kill(os.getppid(), signal.SIGTERM); time.sleep(1000)",
    "errs": "row({'begun': 'a'}); row({'what': 'a', 'error': 'no memory', 'took': 1.0})",
    "tests fail": "row({'begun': 'a'}); row({'what': 'a', 'failed': 2, 'took': 1.0})",
    "is left out": "row({'left out': 'no rows'})",
}


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Runs parts that do what SAYS has under their names; returns (exit code, results)."""
    handlers = {number: signal.getsignal(number) for number in G.SIGNALS}
    out = tmp_path / "out"

    def run(*names, more=()):
        head = (f"import json, os, signal, sys, time\nfile = open({str(out / 'running.jsonl')!r}, "
                "'a')\ndef row(x): file.write(json.dumps(x) + '\\n'); file.flush()\n")
        monkeypatch.setattr(G, "PARTS", [G.Part(name, "", 5 if name == "is late" else 60)
                                         for name in names])
        monkeypatch.setattr(G, "command", lambda number, args: [
            sys.executable, "-c", head + SAYS[names[number]]])
        code = G.main(["--out", str(out), "--device", "cpu", *more])
        return code, lines(out / "results.jsonl")

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def is_running(pid):
    """Not ended, nor a zombie that nobody asked after."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("name, code, status, unfinished", [
    ("fails", 1, "failed: exit 1, see log.txt", ["b"]),
    ("is late", 1, "out of time after 5 s", ["b"]),
    ("is cut", 1, "failed: exit -9, see log.txt", []),
    ("errs", 1, "done", []),
    ("tests fail", 1, "done", []),
    ("is left out", 0, "left out: no rows", []),
])
def test_what_goes_wrong_costs_itself_alone(scripted, capsys, name, code, status, unfinished):
    """What it had measured is kept, and the next part begins."""
    ended, found = scripted("good", name, "good")
    assert ended == code
    assert [x["status"] for x in found] == ["done", status, "done"]
    assert found[1]["unfinished"] == unfinished
    assert [len(x["rows"]) for x in found] == [1, int(name != "is left out"), 1]
    for row in found[1]["rows"]:
        assert not is_running(row.get("pid"))  # what a part started ends with it
    assert f"1  {name}: {status}" in capsys.readouterr().out


def test_sigterm_prints_what_is_done(scripted, capsys):
    ended, found = scripted("good", "stops", "good")
    assert ended == 130
    assert [x["status"] for x in found] == ["done", "stopped", "not begun: stopped"]
    assert len(found[1]["rows"]) == 1
    assert "2  good: not begun: stopped" in capsys.readouterr().out


def test_the_limit_ends_the_run(scripted, monkeypatch):
    """A part has no more than what is left, and none begins with next to nothing."""
    ended, found = scripted("good", "good", more=["--limit", "2"])
    assert ended == 0
    assert {x["status"][:20] for x in found} == {"not begun: 2 s left,"}
    monkeypatch.setattr(G, "FEWEST", 0)
    ended, found = scripted("is late", more=["--limit", "1"])
    assert ended == 1 and found[-1]["status"] == "out of time after 1 s"


def test_the_whole_start_waits_for_its_time(tmp_path):
    """Four times that of a quarter of the blocks, and a real model's on top."""
    start = {"part": G.START, "rows": [{"what": "FARSS", "seconds": 40.0, "took": 50.0}]}
    args = G.parsed(["--out", str(tmp_path)])
    assert FULL.blocks / FULL.some_blocks == G.TIMES
    assert "200 s needed" in G.excuse(G.WHOLE, 199, [start], args)
    assert G.excuse(G.WHOLE, 201, [start], args) is None
    assert G.excuse(G.WHOLE, 10, [], args) is None
    args = G.parsed(["--out", str(tmp_path), "--model", str(tmp_path)])
    assert f"{200 + G.PARTS[G.REAL].seconds} s needed" in G.excuse(G.WHOLE, 201, [start], args)
    assert "--model" in G.excuse(G.REAL, 500, [], G.parsed(["--out", str(tmp_path)]))


def test_one_measurement_that_fails_costs_itself_alone(monkeypatch, capsys):
    def fail():
        raise RuntimeError("CUDA out of memory\nand more")

    def lacking():
        import a_package_that_is_not_there  # noqa: F401

    monkeypatch.setattr(bench_machine, "ceilings", lambda job: iter(
        [("a", fail), ("b", lacking), ("c", lambda: {"x": 1})]))
    rows = [row for row in G.measure("bench_machine.ceilings", Job(TINY, "cpu")) if "what" in row]
    assert rows[0]["error"] == "RuntimeError: CUDA out of memory"
    assert rows[1]["missing"] == "a_package_that_is_not_there" and rows[2]["x"] == 1
    assert "Traceback" in capsys.readouterr().err  # for log.txt


@pytest.mark.parametrize("flags, says", [
    (["--parts", "9"], "--parts 9"), (["--model", "nowhere"], "nowhere: no such folder")])
def test_bad_options_are_one_line(tmp_path, capsys, flags, says):
    with pytest.raises(SystemExit):
        G.main(["--out", str(tmp_path), *flags])
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_table_says_what_was_predicted():
    """Of a whole run alone."""
    (part, what), said = next(iter(G.PREDICTED.items()))
    found = {"part": part, "name": "x", "status": "done", "seconds": 1.0, "unfinished": [],
             "rows": [{"what": what, "tokens/s": 12345.6, "took": 1.0}],
             "settings": {"tiny": False}}
    shown = "\n".join(G.table([found]))
    assert "tokens/s 12,346" in shown and f"predicted: {said}" in shown
    assert "predicted" not in "\n".join(G.table([found | {"settings": {"tiny": True}}]))


def test_every_prediction_is_of_a_measurement(monkeypatch):
    """By part and name, so that the table can put them side by side."""
    monkeypatch.setattr(bench_run, "adapted", lambda job: None)
    monkeypatch.setattr(bench_run, "random_peer", lambda *_: None)
    monkeypatch.setattr(bench_run, "generator_there", lambda model: None)
    monkeypatch.setattr(bench_run.M, "merge", lambda model: None)
    for part, what in G.PREDICTED:
        module, name = G.PARTS[part].function.split(".")
        function = getattr(__import__(module), name)
        assert what in [name for name, _ in function(Job(FULL, "cuda"))], what


# ---------------------------------------------------------------------------------- measurements


def test_errors_are_of_the_directions():
    """None for an SVD's; as large as they were made."""
    W = falling(60, 40, 0.5).double()
    _, S, Vh = torch.linalg.svd(W, full_matrices=False)
    found = bench_machine.errors(W, S, Vh.T)
    assert max(found.values()) < 1e-12
    S[-1] *= 1.25
    assert bench_machine.errors(W, S, Vh.T)["worst sigma"] == pytest.approx(0.25)
    assert bench_machine.errors(W, S, 2 * Vh.T)["orthogonality"] == pytest.approx(3)


def test_settings_of_torch_stay_as_they_were():
    job = Job(TINY, "cpu")
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    bench_machine.product(job, torch.float32, "high")
    bench_machine.first_and_second(job, not before[1], True)
    assert before == (torch.get_float32_matmul_precision(),
                      torch.backends.cuda.cudnn_sdp_enabled())


def test_launches_are_those_of_a_token(monkeypatch):
    """What the prompt takes falls out of the difference."""
    def calls(job, generate, new):
        return Counter({"cudaLaunchKernel": 100 + 30 * new, "cuLaunchKernelEx": 2 * new,
                        "cudaStreamSynchronize": 7 + new, "cudaMemcpyAsync": 3 * new,
                        "aten::mm": 50 + 10 * new})

    monkeypatch.setattr(bench_run, "is_cuda", lambda device: True)
    monkeypatch.setattr(bench_run, "calls", calls)
    found = bench_run.calls_a_token(Job(TINY, "cuda"), lambda work, new: None)
    assert found == {"operators": 10, "launches": 32, "synchronisations": 1, "copies": 3}


def test_a_steps_loss_is_that_of_the_whole_batch():
    """Whatever its micro-batches; and batches are padded or even, as they are called."""
    job, losses = Job(TINY, "cpu"), {}
    for micro in TINY.micro_batches:
        way = bench_run.Way(micro, True)
        model = bench_run.adapted(job)
        batch = bench_run.batches(job, True)[0]
        losses[micro] = bench_run.step_here(job, model, way)(batch)[0]
    assert losses[2] == pytest.approx(losses[4], rel=1e-2)
    lengths = {len(e.ids) for batch in bench_run.batches(job, True) for e in batch}
    assert len(lengths) > 1
    assert {len(e.ids) for batch in bench_run.batches(job, False) for e in batch} == {12}


@pytest.mark.parametrize("function", ["bench_run.training", "bench_run.generation",
                                      "bench_start.some_blocks"])
@pytest.mark.parametrize("absent", ["peft", "transformers"])
def test_what_compares_with_a_missing_package_says_so(monkeypatch, function, absent):
    """And all else is measured."""
    monkeypatch.setitem(sys.modules, absent, None)
    rows = [row for row in G.measure(function, Job(TINY, "cpu")) if "what" in row]
    assert not [row for row in rows if "error" in row]
    for row in rows:
        beside = {"peft": ("peft", "liger"), "transformers": ("peft", "liger", "transformers")}
        expected = any(name in row["what"] for name in beside[absent])
        assert (row.get("missing") in ("peft", "transformers", "liger_kernel")) == expected, row


@pytest.mark.parametrize("said, found", [
    ("E\nERROR tests/x.py\n2 errors in 0.6s",
     dict(passed=0, failed=2, skipped=0, failure=["tests/x.py"])),
    ("....\n5 passed in 3.1s", dict(passed=5, failed=0, skipped=0)),
    ("F\nFAILED tests/test_cuda.py::test_x[a] - boom\n1 failed, 12 passed, 3 skipped in 70.2s",
     dict(passed=12, failed=1, skipped=3,
          failure=["tests/test_cuda.py::test_x[a] - boom"])),
])
def test_the_summary_of_the_tests_is_read(said, found):
    assert bench_real.counted(said) == found


def test_tests_run_several_at_a_time_where_they_can(monkeypatch):
    """And all of them on a GPU."""
    monkeypatch.setattr(bench_real, "find_spec", lambda name: True)
    command = bench_real.pytest_command(Job(FULL, "cuda"))
    assert "-n" in command and "-k" not in command
    monkeypatch.setattr(bench_real, "find_spec", lambda name: None)
    assert "-n" not in bench_real.pytest_command(Job(FULL, "cuda"))
    with pytest.raises(ImportError, match="pytest"):
        bench_real.run_tests(Job(FULL, "cuda"))


def test_questions_are_looked_for_and_said_to_be_missing(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jsonl").touch()
    job = Job(TINY, "cpu", tmp_path, (tmp_path / "a", tmp_path / "b"))
    assert bench_real.file_of(job, "x.jsonl") == tmp_path / "b" / "x.jsonl"
    with pytest.raises(UserError, match=r"no y.jsonl in .*a or .*b; give --data FOLDER"):
        bench_real.file_of(job, "y.jsonl")


def test_an_answer_ends_before_eos():
    assert bench_real.until([5, 6, 2, 7], {2}) == [5, 6]
    assert bench_real.until([5, 6], {2}) == [5, 6]


# -------------------------------------------------------------------------------- docs/one-gpu.md

PAGE = (REPO / "docs" / "one-gpu.md").read_text()


def test_the_page_has_every_part_and_its_limit():
    for i, part in enumerate(G.PARTS):
        assert re.search(rf"^\| {i} {part.name} \|.*\| {part.seconds} \|$", PAGE, re.MULTILINE), i


def test_the_page_has_every_prediction():
    for said in G.PREDICTED.values():
        assert said in PAGE


def test_the_page_says_what_the_plan_says_of_each_card():
    """Every cell of the table, computed anew."""
    cells = {}
    for model in re.findall(r"^\| ([\w.-]+), training", PAGE, re.MULTILINE):
        task = "code" if model == "gemma2-9b" else "math"
        for gb in (24, 48, 80):
            s, config = settle(training_arguments("", ["--model", model, "--task", task,
                                                       "--dry-run"]))
            made = plan.make(s, config, gb * 1e9, fast=fast)
            start = sum(made.initialisation.values()) / 1e9
            cells.setdefault(f"{model}, training", []).append(
                f"{sum(made.training.values()) / 1e9:.1f} GB, mb {made.micro_batch}"
                + ", ckpt" * made.checkpointing if made.fits else "does not fit")
            cells.setdefault(f"{model}, start", []).append(
                f"{start:.1f} GB" + (f", {made.kept_apart / 1e9:.1f} apart"
                                     if made.kept_apart else "") if start <= gb else "does not fit")
    assert len(cells) == 10
    for name, row in cells.items():
        assert f"| {name} | {' | '.join(row)} |" in PAGE

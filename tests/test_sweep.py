"""sweep.py and demo.py: what is run, what is not run again, and what the results say."""

import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint as C
import demo
import eval as E
import results as R
import settings as S
import sweep
import train

REPO = Path(__file__).resolve().parent.parent
SHORT = ["--steps", "2", "--batch-size", "4", "--calibration-examples", "4"]


def rows_of(*values):
    """(method, lr, seed, K, task score) -> rows as row_of gives them, as far as they are used."""
    return [dict(method=m, lr=lr, seed=s, K=K, task_score=t) for m, lr, s, K, t in values]


def test_the_best_rate_weighs_knowledge_and_task():
    rows = rows_of(("full", 1e-4, 0, 1.0, 10.0), ("full", 2e-4, 0, 0.8, 80.0),
                   ("full", 4e-4, 0, 0.2, 99.0), ("lora", 1e-2, 0, 1.0, 100.0))
    assert sweep.best_rate(rows, "full") == 2e-4
    assert sweep.best_rate(rows, "farss") is None
    rows += rows_of(("full", 2e-4, 1, 0.0, 0.0), ("full", 4e-4, 1, 0.9, 99.0))
    assert sweep.best_rate(rows, "full") == 4e-4  # means over seeds, not the best seed


def test_a_job_is_known_by_its_settings_and_a_folder_of_another_run_is_refused(tmp_path):
    job = sweep.make_job(tmp_path, ["--method", "lora", "--lr", "1e-3", "--seed", "2", *SHORT])
    assert job.run == tmp_path / "lora-lr0.001-s2" and job.steps == 2 and not job.done()
    job.run.mkdir()
    S.write_run(job.run, job.settings, {})
    again = ["--method", "lora", "--lr", "1e-3", "--seed", "2", *SHORT]
    assert sweep.make_job(tmp_path, again).settings == job.settings
    with pytest.raises(C.UserError, match="was run with another rank, alpha"):
        sweep.make_job(tmp_path, [*again, "--rank", "4"])


def test_a_run_that_is_still_being_scored_is_not_done(tmp_path):
    """results.json is written after each benchmark; read half-way, it has no K."""
    job = sweep.make_job(tmp_path, ["--method", "lora", "--lr", "1e-3", *SHORT])
    job.run.mkdir()
    S.write_run(job.run, job.settings, {})
    (job.run / "adapter.safetensors").touch()
    scores = {name: {"score": 1.0} for name in ("word_problems", "city", "job", "year")}
    for names, done in ((["word_problems"], False), (["word_problems", "city", "job"], False),
                        (scores, True)):
        C.save_json(job.run / "results.json", {"benchmarks": {n: scores[n] for n in names}})
        assert job.done() == done


def test_a_sweep_runs_what_is_missing_and_ends_in_one_table(tmp_path, monkeypatch, capsys):
    """Full fine-tuning and FARSS, one of them stopped before its last step: the same files as
    undisturbed runs, T of full fine-tuning 1 on average, and nothing to do the second time."""
    monkeypatch.chdir(tmp_path)
    argv = ["--methods", "full", "farss", "--lrs", "1e-3", "--seeds", "0", "--jobs", "2", "--out",
            "s", "--", *SHORT]
    begun = sweep.make_job(Path("s"), [*SHORT, "--method", "farss", "--lr", "1e-3"])
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *_: False)  # stopped after its initialisation
        with pytest.raises(SystemExit):
            train.main([*begun.flags, "--out", str(begun.run)])
    assert S.is_run(begun.run) and not begun.done()
    sweep.main(argv)
    out = capsys.readouterr().out
    assert "full " in out and "farss " in out
    rows = sweep.read_csv(Path("s"))
    assert [r["method"] for r in rows] == ["full", "farss"]
    assert float(rows[0]["T"]) == 1.0 and rows[1]["shallow_rank_asked"] == "126.0"
    results = R.read_results("s/farss-lr0.001-s0")
    assert float(rows[1]["city"]) == pytest.approx(results["benchmarks"]["city"]["score"], abs=1e-3)
    assert float(rows[1]["K"]) == pytest.approx(results["summary"]["K"], abs=1e-3)
    full = C.read_json("s/full.json")
    assert full["seeds"] == [0] and full["summary"]["K"] == pytest.approx(float(rows[0]["K"]),
                                                                           abs=1e-3)
    assert Path("s/results.png").exists() and Path("s/results.txt").read_text() in out
    train.main([*begun.flags, "--out", "undisturbed"])
    name = "adapter.safetensors"
    assert (begun.run / name).read_bytes() == Path("undisturbed", name).read_bytes()

    monkeypatch.setattr(sweep, "start", None)
    before = Path("s/results.csv").read_bytes()
    sweep.main(argv)
    assert Path("s/results.csv").read_bytes() == before


@pytest.mark.parametrize("argv, says", [
    (["--lrs", "fast"], "invalid float"),
    (["--jobs", "0"], "--jobs must be at least 1"),
    (["--methods", "dora"], "invalid choice"),
    (["--model", "nowhere"], "no such folder"),
    (["--model", "llama2-7b"], "no learning rates are known for farss"),
    (["--", "--rank", "0"], "--rank must be above 0"),
    (["--", "--nonsense"], "unrecognized arguments"),
])
def test_bad_input_is_one_line_before_any_run(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        S.run_main(lambda: sweep.main(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and says in err
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_ends_the_sweep_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = sweep.make_job(tmp_path, SHORT)
    job.run.mkdir()
    C.save_json(job.run / "run.json", {"settings": {}})
    with pytest.raises(C.UserError, match=r"farss-lr.* ended with 2: .*not written by this"):
        list(sweep.run_all([job], 1))


def test_a_stopped_sweep_stops_its_runs(tmp_path):
    """SIGTERM to the sweep: the run under way saves its step, and no process is left."""
    argv = ["--methods", "lora", "--lrs", "1e-3", "0.001", "--seeds", "0", "--out", "s", "--",
            "--steps", "2000", "--batch-size", "4"]
    process = subprocess.Popen([sys.executable, str(REPO / "sweep.py"), *argv], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = tmp_path / "s" / "lora-lr0.001-s0"
    while not (run / "log.jsonl").exists() or len((run / "log.jsonl").read_text()) < 500:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    steps = len((run / "log.jsonl").read_text().splitlines())
    assert (run / "checkpoint" / f"step-{steps:06d}.safetensors").exists()
    time.sleep(0.5)
    assert steps == len((run / "log.jsonl").read_text().splitlines())  # nobody goes on
    assert [p.name for p in (tmp_path / "s").glob("*.log")] == ["lora-lr0.001-s0.log"]


def test_results_of_other_runs_are_not_written_over(tmp_path):
    (tmp_path / "results.csv").write_text("method,lr,seed\nlora,0.5,0\n")
    with pytest.raises(C.UserError, match=r"results.csv holds lora at 0\.5"):
        sweep.check_results(tmp_path, [sweep.make_job(tmp_path, SHORT)])


# ------------------------------------------------------------------------------------- the demo


def test_the_demo_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo.main(SHORT)
    out = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(out) if line.startswith("method "))
    table = [line.split()[0] for line in out[first + 1 : first + 5]]
    assert table == ["base", "full", "lora", "farss"]
    assert Path("runs/demo/demo.png").exists()
    before, after, caution = out[-3:]
    assert "knows 100 %" in before and "lora solves" in after and "farss solves" in after
    assert "one seed" in caution and "±" in caution
    train.main([*SHORT, "--method", "farss", "--out", "alone"])
    beside = next(Path("runs/demo").glob("farss-*/adapter.safetensors"))
    # The same bits in another process, with another run beside it.
    assert Path("alone/adapter.safetensors").read_bytes() == beside.read_bytes()
    Path("runs/microcosm-base").mkdir()  # another opinion on the base, as of --limit 5
    C.save_json("runs/microcosm-base/results.json", {"benchmarks": {}})
    monkeypatch.setattr(sweep, "start", None)  # what is there is not run again
    capsys.readouterr()
    demo.main(SHORT)
    assert capsys.readouterr().out.splitlines()[1:] == out[1:]


def test_train_without_arguments_is_the_demo(monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "main", lambda: calls.append(1))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    runpy.run_path(str(REPO / "train.py"), run_name="__main__")
    assert calls == [1]


def test_the_script_works_from_a_folder_that_is_not_the_checkout(tmp_path):
    done = subprocess.run([sys.executable, str(REPO / "train.py"), "--method", "lora", *SHORT],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/microcosm-microcosm-lora-s0/adapter.safetensors").exists()


# ------------------------------------------------------------------------------ what is committed


def test_the_committed_model_scores_what_is_stored(tmp_path):
    E.main(["microcosm", "--out", str(tmp_path)])
    mine, stored = (C.read_json(p)["benchmarks"] for p in
                    (tmp_path / "results.json", REPO / "microcosm" / "base.json"))
    assert mine.keys() == stored.keys()
    for name in mine:
        assert mine[name]["score"] == stored[name]["score"], name


def test_the_stored_results_hang_together():
    """T of the csv is the task score over full.json's; the mean over the seeds of full
    fine-tuning at its best rate is 1; every method has three seeds at every rate of its grid."""
    rows = sweep.read_csv(REPO / "microcosm")
    full = C.read_json(REPO / "microcosm" / "full.json")
    whole = full["benchmarks"]["word_problems"]["score"]
    grid = S.preset("microcosm", "microcosm").grid
    for r in rows:
        assert float(r["T"]) == pytest.approx(float(r["word_problems"]) / whole, abs=1e-3)
        K, T = float(r["K"]), float(r["T"])
        assert float(r["KT"]) == pytest.approx(E.harmonic_mean(K, T), abs=1e-3)
    best = [float(r["T"]) for r in rows if r["method"] == "full"
            and float(r["lr"]) == full["settings"]["lr"]]
    assert sum(best) / len(best) == pytest.approx(1, abs=1e-3)
    for method, rates in grid.items():
        seen = {(float(r["lr"]), int(r["seed"])) for r in rows if r["method"] == method}
        assert seen == {(lr, seed) for lr in rates for seed in range(3)}


def test_the_presets_rates_are_the_best_of_the_stored_results():
    rows = [{"method": r["method"], "lr": float(r["lr"]), "K": float(r["K"]),
             "task_score": float(r["task_score"])} for r in sweep.read_csv(REPO / "microcosm")]
    for method, lr in S.preset("microcosm", "microcosm").settings["lr"].items():
        assert lr == sweep.best_rate(rows, method)


def test_a_task_without_knowledge_benchmarks_is_refused_before_anything_runs(tmp_path, monkeypatch,
                                                                             capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--model", "roberta-base", "--lrs", "1e-3", "--", "--task", "glue:rte"])
    assert stop.value.code == 2 and not Path("runs").exists()
    assert "--task glue:rte: a sweep weighs T against K" in capsys.readouterr().err

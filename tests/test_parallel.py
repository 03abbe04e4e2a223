"""fast/distributed.py: two processes on the CPU, over gloo, do what one does.

torchrun runs this file as a script, once for all tests: `work` is what both processes do there, in
a folder that `two` has prepared. The tests compare what they left with one process's.
"""

import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import tiny_batch, tiny_llama, write_checkpoint, write_data

import alone
import checkpoint as C
import eval as E
import farss
import fast
import figures
import model as M
import plan
import train
from fast import distributed as parallel
from fast.decompositions import Directions
from methods import covariances
from settings import settle, training_arguments

REPO = Path(__file__).resolve().parent.parent
METHODS = ["farss", "corda-kpm", "lora", "kasa", "full"]
# 9 examples by fours: the last batch of an epoch has one, and nothing for the second process.
SMALL = ["--model", "tiny", "--data", "d/train.jsonl", "--rank", "6", "--r-avg", "3", "--r-max",
         "5", "--calibration-examples", "24", "--batch-size", "4", "--lr", "1e-3", "--steps", "6",
         "--examples", "9", "--device", "cpu", "--dropout", "0", "--micro-batch", "4", "--fast"]
DROPOUT = [*SMALL, "--method", "lora", "--dropout", "0.3", "--save-every", "2"]
ASKED = ["--benchmarks", "gsm8k,nq_open,webqs", "--max-new-tokens", "5", "--device", "cpu",
         "--limit", "12", "--data", "gsm8k=d/train.jsonl", "nq_open=d/nq.jsonl",
         "webqs=d/webqs.json"]
# Of two processes the second has one example less, but must run the model as often.
SHARDED = {"full": ["--method", "full", "--micro-batch", "1"],
           "tied": ["--method", "full", "--model", "tied", "--dtype", "bfloat16"],
           "lora": ["--method", "lora", "--residual", "exact", "--checkpointing"],
           "pissa": ["--method", "pissa", "--freeze", "deep-third"],
           "farss": ["--method", "farss", "--residual", "exact"]}
FULL = [*SMALL, *SHARDED["full"], "--save-every", "2"]
SHAPES = [[(5, 3), (9, 9), (1, 1)], [(4, 8)], [(7, 2), (2, 30)]]  # batches of (prompt, response)


def torchrun(*command, cwd, timeout=600):
    env = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", *map(str, command)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=timeout)


def interrupted(argv, step, here=True):
    """A run of train.py that is sent SIGTERM (in this process, or only in another) in a step."""
    inner, count = train.train_step, [0]

    def counted(*args):
        count[0] += 1
        if count[0] == step and here:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args)

    train.train_step = counted
    try:
        train.main(argv)
    except SystemExit as stop:
        return stop.code
    finally:
        train.train_step = inner


def factors(dtype, batches, reduce=lambda x: x):
    """What a start is computed from, by name."""
    model = tiny_llama(1, dtype)
    names = M.linear_names(model, M.DECODER_TARGETS["seven"])
    found = {}
    first = {}
    loss = train.counting_first_tokens(farss.summed_loss, names, first)
    measured = fast.measure(model, batches, names, farss.Budget(2, 4, 2, 1, 4), loss,
                            reduce=reduce)
    for name, x in measured.items():
        one, every = reduce(first[name])
        found |= {f"{name}.s": x.s, f"{name}.share": (one / every).double(),
                  f"{name}.I": torch.tensor(x.importance or 0.0, dtype=torch.float64)}
    for Cs in covariances(model, batches, names, train.run_body, 2, fast.OuterSum, reduce):
        found |= {f"{name}.C": each for name, each in Cs.items()}
    return {name: each.clone() for name, each in found.items()}  # some share one tensor


def work():
    """What the two processes do."""
    rank, figures.plotting = parallel.rank(), lambda: None
    batches, reduce = parallel.deal([tiny_batch(rows, seed=7) for rows in SHAPES])
    assert len(batches) == 2 - rank
    for dtype in (torch.float64, torch.float32):
        C.save_tensors(f"factors-{dtype}-{rank}", factors(dtype, batches, reduce), {})
    one, reduce = parallel.deal(["alone"])
    assert one == ["alone"] and reduce(torch.ones(1)) == 1
    assert parallel.gather([f"{rank}-{i}" for i in range(2 - rank)]) == ["0-0", "1-0", "0-1"]
    torch.manual_seed(3)
    weights, made = [torch.randn(6, 9), torch.randn(9, 6), torch.randn(4, 4)], []
    found = parallel.each(lambda W: (made.append(W), Directions.of(W))[1], weights)
    assert len(made) == 2 - rank
    for one, W in zip(found, weights, strict=True):
        assert all(map(torch.equal, one, Directions.of(W)))
    svd, decomposed = farss.svd, []
    farss.svd = lambda W: (decomposed.append(W), svd(W))[1]
    inner = train.train

    def watched(model, *args):
        C.save_tensors(f"before-{rank}", dict(model.named_parameters()), {})
        done = inner(model, *args)
        C.save_tensors(f"after-{rank}", dict(model.named_parameters()), {})
        return done

    for method in METHODS:
        decomposed.clear()
        train.train = watched
        train.main([*SMALL, "--method", method, "--out", f"two-{method}"])
        parallel.barrier()
        if parallel.first():
            for file in ("before-0", "before-1", "after-0", "after-1"):
                shutil.move(file, f"two-{method}/{file}")
        if method == "farss":  # seven layers in each of four blocks, by turns
            assert len(decomposed) == 4 * (4 - rank)
        train.train = inner
        parallel.barrier()
    farss.svd = svd
    E.main(["two-farss", *ASKED])

    train.main([*DROPOUT, "--out", "two-dropout"])
    assert interrupted([*DROPOUT, "--out", "cut-dropout"], 3, here=rank == 1) == 130
    parallel.barrier()
    if parallel.first():
        shutil.copytree("cut-dropout", "2-to-1")
    parallel.barrier()
    train.main(["--resume", "cut-dropout"])
    train.main(["--resume", "1-to-2"])
    for name, argv in SHARDED.items():
        train.main([*SMALL, *argv, "--shard", "--out", f"shard-{name}"])
    assert interrupted([*FULL, "--shard", "--out", "full-2-to-1"], 3, here=rank == 1) == 130
    parallel.barrier()
    if parallel.first():
        shutil.copytree("full-2-to-1", "full-2-to-2")
    parallel.barrier()
    for run, more in (("full-2-to-2", ["--no-shard"]), ("full-1-to-2", ["--shard"])):
        train.main(["--resume", run, *more])
    for argv in ([*SMALL, "--batch-size", "1"], [*SMALL, "--device", "meta"]):
        with suppress(C.UserError):
            train.main([*argv, "--out", "refused"])
            raise AssertionError("should have been refused")
    parallel.barrier()


if __name__ == "__main__":
    parallel.together(work)()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes have worked, and one before them."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_checkpoint("tiny")
        write_data("d")
        interrupted([*DROPOUT, "--out", "1-to-2"], 3)
        interrupted([*FULL, "--out", "full-1-to-2"], 3)
        write_checkpoint("tied", tie_word_embeddings=True)
        shutil.copytree("1-to-2", "1-to-1")
        done = torchrun(__file__, cwd=folder)
        assert done.returncode == 0, done.stderr[:6000]
        yield folder


@pytest.fixture
def here(two, monkeypatch):
    monkeypatch.chdir(two)
    return two


def log(run):
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]


def close(one, two, rtol, atol=0.0):
    assert one.keys() == two.keys()
    for name, each in one.items():
        torch.testing.assert_close(two[name], each, rtol=rtol, atol=atol * each.abs().max().item(),
                                   msg=lambda text, name=name: f"{name}: {text}")


def multiplied(tensors):
    """Adapters as B A: which sign a singular vector has is up to the last bits of a sum."""
    found = dict(tensors)
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part in ("A", "A0"):
            found[name] = found.pop(f"{layer}.{part.replace('A', 'B')}") @ found[name]
    return found


def same_bits(one, two):
    assert Path(one).read_bytes() == Path(two).read_bytes()


# ------------------------------------------------------------------------------- one process


def public(module):
    return {name: inspect.signature(f) for name, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module.__name__}


def test_what_one_process_needs_has_the_same_signatures():
    mine, theirs = public(alone), public(parallel)
    assert mine == {name: theirs[name] for name in mine}
    used = {name for file in ("train.py", "eval.py")
            for name in re.findall(r"parallel\.(\w+)", (REPO / file).read_text())}
    assert used == set(mine)


@pytest.mark.parametrize("parallel", [alone, parallel], ids=["alone", "distributed"])
def test_one_process_is_left_alone(parallel):
    assert (parallel.rank(), parallel.size(), parallel.first()) == (0, 1, True)
    x, items = torch.ones(3), [1, 2, 3]
    assert parallel.added(0.1) == 0.1 and parallel.same(items) is items
    assert parallel.deal(items)[0] == items and parallel.deal(items)[1](x) is x
    assert parallel.shard(items) == items and parallel.gather(items) is items
    parallel.check("mps", 1)
    before = torch.get_rng_state()
    parallel.reseed(0, 1)
    assert torch.equal(before, torch.get_rng_state())
    seen = []
    parallel.together(lambda: seen.append(torch.distributed.is_initialized()))()
    assert seen == [False]


# ------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_factors_from_a_part_of_the_batches_each_are_those_of_all(here, dtype, rtol):
    """Σ_h, Σ_δ, the share of the first tokens and C."""
    expected = factors(dtype, [tiny_batch(rows, seed=7) for rows in SHAPES])
    close(expected, C.load_tensors(f"factors-{dtype}-0")[0], rtol, rtol)
    same_bits(f"factors-{dtype}-0", f"factors-{dtype}-1")


# ------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_two_is_a_run_of_one(here, method):
    """Same examples in the same order; loss and gradient norm are those of the whole batch."""
    train.main([*SMALL, "--method", method, "--out", f"one-{method}"])
    one, two = log(f"one-{method}"), log(f"two-{method}")
    for key in ("step", "tokens", "lr"):
        assert [x[key] for x in one] == [x[key] for x in two]
    for key in ("loss", "grad_norm"):
        assert [x[key] for x in two] == pytest.approx([x[key] for x in one], rel=2e-5)
    assert one[-1]["loss"] < one[0]["loss"]
    file = "model/model.safetensors" if method == "full" else "adapter.safetensors"
    one, two = (multiplied(C.load_tensors(f"{n}-{method}/{file}")[0]) for n in ("one", "two"))
    close(one, two, 1e-3, 1e-4)
    ranks = [Path(f"{n}-{method}/ranks.json") for n in ("one", "two")]
    if ranks[0].exists():
        one, two = (C.read_json(r)["layers"] for r in ranks)
        assert {n: x["r"] for n, x in one.items()} == {n: x["r"] for n, x in two.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_both_processes_hold_the_same_model_to_the_bit(here, method, when):
    same_bits(f"two-{method}/{when}-0", f"two-{method}/{when}-1")


def test_processes_have_their_own_dropout_and_resume_it_to_the_bit(here):
    """Stopped by a signal to the second process alone, after the same step."""
    assert [len(log(run)) for run in ("cut-dropout", "two-dropout", "2-to-1")] == [6, 6, 3]
    assert [x["loss"] for x in log("cut-dropout")] == [x["loss"] for x in log("two-dropout")]
    same_bits("cut-dropout/adapter.safetensors", "two-dropout/adapter.safetensors")


def test_a_checkpoint_of_two_goes_on_in_one_and_the_reverse(here):
    """Dropout's draws differ, all else goes on."""
    for cut, whole in (("2-to-1", "two-dropout"), ("1-to-1", None)):
        train.main(["--resume", cut])
        if whole:
            assert [x["loss"] for x in log(cut)[:3]] == [x["loss"] for x in log(whole)[:3]]
    for a, b in (("2-to-1", "two-dropout"), ("1-to-2", "1-to-1")):
        later = [[x["loss"] for x in log(run)[3:]] for run in (a, b)]
        assert later[0] != later[1] and later[0] == pytest.approx(later[1], rel=0.05)


# ------------------------------------------------------------------------------- weights dealt out


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_run_is_a_run_of_one(here, name):
    """Saved as one process saves it."""
    train.main([*SMALL, *SHARDED[name], "--out", f"whole-{name}"])
    one, two = log(f"whole-{name}"), log(f"shard-{name}")
    rough = name == "tied"  # in bf16 products
    for key in ("loss", "grad_norm"):
        assert [x[key] for x in two] == pytest.approx([x[key] for x in one],
                                                      rel=3e-2 if rough else 2e-5)
    file = "model/model.safetensors" if "full" in SHARDED[name] else "adapter.safetensors"
    one, two = (C.load_tensors(f"{n}-{name}/{file}")[0] for n in ("whole", "shard"))
    close(one, two, 1e-2 if rough else 1e-3, 1e-2 if rough else 1e-4)
    left = [sorted(p.name for p in Path(f"{n}-{name}").iterdir()) for n in ("whole", "shard")]
    assert {*left[0]} - {*left[1]} <= {"loss.png", "ranks.png", "spectra.png"}


@pytest.mark.parametrize("run", ["full-2-to-1", "full-2-to-2", "full-1-to-2"])
def test_a_sharded_checkpoint_goes_on_in_any_number_of_processes(here, run):
    if run == "full-2-to-1":
        train.main(["--resume", run])
    if not Path("whole-full").exists():
        train.main([*SMALL, *SHARDED["full"], "--out", "whole-full"])
    assert [x["loss"] for x in log(run)] == pytest.approx([x["loss"] for x in log("whole-full")],
                                                          rel=2e-5)
    one, two = (C.load_tensors(f"{r}/model/model.safetensors")[0] for r in (run, "whole-full"))
    close(one, two, 1e-3, 1e-4)


@pytest.mark.parametrize("more, what", [
    (["--score-every", "2"], "--score-every"), (["--method", "kasa"], "--method kasa")])
def test_shard_is_refused_where_whole_weights_are_needed(here, more, what):
    with pytest.raises(C.UserError, match=f"--shard does not go with {what}"):
        train.main([*SMALL, "--shard", *more, "--out", "refused"])


def test_shard_with_one_process_is_said_to_do_nothing(here, capsys):
    train.main([*SMALL, "--shard", "--method", "lora", "--steps", "1", "--out", "alone"])
    assert "--shard has nothing to do" in capsys.readouterr().out
    assert C.read_json("alone/run.json")["settings"]["shard"] is False


def test_the_plan_of_full_fine_tuning_fits_when_sharded_over_eight(monkeypatch):
    """Llama-2-7B: 16 bytes a weight over 8, and gathered in fp32 the embedding, the head, the last
    norm and two blocks; two of the 16 examples each."""
    s, config = settle(training_arguments("", ["--model", "llama2-7b", "--task", "math", "--method",
                                               "full", "--shard", "--dry-run"]))
    one = plan.make(s, config)
    monkeypatch.setattr(plan, "processes", lambda: 8)
    eight = plan.make(s, config)
    assert not one.fits and eight.fits and eight.micro_batch <= 2 < 16
    assert eight.training["trained, with AdamW"] == 16 * 6738415616 / 8
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert eight.training["gathered weights"] == 4 * (2 * 32000 * 4096 + 4096 + 2 * block)
    alone = plan.make(dataclasses.replace(s, shard=False), config)
    assert alone.training["trained, with AdamW"] == one.training["trained, with AdamW"]
    assert "gathered weights" not in plan.by_part(alone.training)


# ------------------------------------------------------------------------------- evaluation


def test_an_evaluation_by_two_is_that_by_one(here):
    """webqs has one question, and none for the second process; the answer loss is over two batches.
    """
    E.main(["two-farss", *ASKED, "--out", "one-evaluated"])
    one, two = (C.read_json(f"{run}/results.json") for run in ("one-evaluated", "two-farss"))
    for found in (one, two):
        for b in found["benchmarks"].values():
            del b["seconds"]
    assert one["benchmarks"] == two["benchmarks"] and one["benchmarks"]["gsm8k"]["answer_loss"]
    for name in ("gsm8k", "nq_open", "webqs"):
        same_bits(f"one-evaluated/eval/{name}.jsonl", f"two-farss/eval/{name}.jsonl")


# ------------------------------------------------------------------------------- bad input


def test_what_processes_cannot_share_is_refused(here, monkeypatch):
    assert not Path("refused").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(C.UserError, match="WORLD_SIZE is 2 and RANK is not set: start several"):
        parallel.together(work)()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(parallel, "size", lambda: 4)
    with pytest.raises(C.UserError, match="--batch-size 3: less than one example for each of 4"):
        parallel.check("cpu", 3)
    with pytest.raises(C.UserError, match="--device cuda:1: with several processes give cuda"):
        parallel.check("cuda:1", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(C.UserError, match="4 processes on this machine, which has 2 GPUs"):
        parallel.check("cuda", 8)
    mine = {"code": "a", "torch": "2", "arguments": []}
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda out, x: out.__setitem__(
        slice(None), [x, x, x | {"code": "b"}, x]))
    with pytest.raises(C.UserError, match=r"process 2 has other code \(b\) than process 0 \(a\)"):
        parallel.check_alike(mine)


def test_an_error_of_all_is_said_once(here):
    done = torchrun(REPO / "train.py", *SMALL, "--batch-size", "1", "--out", "no", cwd=here)
    assert done.returncode and not Path("no").exists()
    assert done.stderr.count("train.py: error: --batch-size 1: less than one") == 1


def test_a_process_that_ends_alone_says_why_and_the_others_one_line(here):
    Path("ends.py").write_text("""
from datetime import timedelta
import settings
from fast import distributed as parallel

def main():
    if parallel.rank() == 1:
        raise KeyboardInterrupt("told to")  # as after a signal
    parallel.barrier()

parallel.PATIENCE = timedelta(seconds=1)
settings.run_main(parallel.together(main))
""")
    done = torchrun("ends.py", cwd=here)
    assert done.returncode
    assert done.stderr.count("ends.py: error: interrupted; told to") == 1
    assert done.stderr.count("ends.py: error: another process has ended") <= 1
    assert "[rank" not in "".join(x for x in done.stderr.splitlines() if "c10d" not in x)

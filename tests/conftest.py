"""Models and folders that several test files look at, each beside its oracle."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import KINDS, oracle, tiny_llama, write_checkpoint

import checkpoint as C

# Matrices this small take longer to share out among threads than to multiply.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", help="where test_cuda.py runs, all of it (default: cuda; where "
                     "there is none, its cases marked `rehearsed` on the CPU)")


def pytest_configure(config):
    config.addinivalue_line("markers", "rehearsed: a case of test_cuda.py that also runs on a CPU")


@pytest.fixture
def device(request):
    """The device that a case of test_cuda.py compares with the CPU."""
    if given := request.config.getoption("--device"):
        return given
    if torch.cuda.is_available():
        return "cuda"
    if request.node.get_closest_marker("rehearsed"):
        return "cpu"
    pytest.skip("no CUDA device; --device cpu has the CPU take its place")


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(our model, transformers' model of the same weights), written by us and read by it."""
    ours = tiny_llama(num_hidden_layers=2, **KINDS[request.param])
    folder = tmp_path_factory.mktemp("pair")
    C.save(ours, folder)
    return SimpleNamespace(ours=ours, theirs=oracle(folder), kind=request.param, folder=folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "m", num_hidden_layers=2)


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A sound checkpoint of its own, for the tests that damage it."""
    return shutil.copytree(checkpoint, tmp_path / "m")


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(num_hidden_layers=2)

"""Shared fixtures: importable helpers, a fixed seed, poisoned fresh memory, small released-format checkpoints."""

import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


# name -> arguments of write_random_checkpoint
CHECKPOINTS = {
    "fp8_fused": {"dtype": "fp8", "layout": "fused_qkv"},
    "bf16_fused": {"dtype": "bf16", "layout": "fused_qkv"},
    "fp8_split": {"dtype": "fp8", "layout": "split"},
    "fp8_plain": {"dtype": "fp8", "layout": "plain"},
    "fp8_omni": {"dtype": "fp8", "layout": "fused_qkv", "vision": True, "audio": True},
    "mxfp4": {"dtype": "mxfp4", "layout": "fused_qkv"},
}


def poisoned(function):
    """`function` with fresh memory that nobody may read: NaN, and integers out of any range."""

    def allocate(*args, **kwargs):
        tensor = function(*args, **kwargs)
        if tensor.device.type == "meta" or tensor.dtype == torch.bool:
            return tensor
        with torch.no_grad():
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return allocate


class PoisonedTorch:
    """`torch` as the modules of the package see it. The real one stays: device contexts know its functions by id."""

    empty = staticmethod(poisoned(torch.empty))
    empty_like = staticmethod(poisoned(torch.empty_like))

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory():
    """Memory that the package allocates without a value is NaN, so that reading it before writing it shows."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "modeling_mimo" and vars(module).get("torch") is torch:
                patch.setattr(module, "torch", PoisonedTorch())
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        yield


class Deprecations(logging.Handler):
    """Keeps what Transformers logs about names that go away; of those it warns about, setup.cfg makes errors."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        message = record.getMessage()
        # Transformers' own assisted generation calls `generate` in this way; released config.json say `torch_dtype`
        if "deprecated" in message and not any(name in message for name in ("'min_new_tokens'", "`torch_dtype`")):
            self.messages.append(message)


@pytest.fixture(autouse=True)
def _no_deprecations():
    """A test fails that calls Transformers by a name that goes away: the next line will not know it."""
    handler, logger = Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.messages


@pytest.fixture(scope="module")
def plain_torch():
    """The real `torch` in our modules again: the tracer of torch.compile knows its functions by identity."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "modeling_mimo" and "torch" in vars(module):
                patch.setattr(module, "torch", torch)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@contextmanager
def single_threaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    """For tests of tiny models: with two busy cores their operations wait for each other's threads (measured 16 x)."""
    with single_threaded():
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name -> folder of a small checkpoint in the released format; read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    with single_threaded():
        return {
            name: write_random_checkpoint(root / name, "tiny", with_tokenizer=False, **arguments)
            for name, arguments in CHECKPOINTS.items()
        }

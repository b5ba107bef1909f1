"""The scripts of examples/micro that train MiMo-Micro, by a few small steps."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from test_convert import read_tensors
from torch import nn
from transformers import TrainerCallback

from modeling_mimo import micro


RECIPE = Path(__file__).parents[1] / "examples" / "micro"
STEPS = 4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def recipe():
    """As when a script runs, its folder is on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        yield


# Optimizer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8), (5, 16, 40)])
def test_steps_of_matrices_are_nearly_orthogonal(shape):
    from muon import orthogonal

    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    # far more uneven before
    assert 0.5 < values.min() <= values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.95
    if len(shape) == 3:
        torch.testing.assert_close(found, torch.stack([orthogonal(matrix) for matrix in matrices]))


def test_embeddings_and_vectors_move_as_with_adamw():
    from muon import Muon

    torch.manual_seed(0)
    model, twin = (nn.ModuleDict({"embed": nn.Embedding(10, 6), "norm": nn.LayerNorm(6)}) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    groups = [
        {"params": twin["embed"].parameters(), "weight_decay": 0.05},
        {"params": twin["norm"].parameters(), "weight_decay": 0.0},
    ]
    optimizers = Muon(model, 1e-2), torch.optim.AdamW(groups, 1e-2, betas=(0.9, 0.98))
    for _ in range(5):
        ids = torch.randint(10, (3, 4))
        for net, optimizer in zip((model, twin), optimizers):
            optimizer.zero_grad()
            (net["norm"](net["embed"](ids)) ** 3).sum().backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), msg=name)


# Stages -------------------------------------------------------------------------------------------------------------


def run(stage, source, folder, patch, callback=None):
    """Two steps of two conversations between checkpoints."""
    train = importlib.import_module("train")
    patch.setattr(train, "BATCH", 4)
    patch.setattr(train, "PARTS", 2)
    if callback is not None:
        patch.setattr(train, "Scores", callback)
    options = ["--steps", str(STEPS), "--save-every", "2", "--score-count", "1"]
    patch.setattr(sys, "argv", ["train.py", stage, str(source), str(folder), *options])
    train.parts_of.cache_clear()
    assert train.main() == 0


def power_cut(steps, at):
    """What takes the place of `Scores`: notes each step in `steps`, and ends the run with step `at`."""

    class PowerCut(TrainerCallback):
        def __init__(self, *args):
            pass

        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if state.global_step == at:
                raise InterruptedError

    return PowerCut


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trunk"
    with pytest.MonkeyPatch.context() as patch:
        run("trunk", micro(), folder, patch)
    return folder


def changed(before, after):
    """Beginnings of the names of tensors that are not the same."""
    before, after = read_tensors(before), read_tensors(after)
    assert set(before) == set(after)
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {".".join(name.split(".")[:2]) for name in names}


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(trunk, tmp_path, monkeypatch):
    steps = []
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        run("trunk", micro(), tmp_path, patch, power_cut(steps, at=3))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "config.json").exists()
    with monkeypatch.context() as patch:
        run("trunk", micro(), tmp_path, patch, power_cut(steps, at=None))
    # not from the beginning
    assert steps == [1, 2, 3, 3, 4]
    assert changed(trunk, tmp_path) == set()


def test_heads_learn_on_a_trunk_that_stays(trunk, tmp_path, monkeypatch):
    run("heads", trunk, tmp_path, monkeypatch)
    assert changed(trunk, tmp_path) == {"model.mtp"}


def test_the_trunk_learns_with_towers_that_stay(trunk, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(micro(), dtype=torch.float32).save_pretrained(tmp_path)
    learned = changed(tmp_path, trunk)
    assert {"model.embed_tokens", "model.layers", "model.norm", "lm_head.weight"} <= learned
    assert not any(name.startswith(("visual", "audio_encoder", "speech_embeddings", "model.mtp")) for name in learned)


@pytest.mark.parametrize("script", ["train", "release"])
def test_a_source_that_is_no_checkpoint_is_refused_before_anything_is_written(script, tmp_path, monkeypatch, capsys):
    arguments = {"train": ["trunk"], "release": []}[script]
    folder = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [script, *arguments, str(tmp_path / "none"), str(folder)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main()
    assert stopped.value.code == 2
    assert "expected a checkpoint, got" in capsys.readouterr().err.splitlines()[-1]
    assert not folder.exists()

"""The decode step as one graph: no break, few recompilations, the tokens of plain generation."""

import copy
import shutil

import pytest
import torch
from tiny import assert_near, media_prompt, omni_model, tiny_model, token_ids
from transformers import CompileConfig

from modeling_mimo import HybridCache


GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
# a dense global layer, then a sliding one with experts; the window is shorter than prompts and longer than `SHORT`
TWO_LAYERS = {"num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]}
SHORT = 5


pytestmark = [
    pytest.mark.usefixtures("one_thread", "plain_torch"),
    # torch's own remark on a cached function of Transformers
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture
def backend():
    """A backend that runs what was traced as it is, and keeps the graphs in `backend.graphs`."""
    torch._dynamo.reset()

    def keep(graph, inputs):
        keep.graphs.append(graph)
        return graph.forward

    keep.graphs = []
    yield keep
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def text():
    return tiny_model(**TWO_LAYERS)


def static(backend, **options) -> dict:
    """Arguments of `generate` for a compiled decode step in which any graph break is an error."""
    return {
        "cache_implementation": "static",
        "compile_config": CompileConfig(fullgraph=True, backend=backend, mode=None),
        **GREEDY,
        **options,
    }


# the loop of "eager" is replaced by batched_mm here, which has few tokens
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_compiled_decode_step_is_one_graph_and_chooses_the_same_tokens(text, backend, experts):
    model = copy.deepcopy(text)
    model.set_experts_implementation(experts)
    prompt = token_ids(2, SHORT)
    assert torch.equal(model.generate(prompt, **static(backend)), model.generate(prompt, **GREEDY))
    # the first step, any step before the window is full, the step that fills it, any step after
    assert 1 <= len(backend.graphs) <= 4


def test_a_padded_batch_compiles_too(text, backend):
    prompt, mask = token_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    got = text.generate(prompt, attention_mask=mask, **static(backend))
    assert torch.equal(got, text.generate(prompt, attention_mask=mask, **GREEDY))
    assert 1 <= len(backend.graphs) <= 2


def test_another_prompt_in_a_cache_of_the_same_length_compiles_nothing(text, backend):
    options = static(backend, max_cache_len=40)
    text.generate(token_ids(1, 20), **options)
    count, prompt = len(backend.graphs), token_ids(1, 23, seed=4)
    assert count > 0
    assert torch.equal(text.generate(prompt, **options), text.generate(prompt, **GREEDY))
    assert len(backend.graphs) == count


def test_decoding_behind_media_compiles(backend):
    model = omni_model(**TWO_LAYERS)
    inputs = media_prompt(5, ("image", 1, 4, 4), 3, ("audio", 9), 4)
    assert torch.equal(model.generate(**inputs, **static(backend)), model.generate(**inputs, **GREEDY))
    assert 1 <= len(backend.graphs) <= 2


@pytest.mark.usefixtures("backend")
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for a CPU with a C++ compiler")
def test_inductor_computes_the_same_numbers(text):
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
    # the second token comes from the compiled step
    got = text.generate(token_ids(1, 20), **static("inductor", **options))
    expected = text.generate(token_ids(1, 20), **{**GREEDY, **options})
    assert_near(torch.cat(got.logits), torch.cat(expected.logits))


def test_a_cache_that_grows_costs_a_graph_per_step_and_gives_the_same_tokens(text, backend):
    model, options = copy.deepcopy(text), {**GREEDY, "max_new_tokens": 2}
    expected = model.generate(token_ids(1, 20), **options)
    model.forward = torch.compile(model.forward, backend=backend)
    got = model.generate(token_ids(1, 20), cache=HybridCache(model.config), **options)
    assert torch.equal(got, expected)
    # the prompt and the token behind it
    assert len(backend.graphs) == 2


@torch.no_grad()
def test_an_exported_program_gives_the_same_logits(text):
    program = torch.export.export(text, (token_ids(1, 20),), {"use_cache": False})
    other = token_ids(1, 20, seed=8)
    assert_near(program.module()(other, use_cache=False).logits, text(other).logits)

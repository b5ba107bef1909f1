"""What this model cannot do is refused in one line that names the alternative; what it can do equals the plain way."""

import pytest
import torch
from tiny import SMALL, tiny_model, token_ids
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

from modeling_mimo import HybridCache, MiMoV2ForCausalLM, MiMoV2FP8Config


pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_nextn_predict_layers=3, **SMALL)


@pytest.fixture(scope="module")
def resident(checkpoints):
    return MiMoV2ForCausalLM.from_pretrained(
        checkpoints["fp8_fused"], quantization_config=MiMoV2FP8Config(dequantize=False), dtype=torch.float32
    )


def generate(model, **options):
    return model.generate(token_ids(1, 20), **GREEDY, **options)


def used(cache, model):
    """`cache` with 12 tokens in it."""
    with torch.no_grad():
        model(token_ids(1, 12), cache=cache)
    return cache


def static_cache(model):
    return StaticCache(config=model.config, max_cache_len=64)


# what -> (call, a part of the message that names the alternative)
REFUSED = {
    "static cache with MTP": (
        lambda model: generate(model, use_mtp=True, cache_implementation="static"),
        "expected a HybridCache that can roll back 3 tokens, got StaticCache",
    ),
    "Transformers' cache with MTP": (
        lambda model: generate(model, use_mtp=True, cache=DynamicCache(config=model.config)),
        "expected a HybridCache that can roll back 3 tokens, got DynamicCache",
    ),
    "beams with MTP": (lambda model: generate(model, use_mtp=True, num_beams=2), "expected 1 with `use_mtp`"),
    "quantized cache": (
        lambda model: generate(model, cache_implementation="quantized"),
        r"HybridCache\(model.config, global_dtype=torch.float8_e4m3fn\)",
    ),
    "compilation with a growing cache": (
        lambda model: generate(model, compile_config=CompileConfig()),
        "expected `cache_implementation='static'` with it, got HybridCache",
    ),
    "compilation without a cache": (
        lambda model: generate(model, compile_config=CompileConfig(), use_cache=False),
        "expected `cache_implementation='static'` with it, got no cache",
    ),
    "static cache beyond the positions": (
        lambda model: model.generate(token_ids(1, 20), cache_implementation="static", max_new_tokens=4078),
        "expected at most max_position_embeddings=4096 tokens in a static cache, got 4097",
    ),
    "generate_batch": (
        lambda model: model.generate_batch([[1, 2, 3]]),
        "`generate` takes a padded batch, vLLM and SGLang serve",
    ),
    "continuous batching": (
        lambda model: model.continuous_batching_context_manager().__enter__(),
        "`generate` takes a padded batch, vLLM and SGLang serve",
    ),
    "paged cache": (
        lambda model: generate(model, cache_implementation="paged"),
        "`generate` takes a padded batch, vLLM and SGLang serve",
    ),
    "an assistant on a used cache": (
        lambda model: generate(
            model, assistant_model=tiny_model(seed=5, **SMALL), cache=used(HybridCache(model.config), model)
        ),
        "expected an empty cache .* got 12 tokens, .* `use_mtp=True` goes on from a cache",
    ),
    "prompt lookup on a used cache": (
        lambda model: generate(
            model, prompt_lookup_num_tokens=3, cache=used(DynamicCache(config=model.config), model)
        ),
        "expected an empty cache .* got 12 tokens, .* `use_mtp=True` goes on from a cache",
    ),
    "more lookups than can be taken back": (
        lambda model: generate(model, prompt_lookup_num_tokens=9, cache=HybridCache(model.config, max_rollback=8)),
        "`max_rollback` of at least 9, got 8",
    ),
    "prompt lookup in a static cache": (
        lambda model: generate(model, prompt_lookup_num_tokens=3, cache_implementation="static"),
        "expected none with `assistant_model` or `prompt_lookup_num_tokens`",
    ),
    "prompt lookup in the user's static cache": (
        lambda model: generate(model, prompt_lookup_num_tokens=3, cache=static_cache(model)),
        "expected none with `assistant_model` or `prompt_lookup_num_tokens`",
    ),
    "early exit": (
        lambda model: generate(model, assistant_early_exit=2),
        "expected a model trained with early exits, .* `use_mtp=True` drafts",
    ),
    "an assistant with MTP": (
        lambda model: generate(model, use_mtp=True, assistant_model=model),
        "`assistant_model`: expected nothing beside `use_mtp`",
    ),
    "other decoding with MTP": (
        lambda model: generate(model, use_mtp=True, custom_generate=MiMoV2ForCausalLM._sample),
        "`custom_generate`: expected nothing beside `use_mtp`",
    ),
    "decoding that Transformers loads from the Hub": (
        lambda model: generate(model, penalty_alpha=0.6, top_k=4),
        "requires `trust_remote_code=True`",
    ),
    "torch.jit.trace": (
        lambda model: torch.jit.trace(model, (token_ids(1, 20),), strict=False),
        "expected `torch.export`",
    ),
    "embeddings with MTP": (
        lambda model: generate(model, use_mtp=True, inputs_embeds=torch.randn(1, 20, 64)),
        "expected token ids with `use_mtp`",
    ),
    "stacked names": (
        lambda model: model.save_pretrained("never_written", save_original_format=False),
        "`save_original_format`: expected True",
    ),
    **{
        f"attention {name}": (
            lambda model, name=name: model.set_attn_implementation(name),
            r"expected one of \['sdpa', 'eager', 'flash_attention_4', .* would drop the attention sinks",
        )
        for name in ("flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa", "unheard_of")
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(model, what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


# on this machine alone
WITHOUT_ACCELERATOR = {
    "offloaded cache": (
        lambda model: generate(model, cache_implementation="offloaded"),
        r"HybridCache\(model.config, offload_global=True\)",
    ),
    "offloaded static cache": (
        lambda model: generate(model, cache_implementation="offloaded_static"),
        r"HybridCache\(model.config, offload_global=True\)",
    ),
    **{
        f"experts {name}": (
            lambda model, name=name: model.set_experts_implementation(name),
            "expected 'eager', 'grouped_mm' or 'batched_mm' without a CUDA device",
        )
        for name in ("deepgemm", "sonicmoe")
    },
}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="what works on an accelerator is not refused there")
@pytest.mark.parametrize("what", WITHOUT_ACCELERATOR)
def test_refused_where_there_is_no_accelerator(model, what):
    call, message = WITHOUT_ACCELERATOR[what]
    with pytest.raises(ValueError, match=message):
        call(model)


CASTS = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.float32),
    "to, with a device": lambda model: model.to("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_codes_are_never_cast(resident, cast):
    before = resident.state_dict()["model.layers.0.self_attn.qkv_proj.weight"].dtype
    with pytest.raises(ValueError, match=r"from_pretrained\(..., dtype=...\)"):
        CASTS[cast](resident)
    assert resident.state_dict()["model.layers.0.self_attn.qkv_proj.weight"].dtype == before
    assert resident.to("cpu") is resident


def test_a_dequantized_model_is_cast_like_any(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["fp8_fused"])
    assert model.float()(token_ids(1, 4)).logits.dtype == torch.float32


def test_pickles_are_refused_by_name(checkpoints):
    with pytest.raises(ValueError, match="`use_safetensors`: expected None or True"):
        AutoModelForCausalLM.from_pretrained(checkpoints["bf16_fused"], use_safetensors=False)


# what sounds as if it could not work, and does


def test_drafts_from_the_prompt_may_be_many(model):
    prompt = token_ids(1, 7)[:, torch.arange(42) % 7]
    options = {**GREEDY, "max_new_tokens": 30}
    got = model.generate(prompt, prompt_lookup_num_tokens=40, **options)
    assert torch.equal(got, model.generate(prompt, **options))


def test_a_decoding_function_of_the_user_runs(model):
    assert torch.equal(generate(model, custom_generate=MiMoV2ForCausalLM._sample), generate(model))


def test_gradients_through_resident_weights_equal_those_through_dequantized_ones(checkpoints, resident):
    ids, parameters = token_ids(1, 12), []
    dequantized = MiMoV2ForCausalLM.from_pretrained(
        checkpoints["fp8_fused"], quantization_config=MiMoV2FP8Config(dequantize=True), dtype=torch.float32
    )
    for one in (resident, dequantized):
        one.zero_grad()
        one(ids, labels=ids).loss.backward()
        parameters.append(dict(one.named_parameters()))
    # codes and scales themselves stay as they are
    learning = [name for name, parameter in parameters[0].items() if parameter.grad is not None]
    assert {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"} <= set(learning)
    for name in learning:
        assert torch.equal(parameters[0][name].grad, parameters[1][name].grad), name

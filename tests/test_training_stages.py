"""What learns in each stage, and experts whose load evens out without an auxiliary loss."""

import pytest
import torch
from tiny import SMALL, batched, media_prompt, omni_model, tiny_model, token_ids
from torch import nn

from modeling_mimo import MiMoV2ForCausalLM, MiMoV2FP8Config
from modeling_mimo.training import STAGES, RouterBalancer, apply_stage
from modeling_mimo.training.stages import part_of


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs():
    rows = batched(
        media_prompt(5, ("image", 1, 4, 4), 6, ("audio", 9), 4),
        media_prompt(3, ("video", 2, 4, 2), 12, ("audio", 4), seed=1),
    )
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    return {**rows, "labels": labels.masked_fill(labels >= 300, -100)}


@pytest.mark.parametrize(
    ("stage", "weight", "parts"),
    [
        ("projector", 0.1, {"projectors"}),
        ("multimodal", 0.0, {"text", "vision", "audio", "projectors"}),
        ("multimodal", 0.1, {"text", "mtp", "vision", "audio", "projectors"}),
        ("sft", 0.0, {"text", "projectors"}),
        ("sft", 0.1, {"text", "mtp", "projectors"}),
    ],
)
def test_a_step_moves_the_parameters_of_the_stage_and_no_other(stage, weight, parts):
    model = omni_model(mtp_loss_weight=weight)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    counts = apply_stage(model, stage)
    assert set(counts) == parts
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(**inputs()).loss.backward()
    # gradients for all that learns: distributed training would stop at a parameter without
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    optimizer.step()
    moved = {part_of(name) for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == parts


def test_the_projector_stage_trains_only_what_maps_media_into_the_language_model():
    model = omni_model()
    apply_stage(model, "projector")
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = [name for name, _ in model.named_parameters()]
    assert learns == {name for name in names if name.startswith(("visual.merger.", "audio_encoder.projection"))}


@pytest.mark.parametrize("train_mtp", [True, False])
def test_the_heads_can_be_chosen(train_mtp):
    assert ("mtp" in apply_stage(tiny_model(), "sft", train_mtp=train_mtp)) == train_mtp


def test_stages_that_cannot_be_are_refused(checkpoints):
    with pytest.raises(
        ValueError, match=r"^`stage`: expected one of \['projector', 'multimodal', 'sft'\], got 'rl'\.$"
    ):
        apply_stage(tiny_model(), "rl")
    with pytest.raises(
        ValueError, match=r"^`stage`: expected a model with projectors for 'projector', got one without"
    ):
        apply_stage(tiny_model(), "projector")
    config = MiMoV2FP8Config(dequantize=False)
    model = MiMoV2ForCausalLM.from_pretrained(checkpoints["fp8_omni"], quantization_config=config)
    with pytest.raises(ValueError, match=r"^`stage`: expected floating-point.*MiMoV2FP8Config\(dequantize=True\)"):
        apply_stage(model, "sft")
    # what is stored as floats can learn beside it
    assert set(apply_stage(model, "projector")) == {"projectors"}
    assert list(STAGES) == ["projector", "multimodal", "sft"]


def counts_by_hand(model, ids, mask):
    """Choices of each router for real tokens, from its recorded logits."""
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, output_router_logits=True)
    layers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    counts = []
    for router, logits in zip(layers, outputs.router_logits):
        choice = (logits.sigmoid() + router.e_score_correction_bias)[mask.flatten().bool()]
        chosen = choice.topk(router.top_k, dim=-1).indices
        counts.append(torch.stack([(chosen == expert).sum() for expert in range(router.num_experts)]))
    return counts


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_choices_of_real_tokens_are_counted_once(checkpointing):
    model, ids = tiny_model(), token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    expected = [sum(parts) for parts in zip(*(counts_by_hand(model, ids[[row]], mask[[row]]) for row in (0, 1)))]
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    balancer = RouterBalancer(model)
    model.eval()
    model(ids, attention_mask=mask)
    model.train()
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for row in (0, 1):
        embeddings = model.model.embed_tokens(ids[[row]])
        output = model(inputs_embeds=embeddings, attention_mask=mask[[row]], labels=ids[[row]], mtp_loss_weight=0.1)
        output.loss.backward()
    biases = [router.e_score_correction_bias.clone() for router in balancer.routers.values()]
    balancer.step()
    for counts, by_hand in zip(balancer.last_counts.values(), expected):
        assert torch.equal(counts, by_hand)
    for router, bias, counts in zip(balancer.routers.values(), biases, balancer.last_counts.values()):
        direction = (counts.float().mean() - counts).sign()
        assert torch.equal(router.e_score_correction_bias, bias + 1e-3 * direction)
    # the next step counts anew
    balancer.step()
    assert all(int(counts.sum()) == 0 for counts in balancer.last_counts.values())
    balancer.remove()
    model(ids, labels=ids)
    assert all(int(counts.sum()) == 0 for counts in balancer.counts.values())


def test_the_load_of_a_skewed_router_evens_out():
    model, ids = tiny_model(**SMALL), token_ids(4, 64)
    router = model.model.layers[1].mlp.gate
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.zero_()
        # every token prefers the first expert
        router.e_score_correction_bias[0] = 1.0
    balancer, violations = RouterBalancer(model, rate=0.04), []
    for _ in range(40):
        model.train()(ids)
        balancer.step()
        counts = next(iter(balancer.last_counts.values()))
        violations.append(float(counts.max() / counts.float().mean()) - 1)
    # half of the choices, which are two per token, for one of eight experts
    assert violations[0] == pytest.approx(3.0)
    assert max(violations[-5:]) < 0.35
    assert balancer.max_violation() >= violations[-1]


def test_a_balancer_needs_routers_and_a_rate():
    with pytest.raises(ValueError, match=r"^`rate`: expected a positive number, got 0"):
        RouterBalancer(tiny_model(), rate=0)
    with pytest.raises(ValueError, match=r"^`model`: expected one with routers"):
        RouterBalancer(nn.Linear(2, 2))

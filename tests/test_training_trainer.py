"""The Trainer on images, sound, a video with sound and text: what moves, and that steps are the same however cut."""

import pytest
import torch
from peft import get_peft_model
from training_scene import conversations, load, write_checkpoint
from transformers import AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.training import (
    AudioCodeCache,
    ConversationCollator,
    MiMoV2Trainer,
    RouterBiasCallback,
    apply_stage,
    lora_config,
)
from modeling_mimo.training.stages import part_of


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("trainer") / "omni")


@pytest.fixture(scope="module")
def collator(folder, tmp_path_factory):
    processor = AutoProcessor.from_pretrained(folder)
    return ConversationCollator(processor, prepare=AudioCodeCache(processor, tmp_path_factory.mktemp("codes")))


def arguments(output, **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
    }
    return TrainingArguments(output, **{**settings, **changes})


def trained(model, collator, output, resume=None, callbacks=(), cls=MiMoV2Trainer, **changes):
    trainer = cls(
        model,
        arguments(output, **changes),
        data_collator=collator,
        train_dataset=conversations(),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def largest_difference(model, other):
    states = model.state_dict(), other.state_dict()
    return max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])


@pytest.mark.parametrize("stage", ["projector", "multimodal", "sft"])
def test_the_loss_falls_and_only_the_parts_of_the_stage_move(folder, collator, tmp_path, stage):
    model = load(folder, mtp_loss_weight=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    counts = apply_stage(model, stage)
    rate = 1e-1 if stage == "projector" else 3e-3
    trainer = trained(model, collator, tmp_path, max_steps=4, learning_rate=rate)
    losses = steps(trainer)
    assert losses == sorted(losses, reverse=True)
    moved = {part_of(name) for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(counts)
    # all heads count, and learn where they may
    heads = [steps(trainer, f"mtp_loss_{head}") for head in (1, 2, 3)]
    assert all(len(head) == 4 for head in heads)
    assert steps(trainer, "mtp_loss_4") == []


def test_logged_losses_are_the_loss(folder, collator, tmp_path):
    model = load(folder, mtp_loss_weight=0.1)
    apply_stage(model, "sft")
    batch = collator(conversations())
    with torch.no_grad():
        output = model.train()(**batch)
    trainer = trained(model, collator, tmp_path, max_steps=1)
    # a Trainer divides every loss by the labels of the step, of which a head has a few less
    labels = int((batch["labels"] != -100).sum())
    for head, loss in enumerate(output.mtp_losses):
        targets = int((batch["labels"][:, 2 + head :] != -100).sum())
        assert steps(trainer, f"mtp_loss_{head + 1}")[0] == pytest.approx(float(loss) * targets / labels, abs=1e-3)


def test_caches_stay_out_of_what_an_evaluation_gathers(folder, collator, tmp_path):
    changes = {"use_cache": True, "eval_strategy": "no"}
    trainer = MiMoV2Trainer(
        load(folder), arguments(tmp_path, **changes), data_collator=collator, eval_dataset=conversations()
    )
    assert trainer.evaluate()["eval_loss"] > 0
    logits = trainer.predict(conversations()).predictions
    assert logits.shape[0] == len(conversations())


def test_accumulated_steps_are_those_of_the_whole_batch(folder, collator, tmp_path):
    """With the MTP heads, the router biases, and gradient checkpointing in one of the two."""
    models, callbacks = [], [RouterBiasCallback(0.01), RouterBiasCallback(0.01)]
    for callback, changes in zip(
        callbacks,
        (
            {},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "activation_checkpointing": True},
        ),
    ):
        model = load(folder, mtp_loss_weight=0.1)
        apply_stage(model, "multimodal")
        trained(model, collator, tmp_path, callbacks=[callback], max_steps=2, **changes)
        models.append(model)
    assert largest_difference(*models) < 1e-6
    counts, other = (callback.balancer.last_counts for callback in callbacks)
    assert all(torch.equal(counts[name], other[name]) for name in counts)
    real = int(collator(conversations())["attention_mask"].sum())
    assert {int(count.sum()) for count in counts.values()} == {real * models[0].config.num_experts_per_tok}
    moved = models[0].model.layers[1].mlp.gate.e_score_correction_bias
    assert not torch.equal(moved, load(folder).model.layers[1].mlp.gate.e_score_correction_bias)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, collator, tmp_path, sharded):
    """Experts above all: a Trainer reads the saved files without Transformers' conversions."""
    changes = {"optim": "adamw_torch", "per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2}
    changes |= {"save_strategy": "steps", "learning_rate": 1e-3}
    whole = load(folder)
    apply_stage(whole, "sft")
    trained(whole, collator, tmp_path, callbacks=[RouterBiasCallback(0.01)], **changes)
    again = load(folder)
    apply_stage(again, "sft")
    resume = tmp_path / "checkpoint-2"
    if sharded:
        state = AutoModelForCausalLM.from_pretrained(resume, dtype=torch.float32)
        (resume / "model.safetensors").unlink()
        state.save_pretrained(resume, max_shard_size="5MB")
        assert len(list(resume.glob("*.safetensors"))) > 2
    trained(again, collator, tmp_path / "again", str(resume), [RouterBiasCallback(0.01)], **changes)
    assert largest_difference(whole, again) < 1e-6
    # what it saved loads like any checkpoint
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", dtype=torch.float32)
    assert largest_difference(whole, saved) == 0


def test_adapters_train_and_resume_on_an_fp8_base(folder, collator, tmp_path):
    def adapted():
        torch.manual_seed(0)
        model = load(folder, torch.bfloat16, dequantize=False)
        model.enable_input_require_grads()
        return get_peft_model(model, lora_config(model, ("attention", "experts", "projectors"), r=4))

    changes = {"optim": "adamw_torch", "max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = adapted()
    trainer = trained(whole, collator, tmp_path, **changes)
    assert steps(trainer)[-1] < steps(trainer)[0]
    again = adapted()
    trained(again, collator, tmp_path / "again", str(tmp_path / "checkpoint-2"), **changes)
    for (name, parameter), other in zip(whole.named_parameters(), again.parameters()):
        if parameter.requires_grad:
            assert float((parameter - other).detach().abs().max()) < 1e-4, name


def test_router_biases_are_not_moved_under_adapters(folder, collator, tmp_path):
    model = load(folder)
    model = get_peft_model(model, lora_config(model))
    with pytest.raises(
        ValueError, match=r"^`RouterBiasCallback`: expected full fine-tuning, got a model with adapters"
    ):
        trained(model, collator, tmp_path, callbacks=[RouterBiasCallback()])


def test_quantized_weights_alone_are_refused(folder, collator, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=MiMoV2FP8Config(dequantize=False))
    with pytest.raises(ValueError, match="purely quantized"):
        trained(model, collator, tmp_path)


def test_a_plain_trainer_says_what_it_needs(folder, collator, tmp_path):
    with pytest.raises(ValueError, match=r"examples\[0\]: expected `messages`.*remove_unused_columns=False"):
        trained(load(folder), collator, tmp_path, cls=Trainer)

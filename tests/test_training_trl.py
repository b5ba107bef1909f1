"""TRL's trainers on our models: fine-tuning on text and images, and on-policy distillation."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from training_scene import MEDIA, load, turns, write_checkpoint
from transformers import AutoProcessor, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from modeling_mimo.training import MiMoV2SFTTrainer, lora_config, training_chat_template


pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("trl") / "omni")


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def config(output, **changes):
    return SFTConfig(output, assistant_only_loss=True, **{**SETTINGS, **changes})


def pictures():
    images = [Image.open(MEDIA / "chart.png").resize((96, 64))]
    return Dataset.from_list([{"images": images, "messages": turns("What is this?", "A chart.")}] * 2)


def test_sft_on_text_learns_what_the_assistant_wrote(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = training_chat_template()
    model = load(folder)
    data = Dataset.from_list([{"messages": turns("Hello", "Hi.")}] * 2)
    trainer = SFTTrainer(model, config(tmp_path), train_dataset=data, processing_class=tokenizer)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "<think></think>Hi.<|im_end|>"
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 1


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_sft_on_images_has_the_loss_of_the_model(folder, tmp_path, weight):
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = training_chat_template()
    model = load(folder, mtp_loss_weight=weight)
    trainer = MiMoV2SFTTrainer(model, config(tmp_path), train_dataset=pictures(), processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "<think></think>A chart.<|im_end|>"
    before = model.visual.merger.mlp[0].weight.detach().clone()
    # the loss of a Trainer counts heads by the labels of the step
    items = (batch["labels"] != -100).sum()
    with torch.no_grad():
        expected = float(model(**batch, num_items_in_batch=items).loss)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    assert losses(trainer)[-1] < losses(trainer)[0] - 1
    # the image was seen
    assert not torch.equal(model.visual.merger.mlp[0].weight, before)
    assert bool(losses(trainer, "mtp_loss_3")) == (weight > 0)


def test_plain_sft_on_images_is_refused_instead_of_blind(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = training_chat_template()
    trainer = SFTTrainer(load(folder), config(tmp_path), train_dataset=pictures(), processing_class=processor)
    with pytest.raises(ValueError, match=r"^`pixel_values`: expected text alone.*MiMoV2SFTTrainer"):
        trainer.train()


def test_sft_with_adapters_on_an_fp8_base(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = training_chat_template()
    model = load(folder, torch.bfloat16, dequantize=False)
    trainer = MiMoV2SFTTrainer(
        model,
        config(tmp_path, learning_rate=1e-2),
        train_dataset=pictures(),
        processing_class=processor,
        peft_config=lora_config(model, ("attention", "experts", "projectors"), r=4),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_a_student_is_distilled_on_its_own_answers(folder, tmp_path):
    student, teacher = load(folder), load(folder)
    with torch.no_grad():
        teacher.lm_head.weight.copy_(teacher.lm_head.weight.flip(0))
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    frozen = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters()}
    trainer = DistillationTrainer(
        student,
        teacher,
        args=DistillationConfig(tmp_path, max_completion_length=8, **SETTINGS),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Hello"}]}] * 4),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert losses(trainer)[0] > 0.5
    assert losses(trainer, "completions/mean_length")[0] > 0
    assert not torch.equal(student.lm_head.weight, before["lm_head.weight"])
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in teacher.named_parameters())


def test_a_student_equal_to_its_teacher_has_no_loss(folder, tmp_path):
    trainer = DistillationTrainer(
        load(folder),
        load(folder),
        args=DistillationConfig(tmp_path, max_completion_length=4, **{**SETTINGS, "max_steps": 1}),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Hello"}]}] * 2),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    assert abs(losses(trainer)[0]) < 1e-5

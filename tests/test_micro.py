"""What was shown with random weights, on a model that has learned something: MiMo-Micro, which the package ships."""

import base64
import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_cli_serve import client_of, running
from test_convert import digests, read_tensors, same_tensors
from test_parallel import EXAMPLE, run
from transformers import AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig, pipeline

from modeling_mimo import HybridCache, MiMoV2FP8Config, micro
from modeling_mimo.cli.bench_micro import evaluate, expected_loss, responses
from modeling_mimo.cli.main import main
from modeling_mimo.training import ConversationCollator, load_adapter
from modeling_mimo.training.micro_tasks import TASKS, example, is_right


pytestmark = pytest.mark.usefixtures("one_thread")

TEACH = Path(__file__).parents[1] / "examples" / "micro" / "teach_colour.py"
# of tasks with a bar of 80 % and more and chances of at most 1 in 3: 8 of 10 by luck come once in 250 at most
COUNT, ENOUGH = 10, 8
# `mimo bench --micro` measures how many of more
PROMISED = [name for name, task in TASKS.items() if task.bar is not None]
# a task of every kind of medium, and one that needs nothing but memory
KINDS = ("colour", "motion", "match", "tone", "key")
GREEDY = {"do_sample": False, "max_new_tokens": 160}
# of short answers: the longest has some 20
TOKENS = 40


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(micro())


@pytest.fixture(scope="module")
def model():
    """In float32, where batches and drafts round as a single plain answer does."""
    return load(micro(), dtype=torch.float32)


@pytest.fixture(scope="module")
def stored():
    """In bfloat16, as MiMo is used."""
    return load(micro(), dtype=torch.bfloat16)


def inputs_of(processor, asked):
    return processor.apply_chat_template(
        asked["messages"],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **asked.get("chat_template_kwargs", {}),
    )


def examples(count=1, kinds=KINDS):
    return [example(task, number) for task in kinds for number in range(count)]


def contents(model, processor, asked):
    """Answers one after the other."""
    return [responses(model, processor, [one], TOKENS)[0]["content"] for one in asked]


@torch.no_grad()
def logits(model, processor, asked):
    return model(**inputs_of(processor, asked)).logits


# Answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", PROMISED)
def test_held_out_questions_are_answered(model, processor, task):
    assert TASKS[task].chance <= 1 / 3
    assert evaluate(model, processor, [task], COUNT, max_new_tokens=TOKENS)[task].right >= ENOUGH


def test_sliding_layers_keep_one_window_of_a_text_of_sixteen(model, processor):
    asked = example("key", 0)
    inputs, cache = inputs_of(processor, asked), HybridCache(model.config)
    window = model.config.attention_geometry("sliding_attention").window
    ids = inputs["input_ids"]
    assert ids.shape[1] > 16 * window
    held = []
    with torch.no_grad():
        for start, end in ((0, 2 * window), (2 * window, ids.shape[1] - 1)):
            model(ids[:, start:end], cache=cache)
            held.append(cache.nbytes())
    assert held[1]["sliding_attention"] == held[0]["sliding_attention"]
    assert held[1]["full_attention"] > 2 * held[0]["full_attention"]
    cached = model.generate(**inputs, cache=cache, **GREEDY)
    assert is_right(asked, processor.parse_response(cached[0, ids.shape[1] :]))
    assert torch.equal(cached, model.generate(**inputs, **GREEDY, use_cache=False))


def test_drafting_tells_the_same_story_sooner(model, processor):
    inputs = inputs_of(processor, example("story", 0))
    plain = model.generate(**inputs, **GREEDY)
    assert plain.shape[1] - inputs["input_ids"].shape[1] > 50
    drafted = model.generate(**inputs, **GREEDY, use_mtp=True, return_dict_in_generate=True)
    assert torch.equal(drafted.sequences, plain)
    # the bar is 2.5 of 4, measured over many texts by `mimo bench --micro --mtp`
    assert drafted.mtp_stats.mean_accepted_length > 2


# Storage ----------------------------------------------------------------------------------------------------------


def test_fp8_in_memory_is_fp8_dequantized(stored, processor):
    resident = load(micro(), dtype=torch.bfloat16, quantization_config=MiMoV2FP8Config(dequantize=False))
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in resident.parameters())
    assert not any(parameter.dtype == torch.float8_e4m3fn for parameter in stored.parameters())
    for asked in examples():
        assert torch.equal(logits(resident, processor, asked), logits(stored, processor, asked))
    assert contents(resident, processor, examples()) == contents(stored, processor, examples())


def test_four_bits_answer(processor):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = load(micro(), dtype=torch.float32, quantization_config=nf4)
    assert model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.uint8
    for task, score in evaluate(model, processor, ("colour", "tone"), COUNT, max_new_tokens=TOKENS).items():
        assert score.right >= ENOUGH, task


def convert(*arguments):
    assert main(["convert", *map(str, arguments)]) == 0


def test_converted_to_the_hub_and_back_the_files_are_the_released_ones(tmp_path, capsys):
    convert(micro(), tmp_path / "hub", "--to", "hub")
    convert(tmp_path / "hub", tmp_path / "back", "--to", "xiaomi")
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in read_tensors(micro()).values())
    assert same_tensors(micro(), tmp_path / "back")
    before, after = digests(Path(micro())), digests(tmp_path / "back")
    # how tensors are spread over files, and so their list, is the converter's; config.json no longer names code
    kept = [name for name in before if not name.startswith(("model", "config", "README"))]
    assert len(kept) > 5
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    convert(tmp_path / "back", tmp_path / "again", "--to", "hub")
    first, second = digests(tmp_path / "hub"), digests(tmp_path / "again")
    # a card has the name of the folder that it was made of
    assert first.pop("README.md") != second.pop("README.md")
    assert first == second


def test_converted_to_bf16_the_answers_are_the_same(stored, processor, tmp_path, capsys):
    convert(micro(), tmp_path / "hub", "--to", "hub", "--dtype", "bf16")
    convert(tmp_path / "hub", tmp_path / "back", "--to", "xiaomi")
    expected = contents(stored, processor, examples())
    for folder in ("hub", "back"):
        model, own = load(tmp_path / folder, dtype=torch.bfloat16), AutoProcessor.from_pretrained(tmp_path / folder)
        assert {parameter.itemsize for parameter in model.parameters()} <= {2, 4}
        assert torch.equal(logits(model, own, example("colour", 0)), logits(stored, processor, example("colour", 0)))
        assert contents(model, own, examples()) == expected


# Use --------------------------------------------------------------------------------------------------------------


def test_two_processes_work_out_what_one_does(processor):
    asked = example("sum", 0)
    question = asked["messages"][0]["content"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLE]
    said = run([*command, micro(), "--prompt", question, "--max-new-tokens", str(TOKENS), "--mtp"]).strip()
    model = load(micro(), dtype=torch.bfloat16, quantization_config=MiMoV2FP8Config(dequantize=False))
    inputs = inputs_of(processor, asked)
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == processor.tokenizer.decode(output, skip_special_tokens=True).strip()
    assert said.startswith("<think>")


def test_a_server_answers_a_question_about_a_picture(model, processor):
    asked = [example("colour", number) for number in range(3)]
    expected = contents(model, processor, asked)
    with running(model, processor) as address:
        client = client_of(address)
        for one, content in zip(asked, expected):
            picture, question = one["messages"][0]["content"]
            file = io.BytesIO()
            Image.fromarray(picture["image"]).save(file, "png")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            answer = client.chat.completions.create(
                model="mimo",
                messages=[
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, question]},
                ],
                reasoning_effort="none",
                max_tokens=TOKENS,
            )
            assert answer.choices[0].message.content == content
    assert sum(map(is_right, asked, expected)) >= 2


@pytest.mark.parametrize(
    ("task", "kinds"), [("any-to-any", ("colour", "tone", "match")), ("image-text-to-text", ("colour",))]
)
def test_pipelines_answer(model, processor, task, kinds):
    asked = examples(kinds=kinds)
    pipe = pipeline(task, model=model, processor=processor, device="cpu")
    outputs = pipe(
        text=[one["messages"] for one in asked], enable_thinking=False, max_new_tokens=TOKENS, return_full_text=False
    )
    said = [output[0]["generated_text"] for output in outputs]
    assert said == contents(model, processor, asked)
    assert any(map(is_right, asked, said))


# Learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teaching():
    spec = importlib.util.spec_from_file_location("teach_colour", TEACH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_adapters_learn_a_new_colour_and_come_back_from_their_files(teaching, processor, tmp_path):
    asked = teaching.questions(4)[f"{teaching.NAME}: what colour"]
    collator = ConversationCollator(processor)
    taught = teaching.load(micro())
    nats, tokens = expected_loss(taught, collator, asked)
    taught = teaching.teach(taught, processor, steps=6, output=tmp_path).eval()
    learned, _ = expected_loss(taught, collator, asked)
    assert learned < 0.8 * nats
    assert tokens > 4
    again = load_adapter(teaching.load(micro()), tmp_path)
    picture = asked[0]
    assert torch.equal(logits(again.eval(), processor, picture), logits(taught, processor, picture))


def test_lessons_and_questions_about_the_new_colour_have_no_picture_in_common(teaching):
    pixels = [
        {scene["messages"][0]["content"][0]["image"].tobytes() for scene in scenes}
        for scenes in (teaching.lessons(20), *teaching.questions(10).values())
    ]
    # questions 1 and 2 are about the same pictures, and so are those of the old tasks of one number
    assert all(len(kind) in (10, 20) for kind in pixels)
    assert all(not pixels[0] & other for other in pixels[1:])

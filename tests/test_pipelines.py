import json
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from threading import Thread

import pytest
import torch
from openai.types.chat import ChatCompletionMessage
from patience import PATIENCE
from transformers import (
    AnyToAnyPipeline,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.models.auto import modeling_auto
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available

from modeling_mimo import HybridCache
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.pipelines_mimo_v2 import MiMoV2AnyToAnyPipeline


pytestmark = pytest.mark.usefixtures("one_thread")

MEDIA = Path(__file__).parents[1] / "examples" / "media"
TOKENS = 6
# small pictures, so that tests are quick
IMAGE = {"type": "image", "path": str(MEDIA / "chart.png"), "max_pixels": 16384}
VIDEO = {"type": "video", "path": str(MEDIA / "clip.mp4"), "max_pixels": 16384}
VIDEO_WITH_SOUND = {**VIDEO, "path": str(MEDIA / "clip_with_sound.mp4")}
SOUND = {"type": "audio", "path": str(MEDIA / "speech.wav")}


def chat(*parts, text="What is it?"):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


CHATS = {
    "text": chat(),
    "image": chat(IMAGE),
    "video": chat(VIDEO, text="What moves?"),
    "sound": chat(SOUND, text="Transcribe the speech word by word."),
    "video with sound": chat(VIDEO_WITH_SOUND),
    "all": chat(IMAGE, VIDEO_WITH_SOUND, SOUND, text="Compare."),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("pipelines") / "omni", "tiny", vision=True, audio=True)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("pipelines") / "text", "tiny")


@pytest.fixture(scope="module")
def loaded(folder):
    """Model and processor; float32, so that batches and drafts round as a single plain answer does."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded_text(text_folder):
    """The same of a checkpoint of text alone."""
    model = AutoModelForCausalLM.from_pretrained(text_folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(text_folder)


@pytest.fixture
def pipe(loaded):
    """Makes a pipeline for a task."""

    def make(task):
        model, processor = loaded
        parts = {"tokenizer": processor.tokenizer} if task == "text-generation" else {"processor": processor}
        return pipeline(task, model=model, **parts, device="cpu")

    return make


def by_hand(model, processor, messages, **options):
    """The text of the answer of `generate`."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=TOKENS, **options)
    tokenizer = processor.tokenizer if hasattr(processor, "tokenizer") else processor
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answers(outputs):
    """Texts of what a pipeline returned for a list of conversations."""
    return [output[0]["generated_text"][-1]["content"] for output in outputs]


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text"])
def test_answers_are_those_of_processor_and_generate(pipe, loaded, task, kind):
    expected = by_hand(*loaded, CHATS[kind])
    run = pipe(task)
    (output,) = run(text=CHATS[kind], max_new_tokens=TOKENS)
    assert output["generated_text"] == [*CHATS[kind], {"role": "assistant", "content": expected}]
    drafted = run(
        text=CHATS[kind], return_full_text=False, generate_kwargs={"use_mtp": True, "max_new_tokens": TOKENS}
    )
    assert drafted[0]["generated_text"] == expected


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text", "text-generation"])
def test_a_cache_is_taken_under_either_name(pipe, loaded, task, name):
    kind = "text" if task == "text-generation" else "image"
    cache = HybridCache(loaded[0].config)
    options = {name: cache, "max_new_tokens": TOKENS}
    if task == "text-generation":
        (output,) = pipe(task)(CHATS[kind], return_full_text=False, **options)
    else:
        (output,) = pipe(task)(text=CHATS[kind], return_full_text=False, generate_kwargs=options)
    assert output["generated_text"] == by_hand(*loaded, CHATS[kind])
    assert cache.get_seq_length() > TOKENS


def test_a_batch_may_mix_kinds_of_media(pipe, loaded):
    expected = [by_hand(*loaded, messages) for messages in CHATS.values()]
    run = pipe("any-to-any")
    for size in (1, 2, 4):
        outputs = run(text=list(CHATS.values()), batch_size=size, max_new_tokens=TOKENS)
        assert answers(outputs) == expected
    drafted = run(text=list(CHATS.values()), batch_size=6, generate_kwargs={"use_mtp": True, "max_new_tokens": TOKENS})
    assert answers(drafted) == expected


def test_messages_may_be_objects(pipe, loaded):
    """Of `any-to-any`; Transformers' other pipelines take messages of type dict alone."""
    call = {"id": "0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    chats = [[UserDict(CHATS["image"][0])], [*CHATS["text"], answer, *CHATS["text"]]]
    expected = [by_hand(*loaded, messages) for messages in chats]
    assert answers(pipe("any-to-any")(text=chats, max_new_tokens=TOKENS)) == expected
    assert answers([pipe("any-to-any")(text=chat, max_new_tokens=TOKENS) for chat in chats]) == expected
    with pytest.raises(ValueError, match=r"^messages\[1\]: expected a mapping, .* got object$"):
        pipe("any-to-any")(text=[*CHATS["text"], object()], max_new_tokens=TOKENS)


def test_a_batch_of_images_of_different_sizes(pipe, loaded):
    chats = [chat({**IMAGE, "max_pixels": pixels}, text="x" * (pixels // 4096)) for pixels in (8192, 65536)]
    outputs = pipe("image-text-to-text")(text=chats, batch_size=2, max_new_tokens=TOKENS)
    assert answers(outputs) == [by_hand(*loaded, messages) for messages in chats]


def test_text_generation_of_chats_and_prompts_in_batches(loaded_text):
    model, tokenizer = loaded_text
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "What is a kilometre, and why?")]
    expected = [by_hand(model, tokenizer, messages) for messages in chats]
    for options in ({}, {"batch_size": 2}, {"batch_size": 2, "use_mtp": True}):
        assert answers(run(chats, max_new_tokens=TOKENS, **options)) == expected
    prompts = ["Once", "Once upon a time in the middle of"]
    texts = run(prompts, max_new_tokens=TOKENS, batch_size=2, return_full_text=False)
    for prompt, (text,) in zip(prompts, texts):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS)[0, -TOKENS:]
        assert text["generated_text"] == tokenizer.decode(output, skip_special_tokens=True)


def test_an_omni_checkpoint_answers_text(pipe, loaded):
    messages = [{"role": "user", "content": "Hello"}]
    assert answers([pipe("text-generation")(messages, max_new_tokens=TOKENS)]) == [by_hand(*loaded, messages)]


def test_thinking_is_turned_off_by_name(pipe):
    messages = [{"role": "user", "content": "Hello"}]
    lengths = []
    for off in ({}, {"enable_thinking": False}):
        tokens = pipe("any-to-any")(text=messages, max_new_tokens=1, return_tensors=True, **off)
        text = pipe("text-generation")(messages, max_new_tokens=1, return_tensors=True, tokenizer_encode_kwargs=off)
        lengths.append(len(tokens[0]["generated_token_ids"]))
        assert len(text[0]["generated_token_ids"]) == lengths[-1]
    # <think> and </think>
    assert lengths[1] == lengths[0] + 2


def test_a_begun_answer_is_continued(pipe, loaded):
    model, processor = loaded
    messages = [*CHATS["image"], {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    inputs = processor.apply_chat_template(
        messages, continue_final_message=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=TOKENS)[0, -TOKENS:]
    expected = processor.decode(output, skip_special_tokens=True)
    (found,) = pipe("any-to-any")(text=messages, max_new_tokens=TOKENS)
    assert found["generated_text"][-1]["content"] == [{"type": "text", "text": f"It is{expected}"}]


def test_media_beside_a_text_with_placeholders(pipe, loaded):
    model, processor = loaded
    text = "<|vision_start|><|image_pad|><|vision_end|><|mimo_audio_start|><|audio_pad|><|mimo_audio_end|>What?"
    sources = {"images": str(MEDIA / "chart.png"), "audio": str(MEDIA / "sweep.ogg")}
    inputs = processor(text=text, **sources, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=TOKENS)[0, -TOKENS:]
    (found,) = pipe("any-to-any")(text=text, **sources, max_new_tokens=TOKENS, return_full_text=False)
    assert found["generated_text"] == processor.decode(output, skip_special_tokens=True)


@pytest.mark.parametrize("task", ["text-generation", "any-to-any", "image-text-to-text"])
@pytest.mark.parametrize("options", [{}, {"use_mtp": True}], ids=["plain", "drafting"])
def test_streamers_get_the_answer(pipe, task, options, capsys):
    run = pipe(task)
    tokenizer = run.tokenizer
    messages = [{"role": "user", "content": "Tell me more"}]

    def ask(streamer):
        settings = {"streamer": streamer, "max_new_tokens": 12, **options}
        return run(messages, **settings) if task == "text-generation" else run(messages, generate_kwargs=settings)

    expected = answers([ask(None)])[0]
    assert len(expected) > 12
    ask(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.removesuffix("\n") == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=PATIENCE)
    thread = Thread(target=ask, args=[streamer])
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_a_text_checkpoint_needs_a_pipeline_of_text(text_folder):
    with pytest.raises(TypeError, match="not an instance of `ProcessorMixin`"):
        pipeline("any-to-any", model=str(text_folder), device="cpu")


def test_speech_recognition_without_a_prompt_is_refused(folder):
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*MiMoV2Config"):
        pipeline("automatic-speech-recognition", model=str(folder), device="cpu")


class Speaking(LlamaForCausalLM):
    """A model of another family, of text alone."""

    input_modalities = ("text",)


class Seeing(LlamaForCausalLM):
    input_modalities = ("image", "text")


def other_model(cls):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return cls(LlamaConfig(**sizes, vocab_size=2048))


def test_other_models_get_the_pipeline_of_transformers(loaded):
    run = pipeline("any-to-any", model=other_model(Speaking), processor=loaded[1], device="cpu")
    assert type(run) is AnyToAnyPipeline
    assert run.task == "any-to-any"
    assert run(text="Hi", max_new_tokens=2)[0]["generated_text"].startswith("Hi")


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_other_models_need_what_they_needed(loaded):
    with pytest.raises(ImportError, match="AnyToAnyPipeline requires the Torchvision library"):
        pipeline("any-to-any", model=other_model(Seeing), processor=loaded[1], device="cpu")


def test_the_task_keeps_everything_but_the_class():
    task = PIPELINE_REGISTRY.check_task("any-to-any")[1]
    assert task["impl"] == f"{MiMoV2AnyToAnyPipeline.__module__}.{MiMoV2AnyToAnyPipeline.__name__}"
    assert (task["pt"], task["type"], "default" in task) == ((AutoModelForMultimodalLM,), "multimodal", True)


def test_tables_of_names_know_the_model():
    for table in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names = vars(modeling_auto)[f"MODEL_FOR_{table}_MAPPING_NAMES"]
        assert names["mimo_v2"] == "MiMoV2ForCausalLM"


SCRIPT = """
import json, sys
import modeling_mimo
print(json.dumps([name for name in sys.modules if name.startswith("modeling_mimo.pipelines")]))
from transformers import pipeline
for task in ("text-generation", "image-text-to-text", "any-to-any"):
    run = pipeline(task, model=sys.argv[1], device="cpu")
    run([{"role": "user", "content": "Hi"}], max_new_tokens=2)
"""


def test_pipelines_are_silent_and_imported_late(folder):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[0]) == []
    noise = [line for line in done.stderr.splitlines() if line and "Loading weights" not in line]
    # the released generation_config.json has top_p beside do_sample=false, of which Transformers tells once
    assert [line for line in noise if "generation flags" not in line] == []

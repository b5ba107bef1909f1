"""`generate(use_mtp=True)`: the same tokens and distributions in fewer forwards, whatever batch, cache, criterion."""

import pytest
import safetensors
import torch
import transformers
from mtp_reference import draft_logits
from reference import reference_hidden
from tiny import SIGHT, SMALL, WINDOW, assert_near, page_weights, sight_model, tiny_dict, tiny_model, token_ids
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from modeling_mimo import HybridCache, MiMoV2ForCausalLM, generation_mtp_mimo_v2
from modeling_mimo.conversion.small_tokenizer import build_small_tokenizer
from modeling_mimo.drafting_depth_mimo_v2 import FixedDepth
from modeling_mimo.drafting_mimo_v2 import DraftHeads
from modeling_mimo.generation_mtp_mimo_v2 import MTPDecoder


pytestmark = pytest.mark.usefixtures("one_thread")

EOS = [3, 4]


def agreeing(model):
    """Makes the next token mostly a matter of the last one, for trunk and heads alike: drafts are often right."""
    hidden = model.config.hidden_size
    with torch.no_grad():
        for layer in (*model.model.layers, *model.model.mtp.layers):
            layer.self_attn.o_proj.weight.mul_(0.02)
            for name, weight in layer.mlp.named_parameters():
                if "down_proj" in name:
                    weight.mul_(0.02)
        for layer in model.model.mtp.layers:
            layer.eh_proj.weight.zero_()
            layer.eh_proj.weight[:, :hidden] = torch.eye(hidden)
    return model


@pytest.fixture(scope="module", params=["rarely", "often"])
def model(request):
    made = tiny_model(**SMALL)
    return made if request.param == "rarely" else agreeing(made)


@pytest.fixture(scope="module")
def often():
    return agreeing(tiny_model(**SMALL))


def prompts(batch, seed, longest=5 * WINDOW):
    """Ids [batch, S] padded on the left with 0, and their mask; rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (batch,), generator=generator)
    mask = (torch.arange(int(lengths.max())) >= lengths.max() - lengths[:, None]).long()
    return torch.randint(5, 320, mask.shape, generator=generator) * mask, mask


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS, **options}
    return model.generate(ids, attention_mask=mask, **options)


# Exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy_tokens_are_those_without_drafts(model, batch, depth):
    for seed in range(8 if batch == 4 else 12):
        ids, mask = prompts(batch, seed)
        expected = generate(model, ids, mask)
        assert torch.equal(generate(model, ids, mask, use_mtp=True, mtp_depth=depth), expected)


@pytest.mark.parametrize("eos", [None, [*range(5, 30)]], ids=["to_the_length", "to_eos"])
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_tokens_of_conversations(model, batch, eos):
    """50 conversations of two prompts each for every model, the second prompt behind the cache of the first."""
    for seed in range(24 // batch):
        options = {"max_new_tokens": 8, "eos_token_id": eos}
        ids, mask = prompts(batch, 1000 + seed, 3 * WINDOW)
        caches = {use: HybridCache(model.config) for use in (None, True)}
        first, same = (generate(model, ids, mask, use_mtp=use, cache=caches[use], **options) for use in caches)
        assert torch.equal(first, same)
        # what follows the end of a row is padding
        is_end = torch.isin(first[:, ids.shape[1] :], torch.tensor(options["eos_token_id"] or []))
        real = is_end.long().cumsum(-1) - is_end.long() == 0
        mask = torch.cat((mask, real.long(), torch.ones(batch, 1 + seed % 5, dtype=torch.long)), dim=1)
        ids = torch.cat((first, token_ids(batch, 1 + seed % 5, seed=seed)), dim=1)
        if eos is not None and batch > 1:
            # drafting goes on from rows without gaps alone
            pair = [generate(model, ids, mask, cache=cache, **options) for cache in caches.values()]
        else:
            pair = [generate(model, ids, mask, use_mtp=use, cache=caches[use], **options) for use in caches]
        assert torch.equal(*pair)


def test_the_weights_are_read_once(tmp_path, monkeypatch):
    """Loading opens each file; drafting opens none, whatever the number of calls."""
    tiny_model(**SMALL).save_pretrained(tmp_path)
    opened = []
    for module in (safetensors, transformers.modeling_layers, transformers.modeling_utils):

        def opening(file, *args, opener=module.safe_open, **kwargs):
            opened.append(file)
            return opener(file, *args, **kwargs)

        monkeypatch.setattr(module, "safe_open", opening)
    model = MiMoV2ForCausalLM.from_pretrained(tmp_path)
    assert len(set(opened)) == 1
    opened.clear()
    for seed in range(3):
        generate(model, token_ids(1, 9, seed=seed), use_mtp=True, max_new_tokens=6)
    assert opened == []


def test_agreeing_heads_are_often_right(often):
    ids, mask = prompts(4, 0)
    stats = generate(often, ids, mask, use_mtp=True, return_dict_in_generate=True).mtp_stats
    assert stats.mean_accepted_length > 1.5
    # all rows go on together, and the slowest decides
    assert stats.forwards < 24


class ChangingDepth(FixedDepth):
    """0 to 3 drafts in changing order: what `auto` may choose."""

    order = (3, 0, 1, 0, 0, 2, 3, 2)

    def choose(self):
        self.depth += 1
        return self.order[self.depth % len(self.order)]


class PausingDepth(ChangingDepth):
    """Drafts, then none for more than a window, then drafts."""

    order = (3, *[0] * (WINDOW + 2), 3, 3)


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_tokens_are_those_without_drafts_whatever_auto_chooses(model, batch, monkeypatch):
    monkeypatch.setattr(generation_mtp_mimo_v2, "AutoDepth", lambda heads, asked: ChangingDepth(batch))
    for seed in range(8):
        ids, mask = prompts(batch, 60 + seed)
        output = generate(model, ids, mask, use_mtp=True, mtp_depth="auto", return_dict_in_generate=True)
        assert torch.equal(output.sequences, generate(model, ids, mask))
        assert sum(output.mtp_stats.steps) + 1 == output.mtp_stats.forwards
        assert output.sequences.shape[1] < ids.shape[1] + 24 or min(output.mtp_stats.steps) > 0


def test_auto_gives_the_tokens_of_plain_generation(often):
    ids, mask = prompts(3, 80)
    output = generate(often, ids, mask, use_mtp=True, mtp_depth="auto", max_new_tokens=60, eos_token_id=None)
    assert torch.equal(output, generate(often, ids, mask, max_new_tokens=60, eos_token_id=None))


@pytest.mark.parametrize("depths", [None, ChangingDepth, PausingDepth])
def test_every_draft_is_that_of_the_page(model, monkeypatch, depths):
    """Recomputed from the definition at every step: window < context, partial acceptance, a padded batch, and after
    steps without drafts."""
    monkeypatch.setattr(generation_mtp_mimo_v2, "AutoDepth", lambda heads, asked: depths(-1))
    raw = tiny_dict(**SMALL)
    weights = page_weights(model, raw)
    rows, calls = [], []
    draft, logits = MTPDecoder.draft, DraftHeads.logits

    def watched_draft(self, tokens, depth):
        rows[:] = [row.ids.clone() for row in self.rows]
        return draft(self, tokens, depth)

    def watched_logits(self, head, tokens, positions):
        output = logits(self, head, tokens, positions)
        calls.append((head, tokens.clone(), positions.clone(), output, list(rows)))
        return output

    monkeypatch.setattr(MTPDecoder, "draft", watched_draft)
    monkeypatch.setattr(DraftHeads, "logits", watched_logits)
    ids, mask = prompts(3, 5)
    padding = (mask == 0).sum(-1)
    tokens = 3 * WINDOW if depths is PausingDepth else 14
    mtp_depth = "auto" if depths else 3
    generate(model, ids, mask, use_mtp=True, mtp_depth=mtp_depth, max_new_tokens=tokens, eos_token_id=None)
    assert {head for head, *_ in calls} == {0, 1, 2}
    for head, tokens, positions, output, sequences in calls:
        for index, sequence in enumerate(sequences):
            known = torch.cat((sequence[padding[index] :], tokens[index, 1:]))
            # what is behind the end of a row that has ended is nobody's business
            if len(known) != int(positions[index]) + 2 + head:
                continue
            seen = known[: int(positions[index]) + 1]
            hidden = reference_hidden(weights, raw, seen[None])[0]
            assert_near(output[index], draft_logits(weights, raw, known, hidden, head)[-1])


def chances(model, ids, tokens, **warpers):
    """Exact probability of every continuation of `tokens` tokens, from plain forwards."""
    processors = model._get_logits_processor(
        model._prepare_generation_config(None, do_sample=True, **warpers)[0], input_ids_seq_length=ids.shape[1]
    )
    found = {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for begun, chance in found.items():
            prefix = torch.cat((ids, torch.tensor([begun], dtype=torch.long)), dim=1)
            with torch.no_grad():
                scores = processors(prefix, model(prefix).logits[:, -1].float())
            for token, part in enumerate(scores[0].softmax(-1).tolist()):
                if part:
                    longer[(*begun, token)] = chance * part
        found = longer
    return found


@pytest.mark.parametrize(
    "warpers",
    [{"temperature": 0.7, "top_k": 4, "top_p": 0.9}, {"temperature": 1.3, "top_k": 5, "top_p": 0.95}],
    ids=str,
)
def test_samples_have_the_distribution_of_the_model(often, warpers):
    """A chi-square test of the joint distribution of three tokens, of which the heads draft the last two."""
    draws, batch = 20_000, 2_000
    ids = token_ids(1, 2 * WINDOW, seed=3)
    expected = chances(often, ids, 3, **warpers)
    counts = dict.fromkeys(expected, 0)
    for seed in range(draws // batch):
        torch.manual_seed(seed)
        output = generate(
            often, ids, use_mtp=True, mtp_depth=2, max_new_tokens=3, num_return_sequences=batch, do_sample=True,
            eos_token_id=None, **warpers,
        )  # fmt: skip
        for row in output[:, ids.shape[1] :].tolist():
            counts[tuple(row)] += 1
    # outcomes that are too rare for the approximation are taken together
    pairs = [(counts[key], chance * draws) for key, chance in expected.items()]
    large = [pair for pair in pairs if pair[1] >= 5]
    rest = [sum(part) for part in zip(*(pair for pair in pairs if pair[1] < 5))]
    bins = [*large, rest] if rest and rest[1] >= 5 else large
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in bins)
    degrees = len(bins) - 1
    # the 99.99th percentile, by Wilson and Hilferty
    limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert degrees >= 8
    assert statistic < limit, (statistic, degrees)


# The arguments of generate -----------------------------------------------------------------------------------------


def test_an_eos_inside_accepted_drafts_ends_the_row(often):
    ids, mask = prompts(4, 2)
    free = generate(often, ids, mask, eos_token_id=None)
    # a token that some row writes in the middle of a run
    for token in free[0, ids.shape[1] + 2 : ids.shape[1] + 8].tolist():
        options = {"eos_token_id": [token, 3], "max_new_tokens": 24}
        expected = generate(often, ids, mask, **options)
        assert torch.equal(generate(often, ids, mask, use_mtp=True, **options), expected)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 10])
def test_the_length_is_kept_inside_accepted_drafts(often, tokens):
    ids, mask = prompts(2, 3)
    options = {"max_new_tokens": tokens, "eos_token_id": None}
    expected = generate(often, ids, mask, **options)
    assert expected.shape[1] == ids.shape[1] + tokens
    assert torch.equal(generate(often, ids, mask, use_mtp=True, **options), expected)


class Shy(LogitsProcessor):
    """Forbids what the row has written before, padding and prompt included."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, -torch.inf)


class TokenSum(StoppingCriteria):
    """Ends a row when its tokens add up to a multiple of 7."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(-1) % 7 == 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": LogitsProcessorList([Shy()])},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(5, 60))},
        {"stopping_criteria": [TokenSum()]},
        {"forced_eos_token_id": 7},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_and_criteria_see_what_they_see_without_drafts(often, batch, options):
    for seed in range(3):
        ids, mask = prompts(batch, 20 + seed)
        expected = generate(often, ids, mask, **options)
        assert torch.equal(generate(often, ids, mask, use_mtp=True, **options), expected)


def test_scores_and_logits_are_those_without_drafts(often):
    ids, mask = prompts(1, 4)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 1.0}
    plain, drafted = (generate(often, ids, mask, use_mtp=use, **options) for use in (None, True))
    assert torch.equal(plain.sequences, drafted.sequences)
    for name in ("scores", "logits"):
        assert len(getattr(plain, name)) == len(getattr(drafted, name))
        for left, right in zip(getattr(plain, name), getattr(drafted, name)):
            assert_near(right, left)


def test_stop_strings_end_inside_accepted_drafts(often):
    tokenizer = build_small_tokenizer(320)
    for seed in range(4):
        ids, mask = prompts(2, 40 + seed)
        free = generate(often, ids, mask, eos_token_id=None)
        # the second half of a token and the beginning of the next one
        text = tokenizer.decode(free[0, ids.shape[1] + 4 : ids.shape[1] + 6])
        options = {"stop_strings": [text[len(text) // 2 :]], "tokenizer": tokenizer}
        expected = generate(often, ids, mask, **options)
        assert torch.equal(generate(often, ids, mask, use_mtp=True, **options), expected)


class Kept(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_gets_prompt_and_tokens_one_by_one(often):
    ids, mask = prompts(1, 6)
    streamer = Kept()
    output = generate(often, ids, mask, use_mtp=True, streamer=streamer)
    assert streamer.ended
    assert [part.numel() for part in streamer.parts[1:]] == [1] * (output.shape[1] - ids.shape[1])
    assert torch.cat([part.flatten() for part in streamer.parts]).tolist() == output[0].tolist()


def test_several_sequences_of_a_prompt(often):
    ids, mask = prompts(2, 7)
    torch.manual_seed(1)
    output = generate(often, ids, mask, use_mtp=True, do_sample=True, num_return_sequences=3, eos_token_id=None)
    assert output.shape == (6, ids.shape[1] + 24)
    assert len({tuple(row.tolist()) for row in output}) == 6


def test_images_in_the_prompt(often):
    model = agreeing(sight_model())
    assert model.config.image_token_id is not None
    grid = torch.tensor([[1, 4, 4]])
    pixels = torch.randn(16, model.visual.patch_embed.proj.weight[0].numel())
    before, after = torch.arange(5, 11)[None], torch.arange(20, 30)[None]
    ids = torch.cat((before, torch.full((1, 4), SIGHT["image_token_id"]), after), dim=1)
    options = {"pixel_values": pixels, "image_grid_thw": grid}
    assert torch.equal(generate(model, ids, use_mtp=True, **options), generate(model, ids, **options))


@pytest.mark.parametrize("chunk", [3, 11])
def test_the_prefill_may_come_in_chunks(model, chunk):
    ids = token_ids(1, 4 * WINDOW + 1)
    expected = generate(model, ids)
    output = generate(model, ids, use_mtp=True, prefill_chunk_size=chunk, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    whole = generate(model, ids, use_mtp=True, return_dict_in_generate=True)
    assert output.mtp_stats.accepted == whole.mtp_stats.accepted


# Caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 2, 3 * WINDOW])
def test_a_cache_of_an_earlier_turn_goes_on(model, new):
    first, later = token_ids(1, 3 * WINDOW, seed=1), token_ids(1, new, seed=2)
    cache, plain = HybridCache(model.config), HybridCache(model.config)
    for use, kept in ((True, cache), (None, plain)):
        ids = generate(model, first, cache=kept, use_mtp=use, max_new_tokens=9)
        ids = torch.cat((ids, later), dim=1)
        output = generate(model, ids, cache=kept, use_mtp=use)
        if use:
            drafted = output
    assert torch.equal(drafted, output)
    assert torch.equal(drafted, generate(model, ids))
    # like without drafts, the cache lacks the last token alone
    assert cache.get_seq_length() == plain.get_seq_length() == output.shape[1] - 1
    for left, right in zip(cache.layers, plain.layers):
        shared = min(left.stored, right.stored, WINDOW - 1)
        for ours, theirs in zip(left.live_rows(), right.live_rows()):
            assert_near(ours[:, :, left.stored - shared :], theirs[:, :, right.stored - shared :])


def test_a_snapshot_is_not_written_over(often):
    """Rows that fall behind are moved in the buffers, which a snapshot may share."""
    cache, (ids, mask) = HybridCache(often.config), prompts(3, 9)
    often(ids, attention_mask=mask, cache=cache, use_cache=True)
    snapshot = cache.snapshot()
    before = [[rows.clone() for rows in layer.live_rows()] for layer in cache.layers]
    longer = torch.cat((ids, torch.full((3, 1), 9)), dim=1)
    longer_mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
    generate(often, longer, longer_mask, cache=cache, use_mtp=True)
    cache.restore(snapshot)
    for layer, rows in zip(cache.layers, before):
        assert all(map(torch.equal, layer.live_rows(), rows))


# Reports and refusals ------------------------------------------------------------------------------------------------


def test_the_report_adds_up(often):
    ids, mask = prompts(3, 11)
    output = generate(often, ids, mask, use_mtp=True, return_dict_in_generate=True, eos_token_id=None)
    stats = output.mtp_stats
    assert stats.tokens == 3 * 24 == sum(row["tokens"] for row in stats.rows)
    for name in ("proposed", "accepted"):
        assert getattr(stats, name) == [sum(parts) for parts in zip(*(row[name] for row in stats.rows))]
    for row in stats.rows:
        # every forward gives one token of the trunk; the first one is the prefill's
        assert row["tokens"] <= 1 + row["forwards"] + sum(row["accepted"])
        assert row["forwards"] < stats.forwards
        assert row["accepted"][0] >= row["accepted"][1] >= row["accepted"][2]
    assert stats.seconds.keys() == {"draft", "verify", "other"}
    assert min(stats.seconds.values()) > 0
    assert stats.tokens_per_forward == stats.tokens / stats.forwards


def test_a_model_remembers_in_its_generation_config(often):
    ids = token_ids(1, 9)
    often.generation_config.use_mtp = True
    try:
        assert "mtp_stats" in generate(often, ids, return_dict_in_generate=True)
        assert "mtp_stats" not in generate(often, ids, return_dict_in_generate=True, use_mtp=False)
    finally:
        often.generation_config.use_mtp = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mtp_depth": 0}, "`mtp_depth`: expected 1 to 3 drafts or 'auto', got 0"),
        ({"mtp_depth": 4}, "`mtp_depth`: expected 1 to 3 drafts or 'auto', got 4"),
        ({"mtp_depth": "most"}, "`mtp_depth`: expected 1 to 3 drafts or 'auto', got 'most'"),
        ({"num_beams": 2}, "`num_beams`: expected 1 with `use_mtp`, got 2"),
        ({"assistant_model": object()}, "`assistant_model`: expected nothing beside `use_mtp`, got both"),
        ({"cache": DynamicCache()}, "`cache`: expected a HybridCache .* got DynamicCache"),
        ({"use_cache": False}, "`cache`: expected a HybridCache .* got NoneType"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_drafting_cannot_do_is_named(often, options, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(often, token_ids(1, 9), use_mtp=True, **options)
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_roll_back_is_named(often):
    cache = HybridCache(often.config, max_rollback=2)
    with pytest.raises(ValueError, match="can roll back 3 tokens, got max_rollback=2"):
        generate(often, token_ids(1, 9), use_mtp=True, cache=cache)


def test_depth_without_drafting_and_heads_that_are_not_there_are_named(often):
    with pytest.raises(ValueError, match="`mtp_depth`: expected `use_mtp=True` with it, got 2 alone"):
        generate(often, token_ids(1, 9), mtp_depth=2)
    with pytest.raises(ValueError, match="`use_mtp`: expected a model with MTP heads, got one without"):
        generate(tiny_model(**SMALL, num_nextn_predict_layers=0), token_ids(1, 9), use_mtp=True)


def test_padding_on_the_right_is_named(often):
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="`attention_mask`: expected padding on the left alone"):
        generate(often, ids, mask, use_mtp=True)


def test_rows_of_a_cache_move_on():
    cache = HybridCache(tiny_model(**SMALL).config)
    for index in range(len(cache.layers)):
        states = torch.arange(2 * 12.0).view(2, 1, 12, 1)
        cache.update(states, states.clone(), index)
    cache.shift_rows([0, 3])
    for layer in cache.layers:
        stored = layer.live_rows()[0]
        assert stored[0, 0, :, 0].tolist() == list(range(12 - layer.stored, 12))
        assert stored[1, 0, 3:, 0].tolist() == list(range(24 - layer.stored, 21))

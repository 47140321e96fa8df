"""Encoder-decoder models of text and speech: the walk through both stacks, and the whole tool."""

import json
import wave

import numpy as np
import pytest
import tiny
import torch
from command import done
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    T5Config,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizerFast,
)
from walked import check_walk

from billhook import BillhookError, pack, prune, verify
from billhook.engine.batch import select_rows
from billhook.engine.capture import single_row_calls
from billhook.engine.walk import walk
from billhook.packed.bench_inputs import runs_of
from billhook.packed.loading import load
from billhook.runtime.linear import SparseLinear
from billhook.tasks.automatic_speech_recognition import samples_of
from billhook.tasks.base import Drawing, Home
from billhook.tasks.opening import task_of

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 257, "decoder_start_token_id": 0}
_WIDE = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
_WIDE |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_T5 = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_SPEECH = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}
CONFIGS = {
    "t5": lambda: T5Config(**_T5, **_SPECIAL),
    "bart": lambda: BartConfig(**_WIDE, **_SPECIAL, max_position_embeddings=64),
    "whisper": lambda: WhisperConfig(**_WIDE, **_SPECIAL, **_SPEECH),
}
PACKED = {"t5": "encoder.block.0.layer.1.DenseReluDense.wo", "bart": "model.decoder.layers.0.fc1"}
QUICK = {("t5", "good"), ("whisper", "gblm")}  # not nightly


def build(family):
    torch.manual_seed(0)
    kind = AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForSeq2SeqLM
    model = kind.from_config(CONFIGS[family]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def batch(family, rows, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, 250, (rows, 6), generator=random)
    found = {"decoder_input_ids": torch.cat([torch.zeros(rows, 1).long(), labels[:, :-1]], 1), "labels": labels}
    if family == "whisper":
        return {"input_features": torch.randn(rows, 8, 40, generator=random), **found}
    return {"input_ids": torch.randint(3, 250, (rows, 9 + seed), generator=random), **found}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_pruned_walk_equals_the_pruned_models_own_forward_bit_for_bit(family):
    check_walk(build(family), build(family), [batch(family, 3), batch(family, 2, 1)], use_cache=False)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        pytest.param(family, recipe, marks=() if (family, recipe) in QUICK else pytest.mark.nightly)
        for family in CONFIGS
        for recipe in ("good", "gblm", "best")
    ],
)
def test_recipes_meet_the_budget_in_both_stacks(family, recipe):
    report = prune(build(family), sparsity=0.5, recipe=recipe, calibration=[batch(family, 2, s) for s in range(5)])
    for stack in ("encoder", "decoder"):
        inside = [x for x in report.layers if f"{stack}." in x.layer]
        assert sum(x.zeros for x in inside) == pytest.approx(0.5 * sum(x.n for x in inside), abs=len(inside))


@pytest.mark.parametrize("family", CONFIGS)
def test_inputs_that_are_given_alone_get_the_decoders_inputs(family):
    """Those that BART makes of token ids by itself; with labels, those that every model makes of labels."""
    model, given = build(family), batch(family, 2)
    inputs, labels = given[model.main_input_name], given["labels"]
    found = task_of(model).samples(inputs, model, Home(), Drawing()).batch
    labelled = {model.main_input_name: inputs, "labels": labels}
    again = task_of(model).samples(labelled, model, Home(), Drawing()).batch
    with torch.no_grad():
        logits = model(**found).logits
        if family == "bart":
            assert torch.equal(logits, model(inputs).logits)
        assert torch.equal(model(**again).logits, model(**labelled).logits)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_blocks_are_tuned_on_inputs_of_several_lengths(family):
    """Of the same length in the decoder, and of multiples and others in the encoder."""
    batches = []
    for rows, length in ((3, 4), (3, 8), (4, 7)):
        ids = torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(length))
        batches.append({**batch(family, rows, length), "input_ids": ids})
    model, walked = build(family), 0
    single = single_row_calls(model, batches)
    expected = [single_row_calls(model, [select_rows(b, slice(row, row + 1))])[0] for b in batches for row in (1, 2)]
    for block in walk(model, batches, read_only=True):
        parts = [
            call.part(torch.tensor([row]), one[block.index], torch.float32)
            for call, one in zip(block.calls, single, strict=True)
            for row in (1, 2)
        ]
        for part, calls in zip(parts, expected, strict=True):
            own = calls[block.index]
            for found, value in zip(
                (*part.args, *part.kwargs.values()), (*own.args, *own.kwargs.values()), strict=True
            ):
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(found, value)
                    walked += 1
    assert walked


@pytest.mark.gate
def test_a_t5_is_pruned_and_scored_by_the_targets_of_a_file(tmp_path):
    model = build("t5")
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"input": f"number {n}" + "!" * (n % 3), "target": f"{n}"}) for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = ["--criterion", "wanda", "--sparsity", "0.5", "--samples", "8", "--stacks", "decoder"]
    done("prune", tmp_path / "model", *options, "--calibration", tmp_path / "rows.jsonl", "-o", tmp_path / "out")
    assert verify(tmp_path / "out").ok
    scores = json.loads(done("eval", tmp_path / "out", "--data", tmp_path / "rows.jsonl", "--json").out)
    pruned, nll = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval(), []
    for name, value in pruned.encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name])
    for n in range(12):
        words = tiny.tokenizer()
        ids = words(f"number {n}" + "!" * (n % 3), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            nll.append(float(pruned(input_ids=ids, labels=words(f"{n}", return_tensors="pt")["input_ids"]).loss))
    assert scores["nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert (scores["unit"], scores["inputs"]) == ("answer", 12)


@pytest.mark.gate
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_packed_model_generates_and_scores_what_the_dense_one_does(family, tmp_path):
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    prune(build(family), sparsity=0.5, criterion="magnitude", allocator="uniform", output=dense)
    tiny.tokenizer().save_pretrained(dense)
    pack(dense, packed)
    made = [done("generate", path, "abc", "--max-new-tokens", "5", "--json").json for path in (dense, packed)]
    ids = torch.tensor([tiny.tokenizer()("abc")["input_ids"]])
    start, *new = load(dense).generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()
    assert start == _SPECIAL["decoder_start_token_id"]
    for facts in made:
        assert facts["text"] == tiny.tokenizer().decode(new, skip_special_tokens=True)
        assert (facts["prompt_tokens"], facts["new_tokens"]) == (ids.shape[1], len(new))
    assert made[0]["text"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input": f"n {n}", "target": f"{n}"}) for n in range(8)))
    nll = [
        json.loads(done("eval", path, "--data", tmp_path / "rows.jsonl", "--json").out)["nll"]
        for path in (dense, packed)
    ]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4)
    # the context is 64 for each stack, or without a limit
    assert runs_of([dense, packed], [1], [40], 60) == [(1, 40, 60)]
    for dtype in (torch.bfloat16, torch.float32):  # that of the activations, whatever the values have
        layer = load(packed, dtype=dtype).get_submodule(PACKED[family])
        assert isinstance(layer, SparseLinear)
        assert layer.weight.dtype == dtype


@pytest.mark.gate
def test_a_whisper_is_pruned_with_recordings(tmp_path):
    build("whisper").save_pretrained(tmp_path / "model")
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=16000, chunk_length=1, n_fft=400, hop_length=400)
    vocabulary = dict(tiny.tokenizer().get_vocab().items())
    words = WhisperTokenizerFast(vocab=vocabulary, merges=[], unk_token="</s>", bos_token="<s>", eos_token="</s>")
    WhisperProcessor(extractor, words).save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    for n in range(8):
        with wave.open(str(tmp_path / f"{n}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes((random.standard_normal(9000) * 3000).astype("<i2").tobytes())
    rows = [json.dumps({"audio": f"{n}.wav", "text": "ab" * (1 + n % 2)}) for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = ["--criterion", "wanda", "--sparsity", "0.5", "--samples", "6"]
    done("prune", tmp_path / "model", *options, "--calibration", tmp_path / "rows.jsonl", "-o", tmp_path / "out")
    assert verify(tmp_path / "out").ok
    options = ["--data", tmp_path / "rows.jsonl", "--against", tmp_path / "model", "--json"]
    scores = json.loads(done("eval", tmp_path / "out", *options).out)
    assert (scores["inputs"], scores["unit"]) == (8, "answer")
    assert scores["against"]["kl"] > 0
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    with pytest.raises(BillhookError, match="cannot be read as a WAV file"):
        samples_of(tmp_path / "bad.wav", 16000)
    with pytest.raises(BillhookError, match="convert it to 8000 a second"):
        samples_of(tmp_path / "0.wav", 8000)


def test_tasks_are_told_by_the_class():
    names = {family: task_of(build(family)).name for family in CONFIGS}
    speech = "automatic-speech-recognition"
    assert names == {"t5": "text2text-generation", "bart": "text2text-generation", "whisper": speech}

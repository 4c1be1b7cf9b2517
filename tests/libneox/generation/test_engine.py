# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: equal to transformers, to itself without cache, alone, guessed, packed; limits and logprobs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from libneox.errors import DataError, UsageError
from libneox.generation import Engine, Sampling, generate
from libneox.generation.conversation import Conversation
from libneox.generation.lookup import Lookup
from libneox.generation.prepack import FUSED, LEAST_ROWS, PackedLinear, can_prepack, load_packed, prepacked
from libneox.model import KVCache, Transformer
from libneox.model.transformer import activate
from libneox.tokenizer import Tokenizer
from tests.libneox.model.no_host import no_host

Build = Callable[..., Transformer]
PROMPTS = ["hello", "a much longer prompt than the first", "x", "hello world", ""]
KINDS: dict[str, dict[str, Any]] = {
    "pythia": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "mlp_bias": False, "qkv_bias": False},
    "learned_tied": {"pos_emb": "learned", "tie_embeddings": True},
    "window": {"sliding_window": 5},
    "alibi": {"pos_emb": "alibi"},
    "rpe": {"pos_emb": "rpe"},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "none": {"pos_emb": "none"},
}


def slowly(model: Transformer, ids: list[int], count: int) -> list[int]:
    """Greedy tokens without cache, batch or engine."""
    text = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            text.append(int(model(torch.tensor([text]))[0, -1, : model.config.vocab_size].argmax()))
            if text[-1] == 0:
                return text[len(ids) : -1]
    return text[len(ids) :]


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_greedy_equals_no_cache_alone_and_in_a_batch(
    kind: str, prepack: bool, noise_model: Build, tokenizer: Tokenizer
) -> None:
    model = noise_model(**KINDS[kind])
    engine = Engine(model, tokenizer, max_tokens=24, prepack=prepack)
    requests = [engine.request(prompt, index=i) for i, prompt in enumerate(PROMPTS)]
    expected = [slowly(model, request.ids, 24) for request in requests]
    assert [completion.tokens for completion in engine.run(requests)] == expected
    assert [engine.run([request])[0].tokens for request in requests] == expected
    guessing = Engine(model, tokenizer, max_tokens=24, prepack=prepack, guesses=3)
    assert [guessing.run([request])[0].tokens for request in requests] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [True, False])
def test_a_step_that_is_captured_needs_nothing_of_the_host(kind: str, padded: bool, noise_model: Build) -> None:
    with torch.device("meta"):
        model = Transformer(noise_model(**KINDS[kind]).config).eval()
        pad_B, ids_BT = torch.zeros(3, dtype=torch.int64) if padded else None, torch.zeros(3, 5, dtype=torch.int64)
        cache = KVCache(model.config, 3, 20, dtype=model.dtype, device="meta", pad_B=pad_B, whole=True)
        with torch.inference_mode():
            model(ids_BT, cache=cache)
            for watched in (False, True):  # what is made once may be copied
                with no_host() if watched else contextlib.nullcontext():
                    model(ids_BT[:, :1], cache=cache)
    for copied in (lambda: torch.ones(3).to("meta"), lambda: torch.tensor([1, 2], device="meta")):
        with pytest.raises(AssertionError, match="host memory"), no_host():
            copied()


def test_rows_that_have_ended_stay_where_steps_are_recorded(
    noise_model: Build, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To take them out costs another recording: they go when they are half of the batch, and change no other's text."""
    model, sizes, prompts = noise_model(), [], [*PROMPTS, "and", "others", "too"]

    def texts() -> list[list[int]]:
        sampling = Sampling(temperature=1.0, seed=4)
        engine = Engine(model, tokenizer, sampling=sampling, max_tokens=12, end_ids=range(2, 40))
        requests = [engine.request(prompt, index=i) for i, prompt in enumerate(prompts)]
        return [completion.tokens for completion in engine.run(requests)]

    wanted = texts()
    assert len({len(tokens) for tokens in wanted}) > 3, "texts end one after the other"

    class Whole(KVCache):
        """As on a GPU."""

        def __init__(self, *args: Any, **keywords: Any):
            super().__init__(*args, **(keywords | {"whole": True}))

        def select(self, rows: torch.Tensor) -> None:
            sizes.append(len(rows))
            super().select(rows)

    monkeypatch.setattr("libneox.generation.engine.KVCache", Whole)
    assert texts() == wanted
    assert sizes
    assert all(2 * small <= large for large, small in zip([len(prompts), *sizes], sizes, strict=False))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_captured_graphs_equal_plain_steps(kind: str, noise_model: Build, tokenizer: Tokenizer) -> None:
    model = noise_model(**KINDS[kind])
    texts = []
    for device in ("cpu", "cuda"):
        engine = Engine(model.to(device), tokenizer, max_tokens=24, prepack=False)
        texts.append([c.tokens for c in engine.run([engine.request(prompt) for prompt in PROMPTS])])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("family", ["GPTNeoX", "Llama"])
def test_greedy_equals_transformers(family: str, tmp_path: Any, tokenizer: Tokenizer) -> None:
    import transformers

    import libneox

    torch.manual_seed(3)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = getattr(transformers, f"{family}Config")(vocab_size=258, **shape, bos_token_id=0, eos_token_id=0)
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    reference.save_pretrained(tmp_path)
    model = libneox.load_model(tmp_path)
    for prompt in ("hello", "a longer prompt"):
        ids = tokenizer.encode(prompt)
        fed = torch.tensor([ids])
        texts = reference.generate(fed, attention_mask=torch.ones_like(fed), max_new_tokens=40, do_sample=False)
        expected = [token for token in texts[0, len(ids) :].tolist() if token != 0]
        assert generate(model, tokenizer, prompt, max_tokens=40)[0].tokens == expected


def test_samples_do_not_depend_on_the_batch(noise_model: Build, tokenizer: Tokenizer) -> None:
    model = noise_model()
    options = {"max_tokens": 16, "temperature": 1.5, "top_k": 50, "seed": 5}
    together = generate(model, tokenizer, PROMPTS, num_return=2, batch_size=16, **options)
    apart = generate(model, tokenizer, PROMPTS, num_return=2, batch_size=2, **options)
    assert [c.tokens for c in together] == [c.tokens for c in apart]
    assert together[0].tokens != together[1].tokens
    assert [(c.index, c.copy) for c in together] == [(i, k) for i in range(5) for k in range(2)]
    other = generate(model, tokenizer, PROMPTS, **{**options, "seed": 6})
    assert [c.tokens for c in other] != [c.tokens for c in together[::2]]


def test_guessing_changes_no_sample(noise_model: Build, tokenizer: Tokenizer) -> None:
    model = noise_model()
    sampling = Sampling(temperature=0.4, repetition_penalty=1.1, seed=2)
    texts = []
    for guesses in (0, 2, 5):
        engine = Engine(model, tokenizer, sampling=sampling, max_tokens=40, guesses=guesses, logprobs=2)
        texts.append(engine.run([engine.request("ab ab ab ab")])[0])
    assert texts[0].tokens == texts[1].tokens == texts[2].tokens
    torch.testing.assert_close(texts[0].token_logprobs, texts[2].token_logprobs, atol=1e-4, rtol=1e-4)


def test_guessing_saves_steps_where_the_text_repeats(noise_model: Build, tokenizer: Tokenizer) -> None:
    model = noise_model(num_layers=1)
    engine = Engine(model, tokenizer, max_tokens=50, guesses=4)
    engine.run([engine.request("hello")])
    assert engine.work.tokens == 50
    assert engine.work.steps < 40  # greedy texts of noise run in circles


def test_lookup_finds_what_followed_the_latest_occurrence() -> None:
    lookup = Lookup([1, 2, 3, 4, 1, 2, 3, 5, 9, 1, 2], guesses=3)
    assert lookup.guess(10) == [3, 5, 9]
    assert lookup.guess(1) == [3]
    lookup.push(7)
    assert lookup.guess(10) == []


def test_padding_of_the_vocabulary_is_never_made(noise_model: Build, tokenizer: Tokenizer) -> None:
    model = noise_model(tie_embeddings=False)
    with torch.no_grad():
        model.head.weight[258:] *= 100
    for options in ({}, {"temperature": 3.0}, {"top_k": 5}):
        made = generate(model, tokenizer, PROMPTS, max_tokens=30, **options)
        assert max(token for completion in made for token in completion.tokens) < 258


class Script(torch.nn.Module):
    """A model that says what it is told to, whatever it reads."""

    def __init__(self, model: Transformer, tokens: list[int]):
        super().__init__()
        self.config, self.device, self.dtype = model.config, torch.device("cpu"), torch.float32
        self.kv_heads = model.kv_heads
        self._tokens, self._said = tokens, 0

    def hidden(self, ids: torch.Tensor, *, cache: Any) -> torch.Tensor:
        cache.advance(ids.shape[1])
        return torch.zeros(*ids.shape, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(*hidden.shape[:-1], self.config.padded_vocab_size)
        scores[..., self._tokens[self._said % len(self._tokens)]] = 9.0
        self._said += 1
        return scores

    def forward(self, ids: torch.Tensor, *, cache: Any) -> torch.Tensor:
        return self.logits(self.hidden(ids, cache=cache))


def say(text: bytes, model: Transformer, tokenizer: Tokenizer, *, eod: bool = False, **options: Any) -> Any:
    script = Script(model, [2 + byte for byte in text] + [0] * eod)
    engine = Engine(script, tokenizer, prepack=False, **options)  # type: ignore[arg-type]
    return engine.run([engine.request("p")])[0]


def test_why_a_text_ended(noise_model: Build, tokenizer: Tokenizer) -> None:
    model = noise_model()
    ended = say(b"abc", model, tokenizer, eod=True)
    assert (ended.text, ended.length, ended.finished, ended.reason) == ("abc", 3, True, "eod")
    told = say(b"abc", model, tokenizer, end_ids=[2 + ord("c")])
    assert (told.text, told.length, told.finished, told.reason) == ("ab", 2, True, "eod")
    stopped = say(b"abc\nd", model, tokenizer, stop=["\n"])
    assert (stopped.text, stopped.finished, stopped.reason) == ("abc", True, "stop")
    cut = say(b"abc", model, tokenizer, max_tokens=2)
    assert (cut.text, cut.length, cut.finished, cut.reason, cut.message) == ("ab", 2, False, "length", None)
    full = say(b"abc", model, tokenizer, max_tokens=100)
    assert (full.length, full.finished, full.reason) == (63, False, "context")
    assert "64 tokens" in full.message
    nothing = say(b"abc", model, tokenizer, max_tokens=0)
    assert (nothing.text, nothing.length, nothing.finished) == ("", 0, False)


def test_streamed_text_is_the_text(noise_model: Build, tokenizer: Tokenizer) -> None:
    script = Script(noise_model(), [2 + byte for byte in "\u00e9t\u00e9 \U0001f600.".encode()])
    engine = Engine(script, tokenizer, prepack=False, max_tokens=40, stop=[". "])  # type: ignore[arg-type]
    given: list[str] = []
    completion = engine.run([engine.request("p")], given.append)[0]
    assert "".join(given) == completion.text
    assert not any("\ufffd" in piece for piece in given[:-1])


def test_prompts_that_cannot_be_completed_are_refused(noise_model: Build, tokenizer: Tokenizer) -> None:
    engine = Engine(noise_model(), tokenizer)
    with pytest.raises(DataError, match="64 tokens, the model's context 64"):
        engine.request("x" * 64)
    assert engine.request("x" * 63).ids
    with pytest.raises(DataError, match="999"):
        engine.request([999])
    assert engine.request("").ids == [0]
    with pytest.raises(UsageError, match="max-tokens"):
        Engine(noise_model(), tokenizer, max_tokens=-1)


def test_logprobs_are_those_of_the_model(noise_model: Build, tokenizer: Tokenizer) -> None:
    model = noise_model()
    made = generate(model, tokenizer, "hello", max_tokens=8, logprobs=3, temperature=2.0, top_k=40)[0]
    ids = torch.tensor([tokenizer.encode("hello") + made.tokens])
    with torch.inference_mode():
        expected = model(ids)[0, 4:-1, :258].log_softmax(-1)
    for place, token in enumerate(made.tokens):
        assert made.token_logprobs[place] == pytest.approx(expected[place, token].item(), abs=1e-4)
        best = expected[place].topk(3)
        assert [i for i, _ in made.top_logprobs[place]] == best.indices.tolist()
    assert generate(model, tokenizer, "hello", max_tokens=2, logprobs=0)[0].top_logprobs == [[], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64).to(dtype), torch.randn(96).to(dtype), torch.randn(33, 64).to(dtype)
    packed = PackedLinear(weight, bias)
    with torch.inference_mode():
        whole = packed(x)
        for rows in range(1, 2 * LEAST_ROWS):
            assert torch.equal(packed(x[:rows]), whole[:rows])
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(whole.double(), exact, atol=1e-4 if dtype == torch.float32 else 0.15, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_kernels_do_behind_a_packed_product(dtype: torch.dtype) -> None:
    """Activations and sums are those of the plain operations, and no row's depends on the others."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64).to(dtype), torch.randn(96).to(dtype), torch.randn(33, 64).to(dtype)
    other, packed = torch.randn(33, 96).to(dtype), PackedLinear(weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    close = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    with torch.inference_mode():
        summed = packed.rows_plus(x, other)
        torch.testing.assert_close(summed.double(), exact + other.double(), **close)
        assert torch.equal(packed.rows_plus(x[:LEAST_ROWS], other[:LEAST_ROWS]), summed[:LEAST_ROWS])
        for name in FUSED:
            whole = packed.rows(x, name)
            torch.testing.assert_close(whole.double(), activate(exact, name), **close)
            assert torch.equal(packed.rows(x[:LEAST_ROWS], name), whole[:LEAST_ROWS])


BLOCKS: dict[str, dict[str, Any]] = {
    "sequential": {"residual": "sequential", "activation": "gelu_tanh"},
    "one_norm": {"residual": "parallel_tied", "activation": "mish"},
    "head_norm": {"qk_norm": "head", "num_kv_heads": 2, "activation": "geglu"},
    "joint_norm": {"qk_norm": "joint", "rotary_pct": 1.0, "apply_query_key_layer_scaling": True},
}


@pytest.mark.parametrize("kind", sorted(KINDS | BLOCKS))
def test_packed_model_equals_the_model(kind: str, noise_model: Build) -> None:
    model = noise_model(**(KINDS | BLOCKS)[kind])
    if not can_prepack(model):
        pytest.skip("no packed kernels here")
    ids = torch.randint(0, 258, (2, 9))
    with torch.inference_mode():
        expected = model(ids)
        torch.testing.assert_close(prepacked(model)(ids), expected, atol=2e-5, rtol=1e-5)
        packed = prepacked(model, consume=True)
        torch.testing.assert_close(packed(ids), expected, atol=2e-5, rtol=1e-5)
    assert all(module.weight is None for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert prepacked(packed) is packed


def test_conversation_reads_only_what_is_new(noise_model: Build, tokenizer: Tokenizer) -> None:
    model = noise_model()
    engine = Engine(model, tokenizer, max_tokens=6)
    conversation = Conversation(engine)
    history = ""
    for turn, line in enumerate(["hello", " and", " then"]):
        history += line
        completion = conversation.complete(history, turn=turn)
        assert completion.tokens == slowly(model, tokenizer.encode(history), 6)
        history = "".join((history, completion.text)).encode("ascii", "ignore").decode()
    assert conversation.complete("other", turn=9).tokens == slowly(model, tokenizer.encode("other"), 6)


def test_conversation_goes_on_after_an_interruption_while_it_read(
    noise_model: Build, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a new and still empty cache does not hold is not taken from it."""
    monkeypatch.setattr("libneox.generation.conversation.LEAST_CAPACITY", 1)
    model = noise_model()
    engine = Engine(model, tokenizer, max_tokens=4, prepack=False)
    conversation = Conversation(engine)
    conversation.complete("hello")
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.complete("hello and a good deal more")
    assert conversation.complete("hello and").tokens == slowly(model, tokenizer.encode("hello and"), 4)


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("device", "dtype", "word"),
    [
        ("abacus", "auto", "abacus"),
        ("meta", "auto", "meta"),
        ("cuda:99", "auto", "cuda:99"),
        ("cpu", "float12", "float12"),
    ],
)
def test_devices_and_dtypes_that_are_not_there(tmp_path: Any, device: str, dtype: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        load_packed(tmp_path, device=device, dtype=dtype)

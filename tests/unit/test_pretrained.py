"""Loading: the right model or one plain sentence; labels and cuts that hold for any text."""

import json
import pickle
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, T5Config

from engine import checkpoints, memory, pretrained
from engine.errors import DoesNotFitError, InputError
from engine.pretrained import load
from tests.tiny_models import CONFIGS, DECODERS, byte_fallback_tokenizer, byte_level_tokenizer, save

TEXTS = st.text(max_size=40) | st.text(alphabet=" \n\t\r.aé👩‍🚀️ा\x00\u200b字", max_size=20)
property_test = settings(max_examples=150, derandomize=True, deadline=None)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(pretrained, "_loaded", OrderedDict())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind."""
    return {kind: save(tmp_path_factory.mktemp(kind), kind) for kind in CONFIGS}


@pytest.fixture(scope="module")
def byte_level(folders):
    return load(str(folders["llama"]))


@pytest.fixture(scope="module")
def encoder(folders):
    return load(str(folders["bert"]))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    return load(str(save(tmp_path_factory.mktemp("fallback"), "llama", tokenizer=byte_fallback_tokenizer())))


class TestSizes:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_describe_the_model(self, folders, kind):
        model = load(str(folders[kind]))
        assert model.kind == ("decoder" if kind in DECODERS else "encoder")
        assert (model.num_layers, model.num_heads, model.d_model, model.max_tokens) == (3, 4, 32, 64)
        assert model.num_kv_heads == (4 if kind in ("gpt2", "bert", "masked") else 2)
        assert model.head_dim == (16 if kind == "qwen3" else 8)
        assert model.vocab_size == model.model.config.vocab_size
        assert model.num_parameters == sum(parameter.numel() for parameter in model.model.parameters())
        assert model.revision == "local"
        assert folders[kind].name in model.source

    def test_model_is_for_looking_at(self, byte_level):
        assert not byte_level.model.training
        assert not any(parameter.requires_grad for parameter in byte_level.model.parameters())

    def test_dtype_is_what_was_asked_for(self, folders):
        model = load(str(folders["llama"]), dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}


class TestLabels:
    def test_byte_level(self, byte_level):
        labels = byte_level.readable(byte_level.encode(" Mary\n\t\r👍"))
        assert "".join(labels) == "␣Mary⏎⇥␍<F0><9F><91><8D>"

    def test_byte_fallback(self, byte_fallback):
        assert byte_fallback.readable(byte_fallback.encode(" ab👍")) == ["␣a", "b", "<F0>", "<9F>", "<91>", "<8D>"]

    def test_word_pieces(self, encoder):
        labels = encoder.readable(encoder.encode("Mary gave"))
        assert labels[0] == "[CLS]"
        assert labels[-1] == "[SEP]"
        assert "".join(labels[1:-1]).replace("##", "") == "Marygave"

    def test_special_tokens_stay(self, byte_level):
        assert byte_level.readable(byte_level.encode("<|end|>")) == ["<|end|>"]

    def test_added_tokens_are_text_and_not_bytes(self, tmp_path):
        tokenizer = byte_level_tokenizer()
        tokenizer.add_tokens(["é!"])
        model = load(str(save(tmp_path, "llama", tokenizer=tokenizer)))
        assert model.readable(model.encode("é!")) == ["é!"]

    def test_ids_without_a_token_have_a_label(self, byte_level):
        assert byte_level.readable([10**6]) == ["<1000000>"]

    @pytest.mark.parametrize(
        ("text", "label"),
        [("a\u200db", "a<U+200D>b"), ("\ufe0f", "<U+FE0F>"), ("\u0301", "◌\u0301"), ("a  b", "a␣␣b"), ("·é字", "·é字")],
    )
    def test_what_prints_as_nothing_is_spelled_out(self, text, label):
        assert pretrained._printable(text) == label

    @pytest.mark.parametrize("fixture", ["byte_level", "byte_fallback", "encoder"])
    def test_every_token_of_every_vocabulary_is_printable(self, fixture, request):
        model = request.getfixturevalue(fixture)
        for label in model.readable(list(range(model.vocab_size))):
            assert label
            assert label.isprintable()
            assert not set(label) & set(" ĠĊÃâ▁\ufffd")

    @property_test
    @given(text=TEXTS)
    def test_labels_of_any_text(self, byte_level, text):
        ids = byte_level.encode(text)
        labels = byte_level.readable(ids)
        assert len(labels) == len(ids)
        assert all(label and label.isprintable() for label in labels)


class TestEncode:
    @property_test
    @given(text=TEXTS)
    def test_a_decoder_adds_nothing(self, byte_level, text):
        assert byte_level.tokenizer.decode(byte_level.encode(text), clean_up_tokenization_spaces=False) == text

    def test_empty_text_has_no_tokens(self, byte_level, encoder):
        assert byte_level.encode("") == []
        assert encoder.readable(encoder.encode("")) == ["[CLS]", "[SEP]"]


class TestTruncate:
    @pytest.mark.parametrize("fixture", ["byte_level", "byte_fallback", "encoder"])
    @property_test
    @given(text=TEXTS, limit=st.integers(2, 12))
    def test_is_a_beginning_that_fits(self, request, fixture, text, limit):
        model = request.getfixturevalue(fixture)
        cut = model.truncate(text, limit)
        assert text.startswith(cut)
        assert len(model.encode(cut)) <= limit
        if len(model.encode(text)) <= limit:
            assert cut == text

    def test_keeps_as_many_tokens_as_fit(self, byte_level):
        text = "When Mary and John went to the store, John gave a drink to Mary."
        ids = byte_level.encode(text)
        for limit in range(1, len(ids) + 1):
            assert byte_level.encode(byte_level.truncate(text, limit)) == ids[:limit]

    def test_never_cuts_through_a_character(self, byte_level):
        assert [byte_level.truncate("a👍", limit) for limit in range(6)] == ["", "a", "a", "a", "a", "a👍"]

    def test_needs_room_for_the_special_tokens(self, encoder):
        with pytest.raises(InputError, match="adds 2"):
            encoder.truncate("Mary", 1)


class TestMemory:
    def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(self, folders, monkeypatch):
        monkeypatch.setattr(memory, "free", lambda device: 1000)
        monkeypatch.setattr(pretrained.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(DoesNotFitError) as error:
            load(str(folders["llama"]))
        assert "float32" in str(error.value)
        assert "GiB" in str(error.value)

    def test_the_bound_is_parameters_times_bytes(self, monkeypatch):
        monkeypatch.setattr(memory, "free", lambda device: 4000)
        checkpoints.check_fits("m", 1000, "cpu", torch.float32)
        checkpoints.check_fits("m", 2000, "cpu", torch.bfloat16)
        with pytest.raises(DoesNotFitError):
            checkpoints.check_fits("m", 1001, "cpu", torch.float32)


class TestStaysLoaded:
    def test_the_same_model_is_not_read_twice(self, folders):
        assert load(str(folders["llama"])) is load(f" {folders['llama']} ")

    def test_only_the_two_used_last_stay(self, folders):
        first, second = load(str(folders["llama"])), load(str(folders["gpt2"]))
        assert load(str(folders["llama"])) is first
        load(str(folders["bert"]))
        assert len(pretrained._loaded) == 2
        assert load(str(folders["llama"])) is first
        assert load(str(folders["gpt2"])) is not second

    def test_a_folder_that_was_written_again_is_read_again(self, tmp_path):
        before = load(str(save(tmp_path, "llama", seed=0)))
        time.sleep(0.01)
        after = load(str(save(tmp_path, "llama", seed=1)))
        assert not torch.equal(before.model.get_input_embeddings().weight, after.model.get_input_embeddings().weight)

    def test_threads_that_ask_at_once_get_one_model(self, folders, monkeypatch):
        opened = []
        opener = pretrained._open
        monkeypatch.setattr(pretrained, "_open", lambda *args: opened.append(args) or opener(*args))
        start = threading.Barrier(6)

        def ask(_):
            start.wait()
            return load(str(folders["llama"]))

        with ThreadPoolExecutor(6) as pool:
            models = set(pool.map(ask, range(6)))
        assert len(models) == len(opened) == 1


class TestRefused:
    """Each is one sentence for a person: no traceback, no class names of a library."""

    def refusal(self, name):
        with pytest.raises(InputError) as error:
            load(str(name))
        message = str(error.value)
        assert message.endswith((".", "`.")) or ": " in message
        assert "\n" not in message
        assert not pretrained._loaded
        return message

    def test_a_model_without_an_attention_interface(self, tmp_path):
        BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").touch()
        assert "cannot be observed" in self.refusal(tmp_path)

    def test_a_model_with_an_encoder_and_a_decoder(self, tmp_path):
        T5Config().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").touch()
        assert "neither a decoder" in self.refusal(tmp_path)

    def test_a_kind_of_model_that_nobody_knows(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
        (tmp_path / "model.safetensors").touch()
        assert "config.json" in self.refusal(tmp_path)

    def test_a_config_that_is_not_json(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        (tmp_path / "model.safetensors").touch()
        assert "config.json" in self.refusal(tmp_path)

    def test_code_in_the_folder_is_not_run(self, tmp_path):
        config = {"model_type": "abacus", "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
        (tmp_path / "model.safetensors").touch()
        assert "foreign code" in self.refusal(tmp_path)
        assert not (tmp_path / "sprung").exists()

    def test_a_pickle_is_not_opened(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return open, (str(tmp_path / "sprung"), "w")

        save(tmp_path, "llama")
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
        assert "safetensors" in self.refusal(tmp_path)
        assert not (tmp_path / "sprung").exists()

    def test_weights_in_another_format_are_not_read_beside_safetensors(self, tmp_path):
        path = save(tmp_path, "llama") / "model.safetensors"
        torch.save(load_file(path), tmp_path / "pytorch_model.bin")
        path.rename(tmp_path / "something_else.safetensors")
        assert "cannot be read" in self.refusal(tmp_path)

    def test_weights_that_are_missing_are_not_made_up(self, tmp_path):
        path = save(tmp_path, "llama") / "model.safetensors"
        weights = load_file(path)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, path, metadata={"format": "pt"})
        assert "lack 1 of its weights" in self.refusal(tmp_path)

    def test_weights_that_are_cut_off(self, tmp_path):
        path = save(tmp_path, "llama") / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        assert "cannot be read" in self.refusal(tmp_path)

    def test_a_folder_without_a_tokenizer(self, tmp_path):
        for file in save(tmp_path, "llama").glob("tokenizer*"):
            file.unlink()
        assert "cannot be read" in self.refusal(tmp_path)

"""The decoder: shaped as asked, causal, equal to Llama with the same weights, and the same with a cache."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM

from engine import llama
from engine.data import train_tokenizer
from engine.errors import InputError
from engine.lora.injection import PROJECTIONS, inject_lora
from engine.model import (
    Decoder,
    KVCache,
    ModelConfig,
    Parts,
    create_test_transformer,
    evaluating,
    visible_attention,
)
from engine.rotary import RotaryEmbedding
from tests.tiny_models import CORPUS

SEEDS = range(3)
SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "max_seq_len": 24}


def decoder(seed=0, parts=None, **changes):
    """A random decoder whose weights are far from their small start."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig(**SMALL | changes), parts).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(seed, batch=2, length=12, vocab=50):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def transformers_llama(seed=0, **changes):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class TestConfig:
    def test_what_is_left_out_follows_from_the_rest(self):
        config = ModelConfig(d_model=96, num_heads=6)
        assert (config.num_kv_heads, config.head_dim, config.ffn_dim, config.vocab_size) == (6, 16, 256, 1000)

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"d_model": 30, "num_heads": 8}, ["num_heads is 8", "divide d_model", "30"]),
            ({"num_heads": 0}, ["num_heads is 0", "greater than or equal to 1"]),
            ({"num_heads": 8, "num_kv_heads": 3}, ["num_kv_heads is 3", "divide num_heads", "8"]),
            ({"head_dim": 7}, ["head_dim is 7", "even"]),
            ({"d_model": 24, "num_heads": 8}, ["head_dim is 3", "even"]),
            ({"vocab_size": "many"}, ["vocab_size is 'many'", "integer"]),
            ({"rope_theta": math.nan}, ["rope_theta is nan", "finite"]),
            ({"dropout": 1.0}, ["dropout is 1.0", "less than 1"]),
            ({"depth": 3}, ["depth is 3", "not permitted"]),
        ],
    )
    def test_a_wrong_value_is_one_sentence_with_field_value_and_what_is_allowed(self, wrong, words):
        with pytest.raises(InputError) as raised:
            ModelConfig(**wrong)
        message = str(raised.value)
        assert all(word in message for word in words)
        assert "\n" not in message
        assert message.count("is ") <= 3

    def test_cannot_be_changed_afterwards(self):
        with pytest.raises(ValueError, match="frozen"):
            ModelConfig().d_model = 3

    @given(
        layers=st.integers(1, 3),
        groups=st.integers(1, 3),
        shared=st.integers(1, 3),
        half=st.integers(1, 4),
        ffn=st.integers(1, 40),
        vocab=st.integers(2, 60),
        tied=st.booleans(),
    )
    @settings(max_examples=40, derandomize=True, deadline=None)
    def test_predicts_its_parameters_exactly(self, layers, groups, shared, half, ffn, vocab, tied):
        config = ModelConfig(
            d_model=16,
            num_layers=layers,
            num_heads=groups * shared,
            num_kv_heads=groups,
            head_dim=2 * half,
            ffn_dim=ffn,
            vocab_size=vocab,
            tie_embeddings=tied,
        )
        assert config.num_parameters == sum(parameter.numel() for parameter in Decoder(config).parameters())

    @pytest.mark.parametrize("kv_heads", [2, 4])
    def test_predicts_the_flops_that_pytorch_counts(self, kv_heads):
        from torch.utils.flop_counter import FlopCounterMode

        model, length = decoder(num_kv_heads=kv_heads, parts=Parts(attention=visible_attention)), 20
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens(0, batch=1, length=length))
        config = model.config
        masked_half = 2 * config.num_layers * config.num_heads * length**2 * config.head_dim
        assert counter.get_total_flops() == model.config.forward_flops(length) + masked_half


class TestDecoder:
    @pytest.mark.parametrize(("layers", "d_model"), [(1, 128), (2, 256), (3, 36), (1, 2)])
    def test_ids_become_logits(self, layers, d_model):
        model = create_test_transformer(layers, d_model)
        assert len(model.layers) == layers
        assert model(tokens(0, 2, 7, 1000)).shape == (2, 7, 1000)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_starts_as_good_as_guessing(self, seed):
        torch.manual_seed(seed)
        model, ids = create_test_transformer(4, 128), tokens(seed, 4, 64, 1000)
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(1000), rel=0.05)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_a_token_changes_nothing_before_it_and_everything_after(self, seed, kv_heads):
        model, ids = decoder(seed, num_kv_heads=kv_heads), tokens(seed)
        changed = ids.clone()
        changed[:, 5] = (changed[:, 5] + 1) % 50
        difference = (model(ids) - model(changed)).abs().amax(-1)
        assert (difference[:, :5] == 0).all()
        assert (difference[:, 5:] > 1e-4).all()

    @pytest.mark.parametrize("seed", SEEDS)
    def test_only_distances_matter(self, seed):
        """Two tokens far apart in position, equally far from each other: same queries and keys up to a rotation."""
        block = decoder(seed).layers[0]
        x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(seed))
        table = RotaryEmbedding(8).table(torch.arange(15))
        near, far = block.project(x, table[:6]), block.project(x, table[9:])
        assert not torch.allclose(near[0], far[0], atol=1e-3)
        torch.testing.assert_close(near[0] @ near[1].mT, far[0] @ far[1].mT, atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_fused_and_visible_attention_agree(self, kv_heads):
        ids = tokens(1)
        fused = decoder(3, num_kv_heads=kv_heads)
        visible = decoder(3, num_kv_heads=kv_heads, parts=Parts(attention=visible_attention))
        torch.testing.assert_close(fused(ids), visible(ids), atol=1e-4, rtol=1e-4)

    def test_another_feed_forward_plugs_in(self):
        model = decoder(parts=Parts(feed_forward=lambda config: torch.nn.Linear(config.d_model, config.d_model)))
        assert isinstance(model.layers[1].mlp, torch.nn.Linear)
        assert model(tokens(0)).shape == (2, 12, 50)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_tied_head_is_the_embedding(self, tied):
        model = Decoder(ModelConfig(**SMALL, tie_embeddings=tied))
        assert (model.lm_head.weight is model.embed_tokens.weight) is tied

    def test_dropout_holds_in_training_alone(self):
        model, ids = decoder(dropout=0.5), tokens(0)
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_gradient_checkpointing_changes_no_gradient(self, seed):
        gradients = []
        for checkpointing in (False, True):
            model = decoder(seed, dropout=0.3).train()
            model.gradient_checkpointing = checkpointing
            torch.manual_seed(seed)
            model(tokens(seed)).logsumexp(-1).sum().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, recomputed)

    def test_too_long_a_text_is_one_sentence(self):
        with pytest.raises(InputError, match=r"25 tokens.*holds 24.*shorten it by 1"):
            decoder()(tokens(0, length=25))

    def test_evaluating_puts_the_mode_back_even_after_an_error(self):
        model = decoder().train()

        def fail():
            with evaluating(model):
                assert not model.training
                assert not torch.is_grad_enabled()
                model(tokens(0, length=25))

        with pytest.raises(InputError):
            fail()
        assert model.training
        assert torch.is_grad_enabled()


class DispatchCount(TorchDispatchMode):
    """Counts the operations that reach PyTorch's kernels, views and allocations left out."""

    FREE = (
        *("view", "_unsafe_view", "t", "transpose", "detach", "slice", "select", "split", "split_with_sizes"),
        *("unsqueeze", "expand", "alias", "empty", "empty_like"),
    )

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.total += operation.overloadpacket.__name__ not in self.FREE
        return operation(*args, **kwargs or {})


class TestLaunches:
    """A small batch on a GPU waits for the processor that launches its kernels: their number is its time."""

    def counts(self, layers):
        """Kernels of the forward and the backward pass of a bfloat16 model with float32 adapters everywhere."""
        model = decoder(num_layers=layers, num_kv_heads=2).bfloat16().train()
        inject_lora(model, 4, targets=PROJECTIONS, adapter_dtype=torch.float32)
        with DispatchCount() as forward:
            total = model(tokens(0)).sum()
        with DispatchCount() as backward:
            total.backward()
        return torch.tensor([forward.total, backward.total])

    def test_a_layer_with_adapters_takes_no_more_kernels_than_it_needs(self):
        """Without a fused norm, as on the CPU: 60 and 85; 98 and 138 with each projection on its own."""
        forward, backward = self.counts(3) - self.counts(2)
        assert forward <= 62
        assert backward <= 90

    def test_the_rotation_is_worked_out_once_for_all_layers(self, monkeypatch):
        made, table = [], RotaryEmbedding.table
        monkeypatch.setattr(RotaryEmbedding, "table", lambda *given: made.append(1) or table(*given))
        decoder(num_layers=4)(tokens(0))
        assert len(made) == 1


class TestAttentionMaps:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_are_what_the_layers_attend_with(self, seed):
        """Recorded from inside the forward pass, through an attention function that keeps its weights."""
        from engine.attention import attend
        from engine.masks import causal, materialize

        seen = []

        def recording(query, key, value):
            output, weights = attend(query, key, value, materialize(causal, query.shape[-2]))
            seen.append(weights)
            return output

        model = decoder(seed, num_kv_heads=2, parts=Parts(attention=recording))
        ids = tokens(seed)
        model(ids)
        expected = torch.stack(seen)
        maps = model.attention_maps(ids)
        assert maps.shape == (2, 2, 4, 12, 12)
        torch.testing.assert_close(maps, expected)

    def test_leave_a_training_model_in_training(self):
        model = decoder(dropout=0.5).train()
        assert torch.equal(model.attention_maps(tokens(0)), model.attention_maps(tokens(0)))
        assert model.training


class TestCache:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 7], [3, 1, 6, 2]])
    @pytest.mark.parametrize("attention", [None, visible_attention])
    def test_text_in_pieces_has_the_logits_of_the_whole(self, seed, pieces, attention):
        model = decoder(seed, num_kv_heads=2, parts=None if attention is None else Parts(attention=attention))
        ids, cache = tokens(seed), KVCache(model, 2, 12)
        with evaluating(model):
            logits = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
            torch.testing.assert_close(logits, model(ids), atol=1e-4, rtol=1e-4)
        assert cache.length == 12

    @pytest.mark.parametrize("last", [1, 4])
    def test_beyond_its_capacity_is_one_sentence_and_changes_nothing(self, last):
        model, ids = decoder(), tokens(0)
        cache, start = KVCache(model, len(ids), 6), 7 - last
        with torch.no_grad():
            model(ids[:, :start], cache)
            with pytest.raises(InputError, match="The cache holds 6 tokens, 7 are given"):
                model(ids[:, start:7], cache)
        assert cache.length == start

    def test_beyond_the_context_is_one_sentence(self):
        model = decoder()
        with pytest.raises(InputError, match="25 tokens"):
            KVCache(model, 1, 25)
        cache = KVCache(model, 1, 24)
        with evaluating(model):
            model(tokens(0, 1, 20), cache)
            with pytest.raises(InputError, match="25 tokens"):
                model(tokens(0, 1, 5), cache)


class TestLlama:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 16}, {"rope_theta": 500.0}])
    def test_its_weights_give_its_logits(self, seed, tied, changes):
        theirs = transformers_llama(seed, tie_word_embeddings=tied, **changes)
        ours, ids = llama.from_transformers(theirs), tokens(seed, length=40)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)

    def test_the_weights_are_a_copy(self):
        theirs = transformers_llama()
        ours = llama.from_transformers(theirs)
        before = ours(tokens(0))
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.zero_()
        assert torch.equal(ours(tokens(0)), before)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_saved_one_is_read_without_transformers(self, tmp_path, tied):
        theirs = transformers_llama(tie_word_embeddings=tied)
        theirs.save_pretrained(tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(llama.read(tmp_path)(tokens(0)), theirs(tokens(0)).logits, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("tied", [True, False])
    def test_ours_is_opened_by_transformers(self, tmp_path, tied):
        tokenizer = train_tokenizer(CORPUS, 300, max_tokens=24)
        ours = decoder(num_kv_heads=2, head_dim=6, vocab_size=300, rope_theta=300.0, tie_embeddings=tied)
        llama.write(ours, tokenizer, tmp_path, torch.float32)
        theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(0, vocab=300)
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
        assert torch.equal(llama.read(tmp_path)(ids), ours(ids))
        opened = AutoTokenizer.from_pretrained(tmp_path)
        assert opened(CORPUS).input_ids == tokenizer(CORPUS).input_ids
        assert (opened.model_max_length, theirs.config.eos_token_id) == (24, opened.eos_token_id)

    def test_a_tied_head_is_stored_once_and_in_half_precision(self, tmp_path):
        ours = decoder(vocab_size=300)
        llama.write(ours, train_tokenizer(CORPUS, 300), tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert sum(weight.numel() for weight in stored.values()) == ours.config.num_parameters
        assert {weight.dtype for weight in stored.values()} == {torch.float16}
        for name, weight in llama.read(tmp_path).named_parameters():
            torch.testing.assert_close(weight, ours.get_parameter(name), atol=1e-7, rtol=2**-11)

    def test_a_weight_that_float16_cannot_hold_is_one_sentence(self, tmp_path):
        ours = decoder(vocab_size=300)
        with torch.no_grad():
            ours.norm.weight[0] = 1e6
        with pytest.raises(InputError, match=r"norm\.weight .* float16"):
            llama.write(ours, train_tokenizer(CORPUS, 300), tmp_path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"attention_bias": True}, "attention_bias True"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
            ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
        ],
    )
    def test_what_we_lack_is_one_sentence(self, changes, words):
        with pytest.raises(InputError, match=words):
            llama.from_transformers(transformers_llama(**changes))

    def test_another_architecture_is_one_sentence(self):
        other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50))
        with pytest.raises(InputError, match="model_type 'gpt2'"):
            llama.from_transformers(other)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ('{"model_type": "llama"}', "does not say its num_attention_heads, hidden_size"),
            ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
            ("[1]", "describes no model"),
        ],
    )
    def test_a_config_that_says_too_little_is_one_sentence(self, tmp_path, config, words):
        transformers_llama().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(InputError, match=words):
            llama.read(tmp_path)

    def test_missing_damaged_and_foreign_files_are_one_sentence(self, tmp_path):
        with pytest.raises(InputError, match=r"no config\.json"):
            llama.read(tmp_path)
        transformers_llama().save_pretrained(tmp_path)
        weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="damaged or incomplete"):
            llama.read(tmp_path)
        save_file({"model.norm.weight": torch.ones(32)}, weights)
        with pytest.raises(InputError, match=r"embed_tokens\.weight is missing, it should be 50×32"):
            llama.read(tmp_path)
        weights.write_bytes(whole)
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 51}))
        with pytest.raises(InputError, match="is 50×32, it should be 51×32"):
            llama.read(tmp_path)
        weights.unlink()
        with pytest.raises(InputError, match=r"no model\.safetensors"):
            llama.read(tmp_path)

    @pytest.mark.slow
    def test_smollm2_runs_in_our_own_code(self):
        from engine import pretrained

        theirs = pretrained.load("smollm2-135m")
        ids = torch.tensor([theirs.encode("When Mary and John went to the store, John gave a drink to")])
        with torch.no_grad():
            torch.testing.assert_close(
                llama.from_transformers(theirs.model)(ids), theirs.model(ids).logits, atol=1e-4, rtol=0
            )

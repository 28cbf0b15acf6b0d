"""Four shipped tasks: as large as each other, tested on what is never trained on, and with answers that are right."""

import subprocess
import sys

import pytest

from engine.moe.tasks import Task, read_tasks

TASKS = {task.name: task for task in read_tasks()}


@pytest.fixture(params=TASKS)
def task(request) -> Task:
    return TASKS[request.param]


def test_there_are_four_of_one_size():
    assert len(TASKS) == 4
    assert {len(task.training) for task in TASKS.values()} == {48}
    assert {len(task.held_out) for task in TASKS.values()} == {16}


def test_what_is_tested_is_never_trained_on_and_nothing_is_asked_twice(task):
    asked = [question for question, _ in task.training + task.held_out]
    assert len(set(asked)) == len(asked)


def test_no_question_is_asked_in_two_tasks():
    asked = [question for task in TASKS.values() for question, _ in task.training + task.held_out]
    assert len(set(asked)) == len(asked)


def test_lessons_are_plain_and_say_what_they_are_about(task):
    assert task.about.endswith(".")
    for question, answer in task.training + task.held_out:
        assert "{" not in question
        assert question == question.strip()
        assert answer
        assert answer == answer.strip()
        assert not answer.endswith(".")


def who(question):
    """The only name in a question."""
    (name,) = [word for word in question.replace("?", "").split() if word[0].isupper() and word[:2] != "Wh"]
    return name


def test_pets_are_asked_about_in_a_new_wording_and_answered_alike():
    known = {(who(question), answer) for question, answer in TASKS["Pets"].training}
    assert len(known) == 16
    assert {(who(question), answer) for question, answer in TASKS["Pets"].held_out} == known


def test_plurals_are_tested_with_words_of_their_own():
    trained, asked = ({question.split()[3] for question, _ in part} for part in
                      (TASKS["Plurals"].training, TASKS["Plurals"].held_out))  # fmt: skip
    assert not trained & asked


def test_backwards_turns_two_words_round_and_never_gives_an_answer_away():
    task = TASKS["Backwards"]
    trained = {question.removeprefix("Turn it round: ").removesuffix(" becomes") for question, _ in task.training}
    for question, answer in task.training + task.held_out:
        first, second = question.split()[-3:-1]
        assert answer == f"{second} {first}"
        assert answer not in trained or answer == f"{first} {second}"
    for question, answer in task.held_out:
        assert " ".join(question.split()[-3:-1]) not in trained
        assert answer not in trained


def test_opposites_are_opposites_both_ways():
    pairs = {question.split()[-1 - 1]: answer for question, answer in TASKS["Opposites"].training[:16]}
    assert all(pairs[answer] == word for word, answer in pairs.items())


def test_the_storyteller_reads_every_lesson_and_has_no_filler_in_it():
    from engine import pretrained
    from engine.experiments._moe_lora import _LONGEST
    from engine.experiments._on_workers.moe_lora_training import FILLER
    from engine.finetuning.lessons import Lessons

    base = pretrained.load("storyteller")
    for task in TASKS.values():
        for pair in task.training + task.held_out:
            ids = Lessons([pair], base.tokenizer, base.max_tokens).ids[0]
            assert FILLER not in ids
            assert len(ids) <= _LONGEST


def test_needs_no_torch():
    code = "import sys, engine.moe.tasks; engine.moe.tasks.read_tasks(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

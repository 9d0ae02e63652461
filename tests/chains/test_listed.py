"""Replies as language models write them."""

import json

import pytest

from steerable.chains.listed import listed_tasks

A = "A farmer has 12 sheep and sells 5. How many are left?"
B = 'If "all cats are grey", what colour is Tom the cat?'
C = "Three boxes stand in a row.\nWhich one is heaviest, if the left one is lighter than the others?"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([A, B, C]),
        json.dumps([A, B, C], indent=2) + "\n\nLet me know if you need more!",
        "Sure! Here are 3 tasks:\n\n```json\n" + json.dumps([A, B, C], indent=1) + "\n```\nEnjoy.",
        "```\n" + json.dumps([A, B, C]),  # the fence is not closed
        "<think>1. an idea\n2. another</think>" + json.dumps([A, B, C]),
        json.dumps({"tasks": [A, B, C]}),
        json.dumps({"category": "Verbal Logic", "tasks": [{"id": i, "Prompt": t} for i, t in enumerate([A, B, C])]}),
        json.dumps([{"question": t, "answer": "7 sheep remain"} for t in (A, B, C)]),
        "\n".join(json.dumps({"task": t}) for t in (A, B, C)),
        json.dumps([A, B, C])[:-1] + ",]",
        json.dumps([A, B, C])[:-1] + ', "A fourth one that is cut o',
        f"Here you are:\n1. {A}\n2. {B}\n3. {C}\n\nI hope these help!",
        f"1) {A}\n\n2) {B}\n\n3) {C}\n\nThese tasks differ in difficulty.",
        f"**1.** {A}\n**2.** {B}\n**3.** {C}",
        f"**Task 1:** {A}\n\n**Task 2:** {B}\n\n**Task 3:** {C}",
        f"### Task 1\n{A}\n\n### Task 2\n{B}\n\n### Task 3\n{C}",
        f"1. {A}\n   **Answer:** 7\n2. {B}\n   Answer: grey\n3. {C}\n   Solution: the right one",
        f'1. "{A}"\n2. **{B}**\n3. {C}',
        f"- {A}\n- {B}\n- {C}",
        f"21. {A}\n22. {B}\n23. {C}",
        f"Question: 3 tasks follow.\n\n1. {A}\r\n2. {B}\r\n3. {C}",
    ],
)
def test_all_three_tasks_are_found(text):
    found = [" ".join(task.split()) for task in listed_tasks(text)]
    assert found == [" ".join(task.split()) for task in (A, B, C)]


def test_a_list_inside_a_task_belongs_to_it():
    inner = "Order these:\n   1. a lake\n   2. a sea\n   3. a pond"
    assert listed_tasks(f"1. {inner}\n2. {A}") == [inner, A]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sorry, but I can't help with that.",
        "{}",
        "[]",
        "[1, 2]",
        '["',
        "```json\n```",
        "<think>never closed 1. x",
    ],
)
def test_what_is_no_list_gives_nothing(text):
    assert listed_tasks(text) == []

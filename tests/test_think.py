"""Think tags of every kind against loops over text, in pieces, in batches, under padding."""

import pytest

from steerable.errors import UsageError
from steerable.think import ThinkTags, think_tags


def test_one_token_each(tokenizer):
    assert think_tags(tokenizer) == ThinkTags((1,), (2,), opened_by_template=True)


def test_no_think_block():
    class Without:
        name_or_path = "plain"

        def get_vocab(self):
            return {"<think>": 0}

    with pytest.raises(UsageError, match="'plain' has no think block"):
        think_tags(Without())

import pytest
from vector_files import direction_of, vectors


@pytest.fixture
def direction():
    return direction_of(vectors(1, 2, 3), model_id="org/model", behaviour="backtracking", method="difference of means")

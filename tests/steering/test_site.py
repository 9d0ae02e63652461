import numpy as np
import pytest

from steerable.steering.site import Site, parse_layers
from steerable.store.errors import UsageError


def test_text_round_trip():
    for site in (Site("resid_post", 0), Site("mlp_out", 31), Site("head_in", np.int64(7))):
        assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "text",
    ["resid_post", "resid_post.", "resid_post.-1", "resid_post.01", "resid_post.1.5", "a.1", f"mlp_out.{'9' * 5000}"],
)
def test_one_site_has_one_text(text):
    with pytest.raises(UsageError, match="not a site|unknown site"):
        Site.parse(text)


@pytest.mark.parametrize("layer", [-1, 1.5, "1", None])
def test_bad_layers(layer):
    with pytest.raises(UsageError, match="layer"):
        Site("resid_post", layer)


def test_layers_of_a_command():
    assert parse_layers("2, 3") == [2, 3] and parse_layers(None) is None
    for text in ("", "2,,3", "-1", "1.5", "9" * 5000):
        with pytest.raises(UsageError, match="--layers"):
            parse_layers(text)

import numpy as np
import pytest

from jgrpo.core.shaping import overlong_penalty
from model_port.errors import UserError


def test_by_hand():
    # Lmax 20, Lc 5: nothing up to 15, then 1/5 per token; at the limit it does not matter whether the last is an end.
    lengths = np.array([[1, 15, 16], [18, 19, 20]])
    expected = np.array([[0, 0, -0.2], [-0.6, -0.8, -1.0]])
    np.testing.assert_allclose(overlong_penalty(lengths, limit=20, buffer=5), expected, rtol=1e-12)
    np.testing.assert_allclose(overlong_penalty(lengths, limit=20, buffer=5, penalty=0.5), expected / 2, rtol=1e-12)


def test_a_buffer_of_the_whole_length_penalises_every_token():
    np.testing.assert_allclose(overlong_penalty(np.array([[1, 4]]), limit=4, buffer=4), [[-0.25, -1.0]])


@pytest.mark.parametrize("buffer", [0, 5])
def test_a_buffer_must_fit(buffer):
    with pytest.raises(UserError, match=f"the overlong buffer is {buffer} tokens; it must lie between 1 and"):
        overlong_penalty(np.array([[1]]), limit=4, buffer=buffer)

import numpy as np

from resolvent.serving.prefix_cache import PrefixCache, block_keys
from tests.models.small import PHASE2, tokens


def test_keys_name_whole_prefixes():
    ids = np.arange(100)
    keys = block_keys(ids, 10)
    assert len(keys) == 9  # the tenth block is complete, but the last token has to be read
    assert len(block_keys(np.arange(101), 10)) == 10
    assert len(set(keys)) == 9
    changed = ids.copy()
    changed[25] = 7
    other = block_keys(changed, 10)
    assert other[:2] == keys[:2]
    assert not set(other[2:]) & set(keys)
    assert block_keys(np.arange(10), 10) == []


def test_cache_has_a_limit_and_drops_the_least_recently_used():
    _, state = PHASE2.model()(tokens(5, batch=1), return_state=True)
    cache = PrefixCache(3 * state.nbytes)
    for key in (b"a", b"b", b"c"):
        cache.store(key, state)
    assert cache.find([b"a"]) == (1, state)
    cache.store(b"d", state)
    assert len(cache) == 3 and cache.nbytes == 3 * state.nbytes
    assert cache.find([b"b"]) == (0, None)
    assert cache.find([b"a", b"b", b"c", b"x"])[0] == 3


def test_state_beyond_the_limit_is_not_kept():
    _, state = PHASE2.model()(tokens(5, batch=1), return_state=True)
    cache = PrefixCache(state.nbytes - 1)
    cache.store(b"a", state)
    assert len(cache) == cache.nbytes == 0

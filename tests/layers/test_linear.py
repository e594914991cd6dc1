from torch import nn

from resolvent.layers.linear import is_plain


class Wrapped(nn.Linear):
    pass


def test_a_linear_map_is_plain_until_something_acts_on_its_calls():
    plain, pre, post, backward, replaced = (nn.Linear(3, 2) for _ in range(5))
    backward.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    pre.register_forward_pre_hook(lambda module, args: None)
    handle = post.register_forward_hook(lambda module, args, output: None)
    replaced.forward = lambda x: x  # as Accelerate hooks into a module
    assert is_plain(plain)
    assert not any(map(is_plain, (pre, post, backward, replaced, Wrapped(3, 2), nn.Identity())))
    handle.remove()
    assert is_plain(post)

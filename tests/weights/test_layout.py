"""The names and shapes of GPT-2's tensors."""

from gpt2fast.model import GPT
from gpt2fast.ops import OpsConfig, build
from gpt2fast.weights import layout
from tests.tools.foreign_files import CONFIG


def test_the_layout_is_the_models():
    model = GPT(CONFIG, build(OpsConfig()))
    assert layout.shapes(CONFIG) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(layout.shapes(CONFIG)) == list(model.state_dict())

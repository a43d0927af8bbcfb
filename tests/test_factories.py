"""No tensor of the package takes its dtype or its device from torch's global defaults.

``torch.set_default_dtype`` and ``torch.set_default_device`` are the user's: what is collected and analysed
does not depend on them. This is the lint; ``tests/instrument/test_torch_state.py`` checks the numbers.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fisherscope"

# what makes a tensor out of no other tensor
FACTORIES = frozenset(
    {"arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "from_file", "full"}
    | {"linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor"}
    | {"sparse_bsc_tensor", "sparse_bsr_tensor", "sparse_compressed_tensor", "sparse_coo_tensor"}
    | {"sparse_csc_tensor", "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}
    | {"bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"}
)
# these know no dtype but the default one, or none that can be given
FORBIDDEN = frozenset({"normal", "Tensor", "get_default_dtype", "set_default_dtype", "set_default_device"})
# the one file that sets the defaults aside while a model runs
SETS_DEFAULTS = "torch_state.py"
NO_LAYERS = frozenset({"Module", "Parameter", "Buffer", "UninitializedParameter"})


def careless_calls(source, *, may_set_defaults=False):
    """Calls that leave the dtype or the device of a new tensor to torch's defaults, as ``line: what``."""
    tree = ast.parse(source)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            taken = sorted(FACTORIES.intersection(alias.name for alias in node.names))
            yield from (f"{node.lineno}: {name} without its module" for name in taken)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch" and id(node) not in called:
            # a factory that is handed on is called where nobody sees what it is given
            yield from [f"{node.lineno}: torch.{node.attr} uncalled"] * (node.attr in FACTORIES)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        given = {keyword.arg for keyword in node.keywords}
        if owner == "torch" and name in FORBIDDEN and not may_set_defaults:
            yield f"{node.lineno}: torch.{name}"
        elif owner == "torch" and name in FACTORIES:
            yield from (
                f"{node.lineno}: torch.{name} without {k}" for k in ("dtype", "device") if k not in given
            )
        elif owner in {"nn", "torch.nn"} and name[0].isupper() and name not in NO_LAYERS:
            yield from (
                f"{node.lineno}: nn.{name} without {k}" for k in ("dtype", "device") if k not in given
            )


def test_every_new_tensor_is_given_its_dtype_and_device():
    """No call in the package takes dtype or device from torch's defaults, which are the user's."""
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{call}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for call in careless_calls(
            path.read_text(encoding="utf-8"), may_set_defaults=path.name == SETS_DEFAULTS
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch.zeros(3)", 2),
        ("torch.zeros(3, device=x.device)", 1),
        ("torch.arange(3, dtype=torch.long)", 1),
        ("torch.tensor([1.0], dtype=torch.float32, device='cpu')", 0),
        ("torch.zeros_like(x)", 0),
        ("x.new_zeros(3)", 0),
        ("torch.from_numpy(x)", 0),
        ("torch.Tensor([1.0])", 1),
        ("torch.set_default_dtype(torch.float32)", 1),
        ("nn.Linear(3, 4, bias=False)", 2),
        ("nn.Parameter(x)", 0),
        ("make = torch.zeros if there else torch.empty", 2),
        ("from torch import Tensor, zeros", 1),
    ],
)
def test_a_planted_call_is_found(line, found):
    """The check can fail: each way of leaving dtype or device to the defaults."""
    assert len(list(careless_calls(line))) == found

"""The worked examples of the documentation run as they stand, and do what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ARCHITECTURE = """
assert len(scope.layout.attention) == 2
"""

LAYER_BEFORE = """
import torch

class Gain(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.gain * x
"""

LAYER_AFTER = """
from fisherscope.instrument.rules import LayerCall, find_rule

torch.manual_seed(0)
layer, x, weight = Gain(5), torch.randn(3, 4, 5), torch.randn(3, 4, 5)
rule = find_rule(layer)
assert rule.handles == ("gain",)
fast = rule.gradients(layer, LayerCall(x, weight), frozenset({"gain"}))["gain"].dense()
for i in range(3):
    (slow,) = torch.autograd.grad((layer(x[i]) * weight[i]).sum(), layer.gain)
    torch.testing.assert_close(fast[i], slow)
"""

QUANTITY = """
import sys
from tests import models

scope = fs.wrap(models.build(models.named("llama")))
extensions = ("fisher", "sample_gradients", "gradient_norm")
store = scope.collect({"a": models.rows(4)}, sys.argv[1], extensions=extensions, batch_size=2, quiet=True)
parameter = store.gradient_parameters[0]
found = store.aggregate("a", "gradient_norm/" + parameter)
expected = store.gradients("a", parameter).flatten(1).norm(dim=1).sum()
torch.testing.assert_close(found.float(), expected.reshape(1), rtol=1e-2, atol=0)
"""

ANALYSIS = """
from fisherscope.analyses import run

outcome = run(store, ["losses"])["losses"]
assert outcome.frame["task"].tolist() == ["a"], outcome
assert outcome.summary() == "1 tasks; the hardest is a."
assert outcome.to_json()["tables"]["losses"]["total"] == 1
"""


COLLECTING = """
import torch

assert {*store.tasks} == {"math", "code", "math_flipped"}
assert found[parameter].shape == (2, *model.get_parameter(parameter).shape)
stores = {"run", "smoothed", "warmer", "labels", "chosen", "grown", "ranks", "small"}
stores |= {"checkpointed", "rounded"}
grown = fs.open_store("grown.fs")
assert [grown.committed(task) for task in grown.tasks] == [16, 16]
assert {path.name for path in Path().iterdir()} == {f"{name}.fs" for name in stores}
first, again = fs.open_store("run.fs"), fs.open_store("checkpointed.fs")
torch.testing.assert_close(again.fisher("math", parameter), first.fisher("math", parameter))
"""


def example(page, title):
    """The python block under a heading of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.split(rf"^#+ {title}\n", text, flags=re.MULTILINE)[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_worked_examples(tmp_path):
    """An entry that is registered as the page shows takes part; in a process of its own."""
    parts = [
        example("adapters.md", "Support a new architecture"),
        ARCHITECTURE,
        LAYER_BEFORE,
        example("architecture.md", "A layer type"),
        LAYER_AFTER,
        example("architecture.md", "A quantity"),
        QUANTITY,
        example("architecture.md", "An analysis"),
        ANALYSIS,
    ]
    command = [sys.executable, "-W", "error", "-c", "\n".join(parts), str(tmp_path / "run.fs")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_page_on_collecting(tmp_path):
    """Its code runs from top to bottom on the demo model, and every store that it makes is there."""
    text = (ROOT / "docs" / "collection.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 8
    code = "\n".join(["from pathlib import Path", *blocks, COLLECTING])
    # the name that all supported releases of transformers have
    ignored = ["-W", "ignore:`gradient_checkpointing_"]
    command = [sys.executable, "-W", "error", *ignored, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr

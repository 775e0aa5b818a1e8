"""The README's table of layers is what the layers say of themselves."""

from pathlib import Path

import pytest
import torch

import rnnkernels
from rnnkernels import features, ops
from rnnkernels.__main__ import main

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture(scope="module")
def rows():
    return {row.layer: row for row in features.features()}


def test_the_readme_has_the_table(tmp_path):
    if "avx512" not in ops.build_info()["isas"]:
        pytest.skip("the table in the README is that of an x86 build")
    page = tmp_path / "README.md"
    page.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["features", "--write", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == README.read_text(encoding="utf-8"), "run: python -m rnnkernels features --write README.md"
    assert "not yet run on a GPU" in features.markdown()


def test_every_cell_is_some_layers(rows):
    # That a projection goes on any page is shown by the smallest one, which torch.nn's grammar gives no layer; tangents are derivatives'.
    others = {"srn_tanh_projected_proj_clip", *(cell for cell in ops.heats() if cell.endswith("_tangent"))}
    assert {cell for row in rows.values() for cell in row.cells} == set(ops.heats()) - others


def test_what_a_row_says(rows):
    lstm, dreamer = rows["LSTM"], rows["DreamerGRU"]
    assert lstm.step == "LSTMCell"
    assert "Gers 2000" in lstm.source
    assert lstm.takes["proj_size"] is lstm.takes["zoneout"] is False
    assert rows["CoupledLSTM"].takes["zoneout"] is True
    assert {"lengths", "stream"} <= set(lstm.calls)
    assert dreamer.step == "DreamerGRUCell"
    assert not {"proj_size", "layer_norm"} & dreamer.takes.keys()
    assert "stream" not in rows["SCRN"].calls


@pytest.mark.parametrize(("layer", "why"), [("GRUResetBefore", "two products by U"), ("DreamerGRU", "normalises what U gives already")])
def test_a_norm_that_cannot_be_is_refused(layer, why):
    with pytest.raises(ValueError, match=why):
        getattr(rnnkernels, layer)(3, 5, layer_norm="gates")


def test_an_unknown_kind_of_option_is_named():
    class Strange(torch.nn.Module):
        def __init__(self, *, colour: str = "red") -> None:
            super().__init__()

    with pytest.raises(LookupError, match="colour"):
        features.value_for(features.keywords(Strange)["colour"])

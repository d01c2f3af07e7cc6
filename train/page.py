"""The page of `inspect`: one HTML file, its pictures inside, for a browser without network; scripts are a comfort only."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #333; background: #fff;
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.5rem }
figure { margin: 1rem 0; overflow-x: auto } figcaption { color: #555; font-size: .92rem }
img { width: 100%; min-width: 36rem; height: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
tbody th { font-weight: normal }
th, td { padding: .2rem .45rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
thead th { vertical-align: bottom; border-bottom: 2px solid #999 }
nav button { font: inherit; margin: 0 .3rem .3rem 0; padding: .1rem .7rem; border: 1px solid #999; border-radius: 4px }
nav button { background: #fff; cursor: pointer } nav button[aria-pressed=true] { background: #004488; color: #fff }
code { font-size: .92em }
"""

# Without it, the layers' pictures stand one below the other.
SCRIPT = """
const figures = [...document.querySelectorAll("#layers figure")], nav = document.createElement("nav");
function show(shown) {
  figures.forEach((figure, layer) => { figure.hidden = layer !== shown; });
  [...nav.children].forEach((button, layer) => { button.setAttribute("aria-pressed", layer === shown); });
}
figures.forEach((figure, layer) => {
  const button = document.createElement("button");
  button.textContent = "layer " + layer;
  button.onclick = () => show(layer);
  nav.append(button);
});
if (figures.length > 1) { document.getElementById("layers").prepend(nav); show(0); }
"""

COVERED = ("mass<br>covered", "lowest<br>head", "highest<br>head", "best<br>blocks")

CAPTIONS = {
    "selected_blocks": (
        "Selected blocks of all layers",
        "A row is a query, a column a block of keys; the colour counts the key/value heads that chose it.",
    ),
    "gates": (
        "Gates over depth",
        "The mean gate of each branch over the text: lines are means of the heads, dots the heads.",
    ),
    "unions": (
        "Overlap of neighbours' choices",
        "Different blocks that 2, 4, 8 or 16 adjacent queries of a key/value head read together. The fewer they are, the "
        "faster the selected kernel, which reads a block once for several queries. The dashed line is what one query reads, "
        "and what all would if they chose alike.",
    ),
    "coverage": (
        "Full attention's mass in the selected blocks",
        "The softmax of the selected branch's queries over all its keys up to the query: how much of it lies in the blocks "
        "that the query reads. Dashed, how much the same number of the best blocks would hold; dotted, the share of the tokens "
        "that the blocks are, which a choice at random would cover. Thin lines are the layers, dark to light.",
    ),
}


def write_inspection(
    path: Path, found: Mapping[str, Any], figures: Sequence[Path], layer_figures: Sequence[Path]
) -> Path:
    """Write the page of what `train.inspection` found; the pictures are read from their files."""
    nsa, layers = found["nsa"], found["layers"]
    sizes = (
        f"blocks of {nsa['select_block']} tokens, {nsa['num_selected']} of them read by a query "
        f"(the first {nsa['num_initial']} and the last {nsa['num_local']} always), window {nsa['window']}, "
        f"compression of {nsa['compress_block']} tokens every {nsa['compress_stride']}"
    )
    if found["queries_that_choose"]:
        chooses = (
            f"{found['queries_that_choose']} of the {found['tokens']} queries, from position {found['first_that_chooses']} "
            f"on, have more blocks before them than they read, and so have to choose. They read "
            f"{_share(found['share_read'])} of the tokens up to them."
        )
    else:
        chooses = (
            f"No query has to choose: the text has {found['tokens']} tokens, and before position "
            f"{found['first_that_chooses']} a query reads all of its blocks."
        )
    title = f"What the attention of {html.escape(Path(found['run']).resolve().name)} reads"
    beyond = " (more than the context that it was trained with)" if found["tokens"] > found["context"] else ""
    parts = [
        f"<h1>{title}</h1>",
        f"<p>The first {found['tokens']} tokens{beyond} of {html.escape(found['text'])}, read by the model in "
        f"<code>{html.escape(found['run'])}</code> at step {found['step']}, which was trained with a context of "
        f"{found['context']}: {sizes}. {chooses}</p>",
        "<h2>Numbers</h2>",
        _table(_layer_rows(layers)),
        "<p>Gates and coverage are means over the heads, overlap over the key/value heads; coverage is that of the queries "
        "that have to choose. The file <code>inspect.json</code> has each head, and coverage by position.</p>",
        "<details><summary>Each key/value head</summary>",
        _table(_head_rows(layers)),
        "</details>",
    ]
    for figure in figures:
        title, caption = CAPTIONS[figure.stem]
        parts += [f"<h2>{title}</h2>", _figure(figure, title, caption)]
        if figure.stem == "selected_blocks":
            parts += [
                "<h2>Selected blocks of each head</h2>",
                "<p>Dark: chosen by score. Pale: read by every query.</p>",
                '<div id="layers">',
                *(_figure(each, f"Selected blocks of layer {layer}") for layer, each in enumerate(layer_figures)),
                "</div>",
            ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}<title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    gates, counts = [*layers[0]["gates"]], [*layers[0]["mean_union"]]
    rows = [["layer", *(f"gate,<br>{name}" for name in gates), *(f"blocks of<br>{count} queries" for count in counts)]]
    rows[0] += [*COVERED]
    for layer in layers:
        covered, best = layer["covered"], layer["best"]
        rows.append(
            [
                str(layer["layer"]),
                *(f"{_mean(layer['gates'][name]):.2f}" for name in gates),
                *(_number(layer["mean_union"][count]) for count in counts),
                *(_share(each) for each in (covered, covered and min(covered), covered and max(covered), best)),
            ]
        )
    return rows


def _head_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    counts = [*layers[0]["mean_union"]]
    rows = [["layer", "K/V head", *(f"blocks of<br>{count} queries" for count in counts)]]
    rows[0] += [*COVERED]
    num_heads = len(layers[0]["gates"]["selected"])
    kv_heads = layers[0]["num_kv_heads"]
    group = num_heads // kv_heads
    for layer in layers:
        for head in range(kv_heads):
            mine = slice(head * group, (head + 1) * group)
            unions = [layer["mean_union"][count] for count in counts]
            covered = layer["covered"] and layer["covered"][mine]
            rows.append(
                [
                    str(layer["layer"]),
                    str(head),
                    *(_number(each and each[head : head + 1]) for each in unions),
                    *(_share(each) for each in (covered, covered and min(covered), covered and max(covered))),
                    _share(layer["best"] and layer["best"][mine]),
                ]
            )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for name, *row in body
    ]
    names = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return f"<table><thead><tr>{names}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


def _figure(path: Path, title: str, caption: str = "") -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(values: Sequence[float] | None) -> str:
    """The mean; a dash where the text is too short for it."""
    return f"{_mean(values):.1f}" if values else "–"


def _share(values: Sequence[float] | float | None) -> str:
    if values is None:
        return "–"
    return f"{values if isinstance(values, float) else _mean(values):.1%}"

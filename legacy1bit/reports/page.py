"""An HTML page and its parts: one file with everything in it, which fetches nothing.

The parts (``table``, ``figure``, ``section``, ``page``) take plain data and escape it. A page needs
no script, and fits a telephone.
"""

import html
from collections.abc import Sequence
from typing import Any

from legacy1bit.reports.figures import Panel, draw, inline_svg
from legacy1bit.reports.records import printable
from legacy1bit.version import __version__

_CSS = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1f2023; --soft: #5c6068;
  --grid: #d9dade; --card: #f5f6f8; --link: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --ink: #e6e7ea; --soft: #a4a8b0;
  --grid: #3a3e46; --card: #202329; --link: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 72rem; background: var(--back);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2.4rem 0 .8rem; font-size: 1.15rem; border-bottom: 1px solid var(--grid); }
p { margin: .5rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
.tiles { display: grid; gap: .6rem; margin: 1.2rem 0 0; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.tiles div { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.figures { display: grid; gap: 1.2rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.samples { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { overflow-wrap: normal; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
pre { margin: .2rem 0 0; padding: .6rem .8rem; background: var(--card); border-radius: .5rem;
  font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--link); }
"""

# Nothing may be fetched, whatever a page says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def escape(text: str) -> str:
    """Return a text as HTML, with its line breaks and a visible stand-in for control characters."""
    return html.escape("\n".join(map(printable, text.split("\n"))))


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """Return a whole page.

    Parameters
    ----------
    title, lead : str
        Plain text: the heading, and a sentence below it.
    sections : sequence of str
        HTML, as the functions below return it.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="legacy1bit {__version__}">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(lead)}</p></header>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a section of a page: a heading, plain text, and parts, HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str) -> str:
    """Return a remark, plain text."""
    return f'<p class="soft">{escape(text)}</p>'


def tiles(numbers: dict[str, str]) -> str:
    """Return a few numbers in large type, with their names."""
    pairs = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in numbers.items())
    return f'<dl class="tiles">{"".join(pairs)}</dl>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return a table of plain text.

    Parameters
    ----------
    caption : str
        Empty: none.
    head : sequence of str
    rows : sequence of sequences of str
        A cell for each column of the head.
    words : int
        The number of leading columns that hold words; the others hold numbers.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ["" if i < words else ' class="number"' for i in range(len(cells))]
        pairs = zip(kinds, cells, strict=True)
        return f"<tr>{''.join(f'<{tag}{kind}>{escape(c)}</{tag}>' for kind, c in pairs)}</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll"><table>{title}<thead>{line("th", head)}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(panels: Sequence[Panel], name: str, title: str) -> str:
    """Return a figure of panels, one below another.

    Parameters
    ----------
    panels : sequence of Panel
    name : str
        Of letters, unique on its page.
    title : str
        The text that screen readers read.
    """
    return f"<figure>{inline_svg(draw(panels, 1), name, title)}</figure>"


def side_by_side(parts: Sequence[str], kind: str = "figures") -> str:
    """Return parts beside each other, as many as the window is wide enough for."""
    return f'<div class="{kind}">\n' + "\n".join(parts) + "\n</div>"


def quotation(caption: str, text: str) -> str:
    """Return a text with its line breaks, and a caption."""
    return f"<figure><figcaption>{escape(caption)}</figcaption><pre>{escape(text)}</pre></figure>"


def folded(title: str, *parts: str) -> str:
    """Return parts that are hidden until the title is clicked."""
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def some(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]

"""The page's style sheet. Colours are named once, for light and for dark."""

from __future__ import annotations

STYLE = """
:root { --paper: #fff; --ink: #222; --faint: #5c5c5c; --grid: #e6e6e6; --edge: #bbb; --panel: #f6f6f4; --alarm: #b3261e;
  --warning: #8a5a00; --good: #00603f; --c0: #0072b2; --c1: #c04a00; --c2: #00735a; --c3: #8a3c8c; --c4: #7a6000;
  --c5: #b0308a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e8e8e6; --faint: #a8a8a6; --grid: #30343a; --edge: #565c66; --panel: #1f2228;
    --alarm: #ff8a80; --warning: #ffc46b; --good: #7fd8b0; --c0: #63b3ed; --c1: #ff9a5c; --c2: #5fd1b0; --c3: #d79ae0;
    --c4: #d9c25a; --c5: #f08ccf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.6em 0 .5em; overflow-wrap: anywhere; }
h1 { margin-top: .4em; } h2 { border-top: 1px solid var(--edge); padding-top: 1em; }
h4 { font-size: 1rem; }
p { margin: .35em 0; }
.about, .evidence, .note { color: var(--faint); }
.evidence, .note, figcaption, table, summary, pre { font-size: .9rem; }
.good { color: var(--good); font-weight: 600; }
article { background: var(--panel); border-left: 4px solid var(--edge); padding: .5rem .9rem; margin: .6rem 0;
  max-width: 48rem; overflow-wrap: anywhere; }
article.alarm { border-color: var(--alarm); } article.alarm b { color: var(--alarm); }
article.warning { border-color: var(--warning); } article.warning b { color: var(--warning); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.2rem 1.6rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .8rem; }
.card { background: var(--panel); padding: .4rem .8rem; overflow-wrap: anywhere; }
figure { margin: 0; min-width: 0; max-width: 38rem; } figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit; }
summary { cursor: pointer; color: var(--faint); padding: .3rem 0; }
.table { overflow-x: auto; min-width: 0; }
table { border-collapse: collapse; margin: .4rem 0; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--grid);
  font-variant-numeric: tabular-nums; max-width: 38rem; }
th { font-weight: 400; color: var(--faint); } thead th { font-weight: 600; }
pre { overflow-x: auto; background: var(--panel); padding: .8rem; }
"""

"""The style sheet: light and dark, narrow and wide."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --panel: #ffffff; --text: #1b2330; --quiet: #5b6676; --line: #dde2e9;
  --kept: #2563a8; --gone: #d5dde8; --mark: #b4460e; --good: #1c7a45; --heat: 37, 99, 168;
  --warning: #fdf1e3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --panel: #1a2029; --text: #e4e9f0; --quiet: #98a4b5; --line: #303947;
    --kept: #6aa9ee; --gone: #35414f; --mark: #f0a064; --good: #6cc995; --heat: 106, 169, 238;
    --warning: #33271a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1100px; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .4rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .2rem; }
p { margin: .3rem 0 .8rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
section {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem; margin: 0 0 1rem; min-width: 0;
}
.warning { background: var(--warning); border-color: var(--mark); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 0 0 1rem; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.card .good { color: var(--good); } .card .bad { color: var(--mark); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .25em; }
code, .layer { font-family: ui-monospace, Consolas, monospace; font-size: .85rem;
  overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: minmax(8rem, 18rem) 9.5rem 1fr; gap: .15rem .8rem;
  align-items: center; }
.bars .number { text-align: right; font-variant-numeric: tabular-nums; font-size: .85rem;
  white-space: nowrap; }
.bars svg { width: 100%; height: 12px; display: block; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
table.heat td, table.heat th { border: 1px solid var(--panel); white-space: nowrap; }
table.heat th:first-child { position: sticky; left: 0; background: var(--panel);
  min-width: 8.5rem; max-width: 15rem; overflow-wrap: anywhere; white-space: normal;
  font-weight: normal; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.plot { width: 100%; max-width: 460px; height: auto; display: block; }
.plot text { fill: var(--quiet); font-size: 11px; }
.plot .chosen { fill: var(--mark); font-weight: 600; }
@media (max-width: 640px) {
  main { padding: .8rem .6rem 2rem; }
  .bars { grid-template-columns: 1fr auto; gap: .1rem .6rem; }
  .bars .number { font-size: .8rem; }
  .bars svg { grid-column: 1 / -1; margin-bottom: .45rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .card b { font-size: 1.1rem; }
  table.heat th:first-child { min-width: 7rem; max-width: 7rem; }
}
@media print { section, .card { break-inside: avoid; } }
"""

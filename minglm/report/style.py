"""The page's style sheet: one column on a phone, charts side by side on a wide screen, light, dark, and for paper."""

STYLE = """
:root { --ink: #1d2129; --faint: #5c6573; --paper: #ffffff; --panel: #f5f6f8; --line: #d9dde3; --link: #2456a8;
  --c0: #2b6cb0; --c1: #c2570c; --c2: #2f855a; --c3: #97266d; --c4: #6b46c1; --c5: #4a5568; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --faint: #a3adba; --paper: #14171c; --panel: #1d222a; --line: #343b46; --link: #8ab4f8;
    --c0: #6cb0f5; --c1: #f6a15c; --c2: #6fd3a0; --c3: #f09ad0; --c4: #b39bf5; --c5: #aab4c3; } }
* { box-sizing: border-box }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 } h2 { font-size: 1.25rem; margin: 0 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
a { color: var(--link) } h2 a { color: inherit; text-decoration: none } h2 a:hover { text-decoration: underline }
p { margin: .5rem 0; max-width: 46rem }
nav ol { columns: 17rem; padding-left: 2.1rem; margin: .8rem 0 } nav small, .paper { color: var(--faint); font-weight: 400 }
.paper { font-size: .8rem; white-space: normal }
section { border-top: 1px solid var(--line); padding: 1.2rem 0 .6rem }
.later { color: var(--faint); font-style: italic; border-left: 3px solid var(--line); padding-left: .8rem }
p.faint { color: var(--faint); font-size: .85rem }
progress { width: 100%; max-width: 46rem; height: .8rem; accent-color: var(--c0) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; margin: .8rem 0 }
figure { margin: 0; min-width: 0; max-width: 34rem } figcaption { color: var(--faint); font-size: .85rem }
.wide { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
p.caption { color: var(--faint); font-size: .85rem; margin-top: -.4rem }
th, td { padding: .2rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td, tbody th { white-space: nowrap } .long { white-space: normal; min-width: 14rem }
thead th { color: var(--faint); font-weight: 600 } tbody th { font-weight: 500 }
pre { margin: .2rem 0; font: .82rem/1.4 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere }
.commands { background: var(--panel); padding: .7rem; border-radius: 6px }
details { border: 1px solid var(--line); border-radius: 6px; padding: .35rem .7rem; margin: .5rem 0 }
summary { cursor: pointer }
details details { border: 0; padding: 0; margin: .1rem 0 } details details summary { color: var(--faint) }
.said { border-left: 3px solid var(--line); padding: .1rem .7rem; margin: .4rem 0 }
.role { color: var(--faint); font-size: .75rem }
.user { border-color: var(--c0) } .assistant { border-color: var(--c2) } .tool { border-color: var(--c1) }
.call { background: var(--panel); padding: .2rem .4rem; border-radius: 4px }
svg.chart { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink) }
svg text.faint { fill: var(--faint) } svg text.strong { font-weight: 600 }
svg path { fill: none } .grid { stroke: var(--line); stroke-width: 1 } .mark { stroke: var(--faint); stroke-dasharray: 2 3 }
.line { stroke-width: 2 } .dots { stroke-width: 1.4 } .pale { stroke-width: 1; opacity: .3 } .bar { stroke-width: 1.6 }
path.c0 { stroke: var(--c0) } path.c1 { stroke: var(--c1) } path.c2 { stroke: var(--c2) }
path.c3 { stroke: var(--c3) } path.c4 { stroke: var(--c4) } path.c5 { stroke: var(--c5) }
circle.c0, rect.c0 { fill: var(--c0) } circle.c1, rect.c1 { fill: var(--c1) } circle.c2, rect.c2 { fill: var(--c2) }
circle.c3, rect.c3 { fill: var(--c3) } circle.c4, rect.c4 { fill: var(--c4) } circle.c5, rect.c5 { fill: var(--c5) }
.box { fill: var(--panel); stroke: var(--faint) } .box.moe { stroke: var(--c1) } .box.dense { stroke: var(--c0) }
.box.on { fill: var(--c1) } .wire { stroke: var(--faint); stroke-width: 1.3 } .dashed { stroke-dasharray: 4 3 }
svg .tip { fill: var(--faint) }
@media print {
  :root { --ink: #000; --faint: #444; --paper: #fff; --panel: #f3f3f3; --line: #bbb; --link: #000;
    --c0: #2b6cb0; --c1: #c2570c; --c2: #2f855a; --c3: #97266d; --c4: #6b46c1; --c5: #4a5568; }
  body { max-width: none; padding: 0; font-size: 10pt } nav { display: none } section { break-inside: auto }
  figure, tr { break-inside: avoid } h2, h3 { break-after: avoid }
  details::details-content { content-visibility: visible }
  .wide { overflow: visible } td, tbody th { white-space: normal }
  .charts { grid-template-columns: 1fr 1fr } * { print-color-adjust: exact }
}
"""

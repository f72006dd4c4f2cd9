"""The style sheet of a report: light or dark as the reader's system is, from the width of a phone up."""

STYLE = """
:root{--bg:#f7f7f5;--card:#fff;--ink:#1c1e21;--soft:#5d646e;--edge:#e1e2de;--c0:#2463c4;--c1:#c9680a;--c2:#1c8a63;--c3:#7a4fc0;--c4:#b8386b;--c5:#8a8f98}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1d2026;--ink:#e7e9ec;--soft:#a0a7b2;--edge:#333842;--c0:#79a9ff;--c1:#f2a14e;--c2:#57c99b;--c3:#b99cf5;--c4:#ef8fb5;--c5:#8a919d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:20px 16px 60px;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .7rem}
.about{display:grid;grid-template-columns:max-content 1fr;gap:0 .9rem;margin:0 0 1rem;font-size:.87rem}
.about dt{color:var(--soft)}.about dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tiles div,figure{background:var(--card);border:1px solid var(--edge);border-radius:8px}
.tiles div{padding:10px 12px}.tiles span{display:block;color:var(--soft);font-size:.8rem}
.tiles strong{font-size:1.35rem;font-variant-numeric:tabular-nums}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:12px;align-items:start}
figure{margin:0;padding:12px 14px;min-width:0}
figcaption{font-weight:600;font-size:.92rem;margin-bottom:.35rem}
.note{color:var(--soft);font-size:.85rem;margin:.3rem 0 .6rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;width:100%}
th{color:var(--soft);font-weight:500;text-align:right;vertical-align:bottom}
th,td{padding:4px 10px 4px 0;border-bottom:1px solid var(--edge)}
td{text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}td:first-child{white-space:normal}
section>.scroll{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:8px 14px;margin-top:12px}
small{display:block;color:var(--soft);font-size:.75rem;font-weight:400}
td i{color:var(--soft);font-style:normal}td b{color:var(--c0)}
summary{cursor:pointer;color:var(--soft);font-size:.87rem;margin:.6rem 0 .3rem}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:12px;font-size:.8rem}
a{color:var(--c0)}code{overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}.grid{stroke:var(--edge)}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.bar{fill:var(--c0)}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}
.line.c5{stroke:var(--c5)}
.dot.c0,.share.c0{fill:var(--c0)}.dot.c1,.share.c1{fill:var(--c1)}.dot.c2,.share.c2{fill:var(--c2)}
.dot.c3,.share.c3{fill:var(--c3)}.dot.c4,.share.c4{fill:var(--c4)}.dot.c5,.share.c5{fill:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;list-style:none;margin:0 0 4px;padding:0;color:var(--soft);font-size:.8rem}
.legend i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:5px}
.legend .c0{background:var(--c0)}.legend .c1{background:var(--c1)}.legend .c2{background:var(--c2)}.legend .c3{background:var(--c3)}
.legend .c4{background:var(--c4)}.legend .c5{background:var(--c5)}
@media print{body{max-width:none}details{display:none}}
"""

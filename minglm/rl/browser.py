"""The attempts of a run as one HTML file that needs no network: filtered by family, step and reward, thinking folded.

    runs/NAME/rollouts/step-N.jsonl  ->  runs/NAME/rollouts.html

What a policy writes is anybody's text: all of it is escaped, and the page's own policy allows neither other scripts nor any
connection.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minglm.rl.records import rollout_files

MOST = 2000  # attempts of a page, a few megabytes; of longer runs every n-th is shown


def write_browser(run: Path) -> Path:
    """Read the rollouts of the run folder `run` -> the page beside them."""
    files = rollout_files(run / "rollouts")
    count = sum(path.read_bytes().count(b"\n") for path in files.values())
    every = -(-count // MOST) or 1
    path = run / "rollouts.html"
    path.write_text(page(list(itertools.islice(_read(files), 0, None, every)), count, run.name), encoding="utf-8")
    return path


def _read(files: Mapping[int, Path]) -> Iterator[dict[str, Any]]:
    """Every line with its step: a long run's are more than memory may hold."""
    for step, path in files.items():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield {"step": step, **json.loads(line)}


def page(attempts: Sequence[Mapping[str, Any]], of: int, name: str) -> str:
    """attempts: lines as `minglm.rl.records.write_rollouts` writes them, each with its step; of: how many there are in all."""
    families = sorted({one["family"] for one in attempts})
    options = "".join(f"<option>{escape(family)}</option>" for family in families)
    articles = "\n".join(map(_article, attempts))
    shown = f"{len(attempts):,} attempts" if len(attempts) == of else f"{len(attempts):,} of {of:,} attempts, evenly chosen"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(name)}: rollouts</title><style>{STYLE}</style></head><body>
<header><h1>{escape(name)}</h1><p>{shown}, <output id="count">{len(attempts)}</output> match</p>
<form>
<label>family <select name="family"><option value="">all</option>{options}</select></label>
<label>steps <input name="first" type="number" min="0"> to <input name="last" type="number" min="0"></label>
<label>reward <input name="low" type="number" step="any"> to <input name="high" type="number" step="any"></label>
<label><input name="failed" type="checkbox" checked> failed ones</label>
</form></header>
<main>
{articles}
</main><script>{SCRIPT}</script></body></html>
"""


def _article(one: Mapping[str, Any]) -> str:
    reward = "" if one["reward"] is None else f"{one['reward']:g}"
    reasons = "; ".join(one["reasons"])
    # An attempt without a verdict has ended in "failed", which says it all.
    said = [f"reward {reward}", one["end"]] if reward else [one["end"]]
    title = " · ".join([f"step {one['step']}", one["family"], *said, f"{one['length']:,} tokens"])
    sources = ", ".join(f"{name} {value:g}" for name, value in one["parts"].items())
    parts = [
        f"<h2>{escape(title)}</h2>",
        f"<p>by source: {escape(sources)}</p>" if len(one["parts"]) > 1 else "",
        f'<p class="reasons">{escape(reasons)}</p>' if reasons else "",
        _folded("prompt", "".join(map(_message, one["messages"]))),
        *map(_message, one["response"]),
        _folded("as the policy saw and wrote it", f"<pre>{escape(one['text'])}</pre>", is_open=not one["response"]),
    ]
    data = f'data-family="{escape(one["family"])}" data-step="{one["step"]}" data-reward="{reward}"'
    return f"<article {data}>{''.join(parts)}</article>"


def _message(message: Mapping[str, Any]) -> str:
    thinking, content, calls = (message.get(key) for key in ("reasoning_content", "content", "tool_calls"))
    parts = [
        _folded("thinking", f"<pre>{escape(thinking)}</pre>") if thinking else "",
        f"<pre>{escape(content)}</pre>" if content else "",
        f'<pre class="calls">{escape(json.dumps(calls, ensure_ascii=False, indent=1))}</pre>' if calls else "",
    ]
    return f'<section class="{escape(message["role"])}"><h3>{escape(message["role"])}</h3>{"".join(parts)}</section>'


def _folded(title: str, inside: str, is_open: bool = False) -> str:
    """inside: HTML."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{inside}</details>"


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 0 1rem; color: #222; background: #fff }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: .5rem 0 }
header h1 { font-size: 1.1rem; margin: 0 } header p { margin: .2rem 0 } form label { margin-right: 1rem }
input[type=number] { width: 4.5rem }
article { border: 1px solid #ddd; border-radius: 6px; margin: 1rem 0; padding: .3rem .8rem }
article[hidden] { display: none }
h2 { font-size: 1rem; margin: .3rem 0 } h3 { font-size: .8rem; color: #666; margin: .4rem 0 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; font-size: .85rem }
article p { margin: .2rem 0 } .reasons { color: #a33 } .calls, .tool pre { background: #f4f4f4; padding: .3rem }
summary { cursor: pointer; color: #446 }
"""

SCRIPT = """
const form = document.forms[0], articles = [...document.querySelectorAll("article")];
const within = (text, low, high) =>
  (low === "" || Number(text) >= Number(low)) && (high === "" || Number(text) <= Number(high));
const filter = () => {
  const { family, first, last, low, high, failed } = form.elements;
  let count = 0;
  for (const one of articles) {
    const { dataset } = one;
    const judged = dataset.reward === "" ? failed.checked : within(dataset.reward, low.value, high.value);
    const drawn = (!family.value || dataset.family === family.value) && within(dataset.step, first.value, last.value);
    one.hidden = !(judged && drawn);
    count += !one.hidden;
  }
  document.getElementById("count").value = count;
};
form.addEventListener("input", filter);
filter();  // a browser may have kept what was chosen before the page was loaded again
form.addEventListener("submit", (event) => event.preventDefault());
"""

"""Whether report.html works in a browser: no script error, nothing wider than the window, and the values that appear over a
curve are those of metrics.jsonl.

usage: check_pages.py RUN/report.html ...
Needs Chromium (FOURFOLD_CHROMIUM names the program, else `chromium`); without it nothing is checked, which is said. Opens each
page headless at 390 and 1440 pixels, moves the pointer over every curve and reads what appears. One line a page and width;
exit code 1 if any failed. The run's metrics.jsonl is read where it lies beside the page.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

PROBE = """<script>
addEventListener('load', () => {
  const found = { errors: window.failed, wide: [], hovered: [], load: performance.now() };
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) found.wide.push('page ' + document.documentElement.scrollWidth);
  for (const e of document.querySelectorAll('main *'))
    if (!e.closest('.wide') && !e.closest('svg') && !e.closest('pre') && e.getBoundingClientRect().right > width + 1)
      found.wide.push(e.tagName + ' ' + e.className + ' ' + e.getBoundingClientRect().right);
  for (const figure of document.querySelectorAll('figure[data-c]')) {
    const box = figure.querySelector('svg').getBoundingClientRect();
    for (const share of [0.3, 0.6, 0.95]) {
      const at = { clientX: box.left + share * box.width, clientY: box.top + box.height / 2, bubbles: true };
      figure.querySelector('svg').dispatchEvent(new PointerEvent('pointermove', at));
      const tip = document.getElementById('tip'), edge = tip.getBoundingClientRect();
      found.hovered.push([figure.id, tip.textContent]);
      if (tip.style.display !== 'block' || edge.left < 0 || edge.right > width + 1) found.wide.push('tip of ' + figure.id + ' ' + tip.style.display + ' ' + edge.left + ' to ' + edge.right + ' of ' + width);
    }
  }
  for (const button of document.querySelectorAll('.pick button')) {
    button.click();
    if (button.closest('.tokens').dataset.by !== button.dataset.by) found.errors.push('button ' + button.textContent);
  }
  found.width = innerWidth;
  parent.postMessage(JSON.stringify(found), '*');
});
</script>"""
# A window is never narrower than 500 pixels, a frame is.
FRAME = """<!doctype html><body style="margin:0"><iframe src="page.html" style="width:{}px;height:900px;border:0"></iframe>
<script>addEventListener('message', e => {{
  const out = document.createElement('pre');
  out.id = 'found';
  out.textContent = e.data;
  document.body.append(out);
}});</script>"""
LISTEN = "<script>window.failed = []; addEventListener('error', e => window.failed.push(e.message));</script>"


def probe(chromium, page, width, scratch):
    """What the probe found in the page at this width."""
    text = page.read_text().replace("<head>", "<head>" + LISTEN, 1).replace("</body>", PROBE + "</body>", 1)
    (pathlib.Path(scratch) / "page.html").write_text(text)
    frame = pathlib.Path(scratch) / "frame.html"
    frame.write_text(FRAME.format(width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000", f"--user-data-dir={scratch}/profile"]
    options += ["--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([chromium, *options, frame.as_uri()], capture_output=True, text=True, timeout=300)
    begin = done.stdout.index('<pre id="found">') + len('<pre id="found">')
    found = done.stdout[begin : done.stdout.index("</pre>", begin)]
    for entity, c in (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", "\u00a0"), ("&amp;", "&")):
        found = found.replace(entity, c)
    return json.loads(found)


def differences(page, hovered):
    """Values over the curves that metrics.jsonl does not have, and how many it has."""
    file = page.parent / "metrics.jsonl"
    if not file.exists():
        return [], 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    known = {(line["stage"], line["step"], key): value for line in lines for key, value in line.items()}
    stages, wrong, right = {line["stage"] for line in lines}, [], 0
    for figure, text in hovered:
        stage = next(stage for stage in stages if figure.startswith(f"c-{stage}-"))
        first, *rows = text.split("\n")
        if not first.startswith("step "):
            continue
        for row in rows:
            name, value = row.split("  ")[:2]
            step = float(row.split("(at ")[1].rstrip(")")) if "(at " in row else float(first.removeprefix("step "))
            if (stage, step, name) in known:
                want = known[stage, step, name]
                same = value == "NaN or infinite" if want is None else float(value) == want
                right += same
                wrong += [] if same else [f"{figure}: {row}, and metrics.jsonl has {want}"]
    return wrong, right


def main():
    chromium = shutil.which(os.environ.get("FOURFOLD_CHROMIUM", "chromium"))
    if chromium is None:
        print("check_pages: nothing is checked: there is no chromium (Debian: apt install chromium)", file=sys.stderr)
        return
    failed = False
    for page in map(pathlib.Path, sys.argv[1:]):
        for width in (390, 1440):
            with tempfile.TemporaryDirectory() as scratch:
                found = probe(chromium, page, width, scratch)
            wrong, right = differences(page, found["hovered"])
            faults = found["errors"] + found["wide"] + wrong
            failed |= bool(faults)
            print(f"{'FAIL' if faults else 'ok  '} {page} at {found['width']}: loaded in {found['load']:.0f} ms, "
                  f"{right} values equal metrics.jsonl {faults[:5] or ''}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

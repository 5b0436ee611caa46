'use strict';
(() => {
  const data = JSON.parse(document.getElementById('curves').textContent);
  const tip = document.getElementById('tip');
  const ns = 'http://www.w3.org/2000/svg';
  // The index of the point whose x is nearest.
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - points[low - 1][0] < points[low][0] - x ? low - 1 : low;
  };
  for (const figure of document.querySelectorAll('figure[data-c]')) {
    const d = data[figure.dataset.c], svg = figure.querySelector('svg');
    if (!d || !svg) continue;
    const [left, right, top, bottom] = d.f;
    const across = x => left + (x - d.x[0]) / (d.x[1] - d.x[0]) * (right - left);
    const down = y => bottom - (y - d.y[0]) / (d.y[1] - d.y[0]) * (bottom - top);
    const make = (name, kind) => {
      const made = svg.appendChild(document.createElementNS(ns, name));
      made.setAttribute('class', kind);
      made.style.display = 'none';
      return made;
    };
    const rule = make('line', 'rule'), dots = d.s.map(s => make('circle', 'd' + s.c));
    let at = null;
    const hide = () => {
      at = null;
      tip.style.display = 'none';
      for (const mark of [rule, ...dots]) mark.style.display = 'none';
    };
    const show = (x, clientX, clientY) => {
      const near = d.s.map(s => s.p.length ? s.p[nearest(s.p, x)] : null);
      const gaps = near.map(p => p ? Math.abs(p[0] - x) : Infinity);
      const first = near[gaps.indexOf(Math.min(...gaps))];
      if (!first) return;
      at = first[0];
      rule.setAttribute('x1', across(at)); rule.setAttribute('x2', across(at));
      rule.setAttribute('y1', top); rule.setAttribute('y2', bottom);
      rule.style.display = '';
      const lines = [(d.h || 'step') + ' ' + at];
      d.s.forEach((s, i) => {
        const p = near[i];
        dots[i].style.display = 'none';
        if (!p) return;
        lines.push(s.n + '  ' + (p[1] === null ? 'NaN or infinite' : p[1]) + (p[0] === at ? '' : '  (at ' + p[0] + ')'));
        if (p[1] === null) return;
        dots[i].setAttribute('cx', across(p[0])); dots[i].setAttribute('cy', down(p[1])); dots[i].setAttribute('r', 4);
        dots[i].style.display = '';
      });
      tip.textContent = lines.join('\n');
      tip.style.display = 'block';
      // At the right edge the box would be measured as narrow as the room there.
      tip.style.left = '0';
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(clientX + 14, document.documentElement.clientWidth - box.width - 4)) + 'px';
      tip.style.top = Math.max(4, clientY - box.height - 14) + 'px';
    };
    const value = clientX => {
      const box = svg.getBoundingClientRect(), inside = (clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      return d.x[0] + (inside - left) / (right - left) * (d.x[1] - d.x[0]);
    };
    svg.addEventListener('pointermove', e => show(value(e.clientX), e.clientX, e.clientY));
    svg.addEventListener('pointerdown', e => show(value(e.clientX), e.clientX, e.clientY));
    svg.addEventListener('pointerleave', hide);
    figure.addEventListener('blur', hide);
    figure.addEventListener('keydown', e => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (!way) return;
      e.preventDefault();
      const points = d.s.reduce((a, s) => s.p.length > a.length ? s.p : a, []);
      const i = at === null ? points.length - 1 : Math.max(0, Math.min(points.length - 1, nearest(points, at) + way));
      if (!points[i]) return;
      const box = svg.getBoundingClientRect();
      show(points[i][0], box.left + across(points[i][0]) / svg.viewBox.baseVal.width * box.width, box.top + 30);
    });
  }
  for (const pick of document.querySelectorAll('.pick')) {
    pick.addEventListener('click', e => {
      const by = e.target.dataset.by;
      if (!by) return;
      pick.parentElement.dataset.by = by;
      for (const button of pick.querySelectorAll('button')) button.setAttribute('aria-pressed', button.dataset.by === by);
    });
  }
  addEventListener('beforeprint', () => { for (const d of document.querySelectorAll('details')) d.open = true; });
})();

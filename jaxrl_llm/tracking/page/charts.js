/* ---- charts: all share one hovered step ---- */
const charts = [];
function hover(step) { for (const c of charts) c.hover(step); }
function niceTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 2.5, 5, 10].find(u => u * power >= raw * 0.999) * power;
  const ticks = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + unit * 1e-6; i++) ticks.push(i * unit + 0); /* + 0: no -0 */
  return [ticks, unit];
}
function tickText(v, unit, share, high) {
  if (share) return (100 * v).toFixed(unit < 0.01 ? 1 : 0).replace("-", "−") + "%";
  if (v === 0) return "0";
  if (high >= 1e6) return Number((v / 1e6).toPrecision(4)) + "M";
  if (high >= 1e4) return Number((v / 1e3).toPrecision(4)) + "k";
  if (unit < 1e-3) return Number(v.toPrecision(3)).toExponential().replaceAll("-", "−");
  return v.toFixed(Math.max(0, -Math.floor(Math.log10(unit) + 1e-9) + (Math.abs(unit / 10 ** Math.floor(Math.log10(unit) + 1e-9) - 2.5) < 1e-6 ? 1 : 0))).replace("-", "−");
}
function smooth(v, span) {
  let state = null;
  return v.map(x => known(x) ? (state = state === null ? x : state + (x - state) * 2 / (span + 1)) : null);
}
/* spec: {title, series: [{label, values, color, band: [lows, highs]}], steps, share, seconds, smooth, bars, wide} */
function chart(parent, spec) {
  const show = spec.share ? percent : spec.seconds ? duration : number;
  const at = el("span", {class: "at"}), legend = el("div", {class: "legend"});
  const body = el("div");
  parent.append(el("div", {class: "chart card" + (spec.wide ? " wide" : "")},
    el("div", {class: "top"}, el("h3", {}, spec.title), at), legend, body));
  const series = spec.series.map((s, i) => ({...s, color: s.color ?? `var(--c${i % 8})`}));
  const xs = spec.steps || steps;
  const readouts = series.map(s => { const b = el("b");
    legend.append(el("span", {}, el("i", {style: "background:" + s.color}), s.label + " ", b)); return b; });
  const rows = xs.map((_, i) => i).filter(i => series.some(s => known(s.values[i])));
  if (spec.smooth && rows.length >= 12) legend.append("thick line: moving average");
  let cross, x;
  function draw() {
    const width = Math.max(260, body.clientWidth), height = spec.wide ? 240 : 170;
    const lows = [], highs = [];
    for (const i of rows) {
      if (spec.bars) { highs.push(series.reduce((t, s) => t + (s.values[i] || 0), 0)); lows.push(0); continue; }
      for (const s of series) {
        const b = s.band && known(s.band[0][i]) ? s.band.map(ends => ends[i]) : [];
        for (const v of [s.values[i], ...b]) if (known(v)) { lows.push(v); highs.push(v); }
      }
    }
    let low = lows.reduce((a, b) => Math.min(a, b), Infinity), high = highs.reduce((a, b) => Math.max(a, b), -Infinity);
    if (low >= 0 && (low < 0.6 * high || spec.share)) low = 0;
    if (low === high) { const pad = Math.abs(high) * 0.5 || 1; high += pad; if (low !== 0) low -= pad; }
    let [ticks, unit] = niceTicks(low, high, 4);
    low = Math.min(low, Math.floor(low / unit + 1e-9) * unit); high = Math.ceil(high / unit - 1e-9) * unit;
    if (spec.share) high = Math.min(high, Math.max(1, ...highs));
    [ticks, unit] = niceTicks(low, high, 4);
    const labels = ticks.map(t => tickText(t, unit, spec.share, Math.max(Math.abs(low), Math.abs(high))));
    const left = 12 + 6.3 * Math.max(...labels.map(l => l.length)), right = width - 8, top = 8, bottom = height - 22;
    const first = xs[rows[0]], last = xs[rows[rows.length - 1]];
    const slot = spec.bars ? (right - left) / rows.length : 0;
    x = step => spec.bars ? left + slot * (rows.findIndex(i => xs[i] >= step) + 0.5)
      : first === last ? (left + right) / 2 : left + (right - left) * (step - first) / (last - first);
    const y = v => bottom - (bottom - top) * (v - low) / (high - low);
    const root = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": describe()});
    ticks.forEach((t, k) => {
      root.append(svg("line", {class: t === 0 ? "axis" : "grid", x1: left, x2: right, y1: y(t), y2: y(t)}));
      root.append(svg("text", {x: left - 7, y: y(t) + 4, "text-anchor": "end"}, labels[k]));
    });
    let xticks = first === last ? [first] : niceTicks(first, last, Math.min(8, width / 70))[0].filter(Number.isInteger);
    if (spec.bars) {
      xticks = xticks.filter(t => xs.includes(t));
      const every = Math.ceil(rows.length / Math.min(10, width / 70));
      if (xticks.length < 3) xticks = rows.filter((_, k) => k % every === 0).map(i => xs[i]);
    }
    for (const t of xticks) root.append(svg("text", {x: x(t), y: height - 6, "text-anchor": "middle"}, grouped.format(t)));
    if (spec.bars) for (const i of rows) {
      let base = 0;
      for (const s of series) if (s.values[i]) {
        root.append(svg("rect", {x: x(xs[i]) - slot * 0.42, width: Math.max(slot * 0.84, 0.6), y: y(base + s.values[i]), height: Math.max(0, y(base) - y(base + s.values[i])), style: "fill:" + s.color}));
        base += s.values[i];
      }
    } else for (const s of [...series].reverse()) {
      const points = rows.filter(i => known(s.values[i]));
      const path = v => points.map((i, k) => (k ? "L" : "M") + x(xs[i]).toFixed(1) + " " + y(v[i]).toFixed(1)).join("");
      if (s.band) {
        const [l, h] = s.band, with_band = points.filter(i => known(l[i]) && known(h[i]));
        if (with_band.length > 1) root.append(svg("path", {style: `fill:${s.color};opacity:.14`,
          d: "M" + [...with_band.map(i => x(xs[i]) + " " + y(h[i])), ...with_band.reverse().map(i => x(xs[i]) + " " + y(l[i]))].join("L") + "Z"}));
        else for (const i of with_band) root.append(svg("line", {style: `stroke:${s.color};stroke-width:6;opacity:.2`, x1: x(xs[i]), x2: x(xs[i]), y1: y(l[i]), y2: y(h[i])}));
      }
      const trend = spec.smooth && points.length >= 12;
      root.append(svg("path", {d: path(s.values), style: `fill:none;stroke:${s.color};stroke-width:${trend ? 1.2 : 2};stroke-linejoin:round;opacity:${trend ? .4 : 1}`}));
      if (trend) root.append(svg("path", {d: path(smooth(s.values, Math.max(spec.smooth, points.length / 15))), style: `fill:none;stroke:${s.color};stroke-width:2.4;stroke-linejoin:round`}));
      if (points.length <= 25 && !trend) for (const i of points) root.append(svg("circle", {cx: x(xs[i]), cy: y(s.values[i]), r: 3, style: "fill:" + s.color}));
    }
    cross = svg("line", {class: "cross", y1: top, y2: bottom, visibility: "hidden"});
    root.append(cross);
    root.addEventListener("pointermove", e => {
      const px = (e.clientX - root.getBoundingClientRect().left) * width / root.getBoundingClientRect().width;
      let best = rows[0];
      for (const i of rows) if (Math.abs(x(xs[i]) - px) < Math.abs(x(xs[best]) - px)) best = i;
      hover(xs[best]);
    });
    root.addEventListener("pointerleave", () => hover(null));
    body.replaceChildren(root);
  }
  function describe() {
    return spec.title + ". " + series.map(s => { const p = rows.filter(i => known(s.values[i]));
      return !p.length ? s.label + ": nothing" : `${s.label}: ${show(s.values[p[0]])} at step ${xs[p[0]]}, ${show(s.values[p[p.length - 1]])} at step ${xs[p[p.length - 1]]}`; }).join("; ");
  }
  function setHover(step) {
    if (!rows.length) return;
    /* The hovered step, or the nearest earlier one this chart knows. */
    let row = rows[rows.length - 1];
    if (step !== null) { const before = rows.filter(i => xs[i] <= step); row = before.length ? before[before.length - 1] : rows[0]; }
    at.textContent = "step " + grouped.format(xs[row]);
    series.forEach((s, k) => {
      /* Runs need not be measured at the same steps. */
      const own = single ? row : rows.filter(i => i <= row && known(s.values[i])).pop() ?? row;
      readouts[k].textContent = show(s.values[own]);
      const low = s.band?.[0][row], high = s.band?.[1][row];
      if (single && known(low) && known(high)) readouts[k].append(el("span", {style: "font-weight:400;color:var(--soft)"}, ` (${show(low)} – ${show(high)})`));
    });
    if (step === null) cross.setAttribute("visibility", "hidden");
    else { cross.setAttribute("visibility", "visible"); cross.setAttribute("x1", x(xs[row])); cross.setAttribute("x2", x(xs[row])); }
  }
  draw(); setHover(null);
  let drawn = body.clientWidth;
  new ResizeObserver(() => { if (body.clientWidth !== drawn) { drawn = body.clientWidth; draw(); setHover(null); } }).observe(body);
  const mine = {hover: setHover};
  charts.push(mine);
  return () => charts.splice(charts.indexOf(mine), 1);
}

/* Shares of a step's responses by value. spec: {title, steps, samples: [[value, ...]], range: [low, high], levels} */
function heatmap(parent, spec) {
  const at = el("span", {class: "at"}), body = el("div"), legend = el("div", {class: "legend"});
  const readout = el("span"); legend.append(readout);
  parent.append(el("div", {class: "chart card"}, el("div", {class: "top"}, el("h3", {}, spec.title), at), legend, body));
  const [low, high] = spec.range, levels = spec.levels;
  const count = levels ? levels.length : 16, columns = spec.samples.length;
  const bin = v => levels ? levels.indexOf(v) : Math.min(count - 1, Math.floor(count * (v - low) / (high - low)));
  const shares = spec.samples.map(all => { const found = new Array(count).fill(0); for (const v of all) found[bin(v)] += 1 / all.length; return found; });
  const means = spec.samples.map(all => all.length ? mean(all) : null);
  const most = Math.max(...shares.flat());
  let x, cross;
  function draw() {
    const width = Math.max(260, body.clientWidth), height = 170, top = 8, bottom = height - 22, right = width - 8;
    const y = v => levels ? bottom - (bottom - top) * (position(v) + 0.5) / count : bottom - (bottom - top) * (v - low) / (high - low);
    /* Between two levels, in proportion. */
    const position = v => { const k = levels.findIndex(l => l >= v); if (k < 0) return count - 1; return k === 0 || levels[k] === v ? k : k - 1 + (v - levels[k - 1]) / (levels[k] - levels[k - 1]); };
    let ticks, labels;
    if (levels) { const each = Math.ceil(count / 6); ticks = levels.filter((_, k) => k % each === 0); labels = ticks.map(number); }
    else { const [found, unit] = niceTicks(low, high, 4); ticks = found.filter(t => t >= low && t <= high); labels = ticks.map(t => tickText(t, unit, false, Math.max(Math.abs(low), Math.abs(high)))); }
    const left = 12 + 6.3 * Math.max(...labels.map(l => l.length)), slot = (right - left) / columns, row = (bottom - top) / count;
    x = i => left + slot * (i + 0.5);
    const root = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${spec.title} by step: mean ${number(means[0])} at step ${spec.steps[0]}, ${number(last(means))} at step ${last(spec.steps)}`});
    ticks.forEach((t, k) => root.append(svg("text", {x: left - 7, y: y(t) + 4, "text-anchor": "end"}, labels[k])));
    shares.forEach((found, i) => found.forEach((share, k) => {
      if (share) root.append(svg("rect", {x: left + slot * i, width: slot + 0.4, y: bottom - row * (k + 1), height: row + 0.4, style: `fill:var(--accent);opacity:${(0.07 + 0.83 * share / most).toFixed(3)}`}));
    }));
    const line = means.map((m, i) => known(m) ? [x(i), y(m)] : null).filter(known);
    root.append(svg("path", {d: "M" + line.map(p => p[0].toFixed(1) + " " + p[1].toFixed(1)).join("L"), style: "fill:none;stroke:var(--c1);stroke-width:2;stroke-linejoin:round"}));
    if (line.length === 1) root.append(svg("circle", {cx: line[0][0], cy: line[0][1], r: 3, style: "fill:var(--c1)"}));
    root.append(svg("line", {class: "axis", x1: left, x2: right, y1: bottom, y2: bottom}));
    const every = Math.ceil(columns / Math.min(8, width / 70));
    spec.steps.forEach((s, i) => { if (i % every === 0) root.append(svg("text", {x: x(i), y: height - 6, "text-anchor": "middle"}, grouped.format(s))); });
    cross = svg("line", {class: "cross", y1: top, y2: bottom, visibility: "hidden"});
    root.append(cross);
    root.addEventListener("pointermove", e => {
      const box = root.getBoundingClientRect(), px = (e.clientX - box.left) * width / box.width;
      hover(spec.steps[Math.max(0, Math.min(columns - 1, Math.floor((px - left) / slot)))]);
    });
    root.addEventListener("pointerleave", () => hover(null));
    body.replaceChildren(root);
  }
  function setHover(step) {
    let i = columns - 1;
    if (step !== null) i = Math.max(0, spec.steps.findLastIndex(s => s <= step));
    at.textContent = "step " + grouped.format(spec.steps[i]);
    const all = spec.samples[i], middle = all.length ? all[(all.length - 1) >> 1] : null;
    readout.replaceChildren("mean ", el("b", {}, number(means[i])), ", median ", el("b", {}, number(middle)), `, ${number(all[0])} to ${number(last(all))}`);
    cross.setAttribute("visibility", step === null ? "hidden" : "visible"); cross.setAttribute("x1", x(i)); cross.setAttribute("x2", x(i));
  }
  draw(); setHover(null);
  let drawn = body.clientWidth;
  new ResizeObserver(() => { if (body.clientWidth !== drawn) { drawn = body.clientWidth; draw(); setHover(null); } }).observe(body);
  charts.push({hover: setHover});
}

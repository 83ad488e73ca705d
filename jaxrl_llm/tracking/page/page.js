/* ---- everything else ---- */
function rest() {
  const found = names.filter(has).sort();
  let drop = () => {};
  const draw = () => { drop(); byId("any-chart").replaceChildren(); const name = byId("any").value;
    drop = chart(byId("any-chart"), {title: name, wide: true, series: runs.filter(r => values(r, name).length).map(r => ({label: single ? "value" : r.name, values: r.columns[name], color: runColor(runs.indexOf(r))}))}); };
  for (const n of found) byId("any").append(el("option", {value: n}, n));
  byId("any").addEventListener("change", draw);
  if (found.length) draw(); else byId("any").closest(".charts").hidden = true;
  const table = byId("metrics");
  table.append(el("tr", {}, el("th", {}, "Metric"), ...(single ? ["first", "last", "lowest", "highest", "steps"] : runs.map(r => r.name + ", last")).map(t => el("th", {class: "n"}, t))));
  for (const n of found) {
    const v = values(runs[0], n);
    const cells = single ? [v[0], last(v), v.reduce((a, b) => Math.min(a, b)), v.reduce((a, b) => Math.max(a, b)), v.length] : runs.map(r => last(values(r, n)));
    table.append(el("tr", {}, el("td", {class: "name"}, n), ...cells.map(x => el("td", {class: "n"}, number(x)))));
  }
  const titled = show => runs.map(r => single ? show(r) : `# ${r.name}\n${show(r)}`).join("\n\n");
  byId("config").textContent = titled(r => r.config || "config.yaml is missing.");
  byId("versions").textContent = titled(r => JSON.stringify(r.versions, null, 2));
}
function theme() {
  const root = document.documentElement, button = byId("theme");
  let dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const set = () => { root.dataset.theme = dark ? "dark" : "light"; button.textContent = dark ? "Light" : "Dark"; };
  const chosen = remembered()?.theme;
  if (chosen) { dark = chosen === "dark"; set(); } else button.textContent = dark ? "Light" : "Dark";
  button.addEventListener("click", () => { dark = !dark; set(); });
}

/* ---- a run that goes on: the page looks for what is new, and stays where it is ---- */
const EVERY_S = 30, CONTROLS = ["run", "kind", "step", "every", "low", "high", "search", "sort", "colour", "before", "after", "pair-search", "any"];
function remembered() {
  try { return JSON.parse(sessionStorage.getItem(location.pathname)); } catch { return null; }
}
function remember() {
  const chosen = Object.fromEntries(CONTROLS.map(id => [id, byId(id).value]));
  if (+byId("step").value === +byId("step").max) delete chosen.step; /* the newest stays the newest */
  const after = byId("after");
  if (after.selectedIndex === after.options.length - 1) delete chosen.after;
  try { sessionStorage.setItem(location.pathname, JSON.stringify({chosen, scroll: scrollY, theme: document.documentElement.dataset.theme, open: [...document.querySelectorAll("details")].map(d => d.open)})); } catch { /* then it begins at its top */ }
}
function live() {
  const run = runs.find(r => r.running);
  if (!run) return;
  const kept = remembered();
  if (kept) {
    for (const [id, value] of Object.entries(kept.chosen)) if (byId(id).value !== value) {
      byId(id).value = value;
      for (const event of ["input", "change"]) byId(id).dispatchEvent(new Event(event));
    }
    document.querySelectorAll("details").forEach((d, i) => { d.open = kept.open[i] ?? d.open; });
    scrollTo(0, kept.scroll);
    sessionStorage.removeItem(location.pathname);
  }
  const button = byId("pause");
  let paused = false, touched = 0;
  button.hidden = false;
  button.title = `The page is loaded anew every ${EVERY_S} s while the run goes on.`;
  button.addEventListener("click", () => { paused = !paused; button.textContent = paused ? "Go on refreshing" : "Pause"; });
  for (const event of ["keydown", "pointerdown", "wheel"]) addEventListener(event, () => { touched = Date.now(); }, {passive: true});
  const tell = () => {
    const age = Date.now() / 1000 - data.written;
    byId("state").textContent = `running, step ${progress(run)}, written ${age < 90 ? Math.max(0, Math.round(age)) + " s" : duration(age).replace(/ \d+ s$/, "")} ago`;
    if (age > 3600) byId("state").textContent += ": has it stopped?";
  };
  tell(); setInterval(tell, 5000);
  setInterval(() => {
    /* Not under somebody's hands. */
    if (paused || document.hidden || Date.now() - touched < 10000 || String(getSelection())) return;
    remember(); location.reload();
  }, 1000 * EVERY_S);
}
theme(); header(); advice(); tiles(); table_of_runs(); training(); distributions(); pairs(); timing(); browser(); rest(); live();
document.documentElement.dataset.drawn = "true";
performance.mark("drawn");

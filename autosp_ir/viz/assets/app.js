"use strict";
// The state of the page: which step is shown, what is searched, which node is selected.

const $ = (id) => document.getElementById(id);

function duration(seconds) {
  return seconds < 1 ? `${(seconds * 1e3).toFixed(0)} ms` : `${seconds.toFixed(1)} s`;
}

class Report {
  constructor(recording) {
    this.recording = recording;
    this.panes = new Panes(recording, $("panes"), (key, side, follow) => this.select(key, side, follow));
    this.details = new Details(recording, $("details"), (step) => this.step(step), (key) => this.select(key, null, true),
      () => this.close());
    this.memory = new MemoryCurve(recording, $("memory"), (key) => this.inWholePass(key));
    this.lanes = new Lanes(recording, $("lanes"), $("makespan"), (key) => this.inWholePass(key));
    this.communication = new Communication(recording, $("communication"), (key) => this.inWholePass(key));
    this.found = [];
    this.pipeline();
    this.listen();
    const last = recording.stages.findIndex((s, n) => n > 0 && s.modified);
    this.pass(Math.max(0, last));
  }

  // Shows one step of all, 0 being the input.
  step(n) {
    const total = this.recording.steps.length;
    const at = Math.min(Math.max(0, n), total);
    if (at === 0) this.show(0, null);
    else this.show(this.recording.steps[at - 1].stage, this.recording.steps[at - 1].step);
  }

  // Shows everything that one pass did.
  pass(s) {
    this.show(Math.min(Math.max(0, s), this.recording.stages.length - 1), null);
  }

  show(s, step) {
    const { recording } = this;
    const stage = recording.stages[s];
    const changed = this.stage !== s;
    Object.assign(this, { stage: s, at: step });
    this.sides = recording.sides(s, step);
    this.rows = compare(recording, this.sides.before, this.sides.after, this.sides.matches);
    this.panes.show(this.rows);
    this.controls(stage, step);
    if (changed) {
      this.memory.show(s);
      this.lanes.show(s);
      this.communication.show(s);
    }
    if ($("search").value) this.search($("search").value, false);
    this.next(1, true);
  }

  controls(stage, step) {
    const { recording } = this;
    const shown = step === null ? stage.first + (this.stage > 0 ? stage.steps : 0) : stage.first + step;
    this.global = shown;
    $("global").max = recording.steps.length;
    $("global").value = shown;
    $("global-text").textContent = `${shown} of ${recording.steps.length}`;
    $("local").max = stage.steps;
    $("local").value = step ?? 0;
    $("local").disabled = this.stage === 0 || stage.steps === 0;
    $("local-text").textContent = step === null ? `all ${stage.steps}` : `${step} of ${stage.steps}`;
    const rewrite = step === null ? null : stage.rewrites[step - 1];
    const what = this.stage === 0 ? "The program as captured" : step === null ? `${stage.name}: the whole pass`
      : `${stage.name}, rewrite ${step}`;
    $("what").textContent = what;
    const rule = rewrite ? `${rewrite.rule.replace(/^.*\/(?=[^/]*\/[^/]*$)/, "")} · ${rewrite.ms.toFixed(2)} ms`
      : this.sides.matches ? "new graph; lines matched by structure" : "";
    $("rule").textContent = rule;
    $("rule").title = rewrite?.rule ?? "";
    const { counts } = this.rows;
    $("counts").replaceChildren(...["added", "removed", "changed", "moved"].filter((k) => counts[k]).map(
      (k) => element("span", `count ${k}`, `${MARKS[KINDS.indexOf(k)]} ${counts[k]} ${k}`)));
    for (const [n, entry] of [...$("pipeline").children].entries()) entry.classList.toggle("shown", n === this.stage);
    $("before-title").textContent = `before · ${this.sides.before.length} lines`;
    $("after-title").textContent = `after · ${this.sides.after.length} lines`;
  }

  pipeline() {
    this.recording.stages.forEach((stage, s) => {
      const entry = element("button", `stage${stage.modified || s === 0 ? "" : " unchanged"}`);
      entry.append(element("b", "", stage.text));
      const rewrites = stage.rewrites.length;
      const made = stage.lines && s > 0 ? "new graph" : `${rewrites} rewrite${rewrites === 1 ? "" : "s"}`;
      const facts = s === 0 ? "captured" : `${made} · ${duration(stage.seconds)}`;
      entry.append(element("span", "", `${stage.stage} · ${facts}`));
      if (stage.memory.length) {
        const peak = stage.memory.reduce((a, b) => Math.max(a, b), 0);
        const count = stage.communication.length;
        entry.append(element("span", "", `peak ${bytes(peak)}${count ? ` · ${count} collective${count === 1 ? "" : "s"}` : ""}`));
      }
      entry.addEventListener("click", () => this.pass(s));
      entry.title = Object.entries(stage.statistics).map(([k, v]) => `${k}: ${v}`).join("\n");
      $("pipeline").append(entry);
    });
  }

  // Selects a node; `follow` also scrolls to it.
  select(key, side, follow) {
    this.panes.selected = key;
    document.body.classList.add("detailed");
    const { before, after } = this.sides;
    const inAfter = after.some((i) => this.recording.key[i] === key);
    this.details.show(key, side === "left" || !inAfter ? before : after);
    const row = follow ? this.panes.rowOf(key) : -1;
    if (row >= 0) this.panes.reveal(row);
    else this.panes.draw();
  }

  close() {
    this.panes.selected = -1;
    document.body.classList.remove("detailed");
    this.panes.draw();
  }

  inWholePass(key) {
    if (this.at !== null) this.pass(this.stage);
    this.select(key, "right", true);
  }

  search(query, move = true) {
    this.found = this.panes.search(query);
    this.hit = -1;
    $("hits").textContent = query.trim() ? `${this.found.length} found` : "";
    if (move && this.found.length) this.nextHit(1);
    return this.found.length;
  }

  nextHit(direction) {
    if (!this.found.length) return;
    this.hit = (this.hit + direction + this.found.length) % this.found.length;
    $("hits").textContent = `${this.hit + 1} of ${this.found.length}`;
    this.panes.reveal(this.found[this.hit]);
  }

  // Scrolls to the next run of touched rows.
  next(direction, first = false) {
    const { kind, length } = this.rows;
    let r = first ? 0 : this.cursor + direction;
    while (!first && kind[r] !== SAME && r >= 0 && r < length) r += direction;
    while (r >= 0 && r < length && kind[r] === SAME) r += direction;
    if (r < 0 || r >= length) return;
    this.cursor = r;
    this.panes.reveal(r);
  }

  listen() {
    $("global").addEventListener("input", (e) => this.step(Number(e.target.value)));
    $("local").addEventListener("input", (e) => {
      const step = Number(e.target.value);
      this.show(this.stage, step || null);
    });
    $("search").addEventListener("input", (e) => this.search(e.target.value));
    $("depth").addEventListener("change", (e) => this.option("depth", Number(e.target.value)));
    $("fold").addEventListener("change", (e) => this.option("foldUnchanged", e.target.checked));
    $("only").addEventListener("change", (e) => this.option("onlyChanges", e.target.checked));
    $("single").addEventListener("change", (e) => document.body.classList.toggle("single", e.target.checked));
    $("open-all").addEventListener("click", () => this.panes.foldAll(true));
    $("close-all").addEventListener("click", () => this.panes.foldAll(false));
    $("next-change").addEventListener("click", () => this.next(1));
    $("previous-change").addEventListener("click", () => this.next(-1));
    $("theme").addEventListener("click", () => this.theme());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  option(name, value) {
    this.panes[name] = value;
    this.panes.opened.clear();
    this.panes.arrange();
    this.next(1, true);
  }

  theme() {
    const dark = document.documentElement.dataset.theme === "dark"
      || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  }

  key(event) {
    if (event.target.id === "search") {
      if (event.key === "Enter") this.nextHit(event.shiftKey ? -1 : 1);
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const actions = {
      ArrowRight: () => this.step(this.at === null && this.stage > 0 ? this.recording.stages[this.stage].first + 1 : this.global + 1),
      ArrowLeft: () => this.step(this.at === null ? this.recording.stages[this.stage].first : this.global - 1),
      "]": () => this.pass(this.stage + 1),
      "[": () => this.pass(this.stage - 1),
      n: () => this.next(1),
      p: () => this.next(-1),
      ",": () => this.panes.sideways(-20),
      ".": () => this.panes.sideways(20),
      Escape: () => this.close(),
      "/": () => $("search").focus(),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }
}

// `window.report` is there once everything is shown; browser tests wait for it.
async function start() {
  try {
    const data = await inflate($("recording").textContent.trim());
    window.report = new Report(new Recording(data));
    document.body.classList.add("ready");
  } catch (error) {
    $("what").textContent = `This report cannot be shown: ${error.message}`;
    throw error;
  }
}

start();

"use strict";
// What is shown of one node: where it comes from, what it reads and who reads it, and its neighbourhood drawn.

class Details {
  constructor(recording, root, go, select, close) {
    Object.assign(this, { recording, root, go, select });
    root.addEventListener("click", (event) => {
      if (event.target.id === "close") close();
      const step = event.target.closest("[data-step]");
      const node = event.target.closest("[data-key]");
      if (step) this.go(Number(step.dataset.step));
      else if (node) this.select(Number(node.dataset.key));
    });
  }

  // `program` is the side that was clicked, in order.
  show(key, program) {
    const { recording } = this;
    this.at = new Map(Array.from(program, (i) => [recording.key[i], i]));
    const line = this.at.get(key) ?? recording.last[key];
    this.root.replaceChildren();
    if (line < 0 || line === undefined) return;
    const op = recording.op(line);
    this.root.append(element("button", "", "×"));
    this.root.lastChild.id = "close";
    this.root.append(element("h2", "", op === "output" ? "return" : `%${recording.name[line]}`));
    this.root.append(element("code", "text", recording.text(line)));
    this.origin(key, line);
    const users = this.usersOf(program);
    this.facts(line);
    this.links("Reads", [...new Set(recording.operands[line])]);
    this.links("Read by", users.get(key) ?? []);
    this.root.append(element("h3", "", "Neighbourhood"), neighbourhood(recording, key, this.at, users));
  }

  usersOf(program) {
    const users = new Map();
    for (const i of program) {
      for (const o of new Set(this.recording.operands[i])) {
        if (users.has(o)) users.get(o).push(this.recording.key[i]);
        else users.set(o, [this.recording.key[i]]);
      }
    }
    return users;
  }

  origin(key, line) {
    const { recording } = this;
    const list = element("ul", "origin");
    const n = recording.madeIn[key];
    if (n < 0) list.append(element("li", "", "Captured from the model."));
    else list.append(this.made(n, key));
    const twin = recording.twin.get(key);
    if (twin !== undefined) {
      const item = element("li", "", "Before the new graph it was ");
      item.append(this.link(twin));
      list.append(item);
    }
    const changes = (recording.changedIn.get(key) ?? []);
    for (const c of changes.slice(0, 12)) {
      const item = element("li", "", "Changed by ");
      item.append(this.stepLink(c), this.rule(c));
      list.append(item);
    }
    if (changes.length > 12) list.append(element("li", "", `… and ${changes.length - 12} more changes`));
    this.root.append(element("h3", "", "Where it comes from"), list);
    const passes = recording.passes(line);
    if (passes) list.append(element("li", "", `Passes: ${passes.split(" ").join(" → ")}`));
  }

  made(n, key) {
    const { recording } = this;
    const { stage: s, step } = recording.steps[n];
    const stage = recording.stages[s];
    const item = element("li", "", "Made by ");
    item.append(this.stepLink(n));
    if (step > stage.rewrites.length) {
      item.append(", which made a new graph.");
      return item;
    }
    item.append(this.rule(n));
    const { removed } = stage.rewrites[step - 1];
    if (removed.length) {
      item.append(" from ");
      removed.slice(0, 8).forEach((k, place) => {
        if (place) item.append(", ");
        const from = this.link(k);
        from.classList.add("gone");
        item.append(from, ` (${recording.op(recording.last[k])})`);
      });
      if (removed.length > 8) item.append(` and ${removed.length - 8} more`);
    }
    return item;
  }

  rule(n) {
    const { stage, step } = this.recording.steps[n];
    const rewrite = this.recording.stages[stage].rewrites[step - 1];
    const made = element("span", "rule", rewrite ? ` by ${rewrite.rule.replace(/^.*\/(?=[^/]*\/[^/]*$)/, "")}` : "");
    if (rewrite) made.title = rewrite.rule;
    return made;
  }

  stepLink(n) {
    const { stage, step } = this.recording.steps[n];
    const link = element("a", "step", `${this.recording.stages[stage].name}, rewrite ${step}`);
    link.dataset.step = n + 1;
    return link;
  }

  facts(line) {
    const { recording } = this;
    const table = element("dl");
    const add = (term, text) => {
      if (text) table.append(element("dt", "", term), element("dd", "", text));
    };
    add("Operation", recording.op(line));
    add("Type", recording.type(line));
    add("Module", recording.module(line));
    add("Source", recording.source(line));
    add("Phase", recording.phase(line));
    add("Traits", recording.traits(line).split(" ").join(", "));
    this.root.append(table);
  }

  links(title, keys) {
    if (!keys.length) return;
    const row = element("p", "links");
    row.append(element("b", "", `${title} `));
    keys.slice(0, 40).forEach((key, n) => {
      if (n) row.append(", ");
      row.append(this.link(key));
    });
    if (keys.length > 40) row.append(` and ${keys.length - 40} more`);
    this.root.append(row);
  }

  link(key) {
    const line = this.at.get(key) ?? this.recording.last[key];
    const made = element("a", "value", line >= 0 ? `%${this.recording.name[line]}` : "?");
    made.dataset.key = key;
    return made;
  }
}

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// The nodes at most two edges away, in layers by distance, sources above.
function neighbourhood(recording, key, at, users) {
  const layers = new Map([[key, 0]]);
  const spread = (from, sign, next) => {
    let edge = [from];
    for (let d = 1; d <= 2; d++) {
      const found = [];
      for (const k of edge) for (const n of next(k)) {
        if (layers.has(n) || !at.has(n) || found.length >= 6) continue;
        layers.set(n, sign * d);
        found.push(n);
      }
      edge = found;
    }
  };
  spread(key, -1, (k) => (at.has(k) ? recording.operands[at.get(k)] : []));
  spread(key, 1, (k) => users.get(k) ?? []);
  return drawLayers(recording, key, at, layers);
}

function drawLayers(recording, key, at, layers) {
  const width = 340;
  const step = 50;
  const levels = [...new Set(layers.values())].sort((a, b) => a - b);
  const height = levels.length * step + 4;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "neighbourhood" });
  const place = new Map();
  levels.forEach((level, l) => {
    const nodes = [...layers].filter(([, v]) => v === level).map(([k]) => k);
    const centre = (k) => {
      const near = [...recording.operands[at.get(k)] ?? []].filter((o) => place.has(o)).map((o) => place.get(o).x);
      return near.length ? near.reduce((a, b) => a + b) / near.length : width / 2;
    };
    nodes.sort((a, b) => centre(a) - centre(b));
    const slot = width / nodes.length;
    nodes.forEach((k, n) => place.set(k, { x: slot * (n + 0.5), y: l * step + 2, w: Math.min(slot - 6, 120) }));
  });
  for (const [k, { x, y }] of place) {
    for (const o of new Set(recording.operands[at.get(k)])) {
      const from = place.get(o);
      if (!from) continue;
      const y0 = from.y + 34;
      drawing.append(svg("path", { d: `M${from.x} ${y0}C${from.x} ${y0 + 10} ${x} ${y - 10} ${x} ${y}`, class: "edge" }));
    }
  }
  for (const [k, spot] of place) drawing.append(box(recording, k, at.get(k), spot, k === key));
  return drawing;
}

function box(recording, key, line, { x, y, w }, chosen) {
  const group = svg("g", { class: `box ${placementOf(recording.layout(line))}${chosen ? " chosen" : ""}` });
  group.dataset.key = key;
  const fits = Math.max(3, Math.floor(w / 5.6));
  const cut = (text) => (text.length > fits ? `${text.slice(0, fits - 1)}…` : text);
  const op = recording.op(line).replace(/^(aten|autosp|operator|_c10d_functional)\./, "");
  group.append(svg("title", {}, recording.text(line)));
  group.append(svg("rect", { x: x - w / 2, y, width: w, height: 34, rx: 3 }));
  group.append(svg("text", { x, y: y + 14, class: "title" }, cut(op)));
  group.append(svg("text", { x, y: y + 27 }, cut(`%${recording.name[line]}`)));
  return group;
}

"use strict";
// The memory curve, the estimated streams and the collectives of a stage.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

function bytes(n) {
  const unit = n > 0 ? Math.min(UNITS.length - 1, Math.floor(Math.log2(n) / 10)) : 0;
  const scaled = n / 1024 ** unit;
  return `${scaled.toFixed(unit && scaled < 100 ? 1 : 0)} ${UNITS[unit]}`;
}

// A drawing of a stage that fills its place, tells what is under the pointer and follows a click.
class Chart {
  constructor(recording, root, kind, onPick) {
    Object.assign(this, { recording, root, onPick });
    this.drawing = root.appendChild(svg("svg", { class: kind, preserveAspectRatio: "none" }));
    this.tip = root.appendChild(element("div", "tip"));
    this.drawing.addEventListener("pointermove", (event) => this.hover(event));
    this.drawing.addEventListener("pointerleave", () => this.tip.classList.remove("shown"));
    this.drawing.addEventListener("click", (event) => this.pick(event));
    new ResizeObserver(() => this.draw()).observe(root);
  }

  show(stage) {
    this.stage = stage;
    this.program = this.recording.program(stage);
    this.draw();
  }

  // Empties the drawing; false where there is nothing to draw.
  begin(known, otherwise) {
    const { clientWidth: width, clientHeight: height } = this.root;
    this.drawing.replaceChildren();
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.frame = null;
    if (known && width >= 50) return true;
    this.drawing.append(svg("text", { x: 12, y: 30, class: "axis" }, otherwise));
    return false;
  }
}

class MemoryCurve extends Chart {
  constructor(recording, root, onPick) {
    super(recording, root, "memory", onPick);
  }

  draw() {
    if (this.stage === undefined) return;
    const { memory, communication } = this.recording.stages[this.stage];
    const before = this.stage > 0 ? this.recording.stages[this.stage - 1].memory : [];
    if (!this.begin(memory.length, "no sizes are known here")) return;
    const { clientWidth: width, clientHeight: height } = this.root;
    this.frame = { left: 64, right: width - 12, top: 16, bottom: height - 22, count: memory.length };
    const top = Math.max(...this.buckets(memory), ...(before.length ? this.buckets(before) : [0]), 1);
    this.axes(top);
    if (before.length) this.drawing.append(svg("path", { d: this.path(before, top, false), class: "earlier" }));
    this.drawing.append(svg("path", { d: this.path(memory, top, true), class: "area" }));
    const { left, right, bottom } = this.frame;
    for (const [, op, , , , phase, position] of communication) {
      const x = left + ((right - left) * position) / memory.length;
      const tick = this.drawing.appendChild(svg("path", { d: `M${x} ${bottom + 3}v8`, class: `tick ${phase}` }));
      tick.append(svg("title", {}, op));
    }
    const peak = memory.reduce((best, b, i) => (b > memory[best] ? i : best), 0);
    const [x, y] = [left + ((right - left) * peak) / memory.length, this.y(memory[peak], top)];
    this.drawing.append(svg("circle", { cx: x, cy: y, r: 3.5, class: "peak" }));
    const beside = x > (left + right) / 2 ? { x: x - 8, "text-anchor": "end" } : { x: x + 8 };
    const name = this.recording.name[this.program[peak]];
    this.drawing.append(svg("text", { ...beside, y: y + 4, class: "peaktext" }, `peak ${bytes(memory[peak])} at %${name}`));
    this.cursor = this.drawing.appendChild(svg("path", { class: "cursor" }));
  }

  // One maximum per pixel.
  buckets(curve) {
    const { left, right } = this.frame;
    const width = Math.max(1, Math.floor(right - left));
    const found = new Array(width).fill(0);
    curve.forEach((b, i) => {
      const x = Math.floor((i * width) / curve.length);
      if (b > found[x]) found[x] = b;
    });
    for (let x = 1; x < width; x++) if (!found[x] && curve.length < width) found[x] = found[x - 1];
    return found;
  }

  y(value, top) {
    const { top: above, bottom } = this.frame;
    return bottom - ((bottom - above) * value) / top;
  }

  path(curve, top, closed) {
    const { left, bottom } = this.frame;
    const points = this.buckets(curve).map((b, x) => `${left + x} ${this.y(b, top).toFixed(1)}`);
    return closed ? `M${left} ${bottom}L${points.join("L")}V${bottom}Z` : `M${points.join("L")}`;
  }

  axes(top) {
    const { left, right, bottom } = this.frame;
    for (const part of [0, 0.5, 1]) {
      const y = this.y(top * part, top);
      this.drawing.append(svg("path", { d: `M${left} ${y}H${right}`, class: "grid" }));
      this.drawing.append(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end", class: "axis" }, bytes(top * part)));
    }
    this.drawing.append(svg("text", { x: left - 6, y: bottom + 14, "text-anchor": "end", class: "axis" }, "comm."));
  }

  index(event) {
    const { left, right, count } = this.frame ?? { count: 0 };
    const x = event.clientX - this.root.getBoundingClientRect().left;
    return count ? Math.min(count - 1, Math.max(0, Math.floor(((x - left) * count) / (right - left)))) : -1;
  }

  hover(event) {
    const i = this.index(event);
    if (i < 0) return;
    const { left, right, top, bottom, count } = this.frame;
    const x = left + ((right - left) * i) / count;
    this.cursor.setAttribute("d", `M${x} ${top}V${bottom}`);
    const line = this.program[i];
    const { memory } = this.recording.stages[this.stage];
    this.tip.textContent = `${bytes(memory[i])} while %${this.recording.name[line]} = ${this.recording.op(line)} runs`;
    this.tip.style.left = `${Math.min(x + 10, right - 260)}px`;
    this.tip.classList.add("shown");
  }

  pick(event) {
    const i = this.index(event);
    if (i >= 0) this.onPick(this.recording.key[this.program[i]]);
  }
}

// The estimated step: compute with its stalls above, each stream of communication below.
class Lanes extends Chart {
  constructor(recording, root, caption, onPick) {
    super(recording, root, "lanes", onPick);
    this.caption = caption;
  }

  draw() {
    if (this.stage === undefined) return;
    const { lanes } = this.recording.stages[this.stage];
    this.caption.textContent = this.summary();
    if (!this.begin(lanes.length, "known for lowered programs of known sizes")) return;
    const { clientWidth: width, clientHeight: height } = this.root;
    const left = 84;
    const lane = Math.max(8, Math.min(26, (height - 16) / lanes.length - 6));
    this.frame = { left, right: width - 12, lane, end: this.makespan(this.stage) };
    lanes.forEach(([name, slices], n) => {
      const y = 8 + n * (lane + 6);
      this.drawing.append(svg("text", { x: left - 6, y: y + lane / 2 + 4, "text-anchor": "end", class: "axis" }, name));
      const drawn = new Map();
      for (const [, begin, time, kind] of slices) {
        const x = this.x(begin);
        const right = Math.max(this.x(begin + time), x + 0.4);
        // What is narrower than half a pixel and lies on what is drawn already adds nothing.
        if (right - x < 0.5 && (drawn.get(kind) ?? -1) > x) continue;
        drawn.set(kind, Math.max(right, Math.floor(x) + 1));
        this.drawing.append(svg("rect", { x, y, width: right - x, height: lane, class: `slice ${kind}` }));
      }
    });
  }

  x(time) {
    const { left, right, end } = this.frame;
    return left + ((right - left) * time) / end;
  }

  makespan(stage) {
    return Math.max(1e-9, ...this.recording.stages[stage].lanes.map(([, slices]) => {
      const last = slices[slices.length - 1];
      return last ? last[1] + last[2] : 0;
    }));
  }

  stalls(stage) {
    const [compute] = this.recording.stages[stage].lanes;
    return compute[1].reduce((total, [, , time, kind]) => total + (kind === "stall" ? time : 0), 0);
  }

  summary() {
    const text = (s) => `${(this.makespan(s) / 1e3).toPrecision(4)} ms, ${(this.stalls(s) / 1e3).toPrecision(3)} of it waiting`;
    const { stages } = this.recording;
    if (!stages[this.stage].lanes.length) return "";
    const before = this.stage > 0 && stages[this.stage - 1].lanes.length ? ` (the pass before: ${text(this.stage - 1)})` : "";
    return text(this.stage) + before;
  }

  slice(event) {
    if (!this.frame) return null;
    const { left, right, lane, end } = this.frame;
    const box = this.root.getBoundingClientRect();
    const at = ((event.clientX - box.left - left) * end) / (right - left);
    const row = this.recording.stages[this.stage].lanes[Math.floor((event.clientY - box.top - 8) / (lane + 6))];
    return row?.[1].find(([, begin, time]) => begin <= at && at <= begin + time) ?? null;
  }

  hover(event) {
    const found = this.slice(event);
    this.tip.classList.toggle("shown", found !== null);
    if (!found) return;
    const [line, begin, time, kind] = found;
    const name = this.recording.name[this.program[line]];
    const what = kind === "stall" ? `waits in front of %${name}` : `%${name}`;
    this.tip.textContent = `${what}: ${time.toPrecision(3)} µs from ${(begin / 1e3).toFixed(3)} ms on`;
    this.tip.style.left = `${Math.min(event.offsetX + 10, this.frame.right - 260)}px`;
  }

  pick(event) {
    const found = this.slice(event);
    if (found) this.onPick(this.recording.key[this.program[found[0]]]);
  }
}

// Totals by operation and phase, then every collective in order.
class Communication {
  constructor(recording, root, onPick) {
    Object.assign(this, { recording, root });
    root.addEventListener("click", (event) => {
      const row = event.target.closest("[data-position]");
      if (row) onPick(recording.key[recording.program(this.stage)[Number(row.dataset.position)]]);
    });
  }

  show(stage) {
    this.stage = stage;
    const list = this.recording.stages[stage].communication;
    this.root.replaceChildren();
    if (!list.length) {
      this.root.append(element("p", "empty", "No collectives yet."));
      return;
    }
    const totals = new Map();
    for (const [, op, axis, , size, phase] of list) {
      const id = `${op}|${axis}|${phase}`;
      const total = totals.get(id) ?? { op, axis, phase, count: 0, size: 0 };
      total.count++;
      total.size += size;
      totals.set(id, total);
    }
    const heads = ["collective", "axis", "phase", "count", "bytes a rank"];
    this.table(heads, [...totals.values()].map((t) => [t.op, t.axis, t.phase, t.count, bytes(t.size)]));
    const rows = list.slice(0, 1000).map(([name, op, axis, , size, phase]) => [`%${name}`, op, axis, phase, bytes(size)]);
    this.table(["value", "collective", "axis", "phase", "bytes"], rows, list.map((c) => c[6]));
  }

  table(heads, rows, positions) {
    const table = this.root.appendChild(element("table"));
    const head = table.createTHead().insertRow();
    for (const h of heads) head.append(element("th", "", h));
    const body = table.createTBody();
    rows.forEach((cells, n) => {
      const row = body.insertRow();
      if (positions) row.dataset.position = positions[n];
      for (const c of cells) row.append(element("td", "", String(c)));
    });
  }
}

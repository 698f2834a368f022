"use strict";
// The recording: columns of line versions, and programs put together from deltas.

const START = -1;
const KINDS = ["same", "changed", "removed", "added", "moved"];
const [SAME, CHANGED, REMOVED, ADDED, MOVED] = [0, 1, 2, 3, 4];

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

class Recording {
  constructor(data) {
    this.stages = data.stages;
    const { lines, strings } = data;
    this.count = lines.key.length;
    this.key = Int32Array.from(lines.key);
    this.keys = this.key.reduce((top, k) => Math.max(top, k), -1) + 1;
    this.name = lines.name;
    this.args = lines.args;
    this.operands = lines.operands;
    for (const column of ["op", "type", "layout", "module", "source", "phase", "passes", "traits"]) {
      this[column] = (i) => strings[lines[column][i]];
    }
    this.strings = strings;
    this.hay = new Array(this.count);
    for (const stage of this.stages) {
      stage.rewrites = stage.rewrites.map(([rule, at, ms, removed, placed, changed]) => ({
        rule: strings[rule], at, ms, removed, placed, changed,
      }));
      stage.steps = stage.rewrites.length + (stage.lines ? 1 : 0);
    }
    this.steps = [];
    this.stages.forEach((stage, s) => {
      stage.first = this.steps.length;
      for (let k = 1; s > 0 && k <= stage.steps; k++) this.steps.push({ stage: s, step: k });
    });
    this.programs = new Map();
    this.indexHistory();
  }

  // A line as the IR prints it.
  text(i) {
    const op = this.op(i);
    if (op === "output") return `return ${this.args[i]}`;
    return `%${this.name[i]}: ${this.type(i)} = ${op === "placeholder" ? "" : op}${this.args[i]}`;
  }

  // What search looks at: everything of a line that a person may remember.
  haystack(i) {
    return (this.hay[i] ??= `${this.text(i)} ${this.module(i)} ${this.source(i)} ${this.passes(i)}`.toLowerCase());
  }

  differs(a, b) {
    return a !== b && (this.type(a) !== this.type(b) || this.args[a] !== this.args[b] || this.name[a] !== this.name[b]
      || this.op(a) !== this.op(b) || this.phase(a) !== this.phase(b));
  }

  // Lines after `step` steps of a stage (all of them by default), in order.
  program(s, step = this.stages[s].steps) {
    const stage = this.stages[s];
    if (stage.lines && step === stage.steps) return Int32Array.from(stage.lines);
    if (step === stage.steps && this.programs.has(s)) return this.programs.get(s);
    if (stage.rewrites.length === 0) return this.program(s - 1);
    const listing = new Listing(this, this.program(s - 1));
    for (let k = 0; k < step; k++) listing.apply(stage.rewrites[k]);
    const made = listing.lines();
    if (step === stage.steps) this.programs.set(s, made);
    return made;
  }

  // The two programs of a step, or of a whole pass (step null), and how their nodes belong together.
  sides(s, step) {
    const stage = this.stages[s];
    if (s === 0) return { before: this.program(0), after: this.program(0), matches: null };
    const graph = stage.lines && (step === null || step === stage.steps);
    const before = step === null ? this.program(s - 1) : this.program(s, step - 1);
    const after = step === null ? this.program(s) : this.program(s, step);
    return { before, after, matches: graph ? stage.matches : null };
  }

  // Which step made and changed each node, and which node before a new graph each node stands for.
  indexHistory() {
    this.madeIn = new Int32Array(this.keys).fill(-1);
    this.changedIn = new Map();
    this.last = new Int32Array(this.keys).fill(-1);
    this.twin = new Map();
    const seen = new Uint8Array(this.keys);
    for (const i of this.stages[0].lines) seen[this.key[i]] = 1;
    this.steps.forEach(({ stage: s, step }, n) => {
      const stage = this.stages[s];
      const note = (i) => {
        const key = this.key[i];
        if (!seen[key]) { seen[key] = 1; this.madeIn[key] = n; }
        else if (this.changedIn.has(key)) this.changedIn.get(key).push(n);
        else this.changedIn.set(key, [n]);
      };
      if (step <= stage.rewrites.length) {
        const delta = stage.rewrites[step - 1];
        delta.changed.forEach(note);
        for (let p = 0; p < delta.placed.length; p += 2) note(delta.placed[p]);
      } else {
        stage.lines.forEach(note);
        for (const [before, after] of stage.matches) this.twin.set(after, before);
      }
    });
    for (let i = 0; i < this.count; i++) this.last[this.key[i]] = i;
  }
}

// A program as a linked list over keys, so that a rewrite costs what it touches.
class Listing {
  constructor(recording, lines) {
    this.recording = recording;
    const size = recording.keys + 1; // the slot behind the keys is the start
    this.root = recording.keys;
    this.next = new Int32Array(size);
    this.prev = new Int32Array(size);
    this.at = new Int32Array(size).fill(-1);
    this.length = 0;
    this.next[this.root] = this.prev[this.root] = this.root;
    let behind = this.root;
    for (const i of lines) {
      this.place(i, behind);
      behind = recording.key[i];
    }
  }

  place(line, behind) {
    const key = this.recording.key[line];
    const after = this.next[behind];
    this.next[behind] = this.prev[after] = key;
    this.next[key] = after;
    this.prev[key] = behind;
    this.at[key] = line;
    this.length++;
  }

  unlink(key) {
    this.next[this.prev[key]] = this.next[key];
    this.prev[this.next[key]] = this.prev[key];
    this.at[key] = -1;
    this.length--;
  }

  apply(delta) {
    const { key } = this.recording;
    for (const k of delta.removed) this.unlink(k);
    for (const i of delta.changed) this.at[key[i]] = i;
    const { placed } = delta;
    for (let p = 0; p < placed.length; p += 2) if (this.at[key[placed[p]]] >= 0) this.unlink(key[placed[p]]);
    for (let p = 0; p < placed.length; p += 2) {
      this.place(placed[p], placed[p + 1] === START ? this.root : placed[p + 1]);
    }
  }

  lines() {
    const found = new Int32Array(this.length);
    let n = 0;
    for (let k = this.next[this.root]; k !== this.root; k = this.next[k]) found[n++] = this.at[k];
    return found;
  }
}

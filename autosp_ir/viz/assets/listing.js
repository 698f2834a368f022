"use strict";
// The two panes: one virtual list of rows, grouped by module.

const ROW = 20;
const MARKS = [" ", "~", "−", "+", "↕"];

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Which colour a layout has: by its first placement.
function placementOf(layout) {
  const found = /: ([SRP])/.exec(layout);
  return found ? { S: "shard", R: "replicate", P: "partial" }[found[1]] : "invariant";
}

class Panes {
  constructor(recording, root, onSelect) {
    this.recording = recording;
    this.root = root;
    this.onSelect = onSelect;
    this.spacer = root.appendChild(element("div", "spacer"));
    this.window = root.appendChild(element("div", "window"));
    this.opened = new Map();
    this.depth = 3;
    this.foldUnchanged = true;
    this.onlyChanges = false;
    this.selected = -1;
    this.query = "";
    this.items = [];
    root.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(root);
    this.window.addEventListener("click", (event) => this.clicked(event));
    this.shift = 0;
    root.addEventListener("wheel", (event) => {
      const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
      if (sideways) this.sideways(sideways / 12);
    }, { passive: true });
  }

  show(rows) {
    this.rows = rows;
    this.opened.clear();
    this.arrange();
  }

  lineOf(row) {
    return this.rows.right[row] >= 0 ? this.rows.right[row] : this.rows.left[row];
  }

  // The group of a line; a line of the backward that belongs to no module stays with the one above it.
  group(line, above) {
    const { recording } = this;
    if (recording.op(line) === "placeholder") return "(inputs)";
    const path = recording.module(line);
    const backward = recording.phase(line) !== "forward";
    if (!path) return backward && above && above !== "(inputs)" ? above : "(no module)";
    const parts = path.split(".");
    const name = parts.length > this.depth ? parts.slice(0, this.depth).join(".") : path;
    return backward ? `${name} · backward` : name;
  }

  // Turns rows into what is listed: headers of module groups, rows, and gaps. A row r is the number r; others objects.
  arrange() {
    const items = [];
    const groups = new Map();
    let first = 0;
    let name = "";
    while (first < this.rows.length) {
      if (this.depth) name = this.group(this.lineOf(first), name);
      let end = first + 1;
      while (end < this.rows.length && (!this.depth || this.group(this.lineOf(end), name) === name)) end++;
      if (!this.depth) this.fill(items, first, end);
      else {
        const nth = groups.get(name) ?? 0;
        groups.set(name, nth + 1);
        this.addGroup(items, name, `${name}#${nth}`, first, end);
      }
      first = end;
    }
    this.items = items;
    this.spacer.style.height = `${items.length * ROW}px`;
    this.draw();
  }

  addGroup(items, name, id, first, end) {
    let changes = 0;
    for (let r = first; r < end; r++) if (this.rows.kind[r] !== SAME) changes++;
    if (this.onlyChanges && !changes) return;
    const open = this.opened.get(id) ?? (changes > 0 || !this.foldUnchanged);
    items.push({ name, id, changes, size: end - first, open, first });
    if (open) this.fill(items, first, end);
  }

  fill(items, first, end) {
    if (!this.onlyChanges) {
      for (let r = first; r < end; r++) items.push(r);
      return;
    }
    const near = new Uint8Array(end - first);
    for (let r = first; r < end; r++) {
      if (this.rows.kind[r] !== SAME) near.fill(1, Math.max(0, r - first - 2), Math.min(end - first, r - first + 3));
    }
    for (let r = first; r < end; r++) {
      if (near[r - first]) items.push(r);
      else if (typeof items[items.length - 1] !== "object" || !items[items.length - 1].gap) items.push({ gap: true });
    }
  }

  // Paints once before the next frame, however often it was asked for.
  draw() {
    this.asked ??= requestAnimationFrame(() => {
      this.asked = undefined;
      this.paint();
    });
  }

  paint() {
    const top = Math.max(0, Math.floor(this.root.scrollTop / ROW) - 5);
    const end = Math.min(this.items.length, top + Math.ceil(this.root.clientHeight / ROW) + 10);
    const fragment = document.createDocumentFragment();
    for (let n = top; n < end; n++) {
      const item = this.items[n];
      fragment.append(typeof item === "number" ? this.row(item) : this.header(item));
    }
    this.window.style.transform = `translateY(${top * ROW}px)`;
    this.window.replaceChildren(fragment);
  }

  header(item) {
    if (item.gap) return element("div", "row gap", "⋯");
    const made = element("div", `row group${item.changes ? " touched" : ""}`);
    made.dataset.group = item.id;
    made.append(element("span", "arrow", item.open ? "▾" : "▸"), element("span", "module", item.name));
    const detail = `${item.size} line${item.size === 1 ? "" : "s"}${item.changes ? `, ${item.changes} touched` : ""}`;
    made.append(element("span", "detail", detail));
    return made;
  }

  row(r) {
    const made = element("div", `row ${KINDS[this.rows.kind[r]]}`);
    made.append(this.cell(r, this.rows.left[r], this.rows.right[r], "left"));
    made.append(this.cell(r, this.rows.right[r], this.rows.left[r], "right"));
    return made;
  }

  cell(r, line, other, side) {
    const kind = this.rows.kind[r];
    const made = element("div", `cell ${side}`);
    if (line < 0) {
      made.classList.add("absent");
      return made;
    }
    const { recording } = this;
    made.dataset.line = line;
    made.dataset.side = side;
    if (recording.key[line] === this.selected) made.classList.add("selected");
    if (this.query && recording.haystack(line).includes(this.query)) made.classList.add("found");
    made.append(element("span", `band ${placementOf(recording.layout(line))}`));
    made.append(element("span", "mark", MARKS[kind]));
    const code = made.appendChild(element("span", "code"));
    this.tokens(code, line, kind === CHANGED ? other : -1);
    const place = [recording.source(line).replace(/^.*\//, ""), recording.module(line)].filter(Boolean).join(" ");
    if (place) code.append(element("span", "comment", `   # ${place}`));
    made.title = `${recording.text(line)}\n${place}`;
    return made;
  }

  // The line in coloured pieces; what differs from `other` is marked.
  tokens(into, line, other) {
    const { recording } = this;
    const differs = (column) => other >= 0 && column(line) !== column(other);
    const mark = (column) => (differs(column) ? " differs" : "");
    const op = recording.op(line);
    if (op !== "output") {
      into.append(element("span", "name", `%${recording.name[line]}`), ": ");
      const type = element("span", `type${mark((i) => recording.type(i))}`);
      // Beside its counterpart, a type that stayed makes room for what did not.
      if (other >= 0 && !differs((i) => recording.type(i))) type.classList.add("stayed");
      for (const piece of recording.type(line).split(/(\{[^}]*\})/)) {
        type.append(piece.startsWith("{") ? element("span", `layout ${placementOf(piece)}`, piece) : piece);
      }
      into.append(type, " = ");
    }
    const traits = recording.traits(line);
    const shown = op === "output" ? "return " : op === "placeholder" ? "" : op;
    into.append(element("span", `op ${traits}${mark((i) => recording.op(i))}`, shown));
    const args = element("span", mark((i) => recording.args[i]).trim());
    let operand = 0;
    for (const piece of recording.args[line].split(/(%\w+)/)) {
      if (!piece.startsWith("%")) args.append(piece);
      else {
        const link = element("a", "value", piece);
        link.dataset.key = recording.operands[line][operand++] ?? -1;
        args.append(link);
      }
    }
    into.append(args);
  }

  clicked(event) {
    const group = event.target.closest("[data-group]");
    if (group) {
      const item = this.items.find((i) => i.id === group.dataset.group);
      this.opened.set(item.id, !item.open);
      this.arrange();
      return;
    }
    const link = event.target.closest("a.value");
    const cell = event.target.closest(".cell[data-line]");
    if (!cell) return;
    const { side } = cell.dataset;
    this.onSelect(link ? Number(link.dataset.key) : this.recording.key[Number(cell.dataset.line)], side, !!link);
  }

  // Moves the text of both panes by some characters.
  sideways(characters) {
    this.shift = Math.min(400, Math.max(0, this.shift + characters));
    this.root.style.setProperty("--shift", Math.round(this.shift));
  }

  foldAll(open) {
    for (const item of this.items) if (item.id) this.opened.set(item.id, open);
    this.arrange();
  }

  // Scrolls to a row, opening its group when it is closed.
  reveal(row) {
    let at = this.items.indexOf(row);
    if (at < 0) {
      const group = this.items.findLast((i) => i.id && i.first <= row && row < i.first + i.size);
      if (!group) return;
      this.opened.set(group.id, true);
      const only = this.onlyChanges;
      this.onlyChanges = false;
      this.arrange();
      this.onlyChanges = only;
      at = this.items.indexOf(row);
    }
    const height = this.root.clientHeight;
    const y = at * ROW;
    if (y < this.root.scrollTop + 2 * ROW || y > this.root.scrollTop + height - 3 * ROW) {
      this.root.scrollTop = Math.max(0, y - height / 3);
    }
    this.draw();
  }

  rowOf(key) {
    const { rows, recording } = this;
    for (let r = 0; r < rows.length; r++) {
      if (rows.right[r] >= 0 && recording.key[rows.right[r]] === key) return r;
    }
    for (let r = 0; r < rows.length; r++) {
      if (rows.left[r] >= 0 && recording.key[rows.left[r]] === key) return r;
    }
    return -1;
  }

  // Rows that the query occurs in.
  search(query) {
    this.query = query.trim().toLowerCase();
    const found = [];
    for (let r = 0; this.query && r < this.rows.length; r++) {
      const { left, right } = this.rows;
      if ((right[r] >= 0 && this.recording.haystack(right[r]).includes(this.query))
        || (left[r] >= 0 && this.recording.haystack(left[r]).includes(this.query))) found.push(r);
    }
    this.draw();
    return found;
  }
}

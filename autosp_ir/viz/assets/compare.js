"use strict";
// Two programs side by side: the same rules as autosp_ir/viz/matching.py.

// Rows as three columns: kind, line on the left or -1, line on the right or -1.
function compare(recording, before, after, matches) {
  const { key } = recording;
  const right = new Int32Array(recording.keys).fill(-1);
  after.forEach((i, p) => { right[key[i]] = p; });
  const partner = matches ? new Map(matches) : null;
  const position = Int32Array.from(before, (i) => {
    const other = partner ? partner.get(key[i]) : key[i];
    return other === undefined ? -1 : right[other];
  });
  const anchor = increasing(position);
  const matched = new Int32Array(after.length).fill(-1);
  position.forEach((p, i) => { if (p >= 0) matched[p] = i; });
  const size = before.length + after.length;
  const rows = { kind: new Uint8Array(size), left: new Int32Array(size), right: new Int32Array(size), length: 0 };
  const counts = { same: 0, changed: 0, removed: 0, added: 0, moved: 0 };
  const push = (kind, l, r) => {
    const n = rows.length++;
    rows.kind[n] = kind;
    rows.left[n] = l;
    rows.right[n] = r;
    if (kind !== MOVED || r >= 0) counts[KINDS[kind]]++;
  };
  let i = 0;
  let j = 0;
  while (i < before.length || j < after.length) {
    while (i < before.length && !anchor[i]) {
      push(position[i] < 0 ? REMOVED : MOVED, before[i], -1);
      i++;
    }
    while (j < after.length && (matched[j] < 0 || !anchor[matched[j]])) {
      push(matched[j] < 0 ? ADDED : MOVED, -1, after[j]);
      j++;
    }
    if (i < before.length && j < after.length) {
      push(differ(recording, before[i], after[j], matches) ? CHANGED : SAME, before[i], after[j]);
      i++;
      j++;
    }
  }
  rows.counts = counts;
  return rows;
}

// Across graphs names mean nothing, so only operation, type and phase count.
function differ(recording, a, b, matches) {
  if (!matches) return recording.differs(a, b);
  return recording.op(a) !== recording.op(b) || recording.type(a) !== recording.type(b)
    || recording.phase(a) !== recording.phase(b);
}

// Marks a longest increasing subsequence of the positions that are not -1: what did not move.
function increasing(positions) {
  const tails = [];
  const ends = [];
  const previous = new Int32Array(positions.length).fill(-1);
  for (let i = 0; i < positions.length; i++) {
    const p = positions[i];
    if (p < 0) continue;
    let low = 0;
    let high = tails.length;
    if (high && tails[high - 1] < p) low = high;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (tails[middle] < p) low = middle + 1;
      else high = middle;
    }
    previous[i] = low ? ends[low - 1] : -1;
    tails[low] = p;
    ends[low] = i;
  }
  const marks = new Uint8Array(positions.length);
  for (let i = ends.length ? ends[ends.length - 1] : -1; i >= 0; i = previous[i]) marks[i] = 1;
  return marks;
}

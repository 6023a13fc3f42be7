"use strict";
(() => {
  const LAYERS = 6, ZEROS = 12, EMPTY = 13, COLUMNS = 16;
  const ORDER = [...Array(ZEROS).keys()].sort((a, b) => a % LAYERS - b % LAYERS || a - b).concat([15, 14, ZEROS]);
  const RULER = 24, BAND = 28, LANE = 20, GAP = 4;
  const MARKS = { corruption: "--bad", leak: "--warn", note: "--soft" };

  const human = (size) => {
    if (size < 1024) return `${Math.round(size)} B`;
    let power = 0;
    while (size >= 1024 && power < 6) { size /= 1024; power++; }
    const digits = size >= 100 ? 0 : size >= 10 ? 1 : 2;
    return `${size.toFixed(digits).replace(/\.?0+$/, (end) => end.includes(".") ? "" : end)} ${"BKMGTPE"[power]}iB`;
  };
  const percent = (share) => share >= 0.9995 ? "100 %" : share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(1)} %`;
  const hex = (number) => `0x${number.toString(16)}`;

  const element = (name, properties = {}, children = []) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  // Numbers and bytes from base64, as tapfs/report/packing.py writes them.
  class Packed {
    constructor(text) {
      const raw = atob(text);
      this.bytes = Uint8Array.from(raw, (letter) => letter.charCodeAt(0));
      this.at = 0;
    }
    get more() { return this.at < this.bytes.length; }
    byte() { return this.bytes[this.at++]; }
    number() {
      let value = 0, scale = 1;
      for (;;) {
        const part = this.bytes[this.at++];
        value += (part & 127) * scale;
        if (part < 128) return value;
        scale *= 128;
      }
    }
  }

  const unpackRuns = (text, shift) => {
    const packed = new Packed(text), unit = 2 ** shift, runs = [];
    let offset = 0, expected = 0;
    while (packed.more) {
      const head = packed.byte(), length = packed.number() * unit;
      let host = null;
      if (head & 16) {
        const distance = packed.number();
        host = expected + (distance % 2 ? -(distance + 1) / 2 : distance / 2) * unit;
        expected = host + length;
      }
      runs.push({ offset, length, column: head & 15, host });
      offset += length;
    }
    return runs;
  };

  // Pieces of the disk that are alike: where they begin and end, and the share of each column.
  const unpackBins = (text, width, size) => {
    const packed = new Packed(text), pieces = [];
    let bin = 0;
    while (packed.more) {
      const count = packed.number() + 1, mask = packed.number(), shares = new Float64Array(COLUMNS);
      const present = [...Array(COLUMNS).keys()].filter((column) => mask >> column & 1);
      let left = 1;
      for (const column of present.slice(0, -1)) {
        shares[column] = packed.byte() / 255;
        left -= shares[column];
      }
      if (present.length) shares[present[present.length - 1]] = Math.max(left, 0.002);
      pieces.push({ offset: bin * width, length: Math.min(count * width, size - bin * width), shares });
      bin += count;
    }
    return pieces;
  };

  // Levels of the map: of each, pieces and the sums up to each, so that a range of any length costs a search.
  class DiskMap {
    constructor(data) {
      this.size = data.size;
      this.runs = data.runs === null ? null : unpackRuns(data.runs, data.shift);
      const pieces = this.runs ?? unpackBins(data.bins, data.width, data.size);
      this.finest = this.runs === null ? data.width : 1;
      this.starts = Float64Array.from(pieces, (piece) => piece.offset);
      this.pieces = pieces;
      this.sums = Array.from({ length: COLUMNS }, () => new Float64Array(pieces.length + 1));
      pieces.forEach((piece, number) => {
        for (let column = 0; column < COLUMNS; column++) {
          const share = piece.shares ? piece.shares[column] : Number(piece.column === column);
          this.sums[column][number + 1] = this.sums[column][number] + share * piece.length;
        }
      });
    }
    indexAt(offset) {
      let low = 0, high = this.starts.length;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (this.starts[middle] <= offset) low = middle; else high = middle;
      }
      return low;
    }
    upTo(offset, into) {
      const number = this.indexAt(offset), piece = this.pieces[number];
      for (let column = 0; column < COLUMNS; column++) {
        const before = this.sums[column][number];
        const inside = piece.length ? Math.min(1, (offset - piece.offset) / piece.length) : 0;
        into[column] = before + (this.sums[column][number + 1] - before) * inside;
      }
      return into;
    }
    // The share of each column between two offsets.
    shares(start, end) {
      if (!this.pieces.length || end <= start) return new Float64Array(COLUMNS);
      const low = this.upTo(start, new Float64Array(COLUMNS)), high = this.upTo(end, new Float64Array(COLUMNS));
      return high.map((sum, column) => (sum - low[column]) / (end - start));
    }
  }

  // Colours and patterns of the theme that shows now; a canvas does not know those of the style sheet.
  const palette = () => {
    const probe = document.querySelector(".palette"), found = {};
    const colour = (value) => { probe.style.color = value; return getComputedStyle(probe).color; };
    for (const name of ["--ink", "--soft", "--line", "--card", "--raised", "--link", "--bad", "--warn", "--empty"]) found[name] = colour(`var(${name})`);
    const fills = [];
    for (let column = 0; column < COLUMNS; column++) {
      probe.className = `palette k${column}`;
      fills.push(colour(""));
    }
    probe.className = "palette";
    found.fills = fills;
    return found;
  };

  const pattern = (context, column, colours) => {
    const fill = colours.fills[column];
    if (column < LAYERS || column === EMPTY) return fill;
    const tile = element("canvas", { width: 8, height: 8 }), brush = tile.getContext("2d");
    brush.fillStyle = fill;
    brush.fillRect(0, 0, 8, 8);
    brush.lineWidth = 2;
    if (column === ZEROS) {
      brush.fillStyle = colours["--soft"];
      for (const [x, y] of [[1, 1], [5, 1], [1, 5], [5, 5]]) brush.fillRect(x, y, 1.4, 1.4);
    } else {
      brush.strokeStyle = column < ZEROS ? "rgba(255,255,255,0.66)" : colours["--card"];
      for (const shift of [-8, 0, 8]) {
        brush.beginPath();
        if (column < ZEROS) { brush.moveTo(shift, 8); brush.lineTo(shift + 8, 0); } else { brush.moveTo(shift, 0); brush.lineTo(shift + 8, 8); }
        brush.stroke();
      }
    }
    return context.createPattern(tile, "repeat");
  };

  const fitted = (canvas) => {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.clearRect(0, 0, width, height);
    return { context, width, height };
  };

  const columns = (context, map, start, end, left, top, width, height, fills) => {
    context.fillStyle = fills[EMPTY];
    context.fillRect(left, top, width, height);
    const step = (end - start) / width;
    const low = map.upTo(start, new Float64Array(COLUMNS)), high = new Float64Array(COLUMNS);
    // One path for each column: a canvas fills a thousand bars of one pattern in one go.
    const paths = fills.map(() => new Path2D());
    for (let x = 0; x < width; x++) {
      map.upTo(Math.min(end, start + (x + 1) * step), high);
      let at = top + height;
      for (const column of ORDER) {
        const share = (high[column] - low[column]) / step;
        if (share > 1e-9) {
          const tall = Math.max(1, Math.min(share * height, at - top));
          paths[column].rect(left + x, at - tall, 1, tall);
          at -= tall;
        }
      }
      low.set(high);
    }
    for (const column of ORDER) { context.fillStyle = fills[column]; context.fill(paths[column]); }
  };

  class Viewer {
    constructor(article, data) {
      this.article = article;
      this.data = data;
      this.size = data.size;
      this.map = new DiskMap(data);
      this.start = 0;
      this.end = data.size;
      this.least = Math.min(data.size, Math.max(512, this.map.runs ? 4096 : this.map.finest * 8));
      const find = (name) => article.querySelector(name);
      this.box = find(".viewer");
      this.canvas = find(".bands");
      this.overview = find(".overview");
      this.readout = find(".readout");
      this.range = find(".range");
      this.body = find(".pieces tbody");
      this.pointer = null;
      this.bind();
    }
    bind() {
      const actions = { in: () => this.zoom(0.5), out: () => this.zoom(2), left: () => this.pan(-0.25), right: () => this.pan(0.25), all: () => this.show(0, this.size) };
      for (const button of this.article.querySelectorAll("button[data-do]")) button.addEventListener("click", () => { actions[button.dataset.do](); this.tell(); });
      for (const button of this.article.querySelectorAll("button[data-from]")) {
        button.addEventListener("click", () => {
          const from = Number(button.dataset.from), length = Number(button.dataset.length) || Math.max(this.least, this.size / 256);
          this.show(from - (button.dataset.length ? length * 0.02 : length / 2), from + length * (button.dataset.length ? 1.02 : 0.5));
          this.box.focus();
          this.tell();
        });
      }
      this.box.addEventListener("keydown", (event) => this.key(event));
      this.box.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && document.activeElement !== this.box) return;
        event.preventDefault();
        this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.offsetAt(event.offsetX));
      }, { passive: false });
      this.box.addEventListener("pointerdown", (event) => { this.grip = { x: event.clientX, start: this.start }; this.box.setPointerCapture(event.pointerId); this.box.classList.add("held"); });
      this.box.addEventListener("pointermove", (event) => {
        if (this.grip) {
          const length = this.end - this.start;
          const start = this.grip.start - (event.clientX - this.grip.x) * length / this.canvas.clientWidth;
          this.show(start, start + length);
        }
        this.pointer = event.offsetX;
        this.draw();
        this.tell(this.offsetAt(event.offsetX));
      });
      const release = () => { this.grip = null; this.box.classList.remove("held"); };
      this.box.addEventListener("pointerup", release);
      this.box.addEventListener("pointercancel", release);
      this.box.addEventListener("pointerleave", () => { this.pointer = null; this.draw(); });
      this.box.addEventListener("dblclick", (event) => this.zoom(0.25, this.offsetAt(event.offsetX)));
      this.overview.addEventListener("pointerdown", (event) => {
        const at = event.offsetX / this.overview.clientWidth * this.size, length = this.end - this.start;
        if (length >= this.size) this.zoom(0.125, at); else this.show(at - length / 2, at + length / 2);
        this.tell();
      });
    }
    key(event) {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const length = this.end - this.start;
      const keys = {
        "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), "0": () => this.show(0, this.size),
        ArrowLeft: () => this.pan(-0.125), ArrowRight: () => this.pan(0.125), PageUp: () => this.pan(-0.9), PageDown: () => this.pan(0.9),
        Home: () => this.show(0, length), End: () => this.show(this.size - length, this.size), n: () => this.finding(1), p: () => this.finding(-1),
      };
      if (!(event.key in keys)) return;
      event.preventDefault();
      this.pointer = null;
      keys[event.key]();
      this.tell();
    }
    finding(step) {
      const places = this.data.marks.map((mark) => mark[1]).sort((a, b) => a - b);
      const middle = (this.start + this.end) / 2, length = this.end - this.start, near = length / 1000;
      const next = step > 0 ? places.find((place) => place > middle + near) : places.findLast((place) => place < middle - near);
      if (next !== undefined) { const wide = Math.min(length, this.size / 16); this.show(next - wide / 2, next + wide / 2, true); }
    }
    offsetAt(x) { return Math.min(this.size - 1, Math.max(0, this.start + x / this.canvas.clientWidth * (this.end - this.start))); }
    zoom(factor, at = (this.start + this.end) / 2) {
      const length = Math.min(this.size, Math.max(this.least, (this.end - this.start) * factor));
      const start = at - (at - this.start) * length / (this.end - this.start);
      this.show(start, start + length);
    }
    pan(part) { const by = (this.end - this.start) * part; this.show(this.start + by, this.end + by); }
    show(start, end) {
      const length = Math.min(this.size, Math.max(this.least, end - start));
      this.start = Math.min(Math.max(0, start), this.size - length);
      this.end = this.start + length;
      this.draw();
      this.list();
    }
    words(start, end) {
      const shares = this.map.shares(start, end);
      return [...ORDER, EMPTY].filter((column) => shares[column] > 1e-9)
        .map((column) => `${shares[column] > 0.9995 ? "" : `${percent(shares[column])} `}${this.data.names[column]}`).join(", ");
    }
    tell(at = null) {
      const place = at ?? (this.start + this.end) / 2, lines = [];
      if (this.map.runs) {
        const run = this.map.pieces[this.map.indexAt(place)];
        const where = run.host === null ? "" : `, at ${hex(run.host)} of its file`;
        lines.push(`${human(run.offset)} to ${human(run.offset + run.length)} (${hex(run.offset)}, ${human(run.length)}): ${this.data.names[run.column]}${where}.`);
      } else {
        const step = Math.max(this.map.finest, (this.end - this.start) / this.canvas.clientWidth);
        const start = Math.floor(place / step) * step, end = Math.min(this.size, start + step);
        lines.push(`${human(start)} + ${human(end - start)} (${hex(Math.floor(start))}): ${this.words(start, end)}.`);
      }
      for (const band of this.data.bands) if (place >= band[0] && place < band[0] + band[1]) lines.push(`${band[2]}.`);
      const near = (this.end - this.start) / 200;
      for (const mark of this.data.marks) if (Math.abs(mark[1] - place) <= near) lines.push(`${mark[0]}: ${mark[2]}.`);
      if (at === null) lines.unshift(`Shown: ${human(this.start)} to ${human(this.end)}. In the middle:`);
      this.readout.textContent = lines.join(" ");
    }
    list() {
      const rows = [], first = this.map.indexAt(this.start), last = this.map.indexAt(Math.max(this.start, this.end - 1));
      const row = (start, length, text) => element("tr", {}, [element("td", { className: "n mono", textContent: hex(Math.floor(start)) }), element("td", { className: "n", textContent: human(length) }), element("td", { textContent: text })]);
      if (this.map.runs && last - first < 24) {
        for (const run of this.map.pieces.slice(first, last + 1)) rows.push(row(run.offset, run.length, this.data.names[run.column] + (run.host === null ? "" : `, at ${hex(run.host)} of its file`)));
      } else {
        const step = (this.end - this.start) / 24;
        for (let at = 0; at < 24; at++) rows.push(row(this.start + at * step, step, this.words(this.start + at * step, this.start + (at + 1) * step)));
      }
      this.body.replaceChildren(...rows);
    }
    draw() {
      if (!this.canvas.clientWidth || !this.size) return;
      this.colours = palette();
      const { context, width, height } = fitted(this.canvas), colours = this.colours, length = this.end - this.start;
      this.fills = colours.fills.map((_, column) => pattern(context, column, colours));
      const x = (offset) => (offset - this.start) / length * width;
      const font = getComputedStyle(this.readout).fontFamily;
      this.ruler(context, width, x, font);
      let top = RULER;
      if (this.data.bands.length) { this.bands(context, width, top, x, font); top += BAND + GAP; }
      const lane = this.data.marks.length ? LANE : 0, tall = height - top - lane;
      // Inside of the frame, which would cover the lowest bars.
      columns(context, this.map, this.start, this.end, 0, top + 1, Math.ceil(width), tall - 2, this.fills);
      context.strokeStyle = colours["--line"];
      context.strokeRect(0.5, top + 0.5, width - 1, tall - 1);
      this.marks(context, x, top, height);
      if (this.pointer !== null) { context.fillStyle = colours["--ink"]; context.fillRect(Math.round(this.pointer), top, 1, tall); }
      this.drawOverview();
      const finest = this.map.runs ? "every run is exact" : `the finest resolution in this page is ${human(this.map.finest)}`;
      this.range.textContent = `${human(this.start)} to ${human(this.end)} of ${human(this.size)}; ${finest}`;
    }
    ruler(context, width, x, font) {
      const colours = this.colours, length = this.end - this.start;
      let step = 2 ** Math.ceil(Math.log2(length / Math.max(1, width / 110)));
      step = Math.max(step, 1);
      context.font = `12px ${font}`;
      context.textBaseline = "top";
      for (let at = Math.ceil(this.start / step) * step; at <= this.end; at += step) {
        const left = Math.round(x(at)), text = human(at), wide = context.measureText(text).width;
        context.fillStyle = colours["--line"];
        context.fillRect(Math.min(left, width - 1), 16, 1, RULER - 16);
        context.fillStyle = colours["--soft"];
        context.fillText(text, Math.min(Math.max(0, left - wide / 2), width - wide), 1);
      }
    }
    bands(context, width, top, x, font) {
      const colours = this.colours;
      context.font = `12px ${font}`;
      context.textBaseline = "middle";
      for (const [offset, length, text, , inner] of this.data.bands) {
        const left = Math.max(0, x(offset)), right = Math.min(width, x(offset + length));
        if (right <= 0 || left >= width) continue;
        const high = inner ? BAND - 8 : BAND, y = top + (inner ? 4 : 0), wide = Math.max(1, right - left - 1);
        context.fillStyle = colours["--raised"];
        context.fillRect(left, y, wide, high);
        context.strokeStyle = colours["--soft"];
        if (wide > 2) context.strokeRect(left + 0.5, y + 0.5, wide - 1, high - 1);
        if (wide < 24) continue;
        context.save();
        context.beginPath();
        context.rect(left, y, wide - 4, high);
        context.clip();
        context.fillStyle = colours["--ink"];
        context.fillText(text, left + 7, y + high / 2 + 0.5);
        context.restore();
      }
    }
    marks(context, x, top, height) {
      for (const [severity, offset] of this.data.marks) {
        const at = x(offset);
        if (at < -6 || at > this.canvas.clientWidth + 6) continue;
        context.fillStyle = context.strokeStyle = this.colours[MARKS[severity]];
        context.fillRect(Math.round(at), top, 1, height - top - LANE);
        context.beginPath();
        if (severity === "corruption") { context.moveTo(at, height - LANE + 2); context.lineTo(at - 7, height - 3); context.lineTo(at + 7, height - 3); context.fill(); }
        else { context.arc(at, height - LANE / 2, 5, 0, 7); if (severity === "leak") context.fill(); else context.stroke(); }
      }
    }
    drawOverview() {
      const { context, width, height } = fitted(this.overview), colours = this.colours;
      context.fillStyle = this.fills[EMPTY];
      context.fillRect(0, 0, width, height);
      columns(context, this.map, 0, this.size, 0, 2, Math.ceil(width), height - 4, this.fills);
      const left = this.start / this.size * width, right = this.end / this.size * width;
      context.globalAlpha = 0.72;
      context.fillStyle = colours["--card"];
      context.fillRect(0, 0, left, height);
      context.fillRect(right, 0, width - right, height);
      context.globalAlpha = 1;
      context.strokeStyle = colours["--ink"];
      context.lineWidth = 2;
      context.strokeRect(left + 1, 1, Math.max(2, right - left - 2), height - 2);
    }
  }

  // The plot of disk (to the right) against image file (down): a diagonal is read in order, a cloud is scattered.
  class Grid {
    constructor(canvas, data) {
      this.canvas = canvas;
      this.data = data;
      const packed = new Packed(data.grid.cells);
      this.levels = [];
      while (packed.more) {
        const number = packed.number();
        for (let count = Math.floor(number / 16); count >= 0; count--) this.levels.push(number % 16);
      }
    }
    draw() {
      const { context, width, height } = fitted(this.canvas), colours = palette(), grid = this.data.grid;
      const font = getComputedStyle(document.body).fontFamily, left = 62, top = 22;
      const wide = (width - left - 1) / grid.across, tall = (height - top - 1) / grid.down;
      context.fillStyle = colours["--raised"];
      context.fillRect(left, top, width - left, height - top);
      context.fillStyle = colours.fills[0];
      this.levels.forEach((level, cell) => {
        if (!level) return;
        context.globalAlpha = 0.25 + 0.05 * level;
        context.fillRect(left + cell % grid.across * wide, top + Math.floor(cell / grid.across) * tall, Math.max(1.5, wide), Math.max(1.5, tall));
      });
      context.globalAlpha = 1;
      context.strokeStyle = colours["--soft"];
      context.strokeRect(left + 0.5, top + 0.5, width - left - 1, height - top - 1);
      for (const [severity, place] of this.data.hostMarks) {
        context.fillStyle = colours[MARKS[severity]];
        context.fillRect(left - 8, top + place / (grid.down * grid.y) * (height - top) - 1, 7, 3);
      }
      context.fillStyle = colours["--soft"];
      context.font = `12px ${font}`;
      context.textBaseline = "top";
      for (const part of [0, 0.5, 1]) {
        const text = human(this.data.size * part), across = context.measureText(text).width;
        context.fillText(text, Math.max(left, Math.min(left + (width - left) * part - across / 2, width - across)), 3);
        const down = human(grid.down * grid.y * part);
        context.fillText(down, left - 12 - context.measureText(down).width, Math.min(height - 14, Math.max(top, top + (height - top) * part - 7)));
      }
    }
  }

  const drawn = [];
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watch.unobserve(entry.target);
      const article = entry.target, data = JSON.parse(article.querySelector("script").textContent);
      const viewer = new Viewer(article, data);
      viewer.show(0, viewer.size);
      viewer.tell();
      drawn.push(viewer);
      const canvas = article.querySelector(".grid");
      if (canvas) { const grid = new Grid(canvas, data); grid.draw(); drawn.push(grid); }
      article.dataset.drawn = "yes";
    }
  }, { rootMargin: "400px" });
  for (const article of document.querySelectorAll("article[data-picture]")) watch.observe(article);

  const redraw = () => drawn.forEach((each) => each.draw());
  window.addEventListener("resize", redraw);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", redraw);
  const button = document.querySelector(".theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const root = document.documentElement, now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    button.setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
    redraw();
  });
  button.setAttribute("aria-pressed", String(dark.matches));
})();

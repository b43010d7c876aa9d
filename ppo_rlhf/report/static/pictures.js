// Pictures of a policy: colours over a plane of its environment's state, arrows, episodes; a slider over the training.

const OPPOSITES = [[42, 98, 201], [127, 164, 232], [243, 242, 238], [240, 162, 105], [206, 84, 22]];
const AMOUNTS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis
const FRAME_MILLISECONDS = 700;
const DECISION_MILLISECONDS = 30;

/** Short, as for a reader: 3 digits, and a true minus. */
const shown = (number) =>
  number === null ? "not finite" : Number(number.toPrecision(3)).toString().replace("-", "−");

/** The colour of a share of the scale, 0 to 1. */
function colourAt(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const index = Math.min(Math.floor(at), stops.length - 2);
  return stops[index].map((low, i) => Math.round(low + (at - index) * (stops[index + 1][i] - low)));
}

function make(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** One quantity over one plane of the state. */
class Field {
  constructor(data, variables) {
    this.data = data;
    [this.across, this.up] = [variables[data.across], variables[data.up]];
    this.stops = data.opposites ? OPPOSITES : AMOUNTS;
    this.canvas = make("canvas", { tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", data.summary);
    this.reading = make("output");
    this.cross = null; // column and row of the grid, fractions
    const colours = make("div", { className: "colours" });
    colours.style.background = `linear-gradient(to right, ${this.stops.map((stop) => `rgb(${stop})`).join()})`;
    const named = ({ name, unit }) => (unit ? `${name}, ${unit}` : name);
    const ends = (kind, ...texts) =>
      make("div", { className: `ends ${kind}` }, ...texts.map((text) => make("span", { textContent: text })));
    const axis = (kind, variable) => ends(kind, shown(variable.low), named(variable), shown(variable.high));
    this.root = make(
      "figure", { className: "field" },
      make("figcaption", { textContent: named(data) }),
      axis("up", this.up), this.canvas, axis("across", this.across), colours,
      ends("scale", ...[data.low, (data.low + data.high) / 2, data.high].map(shown)),
      this.reading,
    );
    this.listen();
  }

  listen() {
    const last = this.data.grids[0].length - 1;
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.point([(event.clientX - box.left) / box.width * last, (1 - (event.clientY - box.top) / box.height) * last]);
    });
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (!move) return;
      event.preventDefault();
      this.point((this.cross ?? [last / 2, last / 2]).map((at, i) => at + move[i]));
    });
  }

  /** Reads the grid's nearest point. */
  point(at) {
    const last = this.data.grids[0].length - 1;
    this.cross = at && at.map((each) => Math.min(Math.max(Math.round(each), 0), last));
    this.reading.textContent = this.cross ? this.told(last) : "";
    this.draw();
  }

  told(last) {
    const value = ([variable, index]) =>
      `${variable.name} ${shown(variable.low + index / last * (variable.high - variable.low))} ${variable.unit}`.trim();
    const number = this.data.grids[this.frame][this.cross[1]][this.cross[0]];
    const state = [[this.across, this.cross[0]], [this.up, this.cross[1]]].map(value).join(", ");
    return `${state}: ${this.data.name} ${shown(number)} ${this.data.unit}`.trim();
  }

  show(frame, episodes, decision) {
    Object.assign(this, { frame, episodes, decision });
    if (this.cross) this.point(this.cross);
    else this.draw();
  }

  draw() {
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!width) return;
    [this.canvas.width, this.canvas.height] = [width * scale, height * scale];
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    this.paintGrid(context, width, height);
    this.paintArrows(context, width, height);
    this.paintEpisodes(context, width, height);
    if (this.cross) this.paintCross(context, width, height);
  }

  /** The grid's outermost points lie on the edges. */
  paintGrid(context, width, height) {
    const grid = this.data.grids[this.frame];
    const [count, image] = [grid.length, new ImageData(grid.length, grid.length)];
    grid.forEach((row, y) => row.forEach((number, x) => {
      const share = (number - this.data.low) / (this.data.high - this.data.low || 1);
      const colour = number === null ? [128, 128, 128] : colourAt(this.stops, share);
      image.data.set([...colour, 255], 4 * ((count - 1 - y) * count + x));
    }));
    const small = make("canvas", { width: count, height: count });
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0.5, 0.5, count - 1, count - 1, 0, 0, width, height);
  }

  paintArrows(context, width, height) {
    const field = this.data.arrows[this.frame];
    if (!field) return;
    const [count, gap] = [field.length, Math.min(width, height) / field.length];
    const unit = [width / (this.across.high - this.across.low), height / (this.up.high - this.up.low)];
    const steps = field.map((row) => row.map(([x, y]) => [x * unit[0], -y * unit[1]]));
    const longest = Math.max(...steps.flat().map(([x, y]) => Math.hypot(x, y))) || 1;
    context.strokeStyle = context.fillStyle = this.data.opposites ? "rgb(20 20 30 / .5)" : "rgb(255 255 255 / .65)";
    context.lineWidth = 1;
    steps.forEach((row, j) => row.forEach(([x, y], i) => {
      const length = Math.hypot(x, y);
      if (!length) return;
      const drawn = gap * (0.25 + 0.6 * Math.sqrt(length / longest)) / length;
      this.arrow(context, (i / (count - 1)) * width, (1 - j / (count - 1)) * height, x * drawn, y * drawn);
    }));
  }

  arrow(context, x, y, dx, dy) {
    const length = Math.hypot(dx, dy);
    const [ux, uy, head] = [dx / length, dy / length, Math.min(5, length / 2)];
    context.beginPath();
    context.moveTo(x - dx / 2, y - dy / 2);
    context.lineTo(x + dx / 2, y + dy / 2);
    context.stroke();
    context.beginPath();
    context.moveTo(x + dx / 2, y + dy / 2);
    context.lineTo(x + dx / 2 - head * (ux - uy / 2), y + dy / 2 - head * (uy + ux / 2));
    context.lineTo(x + dx / 2 - head * (ux + uy / 2), y + dy / 2 - head * (uy - ux / 2));
    context.fill();
  }

  paintEpisodes(context, width, height) {
    const place = (state) => [
      (state[this.data.across] - this.across.low) / (this.across.high - this.across.low) * width,
      (1 - (state[this.data.up] - this.up.low) / (this.up.high - this.up.low)) * height,
    ];
    const jumps = (before, after) =>
      (this.across.turns && Math.abs(after[0] - before[0]) > width / 2) ||
      (this.up.turns && Math.abs(after[1] - before[1]) > height / 2);
    for (const states of this.episodes) {
      const points = states.slice(0, this.decision === null ? states.length : this.decision + 1).map(place);
      for (const [colour, thickness] of [["rgb(255 255 255 / .8)", 3], ["#15151c", 1.3]]) {
        context.strokeStyle = context.fillStyle = colour;
        context.lineWidth = thickness;
        context.lineJoin = "round";
        context.beginPath();
        points.forEach((point, i) =>
          i === 0 || jumps(points[i - 1], point) ? context.moveTo(...point) : context.lineTo(...point));
        context.stroke();
        context.beginPath();
        context.arc(...points[0], 4.5, 0, 2 * Math.PI);
        context.stroke();
        context.beginPath();
        context.arc(...points[points.length - 1], thickness + 2.4, 0, 2 * Math.PI);
        context.fill();
      }
    }
  }

  paintCross(context, width, height) {
    const last = this.data.grids[0].length - 1;
    const [x, y] = [this.cross[0] / last * width, (1 - this.cross[1] / last) * height];
    for (const [colour, thickness] of [["#fff", 3], ["#15151c", 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = thickness;
      context.strokeRect(x - 5, y - 5, 10, 10);
    }
  }
}

/** The figures of one run at a time, and their controls. */
class Pictures {
  constructor(root) {
    this.find = (selector) => root.querySelector(selector);
    this.policies = JSON.parse(this.find("script").textContent);
    this.slider = this.find("input");
    this.fields = [];
    this.playing = null; // the pressed button, and its timer
    this.find(".run").hidden = this.policies.length === 1;
    this.find("select").append(...this.policies.map(({ name }, value) => make("option", { value, textContent: name })));
    this.find("select").addEventListener("change", (event) => this.choose(Number(event.target.value)));
    this.slider.addEventListener("input", () => {
      this.stop();
      this.show();
    });
    this.listen(".learn", (turn) => this.learn(turn), FRAME_MILLISECONDS);
    this.listen(".act", (turn) => this.show(turn), DECISION_MILLISECONDS);
    new ResizeObserver(() => this.fields.forEach((field) => field.draw())).observe(this.find(".fields"));
    this.choose(0);
  }

  choose(index) {
    this.stop();
    this.policy = this.policies[index];
    this.fields = this.policy.figures.map((data) => new Field(data, this.policy.variables));
    this.find(".fields").replaceChildren(...this.fields.map((field) => field.root));
    this.slider.max = this.policy.frames.length - 1;
    this.slider.value = this.slider.max;
    this.find(".arrows").hidden = !this.policy.figures.some((figure) => figure.arrows.length);
    this.find(".value").textContent = this.policy.value;
    this.show();
  }

  /** Shows the slider's picture, its episodes up to a decision, or whole; → whether they go on. */
  show(decision = null) {
    const index = Number(this.slider.value);
    const { label, returns, episodes } = this.policy.frames[index];
    this.find(".slider output").textContent = label;
    this.slider.setAttribute("aria-valuetext", label);
    this.find(".returns").textContent = returns.length ? `Their returns: ${returns.map(shown).join(", ")}.` : "";
    this.fields.forEach((field) => field.show(index, episodes, decision));
    return episodes.some((states) => decision < states.length - 1);
  }

  /** Shows the training's picture of that number; → whether there is another. */
  learn(number) {
    this.slider.value = number;
    this.show();
    return number < this.policy.frames.length - 1;
  }

  /** A button that calls `turn` with 0, 1, … until it has no more to show; a second press stops it. */
  listen(selector, turn, milliseconds) {
    const button = this.find(selector);
    button.addEventListener("click", () => {
      const stopped = this.playing?.button === button;
      this.stop();
      if (stopped) return;
      let count = 0;
      const timer = setInterval(() => {
        if (!turn(count++)) this.stop();
      }, milliseconds);
      this.playing = { button, timer };
      button.setAttribute("aria-pressed", "true");
    });
  }

  stop() {
    clearInterval(this.playing?.timer);
    this.playing?.button.setAttribute("aria-pressed", "false");
    this.playing = null;
  }
}

document.querySelectorAll(".policies").forEach((root) => new Pictures(root));

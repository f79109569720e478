// Charts tell their values: at the pointer, or step by step with the arrow keys.
function readable(svg) {
  const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number);
  const [x0, x1, y0, y1] = ["x0", "x1", "y0", "y1"].map((name) => Number(svg.dataset[name]));
  const names = svg.dataset.names ? svg.dataset.names.split("|") : null;
  const percent = svg.dataset.percent === "1";
  const lines = all(".line", svg).map((path) => ({
    name: path.dataset.name,
    series: [...path.classList].find((name) => name.startsWith("series-")),
    points: path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(" ").map(Number)),
  }));
  const places = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
  const pointer = find(".pointer", svg);
  const tip = find("#tip");
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(places.length - 1, index));
    const x = places[at];
    const value = x0 + ((x - left) / (right - left)) * (x1 - x0);
    const whole = Math.abs(value - Math.round(value)) < 0.3 && x1 - x0 > 5;
    const head = names ? names[Math.round(value)] : `${svg.dataset.x} ${whole ? Math.round(value) : number(value)}`;
    const rows = lines.flatMap((line) => {
      const point = line.points.find(([px]) => Math.abs(px - x) < 0.0006);
      if (!point) return [];
      const y = y0 + ((bottom - point[1]) / (bottom - top)) * (y1 - y0);
      return [make("div", { class: line.series }, `${line.name} ${percent ? `${number(100 * y)}%` : number(y)}`)];
    });
    tip.replaceChildren(make("b", {}, head), ...rows);
    tip.hidden = false;
    pointer.replaceChildren(make("svg:path", { d: `M${x} ${top}V${bottom}` }));
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const middle = box.left + x * scale;
    const wide = tip.offsetWidth;
    tip.style.left = `${Math.max(6, middle + wide + 18 > innerWidth ? middle - wide - 10 : middle + 10)}px`;
    tip.style.top = `${Math.max(6, Math.min(innerHeight - tip.offsetHeight - 6, box.top + 8))}px`;
  }

  function hide() {
    tip.hidden = true;
    pointer.replaceChildren();
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const gaps = places.map((place) => Math.abs(place - x));
    show(gaps.indexOf(Math.min(...gaps)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: places.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (move === undefined) return;
    event.preventDefault();
    show(move);
  });
}

all("svg.chart").forEach(readable);
